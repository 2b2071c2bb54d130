"""What works around Orbax, each piece with the reason and the version that needs it.

All of it was seen with orbax-checkpoint 0.12; a version without these faults needs none of it.
"""

import contextlib
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import orbax.checkpoint as ocp
import tensorstore

from . import store

ATTEMPTS, PAUSE = 20, 0.1  # of `remove_failed_save`; seconds


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


def close_failed(manager: ocp.CheckpointManager) -> None:
    """Close a manager whose save failed; it raises the error of that save again."""
    with contextlib.suppress(Exception):
        manager.close()


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
