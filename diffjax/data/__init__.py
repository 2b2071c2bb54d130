"""Data sets, and batches as a pure function of (seed, step).

A data set is two `Examples`, to train on and held out. Images are uint8 and become float32 in
[-1, 1] batch by batch; everything else is float32 in [-1, 1] already. They lie in memory, or, as
those of a folder, stay on the disk (`Rows`). Nothing is ever downloaded.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from . import readers, toy
from .images import UnreadableError as UnreadableError, folder
from .workers import check_workers as check_workers, in_order as in_order, prefetch as prefetch


class Rows(Protocol):
    """What a batch needs of an array `[n, ...]`: NumPy's, one on the disk, or `images.Images`."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: Any, /) -> np.ndarray: ...


class Examples(NamedTuple):
    """Examples and their labels.

    Attributes:
      x: `[n, ...]`; uint8, or float32 in [-1, 1].
      label: integers `[n]`, or None.
    """

    x: Rows
    label: np.ndarray | None = None


class Dataset(NamedTuple):
    """Examples to train on, and held out."""

    train: Examples
    test: Examples


def _embedded(make):
    def load(path):
        if path is not None:
            raise ValueError(
                f"data.path={str(path)!r}: this data set is built in, it takes no path"
            )
        return make()

    return load


DATASETS: dict[str, Callable[..., tuple]] = {
    "digits": _embedded(readers.digits),
    "fashion_mnist": readers.fashion_mnist,
    "mnist": readers.mnist,
    "cifar10": readers.cifar10,
    "npz": readers.npz,
    "folder": folder,
    "two_moons": _embedded(toy.split(toy.two_moons)),
    "checkerboard": _embedded(toy.split(toy.checkerboard)),
    "swiss_roll": _embedded(toy.split(toy.swiss_roll)),
    "circles": _embedded(toy.split(toy.circles)),
}


LEVELS = {"digits": 17}
"""How many values a pixel may have, where it is not a byte or a real number."""


def levels(name: str, examples: Examples) -> int | None:
    """How many values from -1 to 1 a number of a data set may have; None if it is continuous.

    >>> levels("digits", load("digits").train)
    17
    """
    of_bytes = 256 if examples.x.dtype == np.uint8 else None
    return LEVELS.get(name, of_bytes)


def load(
    name: str,
    path: Path | str | None = None,
    size: int | None = None,
    channels: int | None = None,
    unreadable: str = "refuse",
    workers: int = 0,
) -> Dataset:
    """Load a data set by name.

    Args:
      name: one of `DATASETS`.
      path: the folder or file it lies in; None for its default place, if it has one.
      size: for `folder`, the side of the squares that images are cropped and scaled to; for others,
        the side of the squares that square images are averaged down to, a divisor of theirs.
      channels: for `folder` only: 1, grey, or 3, RGB; None: grey if all of them are.
      unreadable: for `folder` only: "refuse" it if a file cannot be read, or "skip" the file.
      workers: processes that look at a folder's files.

    Raises:
      ValueError: if the name is unknown, a file is corrupt, or values are of a wrong dtype or
        outside [-1, 1].
      FileNotFoundError: if the data is not there; says how to get it.

    >>> train, test = load("digits")
    >>> train.x.shape, test.x.shape
    ((1497, 8, 8, 1), (300, 8, 8, 1))
    """
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}: one of {', '.join(DATASETS)}")
    path = None if path is None else Path(path)
    if name == "folder":
        parts = folder(path, size, channels, unreadable, workers)
    elif channels is not None or unreadable != "refuse":
        raise ValueError(f"data.{channels=}, data.{unreadable=}: for the data set folder only")
    else:
        parts = DATASETS[name](path)
    train, test = (
        checked(*part, where=f"{name}, {which}")
        for part, which in zip(parts, ("train", "test"), strict=True)
    )
    if size is not None and name != "folder":
        train, test = (part._replace(x=_averaged(name, part.x, size)) for part in (train, test))
    return Dataset(train, test)


def _averaged(name, x, size):
    """Square images `[n, side, side, channels]` with each of size x size squares averaged."""
    square = x.ndim == 4 and x.shape[1] == x.shape[2]
    if name in LEVELS or not square or size < 1 or x.shape[1] % size:
        raise ValueError(
            f"data.size={size}: the data set {name} has a size of its own, {x.shape[1:]}; square "
            "images can be averaged down to a divisor of theirs"
        )
    k = x.shape[1] // size
    means = x.reshape(len(x), size, k, size, k, x.shape[3]).mean((2, 4), np.float32)
    return np.round(means).astype(x.dtype) if x.dtype == np.uint8 else means


def checked(x: Rows, label: np.ndarray | None = None, *, where: str = "data") -> Examples:
    """`Examples` of these arrays, if they keep the rules.

    Raises:
      ValueError: unless x is uint8, or float32 within [-1, 1], and labels are integers >= 0, one
        for each example.
    """
    if len(x.shape) < 2 or 0 in x.shape:
        raise ValueError(f"{where}: examples of shape {x.shape}, need [n, ...] of at least 1 each")
    if x.dtype not in (np.uint8, np.float32):
        raise ValueError(f"{where}: dtype {x.dtype}, need uint8 or float32 in [-1, 1]")
    if isinstance(x, np.ndarray) and x.dtype == np.float32 and not abs(x).max() <= 1:
        raise ValueError(f"{where}: values from {x.min()} to {x.max()}, need [-1, 1]")
    if label is not None:
        if label.shape != x.shape[:1] or label.dtype.kind not in "iu" or label.min() < 0:
            raise ValueError(
                f"{where}: labels {label.dtype}{label.shape} for {len(x)} examples, "
                "need one integer >= 0 for each"
            )
    return Examples(x, label)


def take(examples: Examples, index: np.ndarray) -> dict[str, np.ndarray]:
    """The examples at `index`: `x` float32 in [-1, 1], and `label` int32 if there are labels."""
    x = examples.x[index]
    if x.dtype == np.uint8:
        x = x.astype(np.float32) / 127.5 - 1
    batch = {"x": x}
    if examples.label is not None:
        batch["label"] = examples.label[index].astype(np.int32)
    return batch


def to_bytes(x: np.ndarray) -> np.ndarray:
    """Images in [-1, 1] as uint8, rounded; the inverse of `take`.

    >>> to_bytes(np.array([-1.0, 0.0, 0.01, 1.2]))
    array([  0, 128, 129, 255], dtype=uint8)
    """
    return np.clip(np.round((x + 1) * 127.5), 0, 255).astype(np.uint8)


def first(examples: Examples, n: int) -> dict[str, np.ndarray]:
    """The first n examples, or all if there are fewer, with their `index`."""
    index = np.arange(min(len(examples.x), n), dtype=np.int32)
    return take(examples, index) | {"index": index}


def in_range(dataset: Dataset) -> tuple[np.ndarray, np.ndarray | None]:
    """Every example of a data set, all in memory, in [-1, 1], and its label if there are labels."""
    parts = [take(examples, np.arange(len(examples.x))) for examples in dataset]
    x = np.concatenate([part["x"] for part in parts])
    label = np.concatenate([part["label"] for part in parts]) if "label" in parts[0] else None
    return x, label


def batch_indices(seed: int, step: int, n: int, batch_size: int) -> np.ndarray:
    """Which of n examples make the batch of a step, `[batch_size]`: a pure function.

    Each epoch is a fresh permutation; what does not fill a last batch waits for another epoch.

    >>> sorted(np.concatenate([batch_indices(0, step, n=6, batch_size=3) for step in (0, 1)]))
    [np.int64(0), np.int64(1), np.int64(2), np.int64(3), np.int64(4), np.int64(5)]
    """
    epoch, position = divmod(step * batch_size, n // batch_size * batch_size)
    return _permutation(seed, epoch, n)[position : position + batch_size]


def train_batch(
    examples: Examples,
    seed: int,
    step: int,
    batch_size: int,
    slots: slice | np.ndarray = slice(None),
    flip: bool = False,
) -> dict[str, np.ndarray]:
    """The training batch of a step: a pure function of (seed, step).

    Args:
      examples: what to draw from.
      seed: the run's seed.
      step: steps taken before this one.
      batch_size: size of the global batch, at most the number of examples.
      slots: which positions of the global batch to return.
      flip: mirror each image left to right with probability 1/2.

    Returns:
      `x`, `label` if there are labels, and `index`, the positions in the global batch.
    """
    index = batch_indices(seed, step, len(examples.x), batch_size)
    batch = take(examples, index[slots])
    if flip:
        mirror = np.random.default_rng((seed, step, _FLIPS)).random(batch_size)[slots] < 0.5
        batch["x"] = np.where(mirror[:, None, None, None], batch["x"][:, :, ::-1], batch["x"])
    batch["index"] = np.arange(batch_size, dtype=np.int32)[slots]
    return batch


def train_batches(
    examples: Examples, seed: int, step: int, count: int, **options: Any
) -> dict[str, np.ndarray]:
    """The training batches of `count` steps from `step` on, side by side: `[batch, count, ...]`.

    Args:
      examples: as in `train_batch`.
      seed: likewise.
      step: steps taken before the first of them.
      count: how many.
      options: of `train_batch`.
    """
    each = [train_batch(examples, seed, i, **options) for i in range(step, step + count)]
    return {name: np.stack([batch[name] for batch in each], axis=1) for name in each[0]}


_ORDER, _FLIPS = 0, 1  # which of a seed's generators


@functools.lru_cache(maxsize=2)
def _permutation(seed, epoch, n):
    return np.random.default_rng((seed, epoch, _ORDER)).permutation(n)
