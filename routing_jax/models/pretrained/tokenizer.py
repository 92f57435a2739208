"""Tokenizers of published models, as `tokenizers.Tokenizer`, from a folder or a GGUF file."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, processors
from tokenizers import pre_tokenizers as pre
from tokenizers.models import BPE

from routing_jax.models.pretrained.gguf_file import GGUF
from routing_jax.models.pretrained.hf_folder import read_json

# How text is cut into words before merging. GGUF files only name it; these are the published rules.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,DIGITS}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CONTROL, _USER_DEFINED = 3, 4  # kinds of tokens that text is never merged into


def _split(digits: int) -> list[Any]:
    words = Regex(_WORDS.replace("DIGITS", str(digits)))
    return [pre.Split(words, "isolated"), pre.ByteLevel(add_prefix_space=False, use_regex=False)]


_CUTS: dict[str, Callable[[], list[Any]]] = {
    "gpt-2": lambda: [pre.ByteLevel(add_prefix_space=False)],
    "smollm": lambda: [pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)],
    "llama-bpe": lambda: _split(3),
    "qwen2": lambda: _split(1),
}


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a checkpoint.

    Args:
      path: a Hugging Face folder with tokenizer.json, or a GGUF file with a byte-level BPE
        vocabulary, as Llama 3, SmolLM2 and Qwen have.

    Raises:
      ValueError: there is none, it is damaged, or it is of another kind.

    >>> load_tokenizer("nowhere/model")
    Traceback (most recent call last):
    ValueError: nowhere/model is neither a folder with tokenizer.json nor a GGUF file.
    """
    path = Path(path)
    if path.is_file() and path.suffix == ".gguf":
        return _from_gguf(GGUF(path))
    file = path / "tokenizer.json"
    if not file.is_file():
        raise ValueError(f"{path} is neither a folder with tokenizer.json nor a GGUF file.")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as e:  # the library raises nothing narrower
        raise ValueError(f"{file} is no tokenizer: {e}.") from e


def stop_tokens(path: str | os.PathLike[str]) -> frozenset[int]:
    """The tokens with which a checkpoint's model ends a text, as its files name them; maybe none.

    Args:
      path: a Hugging Face folder or a GGUF file.

    Raises:
      ValueError: a file is damaged, or names something else than tokens.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "config.json").write_text('{"eos_token_id": [2, 5]}')
    >>> sorted(stop_tokens(folder))
    [2, 5]
    """
    path = Path(path)
    if path.is_file():
        file = GGUF(path)
        names = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
        return frozenset(token for name in names if (token := file.get(name, int, -1)) >= 0)
    for name in ("generation_config.json", "config.json"):
        if not (path / name).is_file():
            continue
        found = read_json(path / name).get("eos_token_id")
        tokens = [] if found is None else found if isinstance(found, list) else [found]
        if not all(type(token) is int for token in tokens):
            raise ValueError(f"{path / name}: eos_token_id is {found!r}; it must hold tokens.")
        if tokens:
            return frozenset(tokens)
    return frozenset()


def _from_gguf(file: GGUF) -> Tokenizer:
    def get(name: str, *kind: Any) -> Any:
        return file.get(f"tokenizer.ggml.{name}", *kind)

    kind, cut = get("model", str), get("pre", str, "gpt-2")
    if kind != "gpt2" or cut not in _CUTS:
        raise ValueError(
            f"{file.path} has a tokenizer of model {kind!r} and pre {cut!r}; supported: model "
            f"'gpt2' with pre {', '.join(_CUTS)}; others come as a tokenizer.json."
        )
    tokens = get("tokens", list)
    kinds = get("token_type", list, [])
    merges = [tuple(merge.split(" ")) for merge in get("merges", list)]
    try:
        model = BPE({t: i for i, t in enumerate(tokens)}, merges, ignore_merges=cut == "llama-bpe")
    except Exception as e:  # the library raises nothing narrower
        raise ValueError(f"{file.path} holds no usable tokenizer: {e}.") from e
    tokenizer = Tokenizer(model)
    if cut == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre.Sequence(_CUTS[cut]())
    tokenizer.decoder = decoders.ByteLevel()
    added = [(t, kind) for t, kind in zip(tokens, kinds) if kind in (_CONTROL, _USER_DEFINED)]
    tokenizer.add_tokens(
        [AddedToken(t, special=kind == _CONTROL, normalized=False) for t, kind in added]
    )
    if get("add_bos_token", bool, cut == "llama-bpe"):
        bos = get("bos_token_id", int)
        if bos >= len(tokens):
            raise ValueError(f"{file.path} begins texts with token {bos} of {len(tokens)}.")
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos]} $A",
            pair=f"{tokens[bos]} $A $B",
            special_tokens=[(tokens[bos], bos)],
        )
    return tokenizer
