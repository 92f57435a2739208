"""Python code in processes of its own, for tests of several devices, of kills and of limits."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def start_python(code: str, *arguments: Any, devices: int = 1) -> subprocess.Popen[str]:
    """Starts code that finds its arguments in sys.argv[1:], with simulated CPU devices.

    Warnings are errors in it, as they are in the tests.
    """
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def finish(*processes: subprocess.Popen[str]) -> list[tuple[str, str]]:
    """What each wrote to stdout and stderr, once all are done; none may fail."""
    said = [process.communicate(timeout=300) for process in processes]
    for process, (out, error) in zip(processes, said, strict=True):
        assert process.returncode == 0, out + error[-3000:]
        assert "Traceback" not in error, error[-3000:]  # of a thread
    return said
