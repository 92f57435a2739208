"""Where a benchmark ran: device, driver, versions and date, for its result file."""

import datetime
import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import jax

from routing_jax.evals.provenance import first_device, versions

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
    "libtpu",
)


def environment() -> dict[str, Any]:
    """Device, backend, driver (None without one), versions, XLA's flags and date (UTC), for JSON.

    >>> sorted(environment())
    ['backend', 'date', 'device', 'driver', 'versions', 'xla_flags']
    """
    return {
        "device": first_device(),
        "backend": jax.default_backend(),
        "driver": _driver(),
        "versions": versions(_PACKAGES),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
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
    named = re.findall(r"\bV(\d+(?:\.\d+)+)", found.stdout)
    return named[-1] if named else None


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
