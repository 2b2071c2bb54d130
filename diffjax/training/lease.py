"""The lock of a run's directory, on a disk or on a store.

A disk's lock ends with its process (`files.Lock`). A store has no such lock, so a lease is an
object that its holder rewrites every `BEAT` seconds. A process that finds one waits: a lease that
is rewritten meanwhile is held, and one that is not for `PATIENCE` seconds was left behind by a
process that was killed, and is taken over. No clocks are compared. One that a dead process of the
same machine left behind is taken over at once.

Every write names the version of the object that it replaces, and the store refuses it if another
process has written since. So of several processes that take a lease over one succeeds, and a holder
that was stopped for longer than `PATIENCE` seconds learns at its next write that it has lost it.
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
from .files import LOCK, Lock, this_process

BEAT = 10.0
"""Seconds between two writes of a lease."""
PATIENCE = 40.0
"""Seconds without a write after which a lease counts as left behind."""
APART = 1.0
"""Seconds between two writes at least: a store takes one write of an object per second."""


class TakenOverError(OSError):
    """Another process has taken the run's directory over, so this one may not write to it."""


class Lease:
    """An exclusive lease of a folder on a store; it ends with the process, or at `release`.

    A process that cannot reach the store for `PATIENCE` seconds may lose its lease to another; it
    learns of that at the next write.

    Attributes:
      lost: who has taken it, or None.

    Raises:
      ValueError: if another process holds it; says which.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path: Any = folder / LOCK
        self._text = f"{this_process()}\n{_world()}\n{secrets.token_hex(8)}\n".encode()
        self.lost: str | None = None
        self._writing = threading.Lock()
        self._failure = 0.0, ""
        self._version = self._wait()
        self._write()
        if self.lost:
            raise ValueError(f"{folder} is in use by {self.lost}")
        ended = threading.Event()
        self.release = weakref.finalize(self, _end, ended, self._path, self._text)
        threading.Thread(target=_beat, args=(weakref.ref(self), ended), daemon=True).start()

    def _wait(self):
        """The version of the object once no process holds it."""
        version, text = self._path.read_version()
        began = time.monotonic()
        if text is not None and not _is_left(text):
            print(f"{self.folder} is in use by {_name(text)}, or was: waiting", flush=True)
        while text is not None and not _is_left(text) and time.monotonic() - began <= PATIENCE:
            time.sleep(min(1.0, BEAT / 4))
            before, (version, text) = version, self._path.read_version()
            if text is not None and version != before:
                raise ValueError(f"{self.folder} is in use by {_name(text)}")
        return version

    def _write(self):
        """Write the object, unless another process has since this one did."""
        version = self._path.write_version(self._version, self._text)
        if version is None:
            version, text = self._path.read_version()
            if text != self._text:  # else an answer was lost, and the request was sent again
                self.lost = "whoever deleted its lock" if text is None else _name(text)
        self._version, self._written = version, time.monotonic()

    def beat(self) -> None:
        """Write the lease again, unless that was less than `APART` seconds ago.

        Raises:
          TakenOverError: if another process has taken it.
          StoreError: if the store cannot be reached.
        """
        asked = time.monotonic()
        with self._writing:
            failed, why = self._failure
            if failed > asked:  # what another thread has waited for need not be waited for again
                raise store.StoreError(why)
            if self.lost is None and time.monotonic() - self._written >= APART:
                try:
                    self._write()
                except OSError as error:
                    self._failure = time.monotonic(), str(error)
                    raise
        self.check()

    def check(self) -> None:
        """Raise a TakenOverError if it is known that another process has taken the lease."""
        if self.lost is not None:
            raise TakenOverError(f"{self.folder} was taken over by {self.lost}")


def lock(folder: Path) -> Lock | Lease:
    """Lock a run's directory; raises what `Lock` and `Lease` do."""
    return Lease(folder) if store.is_remote(folder) else Lock(folder)


def _beat(holder, ended):
    """Write a lease again and again, until it is released, lost or forgotten."""
    while not ended.wait(BEAT) and (lease := holder()) is not None and lease.lost is None:
        with contextlib.suppress(OSError):  # the store is away, or `lost` says who has taken it
            lease.beat()
        del lease


def _end(ended, path, text):
    ended.set()
    with contextlib.suppress(OSError):
        version, found = path.read_version()
        if found == text:
            path.write_version(version, None)


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
