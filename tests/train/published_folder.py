"""A tiny published model with a tokenizer of single bytes, for layer routers to be trained on."""

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from ..models.pretrained.published import BASE, random_tensors, write_folder

CONFIG = BASE | {
    "vocab_size": 256,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


def write_model(folder, seed=0, **changes):
    """The folder of the model; its tensors are those of the seed."""
    config = CONFIG | changes
    write_folder(folder, config, random_tensors(config, seed))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def write_text(folder):
    """A file of numbered lines, long enough for both splits."""
    path = folder / "text.txt"
    path.write_text("".join(f"line {i} says {i * i % 97} and no more.\n" for i in range(9000)))
    return path
