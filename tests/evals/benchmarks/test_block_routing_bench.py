"""The block-routing benchmark times what layers and models compute, and lowers for an H100."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from routing_jax.attention import BlockRouted, HeadsConfig
from routing_jax.cli import main as command
from routing_jax.evals.benchmarks import block_routing
from routing_jax.evals.benchmarks.block_routing_cases import cases, counted, dense_model
from routing_jax.evals.benchmarks.block_routing_config import BlockRoutingBenchConfig
from routing_jax.evals.benchmarks.block_routing_report import plot, table
from routing_jax.evals.report import BLOCK_ROUTING_SPEED, readme_blocks
from routing_jax.models import Decoder, DecoderConfig
from routing_jax.routers import BlockRouterConfig

from ...kernels.cuda_lowering import lower_for_cuda

pytestmark = pytest.mark.usefixtures("compile_cache")

ROUTER = BlockRouterConfig(block_q=8, block_kv=16, width=4)
CONFIG = BlockRoutingBenchConfig(
    lengths=(128,),
    fractions=(0.5,),
    listed=3,
    router=ROUTER,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    width=12,
    model=DecoderConfig(
        width=8, layers="conv,block", head_dim=8, mlp_width=0, dtype="float32", vocab_size=16
    ),
    dtype="float32",
    repeats=1,
    chain=1,
    target_ms=0.01,
)


def ran(part, passing):
    """Case, its input and its state after the step, by router and budget."""
    return [
        (case, case.program.state(3), jax.jit(case.program.step)(case.program.state(3)))
        for case in cases(CONFIG, part, passing, 128)
    ]


def test_attention_alone_is_the_layers_without_its_projections():
    """With projections that only cut and join heads, the layer computes what the part times."""
    config = dataclasses.replace(CONFIG, width=16, num_kv_heads=2)
    eye = jnp.eye(16).reshape(16, 2, 8)
    params = {"query": eye, "key": eye, "value": eye, "out": eye.transpose(1, 2, 0)}
    _, case = cases(config, "attention", "training", 128)
    state = case.program.state(3)
    x = state["x"]
    state |= dict.fromkeys("qkv", x.reshape(1, 128, 2, 8))
    after = jax.jit(case.program.step)(state)
    router = dataclasses.replace(ROUTER, fraction=0.5)
    mixer = BlockRouted(HeadsConfig(2, 2, 8, rope_theta=0.0), router)

    def layer(x):
        y = mixer.apply({"params": params | {"router": state["router"]}}, x, jnp.arange(128)[None])
        return (y[0] * state["dy"].reshape(x.shape)).sum(), y

    (_, (y, _, report)), dx = jax.jit(jax.value_and_grad(layer, has_aux=True))(x)
    np.testing.assert_allclose(after["y"].reshape(x.shape), y, rtol=1e-4, atol=1e-5)
    parts = sum(after[f"d{name}"].reshape(x.shape) for name in "qkvx")
    np.testing.assert_allclose(parts, dx, rtol=1e-3, atol=1e-4)
    assert case.counts.cost == pytest.approx(float(report.cost), rel=1e-5)
    assert case.counts.cost - case.counts.router == pytest.approx(float(report.usage), rel=1e-5)


@pytest.mark.parametrize("part", ["attention", pytest.param("layer", marks=pytest.mark.slow)])
def test_training_gives_every_input_a_gradient(part):
    for case, before, after in ran(part, "training"):
        names = {name[1:] for name in after if name.startswith("d") and name != "dy"}
        assert names == set(before) - {"dy", "y"} - {n for n in before if n.startswith("d")}
        for leaf in jax.tree.leaves([after[f"d{name}"] for name in names]):
            assert np.all(np.isfinite(leaf)), case.router
            assert np.abs(leaf).max() > 0, case.router


@pytest.mark.slow
def test_a_step_of_the_model_changes_its_parameters():
    for _, before, after in ran("model", "training"):
        assert np.isfinite(after["y"])
        changed = [np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (before, after)))]
        assert sum(changed) > len(jax.tree.leaves(before["params"])) // 2


@pytest.mark.slow
def test_prefill_of_the_model_reads_its_last_token():
    models = (
        dense_model(CONFIG.model),
        CONFIG.model.replace(blocks=dataclasses.replace(ROUTER, fraction=0.5)),
    )
    for model, (_, before, after) in zip(models, ran("model", "forward"), strict=True):
        run = jax.jit(lambda p, t, model=model: Decoder(model).apply({"params": p}, t).logits)
        want = run(before["params"], before["tokens"])[:, -1]
        np.testing.assert_allclose(after["y"], want, rtol=1e-3, atol=1e-4)
        assert int(after["cache"].lengths[0]) == 128


def test_a_router_lists_what_its_budget_counts():
    dense, *routed = ran("router", "forward")
    assert dense[0].router is None
    for case, _, after in routed:
        seen = 2 * np.arange(1, 9).sum()  # two tiles a block
        share = case.counts.cost - case.counts.router
        listed = float(after["y"][0].counts.mean(axis=1).sum()) / seen
        assert listed == pytest.approx(share) or (case.router == "clusters" and listed < share)
    assert cases(CONFIG, "router", "training", 128) == []


def test_routing_by_tree_outgrows_routing_by_one_level_no_more():
    """Of a fixed number of blocks: scores by T log T beside scores by T²."""
    flat = BlockRouterConfig(budget="blocks", blocks=16, kind="pooled")
    heads, work = HeadsConfig(4, 4, 64), {}
    for name, router in (("flat", flat), ("tree", dataclasses.replace(flat, fanout=4))):
        dense = [64**2 * n * (n + 1) / 2 for n in (64, 1024, 16384)]
        shares = [counted(router, 64 * n, heads, 256).router for n in (64, 1024, 16384)]
        work[name] = np.multiply(shares, dense)
    growth = {name: w[2] / w[1] for name, w in work.items()}
    assert growth["flat"] > 8 * growth["tree"]
    assert growth["tree"] < 2 * 16


def test_rows_are_complete_and_render(tmp_path, capsys):
    out = tmp_path / BLOCK_ROUTING_SPEED / "box.json"
    returned = block_routing.main(dataclasses.replace(CONFIG, passes=("forward",)), out)
    rows = json.loads(out.read_text())["rows"]
    assert rows == json.loads(json.dumps(returned))["rows"]
    assert [row["part"] for row in rows] == ["attention", "layer"] + ["router"] * 5 + ["model"]
    for row in rows:
        assert row["milliseconds"] > 0
        assert row["speedup"] == pytest.approx(row["dense_milliseconds"] / row["milliseconds"])
        assert 0 < row["router_cost"] < row["cost"]
    assert table(rows) in capsys.readouterr().out
    assert out.with_suffix(".png").stat().st_size > 1000
    text = readme_blocks(tmp_path)["block-routing-speed-box"]
    assert text.startswith(table(rows))
    assert "2 query and 1 key/value heads of 8, width 12; model: conv,block" in text


def test_what_fails_or_comes_late_costs_only_its_rows(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise MemoryError("too\nbig")

    config = dataclasses.replace(CONFIG, parts=("layer",), passes=("forward",))
    monkeypatch.setattr("routing_jax.attention.block_routed.BlockRouter.apply", refuse)
    monkeypatch.setattr(BlockRouted, "_whole", refuse)
    (row,) = block_routing.run(config)["rows"]
    assert row["error"] == "routed: MemoryError: too big"
    assert row["dense_milliseconds"] > 0
    assert table([row]) == ""
    assert plot([row], tmp_path / "none.png") is None
    (late,) = block_routing.run(dataclasses.replace(config, seconds=1e-9))["rows"]
    assert "skipped" in late["error"]


@pytest.mark.parametrize("part", ["layer", pytest.param("model", marks=pytest.mark.slow)])
def test_training_lowers_for_an_h100_with_its_kernels(part, monkeypatch):
    """As the default asks for it, but short; naming the kernel, which a CPU would not choose."""
    router = BlockRouterConfig(block_q=128, block_kv=128, implementation="mosaic_gpu")
    config = BlockRoutingBenchConfig(router=router, fractions=(0.25,))
    config = dataclasses.replace(config, model=config.model.replace(layers="block"))
    *_, case = cases(config, part, "training", 1024)
    monkeypatch.setattr("routing_jax.kernels.block_sparse.mosaic_gpu.call.hopper_refusal", no)
    text = lower_for_cuda(case.program.step, jax.eval_shape(lambda: case.program.state(0)))
    assert text.count("mosaic_gpu") >= 3  # forward, and two passes backward


def no() -> None:
    """Nothing is refused."""


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"parts": ("all",)}, r"parts holds 'all'; accepted: attention, .*"),
        ({"passes": ()}, r"passes is empty; give at least one"),
        ({"fractions": (0.0,)}, r"fractions holds 0\.0; each must lie in \(0, 1\]"),
        ({"lengths": (8,)}, r"lengths holds 8; each must be at least a block of 16 keys"),
        ({"listed": 1}, r"listed is 1; it must be at least 3, .*"),
        ({"num_kv_heads": 3}, r"num_kv_heads is 3; it must divide num_heads, 2"),
        ({"model": DecoderConfig(layers="full")}, r"model\.layers is 'full'; it must have .*"),
        ({"dtype": "float16"}, r"dtype is 'float16'; accepted: 'bfloat16', 'float32'"),
        ({"repeats": 0}, r"repeats is 0; it must be at least 1"),
    ],
)
def test_a_bad_field_is_named(fields, said):
    with pytest.raises(ValueError, match=rf"^{said}\.$"):
        dataclasses.replace(CONFIG, **fields)


def test_the_command_names_bad_flags(capsys):
    assert command(["bench", "block-routing", "--fractions", "2"]) == 2
    assert "fractions holds 2.0" in capsys.readouterr().err
