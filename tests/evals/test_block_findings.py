"""What is said of block routing follows from its results, and nothing is said without seeds."""

import dataclasses

import numpy as np
import pytest

from routing_jax.evals.block_bases import made_again, on_one_base
from routing_jax.evals.block_findings import error_table, routing_findings
from routing_jax.evals.block_plots import plot_budgets, plot_errors, plot_positions
from routing_jax.evals.report import block_routing_text, plot_block_routing


@pytest.fixture
def make_run(make_result):
    """(variant, figure, seed, details) -> a result; the figure is bits per byte, or accuracy."""

    def make(variant, figure, seed=0, details=None, task="block-lm", cost=None):
        text = task == "block-lm"
        budget = variant.rpartition("-")[2]
        dense = float(budget) / 100 if budget.isdigit() else 1.0
        return make_result(
            experiment="block-routing",
            task=task,
            variant=variant,
            seed=seed,
            bits_per_byte=figure if text else None,
            accuracy=0.5 if text else figure,
            accuracy_first_place=None,
            cost=dense if cost is None else cost,
            details=details,
        )

    return make


def seeds(make_run, variant, figures, **other):
    return [make_run(variant, f, seed, **other) for seed, f in enumerate(figures)]


LAST = (
    "- Routers and patterns are chosen by the first seed and compared by the others, where there "
    "are two; the table's means are of all."
)


def test_text_of_another_base_is_read_as_if_from_the_seeds_own(make_run):
    own, other = {"start_loss": 0.8}, {"start_loss": 0.88, "edges": [0, 4], "bits_per_byte": [3.3]}
    runs = [
        make_run("full", 1.0, details=own),
        make_run("full", 1.5, seed=1, details=other),
        make_run("gates-25", 1.01),  # from before it was told
        make_run("indexer-25", 1.1 * 1.02, details=other),
        make_run("indexer-25", 1.6, seed=1, details=other),
        make_run("full", 0.9, details=own, task="block-needle-4096"),
        make_run("random-12", 0.3, details=other, task="block-needle-4096"),
    ]
    scaled, others = on_one_base(runs)
    assert [run.bits_per_byte for run in scaled[:5]] == pytest.approx([1, 1.5, 1.01, 1.02, 1.6])
    assert scaled[3].details["bits_per_byte"] == pytest.approx([3.0])
    assert scaled[3].loss == pytest.approx(runs[3].loss / 1.1)
    assert scaled[:3] + scaled[4:] == runs[:3] + runs[4:]
    assert others == [scaled[3], scaled[6]]
    text = block_routing_text(runs)
    assert (
        "From another base than the rest of their seed: block-lm (bits scaled by the ratio of the "
        "bases' losses), seed 0: indexer-25; block-needle-4096, seed 0: random-12."
    ) in text
    assert " +4.33 % (+6.67 %) " in text  # 2 % over the base of its seed, and 1.6 / 1.5
    assert "another base" not in block_routing_text(runs[:3])


def test_a_base_among_the_results_counts_where_full_says_nothing(make_run):
    needle = {"task": "block-needle-4096"}
    base = dataclasses.replace(make_run("base", 1.0, **needle), loss=1e-4)
    runs = [
        base,
        make_run("full", 1.0, **needle),
        make_run("gates-25", 0.5, details={"start_loss": 0.0}, **needle),
        make_run("gates-12", 0.4, details={"start_loss": 1e-4}, **needle),
    ]
    assert on_one_base(runs) == (runs, [runs[2]])


def test_what_was_made_twice_says_how_far_bases_matter(make_run):
    def text(variant, loss, base):
        run = make_run(variant, 1.0, details={"start_loss": base})
        return dataclasses.replace(run, loss=loss)

    now = [text("gates-25", 1.01, 1.0), text("random-25", 1.2, 1.0), text("full", 1.0, 1.0)]
    before = [text("gates-25", 2.04, 2.0), text("random-25", 2.2, 2.0), text("full", 1.0, 1.0)]
    needle = {"task": "block-needle-4096"}
    now.append(make_run("gates-25", 0.5, details={"start_loss": 0.1}, **needle))
    before.append(make_run("gates-25", 0.7, details={"start_loss": 0.2}, **needle))
    assert made_again(now, before).split("\n") == [
        "- block-lm: 2 runs, made twice from two bases of a seed, differ by 5.50 points of what "
        "they cost over their base (mean; the 1 within 3 % of it by 1.00).",
        "- block-needle-4096: one run, made twice from two bases of a seed, differ by 20.0 points "
        "of accuracy (mean).",
    ]
    planned = dataclasses.replace(now[0], config={"curriculum": {"foresight": 30}})
    assert made_again([planned], before) == ""
    assert made_again(now, []) == ""


def test_a_lead_counts_from_two_standard_errors_over_both_controls(make_run):
    dense = [make_run("base", 1.0), make_run("window-1k", 1.05)]
    full = seeds(make_run, "full", (2.0, 1.0, 1.0, 1.0))
    random = seeds(make_run, "random-25", (1.10, 1.10, 1.12, 1.11))
    fixed = seeds(make_run, "sink-window-25", (1.04, 1.04, 1.06, 1.05))
    worse = [make_run("strided-25", 1.3)]
    clear = [*seeds(make_run, "pooled-25", (1.2, 1.0, 1.01, 1.02)), make_run("learned-25", 1.2)]
    runs = [*dense, *full, *random, *fixed, *worse]
    said = routing_findings([*runs, *clear]).split("\n")
    assert said[0] == (
        "- block-lm: attention everywhere has 4.76 % fewer bits per byte than the same model "
        "limited to 1,024 tokens (one seed; 2 % are needed), so it tests routing."
    )
    assert said[1] == (
        "- block-lm at 25 %: best is pooled at 25.0 % of the cost, bits per byte 1.0100 (+1.00 % "
        "against attention everywhere); 0.100 better than random at 25.0 % of the cost (17.3 "
        "standard errors, 3 seeds); 0.0400 better than sink-window at 25.0 % of the cost (6.9 "
        "standard errors, 3 seeds); better than its controls."
    )
    assert said[2:] == [LAST]
    near = seeds(make_run, "pooled-25", (0.9, 1.035, 1.045, 1.07))
    assert "not better than all of its controls." in routing_findings([*random, *fixed, *near])


def test_the_seed_that_chooses_is_not_among_those_that_compare(make_run):
    """A router and a pattern that were lucky once are chosen, and then compared without that."""
    runs = [
        *seeds(make_run, "pooled-25", (0.5, 1.05, 1.06, 1.07)),
        *seeds(make_run, "tree-25", (0.9, 1.0, 1.01, 1.02)),
        *seeds(make_run, "window-25", (0.7, 1.3, 1.3, 1.4)),
        *seeds(make_run, "sink-window-25", (0.8, 1.0, 1.0, 1.1)),
    ]
    said = routing_findings(runs)
    assert "best is pooled at 25.0 % of the cost, bits per byte 1.0600" in said
    assert "0.273 better than window" in said
    assert "sink-window" not in said


def test_one_seed_proves_nothing_and_a_text_without_distance_is_told(make_run):
    said = routing_findings(
        [
            make_run("base", 1.0),
            make_run("base", 1.0, 1),
            make_run("window-1k", 1.01),
            make_run("learned-12", 1.0),
            make_run("random-12", 1.1),
            make_run("random-12", 1.2, 1),
        ]
    )
    assert "0.99 % fewer" in said
    assert "(one seed; 2 % are needed), so it cannot test routing" in said
    assert "so it cannot test routing" in said
    assert "0.100 better than random at 12.0 % of the cost (one seed)." in said
    assert "its controls" not in said


def test_a_text_tests_routing_if_it_does_by_every_seed(make_run):
    dense = seeds(make_run, "base", (1.0, 2.0))
    runs = [*dense, *seeds(make_run, "window-1k", (1.25, 2.5))]
    assert "has 20.00 % fewer" in (said := routing_findings(runs))
    assert "(2 seeds, 20.00 % at least; 2 % are needed), so it tests routing" in said
    runs = [*dense, *seeds(make_run, "window-1k", (2.0, 2.0))]  # means alone would say 25 %
    assert "(2 seeds, 0.00 % at least; 2 % are needed), so it cannot" in routing_findings(runs)


def test_equal_figures_are_no_worse(make_run):
    first = seeds(make_run, "pooled-25", (1.0, 1.0, 1.5))
    equal = seeds(make_run, "random-25", (1.1, 1.0, 1.5))
    assert "; as good as random at 25.0 % of the cost (2 seeds)" in routing_findings(
        [*first, *equal]
    )
    more = seeds(make_run, "random-25", (1.1, 1.25, 1.75))
    said = routing_findings([*first, *more])
    assert "0.250 better than random at 25.0 % of the cost (the same in 2 seeds)" in said


def test_accuracy_is_better_the_higher_it_is(make_run):
    def runs(variant, *figures):
        return seeds(make_run, variant, figures, task="block-mqar-2048")

    said = routing_findings(
        [*runs("base", 1.0), *runs("window-1k", 0.5), *runs("learned-25", 0.5, 0.9, 0.92),
         *runs("tree-25", 0.3), *runs("random-25", 0.4, 0.94, 0.98)]
    )  # fmt: skip
    assert (
        "accuracy 100.00% with attention everywhere, 50.00% within 1,024 tokens (one seed)" in said
    )
    assert "best is learned at 25.0 % of the cost, accuracy 0.9100" in said
    assert "0.0500 worse than random" in said
    assert "(5.0 standard errors, 2 seeds); not better than all" in said


def test_one_lucky_seed_does_not_hide_what_several_seeds_say(make_run):
    several = [
        *seeds(make_run, "pooled-25", (1.00, 1.00, 1.01, 1.02)),
        *seeds(make_run, "random-25", (1.10, 1.10, 1.12, 1.11)),
    ]
    said = routing_findings([*several, make_run("tree-25", 0.9)]).split("\n")[0]
    assert "best is pooled" in said
    assert said.endswith("(17.3 standard errors, 3 seeds); better than its controls.")


def test_controls_trained_from_the_start_are_controls_of_what_was_too(make_run):
    said = routing_findings(
        [
            make_run("learned-25", 1.25),
            make_run("random-25", 1.375),
            make_run("learned+scratch-25", 1.25),
            make_run("random+scratch-25", 1.0),
            make_run("full", 1.0),
            make_run("base", 1.25),
            make_run("window-1k", 1.25),
        ]
    ).split("\n")
    assert "0.00 % fewer bits per byte" in said[0]
    assert said[1:] == [
        "- block-lm at 25 %: best is learned at 25.0 % of the cost, bits per byte 1.2500 (+25.00 % "
        "against attention everywhere); 0.125 better than random at 25.0 % of the cost (one seed).",
        "- block-lm at 25 %, from the start: best is learned at 25.0 % of the cost, bits per byte "
        "1.2500 (+0.00 % against attention everywhere); 0.250 worse than random at 25.0 % of the "
        "cost (one seed).",
    ]


def test_a_router_that_costs_more_than_its_controls_is_not_the_best(make_run):
    """Its own work counts; all costs are shares of what attention everywhere costs."""
    said = routing_findings(
        [
            make_run("full", 0.8, cost=0.5),
            make_run("mass-25", 0.9, cost=0.2),
            make_run("learned-25", 1.0, cost=0.13),
            make_run("random-25", 1.1, cost=0.125),
        ]
    )
    assert "best is learned at 26.0 % of the cost" in said
    assert said.endswith("; beyond the budget: mass at 40.0 % of the cost.")


ERRORS = [
    {"router": f"pooled-{p}", "length": n, "error": error, "cost": p / 100}
    for n, scale in ((1024, 1.0), (2048, 2.0))
    for p, error in ((5, 0.2 * scale), (25, 0.05 * scale))
]


def test_errors_stand_beside_their_cost_and_the_least_cost_of_a_tenth(make_run):
    assert error_table([make_run("full", 1.0)]) == ""
    table = error_table([make_run("distil", 1.0, details={"attention_error": ERRORS})])
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.split("\n")]
    assert lines[2] == ["pooled", "5", "0.200 at 0.050", "0.400 at 0.050"]
    assert lines[-1] == ["pooled: cost of error 0.1", "", "0.183", "0.250"]


def test_budgets_of_a_router_are_marks_of_one_line(make_run, tmp_path):
    results = [
        make_run("full", 1.0),
        make_run("gates-12", 1.2, cost=0.1),
        make_run("gates-25", 1.1, cost=0.2),
        make_run("gates-25", 2.6, 1, cost=0.2),
        make_run("full", 2.0, 1),
        make_run("gates-25", 9.9, 2, cost=0.2),
        dataclasses.replace(make_run("conv", 3.0, cost=0.01), usage=0.0),
        make_run("full", 1.0, task="block-mqar-8192"),  # with nothing beside it, no panel
    ]
    (axes,) = plot_budgets(results, tmp_path / "budgets.png").axes
    line, dense = (np.transpose(line.get_data()).tolist() for line in axes.get_lines())
    # Beside attention everywhere of the same seed; the second is a mean.
    assert line == [pytest.approx([0.1, 20]), pytest.approx([0.2, 20])]
    assert [y for _, y in dense] == [0, 0]
    routed = [run for run in results if run.variant != "full"]
    assert plot_budgets(routed, tmp_path / "none.png") is None
    assert not (tmp_path / "none.png").exists()


def test_plots_show_what_there_is(make_run, tmp_path):
    full = {"edges": [256, 512], "bits_per_byte": [2.0, 1.0]}
    near = {"edges": [256, 512], "bits_per_byte": [2.0, 1.1]}
    results = [
        make_run("full", 1.0, details=full),
        make_run("window-1k", 1.1, details=near),
        make_run("base", 1.1, details=near),
        make_run("pooled-25", 1.1, details=near),
        make_run("pooled-25", 9.9, 1, details=full | {"bits_per_byte": [9.0, 9.0]}),
        make_run("pooled-12", 1.1, details=near),
        make_run("distil", 1.0, details=full | {"attention_error": ERRORS}),
        dataclasses.replace(make_run("conv", 9.9, details=near), usage=0.0),
    ]
    axes = plot_positions(results, tmp_path / "positions.png").axes[0]
    lines = {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()}
    assert lines["pooled-25"] == pytest.approx([0, 10])  # of the seed that full has too
    assert lines["window-1k"] == pytest.approx([0, 0])  # beside base
    assert "pooled-12" not in lines
    assert "conv" not in lines  # does not attend
    panels = plot_errors(results, tmp_path / "errors.png").axes
    assert [axes.get_title() for axes in panels] == ["1,024 tokens", "2,048 tokens"]
    assert plot_positions(results[:1], tmp_path / "none.png") is None
    assert plot_errors(results[:1], tmp_path / "none.png") is None
    assert not (tmp_path / "none.png").exists()
    plot_block_routing(results, tmp_path)
    drawn = {path.name for path in tmp_path.glob("*.png")}
    assert drawn >= {"tradeoff.png", "positions_block-lm.png", "errors_block-lm.png"}
    assert "cost of error" in block_routing_text(results)
