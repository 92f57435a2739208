import pytest
from jax.experimental.pallas import tpu as pltpu

from routing_jax.kernels.decode.mosaic_tpu import tiling

from .decode_suite import DecodeSuite


@pytest.fixture
def interpreted(monkeypatch):
    """Kernels run on the CPU; what they read out of bounds or unwritten is an error or nan."""
    monkeypatch.setattr(tiling, "tpu_refusal", lambda: None)
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()):
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("interpreted")
class TestMosaicTpu(DecodeSuite):
    implementation = "mosaic_tpu"
    dtypes = ("float32", "bfloat16")
