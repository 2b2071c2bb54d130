"""The data of an experiment: loaded, checked by `rules`, and made into batches on the host."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from .. import data
from ..data import Dataset, Examples, batch_indices, load, train_batch, train_batches
from .config import Config
from .functions import Experiment
from .rules import check_data as check_data


def load_data(config: Config) -> Dataset:
    """The config's data set.

    Raises:
      ValueError, FileNotFoundError: as `data.load` does.
    """
    d = config.data
    return load(d.name, d.path, d.size, d.channels, d.unreadable, d.workers, d.shape)


def fingerprint(train: Examples, test: Examples) -> dict[str, Any]:
    """What tells the two parts of a data set from others, for JSON."""
    return {"train": data.fingerprint(train), "test": data.fingerprint(test)}


def example_shape(config: Config) -> tuple[int, ...]:
    """The shape of one example: `config.data.shape`, or that of the data, which is then loaded.

    Raises:
      FileNotFoundError: if the config has no shape and the data is not there.
    """
    if config.data.shape is not None:
        return config.data.shape
    return load_data(config).train.x.shape[1:]


def make_steps(config: Config, start: int) -> range:
    """The numbers of steps taken before each call of the compiled step, from `start` on.

    Raises:
      ValueError: if whole calls do not end at `config.steps`.
    """
    k = config.steps_per_call
    if start % k:
        raise ValueError(f"steps_per_call={k}: must divide {start}, the step to resume from")
    return range(start, config.steps, k)


def make_batch(config: Config, examples: Examples, slots: np.ndarray) -> Callable[[int], Any]:
    """Steps taken -> the host batch of the next call of the compiled step.

    Args:
      config: the config.
      examples: to train on.
      slots: the positions in the global batch that this process feeds.
    """
    options = {"batch_size": config.batch_size, "slots": slots, "flip": config.data.flip}
    if config.steps_per_call == 1:
        return functools.partial(train_batch, examples, config.seed, **options)
    count = config.steps_per_call
    return functools.partial(train_batches, examples, config.seed, count=count, **options)


def describe_step(e: Experiment, n: int, taken: int) -> str:
    """The learning rate after `taken` steps, and which of n examples the next step trains on."""
    rate = np.asarray(e.learning_rate(taken))
    index = batch_indices(e.config.seed, taken, n, e.config.batch_size)
    return f"learning rate {rate:.3g}, examples {index.tolist()}"
