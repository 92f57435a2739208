"""Token routing: each token decides, from what it holds, whether to attend.

Routed Attention (M. Bee, 2025): y = g·Attention(x) + (1 − g)·Conv(x) with a hard gate g.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from routing_jax.kernels import segment_starts
from routing_jax.routers.gates import binary_gate
from routing_jax.routers.routing import Routing


@dataclass(frozen=True)
class TokenRouterConfig:
    """How a token router decides.

    Attributes:
      kind: 'learned', or the control 'random': a frozen random projection of the token.
      hidden: width of the router's hidden layer.
      bias: initial logit; positive starts with attention nearly everywhere.
      temperature: of the soft gate behind the straight-through gradient.
      usage: for kind 'random', the share of tokens it lets attend.
      summary: bins of a recurrent summary of the tokens seen so far; 0 for none.
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
        if self.summary < 0:
            raise ValueError(f"router.summary is {self.summary}; it must be at least 0.")

    def work(self, width: int) -> int:
        """Multiply-adds the router spends on one token of the given width D.

        >>> TokenRouterConfig(hidden=16).work(64)
        1040
        """
        if self.kind == "random":
            return width
        features = width + self.summary
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
    features: jax.Array,
    valid: jax.Array,
    state: jax.Array | None,
    segment_ids: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """How much of each token's features earlier tokens have already shown: O(T·R), recurrent.

    With features close to one-hot this is a counting filter: bin r of the output says how often
    token t's bin r was hit before. It is linear attention with R-dimensional keys and no values
    (Katharopoulos et al. 2020), which a convolution cannot express.

    Args:
      features: [B,T,R], non-negative.
      valid: [B,T] bool; other tokens leave no trace.
      state: [B,R], what earlier calls have summed up, or None.
      segment_ids: [B,T] int32; a segment starts from nothing, as if `state` were zero.

    Returns:
      ([B,T,R] seen, [B,R] the state after the last token).

    >>> f = jnp.array([[[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]])
    >>> seen_before(f, jnp.ones((1, 3), bool), None)[0].tolist()
    [[[0.0, 0.0], [0.0, 0.0], [1.0, 0.0]]]
    """
    features = jnp.where(valid[:, :, None], features, 0)
    total = jnp.cumsum(features, axis=1)
    if state is not None:
        total = total + state[:, None]
    earlier = total - features
    if segment_ids is not None:
        starts = segment_starts(segment_ids)[:, :, None]
        earlier -= jnp.take_along_axis(earlier, starts, axis=1)
    return features * earlier, total[:, -1]


class TokenRouter(nn.Module):
    """Scores each token and gates it; parameters `hidden`, `out` (and `summary`).

    `__call__(x [B,T,D], valid [B,T], rng, summary [B,R] | None, segment_ids [B,T] | None)
    -> TokenRouting`. With `rng` the gate is noisy, as in training; without, it is the threshold
    of the probabilities.
    """

    config: TokenRouterConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        valid: jax.Array,
        rng: jax.Array | None = None,
        summary: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
    ) -> TokenRouting:
        """Routes the tokens x [B,T,D]; see the class."""
        cfg = self.config
        x = x.astype(jnp.float32)  # a gate near its threshold must not flip by rounding
        if cfg.kind == "random":
            return self._random(x, valid)
        D = x.shape[-1]
        init = nn.initializers.normal(0.02)
        features = x
        if cfg.summary:
            bins = self.param("summary", nn.initializers.normal(1.0), (D, cfg.summary))
            assignment = jax.nn.softmax(x @ bins / D**0.5, axis=-1)
            seen, summary = seen_before(assignment, valid, summary, segment_ids)
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

    def _random(self, x: jax.Array, valid: jax.Array) -> TokenRouting:
        """The control: a projection that is never trained, thresholded at its normal quantile."""
        projection = self.param("projection", nn.initializers.normal(1.0), (x.shape[-1],))
        scale = jax.lax.rsqrt(jnp.sum(x * x, axis=-1) + 1e-6)
        score = (x @ jax.lax.stop_gradient(projection)) * scale
        logits = jax.lax.stop_gradient(score) - jax.scipy.stats.norm.ppf(1 - self.config.usage)
        choice = (logits > 0) & valid
        probs = jnp.full(choice.shape, self.config.usage, jnp.float32)
        return TokenRouting(Routing(choice, probs, logits), choice.astype(jnp.float32), None)
