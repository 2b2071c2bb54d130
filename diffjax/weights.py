"""A trained network as one file: its parameters and its config, in the safetensors format.

The arrays' names are the parameters' paths, as in `down_0_0/conv_0/kernel`; the metadata holds the
config as JSON, and the SHA-256 of the parameters. Nothing in such a file is ever executed, any
program that knows safetensors can read it, and it is written whole or not at all.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

from . import config as config_lib
from .config import Config
from .experiment import check, example_shape, make_params
from .files import replacing
from .provenance import digest

CONFIG, SEAL = "diffjax.config", "diffjax.sha256"


def save(path: Path | str, params: Any, config: Config) -> None:
    """Write parameters and their config to a file, which replaces what is there.

    The config gets `data.shape`, so that its reader needs no data, and loses `data.path`.

    Raises:
      ValueError: if the parameters are not those of the config's network; lists what differs.
      OSError: if it cannot be written: then nothing is.
    """
    path = Path(path)
    data = dataclasses.replace(config.data, shape=example_shape(config), path=None)
    config = dataclasses.replace(config, data=data)
    # Of a transposed array safetensors would write the numbers in the order of memory.
    flat = flatten_dict(params, sep="/")
    arrays = {name: np.ascontiguousarray(value) for name, value in flat.items()}
    _refuse_others(path, arrays, config)
    metadata = {CONFIG: config_lib.to_json(config), SEAL: digest(params)}
    try:
        with replacing(path) as new:
            safetensors.numpy.save_file(arrays, new, metadata)
    except safetensors.SafetensorError as error:  # such as that of a full disk
        raise OSError(f"{path} could not be written: {error}") from error


def read(path: Path | str) -> tuple[Any, Config]:
    """The parameters and the config that `save` wrote.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is damaged, has no config of ours, or its arrays are not those of the
        config's network; names the file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safetensors.safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # the bytes of a stranger make the parser raise anything
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    if CONFIG not in metadata:
        raise ValueError(f"{path} holds no config: diffjax has not written it")
    try:
        config = config_lib.from_json(metadata[CONFIG])
        check(config)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} has no config of this diffjax: {error!r}") from error
    _refuse_others(path, arrays, config)
    params = unflatten_dict(arrays, sep="/")
    if digest(params) != metadata.get(SEAL):
        raise ValueError(f"{path} is damaged: its arrays have changed")
    return jax.tree.map(jnp.asarray, params), config


def expected(config: Config) -> dict[str, Any]:
    """The names, shapes and dtypes of the arrays that the config's network has."""
    key, shape = jax.random.key(0), example_shape(config)
    tree: Any = flatten_dict(jax.eval_shape(lambda: make_params(config, key, shape)), sep="/")
    return tree


def _refuse_others(path, arrays, config):
    says = lambda found: {name: f"{x.dtype}{list(x.shape)}" for name, x in found.items()}
    has, needs = says(arrays), says(expected(config))
    lines = list(config_lib.unlike(has, needs, "it has {}, the config makes {}").values())
    if len(lines) > 5:
        lines[5:] = [f"and {len(lines) - 5} more"]
    if lines:
        raise ValueError(f"{path} is of another network:\n  " + "\n  ".join(lines))
