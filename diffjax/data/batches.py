"""The batch of a training step, as a pure function of (seed, step)."""

import functools
from typing import Any

import numpy as np

from .examples import Examples, take


def batch_indices(seed: int, step: int, n: int, batch_size: int) -> np.ndarray:
    """Indices of the examples in the batch of a step, `[batch_size]`: a pure function.

    Each epoch is a new permutation of the n examples; those that do not fill the last batch of an
    epoch are left out.

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
      examples: the examples to draw from.
      seed: the run's seed.
      step: number of steps before this one.
      batch_size: size of the global batch, at most the number of examples.
      slots: positions of the global batch to return.
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
