"""Published models in the library's own decoder: their weights and their tokenizers."""

from routing_jax.models.pretrained.load import Pretrained, load_pretrained, open_checkpoint
from routing_jax.models.pretrained.parts import Checkpoint
from routing_jax.models.pretrained.routed import load_routed, save_routers
from routing_jax.models.pretrained.router_file import (
    SavedRouter,
    base_checksum,
    load_router,
    save_router,
)
from routing_jax.models.pretrained.save import check_save_folder, published_config, save_pretrained
from routing_jax.models.pretrained.tokenizer import load_tokenizer, stop_tokens

__all__ = [
    "Checkpoint",
    "Pretrained",
    "SavedRouter",
    "base_checksum",
    "check_save_folder",
    "load_pretrained",
    "load_routed",
    "load_router",
    "load_tokenizer",
    "open_checkpoint",
    "published_config",
    "save_pretrained",
    "save_router",
    "save_routers",
    "stop_tokens",
]
