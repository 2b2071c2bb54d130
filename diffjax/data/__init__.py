"""Data sets by name, and batches as a pure function of (seed, step).

A data set is two `Examples`, for training and held out. Images are uint8 and are converted to
float32 in [-1, 1] batch by batch; latents are the float16 moments of an autoencoder's; all other
data is float32 in [-1, 1]. Examples are in memory, or on the disk, as in a folder of images
(`Rows`). Nothing is downloaded.

A data set is defined by a function and a row in the table of its file: `readers.READERS`,
`toy.TOYS`, `images.FOLDERS`, `records.RECORDS`.
"""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from . import images, readers, records, toy
from .batches import ORDERS, batch_indices, order_of, train_batch, train_batches
from .examples import (
    Dataset,
    Examples,
    Mapped,
    Rows,
    Source,
    all_examples,
    checked,
    fingerprint,
    first,
    shape_of,
    take,
    to_bytes,
)
from .images import UnreadableError
from .workers import check_workers, in_order, prefetch

DATASETS: dict[str, Source] = readers.READERS | images.FOLDERS | records.RECORDS | toy.TOYS
"""Data sets by name, as configs and the command line choose them."""

__all__ = [
    "DATASETS",
    "ORDERS",
    "Dataset",
    "Examples",
    "Mapped",
    "Rows",
    "Source",
    "UnreadableError",
    "all_examples",
    "batch_indices",
    "check_workers",
    "checked",
    "fingerprint",
    "first",
    "in_order",
    "levels",
    "load",
    "order_of",
    "prefetch",
    "shape_of",
    "take",
    "to_bytes",
    "train_batch",
    "train_batches",
]


def levels(name: str, examples: Examples) -> int | None:
    """Number of values in [-1, 1] that an element of a data set can take; None if continuous.

    >>> levels("digits", load("digits").train)
    17
    """
    return DATASETS[name].levels or (256 if examples.x.dtype == np.uint8 else None)


def load(
    name: str,
    path: Path | str | None = None,
    size: int | None = None,
    channels: int | None = None,
    unreadable: str = "refuse",
    workers: int = 0,
    shape: tuple[int, ...] | None = None,
    crop: str = "square",
    scanned: Path | None = None,
    table: Mapping[str, Source] = DATASETS,
) -> Dataset:
    """Load a data set by name.

    Args:
      name: one of `DATASETS`.
      path: its folder or file; None for its default location, if it has one.
      size: side of the images in pixels. `folder` crops images to squares and scales them to this
        size; other data sets average square images down to it.
      channels: for `folder` only: 1 (grey) or 3 (RGB); None is grey if all images are grey.
      unreadable: for `folder` only: if a file cannot be read, "refuse" the folder or "skip" the
        file.
      workers: number of processes that decode a folder's files.
      shape: for `npz` only: the shape of an example, if an array of three axes is not grey images.
      crop: for `folder` only: how an image is made a square, a name in `images.CROPS`.
      scanned: for `folder` only: the file that keeps what decoding all of it once has found.
      table: the data sets by name.

    Raises:
      ValueError: if the name is unknown, the data set does not take an option, a file is corrupt,
        or values have a wrong dtype or are outside [-1, 1].
      FileNotFoundError: if the data is missing; the message says how to get it.

    >>> train, test = load("digits")
    >>> train.x.shape, test.x.shape
    ((1497, 8, 8, 1), (300, 8, 8, 1))
    """
    if name not in table:
        raise ValueError(f"unknown data set {name!r}: one of {', '.join(table)}")
    read = table[name].read
    given: dict[str, Any] = {
        "path": None if path is None else Path(path),
        "size": size,
        "channels": channels,
        "unreadable": None if unreadable == "refuse" else unreadable,
        "workers": workers or None,
        "shape": shape,
        "crop": None if crop == "square" else crop,
        "scanned": scanned,
    }
    takes = inspect.signature(read).parameters
    for option in ("path", "channels", "unreadable", "crop"):
        if given[option] is not None and option not in takes:
            raise ValueError(
                f"data.{option}={str(given[option])!r}: the data set {name} takes no {option}"
            )
    options = {k: v for k, v in given.items() if k in takes and (v is not None or k == "path")}
    train, test = (
        checked(*part, where=f"{name}, {which}")
        for part, which in zip(read(**options), ("train", "test"), strict=True)
    )
    if size is not None and "size" not in takes:
        train, test = (part._replace(x=_averaged(name, part.x, size)) for part in (train, test))
    return Dataset(train, test)


def _averaged(name, x, size):
    """Average square images `[n, side, side, channels]` down to size x size pixels."""
    square = x.ndim == 4 and x.shape[1] == x.shape[2]
    if DATASETS[name].levels or not square or not 1 <= size <= x.shape[1]:
        raise ValueError(
            f"data.size={size}: the data set {name} has a size of its own, {x.shape[1:]}; only "
            "square images can be averaged down, to at least 1 pixel"
        )
    parts = [_means(part, size) for part in np.array_split(x, 1 + len(x) // 1000)]
    means = np.concatenate(parts)
    return np.round(means).astype(x.dtype) if x.dtype == np.uint8 else means


def _means(x, size):
    """The means of squares. A pixel that lies across the edge of two counts in part in both."""
    side = x.shape[1]
    if side % size:  # as size x size pixels, of which side x side are averaged
        rows = x.repeat(size, axis=1).reshape(len(x), size, side, side, -1).mean(2, np.float32)
        return rows.repeat(size, axis=2).reshape(len(x), size, size, side, -1).mean(3)
    k = side // size
    return x.reshape(len(x), size, k, size, k, x.shape[3]).mean((2, 4), np.float32)
