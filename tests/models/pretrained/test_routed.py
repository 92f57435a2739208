"""Routers saved for a published model and loaded beside it, run as a loop over layers or not."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from routing_jax.models import Decoder, stack_layers, unstack_layers, with_layer_routing
from routing_jax.models.pretrained import load_pretrained, load_routed, save_router, save_routers
from routing_jax.routers import LayerRouterConfig, SparseModeConfig

from .published import MODELS, random_tensors, write_folder

ROUTER = LayerRouterConfig(pool=4)
SPARSE = SparseModeConfig(sink=8, window=8, block_q=8, block_kv=8)
TOKENS = np.random.default_rng(1).integers(0, 40, (2, 24), dtype=np.int32)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    config = MODELS["smollm2"]
    return write_folder(tmp_path_factory.mktemp("base"), config, random_tensors(config))


def routers(config):
    """Stacked routers whose choice differs from layer to layer."""
    rng = np.random.default_rng(0)
    H, L = config.head_dim, len(config.mixers)
    sizes = [H, 8 * H, 2 * H, 4 * H, H]
    router = {
        f"hidden_{i}": {
            "kernel": rng.normal(size=(L, a, b)).astype(np.float32),
            "bias": np.zeros((L, b), np.float32),
        }
        for i, (a, b) in enumerate(itertools.pairwise(sizes))
    }
    bias = np.array([[0, 2], [0, -2]], np.float32)
    router |= {"scale": np.ones((L, H), np.float32), "shift": np.zeros((L, H), np.float32)}
    router |= {"scores": np.zeros((L, H, 2), np.float32), "bias": bias}
    return {"layers": {"block_0": {"mixer": {"router": router}}}}


def test_both_ways_of_running_the_layers_route_alike(base, tmp_path, compile_cache):
    plain = load_pretrained(base, dtype="float32")
    config = with_layer_routing(plain.config, ROUTER, SPARSE)
    file = tmp_path / "router.safetensors"
    save_routers(file, routers(config), base, config)
    outs = []
    for scan in (True, False):
        loaded, params = load_routed(file, base, dtype="float32", scan=scan)
        assert (loaded.layer_router, loaded.sparse) == (ROUTER, SPARSE)
        outs.append(jax.jit(Decoder(loaded).apply)({"params": params}, TOKENS))
    assert outs[0].reports.choice[:, 0, 0].tolist() == [True, False]
    np.testing.assert_allclose(outs[0].logits, outs[1].logits, rtol=1e-4, atol=1e-5)
    unrolled = load_routed(file, base, dtype="float32", scan=False)
    stacked = stack_layers(unrolled.params, unrolled.config)
    jax.tree.map(
        np.testing.assert_array_equal, stacked, load_routed(file, base, dtype="float32").params
    )


@pytest.mark.parametrize(("part", "size"), [("scale", r"\(8,\)"), ("scores", r"\(8, 2\)")])
def test_routers_of_another_version_are_refused(base, tmp_path, part, size):
    config = with_layer_routing(load_pretrained(base).config, ROUTER, SPARSE)
    old = routers(config)
    del old["layers"]["block_0"]["mixer"]["router"][part]
    save_routers(tmp_path / "r.safetensors", old, base, config)
    said = rf"another version: layers_0/.*/{part} has the shape None; it must be {size}\."
    with pytest.raises(ValueError, match=said):
        load_routed(tmp_path / "r.safetensors", base)


def save_with_search(file, base, taught, directions):
    """As versions saved them that searched by means of keys, and knew learned weights of it."""
    config = with_layer_routing(load_pretrained(base).config, ROUTER, SPARSE)
    old = routers(config)
    if directions:
        old["layers"]["block_0"]["mixer"]["router"]["search"] = np.zeros((2, 2, 8), np.float32)
    sparse = dataclasses.asdict(SPARSE) | {"taught": taught, "means": 8}
    del sparse["channels"]
    parts = {"layer_router": dataclasses.asdict(ROUTER), "sparse": sparse}
    save_router(file, unstack_layers(old, config), base, parts)


@pytest.mark.parametrize(("taught", "directions"), [(64, True), (64, False), (0, True)])
def test_learned_weights_of_a_search_are_refused(base, tmp_path, taught, directions):
    save_with_search(tmp_path / "r.safetensors", base, taught, directions)
    said = r"r\.safetensors was trained with learned weights of a search, which this version has n"
    with pytest.raises(ValueError, match=said):
        load_routed(tmp_path / "r.safetensors", base)


def test_a_file_of_a_search_by_means_without_learned_weights_loads(base, tmp_path):
    save_with_search(tmp_path / "r.safetensors", base, 0, False)
    assert load_routed(tmp_path / "r.safetensors", base).config.sparse == SPARSE


@pytest.mark.parametrize(
    "config", [{}, {"layer_router": {"pool": 4}, "sparse": {"width": 3}}], ids=["none", "other"]
)
def test_a_file_with_another_configuration_is_refused(base, tmp_path, config):
    save_router(tmp_path / "r.safetensors", {"bias": np.zeros(2)}, base, config)
    with pytest.raises(ValueError, match=r"r\.safetensors was written by another version: "):
        load_routed(tmp_path / "r.safetensors", base)
