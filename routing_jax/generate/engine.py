"""Many prompts through one model: who is decoded together, and whose pages are free again.

A sequence is let in when it would fit the free pages with as many layers dense as in any of those
read lately; the first with every layer dense. What its layers then decide is known, and the pages
they do not need let others in. One whose layers want more pages than are free has been read in
vain: it waits again, for as many as it wanted. A sequence holds pages for all tokens that it may
make, so that no step can run out of them.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from routing_jax.generate.config import ServingConfig, check_servable
from routing_jax.generate.layer import Params
from routing_jax.generate.paged_decode import decode_tokens
from routing_jax.generate.paged_memory import empty_memory, forget
from routing_jax.generate.paged_prefill import DENSE, ROUTED, SPARSE, prefill_prompts
from routing_jax.generate.sampling import Sampling, choose_tokens
from routing_jax.models import DecoderConfig

Progress = Callable[[int, int], None]
"""Called with layers done and layers in all while prompts are read; of short ones at the end."""


@dataclass(frozen=True)
class Request:
    """A prompt to continue.

    Attributes:
      tokens: of the prompt, at least one.
      max_new_tokens: the most tokens to make.
      temperature: of sampling; 0 takes the most likely token.
      top_k: how many of the most likely tokens can be drawn; 0 for all.
      top_p: the sum of probabilities from which on less likely tokens cannot be drawn.
      seed: of the draws.
      stop: tokens after which nothing more is made.
    """

    tokens: Sequence[int]
    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop: frozenset[int] = frozenset()

    def __post_init__(self):
        if not len(self.tokens):
            raise ValueError("the prompt holds no token; it must hold at least one.")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1.")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; it must be at least 0.")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; it must be at least 0.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must lie above 0 and be at most 1.")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed is {self.seed}; it must be from 0 to 2147483647.")

    @property
    def length(self) -> int:
        """Tokens that the sequence will have at most.

        >>> Request([1, 2, 3], max_new_tokens=5).length
        8
        """
        return len(self.tokens) + self.max_new_tokens

    @property
    def size(self) -> str:
        """How long it is, for an error's sentence."""
        return f"a prompt of {len(self.tokens)} tokens and {self.max_new_tokens} new ones"


def check_context(config: DecoderConfig, request: Request) -> None:
    """Refuses what is longer than the model was made for.

    Raises:
      ValueError: it is.

    >>> check_context(DecoderConfig(context=4), Request([1, 2, 3], max_new_tokens=2))
    Traceback (most recent call last):
    ValueError: a prompt of 3 tokens and 2 new ones are more than this model's context of 4 tokens.
    """
    if config.context and request.length > config.context:
        raise ValueError(
            f"{request.size} are more than this model's context of {config.context} tokens."
        )


class TooFewPagesError(ValueError):
    """A prompt's layers want more pages than there are, which only reading it could tell.

    Attributes:
      request: the number that `Engine.add` gave; it is dropped.
    """

    def __init__(self, request: int, said: str):
        super().__init__(said)
        self.request = request


class Made(NamedTuple):
    """A token that was made.

    Attributes:
      request: the number that `Engine.add` gave.
      token: the token.
      last: whether it is the sequence's last.
    """

    request: int
    token: int
    last: bool


@dataclass
class _Sequence:
    """A request on its way: how many of its tokens are still to be made, and to be read."""

    number: int
    request: Request
    unmade: int
    unread: int
    wants: int = 0  # pages, if it has been read and did not fit


_LATELY = 32  # sequences whose layers tell how many pages the next one may want


class Engine:
    """Serves one model; holds the device's memory and who is in it.

    >>> from routing_jax.models import init_params
    >>> model = DecoderConfig(width=8, head_dim=8, mlp_width=0, layers="full*2")
    >>> params = init_params(model, jax.random.key(0))
    >>> engine = Engine(model, params, ServingConfig(pages=8, sequences=2, length=64))
    >>> first, second = engine.add(Request([1, 2, 3], 2)), engine.add(Request([4], 1))
    >>> [made.request for made in engine.run()]
    [0, 1, 0]
    """

    def __init__(
        self,
        config: DecoderConfig,
        params: Params,
        serving: ServingConfig,
        decisions: Sequence[int] | None = None,
    ):
        """Takes the model and makes empty memory.

        Args:
          config: the model; its layers are all 'full', or all 'layer', which are routed.
          params: its parameters, as config.scan says; stacked ones compile faster, and unrolled
            ones may decode faster.
          serving: the sizes.
          decisions: of each layer ROUTED, SPARSE or DENSE; when None, 'layer' layers are routed
            and 'full' ones dense. A SPARSE layer is sparse after any prompt, even one so short that
            a router would not be asked: how much memory it takes is counted on.

        Raises:
          ValueError: a model that can't be served, decisions for another number of layers, or a
            layer to be routed without a router.
        """
        check_servable(config, serving)
        layers, routed = len(config.mixers), "layer" in config.mixers
        if decisions is None:
            decisions = [ROUTED if routed else DENSE] * layers
        if len(decisions) != layers:
            raise ValueError(
                f"there are decisions for {len(decisions)} layers; the model has {layers}."
            )
        if ROUTED in decisions and not routed:
            raise ValueError(
                f"a layer is to be routed, and model.layers is {config.layers!r}; routers are in "
                "'layer' layers."
            )
        self.config, self.serving, self.params = config, serving, params
        self.decisions = decisions
        self._decided = jnp.array(decisions, jnp.int32)
        self.memory = empty_memory(config, serving)
        B = serving.sequences
        self._tokens = jnp.zeros(B, jnp.int32)
        self._sampling = Sampling(
            jnp.zeros(B), jnp.zeros(B, jnp.int32), jnp.ones(B), jnp.zeros(B, jnp.int32)
        )
        self._waiting: deque[_Sequence] = deque()
        self._rows: list[_Sequence | None] = [None] * B
        self._unread: list[tuple[jax.Array, Sequence[_Sequence | None]]] = []
        self._free = serving.pages
        self._held = np.zeros(B, np.int64)
        self._whole: deque[int] = deque(maxlen=_LATELY)
        self._count = 0
        self._in_vain = 0

    @property
    def free_pages(self) -> int:
        """Pages of the pool that no sequence holds."""
        return self._free

    @property
    def running(self) -> int:
        """Sequences that are being decoded."""
        return sum(seq is not None for seq in self._rows)

    @property
    def read_in_vain(self) -> int:
        """Prompts that were read so far, and read again later, for want of pages."""
        return self._in_vain

    def add(self, request: Request) -> int:
        """Lets a request wait for its turn; returns its number, counted from 0.

        Raises:
          ValueError: a token that the model does not have; it is longer than the model's context or
            than `serving.length`, or would not fit an empty pool however its layers are decided.
        """
        check_context(self.config, request)
        length, pages, vocabulary = self.serving.length, self.serving.pages, self.config.vocab_size
        if not 0 <= min(request.tokens) <= max(request.tokens) < vocabulary:
            raise ValueError(
                f"the prompt holds tokens from {min(request.tokens)} to {max(request.tokens)}; the "
                f"model has 0 to {vocabulary - 1}."
            )
        if request.length > length:
            raise ValueError(f"{request.size} are more than serving.length = {length}.")
        if self._least_pages(request) > pages:
            raise ValueError(
                f"{request.size} take at least {self._least_pages(request)} pages; serving.pages "
                f"is {pages}."
            )
        self._waiting.append(
            _Sequence(self._count, request, request.max_new_tokens, request.max_new_tokens)
        )
        self._count += 1
        return self._count - 1

    def step(self, progress: Progress | None = None) -> list[Made]:
        """Lets in whom there is room for, makes a token a sequence, and returns those of before.

        The device is a step ahead: what it made is read while it makes the next.

        Args:
          progress: see `Progress`.

        Raises:
          TooFewPagesError: a request wants more pages than the pool has. It is dropped, and the
            next step goes on with the others.
        """
        self._drop_too_large()
        before, self._unread = self._unread, []
        while self._admit(progress):
            pass
        going = [seq for seq in self._rows if seq is not None]
        if going:
            drawn = any(seq.request.temperature for seq in going)
            self._tokens, self.memory = decode_tokens(
                self.config,
                self.serving,
                self.params,
                self._tokens,
                self._sampling if drawn else None,
                self.memory,
            )
            self._unread.append((self._tokens, list(self._rows)))
            for seq in going:
                seq.unmade -= 1
        made = [one for tokens, owners in before for one in self._read(tokens, owners)]
        self._let_go()
        return made

    def run(self, progress: Progress | None = None) -> Iterator[Made]:
        """Makes tokens until nobody waits and nobody runs; more can be added meanwhile.

        Args:
          progress: see `Progress`.

        Raises:
          TooFewPagesError: see `step`; to be run again for the others.
        """
        while self._waiting or self._unread or self.running:
            yield from self.step(progress)

    def _pages(self, request: Request, whole: Sequence[bool]) -> int:
        """What a request holds, given which layers keep everything."""
        blocks = -(-request.length // self.serving.page_size)
        sparse = self.config.sparse
        kept = min(blocks, sparse.sink_blocks + sparse.window_blocks)
        return sum(blocks if all_of_it else kept for all_of_it in whole)

    def _most_pages(self, request: Request) -> int:
        forgets = self.config.sparse.forgets
        return self._pages(request, [d != SPARSE or not forgets for d in self.decisions])

    def _least_pages(self, request: Request) -> int:
        if not (self.config.sparse.forgets and self._is_routed(request)):
            return self._most_pages(request)
        return self._pages(request, [d == DENSE for d in self.decisions])

    def _is_routed(self, request: Request) -> bool:
        """Whether routers may be asked: what is shorter, sparse attention would see all of."""
        return len(request.tokens) > self.config.sparse.reach

    def _expected_pages(self, seq: _Sequence) -> int:
        """What a request may hold, by those read lately: no more than all that it could."""
        if seq.wants:
            return seq.wants
        most = min(self._most_pages(seq.request), self.serving.pages)
        if not self._whole or not self._is_routed(seq.request):
            return most
        whole = np.arange(len(self.decisions)) < max(self._whole)
        return min(most, self._pages(seq.request, whole.tolist()))

    def _next_wave(self) -> list[_Sequence]:
        """The first of those who wait, and who can be read with them: a power of two in all."""
        room, free = self._rows.count(None), self._free
        wave: list[_Sequence] = []
        for seq in self._waiting:
            padded = self.serving.bucket(1, len(seq.request.tokens))
            most = max(1, self.serving.chunk // padded)
            free -= self._expected_pages(seq)
            if len(wave) == min(room, most) or free < 0:
                break
            if wave and padded != self.serving.bucket(1, len(wave[0].request.tokens)):
                break
            wave.append(seq)
        return wave[: 1 << (len(wave).bit_length() - 1)] if wave else []

    def _admit(self, progress: Progress | None) -> bool:
        """Reads one wave of prompts; whether there was any."""
        wave = self._next_wave()
        if not wave:
            return False
        rows = np.flatnonzero([seq is None for seq in self._rows])[: len(wave)]
        requests = [self._waiting.popleft().request for _ in wave]
        lengths = np.array([len(request.tokens) for request in requests], np.int32)
        tokens = np.zeros((len(wave), self.serving.bucket(len(wave), int(lengths.max()))), np.int32)
        for row, request in zip(tokens, requests):
            row[: len(request.tokens)] = request.tokens
        layers = len(self.decisions)
        logits, self.memory = prefill_prompts(
            self.config,
            self.serving,
            self.params,
            self._decided,
            jnp.asarray(tokens),
            jnp.asarray(lengths),
            jnp.array([request.length for request in requests], jnp.int32),
            jnp.asarray(rows, jnp.int32),
            self.memory,
            progress and (lambda done: progress(done, layers)),
        )
        sampling = Sampling(
            jnp.array([request.temperature for request in requests], jnp.float32),
            jnp.array([request.top_k for request in requests], jnp.int32),
            jnp.array([request.top_p for request in requests], jnp.float32),
            jnp.array([request.seed for request in requests], jnp.int32),
        )
        first, self._tokens, self._sampling = _seat(
            logits, sampling, jnp.asarray(lengths), rows, self._tokens, self._sampling
        )
        whole = np.asarray(self.memory.whole)[:, rows]  # waits for the prompts
        if progress is not None:
            progress(layers, layers)
        pages = [self._pages(request, kept) for request, kept in zip(requests, whole.T)]
        self._whole.extend(
            int(kept.sum()) for request, kept in zip(requests, whole.T) if self._is_routed(request)
        )
        if sum(pages) > self._free:
            self._turn_away(wave, rows, pages)
            return True
        self._unread.append((first, list(wave)))
        for seq, row, held in zip(wave, rows, pages):
            self._rows[row], self._held[row] = seq, held
            self._free -= held
            seq.unmade -= 1
        self._let_go()  # who wanted one token has it
        return True

    def _turn_away(self, wave: Sequence[_Sequence], rows: np.ndarray, pages: Sequence[int]) -> None:
        """Frees the pages of prompts that found too few, and lets them wait in front."""
        leaving = np.isin(np.arange(len(self._rows)), rows)
        self.memory = forget(self.memory, jnp.asarray(leaving))
        for seq, wanted in zip(wave, pages):
            seq.wants = wanted
        self._waiting.extendleft(reversed(wave))
        self._in_vain += len(wave)

    def _drop_too_large(self) -> None:
        """Refuses the first who waits if there will never be as many pages as it wants."""
        if self._waiting and self._waiting[0].wants > self.serving.pages:
            seq = self._waiting.popleft()
            raise TooFewPagesError(
                seq.number,
                f"{seq.request.size} take {seq.wants} pages, as the layers were decided for it; "
                f"serving.pages is {self.serving.pages}.",
            )

    def _read(self, tokens: jax.Array, owners: Sequence[_Sequence | None]) -> Iterator[Made]:
        for seq, token in zip(owners, np.asarray(tokens).tolist()):
            if seq is None or not seq.unread:
                continue
            seq.unread -= 1
            if token in seq.request.stop:
                seq.unread = seq.unmade = 0
            yield Made(seq.number, token, not seq.unread)

    def _let_go(self) -> None:
        """Frees the rows and pages of those for whom nothing more is to be made."""
        leaving = np.array([seq is not None and not seq.unmade for seq in self._rows])
        if leaving.any():
            self.memory = forget(self.memory, jnp.asarray(leaving))
            self._free += int(self._held[leaving].sum())
            self._held[leaving] = 0
            self._rows = [None if gone else seq for seq, gone in zip(self._rows, leaving)]


@jax.jit
def _seat(
    logits: jax.Array,
    new: Sampling,
    lengths: jax.Array,
    rows: jax.Array,
    tokens: jax.Array,
    sampling: Sampling,
) -> tuple[jax.Array, jax.Array, Sampling]:
    """The first tokens of new sequences, and what is decoded next with them in their rows."""
    first = choose_tokens(logits, new, lengths)
    joined = Sampling(*(old.at[rows].set(part) for old, part in zip(sampling, new)))
    return first, tokens.at[rows].set(first), joined
