"""What a result was made with: the devices and the versions that it names."""

import importlib.metadata
import os
import platform
from collections.abc import Iterable
from pathlib import Path

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
