"""Files that are complete or absent, whenever a process or the machine stops; locks; and hashes."""

import contextlib
import datetime
import hashlib
import os
import secrets
import socket
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from . import store


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write to a temporary file, which then replaces `path`; after an error the old file stays.

    Yields:
      The temporary path, NAME.*.tmp. It is another one each time, so that of two processes that
      write at once each replaces the file by a whole one. A kill may leave it behind; nothing reads
      it. If `path` is on a store, the file is on this machine, and is uploaded at the end.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "numbers.txt"
    >>> with replacing(path) as new:
    ...     _ = new.write_text("1 2 3")
    >>> path.read_text(), [file.name for file in path.parent.iterdir()]
    ('1 2 3', ['numbers.txt'])
    """
    if store.is_remote(path):
        with tempfile.TemporaryDirectory(prefix="diffjax-") as folder:
            yield (new := Path(folder) / path.name)
            store.upload(new, path)
        return
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """`Path.write_text`, but the file is complete or unchanged."""
    with replacing(path) as new:
        new.write_text(text)


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of files, would survive a power cut."""
    if store.is_remote(path):
        return  # it has confirmed the write
    with contextlib.suppress(PermissionError):  # Windows opens no folders
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


LOCK = "lock"
"""The file in a folder by which it is locked."""


class Lock:
    """An exclusive lock on a folder, which the kernel releases when the process ends.

    It also ends with this object, or at `release`.

    Raises:
      ValueError: if another process holds it; says which.
    """

    def __init__(self, folder: Path) -> None:
        file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        self.release = weakref.finalize(self, os.close, file)
        try:
            import fcntl  # not on Windows

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(file, 1000).decode(errors="replace").strip() or "another process"
            raise ValueError(f"{folder} is in use by {holder}") from error
        except (ImportError, OSError) as error:
            print(f"{folder} cannot be locked against a second process: {error}", flush=True)
        os.ftruncate(file, 0)
        os.write(file, f"{this_process()}\n".encode())


def this_process() -> str:
    """This process in words, with the time, for whoever finds what it holds."""
    now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    return f"process {os.getpid()} on {socket.gethostname()} since {now}"


def digest(tree: Any) -> str:
    """The SHA-256 of a pytree of arrays: of the path, dtype, shape and bytes of each.

    >>> a = {"w": np.arange(3), "b": np.zeros(2)}
    >>> digest(a) == digest({"b": np.zeros(2), "w": np.arange(3)})
    True
    >>> digest(a) == digest(a | {"b": np.ones(2)})
    False
    """
    found = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        x = np.ascontiguousarray(leaf)
        found.update(f"{jax.tree_util.keystr(path)} {x.dtype} {x.shape}\n".encode())
        found.update(x.tobytes())
    return found.hexdigest()


def file_digest(path: Path, like: str = "") -> str:
    """The SHA-256 of a file; or, if it is to be compared with a digest `md5:...`, its MD5."""
    kind = "md5" if like.startswith("md5:") else "sha256"
    with path.open("rb") as file:
        found = hashlib.file_digest(file, kind).hexdigest()
    return found if kind == "sha256" else f"{kind}:{found}"


def unequal(has: dict[str, Any], wanted: dict[str, Any], message: str) -> dict[str, str]:
    """A line, by name, for each entry in which two flat dicts differ; a missing one counts as None.

    >>> unequal({"a": 1, "b": 2}, {"b": 3, "a": 1}, "{} is not {}")
    {'b': 'b: 2 is not 3'}
    """
    return {
        name: f"{name}: {message.format(has.get(name), wanted.get(name))}"
        for name in sorted(has.keys() | wanted.keys())
        if has.get(name) != wanted.get(name)
    }


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The entries of nested dicts, by their full names.

    >>> flatten({"model": {"width": 8}, "seed": 0})
    {'model.width': 8, 'seed': 0}
    """
    if not isinstance(tree, dict):
        return {prefix[:-1]: tree}
    return {k: v for name, sub in tree.items() for k, v in flatten(sub, f"{prefix}{name}.").items()}
