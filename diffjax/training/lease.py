"""The lock of a run's directory, on a disk or on a store.

A disk's lock ends with its process (`files.Lock`). A store has no such lock, so a lease is an
object that its holder rewrites every `BEAT` seconds. A process that finds one waits: a lease that
is rewritten meanwhile is held, and one that is not for `PATIENCE` seconds was left behind by a
process that was killed, and is taken over. No clocks are compared. One that a dead process of the
same machine left behind is taken over at once.
"""

import contextlib
import os
import secrets
import socket
import threading
import time
import weakref
from pathlib import Path
from typing import Any

from . import store
from .files import Lock, this_process

BEAT = 10.0
"""Seconds between two writes of a lease."""
PATIENCE = 40.0
"""Seconds without a write after which a lease counts as left behind."""


class Lease:
    """An exclusive lease of a folder on a store; it ends with the process, or at `release`.

    Two processes that start in the same moment are told apart by the store, which creates an object
    only once. A process that cannot reach the store for `PATIENCE` seconds may lose its lease to
    another; it learns of that at the next write.

    Attributes:
      lost: who has taken it, or None.

    Raises:
      ValueError: if another process holds it; says which.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / "lock"
        self.text = f"{this_process()}\n{_world()}\n{secrets.token_hex(8)}\n".encode()
        self.lost: str | None = None
        self._acquire()
        ended = threading.Event()
        self.release = weakref.finalize(self, _end, ended, self.path, self.text)
        threading.Thread(target=_beat, args=(weakref.ref(self), ended), daemon=True).start()

    def _acquire(self):
        first, began = _read(self.path), time.monotonic()
        if first and not _is_left(first[1]):
            print(f"{self.folder} is in use by {_name(first[1])}, or was: waiting", flush=True)
        while (found := _read(self.path)) is not None:
            if first and found != first:
                raise ValueError(f"{self.folder} is in use by {_name(found[1])}")
            first = first or found
            if _is_left(found[1]) or time.monotonic() - began > PATIENCE:
                self.path.unlink(missing_ok=True)
                break
            time.sleep(min(1.0, BEAT / 4))
        try:
            path: Any = self.path
            path.create(self.text)
        except FileExistsError:
            now = _read(self.path)
            if now is None or now[1] != self.text:  # else an answer was lost, and it was sent again
                other = _name(now[1]) if now else "another process"
                raise ValueError(f"{self.folder} is in use by {other}") from None

    def beat(self) -> None:
        """Write the lease again, or learn that it is lost."""
        found = self.path.read_bytes()
        if found != self.text:
            self.lost = _name(found)
        else:
            self.path.write_bytes(self.text)


def lock(folder: Path) -> Lock | Lease:
    """Lock a run's directory; raises what `Lock` and `Lease` do."""
    return Lease(folder) if store.is_remote(folder) else Lock(folder)


def _beat(holder, ended):
    """Write a lease again and again, until it is released, lost or forgotten."""
    while not ended.wait(BEAT) and (lease := holder()) is not None and lease.lost is None:
        try:
            lease.beat()
        except FileNotFoundError:
            lease.lost = "whoever deleted its lock"
        except OSError:
            pass  # the store is away
        del lease


def _end(ended, path, text):
    ended.set()
    with contextlib.suppress(OSError):
        if path.read_bytes() == text:
            path.unlink()


def _read(path):
    """The version and the content of a lease, or None."""
    try:
        return path.info().get("generation"), path.read_bytes()
    except FileNotFoundError:
        return None


def _name(text):
    return text.decode(errors="replace").partition("\n")[0] or "another process"


def _world():
    """What two processes share if the number of one means the same to the other."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"unknown {secrets.token_hex(8)}"


def _is_left(text):
    """Whether a lease is that of a process of this machine that has ended."""
    lines = text.decode(errors="replace").splitlines()
    if len(lines) != 3 or lines[1] != _world():
        return False
    number = lines[0].removeprefix("process ").partition(" ")[0]
    return number.isdecimal() and not Path(f"/proc/{number}").exists()
