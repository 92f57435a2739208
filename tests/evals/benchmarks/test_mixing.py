"""The mixing benchmark times the right work on the right tokens, and loses no row."""

import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from routing_jax.attention import FullAttention, HeadsConfig, RoutedConv
from routing_jax.evals.benchmarks import mixing, timing
from routing_jax.evals.benchmarks.mixing_cases import Case, cases
from routing_jax.evals.benchmarks.mixing_inputs import choose_tokens, tokens_input, weights
from routing_jax.routers import TokenRouter, TokenRouterConfig

LENGTH = 64
CONFIG = mixing.MixingBenchConfig(
    lengths=(LENGTH, 32),
    usages=(0.0, 0.05, 0.25, 0.5, 1.0),
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    width=32,
    dtype="float32",
    repeats=2,
    chain=2,
    target_ms=0.01,
    cache_bytes=0,
)
HEADS = HeadsConfig(4, 2, 8)
ROUTER = TokenRouterConfig(hidden=CONFIG.router_hidden)
FIELDS = {
    "part",
    "length",
    "usage",
    "tokens",
    "implementation",
    "milliseconds",
    "spread",
    "dense_milliseconds",
    "dense_spread",
    "speedup",
}


@functools.cache
def ran(part: mixing.Part) -> list[tuple[Case, dict[str, Any], dict[str, Any]]]:
    """Each case of a part with its input, and its state after the very program that is timed."""
    programs: dict[str, Any] = {}
    found = []
    for case in cases(CONFIG, part, LENGTH):
        run = programs.setdefault(case.name, timing.chained(case.step, 2))
        before = jax.tree.map(np.asarray, case.state(3))
        found.append((case, before, jax.tree.map(np.asarray, run([case.state(3)])[0])))
    return found


def masked_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Causal attention of [T,N,H] to [T,K,H] in float64, masked and dense."""
    group = q.shape[1] // k.shape[1]
    k, v = (np.repeat(a.astype(np.float64), group, axis=1) for a in (k, v))
    scores = np.einsum("tnh,snh->nts", q, k) / q.shape[2] ** 0.5
    scores[:, ~np.tri(len(q), dtype=bool)] = -np.inf
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("nts,snh->tnh", scores / scores.sum(-1, keepdims=True), v)


def shifted_sum(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Causal depthwise convolution of [T,D] by [W,D]."""
    out = np.zeros_like(x)
    for tap, row in enumerate(kernel[::-1]):
        out[tap:] += x[: len(x) - tap] * row
    return out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_router_chooses_exactly_the_wanted_tokens(dtype: str) -> None:
    config = dataclasses.replace(CONFIG, dtype=dtype)
    params, router = {"params": weights(config)["router"]}, TokenRouter(ROUTER)
    route = jax.jit(lambda x: router.apply(params, x, jnp.arange(LENGTH)[None]).routing)
    for tokens in (0, 1, 9, LENGTH):
        wanted = choose_tokens(LENGTH, tokens, seed=tokens)
        assert wanted.sum() == tokens
        routing = route(tokens_input(config, wanted, seed=7))
        np.testing.assert_array_equal(routing.choice[0], wanted)
        assert np.abs(routing.logits).min() > 2  # far from any rounding


def test_timed_mixing_is_the_masked_computation_at_exact_usage() -> None:
    (dense, before, after), *routed = ran("mixing")
    assert dense.usage is None
    attended = masked_attention(*(before[name][0] for name in "qkv"))
    np.testing.assert_allclose(after["y"][0], attended, atol=1e-5)
    assert [case.tokens for case, _, _ in routed] == [0, 3, 16, 32, LENGTH]
    for case, before, after in routed:
        chosen = choose_tokens(LENGTH, case.tokens, seed=3)[:, None]
        conv = shifted_sum(before["x"][0], before["conv"])
        mixed = np.where(chosen, attended.reshape(LENGTH, -1), conv)
        np.testing.assert_allclose(after["y"][0], mixed, atol=1e-5)
        assert (np.abs(after["y"][0] - conv).max(-1) > 1e-4).sum() == case.tokens


def test_timed_layer_is_the_masked_layer() -> None:
    mixers = {"dense": FullAttention(HEADS), "routed": RoutedConv(HEADS, ROUTER, CONFIG.conv_width)}
    positions = jnp.arange(LENGTH)[None]
    masked = {
        name: jax.jit(functools.partial(mixer.apply, positions=positions, mode="masked"))
        for name, mixer in mixers.items()
    }
    for case, before, after in ran("layer"):
        expected, _, report = masked[case.name]({"params": before["params"]}, before["x"])
        np.testing.assert_allclose(after["y"], expected, atol=1e-5)
        assert round(float(report.usage) * LENGTH) == case.tokens
        if case.tokens == 0:
            conv = shifted_sum(before["x"][0], before["params"]["conv"])
            np.testing.assert_allclose(after["y"][0], conv, atol=1e-5)


def test_decode_attends_only_when_routed() -> None:
    (_, before, dense), (_, quiet, unrouted), (_, loud, routed) = ran("decode")
    assert np.isfinite(dense["y"]).all()
    np.testing.assert_array_equal(dense["cache"].keys[:, :-1], before["cache"].keys[:, :-1])

    # The same token, weights and keys: a routed step is dense attention's.
    np.testing.assert_array_equal(loud["x"], before["x"])
    np.testing.assert_allclose(routed["y"], dense["y"], atol=1e-6)

    # Not routed: the convolution, whose last inputs are twice this token after two steps.
    past = np.concatenate([quiet["cache"].history[0, 1:], quiet["x"][0], quiet["x"][0]])
    expected = (past * quiet["params"]["conv"]).sum(0)
    np.testing.assert_allclose(unrouted["y"][0, 0], expected, atol=1e-5)


def test_projections_are_those_of_the_first_tokens() -> None:
    (_, _, whole), *routed = ran("projections")
    assert np.isfinite(whole["y"]).all()
    for case, _, after in routed:
        np.testing.assert_allclose(after["k"], whole["k"], atol=1e-5)
        np.testing.assert_allclose(after["v"], whole["v"], atol=1e-5)
        if case.tokens == 0:
            assert "q" not in after
            continue
        capacity = after["q"].shape[1]
        assert case.tokens <= capacity <= LENGTH
        for name in "qy":
            np.testing.assert_allclose(after[name], whole[name][:, :capacity], atol=1e-5)


@pytest.mark.parametrize(("count", "calls", "each"), [(1, 3, 3), (2, 3, 2), (3, 3, 1)])
def test_every_chained_call_runs(count: int, calls: int, each: int) -> None:
    """Even of a pure step whose input never changes: hoisting it would time a fraction."""
    seen = []

    def step(state: timing.State) -> timing.State:
        shape = jax.ShapeDtypeStruct((), jnp.float32)

        def note(x: np.ndarray) -> np.ndarray:
            seen.append(float(x))
            return np.float32(2 * x)

        return state | {"y": jax.pure_callback(note, shape, state["x"])}

    sets = [{"x": jnp.float32(i), "y": jnp.float32(0)} for i in range(count)]
    after = jax.block_until_ready(timing.chained(step, calls)(sets))
    assert seen == list(range(count)) * each
    assert [float(state["y"]) for state in after] == [2.0 * i for i in range(count)]


def test_a_call_is_timed_from_its_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock where each run of 4 calls takes 8 ms, but the first 900: a call takes 2 ms."""
    now, runs = [0.0], []

    def run(sets: list[timing.State]) -> list[timing.State]:
        now[0] += 0.008 if runs else 0.9
        runs.append(sets)
        return sets

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    found, _ = timing.time_program(run, [{}], calls=4, repeats=5, target_ms=24)
    assert found == pytest.approx((2.0, 0.0))
    assert len(runs) == 1 + 1 + 5 * 3  # warm-up, probe, repeats of about 24 ms


def test_sets_outgrow_the_cache() -> None:
    case = cases(CONFIG, "mixing", LENGTH)[0]
    size = 4 * LENGTH * (4 + 2 + 2) * 8  # q, k, v
    for cache, sets in ((0, 1), (size - 1, 1), (size, 2), (3 * size, 4)):
        config = dataclasses.replace(CONFIG, cache_bytes=cache)
        assert mixing._count_sets(config, case) == sets


def test_rows_are_complete(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "made" / "mixing.json"
    config = dataclasses.replace(CONFIG, lengths=(16, 8), usages=(0.05, 1.0), cache_bytes=5000)
    returned = mixing.main(config, out)
    result = json.loads(out.read_text())
    assert result == json.loads(json.dumps(returned))
    assert [path.name for path in out.parent.iterdir()] == ["mixing.json"]
    assert set(result) >= {"device", "versions", "driver", "date", "config", "seconds", "rows"}
    assert result["config"]["lengths"] == [16, 8]

    rows = result["rows"]
    usages = {part: [0.0, 1.0] if part == "decode" else [0.05, 1.0] for part in config.parts}
    assert [(row["part"], row["length"], row["usage"]) for row in rows] == [
        (part, length, usage)
        for part in config.parts
        for length in config.lengths
        for usage in usages[part]
    ]
    for row in rows:
        assert set(row) == FIELDS
        assert row["milliseconds"] > 0
        assert row["dense_milliseconds"] > 0
        assert min(row["spread"], row["dense_spread"]) >= 0
        assert row["speedup"] == pytest.approx(row["dense_milliseconds"] / row["milliseconds"])
    assert mixing.table(rows) in capsys.readouterr().out


def test_a_failure_costs_only_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    real = mixing.cases

    def broken(config: mixing.MixingBenchConfig, part: mixing.Part, length: int) -> list[Case]:
        def refuse(state: timing.State) -> timing.State:
            raise MemoryError("too\nbig")

        found = real(config, part, length)
        return [c._replace(step=refuse) if length == 8 and c.usage else c for c in found]

    monkeypatch.setattr(mixing, "cases", broken)
    config = dataclasses.replace(CONFIG, parts=("mixing",), lengths=(16, 8), usages=(1.0,))
    good, bad = mixing.run(config)["rows"]
    assert "error" not in good
    assert bad["error"] == "routed: MemoryError: too big"
    assert (bad["milliseconds"], bad["spread"], bad["speedup"]) == (None, None, None)
    assert bad["dense_milliseconds"] > 0
    assert "failed" in mixing.table([good, bad])
    assert json.dumps(bad, allow_nan=False)


def test_what_is_not_begun_in_time_is_skipped() -> None:
    config = dataclasses.replace(CONFIG, seconds=1e-9)
    rows = mixing.run(config)["rows"]
    assert len(rows) == 2 * (3 * len(CONFIG.usages) + 2)
    assert all("skipped" in row["error"] and row["milliseconds"] is None for row in rows)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("parts", ("mixer",)),
        ("lengths", ()),
        ("lengths", (2,)),
        ("usages", (1.5,)),
        ("num_kv_heads", 3),
        ("width", 64),
        ("dtype", "float16"),
        ("repeats", 0),
    ],
)
def test_bad_fields_are_named(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{field} "):
        dataclasses.replace(CONFIG, **{field: value})
