"""Data sets in memory, and batches as a pure function of (seed, step).

A data set is two `Examples`, to train on and held out. Images are uint8 and become float32 in
[-1, 1] batch by batch; everything else is float32 in [-1, 1] already. Nothing is ever downloaded.
"""

import collections
import concurrent.futures
import functools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from . import readers, toy

T = TypeVar("T")


class Examples(NamedTuple):
    """Examples and their labels.

    Attributes:
      x: `[n, ...]`; uint8, or float32 in [-1, 1].
      label: integers `[n]`, or None.
    """

    x: np.ndarray
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
    "folder": readers.folder,
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


def load(name: str, path: Path | str | None = None, size: int | None = None) -> Dataset:
    """Load a data set by name.

    Args:
      name: one of `DATASETS`.
      path: the folder or file it lies in; None for its default place, if it has one.
      size: for `folder`, the side of the squares that images are cropped and scaled to.

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
    if size is not None and name != "folder":
        raise ValueError(f"data.size={size}: the data set {name} has a size of its own")
    options = {} if size is None else {"size": size}
    train, test = DATASETS[name](None if path is None else Path(path), **options)
    return Dataset(checked(*train, where=f"{name}, train"), checked(*test, where=f"{name}, test"))


def checked(x: np.ndarray, label: np.ndarray | None = None, *, where: str = "data") -> Examples:
    """`Examples` of these arrays, if they keep the rules.

    Raises:
      ValueError: unless x is uint8, or float32 within [-1, 1], and labels are integers >= 0, one
        for each example.
    """
    if x.ndim < 2 or x.size == 0:
        raise ValueError(f"{where}: examples of shape {x.shape}, need [n, ...] of at least 1 each")
    if x.dtype not in (np.uint8, np.float32):
        raise ValueError(f"{where}: dtype {x.dtype}, need uint8 or float32 in [-1, 1]")
    if x.dtype == np.float32 and not (x.min() >= -1 and x.max() <= 1):
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
    """Every example of a data set, in [-1, 1], and its label if there are labels."""
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


def prefetch(fetch: Callable[[int], T], steps: Iterable[int], ahead: int = 2) -> Iterator[T]:
    """Call `fetch` for each step, some calls ahead of their use, in a thread of its own.

    Args:
      fetch: a pure function of the step.
      steps: what to call it with, in order.
      ahead: how many results may wait; an error in one is raised when its turn comes.

    >>> list(prefetch(lambda step: 10 * step, range(3)))
    [0, 10, 20]
    """
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        waiting = collections.deque[concurrent.futures.Future[T]]()
        for step in steps:
            waiting.append(thread.submit(fetch, step))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


_ORDER, _FLIPS = 0, 1  # which of a seed's generators


@functools.lru_cache(maxsize=2)
def _permutation(seed, epoch, n):
    return np.random.default_rng((seed, epoch, _ORDER)).permutation(n)
