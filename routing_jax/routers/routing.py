"""What every router returns."""

from typing import Any, NamedTuple

import jax


class Routing(NamedTuple):
    """A routing decision.

    Attributes:
      choice: the hard decision; for a token router [B,T] bool, True where attention runs; for a
        block router a BlockTable.
      probs: what `choice` would be on average, with a gradient; same leading shape (for a block
        router, one for each block that was scored).
      logits: the scores behind `probs`, before noise.
    """

    choice: Any
    probs: jax.Array
    logits: jax.Array
