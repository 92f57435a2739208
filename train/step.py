"""One training step: loss, gradient, AdamW, curriculum. Pure; everything it needs is its state."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from routing_jax.models import Decoder, init_params
from routing_jax.train.config import OptimizerConfig, TrainConfig
from routing_jax.train.curriculum import (
    CurriculumState,
    auxiliary_weight,
    decay_progress,
    finished,
    init_curriculum,
    penalty_weight,
    update_curriculum,
)
from routing_jax.train.data import Batch


class TrainState(NamedTuple):
    """All that a run carries from step to step, and all that a checkpoint holds."""

    params: Any
    opt_state: Any
    curriculum: CurriculumState
    key: jax.Array  # raw key data; the noise of a step is folded in from its number


class _Price(NamedTuple):
    """What the loss adds to the task's own: λ, and the weight of the routers' auxiliary losses."""

    penalty: jax.Array
    auxiliary: jax.Array


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """AdamW without its learning rate, which follows the curriculum instead of the step count."""

    def matrices(params: Any) -> Any:
        # The scan over layers stacks its parameters: there, a vector has two dimensions.
        return jax.tree_util.tree_map_with_path(
            lambda path, p: p.ndim - (path[0].key == "layers") > 1, params
        )

    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(config.beta1, config.beta2),
        optax.add_decayed_weights(config.weight_decay, mask=matrices),
    )


def learning_rate(config: TrainConfig, state: CurriculumState) -> jax.Array:
    """Linear warm-up; constant while learning; cosine decay once λ ramps."""
    opt = config.optimizer
    warmup = jnp.minimum(1.0, (state.step + 1) / max(1, opt.warmup_steps))
    cosine = 0.5 * (1 + jnp.cos(jnp.pi * decay_progress(config.curriculum, state)))
    decay = opt.final_fraction + (1 - opt.final_fraction) * cosine
    return opt.learning_rate * warmup * decay


def init_state(config: TrainConfig) -> TrainState:
    """The state before the first step, from the seed alone."""
    key = jax.random.key(config.seed)
    params = init_params(config.model, jax.random.fold_in(key, 0))
    return TrainState(
        params=params,
        opt_state=make_optimizer(config.optimizer).init(params),
        curriculum=init_curriculum(config.curriculum),
        key=jax.random.key_data(jax.random.fold_in(key, 1)),
    )


@functools.cache  # a run that goes on in the same process finds its step compiled
def make_train_step(
    config: TrainConfig,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """Builds the step function; jit it with the state donated.

    A step whose loss or gradient is not finite changes nothing and says so in `finite`; so does
    one after the curriculum's end, in `finished`.
    """
    model = Decoder(config.model)
    optimizer = make_optimizer(config.optimizer)
    weighs = config.curriculum.weighs

    def loss_fn(params: Any, batch: Batch, rng: jax.Array, price: _Price, total: jax.Array):
        out: Any = model.apply({"params": params}, batch.tokens, rng=rng, mode="train")
        nll = optax.softmax_cross_entropy_with_integer_labels(out.logits, batch.targets)
        hits = (jnp.argmax(out.logits, axis=-1) == batch.targets) * batch.weights
        spent = {
            "usage_per_layer": out.reports.usage,
            "cost": jnp.mean(out.reports.cost),
            "kv_cost": jnp.mean(out.reports.kv_cost),
            "usage": jnp.mean(out.reports.usage),
            "aux": jnp.mean(out.reports.aux),
        }
        loss = jnp.sum(nll * batch.weights) / total
        share = 1.0 / config.accumulation
        metrics = {"loss": loss, "accuracy": jnp.sum(hits) / total}
        metrics |= {name: share * value for name, value in spent.items()}
        penalty = price.penalty * spent[weighs] + price.auxiliary * spent["aux"]
        return loss + share * penalty, metrics

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        price = _Price(
            penalty_weight(config.curriculum, state.curriculum),
            auxiliary_weight(config.curriculum, state.curriculum),
        )
        rng = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.curriculum.step)
        total = jnp.maximum(jnp.sum(batch.weights), 1e-9)
        gradient = jax.grad(loss_fn, has_aux=True)
        if config.accumulation == 1:
            grads, metrics = gradient(state.params, batch, rng, price, total)
        else:
            # Interleaved, so that every microbatch lies on all devices of the batch.
            n = config.accumulation
            micro = jax.tree.map(lambda x: x.reshape(-1, n, *x.shape[1:]).swapaxes(0, 1), batch)

            def accumulate(sums, inputs):
                part, i = inputs
                new = gradient(state.params, part, jax.random.fold_in(rng, i), price, total)
                return jax.tree.map(jnp.add, sums, new), None

            shapes = jax.eval_shape(
                gradient, state.params, jax.tree.map(lambda x: x[0], micro), rng, price, total
            )
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
            (grads, metrics), _ = jax.lax.scan(accumulate, zeros, (micro, jnp.arange(n)))

        rate = learning_rate(config, state.curriculum)
        norm = optax.tree.norm(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = jax.tree.map(lambda p, u: p - rate * u, state.params, updates)
        curriculum = update_curriculum(
            config.curriculum, state.curriculum, metrics["accuracy"], metrics[weighs]
        )
        new = TrainState(params, opt_state, curriculum, state.key)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
        # Metrics are read a step late, so one step may come after the end: it changes nothing.
        keep = finite & ~finished(config.curriculum, state.curriculum)
        new = jax.tree.map(lambda a, b: jnp.where(keep, a, b), new, state)
        metrics |= {
            "lambda": price.penalty,
            "learning_rate": rate,
            "gradient_norm": norm,
            "finite": finite,
            "stage": new.curriculum.stage,
            "finished": finished(config.curriculum, new.curriculum),
        }
        return new, metrics

    return step
