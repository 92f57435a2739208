"""Published models in the library's own decoder: their weights and their tokenizers."""

from routing_jax.models.pretrained.load import Pretrained, load_pretrained, open_checkpoint
from routing_jax.models.pretrained.parts import Checkpoint
from routing_jax.models.pretrained.tokenizer import load_tokenizer

__all__ = ["Checkpoint", "Pretrained", "load_pretrained", "load_tokenizer", "open_checkpoint"]
