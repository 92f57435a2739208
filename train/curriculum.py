"""The curriculum: first learn with attention everywhere, then make attention cost something.

An optax-style pair of pure functions over a small state that lives in the train state, so it is
saved with every checkpoint and a resumed run continues it exactly.

Phase 1: λ = 0, sequences grow through `lengths`, until accuracy holds a threshold (or for a fixed
number of steps). Phase 2: λ ramps linearly to its peak. Phase 3: λ holds, and the learning rate
decays; then training is done.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

_EMA_DECAY = 0.9  # of what is smoothed: about ten steps
_LAG = _EMA_DECAY / (1 - _EMA_DECAY)  # steps by which such a mean is behind what rises steadily
_FALL = 2.0  # times as fast as it rises, λ falls at most


@dataclass(frozen=True)
class CurriculumConfig:
    """When λ rises, and what it weighs.

    Attributes:
      peak: the largest λ.
      weighs: what λ multiplies: 'usage' (fraction of tokens that attend), 'cost' or 'kv_cost'.
      explore: weight of the router's auxiliary loss (for token routers an entropy bonus, which
        keeps both branches alive; for scheme routers the balance loss).
      explore_fades: that weight falls to 0 as λ ramps to its peak; else it stays.
      lengths: sequence lengths to pass through before the task's own; empty for none.
      threshold: accuracy that ends a length, and phase 1.
      patience: steps for which smoothed accuracy must stay above the threshold.
      learn_steps: phase 1 ends after so many steps at the latest.
      ramp_steps: steps in which λ rises to its peak.
      hold_steps: steps after the ramp; the learning rate decays in ramp and hold.
      from_start: keep λ at its peak from the first step (the control that the source warns of).
      reaction: while accuracy is below the threshold after phase 1: 'none', 'pause' (λ does not
        rise) or 'back' (λ falls).
      target: stop raising λ while the weighed quantity is at or below this, and lower it while it
        is below nine tenths of it; 0 for no target.
      foresight: how many steps ahead the weighed quantity is extrapolated from its recent change,
        for routers that answer λ late. λ then changes in proportion to how far off the target that
        is, in full at twice the target, and falls twice as fast at most. 0: its present value
        counts, as above.
      course: steps in which the target comes down, in equal ratios, from what is spent when λ
        begins to rise; 0: it is the same from the first step.
      reward: how far λ may fall below 0, as a share of its peak. Where less is spent than the
        target, spending is rewarded then, so that the target is held from both sides.
    """

    peak: float = 0.5
    weighs: Literal["usage", "cost", "kv_cost"] = "usage"
    explore: float = 0.1
    explore_fades: bool = True
    lengths: tuple[int, ...] = ()
    threshold: float = 0.95
    patience: int = 20
    learn_steps: int = 2000
    ramp_steps: int = 150
    hold_steps: int = 1000
    from_start: bool = False
    reaction: Literal["none", "pause", "back"] = "none"
    target: float = 0.0
    foresight: int = 0
    course: int = 0
    reward: float = 0.0

    def __post_init__(self):
        if self.peak < 0:
            raise ValueError(f"curriculum.peak is {self.peak}; it must be at least 0.")
        if self.explore < 0:
            raise ValueError(f"curriculum.explore is {self.explore}; it must be at least 0.")
        for name in ("learn_steps", "ramp_steps", "hold_steps"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"curriculum.{name} is {getattr(self, name)}; at least 0 is needed."
                )
        if self.learn_steps + self.ramp_steps + self.hold_steps < 1:
            raise ValueError(
                "curriculum.learn_steps, ramp_steps and hold_steps are all 0; training needs at "
                "least 1 step."
            )
        if self.patience < 1:
            raise ValueError(f"curriculum.patience is {self.patience}; it must be at least 1.")
        if not 0 < self.threshold <= 1:
            raise ValueError(f"curriculum.threshold is {self.threshold}; it must lie in (0, 1].")
        if not 0 <= self.target < 1:
            raise ValueError(f"curriculum.target is {self.target}; it must lie in [0, 1).")
        steered, still = self.ramp_steps + self.hold_steps, self.reaction == "none"
        for name, most, accepted in (
            ("foresight", math.inf, "be at least 0, and 0 without a target"),
            ("course", steered, "lie in [0, ramp_steps + hold_steps], and be 0 without a target"),
            ("reward", 1.0 * still, "lie in [0, 1], and be 0 without a target or with a reaction"),
        ):
            value = getattr(self, name)
            if not 0 <= value <= most or (value and not self.target):
                raise ValueError(f"curriculum.{name} is {value}; it must {accepted}.")
        if self.weighs not in ("usage", "cost", "kv_cost"):
            raise ValueError(
                f"curriculum.weighs is {self.weighs!r}; accepted: 'usage', 'cost', 'kv_cost'."
            )
        if self.reaction not in ("none", "pause", "back"):
            raise ValueError(
                f"curriculum.reaction is {self.reaction!r}; accepted: 'none', 'pause', 'back'."
            )
        if self.lengths and self.lengths[0] < 1:
            raise ValueError(f"curriculum.lengths is {self.lengths}; lengths must be at least 1.")
        if self.from_start and (self.reaction != "none" or self.target):
            raise ValueError(
                f"curriculum.from_start keeps λ at its peak; reaction={self.reaction!r} and "
                f"target={self.target} must be 'none' and 0 with it."
            )
        if any(b <= a for a, b in zip(self.lengths, self.lengths[1:])):
            raise ValueError(f"curriculum.lengths is {self.lengths}; lengths must rise.")

    @property
    def max_steps(self) -> int:
        """The most steps that training takes; fewer when phase 1 ends early."""
        return self.learn_steps + self.ramp_steps + self.hold_steps


class CurriculumState(NamedTuple):
    """Where the curriculum stands; scalars.

    Attributes:
      step: steps taken.
      ramp_start: the step at which phase 2 began, or −1 in phase 1.
      ramp: progress of λ from 0 to its peak, in [−reward, 1].
      stage: index into `lengths`; len(lengths) is the task's own length.
      above: steps in a row with smoothed accuracy above the threshold.
      accuracy: smoothed accuracy.
      weighed: smoothed, what λ multiplies; None where nothing is foreseen by it.
      asked: the target, or what is above it while it comes down; None where it does not.
    """

    step: jax.Array
    ramp_start: jax.Array
    ramp: jax.Array
    stage: jax.Array
    above: jax.Array
    accuracy: jax.Array
    weighed: jax.Array | None
    asked: jax.Array | None


def init_curriculum(config: CurriculumConfig) -> CurriculumState:
    """The state before the first step.

    >>> int(init_curriculum(CurriculumConfig()).ramp_start)
    -1
    """
    starts_now = config.learn_steps == 0
    return CurriculumState(
        step=jnp.int32(0),
        ramp_start=jnp.int32(0 if starts_now else -1),
        ramp=jnp.float32(1 if starts_now and config.ramp_steps == 0 else 0),
        stage=jnp.int32(len(config.lengths) if starts_now else 0),
        above=jnp.int32(0),
        accuracy=jnp.float32(0),
        weighed=jnp.float32(0) if config.foresight else None,
        asked=jnp.float32(0) if config.course else None,
    )


def penalty_weight(config: CurriculumConfig, state: CurriculumState) -> jax.Array:
    """λ for the next step.

    >>> float(penalty_weight(CurriculumConfig(), init_curriculum(CurriculumConfig())))
    0.0
    """
    return jnp.float32(config.peak) * (1.0 if config.from_start else state.ramp)


def auxiliary_weight(config: CurriculumConfig, state: CurriculumState) -> jax.Array:
    """Weight of the routers' auxiliary losses for the next step.

    >>> round(float(auxiliary_weight(CurriculumConfig(), init_curriculum(CurriculumConfig()))), 3)
    0.1
    """
    return jnp.float32(config.explore) * (
        (1.0 - jnp.maximum(state.ramp, 0.0)) if config.explore_fades else 1.0
    )


def decay_progress(config: CurriculumConfig, state: CurriculumState) -> jax.Array:
    """How far ramp and hold have come, in [0, 1]; 1 ends the training.

    >>> float(decay_progress(CurriculumConfig(), init_curriculum(CurriculumConfig())))
    0.0
    """
    steps = max(1, config.ramp_steps + config.hold_steps)
    since = jnp.where(state.ramp_start < 0, 0, state.step - state.ramp_start)
    return jnp.clip(since / steps, 0.0, 1.0)


def finished(config: CurriculumConfig, state: CurriculumState) -> jax.Array:
    """Whether phases 2 and 3 are over; bool."""
    steps = config.ramp_steps + config.hold_steps
    return (state.ramp_start >= 0) & (state.step - state.ramp_start >= steps)


def _smoothed(before: jax.Array, value: jax.Array) -> jax.Array:
    return _EMA_DECAY * before + (1 - _EMA_DECAY) * value


def update_curriculum(
    config: CurriculumConfig, state: CurriculumState, accuracy: jax.Array, weighed: jax.Array
) -> CurriculumState:
    """The state after a step that had this accuracy and this mean usage (or cost).

    Args:
      config: the curriculum.
      state: before the step.
      accuracy: scalar in [0, 1], of the training batch.
      weighed: scalar, the quantity that λ multiplies.

    Returns:
      The new state.

    >>> cfg = CurriculumConfig(learn_steps=1, ramp_steps=2)
    >>> state = update_curriculum(cfg, init_curriculum(cfg), jnp.float32(0.0), jnp.float32(1.0))
    >>> int(state.ramp_start), float(state.ramp)
    (1, 0.5)
    """
    smoothed = _smoothed(state.accuracy, accuracy)
    good = smoothed >= config.threshold - 1e-5  # a float32 average of ones stays just below 1
    above = jnp.where(good, state.above + 1, 0)
    learning = state.ramp_start < 0
    last = len(config.lengths)
    step = state.step + 1

    held = learning & (above >= config.patience)
    next_length = held & (state.stage < last)
    out_of_time = learning & (step >= config.learn_steps)
    begin = (held & (state.stage == last)) | out_of_time

    rate = 1.0 / max(1, config.ramp_steps)
    change = jnp.float32(rate)
    target, asked, mean = jnp.float32(config.target), None, None
    if config.course:
        assert state.asked is not None  # of `init_curriculum` with this config
        since = state.step - state.ramp_start - (config.learn_steps == 0)
        left = jnp.maximum(1, config.course - since)
        down = state.asked * (target / jnp.maximum(state.asked, target)) ** (1 / left)
        begins = learning | (state.step == 0)
        target = asked = jnp.where(begins, jnp.maximum(weighed, target), down)
    if config.foresight:
        assert state.weighed is not None  # of `init_curriculum` with this config
        mean = jnp.where(state.step == 0, weighed, _smoothed(state.weighed, weighed))
        then = weighed + config.foresight / _LAG * (weighed - mean)
        change = rate * jnp.clip(then / target - 1, -_FALL, 1.0)
    elif config.target:
        too_low = weighed < 0.9 * target
        change = jnp.where(weighed > target, rate, jnp.where(too_low, -rate, 0.0))
    if config.reaction != "none":
        change = jnp.where(good, change, jnp.minimum(change, -rate * (config.reaction == "back")))
    running = begin | ~learning
    ramp = jnp.where(running, jnp.clip(state.ramp + change, -config.reward, 1.0), state.ramp)

    return CurriculumState(
        step=step,
        ramp_start=jnp.where(begin, step, state.ramp_start),
        ramp=ramp,
        # Out of time also ends the length curriculum: the rest is trained at the task's length.
        stage=jnp.where(begin, last, jnp.where(next_length, state.stage + 1, state.stage)),
        above=jnp.where(next_length, 0, above),
        accuracy=jnp.where(next_length, 0.0, smoothed),
        weighed=mean,
        asked=asked,
    )
