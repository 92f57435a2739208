import dataclasses

import pytest

from routing_jax.evals.scheme_plots import plot_layer_use, plot_quality
from routing_jax.evals.scheme_tables import moas_table, quality_table, with_error

DETAILS = {
    "kv_bytes_stored": 6144,
    "kv_bytes_dense": 102_400.0,
    "elsewhere": {"whales": {"loss": 3.5, "kv_cost": 0.25}},
}
USE = {
    "schemes": ["mha", "mqa"],
    "share": [[0.25, 0.75], [0.5, 0.5]],
    "entropy": [0.3, 0.5],
    "by_class": {"letter": [[0.1, 0.9], [0.3, 0.7]]},
}


@pytest.fixture
def results(make_result):
    def make(variant, seed, loss, kv_cost, **details):
        return make_result(
            experiment="moas", task="steps-500", variant=variant, seed=seed, loss=loss,
            kv_cost=kv_cost, details=DETAILS | details,
        )  # fmt: skip

    dense = [make("mha+matched", seed, loss, 1.0) for seed, loss in enumerate((2.1, 2.3))]
    soft = [make("soft", seed, loss, 0.5, **USE) for seed, loss in enumerate((2.0, 2.4))]
    return soft + dense


def row(table, variant):
    return [cell.strip() for line in table.splitlines() if f" {variant} " in line
            for cell in line.strip("|").split("|")]  # fmt: skip


def test_quality_stands_beside_what_is_read(results):
    table = quality_table(results)
    soft, dense = row(table, "soft"), row(table, "mha+matched")
    assert soft[2:6] == ["2.2000 ± 0.2000", "0.0000 ± 0.1000", "0.500", "50.0"]
    assert dense[2:6] == ["2.2000 ± 0.1000", "–", "1.00", "100"]
    assert soft[6] == "6.00"
    assert soft[-2:] == ["2.201 ± 0.006", "2.3074"]
    assert table.index("mha+matched") < table.index("soft")


def test_use_and_other_texts_have_tables_where_there_is_something_to_tell(results, make_result):
    text = moas_table(results)
    assert "25/75, 50/50" in text
    assert "20/80" in text
    assert "3.5000 ± 0.0000" in text
    bare = moas_table([make_result(experiment="moas", task="steps-500", variant="mha")])
    assert "entropy" not in bare
    assert bare.count("|:--") > 0
    with pytest.raises(ValueError, match="results is empty"):
        moas_table([])


def test_one_seed_has_no_error():
    assert with_error([2.0]) == "2.0000"


def test_quality_is_drawn(results, tmp_path):
    figure = plot_quality(results, tmp_path / "quality.png")
    assert figure.axes[0].get_title() == "steps-500"
    assert (tmp_path / "quality.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="results is empty"):
        plot_quality([], tmp_path / "quality.png")


def test_use_is_drawn_layer_by_layer(results, tmp_path):
    rows = [{"step": step, "usage_per_layer": [0.25, 1 / step]} for step in (1, 2, 4)]
    run = dataclasses.replace(results[0], details=results[0].details | {"history": rows})
    figure = plot_layer_use([run], tmp_path / "use.png")
    drawn = [line.get_ydata().tolist() for line in figure.axes[0].lines]
    assert drawn == [[25.0, 25.0, 25.0], [100.0, 50.0, 25.0]]
    assert (tmp_path / "use.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="results is empty"):
        plot_layer_use([], tmp_path / "use.png")
