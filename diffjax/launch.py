"""Run a script as several processes of this machine, and again from its checkpoint if one fails.

    python -m diffjax.launch --processes 2 -- train.py --workdir=runs/digits
    python -m diffjax.launch --help

The script gets `--distributed.coordinator`, `--distributed.processes` and `--distributed.process`.
When a process dies, or makes no step for `patience` seconds, the others are ended at once and all
are started again, on a new port. SIGTERM and Ctrl-C are handed on: the run saves and ends with
status 75. On a pod a scheduler does this; on one machine with GPUs a single process, without this,
drives all of them.
"""

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

from .parallel import CRASHED, cores
from .preemption import PROGRESS, RESUME
from .telemetry import ALLOCATOR, TUNABLES

DEVICES = "JAX_NUM_CPU_DEVICES"

REFUSED = (1, 2)
"""Exit statuses of a script that was asked for what cannot be: it would be so again."""


@dataclasses.dataclass(frozen=True)
class Options:
    """How to start a script, and how often to start it again."""

    processes: int
    """How many."""
    devices: int | None = None
    """CPU devices of each process; None: JAX_NUM_CPU_DEVICES, or the machine's cores shared out."""
    restarts: int = 3
    """How often to start again."""
    patience: float = 900.0
    """Seconds that a process may go without a step, compilation and pictures included."""
    grace: float = 60.0
    """Seconds that processes have to save and end when they are asked to stop."""


def launch(options: Options, command: Sequence[str]) -> int:
    """Run `python COMMAND...` until it ends well or cannot be helped; returns its exit status.

    Raises:
      ValueError: if an option is out of range.
    """
    if min(options.processes, options.devices or 1) < 1 or options.restarts < 0:
        raise ValueError(f"{options}: processes and devices at least 1, restarts at least 0")
    if min(options.patience, options.grace) <= 0:
        raise ValueError(f"{options}: patience and grace must be positive")
    asked: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: asked.append(number))
    status = 0
    for restart in range(options.restarts + 1):
        status, why = _run_once(options, command, asked)
        if status == 0:
            return 0
        if status < 0:
            # As a shell says it; what was asked to stop before it could save has lost nothing.
            status = RESUME if asked else 128 - status
        print(f"launch: {why}", flush=True)
        if asked or status in REFUSED:
            return status
        if restart < options.restarts:
            print(f"launch: restart {restart + 1} of {options.restarts}", flush=True)
    print("launch: giving up", flush=True)
    return status


def _run_once(options, command, asked):
    """Start all processes and see to them until all have ended; returns status and reason."""
    processes: list[subprocess.Popen] = []
    with tempfile.TemporaryDirectory(prefix="diffjax-launch-") as folder:
        signs = [Path(folder) / str(i) for i in range(options.processes)]
        try:
            _start(processes, options, command, signs)
            return _watch(options, processes, signs, asked)
        finally:
            for process in processes:
                if process.poll() is None:
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
        environment = {TUNABLES: ALLOCATOR} | os.environ | {PROGRESS: str(sign)}
        environment |= {DEVICES: str(devices)} | chosen
        # A session of its own: Ctrl-C reaches the launcher, which hands it on.
        processes.append(
            subprocess.Popen(
                [sys.executable, *command, *words], env=environment, start_new_session=True
            )
        )


def _watch(options, processes, signs, asked):
    n, deadline, told = len(processes), float("inf"), False
    while True:
        time.sleep(0.1)
        statuses = [process.poll() for process in processes]
        ended = [status for status in statuses if status is not None]
        if len(ended) == n and not any(ended):
            return 0, "all ended well"
        for i, status in enumerate(statuses):
            if status not in (None, 0, RESUME):
                return status, f"process {i} of {n} {_how(status)}"
        if len(ended) == n:
            return RESUME, "the run was stopped, saved, and can go on"
        if asked and not told:
            told = True
            for process in processes:
                process.send_signal(signal.SIGTERM)
        if (asked or RESUME in ended) and deadline == float("inf"):
            deadline = time.monotonic() + options.grace
        if time.monotonic() > deadline:
            return CRASHED, f"not all of {n} processes ended within {options.grace:g} s of grace"
        for i, sign in enumerate(signs):
            if statuses[i] is None and time.time() - sign.stat().st_mtime > options.patience:
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
    try:
        return launch(options, command)
    except ValueError as error:
        print(f"error: {error}")
        return REFUSED[-1]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
