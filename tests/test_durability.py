"""Nothing is lost in silence: each fault here once ended with status 0 or with wrong results."""

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import test_sample
from test_images import draw_folder
from test_train import TINY, assert_bitwise_equal, newest, run

from catalogue import slow
from diffjax import checkpoint, plots
from diffjax.data import images
from diffjax.evaluation import sampling
from diffjax.experiment import run_directory
from diffjax.experiment.command_line import error_exit
from diffjax.training import checkpoints, launch, metrics, orbax, preemption
from diffjax.training.checkpoints import Checkpoints
from diffjax.training.files import Lock, replacing
from diffjax.training.recorder import Recorder

ROOT = Path(__file__).parents[1]
STATE = {"step": jnp.int32(5), "w": jnp.arange(12.0).reshape(3, 4)}


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "copied")


def save(directory, *steps):
    with Checkpoints(directory) as saving:
        for step in steps:
            saving.save(step, STATE)


@pytest.mark.parametrize("name", ["a[1]", "a*b", "a?b"])
def test_a_path_that_orbax_cannot_read_is_refused(tmp_path, monkeypatch, name):
    with pytest.raises(SystemExit, match=r"Orbax cannot read a path with any of \[\*\?"):
        run(tmp_path / name, *TINY, "--config.steps=20")
    assert not (tmp_path / name).exists()


def test_a_seal_certifies_arrays_that_were_looked_at(tmp_path, monkeypatch, capsys):
    """Whatever the reason is that Orbax loses an array, the checkpoint is not sealed."""
    monkeypatch.setattr(orbax, "UNREADABLE", "")
    (tmp_path / "a[1]").mkdir()
    with pytest.raises(checkpoints.UnwrittenError, match=r"Orbax has not stored 2 arrays, among"):
        save(tmp_path / "a[1]" / "checkpoints", 5)
    assert checkpoints.list_checkpoints(tmp_path / "a[1]" / "checkpoints") == []
    for name in ("a{b}", "é", "a b", "a#b", "a%20b"):
        save(tmp_path / name / "checkpoints", 5)
        restored = Checkpoints(tmp_path / name / "checkpoints").restore(STATE)
        assert_bitwise_equal(restored, STATE)


@pytest.mark.faults
def test_a_checkpoint_under_the_name_of_another_step_is_damage(copied, capsys):
    shutil.copytree(copied / "checkpoints/20", copied / "checkpoints/100")
    run(copied, *TINY, "--config.steps=60")
    assert "100 is damaged: it is the checkpoint of step 20" in capsys.readouterr().out
    assert newest(copied)[0] == 60


def test_a_checkpoint_of_version_0_1_under_the_name_of_another_step_is_refused(copied):
    """Its seal does not say which step it is of; its state does."""
    wrong = shutil.copytree(copied / "checkpoints/20", copied / "checkpoints/100")
    seal = json.loads((wrong / "seal.json").read_text())
    (wrong / "seal.json").write_text(json.dumps(seal["files"]))
    with pytest.raises(SystemExit, match="100 is the checkpoint of step 20"):
        run(copied, *TINY, "--config.steps=160")


def test_a_save_that_is_refused_is_an_error(tmp_path, monkeypatch):
    save(tmp_path / "once", 5, 10, 10)  # the last one is the one before: there is nothing to do
    with pytest.raises(checkpoints.UnwrittenError, match="exists, and is not of this run"):
        save(tmp_path / "run", 5, 10, 5)
    monkeypatch.setattr(ocp.CheckpointManager, "save", lambda *_, **__: False)
    with pytest.raises(checkpoints.UnwrittenError, match="Orbax has refused it"):
        save(tmp_path / "other", 5)


def test_a_directory_in_use_is_refused_and_says_by_whom(finished, tmp_path):
    (tmp_path / "run").mkdir()
    code = (
        "import sys, time; from pathlib import Path; from diffjax.training.files import Lock; "
        f"lock = Lock(Path({str(tmp_path / 'run')!r})); print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(SystemExit, match=f"run is in use by process {other.pid} on "):
            run(tmp_path / "run", *TINY, "--config.steps=20")
        other.kill()
    Lock(tmp_path / "run").release()  # the kernel has released it
    Lock(finished).release()  # and so has a run, at its end


def test_a_process_stops_if_its_launcher_died_before_it_looked(monkeypatch):
    """The launcher hands its identity over: the parent's, read later, may be another process."""
    monkeypatch.setenv(preemption.LAUNCHER, str(os.getppid()))
    with preemption.watch() as should_stop:
        assert not should_stop(0)
    monkeypatch.setenv(preemption.LAUNCHER, "1234567")
    with preemption.watch() as should_stop:
        assert should_stop(0)


@pytest.mark.faults  # half a minute
def test_other_data_is_refused_and_says_what_differs(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (64, 8, 8), np.uint8)
    argv = [*TINY, "--config.data.name=npz", f"--config.data.path={tmp_path}/a.npz"]
    argv += ["--config.model.labels=0", "--config.model.null_label=False"]
    argv += ["--config.sampling.guidance", "--config.batch_size=8"]
    np.savez(tmp_path / "a.npz", x_train=x, x_test=x[:10])
    run(tmp_path / "run", *argv, "--config.steps=20")
    for changed, differs in (
        (np.where(np.arange(64)[:, None, None] == 7, 255 - x, x), r"train\.x: the run"),
        (x[:60], r"train\.n: the run was trained on 64, now it is 60"),
    ):
        np.savez(tmp_path / "a.npz", x_train=changed, x_test=x[:10])
        with pytest.raises(SystemExit, match=f"holds a run of another data(.|\n)*{differs}"):
            run(tmp_path / "run", *argv, "--config.steps=40")
    np.savez(tmp_path / "b.npz", x_train=x, x_test=x[:10])  # the same data elsewhere
    run(tmp_path / "run", *argv, f"--config.data.path={tmp_path}/b.npz", "--config.steps=40")


@pytest.mark.faults  # half a minute
def test_a_replaced_file_of_a_folder_is_noticed(tmp_path):
    draw_folder(tmp_path / "images")
    argv = ["--config=configs/folder.py:smoke", f"--config.data.path={tmp_path}/images"]
    argv += ["--config.batch_size=8"]
    run(tmp_path / "run", *argv, "--config.steps=20")
    file = next(p for p in sorted((tmp_path / "images").rglob("*.png")))
    os.utime(file, (1, 1))
    with pytest.raises(SystemExit, match=r"(train|test)\.times: the run was trained on"):
        run(tmp_path / "run", *argv, "--config.steps=40")


@pytest.mark.faults  # half a minute
def test_a_run_whose_directory_was_renamed_does_not_end_well(tmp_path, capsys, monkeypatch):
    """Orbax would make the folder anew, with checkpoints in it that nobody finds."""
    save = Checkpoints.save

    def renaming(self, step, *args):
        if step == 40:
            self.wait()
            (tmp_path / "run").rename(tmp_path / "renamed")
        save(self, step, *args)

    monkeypatch.setattr(Checkpoints, "save", renaming)
    with pytest.raises(SystemExit, match="has been renamed, removed or replaced"):
        run(tmp_path / "run", *TINY, "--config.steps=60")
    assert not (tmp_path / "run").exists()
    assert [p.name for p in run_directory.list_checkpoints(tmp_path / "renamed")] == ["20"]


@pytest.mark.parametrize("damage", ["deleted", *slow("emptied", "spoilt")])
def test_the_config_is_recovered_from_a_checkpoint(copied, capsys, damage):
    before = (copied / "config.json").read_text()
    if damage == "deleted":
        (copied / "config.json").unlink()
    else:
        (copied / "config.json").write_text("" if damage == "emptied" else '{"model": 3}')
    assert checkpoint.load(copied)[2] == run_directory.read_config(copied)
    assert "instead" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="holds a run of another config"):
        run(copied, *TINY, "--config.target=v", "--config.steps=60")
    run(copied, *TINY, "--config.steps=40")
    assert (copied / "config.json").read_text() == before


def test_what_a_seal_relies_on_is_on_the_disk_before_it(tmp_path, monkeypatch):
    """In the order data, seal, commit."""
    order = []
    for module in (checkpoints, checkpoints.write_text.__globals__["__name__"]):
        module = sys.modules[module] if isinstance(module, str) else module
        monkeypatch.setattr(module, "sync", lambda path: order.append(Path(path)))
    with Checkpoints(tmp_path / "checkpoints") as saving:
        saving.save(5, STATE)
    path = tmp_path / "checkpoints/5"
    seal = next(i for i, p in enumerate(order) if p.name.startswith("seal.json."))
    for name in json.loads((path / "seal.json").read_text())["files"]:
        assert order.index(path / name) < seal
        assert order.index((path / name).parent) < seal
    assert path in order[seal:]


def draw(workdir, out):
    return test_sample.draw(workdir, out, batch_size=8)[0].x


@pytest.fixture(scope="module")
def drawn(finished, tmp_path_factory):
    return draw(finished, tmp_path_factory.mktemp("drawn") / "a.npz")


def spoil(parts, how):
    files = sorted(parts.glob("*.npy"))
    assert len(files) == 2
    if how == "deleted":
        files[0].unlink()
    elif how == "renamed":
        files[0].rename(parts / "000000012.npy")
    elif how == "cut":
        files[1].write_bytes(files[1].read_bytes()[:-100])
    elif how == "flipped":
        raw = bytearray(files[0].read_bytes())
        raw[-5] ^= 1
        files[0].write_bytes(raw)
    elif how == "no manifest":
        (parts / sampling.MANIFEST).unlink()


@pytest.mark.parametrize(
    "how", ["nothing", *slow("flipped", "cut", "deleted", "renamed", "no manifest")]
)
def test_parts_that_do_not_tile_are_drawn_again(
    finished, drawn, tmp_path, monkeypatch, capsys, how
):
    out = tmp_path / "a.npz"
    part = sampling.draw

    def two_parts(*args):
        parts = part(*args)
        yield next(parts)
        yield next(parts)
        raise KeyboardInterrupt

    monkeypatch.setattr(sampling, "draw", two_parts)
    with pytest.raises(KeyboardInterrupt):
        draw(finished, out)
    monkeypatch.setattr(sampling, "draw", part)
    spoil(out.with_suffix(".parts"), how)
    capsys.readouterr()
    np.testing.assert_array_equal(draw(finished, out), drawn)
    said = [line for line in capsys.readouterr().out.splitlines() if "drawn again" in line]
    first = {"nothing": None, "cut": 8}.get(how, 0)
    which = "" if first is None else f"a.parts: samples {first} to 15 are damaged, and are drawn"
    assert len(said) == (first is not None) and which in "".join(said)


def test_a_damaged_part_is_replaced_by_one_of_another_size(tmp_path):
    x = np.arange(24, dtype=np.float32)[:, None]
    for start in (0, 8, 16):
        sampling.save_part(tmp_path, start, x[start : start + 8])
    assert sampling.count_parts(tmp_path) == sampling.count_written(tmp_path) == 24
    (tmp_path / "000000016.npy").write_bytes(b"cut")
    assert sampling.count_parts(tmp_path) == 8 and sampling.count_written(tmp_path) == 24
    sampling.save_part(tmp_path, 8, x[8:20])
    assert sampling.count_parts(tmp_path) == 20
    sampling.save_part(tmp_path, 20, x[20:])
    np.testing.assert_array_equal(np.concatenate([*sampling.read_parts(tmp_path)]), x)


def test_two_writers_at_once_each_leave_a_whole_file(tmp_path):
    path = tmp_path / "numbers.txt"
    with replacing(path) as one, replacing(path) as other:
        one.write_text("one")
        other.write_text("other")
    assert path.read_text() == "one" and [*tmp_path.iterdir()] == [path]


class Cut:
    """A picture whose file is cut off in the middle of being written."""

    def save(self, path, **_):
        Path(path).write_bytes(b"half of it")
        raise OSError("No space left on device")


def test_a_picture_that_cannot_be_written_leaves_the_old_one(
    finished, tmp_path, monkeypatch, capsys
):
    with Recorder(tmp_path, 0, 9) as recorder:
        (tmp_path / "loss.png").write_bytes(b"old")
        recorder.picture(9, "loss", Cut)
        recorder.picture(9, "samples", plots.samples, np.zeros((4, 2, 3, 4, 1)), 0)  # volumes
    assert (tmp_path / "loss.png").read_bytes() == b"old"
    assert "no picture samples.png (samples of shape (4, 2, 3, 4, 1)" in capsys.readouterr().out
    out = tmp_path / "a.npz"
    (tmp_path / "a.png").write_bytes(b"old")
    monkeypatch.setattr(plots, "samples", lambda *_: Cut())
    with pytest.raises(SystemExit, match="No space left"):
        draw(finished, out)
    assert (tmp_path / "a.png").read_bytes() == b"old"
    assert len(sampling.read(out)[0].x) == 20


@pytest.mark.faults
def test_a_finished_file_is_checked_wherever_it_is_read(finished, drawn, tmp_path):
    out = tmp_path / "a.npz"
    draw(finished, out)
    with np.load(out) as file:
        arrays = dict(file)
    for changed in (
        {"x": arrays["x"][:-1], "index": arrays["index"][:-1]},
        {"index": arrays["index"][::-1]},
        {"x": np.where(arrays["x"] == arrays["x"].max(), 0, arrays["x"])},
    ):
        np.savez(out, **(arrays | changed))
        with pytest.raises(ValueError, match=r"a\.npz is damaged"):
            sampling.read(out)
        with pytest.raises(SystemExit, match=r"a\.npz is damaged"):
            draw(finished, out)


def script(*argv, **options):
    """train.py in a process of its own, on one device."""
    return subprocess.Popen(
        [sys.executable, "train.py", *TINY, *argv],
        cwd=ROOT,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"},
        text=True,
        **options,
    )


@pytest.mark.faults  # half a minute
def test_a_log_that_cannot_be_written_does_not_stop_the_run(tmp_path):
    """Its disk is full, or the reader of the pipe has ended; and its directory has an accent."""
    argv = ["--config.steps=20", f"--workdir={tmp_path / 'é'}"]
    ascii_only = {"PYTHONIOENCODING": "ascii", "JAX_NUM_CPU_DEVICES": "1"}
    with open("/dev/full", "w") as full:
        command = [sys.executable, "train.py", *TINY, *argv]
        done = subprocess.run(command, cwd=ROOT, stdout=full, env=os.environ | ascii_only)
    assert done.returncode == 0
    assert [p.name for p in run_directory.list_checkpoints(tmp_path / "é")] == ["20"]
    argv = ["--config.steps=40", f"--workdir={tmp_path / 'é'}"]
    with script(*argv, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.wait() == 0
    assert [p.name for p in run_directory.list_checkpoints(tmp_path / "é")] == ["20", "40"]


def test_what_is_not_a_regular_file_is_refused(copied, tmp_path):
    """Opening a named pipe would wait for ever."""
    for name in ("metrics.jsonl", "window.json"):
        (copied / name).unlink(missing_ok=True)
        os.mkfifo(copied / name)
    assert metrics.read(copied) == metrics.load_window(copied, 40) == []
    (copied / "config.json").unlink()
    os.mkfifo(copied / "config.json")
    run_directory.read_config(copied)  # recovered
    array = next((copied / "checkpoints/40/default").rglob("d/*"))
    array.unlink()
    os.mkfifo(array)
    assert "is missing" in checkpoints.damage_of(copied / "checkpoints/40")
    for name in ("a.npz", "a.png"):
        os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match="not a regular file"):
        sampling.read(tmp_path / "a.npz")
    with pytest.raises(images.UnreadableError, match="not a regular file"):
        images.read(tmp_path / "a.png")


@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1", "SIGTERM", "SIGINT"])
def test_every_signal_that_asks_to_stop_is_caught(name):
    number = getattr(signal, name)
    before = signal.getsignal(number)
    with preemption.watch() as should_stop:
        assert not should_stop(0)
        os.kill(os.getpid(), number)
        assert should_stop(1)
    assert signal.getsignal(number) == before
    with pytest.raises(SystemExit) as stop, preemption.ending_at_once():
        signal.raise_signal(number)
    assert stop.value.code == preemption.RESUME
    assert signal.getsignal(number) == before


@pytest.mark.faults
def test_a_signal_during_the_last_drawing_ends_the_run_at_once(tmp_path, monkeypatch):
    """Everything is saved by then, and the same command draws again."""
    monkeypatch.setattr(
        plots, "samples", lambda *_: (os.kill(os.getpid(), signal.SIGTERM), time.sleep(9))
    )
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "run", *TINY, "--config.steps=20")
    assert stop.value.code == preemption.RESUME
    assert newest(tmp_path / "run")[0] == 20


def test_load_reads_the_newer_checkpoint_if_the_run_deletes_one_meanwhile(copied, monkeypatch):
    read, times = checkpoints.read, []

    def deleting(path, *fields):
        times.append(path.name)
        if len(times) == 1:
            shutil.move(path, path.with_name("60"))  # deleted; and there is a newer one
            seal = checkpoints.read_seal(path.with_name("60"))
            checkpoints.write_seal(path.with_name("60"), seal._replace(step=60))
        return read(path, *fields)

    monkeypatch.setattr(checkpoints, "read", deleting)
    checkpoint.load(copied)
    assert times == ["40", "60"]


def test_load_does_not_hide_an_error_that_is_not_a_deletion(copied, monkeypatch):
    def broken(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(checkpoints, "read", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        checkpoint.load(copied)


def launched(tmp_path, code, monkeypatch, **options):
    """The status of a launcher of one process that runs this code, and what it printed."""
    monkeypatch.setattr(launch, "BACK_OFF", 0.01)
    (tmp_path / "script.py").write_text(code)
    options = launch.Options(1, **options)
    with restored_signals():
        return launch.launch(options, [str(tmp_path / "script.py")])


@contextlib.contextmanager
def restored_signals():
    """The launcher replaces handlers of signals."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    former = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def test_the_launcher_does_not_believe_the_wall_clock(tmp_path, monkeypatch):
    """A clock that is set forward, or a laptop that slept, is no sign of a process that hangs."""
    clock = time.time
    monkeypatch.setattr(time, "time", lambda: clock() + 1e6)
    code = "import time; time.sleep(1)"
    assert launched(tmp_path, code, monkeypatch, patience=30.0) == 0


def test_the_launcher_survives_the_loss_of_its_progress_file(tmp_path, monkeypatch):
    code = "import os, time; os.remove(os.environ['DIFFJAX_PROGRESS']); time.sleep(1)"
    assert launched(tmp_path, code, monkeypatch) == 0


@pytest.mark.faults
def test_restarts_are_counted_by_time(tmp_path, monkeypatch, capsys):
    """Three in a run's life would be few for a month, and many for a minute."""
    code = (
        f"import pathlib, sys, time; file = pathlib.Path({str(tmp_path / 'count')!r}); "
        "n = len(file.read_text()) if file.exists() else 0; file.write_text('x' * (n + 1)); "
        "time.sleep(0.4); sys.exit(70 if n < 4 else 0)"
    )
    assert launched(tmp_path, code, monkeypatch, restarts=2) == 70
    assert "giving up" in capsys.readouterr().out
    (tmp_path / "count").unlink()
    assert launched(tmp_path, code, monkeypatch, restarts=2, per=0.5) == 0


def test_children_that_a_dead_process_left_behind_are_ended(tmp_path, monkeypatch):
    code = (
        "import pathlib, subprocess, sys; "
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(100)']); "
        f"pathlib.Path({str(tmp_path / 'child')!r}).write_text(str(child.pid)); sys.exit(2)"
    )
    assert launched(tmp_path, code, monkeypatch) == 2
    child = int((tmp_path / "child").read_text())
    for _ in range(50):
        status = Path(f"/proc/{child}/stat")
        if not status.exists() or status.read_text().split()[2] == "Z":
            break
        time.sleep(0.1)
    else:
        pytest.fail("the child lives on")


def test_an_error_of_the_system_is_not_the_users(tmp_path, monkeypatch, capsys):
    """The launcher starts a program again that ended with 70, and not one that ended with 1."""
    draw_folder(tmp_path, n=1)
    picture = tmp_path / "00.png"
    for number, status in ((errno.EIO, 70), (errno.ESTALE, 70), (errno.EACCES, None)):
        failing = OSError(number, os.strerror(number), str(picture))
        monkeypatch.setattr(images.Image, "open", mock.Mock(side_effect=failing))
        with pytest.raises(SystemExit) as stop, error_exit():
            images.read(picture)
        if status is None:
            assert "not a readable image" in str(stop.value.code)
        else:
            assert stop.value.code == status
            assert os.strerror(number) in capsys.readouterr().err
    assert {1, 2} == set(launch.REFUSED)


def test_threads_that_wait_do_not_keep_a_failed_process():
    """As Orbax's do after failed saves: for five minutes."""
    code = """
import threading, time
from diffjax.training import distributed
distributed.GRACE = 0.5
with distributed.failing_fast():
    threading.Thread(target=time.sleep, args=(60,)).start()
    raise SystemExit("error: the last checkpoint could not be written")
"""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=50
    )
    assert done.returncode == 1 and time.monotonic() - began < 30
    assert "could not be written" in done.stderr
    assert "ended with status 1: threads were still waiting" in done.stderr
