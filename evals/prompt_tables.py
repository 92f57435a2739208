"""The table of the experiment 'flux', from its result files: each way of routing beside dense."""

import math
import statistics
from collections.abc import Sequence

import numpy as np
from scipy.special import stdtrit

from routing_jax.evals.results import Result
from routing_jax.evals.tables import NOTHING, Column, markdown_table, natural_order, significant
from routing_jax.routers import SparseModeConfig

LEAST_DENSE = 0.6  # below it dense attention itself does not do a task, which then tells nothing


def with_interval(values: np.ndarray) -> tuple[float, float]:
    """A mean and half of its 95 % interval, over the seeds and prompts that there might have been.

    Every seed has the same prompts, so neither its values nor those of a prompt are independent.
    The variance of the mean is that of the prompts' means, and what the seeds' means vary more
    than prompts would make them: that of crossed random effects, by analysis of variance. The
    quantile is Student's, its degrees of freedom are Satterthwaite's. Two seeds may happen to
    agree: where seeds matter as much as prompts, an interval of two holds the mean 87 times in 100.

    Args:
      values: [seeds,n], of a single seed [1,n].

    >>> [round(x, 3) for x in with_interval(np.array([[0.0, 1.0, 0.0, 1.0]]))]
    [0.5, 0.919]
    >>> round(with_interval(np.array([[0.0, 1.0, 0.0, 1.0], [0.4, 1.4, 0.4, 1.4]]))[1], 2)
    0.99
    """
    R, n = values.shape
    mean = float(values.mean())
    if n < 2:
        return mean, math.nan
    prompts, seeds = values.mean(axis=0), values.mean(axis=1)
    by_prompt, by_seed = prompts.var(ddof=1) / n, 0.0
    if R > 1:
        rest = values - prompts[None] - seeds[:, None] + mean
        by_chance = (rest**2).sum() / ((R - 1) * (n - 1) * R * n)
        by_seed = max(0.0, seeds.var(ddof=1) / R - by_chance)
    variance = by_prompt + by_seed
    if not variance:
        return mean, 0.0
    freedom = variance**2 / (by_prompt**2 / (n - 1) + by_seed**2 / max(R - 1, 1))
    return mean, float(stdtrit(freedom, 0.975) * math.sqrt(variance))


def by_variant(results: Sequence[Result]) -> dict[str, dict[str, list[Result]]]:
    """The results of each task and, in it, of each way of routing: a list of its seeds."""
    groups: dict[str, dict[str, list[Result]]] = {}
    for run in results:
        groups.setdefault(run.task, {}).setdefault(run.variant, []).append(run)
    return groups


def trials(runs: Sequence[Result], task: str, field: str) -> np.ndarray:
    """Each trial's figure by each seed.

    Args:
      runs: one way of routing, a result a seed.
      task: whose trials.
      field: 'right' or 'nll'.

    Returns:
      [seeds,n].
    """
    return np.array([(run.details or {})["tasks"][task][field] for run in runs])


def more_than_dense(
    dense: Sequence[Result], runs: Sequence[Result], task: str, field: str
) -> np.ndarray:
    """How much more each trial's figure is than dense attention's in the same trial.

    Args:
      dense: its results, one a seed.
      runs: one way of routing, a result a seed.
      task: whose trials.
      field: 'right' or 'nll'.

    Returns:
      [seeds,n].
    """
    return trials(runs, task, field) - trials(dense, task, field).mean(axis=0, keepdims=True)


def counted_tasks(dense: Sequence[Result]) -> list[str]:
    """The tasks with right answers that dense attention does often enough to tell anything.

    Args:
      dense: its results, one a seed.
    """
    tasks = (dense[0].details or {})["tasks"]
    asked = [task for task in tasks if tasks[task]["nll"] is None]
    return [t for t in asked if trials(dense, t, "right").mean() >= LEAST_DENSE]


def _points(dense: Sequence[Result], runs: Sequence[Result], task: str) -> str:
    """Right answers, and points more than dense attention's in the same trials."""
    right = trials(runs, task, "right").mean()
    text = f"{100 * right:.1f} %"
    if runs is dense:
        return text + (" (too few)" if right < LEAST_DENSE else "")
    more, half = with_interval(100 * more_than_dense(dense, runs, task, "right"))
    return f"{text} ({more:+.1f} ± {half:.1f})"


def _perplexity(dense: Sequence[Result], runs: Sequence[Result]) -> str:
    """Perplexity of plain text, and per cent more than dense attention's on the same text."""
    text = f"{math.exp(trials(runs, 'text', 'nll').mean()):.2f}"
    if runs is dense:
        return text
    more, half = with_interval(more_than_dense(dense, runs, "text", "nll"))
    low, mean, high = (100 * math.expm1(x) for x in (more - half, more, more + half))
    return f"{text} ({mean:+.2f} %, {low:+.2f} to {high:+.2f})"


def _nats(dense: Sequence[Result], runs: Sequence[Result], task: str) -> str:
    """Nats a token of the right answers, and how many more than dense attention's."""
    text = f"{trials(runs, task, 'nll').mean():.3f}"
    if runs is dense:
        return text
    more, half = with_interval(more_than_dense(dense, runs, task, "nll"))
    return f"{text} ({more:+.3f} ± {half:.3f})"


def _sparse(runs: Sequence[Result], tasks: Sequence[str]) -> str:
    shares = [(run.details or {})["tasks"][task]["sparsity"] for run in runs for task in tasks]
    return f"{100 * statistics.fmean(shares):.1f} %" if shares else NOTHING


def flux_table(results: Sequence[Result]) -> str:
    """Answers, perplexity and sparsity of each way of routing, paired with dense attention.

    A task of which dense attention is not measured yet is named, as nothing can be said of it.

    Raises:
      ValueError: no results.
    """
    if not results:
        raise ValueError("results is empty; a table needs at least one result.")
    groups = by_variant(results)
    tables = [_table(name, groups[name]) for name in sorted(groups, key=natural_order)]
    devices = "; ".join(sorted({run.device for run in results}))
    counts = sorted(
        {len(task["right"]) for run in results for task in (run.details or {})["tasks"].values()}
    )
    caption = (
        "Right: share of the answer's tokens, teacher-forced; in brackets points more than dense "
        "attention's on the same prompts. Perplexity of the text after the prompt; in brackets "
        "per cent more than dense attention's. Nats: a token of the right answer; in brackets how "
        "many more than dense attention's. Intervals of 95 %, paired by prompt; with several "
        "seeds, what seeds differ by beyond chance is in them (crossed random effects of prompts "
        "and seeds, Student's t). All is scored after the prompt, by which alone layers are "
        "routed. Static: the layers whose sparsity costs least on calibration text, of where the "
        "routers were trained; static+tasks: on all tasks of the training; static+routed: all but "
        "those that the trained routers attended fully most often. Random: other layers for each "
        "prompt. Composed: layers that are not sparse search for blocks, in the prompt and after "
        f"it{_searched_by(results)}. "
        "(too few): dense attention answers "
        f"less than {100 * LEAST_DENSE:.0f} %, so the task does not count. Prompts a task: "
        f"{' to '.join(f'{n:,}' for n in dict.fromkeys((counts[0], counts[-1])))}. "
        f"Device: {devices}."
    )
    return "\n\n".join([*tables, caption])


def _searched_by(results: Sequence[Result]) -> str:
    """By what composed layers found blocks, if some did."""
    found = set()
    for run in results:
        model = run.config.get("model", {})
        sparse = model.get("sparse", {})
        if "topk" not in (sparse.get("mode"), sparse.get("retrieval")):
            continue
        if "means" in sparse:  # of when blocks were found so
            found.add(f"{sparse['means']} means of their keys")
        else:
            known = SparseModeConfig.from_saved(sparse)
            found.add(f"{known.channels_of(model['head_dim'])} channels of their keys")
    return f", by {' or '.join(sorted(found))}" if found else ""


def _table(name: str, variants: dict[str, list[Result]]) -> str:
    if "dense" not in variants:
        return (
            f"**{name}**\n\nNot measured yet: dense, which all others stand beside. Measured: "
            f"{', '.join(sorted(variants))}."
        )
    dense = variants["dense"]
    told = (dense[0].details or {})["tasks"]
    tasks = list(told)
    asked = [task for task in tasks if told[task]["nll"] is None]
    likely = [task for task in tasks if task != "text" and task not in asked]
    columns = [
        Column("routing", "left"), Column("sparse layers"), Column("of retrieval"),
        Column("of text"), *(Column(f"{task}, right") for task in asked), Column("perplexity"),
        *(Column(f"{task}, nats") for task in likely), Column("cost"), Column("kv cost"),
        Column("seeds"),
    ]  # fmt: skip
    order = ("dense", "sparse", "random", "static", "routed")
    shown = sorted(
        variants,
        key=lambda v: (order.index(v.split("-")[0].split("+")[0]), natural_order(v)),
    )
    rows = [
        [
            variant,
            _sparse(variants[variant], tasks),
            _sparse(variants[variant], asked),
            _sparse(variants[variant], [task for task in tasks if task == "text"]),
            *(_points(dense, variants[variant], task) for task in asked),
            _perplexity(dense, variants[variant]) if "text" in tasks else NOTHING,
            *(_nats(dense, variants[variant], task) for task in likely),
            significant(statistics.fmean(run.cost for run in variants[variant])),
            significant(statistics.fmean(run.kv_cost for run in variants[variant])),
            str(len(variants[variant])),
        ]
        for variant in shown
    ]
    return f"**{name}**\n\n{markdown_table(columns, rows)}"
