"""Text in, text out: a published model, its tokenizer, and perhaps routers of its layers."""

import dataclasses
import functools
import os
from collections.abc import Iterator
from typing import Literal

import jax
from tokenizers.decoders import DecodeStream

from routing_jax.generate.config import ServingConfig
from routing_jax.generate.engine import Engine, Progress, Request, check_context
from routing_jax.models.pretrained import (
    Pretrained,
    load_pretrained,
    load_routed,
    load_tokenizer,
    open_checkpoint,
    stop_tokens,
)


class TextModel:
    """A published model that continues one text at a time."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        router: str | os.PathLike[str] | None = None,
        dtype: Literal["float32", "bfloat16"] = "bfloat16",
        pages: int | None = None,
    ):
        """Looks whether the model is whole and reads its tokenizer; weights are read when needed.

        Args:
          path: a Hugging Face folder or a GGUF file.
          router: a file of routers trained for it; None for dense layers.
          dtype: of the weights and the computation.
          pages: the most that keys and values of all layers may take; None for as many as a text
            takes with every layer dense. With routers, fewer may do.

        Raises:
          ValueError: the model is damaged or not supported, or there is not even one page.
        """
        if pages is not None and pages < 1:
            raise ValueError(f"pages is {pages}; it must be at least 1.")
        self._published = open_checkpoint(path).config
        self._stop, self.tokenizer = stop_tokens(path), load_tokenizer(path)
        self._path, self._router, self._dtype, self._pages = path, router, dtype, pages

    @functools.cached_property
    def model(self) -> Pretrained:
        """The weights, with whichever kernel suits the device.

        Raises:
          ValueError: the router file is damaged or another model's.
        """
        # A CPU would compile unrolled layers for longer than most texts take.
        scan = jax.default_backend() == "cpu"
        if self._router is None:
            config, params = load_pretrained(self._path, dtype=self._dtype, scan=scan)
        else:
            config, params = load_routed(self._router, self._path, dtype=self._dtype, scan=scan)
        # The kernel that a router was trained with may not run here.
        sparse = dataclasses.replace(config.sparse, implementation=None)
        return Pretrained(config.replace(sparse=sparse), params)

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
          ValueError: a prompt of no token, or longer than the model's context, a number outside
            its range, what `model` refuses, or fewer pages than the text takes.
        """
        request = Request(
            self.tokenizer.encode(prompt).ids,
            max_new_tokens,
            temperature,
            top_k,
            top_p,
            seed,
            self._stop,
        )
        check_context(self._published, request)
        config, params = self.model
        page_size = config.sparse.block_kv
        most = len(config.mixers) * -(-request.length // page_size)
        serving = ServingConfig(
            pages=most if self._pages is None else min(most, self._pages),
            sequences=1,
            length=request.length,
            page_size=page_size,
        )
        engine = Engine(config, params, serving)
        engine.add(request)
        decoder = DecodeStream(skip_special_tokens=True)
        for made in engine.run(progress):
            piece = decoder.step(self.tokenizer, made.token)
            if piece:
                yield piece
