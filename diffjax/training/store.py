"""Paths on an object store, such as `gs://BUCKET/RUN`, that are used like paths on a disk.

Only this module knows of URLs, and of what a store is not. It has no folders, no renaming and no
appending: an object is read and written whole, and is there or not. Listings are never kept,
because other processes write too. Whatever the packages of a store raise becomes an `OSError` of
one line.

`as_path` makes a path of a word; whoever gets it need not ask which kind it is, and what differs
beyond the methods of a path is a function here.
"""

import base64
import contextlib
import fnmatch
import functools
import importlib
import importlib.util
import logging
import os
import re
import shutil
import tempfile
import urllib.parse
from collections.abc import Callable, Iterator
from errno import EHOSTUNREACH
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, cast

from ..extras import install

TIMEOUT = 60
"""Seconds after which a request that is not answered has failed."""
SOON = 20
"""The same, of a request whose answer is of no use later, about the version of a small object."""


class StoreError(OSError):
    """A store could not be reached, or has failed; the same command may succeed later."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.errno = EHOSTUNREACH


def _sign_in_to_google():
    """Raise a ValueError unless there are credentials; gcsfs itself would look for a minute."""
    if "STORAGE_EMULATOR_HOST" in os.environ:
        return
    auth = importlib.import_module("google.auth")
    try:
        auth.default()
    except auth.exceptions.DefaultCredentialsError as error:
        raise ValueError(
            "no credentials for Google Cloud: run `gcloud auth application-default login`, or give "
            "the machine a service account"
        ) from error


class Scheme(NamedTuple):
    """A kind of store.

    Attributes:
      package: the implementation of fsspec that reads and writes it.
      extra: of pyproject.toml, which installs the package.
      options: of fsspec for it; a listing may not be kept.
      environment: variables that are set, unless the user has, before the package is imported.
      sign_in: raises a ValueError if there are no credentials.
      driver: the name of the store's driver in TensorStore.
    """

    package: str
    extra: str
    options: dict[str, Any]
    environment: dict[str, str]
    sign_in: Callable[[], None]
    driver: str


SCHEMES = {
    "gs": Scheme(
        package="gcsfs",
        extra="gcs",
        options={"use_listings_cache": False, "requests_timeout": TIMEOUT},
        environment={
            "EPATH_USE_TF": "false",  # epath would prefer TensorFlow, if that is installed
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks a second service about buckets
        },
        sign_in=_sign_in_to_google,
        driver="gcs",
    ),
}
"""The stores that a run can be on. Another needs a row here, and an Orbax that writes to it."""


def as_path(path: Path | str) -> Path:
    """A path on this machine, or on a store, as the text of a path or of a URL names it.

    Raises:
      ValueError: if it is on a store that is not in `SCHEMES`.

    >>> as_path("file:///home/a%20run"), str(as_path(Path("gs://bucket/run")) / "config.json")
    (PosixPath('/home/a run'), 'gs://bucket/run/config.json')
    """
    if isinstance(path, RemotePath):
        return cast(Path, path)
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/+", str(path))  # a Path has one slash of two
    if found is None:
        return Path(path)
    scheme, rest = found[1].lower(), str(path)[found.end() :]
    if scheme == "file":
        return Path("/" + urllib.parse.unquote(rest))
    if scheme not in SCHEMES or not rest:
        *_, known = (f"{name}://BUCKET/NAME" for name in SCHEMES)
        raise ValueError(
            f"{scheme}://{rest} is not on this machine: give a path, or {known}; mount any other "
            "store"
        )
    return cast(Path, RemotePath(f"{scheme}:/{rest}"))


def local(path: Path | str, why: str = "") -> Path:
    """`as_path`, for what must be on this machine.

    Raises:
      ValueError: if it is not; adds `why`.
    """
    found = as_path(path)
    if is_remote(found):
        raise ValueError(f"{found} is not on this machine{why and ': '}{why}")
    return found


def is_remote(path: Path) -> bool:
    """Whether a path is on a store."""
    return isinstance(path, RemotePath)


class RemotePath(PurePosixPath):
    """A path on a store, with those methods of `Path` that stores can have.

    It can be pickled, and connects at its first use. `mkdir` does nothing: there are no folders but
    those that objects are in. Other programs cannot open it, and so it is refused where they try.
    """

    __slots__ = ()

    def __str__(self) -> str:
        scheme, *rest = self.parts
        return f"{scheme}//{'/'.join(rest)}" if scheme.endswith(":") else super().__str__()

    def __fspath__(self) -> str:
        raise TypeError(f"{self} is not on this machine")

    def _ask(self, verb: str, *args: Any, **options: Any) -> Any:
        """What a verb of fsspec returns about this path; errors are OSErrors of one line."""
        with errors(cast(Path, self)):
            return getattr(_filesystem(self.parts[0][:-1]), verb)(str(self), *args, **options)

    def absolute(self) -> "RemotePath":
        return self

    def info(self) -> dict[str, Any]:
        """What the store says of an object, or of what is below a path."""
        return self._ask("info")

    def stat(self) -> os.stat_result:
        return os.stat_result((0, 0, 0, 0, 0, 0, self.info()["size"], 0, 0, 0))

    def exists(self) -> bool:
        return self._ask("exists")

    def is_file(self) -> bool:
        return self._ask("isfile")

    def is_dir(self) -> bool:
        return self._ask("isdir")

    def mkdir(self, *_: Any, **__: Any) -> None:
        pass

    def iterdir(self) -> Iterator["RemotePath"]:
        names = (PurePosixPath(found).name for found in self._ask("ls", detail=False))
        return iter([self / name for name in names])

    def glob(self, pattern: str) -> Iterator["RemotePath"]:
        """The paths below this one that match; each part of a pattern matches one of a path."""
        parts = pattern.split("/")
        with contextlib.suppress(FileNotFoundError):
            if len(parts) == 1:
                yield from (p for p in self.iterdir() if fnmatch.fnmatchcase(p.name, pattern))
                return
            for name in self.objects():
                found = name.split("/")
                if len(found) == len(parts) and all(map(fnmatch.fnmatchcase, found, parts)):
                    yield self / name

    def objects(self) -> dict[str, dict[str, Any]]:
        """What the store says of each object below this path, by its path from here."""
        start = len(str(self).partition("//")[2]) + 1
        found = self._ask("find", detail=True)
        return {name[start:]: about for name, about in found.items() if name[start:]}

    def read_bytes(self) -> bytes:
        return self._ask("cat_file")

    def read_text(self) -> str:
        return self.read_bytes().decode()

    def write_bytes(self, data: bytes) -> None:
        self._ask("pipe_file", data)

    def write_text(self, text: str) -> None:
        self.write_bytes(text.encode())

    def read_version(self) -> tuple[bytes, bytes | None]:
        """The version of an object, and its content, or None if there is none."""
        found = self._compare("read")
        return found.stamp.generation, found.value if found.state == "value" else None

    def write_version(self, version: bytes, data: bytes | None) -> bytes | None:
        """Write an object, or delete it, if it is still of this version, which the store decides.

        Returns:
          The new version; None if nothing was written, because the object is of another version.
        """
        return self._compare("write", data, if_equal=version).generation or None

    def _compare(self, verb: str, *args: Any, **options: Any) -> Any:
        """What a verb of TensorStore returns: fsspec does not write on a condition."""
        with errors(cast(Path, self)):
            tensorstore = importlib.import_module("tensorstore")
            folder = tensorstore.KvStore.open(key_value_store(cast(Path, self.parent))).result()
            try:
                return getattr(folder, verb)(self.name, *args, **options).result(timeout=SOON)
            except (ValueError, TimeoutError) as error:
                why = str(error).partition("\n")[0] or f"no answer within {SOON} s"
                raise StoreError(f"{self}: {why:.300}") from error

    def touch(self) -> None:
        if not self.exists():
            self.write_bytes(b"")

    def unlink(self, missing_ok: bool = False) -> None:
        with contextlib.suppress(*[FileNotFoundError] * missing_ok):
            self._ask("rm_file")

    def open(self, mode: str = "r", errors: str | None = None) -> Any:
        """Open an object to read; it is copied to this machine first."""
        if mode not in ("r", "rb"):
            raise ValueError(f"{self}: mode {mode!r}: an object is written whole")
        with fetched(cast(Path, self)) as copy:
            return copy.open(mode, errors=errors)


@functools.cache
def _filesystem(scheme):
    """The file system of fsspec for a scheme.

    Raises:
      ValueError: if its package is not installed, or there are no credentials.
    """
    row = SCHEMES[scheme]
    for name, value in row.environment.items():
        os.environ.setdefault(name, value)
    if importlib.util.find_spec(row.package) is None:
        raise ValueError(f"paths {scheme}:// need {row.package}: {install(row.extra)}")
    row.sign_in()
    fsspec = importlib.import_module("fsspec")
    found = fsspec.get_filesystem_class(scheme)
    logging.getLogger(row.package).setLevel(logging.CRITICAL)  # `errors` says what is wrong
    for protocol in found.protocol:  # for Orbax and JAX, which open file systems of their own
        importlib.import_module("fsspec.config").conf.setdefault(protocol, {}).update(row.options)
    return fsspec.filesystem(scheme)


@contextlib.contextmanager
def errors(path: Path) -> Iterator[None]:
    """Turn whatever is raised about a path on a store into an OSError of one line.

    What a disk would raise too, such as a FileNotFoundError, stays what it is, and so does a
    ValueError. About a path on this machine nothing changes.

    Raises:
      StoreError: if the store could not be reached, or has failed.
    """
    if not is_remote(path):
        yield
        return
    try:
        yield
    except (FileNotFoundError, FileExistsError, ValueError, StoreError):
        raise
    except Exception as error:  # of many packages, few of which are an OSError
        lines = str(error).strip().splitlines() or [""]
        why = f"{type(error).__name__}: {lines[0]:.300}".removesuffix(": ")
        if lines[0].startswith("Forbidden"):
            raise PermissionError(f"{path}: {lines[0]:.300}") from error
        raise StoreError(f"{path}: {why}") from error


def reach(path: Path | str | None) -> None:
    """Refuse a path on a store that cannot be used, before any long work starts; None: no path.

    Raises:
      ValueError: if there is no such store or bucket, the package for it is not installed, or there
        are no credentials.
      PermissionError: if they do not suffice.
      StoreError: if the store cannot be reached.
    """
    found = None if path is None else as_path(path)
    if isinstance(found, RemotePath):
        try:
            (found / ".diffjax").objects()  # an empty listing, unless there is no bucket
        except FileNotFoundError as error:
            raise ValueError(f"{found}: there is no bucket {found.parts[1]}") from error


class Entry(NamedTuple):
    """What a listing says of a file: its size in bytes, and a digest, if the store knows one."""

    size: int
    digest: str | None = None


def listing(folder: Path) -> dict[str, Entry]:
    """The regular files below a folder, by their paths in it.

    Raises:
      OSError: if a folder in it cannot be read.
    """
    if isinstance(folder, RemotePath):
        return {name: Entry(about["size"], _md5(about)) for name, about in folder.objects().items()}

    def fail(error):
        raise error

    found = {}
    for where, _, names in os.walk(folder, onerror=fail):
        for path in (Path(where, name) for name in names):
            if path.is_file():
                found[path.relative_to(folder).as_posix()] = Entry(path.stat().st_size)
    return found


def _md5(about):
    """The MD5 that Google's store keeps of an object that was not composed of others."""
    known = about.get("md5Hash")
    return known and f"md5:{base64.b64decode(known).hex()}"


@contextlib.contextmanager
def fetched(path: Path) -> Iterator[Path]:
    """A file on this machine for a program that opens its path: the file itself, or a copy."""
    if not isinstance(path, RemotePath):
        yield path
        return
    # A copy that is still open when it is deleted stays readable, except on Windows.
    with tempfile.TemporaryDirectory(prefix="diffjax-", ignore_cleanup_errors=True) as folder:
        copy = Path(folder) / path.name
        download(cast(Path, path), copy)
        yield copy


def download(path: Path, file: Path) -> None:
    """Copy an object of a store to a file of this machine."""
    cast(Any, path)._ask("get_file", str(file))


def upload(file: Path, path: Path) -> None:
    """Write a file of this machine to a path on a store, whole or not at all."""
    with errors(path):
        _filesystem(path.parts[0][:-1]).put_file(str(file), str(path))


def remove(folder: Path) -> None:
    """Delete a folder and what is in it, if it is there."""
    if isinstance(folder, RemotePath):
        # One by one, because fsspec's `rm` takes "[" in a name for the beginning of a pattern.
        for name in folder.objects():
            (folder / name).unlink(missing_ok=True)
    else:
        shutil.rmtree(folder, ignore_errors=True)


def rename(folder: Path, new: Path) -> None:
    """Rename a folder, in place of another of the new name; on a store, copy and delete."""
    remove(new)
    if isinstance(folder, RemotePath):
        for name in folder.objects():
            (folder / name)._ask("cp_file", str(new / name))
        remove(cast(Path, folder))
    else:
        folder.rename(new)


def native(path: Path) -> Any:
    """The path as Orbax and JAX take it."""
    return importlib.import_module("etils.epath").Path(str(path)) if is_remote(path) else path


def key_value_store(folder: Path) -> dict[str, str]:
    """The folder as TensorStore takes it."""
    if not isinstance(folder, RemotePath):
        return {"driver": "file", "path": f"{folder}/"}
    scheme, bucket, *names = folder.parts
    _filesystem(scheme[:-1])  # which looks for credentials, and prepares the environment
    return {"driver": SCHEMES[scheme[:-1]].driver, "bucket": bucket, "path": f"{'/'.join(names)}/"}
