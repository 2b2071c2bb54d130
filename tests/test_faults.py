"""Real processes that are killed and stopped: `make test-faults`, ten to twenty minutes.

After each test nothing is lost, no damaged file was read, and no process hangs.
"""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import layouts
import numpy as np
import pytest
from test_train import TINY, assert_bitwise_equal, newest, rows_of

from diffjax.experiment import run_directory
from diffjax.training import metrics, runners

pytestmark = pytest.mark.faults
ROOT = Path(__file__).parents[1]
STEADY = ["--config.save_every=10", "--config.sample_every=100000", "--config.keep=3"]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A user's environment, except that all of these runs share compiled programs."""
    cache = tmp_path_factory.mktemp("compiled")
    return {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(ROOT),
    }


def start(environment, *words):
    """Start a Python process, whose output is read when it has ended."""
    return subprocess.Popen(
        [sys.executable, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=environment,
    )


def finish(process, timeout=900):
    out, _ = process.communicate(timeout=timeout)
    return process.returncode, out


def launched(environment, *words, options=()):
    """Start a script as two processes of four devices each."""
    launcher = ["-m", "diffjax.launch", "--processes=2", "--devices=4", *options, "--"]
    return start(environment, *launcher, *words)


def members(port_of):
    """The two processes that a launcher has started, as (process 0, process 1)."""
    found = subprocess.run(
        ["pgrep", "-f", "-P", str(port_of.pid), "distributed.process="],
        capture_output=True,
        text=True,
    )
    return [int(pid) for pid in found.stdout.split()]


def until(condition, what, seconds=600):
    for _ in range(10 * seconds):
        if condition():
            return
        time.sleep(0.1)
    pytest.fail(f"never: {what}")


def saved(workdir):
    return [int(path.name) for path in run_directory.list_checkpoints(workdir)]


def test_thirty_kills_at_random_moments_change_nothing(tmp_path, environment):
    """Kills come while a run starts, trains or saves; its result is that of an unkilled run."""
    argv = ["train.py", *TINY, *STEADY, "--config.steps=3000"]
    status, out = finish(start(environment, *argv, f"--workdir={tmp_path / 'whole'}"))
    assert status == 0, out
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    rng, kills, resumed = random.Random(0), 0, []
    while kills < 30:
        process = start(environment, *argv, f"--workdir={killed}")
        before = saved(killed)
        # Half of the kills follow a save, while the next one is in flight.
        if kills % 2:
            until(lambda: saved(killed) != before or process.poll() is not None, "a save")  # noqa: B023
            time.sleep(rng.uniform(0, 0.3))
        else:
            time.sleep(rng.uniform(0, 12))
        if process.poll() is not None:
            break
        process.kill()
        _, out = finish(process)
        kills += 1
        found = re.search(r"resumed from the checkpoint of step (\d+)", out)
        if found:
            resumed.append(int(found[1]))
        # The run resumes from what was saved, and that is sound.
        assert found or not before or "compiled" not in out, out
        assert "damaged" not in out
    assert kills == 30
    assert resumed == sorted(resumed) and len(resumed) > 10
    status, out = finish(start(environment, *argv, f"--workdir={killed}"))
    assert status == 0, out
    (step_a, a), (step_b, b) = newest(whole), newest(killed)
    assert step_a == step_b == 3000
    assert_bitwise_equal(a, b)
    assert rows_of(whole) == rows_of(killed)
    assert (whole / "samples.png").read_bytes() == (killed / "samples.png").read_bytes()
    assert len(list((killed / "checkpoints").iterdir())) <= 4


def test_draws_images_and_parameters_in_two_processes(tmp_path, environment):
    """Each layout in two processes gives the same as one device of one process."""
    out = tmp_path / "found.npz"
    # The last bit of a normal draw depends on the compiler's options.
    alike = environment | {"XLA_FLAGS": os.environ["XLA_FLAGS"]}
    status, said = finish(launched(alike, ROOT / "tests" / "layouts.py", out))
    assert status == 0, said
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runners, "_devices", lambda: jax.devices()[:1])
        runner = runners.sharded()
        draws, images = layouts.draws(runner), layouts.images(runner)
        coupled = layouts.coupled_losses(runner, "immiscible")
        of_map = layouts.map_losses(runner, "eulerian")
        expected = layouts.parameters(runner)
    with np.load(out) as arrays:
        for name in layouts.LAYOUTS:
            np.testing.assert_array_equal(arrays[f"{name}/draws"], draws)
            np.testing.assert_allclose(arrays[f"{name}/images"], images, atol=1e-5)
            np.testing.assert_allclose(arrays[f"{name}/coupled"], coupled, rtol=1e-5)
            np.testing.assert_allclose(arrays[f"{name}/map"], of_map, rtol=1e-4)
            got = {key: arrays[f"{name}/{key}"] for key in expected}
            layouts.assert_close(got, expected, f"{name} in two processes")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory, environment):
    """An uninterrupted run of 60 steps in two processes, by each runner."""
    runs = {}
    for name, words in RUNNERS.items():
        workdir = tmp_path_factory.mktemp("two") / name
        argv = ["train.py", *TINY, *STEADY, *words, "--config.steps=60"]
        status, out = finish(launched(environment, *argv, f"--workdir={workdir}"))
        assert status == 0, out
        runs[name] = workdir
    return runs


RUNNERS = {
    "pmap": ["--config.parallel=pmap"],
    "fsdp": ["--config.parallel=sharded", "--config.fsdp=0"],
}


@pytest.mark.parametrize("name", RUNNERS)
@pytest.mark.parametrize("victim", [0, 1])
def test_a_run_recovers_when_one_of_two_processes_is_killed(
    tmp_path, environment, two_processes, name, victim
):
    """The other ends within 2 s, both start again, and the result is bitwise the same."""
    argv = ["train.py", *TINY, *STEADY, *RUNNERS[name], "--config.steps=60"]
    process = launched(environment, *argv, f"--workdir={tmp_path / 'run'}")
    until(lambda: saved(tmp_path / "run")[-1:] == [30], "step 30")
    pids = members(process)
    assert len(pids) == 2
    os.kill(pids[victim], signal.SIGKILL)
    began = time.monotonic()
    until(lambda: not any(alive(pid) for pid in pids), "the end of both", 10)
    assert time.monotonic() - began < 2
    status, out = finish(process)
    assert status == 0, out
    assert f"process {victim} of 2 was ended by SIGKILL" in out and "restart 1 of 3" in out
    assert re.search(r"resumed from the checkpoint of step (20|30|40) of 60", out)
    a, b = newest(two_processes[name]), newest(tmp_path / "run")
    assert a[0] == b[0] == 60
    assert_bitwise_equal(a[1], b[1])
    assert rows_of(two_processes[name]) == rows_of(tmp_path / "run")


def test_the_default_runner_is_that_of_the_processes(tmp_path, environment):
    """Sharded among two, pmap in one; a run that never asked for one follows its processes."""
    argv = ["train.py", *TINY, *STEADY, f"--workdir={tmp_path / 'run'}"]
    status, out = finish(launched(environment, *argv, "--config.steps=10"))
    assert status == 0 and "2 x 4 cpu devices by sharded" in out, out
    alone = environment | {"JAX_NUM_CPU_DEVICES": "8"}
    status, out = finish(start(alone, *argv, "--config.steps=20"))
    assert status == 0 and "1 x 8 cpu devices by pmap" in out, out
    assert "resumed from the checkpoint of step 10" in out


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]


def test_sigterm_to_one_of_two_and_resumption_on_other_numbers_of_devices(
    tmp_path, environment, two_processes
):
    """Both save the same step and exit with 75; then the run resumes on 8 devices, and on one."""
    argv = ["train.py", *TINY, *STEADY, *RUNNERS["fsdp"]]
    process = launched(
        environment, *argv, "--config.steps=60", f"--workdir={tmp_path / 'run'}",
        options=["--restarts=0"],
    )  # fmt: skip
    until(lambda: saved(tmp_path / "run")[-1:] == [30], "step 30")
    began = time.monotonic()
    os.kill(members(process)[1], signal.SIGTERM)
    status, out = finish(process)
    assert status == 75, out
    assert time.monotonic() - began < 20
    stopped = int(re.search(r"asked to stop: saved step (\d+)", out)[1])
    assert saved(tmp_path / "run")[-1] == stopped >= 30
    whole = newest(two_processes["fsdp"])[1]
    for devices in (8, 1):
        copy = tmp_path / str(devices)
        subprocess.run(["cp", "-r", tmp_path / "run", copy], check=True)
        alone = environment | {"JAX_NUM_CPU_DEVICES": str(devices)}
        status, out = finish(start(alone, *argv, "--config.steps=60", f"--workdir={copy}"))
        assert status == 0 and f"resumed from the checkpoint of step {stopped}" in out, out
        got = newest(copy)[1]
        named = lambda tree: {
            jax.tree_util.keystr(k): np.asarray(v)
            for k, v in jax.tree_util.tree_leaves_with_path(tree["params"])
        }
        layouts.assert_close(named(got), named(whole), f"on {devices} devices")


def test_a_process_that_makes_no_progress_is_noticed(tmp_path, environment, two_processes):
    argv = ["train.py", *TINY, *STEADY, *RUNNERS["fsdp"], "--config.steps=60"]
    process = launched(
        environment, *argv, f"--workdir={tmp_path / 'run'}", options=["--patience=25"]
    )
    until(lambda: saved(tmp_path / "run")[-1:] == [30], "step 30")
    os.kill(members(process)[1], signal.SIGSTOP)
    status, out = finish(process)
    assert status == 0, out
    assert re.search(r"process \d of 2 (made no step for 25 s|was ended by SIGABRT)", out)
    assert_bitwise_equal(newest(tmp_path / "run")[1], newest(two_processes["fsdp"])[1])


def test_an_exception_in_one_process_ends_both_at_once(tmp_path, environment):
    (tmp_path / "forked.py").write_text(
        "import sys\n"
        "import train\n"
        "from diffjax.experiment import dataset\n"
        "from diffjax.experiment.command_line import parse\n"
        "from diffjax.training.distributed import failing_fast\n"
        "import jax\n"
        "train_batch = dataset.train_batch\n"
        "def bad(examples, seed, step, **options):\n"
        "    if step == 25 and jax.process_index() == 1:\n"
        "        raise RuntimeError('planted')\n"
        "    return train_batch(examples, seed, step, **options)\n"
        "dataset.train_batch = bad\n"
        "with failing_fast():\n"
        "    train.train(*parse(sys.argv[1:]))\n"
    )
    argv = [tmp_path / "forked.py", *TINY, *STEADY, "--config.steps=60"]
    process = launched(
        environment, *argv, f"--workdir={tmp_path / 'run'}", options=["--restarts=1"]
    )
    began = time.monotonic()
    status, out = finish(process)
    assert status == 70 and "RuntimeError: planted" in out and "giving up" in out
    assert "resumed from the checkpoint of step 20" in out
    assert time.monotonic() - began < 150
    assert saved(tmp_path / "run") == [10, 20]


def test_only_the_first_process_writes_metrics(two_processes):
    for workdir in two_processes.values():
        assert [row["step"] for row in metrics.read(workdir)] == [10, 20, 30, 40, 50, 60]
        assert (workdir / "samples.png").exists()
