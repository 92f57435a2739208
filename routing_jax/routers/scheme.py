"""Scheme routing: each token chooses among multi-head, grouped and multi-query attention.

MoAS, Mixture of Attention Schemes (arXiv 2512.20650), soft as published; hard and frozen beside.
"""

import itertools
import re
from dataclasses import dataclass
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from routing_jax.kernels import dropout, float32_product
from routing_jax.routers.gates import categorical_gate, largest
from routing_jax.routers.routing import Routing


@dataclass(frozen=True)
class SchemesConfig:
    """Which attention schemes there are, and how tokens choose among them.

    Attributes:
      names: comma-separated: mha, mqa, or gqaK for K key/value heads.
      kind: 'soft' weighs all schemes, as published; 'hard' takes one; 'average' weighs them alike
        without a router; 'random' takes one by a router that is never trained.
      nested: all schemes share one set of projections, and keys and values are stored so that a
        cheaper scheme reads a part of what a dearer one reads; else each has its own.
      hidden: width of the router's hidden layer.
      gate_dropout: of soft gates in training, the rest scaled up, not renormalised.
      gate_noise: whether hard gates have Gumbel noise in training, so that tokens explore.
      detached: whether the router's gradient ends at its own parameters, so that nothing below
        learns to be routed: what is trained beside is trained as beside a random router.
      temperature: of the soft gate behind the straight-through gradient of a hard one.
    """

    names: str = "mha,gqa2,mqa"
    kind: Literal["soft", "hard", "average", "random"] = "soft"
    nested: bool = False
    hidden: int = 96
    gate_dropout: float = 0.0
    gate_noise: bool = True
    detached: bool = False
    temperature: float = 1.0

    def __post_init__(self):
        for i, name in enumerate(self.each):
            if not re.fullmatch(r"mha|mqa|gqa[1-9]\d*", name):
                raise ValueError(
                    f"schemes.names is {self.names!r}, where {name!r} is not a scheme; accepted: "
                    "mha, mqa, gqaK with K key/value heads, as in 'mha,gqa2,mqa'."
                )
            if name in self.each[:i]:
                raise ValueError(
                    f"schemes.names is {self.names!r}; each scheme must stand there once."
                )
        if self.kind not in ("soft", "hard", "average", "random"):
            raise ValueError(
                f"schemes.kind is {self.kind!r}; accepted: 'soft', 'hard', 'average', 'random'."
            )
        if self.hidden < 1:
            raise ValueError(f"schemes.hidden is {self.hidden}; it must be at least 1.")
        if not 0 <= self.gate_dropout < 1:
            raise ValueError(f"schemes.gate_dropout is {self.gate_dropout}; it must lie in [0, 1).")
        if self.temperature <= 0:
            raise ValueError(f"schemes.temperature is {self.temperature}; it must be above 0.")

    @property
    def each(self) -> tuple[str, ...]:
        """The schemes' names, one by one."""
        return tuple(self.names.replace(" ", "").split(","))

    @property
    def one_each(self) -> bool:
        """Whether a token takes one scheme, so that the others can be skipped."""
        return self.kind in ("hard", "random")

    def kv_heads(self, num_heads: int) -> tuple[int, ...]:
        """Key/value heads of each scheme, for N query heads.

        Raises:
          ValueError: heads that do not divide N, or, nested, not each other.

        >>> SchemesConfig().kv_heads(6)
        (6, 2, 1)
        """
        counts = tuple(
            num_heads if name == "mha" else 1 if name == "mqa" else int(name[3:])
            for name in self.each
        )
        for name, count in zip(self.each, counts):
            if num_heads % count:
                raise ValueError(
                    f"schemes.names is {self.names!r}; the {count} key/value heads of {name!r} "
                    f"must divide model.num_heads = {num_heads}."
                )
        ranked = sorted(counts)
        if self.nested and any(b % a for a, b in itertools.pairwise(ranked)):
            raise ValueError(
                f"schemes.names is {self.names!r}; of nested schemes each count of key/value heads "
                f"must divide the next, and they are {', '.join(map(str, ranked))}."
            )
        return counts

    def work(self, width: int) -> int:
        """Multiply-adds the router spends on one token of the given width D.

        >>> SchemesConfig(hidden=96).work(384)
        37152
        """
        return 0 if self.kind == "average" else (width + len(self.each)) * self.hidden


class SchemeRouting(NamedTuple):
    """A scheme router's output.

    Attributes:
      routing: Routing with choice [B,T] int32, the scheme taken or weighed most, −1 for padding;
        probs and logits [B,T,E] float32.
      gates: [B,T,E] float32, what each scheme's output is multiplied by; 0 for padding.
    """

    routing: Routing
    gates: jax.Array


class SchemeRouter(nn.Module):
    """Weighs the schemes for each token; parameters `hidden` [D,R] and `out` [R,E].

    `__call__(x [B,T,D], valid [B,T], rng) -> SchemeRouting`. With `rng`, in training, soft gates
    have dropout and hard ones, with gate_noise, Gumbel noise.
    """

    config: SchemesConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, valid: jax.Array, rng: jax.Array | None = None
    ) -> SchemeRouting:
        """Routes the tokens x [B,T,D]; see the class."""
        cfg = self.config
        E = len(cfg.each)
        if cfg.detached:
            x = jax.lax.stop_gradient(x)
        if cfg.kind == "average":
            logits = jnp.zeros((*valid.shape, E))
        else:
            init = nn.initializers.normal(0.02)
            hidden = self.param("hidden", init, (x.shape[-1], cfg.hidden))
            out = self.param("out", init, (cfg.hidden, E))
            # Weights are rounded to x's dtype, in decoding as in prefill: a GPU rounds float32 too,
            # and takes longer. What follows is float32: no choice between near equals may flip.
            found = float32_product("BTD,DR->BTR", x, hidden)
            found = jax.nn.gelu(found, approximate=False)
            # Sums, not a product: with so few columns they are made where gelu is.
            logits = jnp.sum(found[..., None] * out[None, None], axis=-2)
        if cfg.kind == "random":
            logits = jax.lax.stop_gradient(logits)
        explores = cfg.kind == "hard" and cfg.gate_noise
        gate = categorical_gate(logits, rng if explores else None, cfg.temperature)
        if cfg.one_each:
            gates, choice = gate.value, largest(gate.choice)
        else:
            gates, choice = dropout(gate.probs, cfg.gate_dropout, rng), largest(logits)
        routing = Routing(jnp.where(valid, choice, -1), gate.probs, logits)
        return SchemeRouting(routing, jnp.where(valid[:, :, None], gates, 0))
