"""The tensors of a Llama-family decoder: what each format calls them, and how it stores them."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from routing_jax.models.config import DecoderConfig


class Tensor(NamedTuple):
    """A tensor that still lies in its file.

    Attributes:
      shape: its whole shape.
      read: some of its rows (a slice with start and stop) as floating-point numbers.
    """

    shape: tuple[int, ...]
    read: Callable[[slice], np.ndarray]


class Checkpoint(NamedTuple):
    """An opened checkpoint: what the model is, and where its numbers lie; none is read yet.

    Attributes:
      path: the folder or file.
      config: the model, in float32 and unrolled.
      naming: whose names the tensors have.
      tensors: all that it holds, by name.
    """

    path: Path
    config: DecoderConfig
    naming: Literal["hf", "gguf"]
    tensors: Mapping[str, Tensor]


class Part(NamedTuple):
    """One parameter of the decoder, or the same one of every layer.

    Attributes:
      ours: its name in the parameter tree, within its layer.
      dims: its dimensions there, by letter.
      stored: its dimensions in a file, where 'NH' is N·H merged into one.
      hf: its name in a Hugging Face folder; {} stands for the layer.
      gguf: its name in a GGUF file.
    """

    ours: str
    dims: str
    stored: tuple[str, ...]
    hf: str
    gguf: str


_WHOLE = (
    Part("embedding", "VD", ("V", "D"), "model.embed_tokens.weight", "token_embd.weight"),
    Part("final_norm/scale", "D", ("D",), "model.norm.weight", "output_norm.weight"),
)
_HEAD = Part("head", "DV", ("V", "D"), "lm_head.weight", "output.weight")
_HF, _GGUF = "model.layers.{}.", "blk.{}."
_ATTENTION = _HF + "self_attn."
_LAYER = (
    Part(
        "mixer_norm/scale",
        "D",
        ("D",),
        _HF + "input_layernorm.weight",
        _GGUF + "attn_norm.weight",
    ),
    Part(
        "mlp_norm/scale",
        "D",
        ("D",),
        _HF + "post_attention_layernorm.weight",
        _GGUF + "ffn_norm.weight",
    ),
    Part("mixer/query", "DNH", ("NH", "D"), _ATTENTION + "q_proj.weight", _GGUF + "attn_q.weight"),
    Part("mixer/key", "DKH", ("KH", "D"), _ATTENTION + "k_proj.weight", _GGUF + "attn_k.weight"),
    Part("mixer/value", "DKH", ("KH", "D"), _ATTENTION + "v_proj.weight", _GGUF + "attn_v.weight"),
    Part(
        "mixer/out", "NHD", ("D", "NH"), _ATTENTION + "o_proj.weight", _GGUF + "attn_output.weight"
    ),
    Part("mlp/gate", "DF", ("F", "D"), _HF + "mlp.gate_proj.weight", _GGUF + "ffn_gate.weight"),
    Part("mlp/up", "DF", ("F", "D"), _HF + "mlp.up_proj.weight", _GGUF + "ffn_up.weight"),
    Part("mlp/down", "FD", ("D", "F"), _HF + "mlp.down_proj.weight", _GGUF + "ffn_down.weight"),
)
_BIASES = (
    Part("mixer/query_bias", "NH", ("NH",), _ATTENTION + "q_proj.bias", _GGUF + "attn_q.bias"),
    Part("mixer/key_bias", "KH", ("KH",), _ATTENTION + "k_proj.bias", _GGUF + "attn_k.bias"),
    Part("mixer/value_bias", "KH", ("KH",), _ATTENTION + "v_proj.bias", _GGUF + "attn_v.bias"),
)
_QK_NORMS = (
    Part(
        "mixer/query_norm", "H", ("H",), _ATTENTION + "q_norm.weight", _GGUF + "attn_q_norm.weight"
    ),
    Part("mixer/key_norm", "H", ("H",), _ATTENTION + "k_norm.weight", _GGUF + "attn_k_norm.weight"),
)

# What files may hold besides: angles that follow from the config, which is read instead.
_IGNORED = ("rotary_emb.inv_freq", "rope_freqs.weight")


def sizes(config: DecoderConfig) -> dict[str, int]:
    """The size of each dimension, by letter.

    >>> sizes(DecoderConfig(width=32))["D"]
    32
    """
    return {
        "V": config.vocab_size,
        "D": config.width,
        "N": config.num_heads,
        "K": config.num_kv_heads,
        "H": config.head_dim,
        "F": config.mlp_width,
    }


def parts(config: DecoderConfig) -> dict[str, Part]:
    """Every parameter of the model, by its name in the tree.

    >>> parts(DecoderConfig(layers="full*2"))["mixer/query"].hf.format(0)
    'model.layers.0.self_attn.q_proj.weight'
    """
    chosen: tuple[Part, ...] = _WHOLE + _LAYER
    chosen += () if config.tie_embeddings else (_HEAD,)
    chosen += _BIASES if config.qkv_bias else ()
    chosen += _QK_NORMS if config.qk_norm else ()
    return {part.ours: part for part in chosen}


def check_size(path: Path, name: str, size: int) -> int:
    """Refuses a size that no model has, before anything is made so large; returns it.

    Raises:
      ValueError: it is not within 1…65,536.

    >>> check_size(Path("a.gguf"), "llama.block_count", 0)
    Traceback (most recent call last):
    ValueError: a.gguf: llama.block_count is 0; it must be 1 to 65536.
    """
    if not 1 <= size <= 65536:
        raise ValueError(f"{path}: {name} is {size}; it must be 1 to 65536.")
    return size


def _expected(checkpoint: Checkpoint) -> Iterator[tuple[str, Part]]:
    for part in parts(checkpoint.config).values():
        name = getattr(part, checkpoint.naming)
        layers = range(len(checkpoint.config.mixers)) if "{}" in name else range(1)
        yield from ((name.format(layer), part) for layer in layers)


def _some(names: list[str]) -> str:
    rest = len(names) - 3
    return ", ".join(names[:3]) + (f" and {rest} more" if rest > 0 else "")


def check_tensors(checkpoint: Checkpoint) -> None:
    """Refuses a checkpoint that does not hold exactly the model's tensors, before any is read.

    Raises:
      ValueError: tensors are missing, are too many or have another shape; they are named.

    >>> check_tensors(Checkpoint(Path("a.gguf"), DecoderConfig(layers="full"), "gguf", {}))
    Traceback (most recent call last):
    ValueError: a.gguf lacks token_embd.weight, output_norm.weight, blk.0.attn_norm.weight and 9 \
more of the tensors that its configuration asks for.
    """
    path, tensors = checkpoint.path, checkpoint.tensors
    expected = dict(_expected(checkpoint))
    missing = [name for name in expected if name not in tensors]
    if missing:
        raise ValueError(
            f"{path} lacks {_some(missing)} of the tensors that its configuration asks for."
        )
    # A tied head may be written all the same.
    known = {*expected, getattr(_HEAD, checkpoint.naming)}
    extra = [name for name in tensors if name not in known and not name.endswith(_IGNORED)]
    if extra:
        raise ValueError(f"{path} holds {_some(extra)}, which the model of its kind does not have.")
    size = sizes(checkpoint.config)
    for name, part in expected.items():
        shape = tuple(int(np.prod([size[d] for d in dims])) for dims in part.stored)
        if tensors[name].shape != shape:
            raise ValueError(
                f"{path} holds {name} of shape {tensors[name].shape}; its configuration asks for "
                f"{shape}."
            )


def read_part(checkpoint: Checkpoint, part: Part, layer: int, index: tuple) -> np.ndarray:
    """A piece of one parameter in our layout, reading no other rows than it needs.

    Args:
      checkpoint: where it lies.
      part: which parameter.
      layer: of which layer; 0 for those that have none.
      index: a slice for each of the part's `dims`.

    >>> table = np.arange(6.0).reshape(3, 2)
    >>> tensor = Tensor((3, 2), lambda rows: table[rows])
    >>> config = DecoderConfig(vocab_size=3, width=2)
    >>> held = Checkpoint(Path("a.gguf"), config, "gguf", {"output.weight": tensor})
    >>> read_part(held, parts(config)["head"], 0, (slice(None), slice(1, 3))).tolist()
    [[2.0, 4.0], [3.0, 5.0]]
    """
    size = sizes(checkpoint.config)
    wanted = {d: range(size[d])[piece] for d, piece in zip(part.dims, index)}
    outer, inner = part.stored[0][0], part.stored[0][1:]
    stride = int(np.prod([size[d] for d in inner]))
    rows = slice(wanted[outer].start * stride, wanted[outer].stop * stride)
    tensor = checkpoint.tensors[getattr(part, checkpoint.naming).format(layer)]
    stored = "".join(part.stored)
    whole = {**size, outer: len(wanted[outer])}
    array = tensor.read(rows).reshape([whole[d] for d in stored])
    kept = tuple(
        slice(None) if d == outer else slice(wanted[d].start, wanted[d].stop) for d in stored
    )
    return array[kept].transpose([stored.index(d) for d in part.dims])
