"""A published model trained on a text: what it begins as, what is written, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from routing_jax.models import Decoder
from routing_jax.models.pretrained import load_pretrained, load_tokenizer
from routing_jax.routers import SparseModeConfig
from routing_jax.train.base import with_base
from routing_jax.train.data import batches
from routing_jax.train.finetune import with_published
from routing_jax.train.metrics import read_metrics
from routing_jax.train.presets import get_preset
from routing_jax.train.run import load_run, run

from .published_folder import write_model, write_text


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finetune")
    return get_preset("finetune").replace(
        start_from=str(write_model(folder / "model", num_hidden_layers=1)),
        data__source=str(write_text(folder)),
        data__length=64,
        data__validation_fraction=0.2,
        model__dtype="float32",
        model__remat=False,
        curriculum__hold_steps=20,
        optimizer__learning_rate=3e-3,
        optimizer__warmup_steps=2,
        batch_tokens=4 * 64,
        eval_sequences=8,
        log_every=1,
    )


@pytest.fixture(scope="module")
def made(config, tmp_path_factory, compile_cache):
    folder = tmp_path_factory.mktemp("run")
    return folder, run(config, folder, quiet=True)


def loss(path, config):
    """Mean nats of the first training batch, as the model in a folder has it."""
    model, params = load_pretrained(path, dtype="float32")
    batch = next(batches(config.data, split="train", seed=0, batch_size=4))
    logits = jax.jit(Decoder(model).apply)({"params": params}, batch.tokens).logits
    told = jnp.take_along_axis(jax.nn.log_softmax(logits), batch.targets[..., None], axis=-1)
    return -float(told.mean())


def test_training_begins_with_the_model_and_all_of_it_moves(config, made):
    folder, result = made
    rows = read_metrics(folder)
    whole = with_published(config)
    assert whole.model.layers == "full*1"
    assert rows[0]["loss"] == pytest.approx(loss(config.start_from, whole), rel=1e-4)
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"]
    assert result.usage == 1
    assert (result.cost, result.sequences) == (1, 8)
    before = load_pretrained(config.start_from, dtype="float32").params
    after = load_pretrained(folder / "model", dtype="float32").params
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), before, after)
    assert min(jax.tree.leaves(moved)) > 1e-4


def test_what_was_trained_is_a_folder_like_the_one_it_began_as(config, made):
    folder, _ = made
    _, params, step = load_run(folder)
    assert step == 20
    again = load_pretrained(folder / "model", dtype="float32")
    jax.tree.map(np.testing.assert_array_equal, again.params, params)
    text = "line 17 says 3"
    ids = [load_tokenizer(path).encode(text).ids for path in (folder / "model", config.start_from)]
    assert ids[0] == ids[1]
    flux = get_preset("flux").replace(base=str(folder / "model"), data__length=512)
    routed = with_base(flux.replace(model__sparse=SparseModeConfig(window=256)))
    assert routed.model.layers == "layer*1"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"start_from": ""}, "start_from is ''; a task in the tokens of a published model starts"),
        ({"start_from": "nowhere"}, "nowhere is neither a folder with config.json nor a GGUF"),
        ({"data__length": 1024, "batch_tokens": 4096}, "data.length is 1024; .* at most 512 tok"),
        ({"base": "model"}, "base is 'model' and the task TokenConfig; layer routers are trained"),
        ({"data__source": "nowhere.txt"}, "source='nowhere.txt' does not exist: give"),
    ],
)
def test_what_will_not_do_is_refused_before_anything_is_made(config, changes, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        run(config.replace(**changes), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_run_that_could_not_write_its_model_is_refused_before_it_trains(config, tmp_path):
    (tmp_path / "model").mkdir()
    index = tmp_path / "model" / "model.safetensors.index.json"
    index.write_text("{}")
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json, of a model in sev"):
        run(config, tmp_path, quiet=True)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [index]
