"""Checkpoints: a damaged one is never read, and a sound one is never lost."""

import dataclasses
import io
import json
import resource
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

import diffjax
from diffjax import checkpoint
from diffjax.experiment import command_line, inspect, resolve, run_directory
from diffjax.schedules import time_at
from diffjax.training import checkpoints, init_state, orbax, runners

ROOT = Path(__file__).parents[1]
CONFIG = dataclasses.replace(command_line.from_file("configs/digits.py:smoke"), keep=2)


def state_at(step):
    """A state with every kind of leaf that a training state has."""
    key = jax.random.key(7)
    weights = jax.random.normal(jax.random.fold_in(key, step), (16, 256))
    return {
        "step": jnp.int32(step),
        "ema_params": {"w": weights, "scalar": weights[0, 0], "half": weights.astype("bfloat16")},
        "key": key,
        "extra": (),
    }


def save(workdir, *steps, config=CONFIG, losses=()):
    with run_directory.open_run(workdir, config) as opened:
        for step, loss in zip(steps, losses or [1.0] * len(steps), strict=True):
            opened.save(step, state_at(step), loss)


def restored(workdir, like=None, config=CONFIG):
    with run_directory.open_run(workdir, config) as opened:
        return opened.restore(state_at(0) if like is None else like)


def equal(a, b):
    raw = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(raw(x), raw(y)), a, b)


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


DAMAGE = {
    "flipped bit": flip,
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "emptied": lambda file: file.write_bytes(b""),
    "deleted": lambda file: file.unlink(),
}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A run with the checkpoints of steps 20 and 40; a test that damages them copies it."""
    workdir = tmp_path_factory.mktemp("two") / "run"
    save(workdir, 20, 40)
    return workdir


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_to_any_file_is_found_and_the_older_checkpoint_used(two, tmp_path, kind, capsys):
    newest = two / "checkpoints" / "40"
    files = [f.relative_to(newest) for f in newest.rglob("*") if f.stat().st_size and f.is_file()]
    # Orbax writes the time into this file when it commits; restoring does not depend on it.
    files.remove(Path(checkpoints.METADATA))
    assert len(files) > 10
    for i, name in enumerate(files):
        if name.name == checkpoints.COMMITTED:
            continue  # it holds nothing that the seal does not
        copy = shutil.copytree(two, tmp_path / str(i))
        DAMAGE[kind](copy / "checkpoints" / "40" / name)
        damage = checkpoints.damage_of(copy / "checkpoints" / "40")
        assert damage is not None, name
        if name.name not in (checkpoints.SEAL,):
            assert str(name) in damage
        if i % 5 == 0:
            equal(restored(copy), state_at(20))
            out = capsys.readouterr().out
            assert damage in out and "renamed to damaged-40" in out
            # The run continues, and writes step 40 again.
            save(copy, 40)
            equal(restored(copy), state_at(40))
            assert (copy / "checkpoints" / "damaged-40").is_dir()


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_to_the_metadata_of_orbax_changes_nothing(two, tmp_path, kind):
    copy = shutil.copytree(two, tmp_path / "run")
    DAMAGE[kind](copy / "checkpoints" / "40" / checkpoints.METADATA)
    equal(restored(copy), state_at(40))


def test_reading_skips_a_damaged_checkpoint_with_a_warning(two, tmp_path):
    copy = shutil.copytree(two, tmp_path / "run")
    flip(next((copy / "checkpoints" / "40" / "default" / "d").iterdir()))
    with pytest.warns(UserWarning, match=r"40 is damaged: default.* has changed; trying an older"):
        _, params, _ = checkpoint.load(copy)
    equal(params, state_at(20)["ema_params"])
    assert (copy / "checkpoints" / "40").is_dir()  # reading changes nothing
    shutil.rmtree(copy / "checkpoints" / "20")
    with pytest.raises(ValueError, match="no checkpoint is sound; choose another"):
        restored(copy)
    assert (copy / "checkpoints" / "40").is_dir()  # the user decides about it
    with (
        pytest.warns(UserWarning, match="40 is damaged"),
        pytest.raises(FileNotFoundError, match="no sound checkpoint"),
    ):
        checkpoint.load(copy)


def test_orbax_itself_returns_wrong_numbers_for_a_flipped_bit(two, tmp_path):
    """This is why there are seals; if this test fails, Orbax detects the damage itself."""
    copy = shutil.copytree(two, tmp_path / "run") / "checkpoints" / "40"
    equal(checkpoints.read(copy), state_at(40))
    for file in (copy / "default" / "ocdbt.process_0" / "d").iterdir():
        if file.stat().st_size > 8000:
            flip(file)
    with pytest.raises(AssertionError, match="Arrays are not equal"):
        equal(checkpoints.read(copy), state_at(40))


def test_a_kill_between_the_seal_and_the_commit_loses_nothing(two, tmp_path):
    copy = shutil.copytree(two, tmp_path / "run")
    (copy / "checkpoints" / "40" / checkpoints.COMMITTED).unlink()
    assert checkpoints.damage_of(copy / "checkpoints" / "40") is None
    equal(restored(copy), state_at(40))


def test_empty_foreign_and_unfinished_folders_are_ignored(two, tmp_path):
    copy = shutil.copytree(two, tmp_path / "run")
    (copy / "checkpoints" / "99").mkdir()
    (copy / "checkpoints" / "98" / "default").mkdir(parents=True)
    cut_off = shutil.copytree(copy / "checkpoints" / "40", copy / "checkpoints" / "60")
    (cut_off / checkpoints.SEAL).unlink()
    (cut_off / checkpoints.COMMITTED).unlink()
    equal(restored(copy), state_at(40))
    save(copy, 60)
    equal(restored(copy), state_at(60))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s | {"ema_params": {**s["ema_params"], "w": jnp.zeros((16, 128))}},
            r"\['w'\]: it has float32\[16, 256\], this config makes float32\[16, 128\]",
        ),
        (
            lambda s: s | {"ema_params": {**s["ema_params"], "half": jnp.zeros((16, 256))}},
            r"\['half'\]: it has bfloat16\[16, 256\], this config makes float32\[16, 256\]",
        ),
        (
            lambda s: s | {"more": jnp.zeros(3)},
            r"\['more'\]: it has None, this config makes float32\[3\]",
        ),
        (lambda s: {k: v for k, v in s.items() if k != "step"}, r"\['step'\]: it has int32\[\]"),
    ],
)
def test_another_state_is_refused_with_what_differs(two, change, message):
    with pytest.raises(ValueError, match=message):
        restored(two, change(state_at(0)))


def test_the_extra_state_of_a_method_is_restored(tmp_path):
    """A learned schedule, the history of losses, and the optimiser's count of steps."""
    tx = optax.adam(optax.linear_schedule(0.0, 1.0, 10))
    params = {"schedule": jax.tree.map(jnp.asarray, diffjax.monotone_params(4)), "net": jnp.ones(3)}
    history = diffjax.remember_losses(diffjax.loss_history(5), jnp.full(2, 0.4), jnp.ones(2))
    state = init_state(jax.random.key(0), params, tx, history)
    _, opt_state = tx.update(params, state.opt_state)
    state = state.replace(opt_state=opt_state, step=jnp.int32(20))
    with run_directory.open_run(tmp_path, CONFIG) as opened:
        opened.save(20, state)
    got = restored(tmp_path, init_state(jax.random.key(1), params, tx, diffjax.loss_history(5)))
    equal(got, state)
    assert jax.tree.structure(got) == jax.tree.structure(state)
    t = jnp.linspace(0, 1, 5)
    schedules = [diffjax.monotone(s.params["schedule"]).log_snr(t) for s in (got, state)]
    assert jnp.array_equal(*schedules)


@pytest.mark.parametrize(("kind", "fsdp"), [("pmap", 1), ("sharded", 1), ("sharded", 8)])
def test_any_layout_reads_what_any_other_wrote(tmp_path, kind, fsdp):
    state = state_at(20)
    wrote = runners.RUNNERS[kind](fsdp).init(lambda: state)
    with run_directory.open_run(tmp_path, CONFIG) as opened:
        opened.save(20, wrote)
    for other, share in (("pmap", 1), ("sharded", 2)):
        like = runners.RUNNERS[other](share).init(lambda: state_at(0))
        got = restored(tmp_path, like)
        equal(got, state)
        jax.tree.map(lambda a, b: a.sharding == b.sharding or pytest.fail("moved"), got, like)
    equal(checkpoints.read(tmp_path / "checkpoints" / "20"), state)


def test_the_newest_every_kth_and_the_best_are_kept(tmp_path):
    losses = [5.0, 1.0, float("nan"), 3.0, 2.0, 6.0, 7.0]
    config = dataclasses.replace(CONFIG, keep=2, keep_every=80, keep_best=1)
    save(tmp_path, *range(20, 160, 20), config=config, losses=losses)
    kept = [int(path.name) for path in run_directory.list_checkpoints(tmp_path)]
    assert kept == [40, 80, 120, 140]


def test_a_checkpoint_is_not_sealed_before_what_was_written_beside_it(tmp_path):
    with run_directory.open_run(tmp_path, CONFIG) as opened:
        opened.before_seal = lambda: False
        opened.save(20, state_at(20))
        opened.wait()
        assert opened.failed.endswith("what was written beside it could not be uploaded")
        opened.before_seal = lambda: True
        opened.save(40, state_at(40))
    assert [path.name for path in run_directory.list_checkpoints(tmp_path)] == ["40"]


def test_a_save_that_hangs_is_given_up_and_never_sealed(tmp_path, monkeypatch):
    released, ended = threading.Event(), threading.Event()

    def hang():
        released.wait(60)
        ended.set()
        return True

    monkeypatch.setattr(orbax, "CLOSING", 0.1)
    with run_directory.open_run(tmp_path, CONFIG) as opened:
        opened.save(20, state_at(20))
        opened.require()
        opened.before_seal = hang
        with monkeypatch.context() as patch:
            patch.setattr(checkpoints, "LIMIT", 0.4)
            opened.save(40, state_at(40))
            opened.wait()
        assert opened.failed.endswith("40 could not be written: it was not complete after 0 s")
        assert opened.newest() == 20
        opened.before_seal = lambda: True
        opened.save(60, state_at(60))
        released.set()
        opened.require()
        ended.wait(60)
    assert [path.name for path in run_directory.list_checkpoints(tmp_path)] == ["20", "60"]
    equal(restored(tmp_path), state_at(60))


def test_a_full_disk_is_reported_and_training_goes_on(tmp_path):
    """The size of files is limited while two checkpoints are written; then a third one is written.

    This happens in a process of its own, whose last run ends before the third.
    """
    code = f"""
import resource, sys
sys.path[:0] = [{str(ROOT / "tests")!r}]
from pathlib import Path
from diffjax.experiment import run_directory
from test_checkpoint import CONFIG, state_at
limits = resource.getrlimit(resource.RLIMIT_FSIZE)
for name, limit in (("none", 0), ("some", 4000), ("end", 0)):
    with run_directory.open_run(Path({str(tmp_path)!r}) / name, CONFIG) as opened:
        opened.save(20, state_at(20))
        opened.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
        for step in (40, 60):
            opened.save(step, state_at(step))
            opened.wait()
            print(name, "newest", opened.newest())
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        if name != "end":
            opened.save(80, state_at(80))
"""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.count("could not be written") == 6
    for name, last in (("none", 80), ("some", 80), ("end", 20)):
        assert done.stdout.count(f"{name} newest 20\n") == 2
        equal(restored(tmp_path / name), state_at(last))
        # No failed save leaves a file.
        kept = {path.name for path in (tmp_path / name / "checkpoints").iterdir()}
        assert kept == {"20", str(last)}
    assert "UnwrittenError: checkpoint 60 could not be written" in done.stderr
    assert "Event loop is closed" not in done.stderr and "absl" not in done.stderr


def test_inspect_prints_what_a_run_holds(two, tmp_path):
    copy = shutil.copytree(two, tmp_path / "run")
    of_edm = np.exp(-((np.arange(-11.5, 12) - 2.4) ** 2) / (2 * 2.4**2))  # N(2.4, 2.4^2)
    schedule = resolve(run_directory.read_config(copy)).schedule
    visited = -np.diff(time_at(schedule, jnp.arange(-12.0, 13)))
    losses = [
        x / v if v > 1e-6 else None for x, v in zip(of_edm.tolist(), visited.tolist(), strict=True)
    ]
    row = {"step": 40, "loss": 0.5, "eval_loss": 0.25, "loss_by_log_snr": losses}
    (copy / "metrics.jsonl").write_text(json.dumps(row) + "\n")

    def report():
        console = Console(record=True, width=160, file=io.StringIO())
        damaged = inspect.report(copy, console)
        return damaged, console.export_text()

    damaged, text = report()
    assert damaged == 0 and text.count("sound") == 2 and "0.25" in text
    assert "model.width=8" in text and "loss 0.5" in text
    assert "--config.density=normal --config.density_options mean=2.4 std=2.4" in text
    (copy / "checkpoints" / "40" / "seal.json").unlink()
    damaged, text = report()
    assert damaged == 1 and "seal.json is missing" in text
    with pytest.raises(FileNotFoundError, match="not the directory of a run"):
        inspect.report(tmp_path, Console(quiet=True))
