"""Checkpoints: asynchronous, atomic, checked on restore; all of orbax behind one class.

A step stands in `DIR/step_N/`: orbax's files under `state`, and `manifest.json`, which is written
last. The manifest holds the caller's `extra`, every leaf's shape and dtype, and the size and CRC-32
of every file, so that one small file makes a step complete, makes `extra` atomic with the arrays,
and finds damage: orbax compresses without a checksum, and a flipped bit there restores silently.
"""

import contextlib
import errno
import json
import logging
import os
import re
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

PyTree = Any

# What orbax calls the folder of a save under way ends differently from a step's own.
_NAME = re.compile(r"step_(\d+)(\.orbax-checkpoint-tmp.*)?")
_MANIFEST = "manifest.json"
_REASONS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)


class CheckpointError(ValueError):
    """A checkpoint could not be written or read; the message is one sentence naming its path.

    Attributes:
      intact: the newest intact step before a damaged one, if that is what is wrong.

    >>> raise CheckpointError("step 3 in /runs/a is damaged")
    Traceback (most recent call last):
    routing_jax.checkpoint.CheckpointError: step 3 in /runs/a is damaged
    """

    def __init__(self, message: str, intact: int | None = None):
        super().__init__(message)
        self.intact = intact


class _Manifest(NamedTuple):
    extra: dict[str, Any]
    leaves: dict[str, list]  # path -> [shape, dtype]
    files: dict[str, list]  # path below the step's folder -> [bytes, CRC-32 or None]


class Checkpointer:
    """Saves and restores the steps of one run; the newest `keep` are kept.

    One writer per directory. With several jax processes the directory is shared, and all of them
    call `save`, `wait` and `restore` in the same order; an error of one is raised by all.
    A save that is interrupted never counts as a step; the next save clears what it left.

    >>> import tempfile
    >>> state = {"w": jnp.arange(3.0), "count": jnp.int32(7)}
    >>> with tempfile.TemporaryDirectory() as folder, Checkpointer(folder, keep=2) as checkpoints:
    ...     checkpoints.save(10, state, {"seed": 0})
    ...     checkpoints.wait()
    ...     restored, extra = checkpoints.restore(10, like=state)
    ...     checkpoints.steps(), restored["w"].tolist(), extra
    ([10], [0.0, 1.0, 2.0], {'seed': 0})
    """

    def __init__(self, directory: str | epath.Path, *, keep: int = 3):
        if keep < 1:
            raise CheckpointError(f"keep is {keep}: expected at least 1 checkpoint to keep")
        self.directory = epath.Path(directory)
        if "://" not in str(directory):
            self.directory = epath.Path(os.path.abspath(self.directory))
        self.keep = keep
        logging.getLogger("absl").addFilter(_is_news)
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self.wait()
            elif self._pending is not None:
                # The other processes may never get here: wait for our own part alone,
                # and let the error that is already under way be the one that is seen.
                failure = self._pending.exception()
                if failure is not None:
                    error.add_note(str(failure))
        finally:
            self._executor.shutdown()

    def save(self, step: int, state: PyTree, extra: dict[str, Any]) -> None:
        """Start saving `state` and `extra` as `step`; return once `state` may be donated.

        A step that is already complete is left as it is, and `state` is not written; if its files
        are damaged it is replaced. Waits for the save before this one.

        Args:
          step: 0 or more.
          state: arrays (jax or numpy) and Python scalars; random keys as `jax.random.key_data`.
          extra: what `json` can write.

        Raises:
          CheckpointError: this save could not start, or the one before it failed; in that case
            nothing was started, and calling again tries this one.
        """
        self.wait()
        leaves = _flatten(state)
        description = {path: [list(leaf.shape), str(leaf.dtype)] for path, leaf in leaves.items()}
        try:
            # Through text and back: what is written can't change after this call returns.
            extra = json.loads(json.dumps(extra))
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"extra of step {step} can't be written as JSON: {error}"
            ) from None
        if _from_primary(step in self.steps() and self._damage(step) is None):
            return
        try:
            with _context():
                # Only leftovers can be overwritten: an intact step never gets here.
                response = ocp.save_checkpointables_async(
                    self._path(step), {"state": leaves}, overwrite=True
                )
        except Exception as error:
            raise self._not_written(step, error) from error
        self._pending = self._executor.submit(self._finish, step, response, extra, description)

    def wait(self) -> None:
        """Block until the pending save, if there is one, is complete on every process.

        Raises:
          CheckpointError: it failed; the complete steps are as they were.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            _raise_together(pending.exception(), self.directory)

    def steps(self) -> list[int]:
        """Return the complete steps, ascending; a pending save counts once it is complete."""
        try:
            names = [path.name for path in self.directory.iterdir()]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise CheckpointError(f"{self.directory} can't be listed: {_reason(error)}") from error
        matches = (_NAME.fullmatch(name) for name in names)
        found = {int(match[1]) for match in matches if match}
        return sorted(step for step in found if (self._path(step) / _MANIFEST).exists())

    def latest(self) -> int | None:
        """Return the newest complete step, or None."""
        return max(self.steps(), default=None)

    def restore(self, step: int, like: PyTree) -> tuple[PyTree, dict[str, Any]]:
        """Return (state, extra) of `step`, every file checked, every leaf where `like` has it.

        Args:
          step: a complete step.
          like: the state's structure. A jax array or `jax.ShapeDtypeStruct` gives the sharding and
            dtype that its leaf is read into, whatever they were when it was saved; a numpy array
            or Python scalar comes back as one.

        Raises:
          CheckpointError: no such step; damaged (the newest intact step before it is named); or
            `like` has other leaves or shapes (the first is named).
        """
        self.wait()
        template = _flatten(like)
        abstract = {path: _abstract(path, leaf) for path, leaf in template.items()}
        error: CheckpointError | None = None
        try:
            manifest = self._check(step, template)
        except CheckpointError as caught:
            error = caught
        _raise_together(error, self._path(step))
        try:
            flat = ocp.load_checkpointables(self._path(step), {"state": abstract})["state"]
        except Exception as cause:
            raise self._damaged(
                step,
                "holds the files that were written, yet it could not be read: " + _reason(cause),
            ) from cause
        leaves = [
            flat[path]
            if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct | np.ndarray)
            else type(leaf)(flat[path].item())
            for path, leaf in zip(template, jax.tree.leaves(like))
        ]
        return jax.tree.unflatten(jax.tree.structure(like), leaves), manifest.extra

    def _path(self, step: int) -> epath.Path:
        return self.directory / f"step_{step}"

    def _finish(
        self,
        step: int,
        response: ocp.AsyncResponse[None],
        extra: dict[str, Any],
        leaves: dict[str, list],
    ) -> None:
        """Wait for orbax, then make the step complete and drop old ones (in the thread)."""
        try:
            response.result()
            if jax.process_index() == 0:
                folder = self._path(step)
                _write_manifest(folder, _Manifest(extra, leaves, _fingerprints(folder)))
        except Exception as error:
            raise self._not_written(step, error) from error
        if jax.process_index() == 0:
            self._clear(step)

    def _not_written(self, step: int, error: Exception) -> CheckpointError:
        kept = None
        with contextlib.suppress(OSError, CheckpointError):
            if jax.process_index() == 0:
                self._clear(step=None)  # gives a full disk its space back
            kept = self.latest()
        rest = "there is none before it"
        if kept is not None:
            rest = f"those before it are untouched, the newest is of step {kept}"
        return CheckpointError(
            f"the checkpoint of step {step} could not be written to {self._path(step)}: "
            f"{_reason(error)}; {rest}"
        )

    def _clear(self, step: int | None) -> None:
        """Remove what interrupted saves left and, after saving `step`, steps beyond `keep`."""
        complete = self.steps()
        drop: list[int] = []
        if step is not None:
            # Newer steps are here only if the run went back to an older one: other work,
            # which stays if it is whole, and would stop the next resume if it is damaged.
            drop = [s for s in complete if s <= step][: -self.keep]
            drop += [s for s in complete if s > step and self._damage(s) is not None]
        stay = {self._path(s).name for s in complete if s not in drop}
        for path in list(self.directory.iterdir()):
            if _NAME.fullmatch(path.name) and path.name not in stay:
                # What can't be removed now is tried again after the next save.
                with contextlib.suppress(OSError):
                    # A step stops being one before its files go: no half of it remains.
                    (path / _MANIFEST).unlink(missing_ok=True)
                    path.rmtree()

    def _check(self, step: int, template: dict[str, Any]) -> _Manifest:
        """Return the manifest of an undamaged step that fits `template`."""
        complete = self.steps()
        if step not in complete:
            found = f"has {', '.join(map(str, complete))}" if complete else "has none"
            raise CheckpointError(f"{self.directory} has no checkpoint of step {step}: it {found}")
        # Reading every byte once is enough: one process does it for all.
        damage = self._damage(step) if jax.process_index() == 0 else None
        if damage is not None:
            raise self._damaged(step, f"is damaged: {damage}")
        manifest = _read_manifest(self._path(step))
        for path in [*template, *(path for path in manifest.leaves if path not in template)]:
            saved = tuple(manifest.leaves[path][0]) if path in manifest.leaves else "nothing"
            wanted = tuple(template[path].shape) if path in template else "nothing"
            if saved != wanted:
                raise CheckpointError(
                    f"the checkpoint of step {step} in {self._path(step)} is of another model: "
                    f"leaf {path} has shape {saved} in it and {wanted} here"
                )
        return manifest

    def _damage(self, step: int) -> str | None:
        """Say what is wrong with a complete step's files, or None."""
        folder = self._path(step)
        try:
            written = _read_manifest(folder).files
            present = _fingerprints(folder)
        except (CheckpointError, OSError) as error:
            return str(error)
        for name, (size, checksum) in written.items():
            if name not in present:
                return f"{name} is missing"
            if present[name][0] != size:
                return f"{name} has {present[name][0]} bytes of {size}"
            if present[name][1] != checksum:
                return f"the bytes of {name} have changed"
        return None

    def _damaged(self, step: int, harm: str) -> CheckpointError:
        """The error of a damaged step, which names the newest intact one before it."""
        older = (s for s in reversed(self.steps()) if s < step and self._damage(s) is None)
        intact = next(older, None)
        rest = "there is no intact one before it"
        if intact is not None:
            rest = f"the one of step {intact} before it is intact"
        where = f"the checkpoint of step {step} in {self._path(step)}"
        return CheckpointError(f"{where} {harm}; {rest}", intact)


def _is_news(record: logging.LogRecord) -> bool:
    # Orbax logs, with its traceback, the error that it then raises and that is told here.
    return "run() raised an exception" not in str(record.msg)


def _context() -> ocp.Context:
    # Where a folder can't be made, threads that orbax has already started would wait for it
    # for minutes: make it before they start.
    context = ocp.Context()
    context.asynchronous.create_directories_asynchronously = False
    return context


def _flatten(tree: PyTree) -> dict[str, Any]:
    """Return {path: leaf}: which containers they stood in is left to the caller's `like`."""
    leaves: dict[str, Any] = {}
    for key, leaf in jax.tree_util.tree_leaves_with_path(tree):
        path = jax.tree_util.keystr(key, simple=True, separator="/")
        if path in leaves:
            raise CheckpointError(f"two leaves of the state are called {path}")
        if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
            leaf = np.asarray(leaf)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
            raise CheckpointError(
                f"leaf {path} has dtype {leaf.dtype}: expected plain numbers, "
                "for a random key what jax.random.key_data gives"
            )
        if 0 in leaf.shape:
            raise CheckpointError(f"leaf {path} of shape {leaf.shape} is empty: orbax saves none")
        leaves[path] = leaf
    return leaves


def _abstract(path: str, leaf: Any) -> Any:
    if isinstance(leaf, np.ndarray):
        return leaf
    if leaf.sharding is None:
        raise CheckpointError(f"leaf {path} of `like` has no sharding: it says where to restore to")
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _fingerprints(folder: epath.Path) -> dict[str, list]:
    """Return {name: [bytes, CRC-32]} of every file below, the manifest left out."""
    # An object store checks its own bytes, and reading all back would cost a download.
    local = "://" not in str(folder)
    found: dict[str, list] = {}
    for parent, _, names in folder.walk():
        for path in (parent / name for name in names if not name.startswith(_MANIFEST)):
            size = path.stat().length
            found[str(path.relative_to(folder))] = [size, _checksum(path) if local else None]
    return found


def _checksum(path: epath.Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def _write_manifest(folder: epath.Path, manifest: _Manifest) -> None:
    text = json.dumps(manifest._asdict())
    draft = folder / f"{_MANIFEST}.draft"
    draft.write_text(json.dumps({"crc32": zlib.crc32(text.encode()), "manifest": text}))
    draft.replace(folder / _MANIFEST)


def _read_manifest(folder: epath.Path) -> _Manifest:
    try:
        outer = json.loads((folder / _MANIFEST).read_bytes())
        text = outer["manifest"]
        if zlib.crc32(text.encode()) == outer["crc32"]:
            return _Manifest(**json.loads(text))
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise CheckpointError(f"the bytes of {_MANIFEST} have changed")


def _reason(error: BaseException) -> str:
    """Say why in a few words: tensorstore's errors run over lines and hide the errno."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    for number in _REASONS:
        if os.strerror(number) in str(error):
            return os.strerror(number)
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _from_primary(value: bool) -> bool:
    """Return the first process's value: a file system may show others an older listing."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.broadcast_one_to_all(np.int32(value)))


def _raise_together(error: BaseException | None, path: epath.Path) -> None:
    """Raise on every process if one has an error: none is left waiting at a collective."""
    if jax.process_count() > 1:
        failed = np.ravel(multihost_utils.process_allgather(np.int32(error is not None)))
        if error is None and failed.any():
            first = int(failed.argmax())
            error = CheckpointError(f"process {first} failed at {path}: see its message")
    if error is not None:
        raise error
