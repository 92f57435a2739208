"""Result files: what one run reached and spent, as checked JSON, one file a (task, variant, seed).

Everything that is published, tables, captions and plots, is computed from these files.
"""

import dataclasses
import json
import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from routing_jax.files import write_whole

HISTORY_KEYS = ("step", "loss", "accuracy", "lambda", "usage", "cost", "length")
MAX_HISTORY = 200


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_fraction(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 1


def _is_amount(value: Any) -> bool:
    return _is_number(value) and value >= 0


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9.+-]+", value) is not None


def _is_history(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= MAX_HISTORY
        and all(isinstance(row, dict) and sorted(row) == sorted(HISTORY_KEYS) for row in value)
        and all(_is_number(number) for row in value for number in row.values())
    )


def _is_heatmap(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(row, list) and len(row) == len(value[0]) > 0 for row in value)
        and all(type(cell) is int and cell in (0, 1) for row in value for cell in row)
    )


def _is_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_fractions(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_fraction, value))


def _is_versions(value: Any) -> bool:
    return isinstance(value, dict) and _is_strings([*value, *value.values()])


class _Kind(NamedTuple):
    """What a field may hold."""

    accepts: Callable[[Any], bool]
    words: str  # the same, for the error's sentence
    optional: bool = False


_FRACTION = _Kind(_is_fraction, "a number from 0 to 1")
_AMOUNT = _Kind(_is_amount, "a finite number, at least 0")
_COUNT = _Kind(_is_count, "a whole number, at least 0")
_NAME = _Kind(_is_name, "a name of letters, digits, '.', '+' and '-'")

_KINDS = {
    "experiment": _NAME,
    "task": _NAME,
    "variant": _NAME,
    "seed": _COUNT,
    "accuracy": _FRACTION,
    "accuracy_first_place": _FRACTION._replace(optional=True),
    "loss": _AMOUNT,
    "bits_per_byte": _AMOUNT._replace(optional=True),
    "usage": _FRACTION,
    "usage_per_layer": _Kind(_is_fractions, "a list of numbers from 0 to 1"),
    "cost": _AMOUNT,
    "kv_cost": _AMOUNT,
    "least_usage": _FRACTION._replace(optional=True),
    "sequences": _COUNT,
    "steps": _COUNT,
    "tokens": _COUNT,
    "parameters": _COUNT,
    "minutes": _AMOUNT,
    "mixing_ms": _AMOUNT._replace(optional=True),
    "device": _Kind(lambda value: isinstance(value, str) and value != "", "a name"),
    "versions": _Kind(_is_versions, "package names with their versions"),
    "config": _Kind(lambda value: isinstance(value, dict), "a JSON object"),
    "history": _Kind(
        _is_history, f"at most {MAX_HISTORY} rows of the numbers {', '.join(HISTORY_KEYS)}"
    ),
    "heatmap": _Kind(_is_heatmap, "layers of equally many 0 or 1", optional=True),
    "heatmap_tokens": _Kind(_is_strings, "a list of strings", optional=True),
    "details": _Kind(lambda value: isinstance(value, dict), "a JSON object", optional=True),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """What one run reached and spent. JSON values throughout: lists and dicts, Python numbers.

    Raises:
      ValueError: a field that holds something else than described, or fields that disagree.

    >>> [field.name for field in dataclasses.fields(Result)][:4]
    ['experiment', 'task', 'variant', 'seed']
    """

    experiment: str
    """The folder of the file."""
    task: str
    """As in recall-128."""
    variant: str
    """As in routed, full, routed+pause."""
    seed: int
    accuracy: float
    """Fraction of held-out targets predicted; for recall, the queried pair at random places."""
    accuracy_first_place: float | None
    """The same with the queried pair at the first place; proves nothing by itself."""
    loss: float
    """Nats a target."""
    bits_per_byte: float | None
    """For text only, which is told by it."""
    usage: float
    """Fraction of tokens that attend by the hard gate, mean over layers."""
    usage_per_layer: list[float]
    cost: float
    """Multiply-adds of mixing ÷ those of full attention, mean over layers."""
    kv_cost: float
    """Key/value bytes read ÷ those of full multi-head attention, mean over layers."""
    least_usage: float | None
    """The smallest usage that can solve the task; None where it is not known."""
    sequences: int
    """Held-out sequences behind the figures above."""
    steps: int
    tokens: int
    """Tokens trained on."""
    parameters: int
    minutes: float
    """Wall-clock of training."""
    mixing_ms: float | None
    """Milliseconds that the mixing layers take for one evaluation batch."""
    device: str
    versions: dict[str, str]
    config: dict[str, Any]
    history: list[dict[str, float]]
    heatmap: list[list[int]] | None
    """[L][T]: whether token T attended in layer L, for one held-out sequence."""
    heatmap_tokens: list[str] | None
    """[T]: the tokens of that sequence."""
    details: dict[str, Any] | None = None
    """What only this experiment measures."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            kind = _KINDS[field.name]
            value = getattr(self, field.name)
            if not (kind.accepts(value) or (kind.optional and value is None)):
                words = kind.words + (" or null" if kind.optional else "")
                raise ValueError(f"{field.name} is {_short(value)}; it must be {words}.")
        if self.heatmap is not None and len(self.heatmap) != len(self.usage_per_layer):
            raise ValueError(
                f"heatmap has {len(self.heatmap)} layers; usage_per_layer has "
                f"{len(self.usage_per_layer)}, and both must be the same."
            )
        length = len(self.heatmap[0]) if self.heatmap is not None else 0
        if self.heatmap_tokens is not None and len(self.heatmap_tokens) != length:
            raise ValueError(
                f"heatmap_tokens has {len(self.heatmap_tokens)} entries; it must have one for "
                f"each of the heatmap's {length} positions."
            )


def _short(value: Any) -> str:
    """A value for an error's sentence; a long one is cut."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _refuse_constant(name: str) -> None:
    raise ValueError(f"it holds {name}, which is not JSON")


def thin_history(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """At most MAX_HISTORY rows, evenly spaced, the first and last kept; only HISTORY_KEYS of each.

    >>> row = dict.fromkeys(HISTORY_KEYS, 0.0) | {"learning_rate": 0.1}
    >>> thin = thin_history([row | {"step": step} for step in range(1000)])
    >>> len(thin), thin[0]["step"], thin[-1]["step"], "learning_rate" in thin[0]
    (200, 0, 999, False)
    """
    keep = min(len(rows), MAX_HISTORY)
    places = [round(i * (len(rows) - 1) / max(keep - 1, 1)) for i in range(keep)]
    return [{key: rows[place][key] for key in HISTORY_KEYS} for place in places]


def result_path(
    folder: epath.PathLike, experiment: str, task: str, variant: str, seed: int
) -> epath.Path:
    """Where the result of this run stands below the results folder.

    >>> result_path("results", "routed-attention", "recall-128", "routed", 0).as_posix()
    'results/routed-attention/recall-128_routed_s0.json'
    """
    return epath.Path(folder) / experiment / f"{task}_{variant}_s{seed}.json"


def write_result(result: Result, path: epath.PathLike) -> None:
    """Writes a result whole or not at all; a file that stood there stays until then.

    Raises:
      OSError: it can't be written; the file is named.
    """
    path = epath.Path(path)
    # Serialised first: what JSON cannot hold must not leave a file.
    values = dataclasses.asdict(result).items()
    lines = [f"{json.dumps(name)}: {json.dumps(value, allow_nan=False)}" for name, value in values]
    text = "{\n" + ",\n".join(lines) + "\n}\n"  # a field a line, for readable differences
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text)


def read_result(path: epath.PathLike) -> Result:
    """Reads and checks one result.

    Raises:
      FileNotFoundError: there is none.
      ValueError: the file is malformed; one sentence names it and the field.

    >>> read_result("nowhere/result.json")
    Traceback (most recent call last):
    FileNotFoundError: ...
    """
    text = epath.Path(path).read_text()
    try:
        values = json.loads(text, parse_constant=_refuse_constant)
        if not isinstance(values, dict):
            raise ValueError("it must be a JSON object.")
        names = [field.name for field in dataclasses.fields(Result)]
        needed = [name for name in names if name != "details"]
        if missing := [name for name in needed if name not in values]:
            raise ValueError(f"{', '.join(missing)} must not be missing.")
        if unknown := [name for name in values if name not in names]:
            raise ValueError(f"{', '.join(unknown)} must be one of the fields of a Result.")
        return Result(**values)
    except ValueError as error:
        raise ValueError(f"{path} is not a result: {str(error).rstrip('.')}.") from None


def load_results(folder: epath.PathLike, experiment: str) -> list[Result]:
    """All results of an experiment, in the order of their files' names; [] when it has none.

    Raises:
      ValueError: a malformed file, or one whose content belongs under another name.

    >>> load_results("nowhere", "routed-attention")
    []
    """
    results = []
    for path in sorted((epath.Path(folder) / experiment).glob("*.json")):
        result = read_result(path)
        own = result_path(folder, result.experiment, result.task, result.variant, result.seed)
        if path != own:
            raise ValueError(
                f"{path} holds the experiment, task, variant and seed of {own.parent.name}/"
                f"{own.name}; it must stand there."
            )
        results.append(result)
    return results


class Summary(NamedTuple):
    """A figure over the seeds; `lowest` and `highest` bound what 'every seed' can claim."""

    seeds: int
    """How many have the figure."""
    mean: float
    std: float
    """Sample standard deviation over seeds (n − 1), not the standard error; NaN for one seed."""
    lowest: float
    highest: float


def summary(results: Iterable[Result], field: str) -> Summary | None:
    """Summary of a numeric field over results; null values are left out, None when all are null.

    >>> from types import SimpleNamespace as Run
    >>> summary([Run(accuracy=0.98), Run(accuracy=1.0), Run(accuracy=None)], "accuracy").mean
    0.99
    """
    values = [getattr(result, field) for result in results]
    values = [value for value in values if value is not None]
    if not values:
        return None
    std = statistics.stdev(values) if len(values) > 1 else math.nan
    return Summary(len(values), statistics.fmean(values), std, min(values), max(values))
