"""Preemption: every process saves at the same step and exits with status `RESUME`.

A scheduler that takes machines back sends SIGTERM and waits a while; a user presses Ctrl-C. The
signal may reach only one of several processes.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from jax.experimental import multihost_utils

RESUME = 75
"""Exit status of a run that was stopped and can be resumed: EX_TEMPFAIL, "try again later"."""

SIGNALS = "SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"
"""Signals that ask a run to stop; not every platform has all of them."""

PROGRESS = "DIFFJAX_PROGRESS"
"""The environment variable in which the launcher names the file that `report_progress` touches."""


LAUNCHER = "DIFFJAX_LAUNCHER"
"""The environment variable that holds the launcher's process id."""


def report_progress() -> None:
    """Show the launcher, if there is one, that this process makes progress."""
    if PROGRESS in os.environ:
        Path(os.environ[PROGRESS]).touch()


@contextlib.contextmanager
def ending_at_once() -> Iterator[None]:
    """Let a signal that asks a run to stop end it here, with status `RESUME`.

    For work after the last checkpoint, which the same command does again. Among processes nothing
    changes: one that ended by itself would leave the others waiting.
    """

    def end(number, frame):
        raise SystemExit(RESUME)

    former = {}
    alone = not jax.distributed.is_initialized()
    if alone and threading.current_thread() is threading.main_thread():
        numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
        former = {number: signal.signal(number, end) for number in numbers}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def watch() -> Iterator[Callable[[int], bool]]:
    """Catch the signals that ask a run to stop, and notice when the launcher has died.

    They are SIGINT, SIGTERM, SIGHUP (a terminal was closed) and SIGUSR1 (Slurm's warning before the
    end of a job's time).

    Yields:
      A function `should_stop(step)`, where `step` grows by one from call to call; every process
      gets the same answer. In a single process, a second signal has its usual effect.
    """
    launcher = os.environ.get(LAUNCHER)
    signals: list[int] = []
    many = jax.distributed.is_initialized()
    in_main_thread = threading.current_thread() is threading.main_thread()
    catch = [number for name in SIGNALS if (number := getattr(signal, name, None)) is not None]
    if many:
        catch.remove(signal.SIGTERM)  # which JAX catches
    former = {number: signal.getsignal(number) for number in catch}

    def restore():
        for number, handler in former.items():
            signal.signal(number, handler)

    def note(number, frame):
        restore()
        signals.append(number)
        if many:
            # JAX then informs all processes.
            os.kill(os.getpid(), signal.SIGTERM)

    def should_stop(step):
        report_progress()
        if launcher not in (None, str(os.getppid())) and not signals:
            note(signal.SIGINT, None)
        return multihost_utils.reached_preemption_sync_point(step) if many else bool(signals)

    if in_main_thread:
        for number in catch:
            signal.signal(number, note)
    try:
        yield should_stop
    finally:
        if in_main_thread:
            restore()
