"""Where a benchmark ran: device, driver, versions and date, for its result file."""

import datetime
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import jax

_PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "numpy",
    "jax-cuda13-plugin",
    "nvidia-cudnn-cu13",
    "nvidia-cuda-runtime",
    "torch",
    "triton",
)


def environment() -> dict[str, Any]:
    """Device, backend, driver (None without one), versions and date (UTC), ready for JSON.

    >>> sorted(environment())
    ['backend', 'date', 'device', 'driver', 'versions']
    """
    return {
        "device": _device(),
        "backend": jax.default_backend(),
        "driver": _driver(),
        "versions": {"python": platform.python_version(), **_versions()},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def ptxas_version() -> str | None:
    """What `ptxas --version` says of the assembler that jax compiles kernels with; None without.

    jax takes it from NVIDIA's packages where they are installed, else from the path.
    """
    folders = Path(sysconfig.get_path("purelib"), "nvidia").glob("*/bin")
    path = os.pathsep.join([*map(str, sorted(folders)), os.environ.get("PATH", "")])
    ptxas = shutil.which("ptxas", path=path)
    if ptxas is None:
        return None
    try:
        found = subprocess.run(
            [ptxas, "--version"], capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    versions = re.findall(r"\bV(\d+(?:\.\d+)+)", found.stdout)
    return versions[-1] if versions else None


def _device() -> str:
    """The accelerator's name, or the processor's with its number of cores."""
    if jax.default_backend() != "cpu":
        return jax.devices()[0].device_kind
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def _driver() -> str | None:
    """The NVIDIA driver's version, where there is one."""
    if not shutil.which("nvidia-smi"):
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.split("\n")[0].strip() or None


def _versions() -> dict[str, str]:
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
