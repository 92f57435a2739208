"""One training step: loss, gradient, AdamW, curriculum. Pure; everything it needs is its state.

Of a published model only the routers are trained: its own parameters are an argument of the step,
and nothing is differentiated in them.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from routing_jax.attention import Prompts
from routing_jax.models import Decoder, init_params, init_routers, layer_gates, merge_routers
from routing_jax.routers import (
    Multipliers,
    ascend,
    budget_loss,
    cooled_temperature,
    init_multipliers,
)
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
from routing_jax.train.data import PROMPT_TASKS, Batch, PromptBatch


class TrainState(NamedTuple):
    """All that a run carries from step to step, and all that a checkpoint holds.

    `params` are those that are trained; `multipliers`, of the budget, are None without prompts.
    """

    params: Any
    opt_state: Any
    curriculum: CurriculumState
    key: jax.Array  # raw key data; the noise of a step is folded in from its number
    multipliers: Multipliers | None = None


class _Price(NamedTuple):
    """λ, the weight of the routers' auxiliary losses, and the temperature of layer routers."""

    penalty: jax.Array
    auxiliary: jax.Array
    temperature: jax.Array


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
    make = init_routers if config.base else init_params
    params = make(config.model, jax.random.fold_in(key, 0))
    return TrainState(
        params=params,
        opt_state=make_optimizer(config.optimizer).init(params),
        curriculum=init_curriculum(config.curriculum),
        key=jax.random.key_data(jax.random.fold_in(key, 1)),
        multipliers=init_multipliers(len(PROMPT_TASKS)) if config.base else None,
    )


def _by_task(batch: Any) -> jax.Array:
    """[B,tasks] float32, 1 at the task of each prompt."""
    return jax.nn.one_hot(batch.tasks, len(PROMPT_TASKS))


def _but_routers(change: Callable[[jax.Array], jax.Array], tree: Any) -> Any:
    """The tree with everything changed that is no router's."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf if "router" in (k.key for k in path) else change(leaf), tree
    )


@functools.cache  # a run that goes on in the same process finds its step compiled
def make_train_step(
    config: TrainConfig,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """Builds the step function (state, batch, frozen) -> (state, metrics); jit it, state donated.

    `frozen` holds the parameters that are not trained, and is left out where there are none. A step
    whose loss, gradient or new parameters are not finite changes nothing and says so in `finite`;
    so does one after the curriculum's end, in `finished`.
    """
    model = Decoder(config.model)
    optimizer = make_optimizer(config.optimizer)
    weighs = config.curriculum.weighs

    def run(params: Any, multipliers: Any, frozen: Any, batch: Any, rng: jax.Array, price: _Price):
        """The model's output, and how far its budget is missed, as a loss and as sparsities."""
        if not config.base:
            return model.apply({"params": params}, batch.tokens, rng=rng, mode="train"), 0.0, {}
        out, sown = model.apply(
            {"params": merge_routers(frozen, params)},
            batch.tokens,
            batch.positions,
            rng=rng,
            mode="train",
            prompts=Prompts(batch.lengths, price.temperature),
            read=batch.places,
            mutable=["intermediates"],
        )
        sparsity = 1 - layer_gates(sown["intermediates"]).mean(axis=0)
        targets = jnp.array(config.budget.targets)
        missed = budget_loss(sparsity, batch.tasks, targets, multipliers)
        return out, missed, {"sparsity": sparsity @ _by_task(batch)}

    def loss_fn(
        trained: Any, frozen: Any, batch: Any, rng: jax.Array, price: _Price, total: jax.Array
    ):
        params, multipliers = trained
        if config.routers_only:
            params = _but_routers(jax.lax.stop_gradient, params)
        out, missed, sparsity = run(params, multipliers, frozen, batch, rng, price)
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
        metrics |= {name: share * value for name, value in spent.items()} | sparsity
        penalty = price.penalty * spent[weighs] + price.auxiliary * spent["aux"] + missed
        return loss + share * penalty, metrics

    def step(
        state: TrainState, batch: Batch | PromptBatch, frozen: Any = None
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        price = _Price(
            penalty_weight(config.curriculum, state.curriculum),
            auxiliary_weight(config.curriculum, state.curriculum),
            cooled_temperature(state.curriculum.step, config.curriculum.max_steps),
        )
        trained = state.params, state.multipliers
        rng = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.curriculum.step)
        total = jnp.maximum(jnp.sum(batch.weights), 1e-9)
        gradient = jax.grad(loss_fn, has_aux=True)
        if config.accumulation == 1:
            grads, metrics = gradient(trained, frozen, batch, rng, price, total)
        else:
            # Interleaved, so that every microbatch lies on all devices of the batch.
            n = config.accumulation
            micro = jax.tree.map(lambda x: x.reshape(-1, n, *x.shape[1:]).swapaxes(0, 1), batch)

            def accumulate(sums, inputs):
                part, i = inputs
                new = gradient(trained, frozen, part, jax.random.fold_in(rng, i), price, total)
                return jax.tree.map(jnp.add, sums, new), None

            shapes = jax.eval_shape(
                gradient, trained, frozen, jax.tree.map(lambda x: x[0], micro), rng, price, total
            )
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
            (grads, metrics), _ = jax.lax.scan(accumulate, zeros, (micro, jnp.arange(n)))

        grads, slopes = grads
        rate = learning_rate(config, state.curriculum)
        norm = optax.tree.norm(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        if config.routers_only:  # decay would change what has no gradient
            updates = _but_routers(jnp.zeros_like, updates)
        params = jax.tree.map(lambda p, u: p - rate * u, state.params, updates)
        curriculum = update_curriculum(
            config.curriculum, state.curriculum, metrics["accuracy"], metrics[weighs]
        )
        multipliers = state.multipliers
        if multipliers is not None:
            multipliers = ascend(multipliers, slopes, config.budget.rate)
            metrics["multipliers"] = multipliers.linear
            # Each task's mean; 0 where the batch does not have it.
            metrics["sparsity"] /= jnp.maximum(_by_task(batch).sum(axis=0), 1)
        new = TrainState(params, opt_state, curriculum, state.key, multipliers)
        # Of the new parameters as well: a finite gradient may be scaled out of range.
        lengths = jnp.stack([metrics["loss"], norm, optax.tree.norm(params)])
        finite = jnp.all(jnp.isfinite(lengths))
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
