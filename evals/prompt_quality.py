"""How well a model answers prompts, sample by sample, and how sparsely it does so.

Layers are routed by the prompt alone, and what is scored comes after it.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from routing_jax.attention import Prompts
from routing_jax.models import Decoder, DecoderConfig


class PromptScores(NamedTuple):
    """What became of each prompt, in the order in which they were read.

    Attributes:
      tasks: [n] int, of the prompts.
      right: [n] share of the answer's tokens that were the likeliest.
      nll: [n] mean nats a token of the answer.
      dense: [L,n] bool, the layers that attended fully.
      cost: mean multiply-adds for mixing ÷ those of full causal attention.
      kv_cost: mean key/value bytes read ÷ those of dense multi-head attention.
    """

    tasks: np.ndarray
    right: np.ndarray
    nll: np.ndarray
    dense: np.ndarray
    cost: float
    kv_cost: float

    @property
    def sparsity(self) -> np.ndarray:
        """[n], the share of each prompt's layers that were sparse."""
        return 1 - self.dense.mean(axis=0)


Chooser = Callable[[int, int], np.ndarray]
"""(first prompt's number, B) -> [L,B] bool, True for full attention."""


@functools.lru_cache(maxsize=2)
def prompt_scorer(config: DecoderConfig) -> Callable[..., PromptScores]:
    """A function that scores prompts, compiled once for all its calls with equal shapes.

    Args:
      config: the model; with layers 'layer' they are routed, with 'full' they are not.

    Returns:
      (params, batches, choose) -> PromptScores. `batches` are of tokens and positions [B,T],
      targets and weights [B,A], lengths and tasks [B], and places [B,A]; `choose` decides in place
      of the routers, who do it when it is None. Raises ValueError when there is no batch.

    >>> prompt_scorer(DecoderConfig())({}, [])
    Traceback (most recent call last):
    ValueError: batches is empty; scoring needs at least one batch.
    """
    model = Decoder(config)

    @jax.jit
    def measure(params, tokens, positions, targets, weights, lengths, places, choice):
        prompts = Prompts(lengths, 1.0, choice)
        out: Any = model.apply({"params": params}, tokens, positions, prompts=prompts, read=places)
        read = (weights > 0).astype(jnp.float32)
        count = jnp.maximum(read.sum(axis=1), 1)
        nll = optax.softmax_cross_entropy_with_integer_labels(out.logits, targets)
        hits = (jnp.argmax(out.logits, axis=-1) == targets) * read
        reports = out.reports
        return (
            hits.sum(axis=1) / count,
            jnp.sum(nll * read, axis=1) / count,
            reports.choice[:, :, 0],
            jnp.mean(reports.cost),
            jnp.mean(reports.kv_cost),
        )

    def score(params: Any, batches: Iterable[Any], choose: Chooser | None = None) -> PromptScores:
        rows, tasks, first = [], [], 0
        for batch in batches:
            size = len(batch.lengths)
            choice = None if choose is None else jnp.asarray(choose(first, size))
            # Not read before the next one is under way: the device never waits for the host.
            rows.append(
                measure(
                    params,
                    batch.tokens,
                    batch.positions,
                    batch.targets,
                    batch.weights,
                    batch.lengths,
                    batch.places,
                    choice,
                )
            )
            tasks.append(batch.tasks)
            first += size
        if not rows:
            raise ValueError("batches is empty; scoring needs at least one batch.")
        right, nll, dense, cost, kv_cost = zip(*jax.device_get(rows))
        return PromptScores(
            np.concatenate(tasks),
            np.concatenate(right),
            np.concatenate(nll),
            np.concatenate(dense, axis=1),
            float(np.mean(cost)),
            float(np.mean(kv_cost)),
        )

    return score


def fixed_layers(dense: np.ndarray) -> Chooser:
    """The same layers for every prompt.

    Args:
      dense: [L] bool, those that attend fully.

    >>> fixed_layers(np.array([True, False]))(0, 3).tolist()
    [[True, True, True], [False, False, False]]
    """
    return lambda first, batch: np.repeat(dense[:, None], batch, axis=1)


def random_layers(layers: int, sparse: int, seed: int) -> Chooser:
    """For each prompt layers of its own, drawn at random.

    Args:
      layers: L.
      sparse: how many of them are sparse.
      seed: of the draw; a prompt's number does the rest.

    >>> random_layers(8, 6, seed=0)(5, 4).sum(axis=0).tolist()
    [2, 2, 2, 2]
    """

    def choose(first: int, batch: int) -> np.ndarray:
        columns = [
            np.random.default_rng((seed, first + i)).permutation(layers) for i in range(batch)
        ]
        return np.stack(columns, axis=1) >= sparse

    return choose


def sensitivities(
    score: Callable[..., PromptScores], params: Any, batches: list[Any], layers: int
) -> np.ndarray:
    """What each layer's sparsity costs while all others attend fully.

    Args:
      score: of `prompt_scorer`.
      params: the model's parameters.
      batches: the calibration prompts.
      layers: L.

    Returns:
      [L], nats more a token.
    """
    everything = np.ones(layers, bool)
    dense = score(params, batches, fixed_layers(everything)).nll.mean()
    alone = [fixed_layers(np.arange(layers) != layer) for layer in range(layers)]
    return np.array([score(params, batches, choose).nll.mean() for choose in alone]) - dense


def ranked_layers(costs: np.ndarray, sparse: int) -> np.ndarray:
    """The layers that attend fully when the least sensitive ones are sparse: a static ranking.

    Args:
      costs: [L], of `sensitivities`.
      sparse: how many layers are sparse.

    Returns:
      [L] bool, True for full attention.

    >>> ranked_layers(np.array([0.3, 0.1, 0.2]), 2).tolist()
    [True, False, False]
    """
    dense = np.ones(len(costs), bool)
    dense[np.argsort(costs, kind="stable")[:sparse]] = False
    return dense
