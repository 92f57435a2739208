"""A router's file: what was saved comes back, for the model it belongs to and for no other."""

import re

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from routing_jax.models.pretrained import load_router, save_router

from .published import MODELS, random_tensors, write_folder, write_gguf

CONFIG = MODELS["smollm2"]
PARAMS = {
    "layers_0": {"prefix": jnp.arange(6.0).reshape(2, 3), "bias": jnp.zeros(2, jnp.bfloat16)},
    "layers_1": {"prefix": -jnp.ones((2, 3)), "bias": jnp.ones(2, jnp.bfloat16)},
}
SETTINGS = {"sink": 128, "mode": "streaming", "layers": [0, 1]}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Two models that differ in one number, each as a folder of two files and as GGUF."""
    folder, made = tmp_path_factory.mktemp("bases"), []
    for name in ("one", "two"):
        tensors = random_tensors(CONFIG)
        tensors["model.norm.weight"][3] += name == "two"
        made.append(write_folder(folder / name, CONFIG, tensors, shards=2))
        made.append(write_gguf(folder / f"{name}.gguf", CONFIG, tensors))
    return made


def test_what_was_saved_comes_back(bases, tmp_path):
    for base in bases:
        save_router(tmp_path / "router.safetensors", PARAMS, base, SETTINGS)
        params, config = load_router(tmp_path / "router.safetensors", base)
        assert config == SETTINGS
        assert params.keys() == PARAMS.keys()
        for layer, leaves in PARAMS.items():
            for name, leaf in leaves.items():
                assert params[layer][name].dtype == leaf.dtype
                np.testing.assert_array_equal(params[layer][name], leaf)


def test_a_router_for_another_model_is_refused(bases, tmp_path):
    one, one_gguf, two, two_gguf = bases
    path = tmp_path / "router.safetensors"
    for base, others in ((one, (two, one_gguf)), (two_gguf, (one_gguf, two))):
        save_router(path, PARAMS, base, SETTINGS)
        for other in others:
            said = rf"^{path} holds a router for {base.name} \(\w+…\); {other} is another model"
            with pytest.raises(ValueError, match=said):
                load_router(path, other)


def test_the_base_may_move_but_not_change(bases, tmp_path):
    path, base = tmp_path / "router.safetensors", tmp_path / "moved.gguf"
    save_router(path, PARAMS, bases[1], SETTINGS)
    base.write_bytes(bases[1].read_bytes())
    load_router(path, base)
    changed = bytearray(base.read_bytes())
    changed[-1] ^= 1
    base.write_bytes(changed)
    with pytest.raises(ValueError, match="is another model"):
        load_router(path, base)


def test_a_damaged_file_is_refused(bases, tmp_path):
    path, base = tmp_path / "router.safetensors", bases[1]
    save_router(path, PARAMS, base, SETTINGS)
    whole = path.read_bytes()
    changed = whole.replace(b"streaming", b"streamer!")
    for damaged in (b"", whole[:5], whole[:100], whole[:-1], whole[:-1] + b"\x01", changed):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"^{path} is (no whole router file|damaged): .*\.$"):
            load_router(path, base)


def test_what_is_no_router_is_refused(bases, tmp_path):
    path = tmp_path / "other.safetensors"
    with pytest.raises(ValueError, match=rf"^{path} is no whole router file: No such file"):
        load_router(path, bases[1])
    save_file({"a": np.ones(2)}, path)
    with pytest.raises(ValueError, match=rf"^{path} is no router file: its format is None\.$"):
        load_router(path, bases[1])


def test_a_failure_leaves_what_stood_there(bases, tmp_path):
    path = tmp_path / "router.safetensors"
    save_router(path, PARAMS, bases[1], SETTINGS)
    before = path.read_bytes()
    with pytest.raises(FileNotFoundError, match=re.escape("nowhere.gguf")):
        save_router(path, PARAMS, tmp_path / "nowhere.gguf", SETTINGS)
    with pytest.raises(TypeError):
        save_router(path, PARAMS, bases[1], {"not JSON": {1, 2}})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["router.safetensors"]
