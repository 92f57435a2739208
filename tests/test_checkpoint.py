"""What a checkpoint must survive: donation, damage, other models, being written again."""

import os
import re
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.sharding import SingleDeviceSharding

from routing_jax.checkpoint import Checkpointer, CheckpointError

from .bitwise import assert_bitwise, shapes_of


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
            r"the one of step 300 before it is intact"
        )
        assert re.fullmatch(pattern, str(caught.value)), caught.value
        assert caught.value.intact == 300
        assert str(name) in str(caught.value)
        path.write_bytes(before)
    restored, _ = Checkpointer(tmp_path).restore(400, states[400])
    assert_bitwise(restored, states[400])


def test_the_step_offered_is_an_intact_one(tmp_path):
    states = saved(tmp_path, 1, 2, 3)
    for step in (2, 3):
        flip_one_bit(files_of(tmp_path / f"step_{step}" / "state")[-1])
    with pytest.raises(CheckpointError, match=r"the one of step 1 before it is intact$") as caught:
        Checkpointer(tmp_path).restore(3, states[3])
    assert caught.value.intact == 1
    flip_one_bit(files_of(tmp_path / "step_1" / "state")[-1])
    with pytest.raises(CheckpointError, match=r"there is no intact one before it$") as caught:
        Checkpointer(tmp_path).restore(3, states[3])
    assert caught.value.intact is None


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
