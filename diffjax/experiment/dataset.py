"""The data of an experiment: loaded, checked by `rules`, and made into batches on the host."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .. import data
from ..data import Dataset, Examples, batch_indices, load, order_of, train_batch, train_batches
from ..training.store import as_path, is_remote
from .config import Config
from .copies import on_this_machine
from .functions import Experiment
from .rules import cautions as cautions, check_data as check_data

SCANNED = "folder.json"
"""In a run's directory: what decoding its folder of images has found."""


def load_data(config: Config, workdir: Path | None = None) -> Dataset:
    """The config's data set.

    Args:
      config: the config.
      workdir: the directory of its run, which keeps what decoding a folder of images has found, so
        that only the first start decodes all of them; None: there is none.

    Raises:
      ValueError, FileNotFoundError: as `data.load` does.
    """
    d = config.data
    path = None if d.path is None else on_this_machine(d.path, d.name, d.cache)
    # What decoding has found is kept on a disk only.
    scanned = None if workdir is None or is_remote(workdir) else workdir / SCANNED
    return load(d.name, path, d.size, d.channels, d.unreadable, d.workers, d.shape, d.crop, scanned)


def located(config: Config, path: Path | None, autoencoder: Path | None = None) -> Config:
    """The config with its data, and the autoencoder of its latents, at these paths.

    Args:
      config: the config.
      path: of the data; None: where the config says.
      autoencoder: its path; None: where the config says.

    Raises:
      ValueError: if there is an autoencoder, and the data are not latents.
    """
    given = {"path": path, "autoencoder": autoencoder, "cache": config.data.cache}
    new = {name: as_path(value).absolute() for name, value in given.items() if value is not None}
    data = dataclasses.replace(config.data, **new)
    data.check()
    return dataclasses.replace(config, data=data)


def recorded(config: Config, train: Examples) -> Config:
    """The config as a run stores it: with absolute paths and the shape of its training data.

    So a run can be used from another directory, and sampled or exported without its data. If the
    order of the examples is not the one that every run of an earlier version has, it is stored too.
    """
    config = located(config, config.data.path, config.data.autoencoder)
    paths = [(source, as_path(source)) for source in config.sampling.cascade]
    stages = tuple(str(path.absolute()) if path.exists() else source for source, path in paths)
    sampling = dataclasses.replace(config.sampling, cascade=stages)
    config = dataclasses.replace(config, sampling=sampling)
    found = dataclasses.replace(config.data, shape=data.shape_of(train.x))
    if found.order is None and order_of(len(train.x)) != "shuffle":
        found = dataclasses.replace(found, order=order_of(len(train.x)))
    return dataclasses.replace(config, data=found)


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
    return data.shape_of(load_data(config).train.x)


def example_dtype(config: Config) -> type:
    """The dtype of the data; float32 for a file of arrays that is not there."""
    if config.data.latents is not None:
        return np.float16
    known = data.DATASETS[config.data.name].dtype
    if known is not None:
        return known
    try:
        return load_data(config).train.x.dtype.type
    except FileNotFoundError:
        return np.float32


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
    options["order"] = config.data.order
    if config.steps_per_call == 1:
        return functools.partial(train_batch, examples, config.seed, **options)
    count = config.steps_per_call
    return functools.partial(train_batches, examples, config.seed, count=count, **options)


def describe_step(e: Experiment, n: int, taken: int) -> str:
    """The learning rate after `taken` steps, and which of n examples the next step trains on."""
    rate = np.asarray(e.learning_rate(taken))
    config = e.config
    index = batch_indices(config.seed, taken, n, config.batch_size, config.data.order)
    return f"learning rate {rate:.3g}, examples {index.tolist()}"
