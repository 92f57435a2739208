"""Text in, text out: a published model, its tokenizer, and perhaps routers of its layers."""

import dataclasses
import functools
import os
from collections.abc import Iterator
from typing import Literal

import jax
import jax.numpy as jnp
from tokenizers.decoders import DecodeStream

from routing_jax.generate.config import ServingConfig
from routing_jax.generate.engine import Engine, Progress, Request, check_context
from routing_jax.generate.router_file import load_layer_routers
from routing_jax.kernels.hopper import hopper_refusal
from routing_jax.models.pretrained import (
    Pretrained,
    load_pretrained,
    load_tokenizer,
    open_checkpoint,
    stop_tokens,
)
from routing_jax.routers import SparseModeConfig


def on_this_device(sparse: SparseModeConfig, dtype: str) -> SparseModeConfig:
    """The mode with the attention kernel of a Hopper GPU, which runs by name, where there is one.

    >>> on_this_device(SparseModeConfig(), "float32").implementation is None
    True
    """
    fits = hopper_refusal() is None and jnp.dtype(dtype) != jnp.float32
    return dataclasses.replace(sparse, implementation="mosaic_gpu") if fits else sparse


class TextModel:
    """A published model that continues one text at a time."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        router: str | os.PathLike[str] | None = None,
        dtype: Literal["float32", "bfloat16"] = "bfloat16",
    ):
        """Reads the tokenizer and the routers, and looks whether the weights are whole.

        Args:
          path: a Hugging Face folder or a GGUF file.
          router: a file of layer routers trained for it; None for dense layers.
          dtype: of the weights and the computation.

        Raises:
          ValueError: one of them is damaged, not supported, or the router is another model's.
        """
        self._path, self._dtype = path, dtype
        self._checkpoint = open_checkpoint(path)
        self._stop = stop_tokens(path)
        self.tokenizer = load_tokenizer(path)
        self._routed_by = None
        if router is not None:
            layers = len(self._checkpoint.config.mixers)
            self._routed_by = load_layer_routers(router, path, layers)

    @functools.cached_property
    def model(self) -> Pretrained:
        """The weights, read when they are first needed."""
        # A CPU would compile unrolled layers for longer than most texts take.
        scan = jax.default_backend() == "cpu"
        return load_pretrained(self._path, dtype=self._dtype, scan=scan)

    def stream(
        self,
        prompt: str,
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> Iterator[str]:
        """The text that follows, piece by piece, until the model ends it.

        Args:
          prompt: the text before; the tokenizer adds what it begins texts with.
          max_new_tokens: the most tokens to make.
          temperature: of sampling; 0 takes the most likely token.
          top_k: how many of the most likely tokens can be drawn; 0 for all.
          top_p: the sum of probabilities from which on less likely tokens cannot be drawn.
          seed: of the draws.
          progress: see `Progress`.

        Raises:
          ValueError: a prompt of no token, or longer than the model's context, or a number outside
            its range.
        """
        sparse = SparseModeConfig() if self._routed_by is None else self._routed_by.sparse
        request = Request(
            self.tokenizer.encode(prompt).ids,
            max_new_tokens,
            temperature,
            top_k,
            top_p,
            seed,
            self._stop,
        )
        check_context(self._checkpoint.config, request)
        serving = ServingConfig(
            pages=len(self._checkpoint.config.mixers) * -(-request.length // sparse.block_kv),
            sequences=1,
            length=request.length,
            sparse=on_this_device(sparse, self._dtype),
        )
        routers = None if self._routed_by is None else self._routed_by.routers
        engine = Engine(*self.model, serving, routers)
        engine.add(request)
        decoder = DecodeStream(skip_special_tokens=True)
        for made in engine.run(progress):
            piece = decoder.step(self.tokenizer, made.token)
            if piece:
                yield piece
