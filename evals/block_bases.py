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

_NEAR = 0.03  # loss over its base's below which a run of text is one of the good


def _start(run: Result) -> float | None:
    return (run.details or {}).get("start_loss")


def on_one_base(results: Sequence[Result]) -> tuple[list[Result], list[Result]]:
    """The results, those of text as if they had gone on from the base of their seed's 'full'.

    What a router costs over its own base hardly depends on that base (`made_again`), so that bits
    per byte are scaled by the two bases' losses. Accuracy is taken as it is.

    Args:
      results: of the experiment.

    Returns:
      All results, and among them those that went on from another base.
    """
    full = {(run.task, run.seed): _start(run) for run in results if run.variant == "full"}
    scaled, others = [], []
    for run in results:
        own, theirs = _start(run), full.get((run.task, run.seed))
        if own and theirs and own != theirs:
            run = _scaled(run, theirs / own)
            others.append(run)
        scaled.append(run)
    return scaled, others


def _scaled(run: Result, by: float) -> Result:
    if run.bits_per_byte is None:
        return run
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
        text = " (bits scaled by the two bases')" * (run.bits_per_byte is not None)
        named.setdefault((f"{run.task}{text}", run.seed), []).append(run.variant)
    told = [f"{task}, seed {seed}: {', '.join(of)}" for (task, seed), of in named.items()]
    return f"From another base than full of their seed: {'; '.join(told)}." if told else ""


def _foresight(run: Result) -> int:
    return run.config.get("curriculum", {}).get("foresight", 0)


def made_again(results: Sequence[Result], earlier: Sequence[Result]) -> str:
    """A Markdown list: by how much runs differ that were made twice, from two bases of one seed.

    Of text, loss over the base's counts; of all else, accuracy.

    Args:
      results: of the experiment.
      earlier: the same runs made from other bases.
    """
    now = {(run.task, run.variant, run.seed): run for run in results}
    found: dict[str, list[tuple[float, float]]] = {}  # by task: twice the figure
    for before in earlier:
        run = now.get((before.task, before.variant, before.seed))
        if run is None or _foresight(run) != _foresight(before):
            continue
        own, theirs = _start(run), _start(before)
        if not own or not theirs or own == theirs or run.variant.startswith("distil"):
            continue
        if run.bits_per_byte is None:
            pair = run.accuracy, before.accuracy
        else:
            pair = run.loss / own - 1, before.loss / theirs - 1
        found.setdefault(run.task + "*" * (run.bits_per_byte is not None), []).append(pair)
    said = []
    for task in sorted(found, key=natural_order):
        pairs = found[task]
        told = f"{task.rstrip('*')}: {len(pairs)} runs, made again from another base of their seed"
        if task.endswith("*"):
            near = [pair for pair in pairs if max(pair) < _NEAR]
            told += f", cost {_apart(pairs):.2f} points more or less over their base (mean"
            told += f"; {_apart(near):.2f} for the {len(near)} below {_NEAR:.0%})" if near else ")"
        else:
            told += f", are {_apart(pairs):.1f} points more or less accurate (mean)"
        said.append(f"- {told}.")
    return "\n".join(said)


def _apart(pairs: Sequence[tuple[float, float]]) -> float:
    """Mean difference, in percent."""
    return 100 * statistics.fmean(abs(a - b) for a, b in pairs)
