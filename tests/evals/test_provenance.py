"""A training's result and a benchmark's name their devices and versions from one place."""

import os
import platform
from types import SimpleNamespace

import jax
import pytest

from routing_jax.evals import provenance
from routing_jax.evals.benchmarks.environment import environment
from routing_jax.evals.provenance import all_devices, first_device, versions


def test_versions_are_those_of_what_is_installed():
    assert versions(["no-such-package", "jax"]) == {
        "python": platform.python_version(),
        "jax": jax.__version__,
    }


@pytest.mark.parametrize(
    ("backend", "count", "together"),
    [("gpu", 1, "NVIDIA H200"), ("gpu", 8, "8 x NVIDIA H200"), ("cpu", 2, "2 x CPU (z80)")],
)
def test_a_run_counts_its_devices_and_a_benchmark_names_the_one_it_timed(
    backend, count, together, monkeypatch
):
    device = SimpleNamespace(device_kind="NVIDIA H200" if backend == "gpu" else "cpu")
    monkeypatch.setattr(provenance.jax, "default_backend", lambda: backend)
    monkeypatch.setattr(provenance.jax, "devices", lambda: [device] * count)
    monkeypatch.setattr(provenance.jax, "device_count", lambda: count)
    monkeypatch.setattr(provenance.platform, "machine", lambda: "z80")
    assert all_devices() == together
    assert first_device() == ("NVIDIA H200" if backend == "gpu" else environment()["device"])
    if backend == "cpu":
        assert first_device().endswith(f", {os.cpu_count()} cores")
