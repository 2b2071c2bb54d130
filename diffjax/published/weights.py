"""A trained network as one file: its parameters and its config, in the safetensors format.

The arrays' names are the parameters' paths, such as `down_0_0/conv_0/kernel`; the metadata holds
the config as JSON, and the SHA-256 of the parameters. Such a file contains no code, any program
that reads safetensors can read it, and it is written completely or not at all.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

from ..experiment import Config, config as config_lib, resolve
from ..experiment.dataset import example_shape
from ..training import parsing
from ..training.files import digest, replacing, unequal
from ..training.store import as_path, fetched

CONFIG, SEAL = "diffjax.config", "diffjax.sha256"
MEASURED = ("eval", "keep_best_by")
"""Fields of the config that name files of a run's measurements; they are not written."""
MACHINE = ("parallel", "fsdp", "steps_per_call", "writers", *MEASURED)
"""Fields of the config that are about the machine of a run; a file's values are not used."""


def save(path: Path | str, params: Any, config: Config) -> None:
    """Write parameters and their config to a file, and replace an existing file.

    `data.shape` is added to the config, so that its reader needs no data. `data.path`,
    `data.cache`, `data.autoencoder` and the section `eval` are left out: they name files of one
    machine.

    Raises:
      ValueError: if the parameters are not those of the config's network; the message lists the
        differences.
      OSError: if the file cannot be written; an existing file is then left as it is.
    """
    path = as_path(path)
    here = dict(path=None, cache=None, autoencoder=None)
    data = dataclasses.replace(config.data, shape=example_shape(config), **here)
    unmeasured = {name: getattr(Config(), name) for name in MEASURED}
    config = dataclasses.replace(config, data=data, **unmeasured)
    # safetensors writes a transposed array in the order of its memory, so make it contiguous.
    flat = flatten_dict(params, sep="/")
    arrays = {name: np.asarray(value, order="C") for name, value in flat.items()}
    _refuse_others(path, arrays, config)
    metadata = {CONFIG: config_lib.to_json(config), SEAL: digest(params)}
    try:
        with replacing(path) as new:
            safetensors.numpy.save_file(arrays, new, metadata)
    except safetensors.SafetensorError as error:  # such as a full disk
        raise OSError(f"{path} could not be written: {error}") from error


def read(path: Path | str) -> tuple[Any, Config]:
    """Read the parameters and the config that `save` wrote.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is damaged, has no config of diffjax, or its arrays are not those of the
        config's network; the message names the file.
    """
    path = as_path(path)
    with _opened(path) as (file, config, seal), _readable(path):
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    try:
        _refuse_others(path, arrays, config)
    except ValueError:
        raise
    except Exception as error:  # the shapes of the config may be too large for JAX
        raise ValueError(f"{path} has a config that makes no network: {error!r:.200}") from error
    params = unflatten_dict(arrays, sep="/")
    if digest(params) != seal:
        raise ValueError(f"{path} is damaged: its arrays have changed")
    return jax.tree.map(jnp.asarray, params), config


def read_config(path: Path | str) -> Config:
    """Read the config of a file that `save` wrote, without its parameters.

    Raises:
      FileNotFoundError, ValueError: as `read` does.
    """
    with _opened(as_path(path)) as (_, config, _):
        return config


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Config, str | None]]:
    """The open file, its config and the hash of its parameters."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    with contextlib.ExitStack() as stack:
        with _readable(path):
            here = stack.enter_context(fetched(path))
            file = stack.enter_context(safetensors.safe_open(here, "numpy"))
            metadata = file.metadata() or {}
        if CONFIG not in metadata:
            raise ValueError(f"{path} holds no config: diffjax has not written it")
        try:
            config = _of_network(config_lib.from_json(metadata[CONFIG]))
            refuse_larger(config, len(file.keys()))
            config = resolve(config).config
        except ValueError as error:
            why = parsing.short(error)
            raise ValueError(f"{path} has no config of this diffjax: {why}") from error
        yield file, config, metadata.get(SEAL)


@contextlib.contextmanager
def _readable(path):
    try:
        yield
    except Exception as error:  # untrusted input may raise anything
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error


def _of_network(config):
    """The config without what it says about a machine, which may not be this one.

    Raises:
      ValueError: if it has no `data.shape`, which would have to be read from the data.
    """
    if config.data.shape is None:
        raise ValueError("data.shape is missing")
    default = Config()
    data = dataclasses.replace(config.data, path=None, cache=None, autoencoder=None, workers=0)
    return dataclasses.replace(
        config, data=data, **{name: getattr(default, name) for name in MACHINE}
    )


def refuse_larger(config: Config, count: int) -> None:
    """Raise a ValueError if the config's network certainly has more arrays than `count`.

    Building the network, to compare its arrays, takes as long as it has blocks.
    """
    blocks, levels = config.model.blocks, len(getattr(config.model, "mults", (1,)))
    if blocks * levels > max(count, 100):
        raise ValueError(f"model.blocks={blocks}: there are only {count} arrays")


def expected(config: Config) -> dict[str, Any]:
    """The names, shapes and dtypes of the arrays that the config's network has."""
    key, shape = jax.random.key(0), example_shape(config)
    tree: Any = flatten_dict(jax.eval_shape(lambda: resolve(config).init(key, shape)), sep="/")
    return tree


def _refuse_others(path, arrays, config):
    describe = lambda found: {name: f"{x.dtype}{list(x.shape)}" for name, x in found.items()}
    has, needs = describe(arrays), describe(expected(config))
    lines = list(unequal(has, needs, "it has {}, the config makes {}").values())
    if lines:
        raise ValueError(f"{path} is of another network:\n  " + "\n  ".join(lines))
