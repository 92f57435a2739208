"""Checkpoints of several devices and processes, and of those that are killed or lack room."""

import signal
import socket

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from routing_jax.checkpoint import Checkpointer

from .bitwise import assert_bitwise, shapes_of
from .processes import finish, start_python


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
    ((out, _),) = finish(start_python(code, tmp_path))
    messages = out.splitlines()
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
    process = start_python(KILLED, tmp_path, moment)
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
    finish(start_python(EIGHT_DEVICES, tmp_path, devices=8))
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
    both = [start_python(PROCESSES, tmp_path, port, index, devices=2) for index in range(2)]
    (first, _), (second, _) = finish(*both)
    assert f"{tmp_path}/step_3 is damaged: state/_METADATA is missing" in first
    assert f"process 0 failed at {tmp_path}/step_3: see its message" in second
    # One process, of two devices fewer, reads what two wrote.
    like = {"w": jnp.zeros((8, 4)), "count": jnp.int32(0)}
    restored, _ = Checkpointer(tmp_path).restore(2, like)
    want = {"w": np.arange(32, dtype=np.float32).reshape(8, 4), "count": np.int32(5)}
    assert_bitwise(restored, want)
