"""Examples of a data set, in memory or on the disk, and their conversion to float32 batches."""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

FLAG = "--config.data.path of train.py, --data_path of other commands"
"""The flags that say where data is, for messages."""


class Rows(Protocol):
    """The array interface that batches need, which NumPy arrays and `images.Images` have."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: Any, /) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Mapped:
    """`Rows` that a function makes of others, when they are indexed.

    Attributes:
      source: the others.
      function: rows `[k, ...]` -> rows `[k, *shape]`.
      row_shape: the shape of a row.
      dtype: of the rows.
      about: what tells the function from others, for JSON.
    """

    source: Rows
    function: Callable[[np.ndarray], np.ndarray]
    row_shape: tuple[int, ...]
    dtype: np.dtype
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of all rows."""
        return (len(self.source), *self.row_shape)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: Any, /) -> np.ndarray:
        """The rows at an index of one axis: a slice, or an array of numbers or bools."""
        return self.function(self.source[index])

    def fingerprint(self) -> dict[str, Any]:
        """The fingerprint of the others, and what is made of them."""
        return {"source": fingerprint(Examples(self.source)), **self.about}


@runtime_checkable
class OnDisk(Protocol):
    """`Rows` that are files on the disk, with a fingerprint of them."""

    def fingerprint(self) -> dict[str, Any]: ...


class Examples(NamedTuple):
    """Examples and their labels.

    Attributes:
      x: `[n, ...]`; uint8, float32 in [-1, 1], or the moments of latents in float16,
        `[n, height, width, 2 channels]`, means and then standard deviations.
      label: integers `[n]`, or None.
    """

    x: Rows
    label: np.ndarray | None = None


class Dataset(NamedTuple):
    """Training examples, and held-out examples."""

    train: Examples
    test: Examples


class Source(NamedTuple):
    """A row of `DATASETS`.

    Attributes:
      read: a function that returns ((x, label), (x, label)), for training and held out. Its
        parameters are the options that it takes: some of `path`, `size`, `channels`, `unreadable`,
        `workers` and `shape`.
      levels: number of values that a pixel can take, if it is neither 256 (bytes) nor unlimited.
      dtype: of all examples that it can read; None if its files decide.
    """

    read: Callable[..., tuple]
    levels: int | None = None
    dtype: type | None = None


def fingerprint(examples: Examples) -> dict[str, Any]:
    """What tells these examples from others, for JSON: counts, shapes, and hashes.

    Arrays are hashed whole; of files, the names, sizes and times of change.
    """
    x = examples.x
    found: dict[str, Any] = {"n": len(x), "shape": list(x.shape[1:])}
    found |= x.fingerprint() if isinstance(x, OnDisk) else {"x": _sha256(np.asarray(x))}
    label = examples.label
    return found | {"label": None if label is None else _sha256(label)}


def _sha256(x):
    return hashlib.sha256(f"{x.dtype}".encode() + np.ascontiguousarray(x).tobytes()).hexdigest()


def checked(x: Rows, label: np.ndarray | None = None, *, where: str = "data") -> Examples:
    """Check arrays, and make `Examples` of them.

    Raises:
      ValueError: unless x is uint8, float32 within [-1, 1], or finite moments in float16, and
        labels are integers >= 0, one for each example.
    """
    if len(x.shape) < 2 or 0 in x.shape:
        raise ValueError(f"{where}: examples of shape {x.shape}, need [n, ...] of at least 1 each")
    if x.dtype not in (np.uint8, np.float32, np.float16):
        raise ValueError(
            f"{where}: dtype {x.dtype}, need uint8 or float32 in [-1, 1]; or float16, for latents"
        )
    if x.dtype == np.float16:
        _check_moments(x, where)
    if isinstance(x, np.ndarray) and x.dtype == np.float32 and not abs(x).max() <= 1:
        raise ValueError(f"{where}: values from {x.min()} to {x.max()}, need [-1, 1]")
    if label is not None:
        if label.shape != x.shape[:1] or label.dtype.kind not in "iu" or label.min() < 0:
            raise ValueError(
                f"{where}: labels {label.dtype}{label.shape} for {len(x)} examples, "
                "need one integer >= 0 for each"
            )
    return Examples(x, label)


def _check_moments(x, where):
    if len(x.shape) != 4 or x.shape[3] % 2:
        raise ValueError(
            f"{where}: float16 of shape {x.shape}: latents are [n, height, width, 2 channels], "
            "means and then standard deviations"
        )
    if isinstance(x, np.ndarray):
        mean, std = np.split(x, 2, axis=3)
        if not (np.isfinite(mean).all() and np.isfinite(std).all() and std.min() >= 0):
            raise ValueError(
                f"{where}: latents with a mean that is not finite, or a standard deviation that "
                "is not finite and at least 0"
            )


def shape_of(x: Rows) -> tuple[int, ...]:
    """The shape of an example as a network takes it: of latents, that of their means."""
    *around, channels = x.shape[1:]
    return (*around, channels // 2) if x.dtype == np.float16 else (*around, channels)


def take(examples: Examples, index: np.ndarray) -> dict[str, np.ndarray]:
    """The examples at `index`: `x`, float32, and `label`, int32, if there are labels.

    `x` is in [-1, 1], or the moments of latents.
    """
    x = examples.x[index]
    x = (
        x.astype(np.float32) / 127.5 - 1
        if x.dtype == np.uint8
        else x.astype(np.float32, copy=False)
    )
    batch: dict[str, np.ndarray] = {"x": x}
    if examples.label is not None:
        batch["label"] = examples.label[index].astype(np.int32)
    return batch


def to_bytes(x: np.ndarray) -> np.ndarray:
    """Convert images in [-1, 1] to uint8, rounded: the inverse of the conversion in `take`.

    >>> to_bytes(np.array([-1.0, 0.0, 0.01, 1.2]))
    array([  0, 128, 129, 255], dtype=uint8)
    """
    return np.clip(np.round((x + 1) * 127.5), 0, 255).astype(np.uint8)


def first(examples: Examples, n: int) -> dict[str, np.ndarray]:
    """The first n examples, or all if there are fewer, with their `index`."""
    index = np.arange(min(len(examples.x), n), dtype=np.int32)
    return take(examples, index) | {"index": index}


def all_examples(dataset: Dataset) -> tuple[np.ndarray, np.ndarray | None]:
    """Both parts of a data set as one array in memory, in [-1, 1], and their labels or None."""
    parts = [take(examples, np.arange(len(examples.x))) for examples in dataset]
    x = np.concatenate([part["x"] for part in parts])
    label = np.concatenate([part["label"] for part in parts]) if "label" in parts[0] else None
    return x, label
