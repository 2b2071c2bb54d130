"""What works around Orbax, each piece with the reason and the version that needs it.

All of it was seen with orbax-checkpoint 0.12; a version without these faults needs none of it.
"""

import concurrent.futures
import contextlib
import logging
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import orbax.checkpoint as ocp
import tensorstore

from . import store

ATTEMPTS, PAUSE = 20, 0.1  # of `remove_failed_save`; seconds
CLOSING = 5.0  # of `close_failed`; seconds


def silence_logs() -> None:
    """Orbax logs every file, and hundreds of lines for a save that failed: log nothing.

    `checkpoints` reports a failure in one line of its own.
    """
    logging.getLogger("absl").setLevel(logging.CRITICAL)


@contextlib.contextmanager
def without_event_loop_complaints() -> Iterator[None]:
    """Drop the exception "Event loop is closed" that a failed save leaves behind for each array.

    Orbax abandons its coroutines when a save fails, and Python reports each of them through
    `sys.unraisablehook` when it is collected.
    """
    hook = sys.unraisablehook
    complaint = "Event loop is closed"
    sys.unraisablehook = lambda what: None if complaint in str(what.exc_value) else hook(what)
    try:
        yield
    finally:
        sys.unraisablehook = hook


UNREADABLE = "[*?"
"""Characters that a path may not contain: Orbax takes the path for a pattern, loses the arrays when
it merges the files of its processes, and reports success."""


def stored_arrays(folder: Path) -> set[str]:
    """The names of the arrays that can be read from a checkpoint, such as `params.conv.kernel`.

    Orbax's own metadata lists the arrays that it was given, whether or not it has stored them.
    """
    base = store.key_value_store(folder / "default")
    opened = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
    keys = opened.list().result()
    names = (key.decode().rpartition("/") for key in keys)
    return {name for name, _, file in names if file == ".zarray"}


def wait(manager: ocp.CheckpointManager, seconds: float) -> None:
    """Wait for a manager's save, and raise its error; Orbax itself waits for as long as it takes.

    Raises:
      TimeoutError: if it was not complete after so many seconds; its threads then go on.
    """
    _within(seconds, manager.wait_until_finished)


def close_failed(manager: ocp.CheckpointManager) -> None:
    """Close a manager whose save failed, unless its threads go on; it raises the error again."""
    with contextlib.suppress(Exception):
        _within(CLOSING, manager.close)


def _within(seconds, function):
    """Call a function in a thread, which is left to itself after so many seconds."""
    done: concurrent.futures.Future[None] = concurrent.futures.Future()

    def call():
        try:
            done.set_result(function())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    try:
        done.result(seconds)
    except TimeoutError as error:
        if done.done():  # it has raised one itself
            raise
        raise TimeoutError(f"it was not complete after {seconds:.0f} s") from error


def remove_failed_save(folder: Path, committed: Path) -> None:
    """Delete what a failed save left in its folder, unless the save was committed after all.

    The threads of the failed save may still write into the folder and so create it again, which
    would make the next save of the same step fail. So deletion is repeated until it lasts.
    """
    for _ in range(ATTEMPTS):
        if committed.exists():
            return
        store.remove(folder)
        time.sleep(PAUSE)
        if not folder.exists():
            return
