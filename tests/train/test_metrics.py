"""Metrics: a file that reads as if the run had never stopped, events, and a line a step."""

import json
import struct

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from routing_jax.train import metrics
from routing_jax.train.metrics import MetricsWriter, Progress, read_metrics

VALUES = {"loss": 0.5, "usage_per_layer": [0.25, 1.0], "length": 8}
SHOWN = {"length": 8, "loss": 1.5, "accuracy": 0.25, "lambda": 0.1, "usage": 0.5, "cost": 0.75}


def events(folder):
    """Every event below a folder, file by file: a length, its CRC, the event, its CRC."""
    found = []
    for path in sorted((folder / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    return found


def scalars(folder):
    return [(e.step, v.tag, v.simple_value) for e in events(folder) for v in e.summary.value]


def test_rows_and_events_hold_what_was_written(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(3, VALUES)
        assert read_metrics(tmp_path) == [{"step": 3, **VALUES}]  # at once, not at the end
        writer.flush()
        assert scalars(tmp_path) == [
            (3, "loss", 0.5),
            (3, "usage_per_layer/0", 0.25),
            (3, "usage_per_layer/1", 1.0),
            (3, "length", 8.0),
        ]


def test_a_resumed_run_drops_what_came_after_its_checkpoint(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for step in (1, 2, 3, 4):
            writer.write(step, {"loss": 1.0 / step})
    with MetricsWriter(tmp_path, resume_step=2) as writer:
        writer.write(3, {"loss": 9.0})
    assert [(row["step"], row["loss"]) for row in read_metrics(tmp_path)] == [
        (1, 1.0),
        (2, 0.5),
        (3, 9.0),
    ]
    # The events of the first part are still there, and TensorBoard is told to hide those from 3 on.
    starts = [e.step for e in events(tmp_path) if e.session_log.status == SessionLog.START]
    assert starts == [1, 3]
    assert len(scalars(tmp_path)) == 5


def test_a_torn_last_line_is_dropped(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.0}]
    with MetricsWriter(tmp_path, resume_step=5) as writer:
        writer.write(6, {"loss": 1.0})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert [json.loads(line)["step"] for line in text.splitlines()] == [1, 6]


@pytest.mark.parametrize("damaged", [b'{"step": 2, "lo', b"5", b'{"loss": 1}', b"\xff\xfe", b""])
def test_a_damaged_line_before_the_last_is_named_and_nothing_is_lost(tmp_path, damaged):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + damaged + b'\n{"step": 3}\n')
    before = path.read_bytes()
    with pytest.raises(ValueError, match=rf"^{path} is damaged in line 2, .*; mend or remove that"):
        MetricsWriter(tmp_path, resume_step=5)
    assert path.read_bytes() == before
    path.write_bytes(b'{"step": 1}\n{"step": 3}\n')
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 3]


def test_a_folder_without_metrics_has_none(tmp_path):
    assert read_metrics(tmp_path) == []


def test_progress_is_a_line_a_step_and_nothing_when_quiet(capsys):
    with Progress(100) as progress:
        progress.show(20, SHOWN, 3.25)
    assert capsys.readouterr().out == (
        "step     20  length     8  loss 1.5000  accuracy  25.00%  λ 0.100  usage  50.000%  "
        "cost 0.7500     3.2 s\n"
    )
    with Progress(100, quiet=True) as progress:
        progress.show(20, SHOWN, 3.25)
    assert capsys.readouterr().out == ""


def test_progress_is_a_bar_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(metrics.sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    with Progress(100, start=10) as progress:
        progress.show(20, SHOWN, 3.25)
    shown = capsys.readouterr().out
    assert "20/100" in shown
    assert "loss 1.5000" in shown
