"""What a run writes beside its checkpoints, on this machine first and then on a store.

Files that grow, pictures and traces need a disk. A run on a store writes them into a folder of this
machine, and a thread uploads those that have changed, whole. So a store that is slow or away never
stops training, and what it has not taken yet waits.

A process that is killed leaves its folder behind. The kernel then releases the lock in it, by which
the next start of the run on this machine tells such a folder from that of a process that lives, and
deletes it: what the run needs of it was on the store before the last checkpoint was sealed.
"""

import contextlib
import hashlib
import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

from . import store
from .files import LOCK, Lock

EVERY = 30.0
"""Seconds between two uploads. A store takes one write of an object per second at most."""
READ = ("config.json", "wandb.id")
"""Files of a run that writers of metrics read (`writers`)."""


class Mirror:
    """A folder whose files go to a run's directory on a store; on a disk, the directory itself.

    Args:
      workdir: the run's directory.
      say: prints a line.
      moved: folders in it whose files are written once; they are deleted here when they are there.
      hold: called before each upload; raises an OSError if the directory is no longer this run's.
      active: False: the folder of a process that writes nothing.

    Attributes:
      folder: where to write.
    """

    def __init__(
        self,
        workdir: Path,
        say: Callable[[str], None],
        moved: tuple[str, ...] = (),
        hold: Callable[[], None] = lambda: None,
        active: bool = True,
    ) -> None:
        self.workdir, self._say, self._moved, self._hold = workdir, say, moved, hold
        self.folder = workdir
        self._sent: dict[str, tuple[int, int]] = {}
        self._waiting: list[str] = []
        self._uploading, self._ended = threading.Lock(), threading.Event()
        self._active = active and store.is_remote(workdir)
        if self._active:
            prefix = f"diffjax-run-{hashlib.sha256(str(workdir).encode()).hexdigest()[:16]}-"
            _remove_left(prefix)
            self.folder = Path(tempfile.mkdtemp(prefix=prefix))
            self._lock = Lock(self.folder)
            for name in READ:
                with contextlib.suppress(FileNotFoundError):
                    (self.folder / name).write_bytes((workdir / name).read_bytes())
                    self._sent[name] = _state(self.folder / name)
            threading.Thread(target=self._run, daemon=True).start()

    def _run(self):
        while not self._ended.wait(EVERY):
            self.settle()

    def settle(self) -> bool:
        """Upload what has changed, and wait for it; whether all of it is there.

        Whatever a store fails at is said once, and is tried again the next time.
        """
        if not self._active:
            return True
        with self._uploading:
            before, self._waiting = self._waiting, []
            states = {}
            for file in sorted(self.folder.rglob("*")):
                with contextlib.suppress(FileNotFoundError):  # it was a temporary one
                    name = file.relative_to(self.folder).as_posix()
                    if file.is_file() and file.suffix != ".tmp" and name != LOCK:
                        states[name] = _state(file)
            changed = [name for name, state in states.items() if self._sent.get(name) != state]
            for i, name in enumerate(changed):
                try:
                    self._send(name)
                except OSError as error:
                    self._waiting = changed[i:]
                    if not before:
                        self._say(f"not uploaded, and tried again: {error}")
                    break
                self._sent[name] = states[name]
            return not self._waiting

    def _send(self, name):
        self._hold()
        if name.startswith(tuple(f"{folder}/" for folder in self._moved)):
            store.upload(self.folder / name, self.workdir / name)
            (self.folder / name).unlink()
        else:  # read at once, because it may grow meanwhile
            (self.workdir / name).write_bytes((self.folder / name).read_bytes())

    def close(self) -> None:
        """Upload the rest; what the store does not take stays here, and a line says where."""
        self._ended.set()
        if not self._active:
            return
        if self.settle():
            shutil.rmtree(self.folder, ignore_errors=True)
            self._lock.release()
        else:
            (self.folder / LOCK).unlink()  # the next start leaves a folder without one alone
            self._lock.release()
            names = ", ".join(self._waiting[:5]) + ", ..." * (len(self._waiting) > 5)
            self._say(f"not uploaded: {names}; they are in {self.folder}")


def _remove_left(prefix):
    """Delete the folders that killed processes have left behind."""
    for file in Path(tempfile.gettempdir()).glob(f"{prefix}*/{LOCK}"):
        with contextlib.suppress(ValueError, OSError):  # it is that of a process that lives
            lock = Lock(file.parent)
            shutil.rmtree(file.parent, ignore_errors=True)
            lock.release()


def _state(file):
    found = file.stat()
    return found.st_size, found.st_mtime_ns
