"""Run a script as several processes of this machine, and restart them if one fails.

    python -m diffjax.launch --processes 2 -- train.py --workdir=runs/digits
    python -m diffjax.launch --help

The script gets `--distributed.coordinator`, `--distributed.processes` and `--distributed.process`.
When a process dies, or makes no step for `patience` seconds, the launcher ends the others at once
and starts all of them again, on a new port; they resume from the newest checkpoint. It passes
SIGTERM and Ctrl-C on: the run saves and ends with status 75. On a pod the scheduler does this; on
one machine with GPUs a single process drives all of them, and needs no launcher.
"""

import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import tyro

from .distributed import CRASHED, cores
from .output import tolerated
from .preemption import LAUNCHER, PROGRESS, RESUME
from .telemetry import ALLOCATOR, TUNABLES

DEVICES = "JAX_NUM_CPU_DEVICES"

BACK_OFF = 5.0
"""Seconds before the second restart in a row; before each further one about twice as many."""

REFUSED = (1, 2)
"""Exit statuses of a script that refused its input: it would refuse it again."""


@dataclasses.dataclass(frozen=True)
class Options:
    """How to start a script, and how often to restart it."""

    processes: int
    """Number of processes."""
    devices: int | None = None
    """CPU devices of each process; None: JAX_NUM_CPU_DEVICES, or an equal share of the cores."""
    restarts: int = 3
    """Number of restarts within `per` seconds before the launcher gives up."""
    per: float = 3600.0
    """Seconds after which a restart no longer counts: a long run may fail now and then."""
    patience: float = 900.0
    """Seconds without a step, compiling and drawing included, after which a process counts as
    hung."""
    grace: float = 60.0
    """Seconds that the processes have to save and end after they are asked to stop."""


def launch(options: Options, command: Sequence[str]) -> int:
    """Run `python COMMAND...` until it succeeds or cannot succeed; return its exit status.

    Raises:
      ValueError: if an option is out of range.
    """
    if min(options.processes, options.devices or 1) < 1 or options.restarts < 0:
        raise ValueError(f"{options}: processes and devices at least 1, restarts at least 0")
    if min(options.patience, options.grace, options.per) <= 0:
        raise ValueError(f"{options}: patience, grace and per must be positive")
    signals: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: signals.append(number))
    restarts: list[float] = []
    while True:
        status, why = _run_once(options, command, signals)
        if status == 0:
            return 0
        if status < 0:
            # The status that a shell reports. A run that was stopped before its first save lost
            # nothing, and can be resumed.
            status = RESUME if signals else 128 - status
        print(f"launch: {why}", flush=True)
        if signals or status in REFUSED:
            return status
        restarts = [at for at in restarts if time.monotonic() - at < options.per]
        if len(restarts) == options.restarts:
            print("launch: giving up", flush=True)
            return status
        time.sleep(BACK_OFF * (2 ** len(restarts) - 1))  # at once, then ever later
        restarts.append(time.monotonic())
        print(f"launch: restart {len(restarts)} of {options.restarts}", flush=True)


def _run_once(options, command, signals):
    """Start all processes and watch them until all have ended; return status and reason."""
    processes: list[subprocess.Popen] = []
    with tempfile.TemporaryDirectory(prefix="diffjax-launch-") as folder:
        signs = [Path(folder) / str(i) for i in range(options.processes)]
        try:
            _start(processes, options, command, signs)
            return _watch(options, processes, signs, signals)
        finally:
            for process in processes:
                # The group, also of a process that has ended: it may have left children behind.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _start(processes, options, command, signs):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    share = max(1, cores() // options.processes)
    devices = options.devices or 2 ** (share.bit_length() - 1)  # a power of 2, as batches are
    chosen = {} if options.devices else {k: v for k, v in os.environ.items() if k == DEVICES}
    for i, sign in enumerate(signs):
        sign.touch()
        which = dict(coordinator=f"127.0.0.1:{port}", processes=options.processes, process=i)
        words = [f"--distributed.{name}={value}" for name, value in which.items()]
        environment = {TUNABLES: ALLOCATOR} | os.environ
        environment |= {PROGRESS: str(sign), LAUNCHER: str(os.getpid())}
        environment |= {DEVICES: str(devices)} | chosen
        # A session of its own, so that Ctrl-C reaches the launcher alone, which passes it on.
        processes.append(
            subprocess.Popen(
                [sys.executable, *command, *words], env=environment, start_new_session=True
            )
        )


def _watch(options, processes, signs, signals):
    n, deadline, stopping = len(processes), float("inf"), False
    # Not compared with the wall clock, which may be set while the run goes on.
    progress = [(0.0, time.monotonic())] * n
    while True:
        time.sleep(0.1)
        statuses = [process.poll() for process in processes]
        ended = [status for status in statuses if status is not None]
        if len(ended) == n and not any(ended):
            return 0, "all processes succeeded"
        for i, status in enumerate(statuses):
            if status not in (None, 0, RESUME):
                return status, f"process {i} of {n} {_how(status)}"
        if len(ended) == n:
            return RESUME, "the run was stopped, saved, and can go on"
        if signals and not stopping:
            stopping = True
            for process in processes:
                process.send_signal(signal.SIGTERM)
        if (signals or RESUME in ended) and deadline == float("inf"):
            deadline = time.monotonic() + options.grace
        if time.monotonic() > deadline:
            return CRASHED, f"not all of {n} processes ended within {options.grace:g} s of grace"
        for i, sign in enumerate(signs):
            changed = sign.stat().st_mtime if sign.exists() else 0.0
            if changed != progress[i][0]:
                progress[i] = changed, time.monotonic()
            if statuses[i] is None and time.monotonic() - progress[i][1] > options.patience:
                return CRASHED, f"process {i} of {n} made no step for {options.patience:g} s"


def _how(status):
    if status < 0:
        return f"was ended by {signal.Signals(-status).name}"
    return f"ended with status {status}"


def main(argv: Sequence[str]) -> int:
    """`[--processes N ...] -- SCRIPT.py [ARGUMENTS]`."""
    at = argv.index("--") if "--" in argv else len(argv)
    options = tyro.cli(Options, args=argv[:at], description=__doc__, use_underscores=True)
    command = argv[at + 1 :]
    if not command:
        print("error: give the script after --, as in: --processes 2 -- train.py")
        return REFUSED[-1]
    with tolerated():
        try:
            return launch(options, command)
        except ValueError as error:
            print(f"error: {error}")
            return REFUSED[-1]
