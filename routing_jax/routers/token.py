"""Token routing: each token decides, from what it holds, whether to attend.

Routed Attention (MikeyBeez, a GitHub community post): y = g·Attention(x) + (1 − g)·Conv(x), g hard.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from routing_jax.kernels import segment_starts
from routing_jax.routers.gates import binary_gate
from routing_jax.routers.routing import Routing

_HASH_BINS = 64
# Sharp enough that a softmax over 64 random scores is close to one-hot, soft enough to be trained.
_HASH_SHARPNESS = 8.0


@dataclass(frozen=True)
class TokenRouterConfig:
    """How a token router decides.

    Attributes:
      kind: 'learned', or the control 'random': a frozen hash of the token and its position.
      hidden: width of the router's hidden layer.
      bias: initial logit; positive starts with attention nearly everywhere.
      temperature: of the soft gate behind the straight-through gradient.
      usage: for kind 'random', the share of tokens it lets attend.
      summary: bins of a recurrent count of the tokens seen so far, hashed 64 bins at a time;
        0 for none.
    """

    kind: Literal["learned", "random"] = "learned"
    hidden: int = 16
    bias: float = 1.0
    temperature: float = 1.0
    usage: float = 0.01
    summary: int = 0

    def __post_init__(self):
        if self.kind not in ("learned", "random"):
            raise ValueError(f"router.kind is {self.kind!r}; accepted: 'learned', 'random'.")
        if self.hidden < 1:
            raise ValueError(f"router.hidden is {self.hidden}; it must be at least 1.")
        if self.temperature <= 0:
            raise ValueError(f"router.temperature is {self.temperature}; it must be above 0.")
        if not 0 < self.usage < 1:
            raise ValueError(f"router.usage is {self.usage}; it must lie between 0 and 1.")
        if self.summary < 0 or (self.summary > _HASH_BINS and self.summary % _HASH_BINS):
            raise ValueError(
                f"router.summary is {self.summary}; it must be 0 to {_HASH_BINS}, or a multiple of "
                f"{_HASH_BINS}."
            )

    @property
    def hashes(self) -> int:
        """Hash functions of the summary; each adds one feature to the router's input.

        >>> TokenRouterConfig(summary=256).hashes
        4
        """
        return -(-self.summary // _HASH_BINS)

    def work(self, width: int) -> int:
        """Multiply-adds the router spends on one token of the given width D.

        >>> TokenRouterConfig(hidden=16).work(64)
        1040
        """
        if self.kind == "random":
            return width
        features = width + self.hashes
        return features * self.hidden + self.hidden + (width + 1) * self.summary


class TokenRouting(NamedTuple):
    """A token router's output: the decision, the gate to multiply by, and its memory.

    Attributes:
      routing: Routing with choice [B,T] bool, probs and logits [B,T] float32.
      gate: [B,T] float32, `choice` with the straight-through gradient.
      summary: [B,R] float32, the recurrent summary after the last valid token, or None.
    """

    routing: Routing
    gate: jax.Array
    summary: jax.Array | None


def seen_before(
    assignment: jax.Array,
    valid: jax.Array,
    state: jax.Array | None,
    segment_ids: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """How often each token's bins were hit by earlier tokens: a soft count sketch, O(T·R).

    With a one-hot assignment, hash h says how many earlier tokens fell into this token's bin: 0
    means that it has surely not been seen (Cormode & Muthukrishnan 2005). It is linear attention
    without values (Katharopoulos et al. 2020), and a convolution cannot express it.

    Args:
      assignment: [B,T,E,R], each token's distribution over the R bins of E hashes.
      valid: [B,T] bool; other tokens leave no trace.
      state: [B,E,R], what earlier calls have summed up, or None.
      segment_ids: [B,T] int32; a segment starts from nothing, as if `state` were zero.

    Returns:
      ([B,T,E] counts, [B,E,R] the state after the last token).

    >>> hits = jnp.array([[[[1.0, 0.0]], [[0.0, 1.0]], [[1.0, 0.0]]]])
    >>> seen_before(hits, jnp.ones((1, 3), bool), None)[0].ravel().tolist()
    [0.0, 0.0, 1.0]
    """
    assignment = jnp.where(valid[:, :, None, None], assignment, 0)
    total = jnp.cumsum(assignment, axis=1)
    if state is not None:
        total = total + state[:, None]
    earlier = total - assignment
    if segment_ids is not None:
        starts = segment_starts(segment_ids)[:, :, None, None]
        earlier -= jnp.take_along_axis(earlier, starts, axis=1)
    return jnp.sum(assignment * earlier, axis=-1), total[:, -1]


def _mix_bits(x: jax.Array) -> jax.Array:
    """Neighbouring uint32 to unrelated ones: the finaliser of MurmurHash3 (Appleby 2011)."""
    x *= jnp.uint32(0x9E3779B1)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)


class TokenRouter(nn.Module):
    """Scores each token and gates it; parameters `hidden`, `out` (and `summary`).

    `__call__(x [B,T,D], positions [B,T] int32, −1 for padding, rng, summary [B,R] | None,
    segment_ids [B,T] | None) -> TokenRouting`. With `rng` the gate is noisy, as in training;
    without, it is the threshold of the probabilities.
    """

    config: TokenRouterConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        rng: jax.Array | None = None,
        summary: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
    ) -> TokenRouting:
        """Routes the tokens x [B,T,D]; see the class."""
        cfg, valid = self.config, positions >= 0
        x = x.astype(jnp.float32)  # a gate near its threshold must not flip by rounding
        if cfg.kind == "random":
            return self._random(x, positions)
        D = x.shape[-1]
        init = nn.initializers.normal(0.02)
        features = x
        if cfg.summary:
            bins = cfg.summary // cfg.hashes
            scores = x @ self.param("summary", nn.initializers.normal(1.0), (D, cfg.summary))
            scores = (scores * (_HASH_SHARPNESS / D**0.5)).reshape(*valid.shape, cfg.hashes, bins)
            state = None if summary is None else summary.reshape(-1, cfg.hashes, bins)
            seen, state = seen_before(jax.nn.softmax(scores, axis=-1), valid, state, segment_ids)
            summary = state.reshape(-1, cfg.summary)
            features = jnp.concatenate([x, seen], axis=-1)
        else:
            summary = None
        hidden = self.param("hidden", init, (features.shape[-1], cfg.hidden))
        out = self.param("out", init, (cfg.hidden,))
        bias = self.param("bias", nn.initializers.constant(cfg.bias), ())
        logits = jax.nn.gelu(features @ hidden) @ out + bias
        gate = binary_gate(logits, rng, cfg.temperature)
        choice = gate.choice & valid
        value = jnp.where(valid, gate.value, 0)
        return TokenRouting(Routing(choice, gate.probs, logits), value, summary)

    def _random(self, x: jax.Array, positions: jax.Array) -> TokenRouting:
        """The control: a hash that is never trained, below `usage` for that share of its values.

        A threshold of the projection itself would miss its share wherever tokens are few or alike.
        """
        projection = self.param("projection", nn.initializers.normal(1.0), (x.shape[-1],))
        projection, x = jax.lax.stop_gradient((projection, x))
        scale = jax.lax.rsqrt(jnp.sum(x * x, axis=-1) * jnp.mean(projection**2) + 1e-6)
        place = jax.scipy.special.ndtr((x @ projection) * scale)  # about uniform
        kind = jnp.minimum((place * _HASH_BINS).astype(jnp.uint32), _HASH_BINS - 1)
        seed = jax.lax.bitcast_convert_type(projection[0], jnp.uint32)
        hashed = _mix_bits(positions.astype(jnp.uint32) * _HASH_BINS + kind + seed)
        logits = self.config.usage - hashed.astype(jnp.float32) / 2.0**32
        choice = (logits > 0) & (positions >= 0)
        probs = jnp.full(choice.shape, self.config.usage, jnp.float32)
        return TokenRouting(Routing(choice, probs, logits), choice.astype(jnp.float32), None)
