"""Runs on a store, by a server of Google's protocol on this machine, beside runs on a disk."""

import ast
import concurrent.futures
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import buckets
import jax
import numpy as np
import pytest

from diffjax import checkpoint
from diffjax.data import convert, load
from diffjax.experiment import copies
from diffjax.experiment.run_directory import list_checkpoints
from diffjax.training import checkpoints, files, lease, orbax, store
from diffjax.training.checkpoints import Checkpoints
from diffjax.training.mirror import Mirror
from diffjax.training.store import StoreError, as_path

ROOT = Path(__file__).parents[1]
BUCKET = f"gs://{buckets.BUCKET}"


@pytest.fixture(scope="module")
def server():
    """A running server, which this process finds too."""
    port = buckets.free_port()
    with buckets.running(port), pytest.MonkeyPatch.context() as patch:
        for name, value in buckets.environment(port).items():
            patch.setenv(name, value)
        store._filesystem.cache_clear()
        yield
        store._filesystem.cache_clear()


@pytest.fixture(params=["disk", "store"])
def home(request, tmp_path):
    """A folder on a disk, and one on a store."""
    if request.param == "disk":
        return tmp_path
    request.getfixturevalue("server")
    return as_path(f"{BUCKET}/{tmp_path.name}")


@pytest.fixture
def remote(server, tmp_path):
    return as_path(f"{BUCKET}/{tmp_path.name}")


# The verbs.


def test_what_is_written_is_read_listed_and_deleted(home):
    folder = home / "a b[c]"
    folder.mkdir(parents=True, exist_ok=True)
    assert not (folder / "x").exists() and store.listing(folder) == {}
    (folder / "x").write_bytes(b"123")
    files.write_text(folder / "y.json", "ü")
    (folder / "deep").mkdir()
    (folder / "deep" / "z").write_text("zz")
    assert (folder / "x").read_bytes() == b"123" and (folder / "y.json").read_text() == "ü"
    assert (folder / "x").stat().st_size == 3
    assert (folder / "x").is_file() and not folder.is_file() and folder.is_dir()
    assert {path.name for path in folder.iterdir()} == {"x", "y.json", "deep"}
    assert [path.name for path in folder.glob("*.json")] == ["y.json"]
    assert {name: entry.size for name, entry in store.listing(folder).items()} == {
        "x": 3,
        "y.json": 2,
        "deep/z": 2,
    }
    with (folder / "y.json").open("rb") as file:
        assert file.read() == "ü".encode()
    with store.fetched(folder / "x") as here:
        assert Path(here).read_bytes() == b"123"
    (folder / "x").unlink()
    (folder / "x").unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError):
        (folder / "x").unlink()
    with pytest.raises(FileNotFoundError):
        (folder / "x").read_bytes()
    store.remove(folder)
    store.remove(folder)
    assert not folder.exists()


def test_a_folder_is_renamed_in_place_of_another(home):
    for name, text in (("old/a", "1"), ("old/b/c", "2"), ("new/d", "3")):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(text)
    store.rename(home / "old", home / "new")
    assert set(store.listing(home / "new")) == {"a", "b/c"} and not (home / "old").exists()
    assert (home / "new" / "b" / "c").read_text() == "2"


def test_a_file_is_whole_or_as_it_was(home):
    files.write_text(home / "x", "before")

    def fail_midway():
        with files.replacing(home / "x") as new:
            new.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_midway()
    assert (home / "x").read_text() == "before"
    assert list(store.listing(home)) == ["x"]


def test_the_listing_of_a_store_has_the_hash_of_what_it_holds(remote):
    (remote / "x").write_bytes(b"123")
    assert store.listing(remote)["x"].digest == "md5:202cb962ac59075b964b07152d234b70"


def test_other_processes_writes_are_seen(remote):
    assert list(store.listing(remote)) == []
    code = f"from diffjax.training.store import as_path; as_path('{remote}/x').write_bytes(b'1')"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    assert list(store.listing(remote)) == ["x"] and [p.name for p in remote.iterdir()] == ["x"]


# Names.


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("runs/a", "runs/a"),
        ("/runs/a", "/runs/a"),
        ("file:///runs/a%20b", "/runs/a b"),
        ("a:b", "a:b"),
        ("gs://bucket/run", "gs://bucket/run"),
        ("gs:/bucket/run", "gs://bucket/run"),  # as a Path has it
    ],
)
def test_a_path_is_what_its_text_says(text, path):
    for given in (text, Path(text)):
        assert str(as_path(given)) == path
        assert str(as_path(as_path(given)) / "x") == f"{path}/x"
    assert store.is_remote(as_path(text)) == path.startswith("gs:")
    assert not store.is_remote(as_path(text)) or as_path(text).absolute() == as_path(text)


@pytest.mark.parametrize("text", ["s3://bucket/run", "http://host/run", "az://x/y", "gs://"])
def test_other_stores_are_refused_in_one_line(text):
    with pytest.raises(
        ValueError, match="is not on this machine: give a path, or gs://BUCKET/NAME"
    ):
        as_path(text)


def test_a_path_on_a_store_cannot_be_taken_for_one_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for function in (open, os.stat, os.listdir, os.mkdir):
        with pytest.raises(TypeError, match="gs://bucket/run is not on this machine"):
            function(as_path("gs://bucket/run"))
    with pytest.raises(ValueError, match="is not on this machine: because"):
        store.local("gs://bucket/run", "because")
    assert list(tmp_path.iterdir()) == []


def test_nothing_else_knows_of_urls():
    """No other module names a scheme, or imports a package of stores."""
    packages = {"fsspec", "gcsfs", "etils", "epath", "s3fs"}
    for path in [*ROOT.glob("*.py"), *(ROOT / "diffjax").rglob("*.py")]:
        if path.name == "store.py":
            continue
        tree = ast.parse(path.read_text())
        told = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if hasattr(node, "body") and isinstance(node.body, list) and node.body
            if isinstance(node.body[0], ast.Expr)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", "")}
                assert not packages & {(name or "").split(".")[0] for name in names}, path
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                after_http = node.value.replace("http://", "").replace("https://", "")
                assert id(node) in told or "://" not in after_http, (path, node.value)


# Errors.


def test_whatever_a_store_raises_is_an_os_error_of_one_line(remote):
    for raised in (RuntimeError("a\nb"), KeyError("x"), OSError("c")):
        with pytest.raises(StoreError, match=f"{remote}: .*") as caught, store.errors(remote):
            raise raised
        assert "\n" not in str(caught.value)
    with pytest.raises(PermissionError), store.errors(remote):
        raise RuntimeError("Forbidden: https://...")
    with pytest.raises(KeyError), store.errors(Path("x")):
        raise KeyError


def test_a_bucket_that_is_not_there_is_named(server):
    store.reach(BUCKET)
    store.reach(None)
    with pytest.raises(ValueError, match="gs://nowhere/run: there is no bucket nowhere"):
        store.reach("gs://nowhere/run")


def refused(*argv, **environment):
    """What a command prints that is refused, in a process without the server."""
    names = buckets.environment(0)
    done = subprocess.run(
        [sys.executable, *argv],
        env={k: v for k, v in os.environ.items() if k not in names} | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode in (1, 2), done.stderr
    return done.stderr.strip().splitlines()[-1]


@pytest.mark.faults
def test_what_is_missing_is_said_before_anything_is_compiled(tmp_path):
    train = "train.py", "--config=digits:smoke"
    line = refused(*train, "--workdir=s3://bucket/run")
    assert line.startswith("error: s3://bucket/run is not on this machine")
    line = refused(*train, "--workdir=gs://bucket/run", HOME=str(tmp_path), NO_GCE_CHECK="true")
    assert "no credentials for Google Cloud: run `gcloud auth" in line
    hidden = tmp_path / "gcsfs"  # a package of this name that cannot be imported
    code = "import sys; sys.modules['gcsfs'] = None; sys.argv[1:] = ['--workdir=gs://bucket/run']; "
    code += "import importlib.util as u; find = u.find_spec; "
    code += "u.find_spec = lambda name, *a: None if name == 'gcsfs' else find(name, *a); "
    code += "import runpy; runpy.run_path('train.py', run_name='__main__')"
    assert "need gcsfs: pip install '.[gcs]'" in refused("-c", code)
    assert not hidden.exists()


# The lock.


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(lease, "BEAT", 0.05)
    monkeypatch.setattr(lease, "PATIENCE", 0.6)
    monkeypatch.setattr(lease, "APART", 0.0)


ELSEWHERE = "process 1 of elsewhere\nanother world\n00\n"


def test_an_object_is_written_only_in_place_of_the_version_that_was_read(remote):
    path = remote / "x"
    absent, data = path.read_version()
    assert data is None
    first = path.write_version(absent, b"1")
    assert first and path.write_version(absent, b"2") is None
    assert path.read_version() == (first, b"1")
    path.write_bytes(b"3")
    assert path.write_version(first, b"2") is None and path.write_version(first, None) is None
    version, data = path.read_version()
    assert data == b"3" and path.write_version(version, None)
    assert not path.exists()


def test_a_second_writer_of_a_run_is_refused_until_the_first_has_ended(home, quick):
    held = lease.lock(home)
    with pytest.raises(ValueError, match="is in use by process"):
        lease.lock(home)
    held.release()
    lease.lock(home).release()


def test_a_lease_that_was_left_behind_is_taken_over(remote, quick, capsys):
    (remote / "lock").write_text(ELSEWHERE)
    held = lease.lock(remote)
    assert "is in use by process 1 of elsewhere, or was: waiting" in capsys.readouterr().out
    assert held.lost is None
    held.release()
    assert not (remote / "lock").exists()


@pytest.mark.parametrize("left", [True, False])
def test_of_two_newcomers_one_gets_the_lease(remote, quick, monkeypatch, left):
    """Both have waited, and write at the same moment; the other is refused, and told by whom."""
    if left:
        (remote / "lock").write_text(ELSEWHERE)
    write, both = store.RemotePath.write_version, threading.Barrier(2)

    def together(self, version, data):
        with contextlib.suppress(threading.BrokenBarrierError):  # at later writes there is one
            both.wait(5)
        return write(self, version, data)

    monkeypatch.setattr(store.RemotePath, "write_version", together)
    monkeypatch.setattr(lease, "this_process", lambda: f"process of {threading.get_ident()}")

    def take(_):
        try:
            return lease.lock(remote)
        except ValueError as error:
            return str(error)
        finally:
            both.abort()

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        found = list(pool.map(take, range(2)))
    (held,) = [x for x in found if isinstance(x, lease.Lease)]
    (why,) = [x for x in found if isinstance(x, str)]
    holder = (remote / "lock").read_text().partition("\n")[0]
    assert why == f"{remote} is in use by {holder}" and held.lost is None
    held.release()


def test_who_loses_a_lease_learns_of_it_and_leaves_the_other_alone(remote, quick):
    held = lease.lock(remote)
    (remote / "lock").write_text(ELSEWHERE)
    for ask in (held.beat, held.check):
        with pytest.raises(lease.TakenOverError, match=f"{remote} was taken over by process 1 of"):
            ask()
    held.release()
    assert (remote / "lock").read_text() == ELSEWHERE


def test_an_answer_that_was_lost_loses_no_lease(remote, quick):
    """The request was sent again, and met what it had written."""
    held = lease.lock(remote)
    held._path.write_version(held._version, held._text)
    held.beat()
    assert held.lost is None
    held.release()


def test_threads_that_ask_at_once_wait_for_a_store_that_hangs_once(remote, quick, monkeypatch):
    monkeypatch.setattr(lease, "BEAT", 1e6)
    held, tries = lease.lock(remote), []

    def hang(*_):
        tries.append(time.sleep(0.5))
        raise StoreError("no answer")

    with monkeypatch.context() as patch, concurrent.futures.ThreadPoolExecutor(3) as pool:
        patch.setattr(store.RemotePath, "write_version", hang)
        asked = [pool.submit(held.beat) for _ in range(3)]
        assert [str(each.exception()) for each in asked] == ["no answer"] * 3
        assert len(tries) == 1
    held.beat()
    held.release()


def test_a_lease_is_written_once_a_second_at_most(remote, monkeypatch):
    held = lease.lock(remote)
    version = held._path.read_version()
    held.beat()
    assert held._path.read_version() == version
    monkeypatch.setattr(lease, "APART", 0.0)
    held.beat()
    assert held._path.read_version() != version
    held.release()


def test_a_run_that_was_taken_over_writes_nothing_more(remote, quick, monkeypatch):
    """Neither a checkpoint nor anything beside it, and it deletes nothing."""
    monkeypatch.setattr(lease, "BEAT", 1e6)  # so that only the writes themselves can notice
    state, said, before = {"x": jax.numpy.arange(3.0)}, [], {}

    def go_on():
        with Checkpoints(remote / "c", lock=lease.lock(remote)) as run:
            mirror = Mirror(remote, said.append, hold=run.hold)
            run.before_seal = mirror.settle
            run.save(1, state)
            run.require()
            (remote / "lock").write_text(ELSEWHERE)
            before.update(store.listing(remote))
            (mirror.folder / "rows").write_text("1\n")
            assert not mirror.settle() and f"{remote} was taken over by process 1" in said[0]
            run.save(2, state)
            assert "was taken over by process 1 of elsewhere" in run.failed
            mirror.close()
            shutil.rmtree(mirror.folder)
            run.check_lock()

    with pytest.raises(lease.TakenOverError, match="was taken over by process 1 of elsewhere"):
        go_on()
    assert store.listing(remote) == before


def test_a_manager_that_only_some_processes_can_open_again_is_closed(remote, monkeypatch):
    """After a failed save every process opens another one, or none has one."""
    state, closed, close = {"x": jax.numpy.arange(3.0)}, [], orbax.close_failed
    monkeypatch.setattr(orbax, "close_failed", lambda manager: closed.append(close(manager)))
    with Checkpoints(remote / "c") as run:
        run.before_seal = lambda: False
        run.save(1, state)
        run.wait()
        assert "could not be uploaded" in run.failed and len(closed) == 1
        run.before_seal = lambda: True
        with monkeypatch.context() as patch:
            others = iter([False, True])  # the other process can reach the store, and then cannot
            patch.setattr(checkpoints, "_any_process", lambda here: here or next(others))
            run.save(2, state)
        assert run.failed == "checkpoint 2 failed in another process" and len(closed) == 2
        run.save(3, state)
    assert [path.name for path in checkpoints.list_checkpoints(remote / "c")] == ["3"]


# What a run writes beside its checkpoints.


def test_what_has_changed_is_uploaded_whole(remote):
    said = []
    mirror = Mirror(remote, said.append, moved=("once",))
    (mirror.folder / "rows").write_text("1\n")
    (mirror.folder / "once").mkdir()
    (mirror.folder / "once" / "snapshot").write_text("s")
    (mirror.folder / "half.tmp").write_text("")
    assert mirror.settle() and set(store.listing(remote)) == {"rows", "once/snapshot"}
    assert not (mirror.folder / "once" / "snapshot").exists()  # it is written once
    with (mirror.folder / "rows").open("a") as file:
        file.write("2\n")
    mirror.close()
    assert (remote / "rows").read_text() == "1\n2\n" and said == []
    assert not mirror.folder.exists()


def test_a_store_that_fails_is_tried_again_and_said_once(remote, monkeypatch):
    said = []
    mirror = Mirror(remote, said.append)
    away = lambda self, data: (_ for _ in ()).throw(StoreError("away"))
    with monkeypatch.context() as patch:
        patch.setattr(store.RemotePath, "write_bytes", away)
        (mirror.folder / "rows").write_text("1\n")
        assert not mirror.settle() and not mirror.settle()
    assert said == ["not uploaded, and tried again: away"]
    assert mirror.settle() and (remote / "rows").read_text() == "1\n"
    monkeypatch.setattr(store.RemotePath, "write_bytes", away)
    (mirror.folder / "picture").write_text("p")
    mirror.close()
    assert said[-1] == f"not uploaded: picture; they are in {mirror.folder}"
    shutil.rmtree(mirror.folder)


def test_folders_of_dead_processes_are_deleted_and_those_of_others_kept(
    remote, tmp_path, monkeypatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code = f"""
import os, pathlib, signal
from diffjax.training import mirror, store
made = mirror.Mirror(store.as_path("{remote}"), print)
(made.folder / "rows").write_text("1")
print(made.folder, flush=True)
signal.pause()
"""
    environment = os.environ | {"TMPDIR": str(tmp_path)}

    def start():
        command = [sys.executable, "-c", code]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        return process, Path(process.stdout.readline().strip())

    with contextlib.ExitStack() as stack:
        (killed, left), (alive, held) = start(), start()
        for process in (killed, alive):
            stack.callback(process.communicate)
            stack.callback(process.kill)
        killed.kill()
        killed.wait()
        other = Mirror(remote / "other", print)  # another run
        assert left.exists()
        mine = Mirror(remote, print)
        assert not left.exists() and (held / "rows").exists()
        for mirror in (other, mine):
            mirror.close()
    # What a store has not taken is kept: the run has said where it is.
    failing = Mirror(remote, print)
    (failing.folder / "rows").write_text("1")
    with monkeypatch.context() as patch:
        away = lambda self, data: (_ for _ in ()).throw(StoreError("away"))
        patch.setattr(store.RemotePath, "write_bytes", away)
        failing.close()
    Mirror(remote, print).close()
    assert [path.name for path in failing.folder.iterdir()] == ["rows"] and not held.exists()


def test_on_a_disk_the_directory_of_a_run_is_written_itself(tmp_path):
    mirror = Mirror(tmp_path, pytest.fail)
    assert mirror.folder == tmp_path and mirror.settle()
    mirror.close()
    assert tmp_path.exists()


# Data.


@pytest.fixture(scope="module")
def records(server, tmp_path_factory):
    """Records of the digits on the store."""
    folder = tmp_path_factory.mktemp("records") / "digits"
    train, test = load("digits")
    arrays = {"x_train": train.x, "y_train": train.label, "x_test": test.x, "y_test": test.label}
    np.savez(folder.with_suffix(".npz"), **arrays)
    convert.main(["npz", str(folder), f"--path={folder.with_suffix('.npz')}", "--shard=500"])
    there = as_path(f"{BUCKET}/records")
    for file in folder.iterdir():
        store.upload(file, there / file.name)
    return there


def test_records_of_a_store_are_copied_once_and_verified(records, tmp_path, capsys, monkeypatch):
    cache = tmp_path / "cache"
    folder = copies.on_this_machine(records, "records", cache)
    assert set(store.listing(folder)) - {"lock"} == set(store.listing(records))
    assert "copied 1 of" in capsys.readouterr().out
    assert copies.on_this_machine(records, "records", cache) == folder
    assert capsys.readouterr().out == ""
    # A copy that was stopped goes on.
    (folder / "manifest.json").unlink()
    shard = next(folder.glob("train*"))
    shard.unlink()
    assert copies.on_this_machine(records, "records", cache) == folder
    assert "copied 1 of 1 files" in capsys.readouterr().out


def test_records_that_are_damaged_on_the_store_are_refused(records, tmp_path):
    there = as_path(f"{BUCKET}/{tmp_path.name}")
    for name in store.listing(records):
        data = (records / name).read_bytes()
        if name.startswith("train-00001"):
            data = data[:20_000] + bytes([data[20_000] ^ 1]) + data[20_001:]
        (there / name).write_bytes(data)
    with pytest.raises(ValueError, match=r"train-00001.* is damaged: it (cannot|has)"):
        copies.on_this_machine(there, "records", tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("manifest.json"))


@pytest.mark.parametrize(
    ("name", "cache", "message"),
    [
        ("folder", "cache", "folder is read from a disk; convert it to records, or copy it"),
        ("records", None, "give data.cache, a folder of this machine for copies"),
    ],
)
def test_data_that_cannot_be_on_a_store_are_refused(name, cache, message):
    with pytest.raises(ValueError, match=message):
        copies.on_this_machine(as_path("gs://bucket/x"), name, cache and Path(cache))


# Whole runs.

TINY = "--config=digits:smoke", "--config.save_every=20", "--config.log_every=10"


def run(*argv, check=True, **popen):
    done = subprocess.run(
        [sys.executable, *map(str, argv)], cwd=ROOT, capture_output=True, text=True, **popen
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def rows(workdir):
    keys = "step", "loss", "grad_norm", "eval_loss"
    text = (workdir / "metrics.jsonl").read_text()
    return [{k: json.loads(line).get(k) for k in keys} for line in text.splitlines()]


@pytest.mark.faults
def test_a_run_on_a_store_is_the_run_on_a_disk_bit_for_bit(remote, records, tmp_path):
    """It is stopped, resumed from records on the store, inspected, drawn from and exported."""
    disk = tmp_path / "run"
    data = copies.on_this_machine(records, "records", tmp_path / "cache")
    of_records = "--config.data.name=records"
    here = of_records, f"--config.data.path={data}"
    there = of_records, f"--config.data.path={records}", f"--config.data.cache={tmp_path / 'c'}"
    run("train.py", *TINY, *here, f"--workdir={disk}", "--config.steps=60")
    run("train.py", *TINY, *there, f"--workdir={remote}", "--config.steps=40")
    again = run("train.py", *TINY, *there, f"--workdir={remote}", "--config.steps=60")
    assert "resumed from the checkpoint of step 40 of 60" in again.stdout

    assert rows(remote) == rows(disk)
    assert (remote / "samples.png").read_bytes() == (disk / "samples.png").read_bytes()
    same = lambda a, b: jax.tree.map(np.testing.assert_array_equal, dict(a), dict(b))
    params = checkpoint.load(disk)[1]
    same(params, checkpoint.load(str(remote))[1])
    kept = lambda workdir: {path.name for path in (workdir / "checkpoints").iterdir()}
    assert kept(remote) == kept(disk)
    assert run("-m", "diffjax.inspect", remote).stdout.count("sound") == len(kept(disk))
    for out in (disk / "a.npz", remote / "a.npz"):
        run("sample.py", f"--workdir={out.parent}", "--n=8", f"--out={out}")
    assert (disk / "a.png").read_bytes() == (remote / "a.png").read_bytes()
    run("-m", "diffjax.export", remote, remote / "n.safetensors")
    same(params, checkpoint.load(str(remote / "n.safetensors"))[1])
    run("evaluate.py", f"--workdir={remote}", "--n=20", "--held_out=4", "--bound_samples=2")
    assert "frechet" in json.loads((remote / "evaluation.json").read_text())

    # A changed object is named, and an older checkpoint is used.
    name = next(n for n in store.listing(remote / "checkpoints" / "60") if "/d/" in n)
    changed = remote / "checkpoints" / "60" / name
    raw = changed.read_bytes()
    changed.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    done = run("train.py", *TINY, *there, f"--workdir={remote}", "--config.steps=60")
    assert name in done.stdout + done.stderr
    assert "resumed from the checkpoint of step 40 of 60" in done.stdout
    assert (remote / "checkpoints" / "damaged-60").is_dir()
    same(params, checkpoint.load(str(remote))[1])


@pytest.mark.faults
def test_a_run_that_is_killed_goes_on_bit_for_bit(remote, tmp_path):
    disk, rng = tmp_path / "run", np.random.default_rng(0)
    argv = "train.py", *TINY, "--config.steps=200", "--config.save_every=10"
    run(*argv, f"--workdir={disk}")
    for _ in range(3):
        command = [sys.executable, *argv, f"--workdir={remote}"]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout:
                if line.startswith("compiled"):
                    break
            time.sleep(rng.uniform(0.1, 6.0))
            process.kill()
    run(*argv, f"--workdir={remote}")
    assert rows(remote) == rows(disk)
    same = lambda a, b: jax.tree.map(np.testing.assert_array_equal, dict(a), dict(b))
    same(checkpoint.load(disk)[1], checkpoint.load(str(remote))[1])


@pytest.mark.faults
def test_a_store_that_hangs_for_a_while_loses_nothing(tmp_path):
    port, disk = buckets.free_port(), tmp_path / "run"
    argv = "train.py", *TINY, "--config.steps=400", "--config.save_every=100"
    run(*argv, f"--workdir={disk}")
    environment = os.environ | buckets.environment(port)
    with buckets.running(port) as server:
        command = [sys.executable, *argv, f"--workdir={BUCKET}/run"]
        with subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
        ) as process:
            for line in process.stdout:
                if line.startswith("compiled"):
                    break
            server.send_signal(signal.SIGSTOP)
            time.sleep(20)
            server.send_signal(signal.SIGCONT)
            out, _ = process.communicate(timeout=300)
        assert process.returncode == 0 and "step 400/400" in out
        code = f"print(as_path('{BUCKET}/run/metrics.jsonl').read_text())"
        code = f"from diffjax.training.store import as_path; {code}"
        (tmp_path / "metrics.jsonl").write_text(run("-c", code, env=environment).stdout.strip())
    assert rows(tmp_path) == rows(disk)


def quickly(path, *argv, **constants):
    """The words of a command that runs a script with other constants of modules."""
    lines = [
        f"import {name.rpartition('.')[0]} as m; m.{name.rpartition('.')[2]} = {value}"
        for name, value in constants.items()
    ]
    lines += [f"import sys; sys.argv = {[path, *map(str, argv)]}"]
    lines += [f"import runpy; runpy.run_path({path!r}, run_name='__main__')"]
    return "-c", "\n".join(lines)


@contextlib.contextmanager
def started(*argv, until="compiled", **environment):
    """A process that has printed a line that begins with these words, and what it has printed."""
    process = subprocess.Popen(
        [sys.executable, "-u", *map(str, argv)],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        lines = []
        while until and not (lines and lines[-1].startswith(until)):
            lines.append(process.stdout.readline())
            assert lines[-1], lines
        yield process, "".join(lines)
    finally:
        process.kill()
        process.communicate()


@pytest.mark.faults
def test_a_holder_that_wakes_after_it_was_taken_over_ends_its_run(remote, tmp_path):
    """It was stopped for longer than a lease is waited for; the run of the other is unharmed."""
    disk, leases = tmp_path / "run", {"diffjax.training.lease.BEAT": 0.5}
    leases["diffjax.training.lease.PATIENCE"] = 3.0
    argv = *TINY, "--config.steps=150", "--config.save_every=50"
    run("train.py", *argv, f"--workdir={disk}")
    command = quickly("train.py", *argv, f"--workdir={remote}", **leases)
    with started(*command) as (first, _):
        first.send_signal(signal.SIGSTOP)
        with started(*command) as (second, said):
            assert f"{remote} is in use by process {first.pid}" in said
            first.send_signal(signal.SIGCONT)
            out, _ = first.communicate(timeout=60)
            assert first.returncode == 1, out
            assert f"error: {remote} was taken over by process {second.pid}" in out
            out, _ = second.communicate(timeout=120)
            assert second.returncode == 0, out
    assert rows(remote) == rows(disk)
    same = lambda a, b: jax.tree.map(np.testing.assert_array_equal, dict(a), dict(b))
    same(checkpoint.load(disk)[1], checkpoint.load(str(remote))[1])


@pytest.mark.faults
def test_a_store_that_dies_in_the_middle_of_a_save_loses_nothing(tmp_path):
    """The save is reported, training goes on, and a later save to its successor succeeds."""
    port, disk, there = buckets.free_port(), tmp_path / "run", tmp_path / "there"
    argv = *TINY, "--config.steps=300", "--config.save_every=50"
    run("train.py", *argv, f"--workdir={disk}")
    words = *argv, f"--workdir={BUCKET}/run"
    command = quickly("train.py", *words, **{"diffjax.training.checkpoints.LIMIT": 5.0})
    here = buckets.environment(port)
    with buckets.running(port, there, 0.05) as server, started(*command, **here) as (process, _):
        while not list(there.rglob("checkpoints/50/*")):
            time.sleep(0.01)
        server.kill()
        server.wait()
        for line in process.stdout:
            if "checkpoint 50 could not be written" in line:
                break
        with buckets.running(port, there):
            out, _ = process.communicate(timeout=120)
        assert process.returncode == 0 and "step 300/300" in out, out
    (kept,) = there.rglob("bucket/run")  # objects are files
    assert rows(kept) == rows(disk)
    same = lambda a, b: jax.tree.map(np.testing.assert_array_equal, dict(a), dict(b))
    same(checkpoint.load(disk)[1], checkpoint.load(kept)[1])
    steps = lambda workdir: [path.name for path in list_checkpoints(workdir)]
    assert steps(kept) == steps(disk)


@pytest.mark.faults
def test_a_store_that_hangs_for_good_holds_training_up_for_a_stated_time(tmp_path):
    """Once for the save that is on its way, and for one request at each save after it."""
    port, constants = buckets.free_port(), {"diffjax.training.checkpoints.LIMIT": 6.0}
    constants["diffjax.training.store.SOON"] = 2
    argv = *TINY, "--config.steps=150", "--config.save_every=50", f"--workdir={BUCKET}/run"
    command = quickly("train.py", *argv, **constants)
    here = buckets.environment(port)
    with buckets.running(port) as server, started(*command, **here) as (process, _):
        server.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 1 and "step 150/150" in out, out
        assert "error: checkpoint 150 could not be written" in out
        assert out.count("could not be written") == 4
        # Each request to write the lock may wait for another of the thread that does so too.
        assert time.monotonic() - began < 6 + 5 * (2 + 2) + 45


@contextlib.contextmanager
def two_processes(workdir, *argv):
    """Two processes of one device each that train."""
    at, environment = f"127.0.0.1:{buckets.free_port()}", {"JAX_NUM_CPU_DEVICES": "1"}
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(
                started(
                    "train.py",
                    *(*argv, f"--workdir={workdir}", f"--distributed.coordinator={at}"),
                    *("--distributed.processes=2", f"--distributed.process={index}"),
                    until="",
                    **environment,
                )
            )[0]
            for index in (1, 0)
        ]


@pytest.mark.faults
def test_two_processes_on_a_store_go_on_bit_for_bit_after_a_kill(remote, tmp_path):
    disk = tmp_path / "run"
    argv = *TINY, "--config.steps=60", "--config.save_every=10"

    def finish(workdir):
        with two_processes(workdir, *argv) as processes:
            said = [process.communicate(timeout=200)[0] for process in processes]
            assert [process.returncode for process in processes] == [0, 0], said
        return said[-1]

    finish(disk)
    with two_processes(remote, *argv) as processes:
        committed = remote / "checkpoints" / "20" / "commit_success.txt"
        while not committed.is_file():
            assert processes[0].poll() is None, processes[0].communicate()
            time.sleep(0.05)
        for process in processes:
            process.kill()
    assert "resumed from the checkpoint of step" in finish(remote)
    assert rows(remote) == rows(disk)
    same = lambda a, b: jax.tree.map(np.testing.assert_array_equal, dict(a), dict(b))
    same(checkpoint.load(disk)[1], checkpoint.load(str(remote))[1])


@pytest.mark.faults
def test_compiled_programs_are_read_from_a_store(remote):
    code = """
import jax
from diffjax.training import distributed
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name))
distributed.setup(distributed.ALONE)
jax.jit(lambda x: x @ x + 1)(jax.numpy.ones((3, 3)))
print(events.count("/jax/compilation_cache/cache_hits"))
"""
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": f"{remote}"}
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    start = lambda: int(run("-c", code, env=environment).stdout.split()[-1])
    assert start() == 0
    compiled = {name for name in store.listing(remote) if name.endswith("-cache")}
    assert compiled and start() == len(compiled)
    assert {name for name in store.listing(remote) if name.endswith("-cache")} == compiled
