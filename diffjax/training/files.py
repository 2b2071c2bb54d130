"""Files that are complete or absent, whenever a process or the machine stops; locks; and hashes."""

import contextlib
import datetime
import hashlib
import os
import re
import secrets
import socket
import urllib.parse
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np


def local(path: Path | str) -> Path:
    """A path as it is, or the path of a URL `file:///PATH`, on this machine.

    Raises:
      ValueError: if it is the URL of another place.

    >>> local("file:///home/a%20run")
    PosixPath('/home/a run')
    """
    scheme = re.match("([A-Za-z][A-Za-z0-9+.-]+):/+", str(path))  # a Path has one slash of two
    if scheme is None:
        return Path(path)
    if scheme[1].lower() != "file":
        raise ValueError(
            f"{path} is not on this machine: give a path, or mount the store {scheme[1]}://"
        )
    return Path("/" + urllib.parse.unquote(str(path)[scheme.end() :]))


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write to a temporary file, which then replaces `path`; after an error the old file stays.

    Yields:
      The temporary path, NAME.*.tmp. It is another one each time, so that of two processes that
      write at once each replaces the file by a whole one. A kill may leave it behind; nothing reads
      it.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "numbers.txt"
    >>> with replacing(path) as new:
    ...     _ = new.write_text("1 2 3")
    >>> path.read_text(), [file.name for file in path.parent.iterdir()]
    ('1 2 3', ['numbers.txt'])
    """
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
    with contextlib.suppress(PermissionError):  # Windows opens no folders
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class Lock:
    """An exclusive lock on a folder, which the kernel releases when the process ends.

    It also ends with this object, or at `release`.

    Raises:
      ValueError: if another process holds it; says which.
    """

    def __init__(self, folder: Path) -> None:
        file = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        self.release = weakref.finalize(self, os.close, file)
        try:
            import fcntl  # not on Windows

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(file, 1000).decode(errors="replace").strip() or "another process"
            raise ValueError(f"{folder} is in use by {holder}") from error
        except (ImportError, OSError) as error:
            print(f"{folder} cannot be locked against a second process: {error}", flush=True)
        now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        os.ftruncate(file, 0)
        os.write(file, f"process {os.getpid()} on {socket.gethostname()} since {now}\n".encode())


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


def file_digest(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
