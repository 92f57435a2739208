import dataclasses
import json

import pytest

from routing_jax.evals.report import benchmark_caption, readme_blocks, report
from routing_jax.evals.results import result_path, write_result

BENCH = {
    "device": "a device",
    "driver": "1.2",
    "versions": {"jax": "0.0"},
    "date": "2026-01-02T03:04:05+00:00",
    "attention": "xla",
    "config": {
        "dtype": "float32", "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "width": 32,
        "repeats": 3,
    },
    "rows": [
        {"part": "mixing", "length": 64, "usage": usage, "implementation": "compaction",
         "milliseconds": 1 + usage, "dense_milliseconds": 4.0, "speedup": 4 / (1 + usage)}
        for usage in (0.0, 0.1, 1.0)
    ],
}  # fmt: skip


ATTENTION = BENCH | {
    "ptxas": "13.0",
    "dense": "cudnn",
    "flex": None,
    "rows": [
        {"part": "forward", "variant": None, "batch": 1, "length": 8, "queries": 8, "block": 2,
         "blocks": blocks, "head_dim": 4, "num_heads": 2, "num_kv_heads": 1, "listed": 4,
         "density": 1.0, "peer": "block_sparse", "milliseconds": 2.0, "spread": 0.1, "rate": 600.0,
         "unit": "TFLOP/s", "ratio": {"dense": 1.5}}
        for blocks in (0, 2)
    ],
}  # fmt: skip


@pytest.fixture
def results(tmp_path, make_result):
    for seed in (0, 1):
        result = dataclasses.replace(
            make_result(), experiment="routed-attention", variant="routed", seed=seed
        )
        path = result_path(tmp_path, "routed-attention", result.task, "routed", seed)
        write_result(result, path)
    (tmp_path / "mixing").mkdir()
    (tmp_path / "mixing" / "box.json").write_text(json.dumps(BENCH))
    return tmp_path


def test_a_block_for_each_kind_of_result(results):
    blocks = readme_blocks(results)
    assert sorted(blocks) == ["mixing-box", "routed-attention"]
    assert "4×" in blocks["mixing-box"]
    assert "a device, driver 1.2" in blocks["mixing-box"]


def test_the_attention_benchmark_has_a_block_and_a_plot(tmp_path):
    (tmp_path / "attention").mkdir()
    (tmp_path / "attention" / "box.json").write_text(json.dumps(ATTENTION))
    block = readme_blocks(tmp_path)["attention-box"]
    assert "| 8 | 2/1 | 4 | 2 × 2 | 2 (600) | 1.5 |" in block
    assert "a device, driver 1.2, ptxas 13.0, float32; dense by cudnn. " in block
    report(tmp_path, None)
    assert (tmp_path / "attention" / "box.png").stat().st_size > 1000


def test_no_results_no_blocks(tmp_path):
    assert readme_blocks(tmp_path) == {}


def test_caption_takes_everything_from_the_file():
    caption = benchmark_caption(BENCH | {"driver": None})
    assert "driver" not in caption
    for said in ("float32", "4 query and 2 key/value heads of 8", "2026-01-02", "jax 0.0"):
        assert said in caption


def test_report_draws_and_updates_the_readme_in_place(results):
    readme = results / "README.md"
    readme.write_text(
        "before\n<!-- table: routed-attention -->\nold\n<!-- end: routed-attention -->\n"
        "<!-- table: mixing-box -->\n<!-- end: mixing-box -->\nafter\n"
    )
    report(results, readme)
    text = readme.read_text()
    assert "old" not in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert (results / "mixing" / "box.png").stat().st_size > 1000
    assert (results / "routed-attention" / "tradeoff.png").stat().st_size > 1000
    report(results, readme)
    assert readme.read_text() == text


def test_a_readme_without_the_block_is_refused_and_left(results):
    readme = results / "README.md"
    readme.write_text("nothing here\n")
    with pytest.raises(ValueError, match=r"routed-attention|mixing-box"):
        report(results, readme)
    assert readme.read_text() == "nothing here\n"
