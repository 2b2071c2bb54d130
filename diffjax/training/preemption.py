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

PROGRESS = "DIFFJAX_PROGRESS"
"""The environment variable in which the launcher names the file that `report_progress` touches."""


LAUNCHER = "DIFFJAX_LAUNCHER"
"""The environment variable that holds the launcher's process id."""


def report_progress() -> None:
    """Show the launcher, if there is one, that this process makes progress."""
    if PROGRESS in os.environ:
        Path(os.environ[PROGRESS]).touch()


@contextlib.contextmanager
def watch() -> Iterator[Callable[[int], bool]]:
    """Catch SIGTERM and SIGINT, and notice when the launcher has died.

    Yields:
      A function `should_stop(step)`, where `step` grows by one from call to call; every process
      gets the same answer. In a single process, a second signal has its usual effect.
    """
    launcher = os.environ.get(LAUNCHER)
    signals: list[int] = []
    many = jax.distributed.is_initialized()
    in_main_thread = threading.current_thread() is threading.main_thread()
    catch = [signal.SIGINT] if many else [signal.SIGINT, signal.SIGTERM]
    former = {number: signal.getsignal(number) for number in catch}

    def restore():
        for number, handler in former.items():
            signal.signal(number, handler)

    def note(number, frame):
        restore()
        signals.append(number)
        if many:
            # JAX catches SIGTERM itself, and informs all processes.
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
