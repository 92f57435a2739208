"""What a checkpoint must survive: donation, kills, full disks, damage, other meshes."""

import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.sharding import SingleDeviceSharding

from routing_jax.checkpoint import Checkpointer, CheckpointError

REPOSITORY = Path(__file__).resolve().parents[1]


class Moments(NamedTuple):
    mu: dict
    count: jax.Array
    empty: tuple = ()


def make_state(seed=0, width=64):
    key = jax.random.key(seed)
    kernel = jax.random.normal(key, (width, 2 * width))
    return {
        "params": {"dense": {"kernel": kernel, "bias": jnp.full((7,), jnp.nan, jnp.bfloat16)}},
        "optimizer": (
            Moments({"kernel": kernel.astype(jnp.bfloat16)}, jnp.int32(-(2**31))),
            None,
        ),
        "key": jax.random.key_data(key),
        "mask": jnp.array([True, False]),
        "position": np.array([2**40, -1]),
        "numpy_scalar": np.float32(0.1),
        "lambda": 0.1,
        "step": 3,
        "held": True,
    }


def assert_bitwise(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want)):
        assert np.asarray(a).dtype == np.asarray(b).dtype, path
        assert np.shape(a) == np.shape(b), path
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path


def shapes_of(state, sharding):
    return jax.tree.map(
        lambda x: (
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
            if isinstance(x, jax.Array)
            else x
        ),
        state,
    )


def saved(folder, *steps, keep=3):
    """Saves one small state a step and returns it by step."""
    states = {step: {"w": jax.random.normal(jax.random.key(step), (64, 96))} for step in steps}
    with Checkpointer(folder, keep=keep) as checkpoints:
        for step, state in states.items():
            checkpoints.save(step, state, {"at": step})
    return states


def files_of(folder):
    files = (path for path in Path(folder).rglob("*") if path.is_file())
    return sorted(files, key=lambda path: path.stat().st_size)


def python(code, *arguments, devices=1, **popen):
    """Starts Python code in a process of its own, with simulated CPU devices."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": flags,
        "PYTHONPATH": str(REPOSITORY),
    }
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **popen
    )


def finish(process, timeout=120):
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == 0, err[-3000:]
    assert "Traceback" not in err, err[-3000:]
    return out


def test_restores_every_kind_of_leaf_bitwise(tmp_path):
    state = make_state()
    extra = {"data": {"position": [3, None, "é"]}, "phase": 2.5}
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(7, state, extra)
        checkpoints.wait()
        device = SingleDeviceSharding(jax.devices()[0])
        for like in (state, shapes_of(state, device)):
            restored, restored_extra = checkpoints.restore(7, like)
            assert_bitwise(restored, state)
            assert jax.tree.map(type, restored) == jax.tree.map(type, state)
            assert restored_extra == extra


def test_restores_into_the_dtype_asked_for(tmp_path):
    states = saved(tmp_path, 1)
    device = SingleDeviceSharding(jax.devices()[0])
    like = {"w": jax.ShapeDtypeStruct((64, 96), jnp.bfloat16, sharding=device)}
    restored, _ = Checkpointer(tmp_path).restore(1, like)
    assert_bitwise(restored, {"w": states[1]["w"].astype(jnp.bfloat16)})


def test_nothing_there_is_no_step(tmp_path):
    checkpoints = Checkpointer(tmp_path / "never")
    assert checkpoints.steps() == []
    assert checkpoints.latest() is None
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 3: it has none"):
        checkpoints.restore(3, {})


def test_keeps_the_newest_and_nothing_else(tmp_path):
    saved(tmp_path, 5, 10, 15, 100, keep=2)
    assert Checkpointer(tmp_path).steps() == [15, 100]
    assert Checkpointer(tmp_path).latest() == 100
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_100", "step_15"]


def test_a_step_half_removed_is_no_step(tmp_path, monkeypatch):
    def fail(path, **_):
        raise OSError("the process was killed here")

    with monkeypatch.context() as patch:
        patch.setattr(epath.Path(tmp_path).__class__, "rmtree", fail)
        saved(tmp_path, 1, 2, keep=1)
        assert (tmp_path / "step_1" / "state").exists()
        assert Checkpointer(tmp_path).steps() == [2]
    saved(tmp_path, 3, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step_3"]


def test_leaves_what_is_not_its_own(tmp_path):
    (tmp_path / "step_notes").mkdir()
    (tmp_path / "step_1_backup").mkdir()
    (tmp_path / "config.json").write_text("{}")
    saved(tmp_path, 1, 2, keep=1)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["config.json", "step_1_backup", "step_2", "step_notes"]


def test_a_relative_directory_is_that_of_the_start(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Checkpointer("run") as checkpoints:
        monkeypatch.chdir("/")
        checkpoints.save(1, {"w": jnp.zeros(3)}, {})
    assert Checkpointer(tmp_path / "run").steps() == [1]


def test_a_bucket_stays_a_bucket():
    assert str(Checkpointer("gs://bucket/run").directory) == "gs://bucket/run"


def test_saving_a_complete_step_again_changes_nothing(tmp_path):
    states = saved(tmp_path, 1)
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, {"w": jnp.zeros((64, 96))}, {"at": "later"})
        checkpoints.wait()
        restored, extra = checkpoints.restore(1, states[1])
    assert_bitwise(restored, states[1])
    assert extra == {"at": 1}


def test_saving_a_damaged_step_again_replaces_it(tmp_path):
    states = saved(tmp_path, 1)
    files_of(tmp_path / "step_1" / "state")[-1].unlink()
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, states[1], {"at": "later"})
        checkpoints.wait()
        restored, extra = checkpoints.restore(1, states[1])
    assert_bitwise(restored, states[1])
    assert extra == {"at": "later"}


def test_after_going_back_whole_newer_steps_stay_and_damaged_ones_go(tmp_path):
    saved(tmp_path, 10, 20, 30)
    files_of(tmp_path / "step_20" / "state")[-1].unlink()
    saved(tmp_path, 15, keep=1)
    assert Checkpointer(tmp_path).steps() == [15, 30]


def test_donating_and_overwriting_after_save_changes_nothing_saved(tmp_path):
    step = jax.jit(lambda w: w * 1.5 + 1, donate_argnums=0)
    w, buffer, extra = jnp.arange(2.0**20), np.arange(2**20), {"list": [1]}
    want = (np.array(w), np.array(buffer))
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, (w, buffer), extra)
        buffer[:] = -1
        extra["list"].append(2)
        for _ in range(20):
            w = step(w)
        jax.block_until_ready(w)
        checkpoints.wait()
        restored, restored_extra = checkpoints.restore(1, (w, buffer))
    assert_bitwise(restored, (jnp.asarray(want[0]), want[1]))
    assert restored_extra == {"list": [1]}


def remove(path):
    path.unlink()


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip_one_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def fill_with_garbage(path):
    path.write_bytes(np.random.default_rng(0).bytes(path.stat().st_size))


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (remove, r"\S+ is missing"),
        (truncate, r"\S+ has \d+ bytes of \d+"),
        (flip_one_bit, r"the bytes of \S+ have changed"),
        (fill_with_garbage, r"the bytes of \S+ have changed"),
    ],
)
def test_damage_to_any_file_is_named_and_the_step_before_offered(tmp_path, harm, said):
    states = saved(tmp_path, 200, 300, 400)
    step_400 = tmp_path / "step_400"
    for path in files_of(step_400):
        if path.name == "manifest.json" and harm is remove:
            continue  # without it the step isn't complete: the next test
        if path.stat().st_size == 0 and harm is not remove:
            continue
        before = path.read_bytes()
        harm(path)
        with pytest.raises(CheckpointError) as caught:
            Checkpointer(tmp_path).restore(400, states[400])
        name = path.relative_to(step_400)
        said_here = r"the bytes of \S+ have changed" if path.name == "manifest.json" else said
        pattern = (
            rf"the checkpoint of step 400 in {re.escape(str(step_400))} is damaged: {said_here}; "
            r"the one of step 300 before it is intact: pass --resume-step 300"
        )
        assert re.fullmatch(pattern, str(caught.value)), caught.value
        assert str(name) in str(caught.value)
        path.write_bytes(before)
    restored, _ = Checkpointer(tmp_path).restore(400, states[400])
    assert_bitwise(restored, states[400])


def test_the_step_offered_is_an_intact_one(tmp_path):
    states = saved(tmp_path, 1, 2, 3)
    for step in (2, 3):
        flip_one_bit(files_of(tmp_path / f"step_{step}" / "state")[-1])
    with pytest.raises(CheckpointError, match=r"pass --resume-step 1$"):
        Checkpointer(tmp_path).restore(3, states[3])
    flip_one_bit(files_of(tmp_path / "step_1" / "state")[-1])
    with pytest.raises(CheckpointError, match=r"there is no intact one before it$"):
        Checkpointer(tmp_path).restore(3, states[3])


def test_without_its_manifest_a_step_is_not_complete(tmp_path):
    states = saved(tmp_path, 1, 2)
    (tmp_path / "step_2" / "manifest.json").unlink()
    checkpoints = Checkpointer(tmp_path)
    assert checkpoints.steps() == [1]
    with pytest.raises(CheckpointError, match="no checkpoint of step 2: it has 1"):
        checkpoints.restore(2, states[2])


@pytest.mark.parametrize(
    ("like", "said"),
    [
        ({"a": {"b": (2, 3)}, "c": (4,)}, r"leaf a/b has shape \(2, 5\) in it and \(2, 3\) here"),
        ({"a": {"b": (2, 5)}}, r"leaf c has shape \(4,\) in it and nothing here"),
        ({"a": {"b": (2, 5)}, "c": (4,), "d": ()}, r"leaf d has shape nothing in it and \(\) here"),
        ({"a": (2, 5), "c": (4,)}, r"leaf a has shape nothing in it and \(2, 5\) here"),
        ({"a": {"b": (10,)}, "c": (5,)}, r"leaf a/b has shape \(2, 5\) in it and \(10,\) here"),
    ],
)
def test_another_models_state_is_refused_by_its_first_other_leaf(tmp_path, like, said):
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, {"a": {"b": jnp.zeros((2, 5))}, "c": jnp.zeros(4)}, {})
        checkpoints.wait()
        like = jax.tree.map(jnp.zeros, like, is_leaf=lambda x: isinstance(x, tuple))
        with pytest.raises(
            CheckpointError, match=f"{tmp_path}/step_1 is of another model: {said}$"
        ):
            checkpoints.restore(1, like)


def test_refuses_what_it_could_not_give_back(tmp_path):
    checkpoints = Checkpointer(tmp_path)
    with pytest.raises(CheckpointError, match=r"leaf rng has dtype key.*jax\.random\.key_data"):
        checkpoints.save(1, {"rng": jax.random.key(0)}, {})
    with pytest.raises(CheckpointError, match="extra of step 1 can't be written as JSON"):
        checkpoints.save(1, {"w": jnp.zeros(2)}, {"w": jnp.zeros(2)})
    with pytest.raises(CheckpointError, match="two leaves of the state are called a/b"):
        checkpoints.save(1, {"a": {"b": 1}, "a/b": 2}, {})
    with pytest.raises(CheckpointError, match=r"leaf w of shape \(0, 3\) is empty"):
        checkpoints.save(1, {"w": jnp.zeros((0, 3))}, {})
    with pytest.raises(CheckpointError, match="leaf w of `like` has no sharding"):
        checkpoints.restore(1, {"w": jax.ShapeDtypeStruct((2,), jnp.float32)})
    with pytest.raises(CheckpointError, match="keep is 0: expected at least 1"):
        Checkpointer(tmp_path, keep=0)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=rf"{tmp_path}/file/run.*: Not a directory"):
        saved(tmp_path / "file" / "run", 1)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_directory(tmp_path):
    states = saved(tmp_path, 1)
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointError, match=rf"step 2 .* {tmp_path}/step_2: Permission denied"):
        saved(tmp_path, 2)
    assert_bitwise(Checkpointer(tmp_path).restore(1, states[1])[0], states[1])
    tmp_path.chmod(0o700)


def test_a_disk_without_room_fails_once_and_harms_nothing(tmp_path):
    # The kernel refuses to let any file grow past the limit, as a full disk would:
    # the error comes from the native code, in a thread, after save has returned.
    code = """
        import resource, sys
        import jax, jax.numpy as jnp
        from routing_jax.checkpoint import Checkpointer, CheckpointError
        def state(step):
            return {"w": jax.random.normal(jax.random.key(step), (64, 1024))}
        with Checkpointer(sys.argv[1]) as checkpoints:
            checkpoints.save(1, state(1), {})
            checkpoints.wait()
            free = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, free[1]))
            checkpoints.save(2, state(2), {})
            messages = []
            for act in (checkpoints.wait, lambda: checkpoints.save(3, state(3), {}),
                        lambda: checkpoints.save(4, state(4), {})):
                try:
                    act()
                except CheckpointError as error:
                    messages.append(str(error))
            print("\\n".join(messages))
            try:
                with Checkpointer(sys.argv[1]) as other:
                    other.save(3, state(3), {})
                    raise KeyError("the error of the loop, which must stay the one seen")
            except KeyError as error:
                print(error.__notes__[0])
            resource.setrlimit(resource.RLIMIT_FSIZE, free)
            checkpoints.save(4, state(4), {})
            checkpoints.wait()
            assert checkpoints.steps() == [1, 4], checkpoints.steps()
            for step in (1, 4):
                restored, _ = checkpoints.restore(step, state(step))
                assert bool((restored["w"] == state(step)["w"]).all())
    """
    messages = finish(python(code, tmp_path)).splitlines()
    assert messages == [
        f"the checkpoint of step {step} could not be written to {tmp_path}/step_{step}: "
        "File too large; those before it are untouched, the newest is of step 1"
        for step in (2, 3, 3)
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_1", "step_4"]


KILLED = """
    import os, sys
    import jax
    from routing_jax import checkpoint
    def kill(*_):
        os.kill(os.getpid(), 9)
    folder, moment = sys.argv[1:]
    checkpoints = checkpoint.Checkpointer(folder)
    state = {f"w{i}": jax.random.normal(jax.random.key(i), (512, 512)) for i in range(8)}
    checkpoints.save(1, state, {"at": 1})
    checkpoints.wait()
    if moment == "before the manifest":
        checkpoint._write_manifest = kill
    checkpoints.save(2, state, {"at": 2})
    if moment == "while writing":
        kill()
    checkpoints.wait()
"""


@pytest.mark.parametrize("moment", ["while writing", "before the manifest"])
def test_a_killed_save_is_never_a_step(tmp_path, moment):
    state = {f"w{i}": jax.random.normal(jax.random.key(i), (512, 512)) for i in range(8)}
    process = python(KILLED, tmp_path, moment)
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    left = [p.name for p in tmp_path.iterdir() if p.name != "step_1"]
    assert left == ["step_2.orbax-checkpoint-tmp" if moment == "while writing" else "step_2"]
    # The next run goes on from step 1 and saves step 2 over what is left.
    with Checkpointer(tmp_path) as checkpoints:
        assert checkpoints.steps() == [1]
        restored, extra = checkpoints.restore(1, state)
        assert_bitwise(restored, state)
        assert extra == {"at": 1}
        checkpoints.save(2, state, {"at": "again"})
        checkpoints.wait()
        assert checkpoints.steps() == [1, 2]
        assert checkpoints.restore(2, state)[1] == {"at": "again"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_1", "step_2"]


EIGHT_DEVICES = """
    import sys
    import jax, numpy as np
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    from routing_jax.checkpoint import Checkpointer
    def place(data, fsdp, kind):
        mesh = jax.make_mesh((data, fsdp), ("data", "fsdp"), axis_types=(kind,) * 2)
        specs = {"w": P("fsdp", "data"), "b": P("fsdp"), "key": P(), "count": P()}
        return {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    def restore(step, where):
        like = {name: jax.ShapeDtypeStruct(shapes[name].shape, shapes[name].dtype, sharding=s)
                for name, s in where.items()}
        state, _ = checkpoints.restore(step, like)
        for name, sharding in where.items():
            assert state[name].sharding == sharding, (name, state[name].sharding)
        return state
    with Checkpointer(sys.argv[1]) as checkpoints:
        kernel = jax.ShapeDtypeStruct((16, 24), jax.numpy.bfloat16)
        shapes = {"w": kernel, "b": np.zeros(8, np.float32), "key": np.zeros(2, np.uint32),
                  "count": np.int32(0)}
        # One device's arrays onto eight, from there onto two other meshes and back to disk.
        state = restore(1, place(2, 4, AxisType.Auto))
        checkpoints.save(8, state, {})
        checkpoints.wait()
        state = restore(8, place(8, 1, AxisType.Auto))
        checkpoints.save(9, restore(8, place(4, 2, AxisType.Explicit)), {})
"""


def test_moves_between_1_and_8_devices_and_between_shardings(tmp_path):
    state = {
        "w": jax.random.normal(jax.random.key(0), (16, 24)).astype(jnp.bfloat16),
        "b": jnp.arange(8.0),
        "key": jnp.array([2**32 - 1, 1], jnp.uint32),
        "count": jnp.int32(-3),
    }
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
    finish(python(EIGHT_DEVICES, tmp_path, devices=8))
    device = SingleDeviceSharding(jax.devices()[0])
    for step in (8, 9):
        restored, _ = Checkpointer(tmp_path).restore(step, shapes_of(state, device))
        assert_bitwise(restored, state)


PROCESSES = """
    import sys, pathlib
    import jax, jax.numpy as jnp, numpy as np
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{sys.argv[2]}", 2, int(sys.argv[3]))
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    from routing_jax.checkpoint import Checkpointer, CheckpointError
    mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(AxisType.Auto,))
    place = {"w": NamedSharding(mesh, P("fsdp")), "count": NamedSharding(mesh, P())}
    values = {"w": np.arange(32, dtype=np.float32).reshape(8, 4), "count": np.int32(5)}
    state = jax.tree.map(
        lambda v, s: jax.make_array_from_callback(v.shape, s, lambda i: v[i]), values, place)
    def same(got):
        return all(np.array_equal(shard.data, values[n][shard.index])
                   for n in values for shard in got[n].addressable_shards)
    folder = pathlib.Path(sys.argv[1])
    with Checkpointer(folder, keep=2) as checkpoints:
        for step in (1, 2, 3, 3):
            checkpoints.save(step, state, {"at": step})
        checkpoints.wait()
        assert checkpoints.steps() == [2, 3], checkpoints.steps()
        restored, extra = checkpoints.restore(3, state)
        assert same(restored) and extra == {"at": 3}
        if jax.process_index() == 0:
            (folder / "step_3/state/_METADATA").unlink()
        try:
            checkpoints.restore(3, state)
        except CheckpointError as error:
            print(error)
        restored, extra = checkpoints.restore(2, state)
        assert same(restored) and extra == {"at": 2}
"""


def test_two_processes_save_restore_and_fail_together(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = [python(PROCESSES, tmp_path, port, index, devices=2) for index in range(2)]
    first, second = (finish(process) for process in processes)
    assert f"{tmp_path}/step_3 is damaged: state/_METADATA is missing" in first
    assert f"process 0 failed at {tmp_path}/step_3: see its message" in second
    # One process, of two devices fewer, reads what two wrote.
    like = {"w": jnp.zeros((8, 4)), "count": jnp.int32(0)}
    restored, _ = Checkpointer(tmp_path).restore(2, like)
    want = {"w": np.arange(32, dtype=np.float32).reshape(8, 4), "count": np.int32(5)}
    assert_bitwise(restored, want)
