"""Event files and offline runs, read back; and writers that fail."""

import json
import struct
import sys
import time

import jax
import pytest
from PIL import Image
from test_train import TINY, run

from diffjax import plots
from diffjax.losses import LOG_SNR_EDGES
from diffjax.training import metrics, writers
from diffjax.training.recorder import Recorder

SIDES = "width", "height"


def events(workdir):
    """The events in event files: records of a length, a checksum and a protobuf."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    found = []
    for path in sorted(workdir.glob("tensorboard/events*")):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack_from("<Q", data)
            found.append(event_pb2.Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


def shown(workdir):
    """Scalars and sizes of pictures by name and step, without those that a restart discards."""
    found = {}
    for event in events(workdir):
        if event.HasField("session_log"):
            found = {k: v for k, v in found.items() if k[1] < event.step}
        for value in event.summary.value:
            if value.HasField("image"):
                shown = value.image.width, value.image.height
            elif value.HasField("histo"):
                assert list(value.histo.bucket_limit) == list(LOG_SNR_EDGES[1:])
                shown = list(value.histo.bucket)
            else:
                shown = value.simple_value
            found[value.tag, event.step] = shown
    return found


def as_shown(value):
    return [x or 0.0 for x in value] if isinstance(value, list) else value


def expected_of(workdir):
    return {
        (name, row["step"]): pytest.approx(as_shown(value), rel=1e-6)
        for row in metrics.read(workdir)
        for name, value in row.items()
    }


def record(workdir, names, start, steps, picture=None):
    """Record as a run does: a row at each step from `start`, and a picture at the end."""
    workdir.mkdir(exist_ok=True)
    (workdir / "config.json").write_text('{"seed": 3}')
    with Recorder(workdir, start, 9, writers=names) as recorder:
        for step in range(start + 1, steps + 1):
            recorder.write(step, 8, loss=1 / (start + step), loss_by_log_snr=[None, *range(23)])
        recorder.picture(steps, "samples", lambda: picture or Image.new("L", (30, 20)))


def test_tensorboard_shows_the_rows_and_discards_those_that_a_resumed_run_repeats(tmp_path):
    pytest.importorskip("tensorboardX")
    record(tmp_path / "run", ["tensorboard"], 0, 5)
    record(tmp_path / "run", ["tensorboard"], 3, 4)  # it was cut off at 5 and had saved 3
    found = shown(tmp_path / "run")
    assert found.pop(("pictures/samples", 4)) == (30, 20)
    assert found == expected_of(tmp_path / "run")
    assert found["loss", 4] == pytest.approx(1 / 7) and ("loss", 5) not in found


@pytest.mark.faults  # half a minute
def test_a_run_writes_to_tensorboard_and_its_pictures_are_those_on_disk(tmp_path):
    """train.py, resumed; process 0 of one."""
    pytest.importorskip("tensorboardX")
    argv = [*TINY, "--config.writers", "tensorboard", "--config.sample_every=20"]
    run(tmp_path / "run", *argv, "--config.steps=20")
    run(tmp_path / "run", *TINY, "--config.writers", "tensorboard", "--config.steps=40")
    found = shown(tmp_path / "run")
    for name in ("samples", "loss"):
        with Image.open(tmp_path / "run" / f"{name}.png") as picture:
            size = picture.size
        assert found.pop((f"pictures/{name}", 20)) == found.pop((f"pictures/{name}", 40)) == size
    assert found == expected_of(tmp_path / "run")


def logged(path):
    """The records of a W&B file: a header, then LevelDB's log format, in blocks of 32 KiB."""
    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 < len(data):
        if 2**15 - at % 2**15 < 7:  # too little of the block is left for a record
            at += 2**15 - at % 2**15
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def test_wandb_gets_the_rows_and_pictures_under_one_id(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    workdir = tmp_path / "run"
    record(workdir, ["wandb"], 0, 3)
    time.sleep(1.1)  # W&B names a run's files by the second
    record(workdir, ["wandb"], 2, 4)
    wandb.teardown()  # what its own process has still to write
    rows, runs, pictures = {}, set(), set()
    for path in sorted(workdir.glob("wandb/offline-run-*/*.wandb")):
        for data in logged(path):
            message = wandb_internal_pb2.Record.FromString(data)
            if message.HasField("run"):
                runs.add((message.run.run_id, message.run.project, message.run.display_name))
                config = {u.key: json.loads(u.value_json) for u in message.run.config.update}
                assert not config or config["seed"] == 3
            row = {}
            for item in message.history.item:
                row[item.key or "/".join(item.nested_key)] = item.value_json
            row = {k: json.loads(v) for k, v in row.items() if not k.startswith("_")}
            if "pictures/samples/width" in row:
                pictures.add((row["step"], *(row[f"pictures/samples/{k}"] for k in SIDES)))
            elif row:
                rows[row["step"]] = row
    assert runs == {((workdir / "wandb.id").read_text(), "diffjax", "run")}
    assert pictures == {(3, 30, 20), (4, 30, 20)}
    expected = metrics.read(workdir)
    assert [row["step"] for row in expected] == [1, 2, 3, 4]
    for row in expected:
        logged_row = rows[row["step"]]
        assert logged_row.pop("loss_by_log_snr/_type") == "histogram"
        assert logged_row.pop("loss_by_log_snr/bins") == list(LOG_SNR_EDGES)
        values = logged_row.pop("loss_by_log_snr/values")
        assert values == as_shown(row.pop("loss_by_log_snr"))
        assert logged_row == pytest.approx(row)


def broken(when):
    """A list of the calls that a writer got, and the writer, which fails at call `when`."""
    asked = []

    def fails(what):
        asked.append(what)
        if what == when:
            raise RuntimeError(f"cannot {what}")

    def open_(workdir, step):
        fails("open")
        return writers.Writer(
            lambda row: fails("row"), lambda *_: fails("picture"), lambda: fails("close")
        )

    return asked, writers.Kind(open_, "json", "none")


@pytest.mark.parametrize("when", ["open", "row", "picture", "close"])
def test_a_failing_writer_is_reported_once_and_the_run_continues(
    tmp_path, monkeypatch, capsys, when
):
    failing_calls, failing = broken(when)
    sound_calls, sound = broken(None)
    monkeypatch.setitem(writers.WRITERS, "failing", failing)
    monkeypatch.setitem(writers.WRITERS, "sound", sound)
    record(tmp_path / "run", ["failing", "sound"], 0, 2)
    assert sound_calls == ["open", "row", "row", "picture", "close"]
    assert failing_calls == sound_calls[: sound_calls.index(when) + 1]
    out = capsys.readouterr().out
    assert out.count(f"failing gets no more of this run: cannot {when}\n") == 1
    assert len(metrics.read(tmp_path / "run")) == 2
    assert (tmp_path / "run/samples.png").exists()


def test_other_processes_open_no_writer(tmp_path, monkeypatch):
    calls, kind = broken(None)
    monkeypatch.setitem(writers.WRITERS, "one", kind)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    record(tmp_path, ["one"], 0, 2)
    assert not calls and not list(tmp_path.glob("*.png"))


def test_a_writer_without_its_package_is_refused_before_the_run_starts(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="error: unknown writer 'tensorbord': one of tens"):
        run(tmp_path / "run", *TINY, "--config.writers", "tensorbord")
    kind = writers.Kind(writers.wandb, "no_such_package", "wandb")
    monkeypatch.setitem(writers.WRITERS, "wandb", kind)
    with pytest.raises(SystemExit, match=r"wandb needs no_such_package: .*'\.\[wandb\]'"):
        run(tmp_path / "run", *TINY, "--config.writers", "wandb")
    # A folder with the package's name, such as W&B creates, is no package.
    (tmp_path / "no_such_package").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="needs no_such_package"):
        writers.check("wandb")
    assert not (tmp_path / "run").exists()


def test_a_picture_that_cannot_be_drawn_is_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with Recorder(tmp_path, 0, 9) as recorder:
        recorder.picture(1, "loss", plots.progress, [])
    assert "not written: figures need matplotlib" in capsys.readouterr().out
