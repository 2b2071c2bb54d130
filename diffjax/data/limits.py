"""What a file may take in memory when it is decoded, and readers of NumPy's files that respect it.

The header of a file is a claim. Every reader compares the claim with the size of the file, before
it allocates memory.
"""

import math
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

RATIO = 100
"""The largest ratio of decoded to compressed bytes: pixels shrink to about a tenth."""
FREE = 2**20
"""Bytes that are always allowed, because black pixels shrink to a thousandth."""
IMAGE = 2**29
"""The most bytes that decoding one image may take. An image may shrink to almost nothing, so that
its size in the file says little."""


def refuse_bomb(name: str, size: int, packed: int) -> None:
    """Raise a ValueError if compressed bytes claim to hold too many."""
    if size > RATIO * packed + FREE:
        raise ValueError(f"{name}: {packed} compressed bytes claim to hold {size}: refused")


def read_npz(path: Path, needs: Iterable[str], takes: Iterable[str] = ()) -> dict[str, np.ndarray]:
    """The arrays of a NumPy archive: all of `needs`, and those of `takes` that are there.

    Raises:
      Exception: of any kind, if the archive is damaged.
    """
    with zipfile.ZipFile(path) as archive:
        found = {f.filename.removesuffix(".npy"): f for f in archive.infolist()}
        missing = set(needs) - set(found)
        if missing:
            raise ValueError(f"has arrays {sorted(found)[:20]}, lacks {sorted(missing)}")
        wanted = {*needs, *takes} & set(found)
        claimed = sum(found[name].file_size for name in wanted)
        refuse_bomb("its arrays", claimed, path.stat().st_size)
        return {name: _member(archive, found[name]) for name in wanted}


def read_npy(path: Path) -> np.ndarray:
    """The array of a file `.npy`.

    Raises:
      ValueError: if the file is damaged; the message names it.
    """
    try:
        with path.open("rb") as file:
            return _array(file, path.name, path.stat().st_size)
    except OSError:
        raise
    except Exception as error:  # untrusted input may raise anything
        raise ValueError(f"{path} is not a readable array: {error}") from error


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(info) as file:
        return _array(file, info.filename, info.file_size)


def _array(file: Any | BinaryIO, name: str, size: int) -> np.ndarray:
    """An array, whose header is checked before its numbers are read."""
    version = np.lib.format.read_magic(file)
    read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }[version]
    shape, fortran, dtype = read_header(file)
    start = file.tell()
    if dtype.hasobject:
        raise ValueError(f"{name} holds Python objects, which are never read")
    if start + math.prod(shape) * dtype.itemsize != size:
        raise ValueError(f"{name}: {size} bytes are not a {dtype}{shape}")
    flat = np.frombuffer(file.read(), dtype)
    return flat.reshape(shape[::-1]).T if fortran else flat.reshape(shape)
