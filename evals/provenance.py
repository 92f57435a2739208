"""What a result was made with: the devices and the versions that it names."""

import importlib.metadata
import os
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax


def all_devices() -> str:
    """What a run was spread over: the devices' kind, and how many where there are several."""
    kind = jax.devices()[0].device_kind
    if jax.default_backend() == "cpu":
        kind = f"CPU ({platform.machine()})"
    count = jax.device_count()
    return kind if count == 1 else f"{count} x {kind}"


def first_device() -> str:
    """What one program was timed on: an accelerator, or a processor with its number of cores."""
    if jax.default_backend() != "cpu":
        return jax.devices()[0].device_kind
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Python's version and those of the packages that are installed, in this order.

    >>> list(versions(["jax", "no-such-package", "numpy"]))
    ['python', 'jax', 'numpy']
    """
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _size(size: tuple[int, ...]) -> str:
    """A length, and a batch of several."""
    return str(size[0]) + "".join(f" × {batch}" for batch in size[1:] if batch > 1)


def _when(runs: Iterable[Mapping[str, Any]]) -> str:
    """Days and XLA flags, each with what was taken of it where several runs are read as one."""
    days: dict[tuple[str, str], dict[str, set[tuple[int, ...]]]] = {}
    for run in runs:
        taken = days.setdefault((run["date"][:10], run.get("xla_flags", "")), {})
        for part, *size in run.get("groups", ()):
            taken.setdefault(part, set()).update([tuple(size)] if size else [])
    said = []
    for (day, flags), taken in days.items():
        parts = [
            part + (f" ({', '.join(map(_size, sorted(sizes)))})" if sizes else "")
            for part, sizes in taken.items()
        ]
        day += f": {', '.join(parts)}" if len(days) > 1 and parts else ""
        said.append(f"{day}, XLA_FLAGS {flags}" if flags else day)
    return "; ".join(said)


def dated_versions(result: Mapping[str, Any]) -> str:
    """The end of a benchmark's caption: the day, the XLA flags and the versions that it ran with.

    Of several runs read as one (`merged`), the days and flags of all that had different ones.

    >>> result = {"date": "2026-11-22T08:00:00+00:00", "versions": {"jax": "0.11.2"}}
    >>> dated_versions(result | {"xla_flags": "--xla_a=1"})
    '2026-11-22, XLA_FLAGS --xla_a=1. Versions: jax 0.11.2.'
    >>> runs = [{"date": "2026-11-21", "groups": [("decode", 8), ("decode", 16)]},
    ...         {"date": "2026-11-22", "groups": [("step",)]}]
    >>> dated_versions(result | {"runs": runs})
    '2026-11-21: decode (8, 16); 2026-11-22: step. Versions: jax 0.11.2.'
    """
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return f"{_when(result.get('runs', [result]))}. Versions: {versions}."


def named_device(result: Mapping[str, Any]) -> str:
    """The device of a benchmark's result, with the driver where there is one.

    >>> named_device({"device": "NVIDIA H100", "driver": "580.1"})
    'NVIDIA H100, driver 580.1'
    """
    return result["device"] + (f", driver {result['driver']}" if result.get("driver") else "")
