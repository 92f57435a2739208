"""Settings of every test: CPU unless the caller chose otherwise, strict shapes, nothing cached."""

import importlib.util
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax is imported; subprocesses inherit it

import hypothesis
import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_enable_compilation_cache", False)
# A first example compiles, so no deadline; a failure must come back on every run.
hypothesis.settings.register_profile("house", deadline=None, derandomize=True)
hypothesis.settings.load_profile("house")


def _has_gpu() -> bool:
    return jax.default_backend() == "gpu"


def _has_libtpu() -> bool:
    return importlib.util.find_spec("libtpu") is not None


NEEDS = {
    "gpu": (_has_gpu, "needs an NVIDIA GPU; where there is one: JAX_PLATFORMS=cuda pytest -m gpu"),
    "tpu": (_has_libtpu, "needs libtpu: install the extra 'tpu'"),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run, and say how to run it."""
    for marker, (is_there, reason) in NEEDS.items():
        marked = [item for item in items if item.get_closest_marker(marker)]
        if marked and not is_there():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=reason))
