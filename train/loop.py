"""The training loop: dispatch a step, then read the metrics of the one before.

Reading late means the device never waits for logging. Everything that decides what the next step
does is in the checkpoint, so a killed run resumes to the same losses, bit for bit on the same
devices.
"""

import contextlib
import json
import signal
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from routing_jax.checkpoint import Checkpointer
from routing_jax.files import write_whole
from routing_jax.models.pretrained import load_pretrained
from routing_jax.sharding import make_mesh, put_batch, tree_shardings
from routing_jax.train.config import TrainConfig, config_to_dict
from routing_jax.train.curriculum import finished
from routing_jax.train.data import Batch, batches
from routing_jax.train.metrics import MetricsWriter, Progress
from routing_jax.train.step import TrainState, init_state, make_train_step


class TrainingDiverged(ValueError):  # noqa: N818 - says what happened
    """The loss, a gradient or a parameter was not finite; the last good state is saved."""


class Interrupted(Exception):  # noqa: N818 - a request to stop, not an error
    """SIGTERM came; the state is saved and the run can be resumed."""


class Trained(NamedTuple):
    """The end of a run: its state, the steps taken, and the seconds that they took.

    Seconds before an interruption count, as far as the checkpoint resumed from knows them.
    """

    state: TrainState
    step: int
    seconds: float


def train_mesh(config: TrainConfig) -> jax.sharding.Mesh:
    """The run's mesh; refuses a batch that does not divide among its devices.

    Raises:
      ValueError: the mesh does not fit the devices or processes, or a batch does not fit the mesh.
    """
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    copies = mesh.shape["data"] * mesh.shape["fsdp"]
    if copies % jax.process_count():
        raise ValueError(
            f"mesh.tensor is {mesh.shape['tensor']}; mesh.data × mesh.fsdp = {copies} must be a "
            f"multiple of the {jax.process_count()} processes, each of which reads its own rows."
        )
    parts = copies * config.accumulation
    for length in config.lengths:
        if config.batch_size(length) % parts:
            raise ValueError(
                f"batch_tokens is {config.batch_tokens}: {config.batch_size(length)} sequences of "
                f"{length} do not divide among mesh.data × mesh.fsdp × accumulation = {parts}."
            )
    return mesh


def abstract_state(config: TrainConfig, mesh: jax.sharding.Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the train state, without making it."""
    shapes = jax.eval_shape(lambda: init_state(config))
    return jax.tree.map(
        lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
        shapes,
        tree_shardings(shapes, mesh),
    )


class _Feed:
    """Batches of the current length, on the mesh, numbered by step from `first_batch`."""

    def __init__(self, config: TrainConfig, mesh: jax.sharding.Mesh):
        self._config, self._mesh = config, mesh
        self._stage = -1
        self._iterator: Iterator[Batch] = iter(())

    def get(self, step: int, stage: int) -> Batch:
        if stage != self._stage:
            length = self._config.lengths[stage]
            self._stage = stage
            self._iterator = batches(
                self._config.data,
                split="train",
                seed=self._config.seed,
                batch_size=self._config.batch_size(length),
                length=length,
                start_step=self._config.first_batch + step,
                process_index=jax.process_index(),
                process_count=jax.process_count(),
            )
        return put_batch(next(self._iterator), self._mesh)


class _StopSignal:
    """Whether SIGTERM has come, agreed among all processes."""

    def __enter__(self) -> "_StopSignal":
        self.seen = False
        try:
            self._before = signal.signal(signal.SIGTERM, self._on_signal)
        except ValueError:  # not the main thread (a notebook's worker, a test): nothing to catch
            self._before = None
        return self

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.seen = True

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def agreed(self) -> bool:
        """True on every process once any of them was told to stop; call it in step on all."""
        if jax.process_count() == 1:
            return self.seen
        return bool(multihost_utils.process_allgather(np.array(self.seen)).any())


def _row(metrics: dict[str, Any], length: int) -> dict[str, Any]:
    """One step's metrics as JSON values."""
    hidden = ("finite", "finished", "stage")
    row = {k: np.asarray(v).tolist() for k, v in metrics.items() if k not in hidden}
    return row | {"length": length}


def load_base(config: TrainConfig, mesh: Mesh) -> Any:
    """The base's parameters on a mesh, in the run's dtype; they stay as they are."""
    model = config.model
    return load_pretrained(config.base, dtype=model.dtype, scan=model.scan, mesh=mesh).params


def train(
    config: TrainConfig,
    workdir: str | epath.Path,
    *,
    resume_step: int | None = None,
    params: Any = None,
    frozen: Any = None,
    quiet: bool = False,
) -> Trained:
    """Trains to the end of the curriculum, logging and checkpointing in `workdir`.

    Args:
      config: the run; written to `workdir/config.json` once its state is made or restored.
      workdir: where metrics and checkpoints go; may be gs://.
      resume_step: continue from this checkpoint; None starts anew.
      params: the first parameters of a run that starts anew; drawn from the seed when None.
      frozen: the parameters of the run's base, where it has one, as `load_base` gives them.
      quiet: print no progress.

    Returns:
      The final state, which is also the last checkpoint.

    Raises:
      ValueError: a mesh, batch, task or corpus that does not fit.
      CheckpointError: a checkpoint that cannot be read or written.
      TrainingDiverged: a step was not finite; the last good state is saved.
      Interrupted: SIGTERM; the state is saved.
    """
    mesh = train_mesh(config)
    chief = jax.process_index() == 0
    workdir = epath.Path(workdir)
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.set_mesh(mesh))
        checkpoints = stack.enter_context(Checkpointer(workdir / "checkpoints"))
        like = abstract_state(config, mesh)
        seconds_before = 0.0
        shardings = jax.tree.map(lambda s: s.sharding, like)
        if resume_step is None:
            state = jax.jit(lambda: init_state(config), out_shardings=shardings)()
            if params is not None:
                state = state._replace(params=params)
            step, stage = 0, int(state.curriculum.stage)
        else:
            state, extra = checkpoints.restore(resume_step, like)
            step, stage = resume_step, extra["stage"]
            seconds_before = extra.get("seconds", 0.0)
        if chief:
            workdir.mkdir(parents=True, exist_ok=True)
            write_whole(workdir / "config.json", json.dumps(config_to_dict(config), indent=2))
        # Said again for the outputs, or jit spells the same layout differently and compiles twice.
        step_fn = jax.jit(
            make_train_step(config), donate_argnums=0, out_shardings=(shardings, None)
        )
        feed = _Feed(config, mesh)
        writer = stack.enter_context(MetricsWriter(workdir, step)) if chief else None
        progress = stack.enter_context(
            Progress(config.curriculum.max_steps, step, quiet or not chief)
        )
        stop = stack.enter_context(_StopSignal())
        started, logged = time.time(), step

        def seconds() -> float:
            return seconds_before + time.time() - started

        def log(reached: int, length: int, values: dict[str, Any]) -> None:
            nonlocal logged
            due = reached % config.log_every == 0 or reached == 1
            if due and reached > logged and values["finite"]:
                row = _row(values, length)
                if writer is not None:
                    writer.write(reached, row)
                progress.show(reached, row, seconds())
                logged = reached

        def save() -> int:
            if pending is not None and not done:
                # A run resumed from here never reads this step's metrics again.
                reached, length, values = pending
                log(reached, length, jax.device_get(values))
            if writer is not None:
                writer.flush()
            # The state's own count: a step that was refused, or came after the end, is not in it.
            taken = int(state.curriculum.step)
            checkpoints.save(taken, state, {"stage": stage, "seconds": seconds()})
            return taken

        pending: tuple[int, int, dict[str, Any]] | None = None
        verdict = int(state.curriculum.stage)
        done = bool(finished(config.curriculum, state.curriculum))
        while not done:
            batch = feed.get(step, stage)
            length = config.lengths[stage]
            state, metrics = step_fn(state, batch, frozen)
            step += 1
            if pending is not None:
                before, before_length, values = pending
                late = jax.device_get(values)
                verdict, done = int(late["stage"]), bool(late["finished"])
                if not late["finite"]:
                    pending = None
                    last = save()
                    checkpoints.wait()
                    raise TrainingDiverged(
                        f"the loss, a gradient or a new parameter of step {before} is not finite; "
                        f"the last finite state is saved as step {last} in "
                        f"{checkpoints.directory}; resume with a lower optimizer.learning_rate."
                    )
                log(before, before_length, late)
            pending = step, length, metrics
            stage = verdict
            if done:
                break
            if step % config.checkpoint_every == 0:
                save()
            # Agreeing among processes costs a message, so only a lone process asks every step.
            if (jax.process_count() == 1 or step % config.log_every == 0) and stop.agreed():
                break
        step = save()
        checkpoints.wait()
        if not done or stop.agreed():
            raise Interrupted(f"stopped by SIGTERM; step {step} is saved.")
        return Trained(state, step, seconds())
