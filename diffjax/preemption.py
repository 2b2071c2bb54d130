"""Being asked to stop: every process saves at the same step and exits with `RESUME`.

A scheduler that takes machines back sends SIGTERM and waits a while; a user presses Ctrl-C. It may
reach one process of many.
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
"""Exit status of a run that was stopped and can go on: EX_TEMPFAIL, "try again later"."""

PROGRESS = "DIFFJAX_PROGRESS"
"""The environment variable by which the launcher names the file that `tell_alive` touches."""


def tell_alive() -> None:
    """Let the launcher, if there is one, know that this process makes progress."""
    if PROGRESS in os.environ:
        Path(os.environ[PROGRESS]).touch()


@contextlib.contextmanager
def watch() -> Iterator[Callable[[int], bool]]:
    """Catch SIGTERM and SIGINT, and notice when the launcher has died.

    Yields:
      A function of how often it was called before, or of any number that grows by one from call to
      call: whether to save and stop there, the same in every process. In a process alone, a second
      signal acts as if nothing was caught.
    """
    launcher = os.getppid() if PROGRESS in os.environ else None
    signals: list[int] = []
    many = jax.distributed.is_initialized()
    in_charge = threading.current_thread() is threading.main_thread()
    catch = [signal.SIGINT] if many else [signal.SIGINT, signal.SIGTERM]
    former = {number: signal.getsignal(number) for number in catch}

    def restore():
        for number, handler in former.items():
            signal.signal(number, handler)

    def note(number, frame):
        restore()
        signals.append(number)
        if many:
            # JAX catches this one itself, and lets all processes know.
            os.kill(os.getpid(), signal.SIGTERM)

    def asked(step):
        tell_alive()
        if launcher not in (None, os.getppid()) and not signals:
            note(signal.SIGINT, None)
        return multihost_utils.reached_preemption_sync_point(step) if many else bool(signals)

    if in_charge:
        for number in catch:
            signal.signal(number, note)
    try:
        yield asked
    finally:
        if in_charge:
            restore()
