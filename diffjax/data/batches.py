"""The batch of a training step, as a pure function of (seed, step)."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from .examples import Examples, take

LARGEST_SHUFFLE = 2**22
"""The most examples whose order is a stored permutation by default."""


def batch_indices(
    seed: int, step: int, n: int, batch_size: int, order: str | None = None
) -> np.ndarray:
    """Indices of the examples in the batch of a step, `[batch_size]`: a pure function.

    Each epoch is a new permutation of the n examples; those that do not fill the last batch of an
    epoch are left out.

    Args:
      seed: the run's seed.
      step: number of steps before this one.
      n: number of examples.
      batch_size: size of the global batch, at most n.
      order: a name in `ORDERS`; None is the one for n examples (`order_of`).

    >>> sorted(np.concatenate([batch_indices(0, step, n=6, batch_size=3) for step in (0, 1)]))
    [np.int64(0), np.int64(1), np.int64(2), np.int64(3), np.int64(4), np.int64(5)]
    """
    epoch, position = divmod(step * batch_size, n // batch_size * batch_size)
    positions = np.arange(position, position + batch_size)
    return ORDERS[order or order_of(n)](seed, epoch, n, positions)


def order_of(n: int) -> str:
    """The name in `ORDERS` of the order of n examples, unless a config chooses another one.

    >>> order_of(60_000), order_of(100_000_000)
    ('shuffle', 'feistel')
    """
    return "shuffle" if n <= LARGEST_SHUFFLE else "feistel"


def shuffle(seed: int, epoch: int, n: int, positions: np.ndarray) -> np.ndarray:
    """The examples at these positions of an epoch: NumPy's permutation, which takes 8 n bytes."""
    return _permutation(seed, epoch, n)[positions]


def feistel(seed: int, epoch: int, n: int, positions: np.ndarray) -> np.ndarray:
    """The examples at these positions of an epoch, each computed alone, without memory.

    A Feistel network is a bijection of pairs of numbers whatever its round function is (Luby and
    Rackoff, 1988). A number outside [0, n) goes through it again until it is inside, which keeps it
    a bijection ("cycle walking"; Black and Rogaway, 2002).

    >>> sorted(feistel(0, 0, 5, np.arange(5)).tolist())
    [0, 1, 2, 3, 4]
    """
    half = np.uint64(max(1, -(-(n - 1).bit_length() // 2)))  # bits of each number of a pair
    keys = np.random.default_rng((seed, epoch, _ORDER)).integers(2**64, size=6, dtype=np.uint64)
    found = positions.astype(np.uint64)
    outside = np.ones(found.shape, bool)
    while outside.any():
        found[outside] = _network(found[outside], keys, half)
        outside = found >= n
    return found.astype(np.int64)


def _network(x, keys, half):
    """One pass of a Feistel network over numbers of 2 * half bits."""
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = x >> half, x & mask
    for key in keys:
        left, right = right, left ^ (_mixed(right ^ key) & mask)
    return left << half | right


def _mixed(x):
    """Bits that depend on all bits of x: the finaliser of SplitMix64 (Steele et al., 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


ORDERS: dict[str, Callable[[int, int, int, np.ndarray], np.ndarray]] = {
    "shuffle": shuffle,
    "feistel": feistel,
}
"""The orders of examples in an epoch, by name: (seed, epoch, n, positions) -> examples."""


def train_batch(
    examples: Examples,
    seed: int,
    step: int,
    batch_size: int,
    slots: slice | np.ndarray = slice(None),
    flip: bool = False,
    order: str | None = None,
) -> dict[str, np.ndarray]:
    """The training batch of a step: a pure function of (seed, step).

    Args:
      examples: the examples to draw from.
      seed: the run's seed.
      step: number of steps before this one.
      batch_size: size of the global batch, at most the number of examples.
      slots: positions of the global batch to return.
      flip: mirror each image left to right with probability 1/2.
      order: as for `batch_indices`.

    Returns:
      `x`, `label` if there are labels, and `index`, the positions in the global batch.
    """
    index = batch_indices(seed, step, len(examples.x), batch_size, order)
    batch = take(examples, index[slots])
    if flip:
        mirror = np.random.default_rng((seed, step, _FLIPS)).random(batch_size)[slots] < 0.5
        batch["x"] = np.where(mirror[:, None, None, None], batch["x"][:, :, ::-1], batch["x"])
    batch["index"] = np.arange(batch_size, dtype=np.int32)[slots]
    return batch


def train_batches(
    examples: Examples, seed: int, step: int, count: int, **options: Any
) -> dict[str, np.ndarray]:
    """The training batches of `count` steps, stacked along the second axis: `[batch, count, ...]`.

    Args:
      examples: the examples to draw from.
      seed: the run's seed.
      step: number of steps before the first of them.
      count: number of batches.
      options: options of `train_batch`.
    """
    each = [train_batch(examples, seed, i, **options) for i in range(step, step + count)]
    return {name: np.stack([batch[name] for batch in each], axis=1) for name in each[0]}


_ORDER, _FLIPS = 0, 1  # independent random generators of a seed


@functools.lru_cache(maxsize=2)
def _permutation(seed, epoch, n):
    return np.random.default_rng((seed, epoch, _ORDER)).permutation(n)
