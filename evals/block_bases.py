"""Runs that went on from another base than the rest of their seed, and what that changes.

A base that is made again is another one: rounding differs from run to run, and training makes much
of it. `start_loss` in a run's details, the base's own, tells bases apart; where it was not recorded
a run counts as being of the same.
"""

import dataclasses
import statistics
from collections.abc import Sequence

from routing_jax.evals.results import Result
from routing_jax.evals.tables import natural_order

_NEAR = 0.03  # loss above the base's, as a share of it, up to which text is told apart


def _start(run: Result) -> float | None:
    return (run.details or {}).get("start_loss")


def on_one_base(results: Sequence[Result]) -> tuple[list[Result], list[Result]]:
    """The results, those of text as if they had gone on from the base of their seed's 'full'.

    What a good router costs over its own base hardly depends on that base (`made_again`), so bits
    per byte are scaled by the two bases' losses. Accuracy is taken as it is. Where 'full' does not
    say what it went on from, that is the base among the results.

    Args:
      results: of the experiment.

    Returns:
      All results, and among them those that went on from another base.
    """
    starts = {(run.task, run.seed): run.loss for run in results if run.variant == "base"}
    for run in results:
        own = _start(run)
        if run.variant == "full" and own is not None:
            starts[run.task, run.seed] = own
    scaled, others = [], []
    for run in results:
        own, theirs = _start(run), starts.get((run.task, run.seed))
        if own is not None and theirs is not None and own != theirs:
            run = run if run.bits_per_byte is None else _scaled(run, theirs / own)
            others.append(run)
        scaled.append(run)
    return scaled, others


def _scaled(run: Result, by: float) -> Result:
    assert run.bits_per_byte is not None  # of text alone
    details = dict(run.details or {})
    if "bits_per_byte" in details:
        details["bits_per_byte"] = [bits * by for bits in details["bits_per_byte"]]
    return dataclasses.replace(
        run, bits_per_byte=run.bits_per_byte * by, loss=run.loss * by, details=details
    )


def other_bases(others: Sequence[Result]) -> str:
    """A sentence that names the results of another base; '' where there are none."""
    named: dict[tuple[str, int], list[str]] = {}
    for run in sorted(others, key=lambda run: (natural_order(run.task), run.seed, run.variant)):
        text = " (bits scaled by the ratio of the bases' losses)" if run.bits_per_byte else ""
        named.setdefault((f"{run.task}{text}", run.seed), []).append(run.variant)
    told = [f"{task}, seed {seed}: {', '.join(of)}" for (task, seed), of in named.items()]
    return f"From another base than the rest of their seed: {'; '.join(told)}." if told else ""


def _rule(run: Result) -> tuple[float, ...]:
    """How its λ came to its target."""
    curriculum = run.config.get("curriculum", {})
    return tuple(curriculum.get(name, 0) for name in ("foresight", "course", "reward"))


def made_again(results: Sequence[Result], again: Sequence[Result]) -> str:
    """A Markdown list: by how much runs differ that were made twice, from two bases of one seed.

    Of text, loss over the base's counts; of all else, accuracy. What distils is left out, as it
    changes nothing in its base, and so is what came to its budget by another rule.

    Args:
      results: of the experiment.
      again: some of its runs, made a second time from other bases.
    """
    first = {(run.task, run.variant, run.seed): run for run in results}
    pairs: dict[tuple[str, bool], list[tuple[float, float]]] = {}  # both figures, by task and text
    for second in again:
        run = first.get((second.task, second.variant, second.seed))
        if run is None or run.variant.startswith("distil") or _rule(run) != _rule(second):
            continue
        own, theirs = _start(run), _start(second)
        if own is None or theirs is None or own == theirs:
            continue
        text = run.bits_per_byte is not None
        pair = run.accuracy, second.accuracy
        if text:
            pair = run.loss / own - 1, second.loss / theirs - 1
        pairs.setdefault((run.task, text), []).append(pair)
    said = []
    for task, text in sorted(pairs, key=lambda key: natural_order(key[0])):
        found = pairs[task, text]
        runs = "one run" if len(found) == 1 else f"{len(found)} runs"
        line = f"{task}: {runs}, made twice from two bases of a seed, differ by "
        if not text:
            line += f"{_apart(found):.1f} points of accuracy (mean)"
        else:
            line += f"{_apart(found):.2f} points of what they cost over their base (mean"
            if near := [pair for pair in found if max(pair) <= _NEAR]:
                line += f"; the {len(near)} within {100 * _NEAR:.0f} % of it by {_apart(near):.2f}"
            line += ")"
        said.append(f"- {line}.")
    return "\n".join(said)


def _apart(pairs: Sequence[tuple[float, float]]) -> float:
    """Mean difference, in percent."""
    return 100 * statistics.fmean(abs(a - b) for a, b in pairs)
