"""A run that is asked to stop saves that step, and resumes as if it had not stopped."""

import os
import signal
import threading

import jax
import numpy as np
import pytest
from test_train import TINY, assert_bitwise_equal, interrupted, newest, rows_of, run

from diffjax import data
from diffjax.experiment import dataset
from diffjax.training import metrics, preemption
from diffjax.training.recorder import Recorder


def stopped_at(step, number, workdir, monkeypatch):
    """A run of 40 steps that gets a signal while it takes this step."""
    prefetch = data.prefetch

    def signalled(fetch, steps):
        for taken, batch in zip(steps, prefetch(fetch, steps), strict=True):
            yield batch
            if taken == step - 1:
                os.kill(os.getpid(), number)

    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with monkeypatch.context() as patch:
        patch.setattr(data, "prefetch", signalled)
        with pytest.raises(SystemExit) as stop:
            run(workdir, *TINY, "--config.steps=40")
    assert stop.value.code == preemption.RESUME == 75
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert newest(workdir)[0] == step


@pytest.mark.faults
def test_a_stopped_run_saves_that_step_and_goes_on_bit_for_bit(
    finished, tmp_path, monkeypatch, capsys
):
    """At step 27, between two log points: the means over both parts are the uninterrupted ones."""
    interrupted(finished, tmp_path / "parts")
    stopped_at(27, signal.SIGTERM, tmp_path / "parts", monkeypatch)
    out = capsys.readouterr().out
    assert "resumed from the checkpoint of step 20 of 40" in out
    assert "asked to stop: saved step 27" in out
    assert [row["step"] for row in metrics.read(tmp_path / "parts")] == [10, 20]

    stopped_at(33, signal.SIGINT, tmp_path / "parts", monkeypatch)
    assert "resumed from the checkpoint of step 27 of 40" in capsys.readouterr().out
    run(tmp_path / "parts", *TINY, "--config.steps=40")
    assert "resumed from the checkpoint of step 33 of 40" in capsys.readouterr().out
    assert rows_of(tmp_path / "parts") == rows_of(finished)
    (step_a, a), (step_b, b) = newest(finished), newest(tmp_path / "parts")
    assert step_a == step_b == 40
    assert_bitwise_equal(a, b)


def test_a_second_signal_is_not_caught():
    # Where the tests run in a shell's background, Ctrl-C is ignored to begin with.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with preemption.watch() as asked:
            assert not asked(0)
            os.kill(os.getpid(), signal.SIGINT)
            assert asked(1)
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_thread_of_a_notebook_can_train():
    """Python allows signal handlers in the main thread only."""
    answers = []

    def work():
        with preemption.watch() as asked:
            answers.append(asked(0))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert answers == [False]


def test_a_run_whose_launcher_has_died_saves_and_stops(monkeypatch, tmp_path):
    monkeypatch.setenv(preemption.PROGRESS, str(tmp_path / "sign"))
    monkeypatch.setenv(preemption.LAUNCHER, str(os.getppid()))
    with preemption.watch() as asked:
        assert not asked(0)
        monkeypatch.setattr(os, "getppid", lambda: 1)
        assert asked(1)


def test_only_damaged_rows_are_left_out(tmp_path):
    lines = [b'{"step": 1}', b'{"st\xff', b"3", b'{"step": 4}', b'{"step": 5, "lo']
    (tmp_path / metrics.ROWS).write_bytes(b"\n".join(lines))
    assert metrics.read(tmp_path) == [{"step": 1}, {"step": 4}]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"step": 7}', '{"step": 8, "window": []}'])
def test_a_damaged_window_counts_as_empty(tmp_path, text):
    (tmp_path / metrics.WINDOW).write_text(text)
    assert metrics.load_window(tmp_path, 7) == []


def test_each_step_reports_progress_to_the_launcher(tmp_path, monkeypatch):
    sign = tmp_path / "sign"
    monkeypatch.setenv(preemption.PROGRESS, str(sign))
    with preemption.watch() as asked:
        asked(0)
        os.utime(sign, (0, 0))
        asked(1)
        assert sign.stat().st_mtime > 0


@pytest.mark.faults
def test_no_more_batches_with_nonfinite_gradients_are_skipped_than_allowed(
    tmp_path, monkeypatch, capsys
):
    """Two batches hold a NaN; the run names them, and makes no update with them."""
    train_batch = data.train_batch

    def poisoned(examples, seed, step, **options):
        batch = train_batch(examples, seed, step, **options)
        if step in (7, 23):
            batch["x"][3] = np.nan
        return batch

    monkeypatch.setattr(dataset, "train_batch", poisoned)
    argv = [*TINY, "--config.steps=40"]
    run(tmp_path / "two", *argv, "--config.skip_nonfinite=2")
    out = capsys.readouterr().out
    for at, count in ((8, 1), (24, 2)):
        examples = data.batch_indices(0, at - 1, 1497, 16).tolist()
        assert f"skipped {count} of 2: grad_norm is nan, loss is nan at step {at}; " in out
        assert f"examples {examples}" in out
    rows = metrics.read(tmp_path / "two")
    assert [row.get("skipped", 0) for row in rows] == [1, 0, 1, 0]
    numbers = [x for row in rows for value in row.values() for x in np.ravel(value)]
    assert np.isfinite([x for x in numbers if x is not None]).all()
    _, arrays = newest(tmp_path / "two")
    assert int(arrays["step"]) == 40
    assert set(updates_counted(arrays["opt_state"])) == {38}

    # Batches that were skipped before the run stopped count after it resumes.
    interrupted(tmp_path / "two", tmp_path / "one")
    with pytest.raises(SystemExit, match="error: grad_norm is nan, loss is nan at step 24"):
        run(tmp_path / "one", *argv, "--config.skip_nonfinite=1")
    assert newest(tmp_path / "one")[0] == 20


def updates_counted(tree):
    """The number of updates that each part of the optimiser has counted."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [int(x) for path, x in leaves if "count" in jax.tree_util.keystr(path)]


def test_rows_wait_while_the_metrics_file_cannot_be_written(tmp_path, capsys):
    """The recorder keeps rows, in order and whole, until it can write them."""
    with Recorder(tmp_path, 0, 30) as recorder:
        recorder.write(10, 16, loss=1.0)
        path = tmp_path / metrics.ROWS
        path.rename(tmp_path / "away")
        path.mkdir()
        recorder.write(20, 16, loss=2.0)
        assert "not written: " in capsys.readouterr().out.replace("\n", " ")
        path.rmdir()
        (tmp_path / "away").rename(path)
        recorder.write(30, 16, loss=3.0)
    assert [row["loss"] for row in metrics.read(tmp_path)] == [1.0, 2.0, 3.0]
