"""Copies of data on this machine, if the data are on a store."""

import hashlib
import shutil
import time
from pathlib import Path

from ..data.records import MANIFEST, damage_of, seals_of
from ..training import store
from ..training.files import Lock, replacing

PAUSE = 1.0
"""Seconds between two looks at whether another process has copied everything."""


def on_this_machine(path: Path, name: str, cache: Path | None) -> Path:
    """The path of data; of records that are on a store, that of a copy.

    The first process of a machine copies, and the others wait for it. A file counts once its
    content is that of the manifest, so a copy that was stopped goes on.

    Args:
      path: of the data.
      name: of the data set.
      cache: the folder in which copies are.

    Raises:
      ValueError: if other data than records are on a store, there is no `cache`, the disk is too
        small, or a file is not as the manifest says.
      FileNotFoundError: if there is no manifest.
      StoreError: if the store cannot be reached.
    """
    path = store.as_path(path)
    if not store.is_remote(path):
        return path
    if name != "records":
        raise ValueError(
            f"data.path={path}: {name} is read from a disk; convert it to records, or copy it"
        )
    if cache is None:
        raise ValueError(f"data.path={path}: give data.cache, a folder of this machine for copies")
    store.reach(path)
    try:
        manifest = (path / MANIFEST).read_bytes()
        seals = seals_of(manifest)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"data.path={path}: there is no {MANIFEST}") from error
    except ValueError as error:
        raise ValueError(f"{path / MANIFEST}: {error}") from error
    # The name tells the copies of other data, and of an earlier conversion, apart.
    folder = store.local(cache) / hashlib.sha256(manifest).hexdigest()[:16]
    if not (folder / MANIFEST).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        lock = _locked(folder)
        try:
            _copy(path, folder, seals)
            with replacing(folder / MANIFEST) as new:
                new.write_bytes(manifest)
        finally:
            lock.release()
    return folder


def _locked(folder):
    """The lock of the folder, once no other process has it."""
    while True:
        try:
            return Lock(folder)
        except ValueError:
            time.sleep(PAUSE)


def _copy(path, folder, seals):
    """Copy the files that are not there yet, each of which is then as its seal says."""
    missing = [seal for seal in seals if not (folder / seal.file).is_file()]
    size, free = sum(seal.size for seal in missing), shutil.disk_usage(folder).free
    if size > free:
        raise ValueError(f"data.cache: {folder} has {free:,} bytes free, {path} needs {size:,}")
    for done, seal in enumerate(missing, 1):
        with replacing(folder / seal.file) as new:
            store.download(path / seal.file, new)
            damage = damage_of(new, seal)
            if damage is not None:
                raise ValueError(f"{path / seal.file} is damaged: {damage}")
        print(f"{path}: copied {done} of {len(missing)} files to {folder}", flush=True)
