"""Sharding: specs by name, meshes that don't fit, and the same numbers on 1 and on 8 devices."""

import json
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from jax.tree_util import DictKey, GetAttrKey

from routing_jax.models import DecoderConfig, init_params
from routing_jax.sharding import (
    ShardingRules,
    batch_sharding,
    make_mesh,
    parameter_spec,
    put_batch,
    tree_shardings,
)

from .processes import finish, start_python

# Only the axis sizes are read, so that specs can be tested without the devices.
MESH = SimpleNamespace(shape={"data": 2, "fsdp": 2, "tensor": 4})
MODEL = DecoderConfig(
    vocab_size=24,
    width=16,
    layers="(routed,full)*2",
    num_heads=8,
    num_kv_heads=4,
    head_dim=8,
    qkv_bias=True,
    qk_norm=True,
)


def spec_of(name, shape, mesh=MESH):
    path = (GetAttrKey("params"), *(DictKey(part) for part in name.split("/")))
    return parameter_spec(path, shape, mesh, ShardingRules())


BLOCK = {
    "mixer/query": P("fsdp", "tensor", None),
    "mixer/key": P("fsdp", "tensor", None),
    "mixer/value": P("fsdp", "tensor", None),
    "mixer/query_bias": P("tensor", None),
    "mixer/key_bias": P("tensor", None),
    "mixer/value_bias": P("tensor", None),
    "mixer/query_norm": P(),
    "mixer/key_norm": P(),
    "mixer/out": P("tensor", None, "fsdp"),
    "mixer/conv": P(),
    "mixer/router/hidden": P(),
    "mixer/router/out": P(),
    "mixer/router/bias": P(),
    "mixer_norm/scale": P(),
    "mlp_norm/scale": P(),
    "mlp/gate": P("fsdp", "tensor"),
    "mlp/up": P("fsdp", "tensor"),
    "mlp/down": P("tensor", "fsdp"),
}


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_every_parameter_of_the_model_has_the_spec_of_its_name(scan):
    config = MODEL.replace(scan=scan)
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    seen = set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        name = "/".join(key.key for key in path)
        within = re.sub(r"^layers(_\d+)?/block_\d+/", "", name)
        want = {"embedding": P("tensor", "fsdp"), "head": P("fsdp", "tensor")}.get(name)
        if want is None:
            want = BLOCK.get(within, P())
        if scan and name.startswith("layers/") and want != P():
            want = P(None, *want)
        assert parameter_spec(path, leaf.shape, MESH, ShardingRules()) == want, name
        seen.add(within)
    assert seen == {*BLOCK, "embedding", "head", "final_norm/scale"}


@pytest.mark.parametrize(
    ("name", "shape", "want"),
    [
        ("embedding", (129, 16), P(None, "fsdp")),
        ("head", (15, 128), P(None, "tensor")),
        ("layers_0/block_0/mixer/key", (16, 1, 8), P("fsdp", None, None)),
        ("layers/block_0/mixer/key", (3, 16, 2, 8), P(None, "fsdp", None, None)),
        ("layers/block_0/mlp/gate", (3, 15, 13), P(None, None, None)),
        ("layers/block_0/mlp/gate", (2, 3, 16, 16), P()),
    ],
)
def test_a_dimension_that_does_not_divide_stays_whole(name, shape, want):
    assert spec_of(name, shape) == want


def test_optimizer_moments_live_where_their_parameter_does():
    for parent in ("mu", "nu"):
        path = (GetAttrKey(parent), DictKey("layers_0"), DictKey("mlp"), DictKey("up"))
        assert parameter_spec(path, (16, 16), MESH, ShardingRules()) == P("fsdp", "tensor")
    # Keys of the same name elsewhere are not parameters.
    assert parameter_spec((GetAttrKey("key"),), (2,), MESH, ShardingRules()) == P()


def test_rules_can_keep_a_dimension_whole():
    path = (DictKey("mlp"), DictKey("up"))
    assert parameter_spec(path, (16, 16), MESH, ShardingRules(width=None)) == P(None, "tensor")


def test_one_device_holds_everything():
    mesh = make_mesh()
    assert dict(mesh.shape) == {"data": jax.device_count(), "fsdp": 1, "tensor": 1}
    tree = {"embedding": jnp.ones((4, 4)), "count": jnp.zeros(())}
    placed = jax.device_put(tree, tree_shardings(tree, mesh))
    np.testing.assert_array_equal(placed["embedding"], tree["embedding"])
    batch = put_batch({"tokens": np.arange(6).reshape(2, 3)}, mesh)
    np.testing.assert_array_equal(batch["tokens"], np.arange(6).reshape(2, 3))


@pytest.mark.parametrize(
    "sizes",
    [
        {"data": 3},
        {"data": 2, "fsdp": 2, "tensor": 2},
        {"fsdp": 5},
        {"data": 0},
        {"fsdp": 0},
        {"data": -2, "fsdp": -1},
        {"data": -2, "tensor": -2},
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_in_one_sentence(sizes):
    with pytest.raises(ValueError, match=r"^mesh is data=.*must multiply to the 1 device") as e:
        make_mesh(**sizes)
    assert str(e.value).count(". ") == 0
    for name, size in sizes.items():
        assert f"{name}={size}" in str(e.value)


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"^a batch of 6 sequences .* = 4 devices; change .*\.$"):
        batch_sharding(MESH, 6)


ON_EIGHT = """
import json
import jax, numpy as np
from routing_jax.models import Decoder, DecoderConfig
from routing_jax.routers import TokenRouterConfig
from routing_jax.sharding import make_mesh, put_batch, tree_shardings
from routing_jax.train.config import TrainConfig
from routing_jax.train.data import RecallConfig, batches
from routing_jax.train.step import init_state, make_train_step

assert jax.device_count() == 8
model = DecoderConfig(width=16, layers="routed,conv", num_heads=4, num_kv_heads=2, head_dim=4,
    mlp_width=16, qkv_bias=True, qk_norm=True, dtype="float32", scan=True,
    router=TokenRouterConfig(hidden=4, bias=0.0, summary=2))
config = TrainConfig(
    data=RecallConfig(length=64, num_values=4), model=model, batch_tokens=512)
config = config.replace(curriculum__from_start=True, curriculum__peak=1.0)
config = config.replace(optimizer__warmup_steps=1, optimizer__learning_rate=1e-2)
start = jax.device_get(jax.jit(lambda: init_state(config))())
stream = batches(config.data, split="train", seed=0, batch_size=8)
steps = [next(stream) for _ in range(3)]
one = jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"), devices=jax.devices()[:1],
    axis_types=(jax.sharding.AxisType.Auto,) * 3)
meshes = {"one device": one, "data=8": make_mesh(),
    "data=2 fsdp=2 tensor=2": make_mesh(2, 2, 2)}
out = {}


def routed(params, bias, spread):
    def put(path, leaf):
        names = [key.key for key in path]
        if names[-1] == "bias":
            return np.full_like(leaf, bias)
        return leaf * spread if "router" in names else leaf
    return jax.tree_util.tree_map_with_path(put, params)


for name, mesh in meshes.items():
    with jax.set_mesh(mesh):
        shardings = tree_shardings(start, mesh)
        state = jax.device_put(start, shardings)
        fn = jax.jit(make_train_step(config), donate_argnums=0, out_shardings=(shardings, None))
        losses = []
        for batch in steps:
            state, metrics = fn(state, put_batch(batch, mesh))
            losses.append({k: float(metrics[k]) for k in ("loss", "usage", "gradient_norm")})
        kept = jax.tree.leaves(jax.tree.map(lambda a, s: a.sharding == s, state.params,
            shardings.params))
        split = sum(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state.params))
        out[name] = {"losses": losses, "kept": all(kept), "split": split,
            "compiled": fn._cache_size()}
        if name == "data=8":
            continue  # the third layout splits the batch too
        run, evals = None, []
        for bias, spread in ((-100.0, 1.0), *((-b, 60.0) for b in range(5, 15)), (100.0, 1.0)):
            params = jax.device_put(routed(start.params, bias, spread), shardings.params)
            tokens = put_batch(steps[0].tokens, mesh)
            if run is None:
                run = jax.jit(lambda p, t: (lambda o: (o.logits, o.reports))(
                    Decoder(config.model).apply({"params": p}, t, mode="eval")))
                run = run.lower(params, tokens).compile()
            logits, reports = jax.device_get(run(params, tokens))
            evals.append({"logits": logits[:, ::7].tolist(), "usage": reports.usage.tolist(),
                "counts": reports.choice[0].sum(axis=1).tolist()})
        out[name] |= {"evals": evals, "conditionals": run.as_text().count(" conditional(")}
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def on_eight():
    """What three layouts of the same run gave, from a process with 8 simulated devices."""
    ((out, _),) = finish(start_python(ON_EIGHT, devices=8))
    return json.loads(out)


LAYOUTS = ["data=8", "data=2 fsdp=2 tensor=2"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_gives_the_same_losses(on_eight, layout):
    for got, want in zip(on_eight[layout]["losses"], on_eight["one device"]["losses"], strict=True):
        for name, value in want.items():
            assert got[name] == pytest.approx(value, rel=2e-4), name
    losses = [step["loss"] for step in on_eight[layout]["losses"]]
    assert len(set(losses)) == 3


def test_parameters_are_split_and_stay_where_they_were_put(on_eight):
    assert all(layout["kept"] and layout["compiled"] == 1 for layout in on_eight.values())
    assert on_eight["one device"]["split"] == on_eight["data=8"]["split"] == 0
    assert on_eight["data=2 fsdp=2 tensor=2"]["split"] >= 7


def test_skipping_on_shards_equals_one_device(on_eight):
    sharded, alone = on_eight["data=2 fsdp=2 tensor=2"], on_eight["one device"]
    counts = []
    for got, want in zip(sharded["evals"], alone["evals"], strict=True):
        np.testing.assert_allclose(got["logits"], want["logits"], rtol=1e-3, atol=1e-4)
        assert got["counts"] == want["counts"]
        np.testing.assert_allclose(got["usage"], want["usage"], rtol=1e-6)
        counts.append(want["counts"])
    assert max(counts[0]) == 0
    assert min(counts[-1]) == 64
    # Each device holds two rows; at some usage their fullest ones call for different branches.
    fullest = np.reshape(counts, (-1, 4, 2)).max(axis=2)
    assert any(len(set(branches)) > 1 for branches in np.searchsorted([0, 8, 12, 16], fullest))
    # The choice of a branch is left to each device, not made a select by the partitioner.
    assert sharded["conditionals"] == alone["conditionals"] == 1
