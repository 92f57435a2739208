"""How a model with mixed schemes uses them: by layer, and by class of token."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from routing_jax.models import Decoder, DecoderConfig, unstack_layers


def scheme_use(
    config: DecoderConfig,
    params: Any,
    batches: Iterable[Any],
    classes: Mapping[str, np.ndarray],
) -> dict[str, Any]:
    """Shares of the schemes and the routers' entropy over all tokens of `batches`.

    Args:
      config: the model, every layer of which is 'schemes'.
      params: its parameters.
      batches: of (tokens, targets, weights), each [B,T]; only positions of weight > 0 are read.
      classes: name -> [V] bool, the tokens of that class.

    Returns:
      JSON values: `schemes`, their names; `share` [L][E], the gates' mean; `entropy` [L], of a
      token's probabilities in nats, mean; `by_class`, name -> share [L][E], of classes that occur.

    Raises:
      ValueError: `batches` is empty.

    >>> from routing_jax.models import init_params
    >>> config = DecoderConfig(width=8, layers="schemes", num_heads=2, mlp_width=0)
    >>> params = init_params(config, jax.random.key(0))
    >>> batch = (np.zeros((2, 8), int), np.zeros((2, 8), int), np.ones((2, 8)))
    >>> use = scheme_use(config, params, [batch], {"all": np.ones(256, bool)})
    >>> use["schemes"], len(use["share"][0])
    (['mha', 'gqa2', 'mqa'], 3)
    """
    params = unstack_layers(params, config) if config.scan else params
    model = Decoder(config.replace(scan=False, remat=False))
    table = jnp.asarray(np.stack(list(classes.values())), jnp.float32)  # [classes, V]

    @jax.jit
    def measure(params, tokens, weights):
        _, sown = model.apply({"params": params}, tokens, mode="eval", mutable="routing")
        probs = jnp.stack([p for _, p in sorted(_by_layer(sown["routing"]))])  # [L,B,T,E]
        gates = probs
        if config.schemes.one_each:
            gates = jax.nn.one_hot(jnp.argmax(probs, axis=-1), probs.shape[-1])
        read = (weights > 0).astype(jnp.float32)
        kinds = table[:, tokens] * read[None]  # [classes,B,T]
        entropy = -jnp.sum(jnp.where(probs > 0, probs * jnp.log(probs), 0), axis=-1)
        return (
            jnp.einsum("LBTE,BT->LE", gates, read),
            jnp.einsum("LBT,BT->L", entropy, read),
            jnp.einsum("LBTE,CBT->CLE", gates, kinds),
            read.sum(),
            kinds.sum((1, 2)),
        )

    rows = [jax.device_get(measure(params, t, w)) for t, _, w in batches]
    if not rows:
        raise ValueError("batches is empty; at least one batch is needed.")
    share, entropy, by_class, read, kinds = (np.sum(part, axis=0) for part in zip(*rows))
    return {
        "schemes": list(config.schemes.each),
        "share": (share / read).tolist(),
        "entropy": (entropy / read).tolist(),
        "by_class": {
            name: (sums / count).tolist()
            for name, sums, count in zip(classes, by_class, kinds)
            if count
        },
    }


def _by_layer(sown: Any) -> list[tuple[tuple[int, ...], jax.Array]]:
    """([pattern, block], probabilities) of each layer, to be sorted by number."""
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(sown):
        names = [str(getattr(key, "key", "")) for key in path]
        numbers = (n.rsplit("_", 1)[1] for n in names if n.startswith(("layers_", "block_")))
        found.append((tuple(map(int, numbers)), leaf))
    return found
