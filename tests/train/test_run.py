"""A run's folder: what is refused before anything is written, and what is read back."""

import dataclasses
import json
import os
import re
import signal

import jax
import numpy as np
import pytest
from etils import epath

from routing_jax.checkpoint import Checkpointer, CheckpointError
from routing_jax.evals.provenance import all_devices
from routing_jax.evals.results import read_result
from routing_jax.routers import BlockRouterConfig
from routing_jax.train import loop
from routing_jax.train.config import config_from_dict, config_to_dict
from routing_jax.train.data import TextConfig, batches
from routing_jax.train.presets import get_preset
from routing_jax.train.run import (
    describe,
    evaluate_run,
    find_start,
    least_usage,
    load_run,
    read_config,
    run,
    starting_parameters,
)
from routing_jax.train.step import init_state

from ..processes import finish, start_python


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def finished(tiny_run, tmp_path_factory):
    """A run's folder and its result; tests that change it work on a copy."""
    folder = tmp_path_factory.mktemp("run")
    return folder, run(tiny_run, folder, quiet=True)


def test_the_result_is_what_the_saved_parameters_do(tiny_run, finished):
    folder, result = finished
    config, params, step = load_run(folder)
    assert config == tiny_run
    assert result.device == all_devices()
    assert set(result.versions) == {
        "python", "routing_jax", "jax", "jaxlib", "flax", "optax", "numpy"
    }  # fmt: skip
    assert (step, result.steps, result.tokens) == (24, 24, 24 * 256)
    again = evaluate_run(config, params)
    for name in ("accuracy", "loss", "usage", "cost", "kv_cost", "sequences"):
        assert getattr(again, name) == getattr(result, name), name
    assert result.usage_per_layer == list(again.usage_per_layer)
    first = evaluate_run(config, params, first_place=True)
    assert result.accuracy_first_place == first.accuracy
    assert result.bits_per_byte is None
    assert [row["step"] for row in result.history] == list(range(1, 25))
    written = read_result(folder / "result.json")
    assert config_from_dict(written.config) == tiny_run
    assert written.accuracy == result.accuracy


def test_evaluation_reads_as_many_sequences_as_asked_at_any_length(tiny_run, finished):
    _, params, _ = load_run(finished[0], step=20)
    for length in (8, 16):
        assert evaluate_run(tiny_run, params, length=length).sequences >= 16
    with pytest.raises(ValueError, match=r"^length=64 must hold at most"):
        evaluate_run(tiny_run, params, length=64)


def test_a_configuration_goes_through_json_and_back():
    for name in ("recall-2048", "mqar-256-summary", "lm"):
        config = get_preset(name)
        assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config


def test_the_plan_tells_the_size_of_the_run(tiny_run):
    text = describe(tiny_run)
    assert re.search(r"recall, length 16, after 8\n", text)
    assert re.search(r"[\d,]+ parameters, layers routed, width 8\n", text)
    assert f"data 1 × fsdp 1 × tensor 1 on {all_devices()}" in text
    assert "256 a step, at most 24 steps" in text
    # 20.8 M parameters, their gradients and two moments take 318 MiB alone.
    memory = re.search(r"about ([\d,]+) MiB", describe(get_preset("lm")))[1]
    assert int(memory.replace(",", "")) > 318


def test_least_usage_is_the_queries_over_all_tokens_of_all_layers():
    assert least_usage(get_preset("recall-128")) == 1 / 256
    assert least_usage(get_preset("multi-query-256")) == 8 / 512
    assert least_usage(get_preset("lm")) is None


def test_a_run_starts_from_anothers_parameters(tiny_run, finished, tmp_path):
    folder, _ = finished
    _, params, _ = load_run(folder)
    second = tiny_run.replace(
        start_from=str(folder), curriculum__lengths=(), optimizer__learning_rate=1e-9
    )
    same = starting_parameters(second)
    jax.tree.map(np.testing.assert_array_equal, same, params)
    run(second, tmp_path / "second", quiet=True)
    _, after, _ = load_run(tmp_path / "second")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), after, params)
    with pytest.raises(ValueError, match=r"^start_from is '.*', whose model has other parameters"):
        starting_parameters(second.replace(model__width=16))
    with pytest.raises(ValueError, match=r"nowhere holds no run"):
        run(tiny_run.replace(start_from="nowhere"), tmp_path / "third", quiet=True)
    assert not (tmp_path / "third").exists()


def test_routers_that_the_other_run_lacks_are_drawn(tiny_run, finished):
    """A run goes on from a model with other routers, or with none."""
    folder, _ = finished
    router = dataclasses.replace(tiny_run.model.router, hidden=3)
    config = tiny_run.replace(start_from=str(folder), seed=5, model__router=router)
    params, (_, found, _) = starting_parameters(config), load_run(folder)
    drawn = init_state(config).params
    for path, leaf in jax.tree.leaves_with_path(params):
        source = drawn if "router" in jax.tree_util.keystr(path) else found
        for key in path:
            source = source[key.key]
        np.testing.assert_array_equal(leaf, source)


def test_a_gated_router_goes_on_from_the_projections_of_an_indexer(tiny_run, tmp_path, monkeypatch):
    """Only the bias of its gates, which an indexer lacks, is drawn."""
    blocks = BlockRouterConfig(kind="indexer", block_q=4, block_kv=8, width=2)
    indexer = tiny_run.replace(model__layers="block*2", model__blocks=blocks)
    params = init_state(indexer).params
    monkeypatch.setattr(
        "routing_jax.train.run.load_run", lambda folder, mesh: (indexer, params, None)
    )
    gated = dataclasses.replace(blocks, kind="learned")
    config = indexer.replace(start_from=str(tmp_path), seed=5, model__blocks=gated)
    found = {jax.tree_util.keystr(p): x for p, x in jax.tree.leaves_with_path(params)}
    start = jax.tree.leaves_with_path(starting_parameters(config))
    new = [(path, leaf) for path, leaf in start if jax.tree_util.keystr(path) not in found]
    assert [np.unique(leaf).tolist() for _, leaf in new] == [[gated.bias]] * 2
    for path, leaf in start:
        if (name := jax.tree_util.keystr(path)) in found:
            np.testing.assert_array_equal(leaf, found[name])


def test_a_folder_that_holds_a_run_is_refused_and_left_as_it_is(tiny_run, finished):
    folder, _ = finished
    before = contents(folder)
    for config, said in (
        (tiny_run, "holds this configuration already; pass --resume"),
        (tiny_run.replace(seed=9), "holds a run with another configuration; pass --resume"),
    ):
        with pytest.raises(ValueError, match=said):
            run(config, folder, quiet=True)
    assert contents(folder) == before


def test_resuming_with_another_model_is_refused_and_loses_nothing(tiny_run, finished):
    folder, _ = finished
    before = contents(folder)
    with pytest.raises(CheckpointError, match=r"is of another model: leaf \S+ has shape"):
        run(tiny_run.replace(model__width=16), folder, resume=True, quiet=True)
    assert contents(folder) == before


def test_where_to_start(tiny_run, finished, tmp_path):
    folder, _ = finished
    other = tiny_run.replace(optimizer__learning_rate=1e-4)
    assert find_start(tiny_run, tmp_path / "new", resume=False) is None
    assert find_start(tiny_run, tmp_path / "new", resume=True) is None
    assert not (tmp_path / "new").exists()
    assert find_start(tiny_run, folder, resume=True) == 24
    assert find_start(tiny_run, folder, resume=False, resume_step=15) == 15
    assert find_start(other, folder, resume=True) == 24
    with pytest.raises(CheckpointError, match=r"resume_step is 7; .* of steps \[15, 20, 24\]"):
        find_start(tiny_run, folder, resume=True, resume_step=7)
    with pytest.raises(ValueError, match=r"has later checkpoints, of steps \[20, 24\], with anoth"):
        find_start(other, folder, resume=True, resume_step=15)


def test_checkpoints_without_a_configuration_are_not_mixed_with_a_new_run(tiny_run, tmp_path):
    with Checkpointer(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(5, {"w": np.zeros(2)}, {})
    with pytest.raises(ValueError, match="holds a run"):
        find_start(tiny_run, tmp_path, resume=False)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"data": {"task": "rec', r"config\.json cannot be read: Unterminated string"),
        ("", r"config\.json cannot be read: Expecting value"),
        ("[1, 2]", r"config\.json cannot be read: this configuration was written by another ver"),
        ('{"seed": 1}', r"written by another version: 'data'"),
        ('{"data": {"task": "chess"}}', r"written by another version: 'chess'"),
        ('{"data": {"task": "recall", "size": 3}}', r"written by another version: .*'size'"),
        ('{"data": {"task": "recall", "length": 2}}', r"cannot be read: length=2 must be at leas"),
    ],
)
def test_a_damaged_or_foreign_configuration_is_named(tmp_path, text, said):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=said) as caught:
        read_config(epath.Path(tmp_path))
    assert str(tmp_path / "config.json") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_run_or_without_a_checkpoint_is_named(tiny_run, tmp_path):
    with pytest.raises(ValueError, match=f"^{tmp_path} holds no run"):
        load_run(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config_to_dict(tiny_run)))
    with pytest.raises(ValueError, match=f"^{tmp_path} holds no checkpoint yet"):
        load_run(tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mesh__data": 3}, "^mesh is data=3"),
        ({"curriculum__lengths": (2, 8)}, "^length=2 must be at least"),
        ({"data": TextConfig(source="nowhere", length=16)}, "^source='nowhere' does not exist"),
        ({"data": TextConfig(source="{empty}", length=16)}, "holds no text"),
        ({"data": TextConfig(source="{short}", length=16)}, "has 5 bytes in its validation split"),
    ],
)
def test_what_cannot_be_trained_leaves_no_folder(tiny_run, tmp_path, changes, said):
    (tmp_path / "empty").mkdir()
    (tmp_path / "short").mkdir()
    (tmp_path / "short" / "a.txt").write_text("alpha")
    (tmp_path / "short" / "b.txt").write_text("gamma")
    data = changes.get("data")
    if data is not None and "{" in data.source:
        source = data.source.format(empty=tmp_path / "empty", short=tmp_path / "short")
        changes = {"data": TextConfig(source=source, length=16)}
    with pytest.raises(ValueError, match=said):
        run(tiny_run.replace(**changes), tmp_path / "new", quiet=True)
    assert not (tmp_path / "new").exists()


@pytest.fixture
def stopped(tiny_run, tmp_path, monkeypatch):
    """The folder of a run that was stopped after step 17."""

    def stopping(*args, start_step=0, **kwargs):
        for step, batch in enumerate(batches(*args, start_step=start_step, **kwargs), start_step):
            if step == 16:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(loop, "batches", stopping)
        with pytest.raises(loop.Interrupted):
            run(tiny_run, tmp_path, quiet=True)
    return tmp_path


FULL_DISK = """
import resource, sys
from routing_jax import cli
from routing_jax.checkpoint import Checkpointer
from routing_jax.train import loop
folder, *flags = sys.argv[1:]
free = resource.getrlimit(resource.RLIMIT_FSIZE)
original = loop.batches
def batches(*args, **kwargs):
    for i, batch in enumerate(original(*args, **kwargs)):
        if i == 1:  # the kernel lets no file grow past the limit, as a full disk would
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, free[1]))
        yield batch
loop.batches = batches
for limit in (3_000, 10_000, 15_000):
    print("code", cli.main(["train", "recall-128", "--workdir", folder, *flags, "--resume"]))
    resource.setrlimit(resource.RLIMIT_FSIZE, free)
    print("newest", Checkpointer(f"{folder}/checkpoints").latest())
"""


def test_a_full_disk_is_one_sentence_and_what_was_saved_goes_on(
    tiny_run, tiny_flags, finished, stopped
):
    ((out, error),) = finish(start_python(FULL_DISK, stopped, *tiny_flags))
    # Met by a row of metrics, by a checkpoint, and by the result of a training that is done. orbax
    # may warn of what it finds of a save that was cut short.
    told = [line for line in error.splitlines() if not line.startswith("WARNING:absl:")]
    assert told == [
        f"error: {stopped}/metrics.jsonl can't be used: File too large.",
        f"error: the checkpoint of step 20 could not be written to {stopped}/checkpoints/step_20: "
        "File too large; those before it are untouched, the newest is of step 17",
        f"error: {stopped} can't be used: File too large.",
    ]
    said = [line for line in out.splitlines() if line.startswith(("code", "newest"))]
    assert said == ["code 2", "newest 17", "code 2", "newest 17", "code 2", "newest 24"]
    run(tiny_run, stopped, resume=True, quiet=True)
    rows, whole = ((path / "metrics.jsonl").read_text() for path in (stopped, finished[0]))
    assert rows == whole
    assert read_result(stopped / "result.json").accuracy == finished[1].accuracy
