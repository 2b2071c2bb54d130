"""The launcher, with scripts in place of train.py: it never hangs, and prints why it ends."""

import importlib
import io
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from diffjax.training import launch

ROOT = Path(__file__).parents[1]

# Process i of a script: a few "steps", then the body that a test gives.
SCRIPT = """
import os, pathlib, signal, sys, time
words = dict(w.removeprefix("--distributed.").split("=") for w in sys.argv[1:])
me, n = int(words["process"]), int(words["processes"])
sign = pathlib.Path(os.environ["DIFFJAX_PROGRESS"])
runs = pathlib.Path("runs%d" % me); attempt = len(runs.read_text()) if runs.exists() else 0
runs.write_text("x" * (attempt + 1))
ports = open("ports", "a"); ports.write(words["coordinator"] + "\\n"); ports.close()
sign.touch()
"""


def start(tmp_path, body, *options):
    """The launcher as a process, to be sent signals."""
    (tmp_path / "script.py").write_text(SCRIPT + body)
    return subprocess.Popen(
        [sys.executable, "-m", "diffjax.launch", "--processes=2", *options, "--", "script.py"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


def finish(process):
    out, _ = process.communicate(timeout=60)
    return process.returncode, out


@pytest.fixture
def launched(tmp_path, monkeypatch, capfd):
    """(body of a script, options) -> the launcher's exit status and output, in this process."""

    def run(body, *options):
        (tmp_path / "script.py").write_text(SCRIPT + body)
        monkeypatch.chdir(tmp_path)
        taken = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        handlers = [signal.getsignal(number) for number in taken]
        try:
            status = launch.main(["--processes=2", *options, "--", "script.py"])
        finally:
            for number, handler in zip(taken, handlers, strict=True):
                signal.signal(number, handler)
        return status, "".join(capfd.readouterr())

    return run


def attempts(tmp_path):
    return len((tmp_path / "runs0").read_text())


def test_processes_that_succeed_end_with_0(launched):
    # One write each: the lines of two processes on one pipe must not mix.
    body = "os.write(1, f'{me} {n} {os.environ[\"JAX_NUM_CPU_DEVICES\"]}\\n'.encode())"
    status, out = launched(body, "--devices=3")
    assert status == 0 and sorted(out.split("\n")) == ["", "0 2 3", "1 2 3"]
    # Without --devices, the number that conftest.py sets.
    status, out = launched(body)
    assert status == 0 and sorted(out.split("\n")) == ["", "0 2 8", "1 2 8"]


@pytest.mark.parametrize(
    ("death", "why"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "process 1 of 2 was ended by SIGKILL"),
        ("sys.exit(70)", "process 1 of 2 ended with status 70"),
    ],
)
def test_when_one_dies_the_others_end_at_once_and_all_start_again(launched, tmp_path, death, why):
    body = f"""
while not pathlib.Path("runs0").exists(): time.sleep(0.01)  # else its second attempt is its first
if attempt == 0 and me == 1: {death}
if attempt == 0: time.sleep(60)
"""
    began = time.monotonic()
    status, out = launched(body)
    assert status == 0
    assert f"launch: {why}" in out and "launch: restart 1 of 3" in out
    assert time.monotonic() - began < 30  # the launcher did not wait for the sleeping process
    ports = (tmp_path / "ports").read_text().split()
    assert len(set(ports)) == 2  # a port for each attempt


def test_a_process_that_hangs_is_noticed(launched):
    body = """
for _ in range(600 if attempt == 0 else 3):
    if me == 0 or attempt: sign.touch()
    time.sleep(0.1)
"""
    status, out = launched(body, "--patience=2")
    assert status == 0 and "process 1 of 2 made no step for 2 s" in out


@pytest.mark.faults
def test_it_gives_up_after_the_allowed_restarts(launched, tmp_path):
    status, out = launched("sys.exit(70)", "--restarts=2")
    assert status == 70 and attempts(tmp_path) == 3 and "launch: giving up" in out


@pytest.mark.parametrize("status", launch.REFUSED)
def test_a_script_that_refuses_its_input_is_not_restarted(launched, tmp_path, status):
    got, _ = launched(f"sys.exit({status})")
    assert got == status and attempts(tmp_path) == 1


GRACEFUL = """
def stop(*_):
    time.sleep(0.5); pathlib.Path("saved%d" % me).touch(); sys.exit(75)
signal.signal(signal.SIGTERM, stop)
pathlib.Path("ready%d" % me).touch()
while attempt == 0: time.sleep(0.1)
"""


def until(path):
    for _ in range(300):
        if path.exists():
            return
        time.sleep(0.1)
    pytest.fail(f"no {path}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_and_the_run_can_be_resumed(tmp_path, number):
    process = start(tmp_path, GRACEFUL)
    until(tmp_path / "ready0")
    until(tmp_path / "ready1")
    process.send_signal(number)
    status, out = finish(process)
    assert status == 75 and "was stopped, saved, and can go on" in out
    assert (tmp_path / "saved0").exists() and (tmp_path / "saved1").exists()
    assert attempts(tmp_path) == 1


@pytest.mark.faults
def test_a_process_that_does_not_end_within_the_grace_is_killed(tmp_path):
    body = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + "time.sleep(60)"
    process = start(tmp_path, body, "--grace=1")
    until(tmp_path / "runs1")
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    status, out = finish(process)
    assert status == 70 and "not all of 2 processes ended within 1 s of grace" in out


def test_a_run_that_is_stopped_before_it_can_save_can_be_resumed(tmp_path):
    process = start(tmp_path, "time.sleep(60)")
    until(tmp_path / "runs1")
    process.send_signal(signal.SIGHUP)
    status, out = finish(process)
    assert status == 75 and "ended by SIGTERM" in out


def test_the_status_tells_the_signal(launched):
    body = "os.kill(os.getpid(), signal.SIGKILL)"
    status, _ = launched(body, "--restarts=0")
    assert status == 128 + 9


def test_processes_that_something_else_stopped_start_again(launched):
    body = "if attempt == 0: sys.exit(75)"
    status, out = launched(body)
    assert status == 0 and "restart 1 of 3" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--processes=0", "--", "x.py"], "processes and devices at least 1"),
        (["--processes=1", "--patience=0", "--", "x.py"], "must be positive"),
        (["--processes=1"], "give the script after --"),
    ],
)
def test_bad_options_are_refused(argv, message, capsys):
    assert launch.main(argv) == 2
    assert message in capsys.readouterr().out


def test_make_pod_tells_the_story_without_what_looks_like_failure(monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "studies")
    pod = importlib.import_module("pod")
    killed, log = threading.Event(), io.StringIO()

    def output():
        yield "[Gloo] Rank 1 is connected to 1 peer ranks.\n"
        yield from ("1[Gloo] Rank  is connected to 1 peer ranks. Expected: 0\n", "1\n")
        yield "step 40/120  loss 0.6\n"
        killed.set()
        yield from ("Traceback (most recent call last):\n", "  jaxlib: connection closed\n")
        yield from ("launch: process 1 of 2 was ended by SIGKILL\n", "launch: restart 1 of 3\n")
        yield from ("Traceback (most recent call last):\n", "ValueError: a failure\n")

    pod.tell(output(), log, killed)
    assert log.getvalue() == "".join(output())
    assert capsys.readouterr().out.splitlines() == [
        "step 40/120  loss 0.6",
        "launch: process 1 of 2 was ended by SIGKILL",
        "launch: restart 1 of 3",
        "Traceback (most recent call last):",
        "ValueError: a failure",
    ]
