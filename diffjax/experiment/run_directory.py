"""The directory of a run: `config.json`, `checkpoints/<step>/`, metrics and pictures."""

import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..training import checkpoints
from ..training.checkpoints import Checkpoints
from ..training.files import write_text
from . import config as config_lib
from .config import Config

CONFIG = "config.json"
CHECKPOINTS = "checkpoints"


def open_run(workdir: Path, config: Config) -> Checkpoints:
    """Open a run's directory, new or to be resumed, and write its `config.json`.

    Checkpoints newer than the newest sound one are renamed to `damaged-<step>`, and what is wrong
    with them is printed.

    Raises:
      ValueError: if it holds a run whose config this one may not resume, and lists what differs; or
        if it holds checkpoints, and none is sound.
      OSError: if it cannot be read or written.
    """
    path, folder = workdir / CONFIG, workdir / CHECKPOINTS
    if path.exists():
        differences = config_lib.differences(read_config(workdir), config)
        if differences:
            raise ValueError(
                f"{workdir} holds a run of another config; choose another --workdir, or undo:\n  "
                + "\n  ".join(differences)
            )
    elif list(folder.glob("*")):
        raise ValueError(f"{workdir} holds checkpoints but no {CONFIG}: choose another --workdir")
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        write_text(path, config_lib.to_json(config))
        checkpoints.set_damaged_aside(folder)
    return Checkpoints(folder, config.keep, config.keep_every, config.keep_best)


def read_config(workdir: Path) -> Config:
    """The config of a run's directory.

    Raises:
      FileNotFoundError: if the directory is not that of a run.
      ValueError: if the config is damaged, or of another version; names the file.
    """
    path = workdir / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{workdir} holds no {CONFIG}: it is not the directory of a run")
    try:
        return config_lib.from_json(path.read_text())
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is not a config of this diffjax: {error!r}") from error


def list_checkpoints(workdir: Path) -> list[Path]:
    """The finished checkpoints of a run, sound or not, oldest first."""
    return checkpoints.list_checkpoints(workdir / CHECKPOINTS)


def read_params(workdir: Path) -> Any:
    """The moving average of a run's parameters, at the newest sound checkpoint.

    The directory is only read, so the run may be in progress. A damaged checkpoint causes a
    warning, and the next older one is read.

    Raises:
      FileNotFoundError: if there is no sound checkpoint.
    """
    if not (workdir / CHECKPOINTS).is_dir():
        raise FileNotFoundError(f"{workdir} holds no {CHECKPOINTS}")
    for path in reversed(list_checkpoints(workdir)):
        damage = checkpoints.damage_of(path)
        if not path.exists():
            return read_params(workdir)  # the run has deleted it, because there are newer ones
        if damage is None:
            saved = checkpoints.read(path, "ema_params")["ema_params"]
            # By way of the host, so that they are not committed to one device.
            return jax.tree.map(jnp.asarray, jax.tree.map(np.asarray, saved))
        warnings.warn(f"{path} is damaged: {damage}; trying an older one", stacklevel=2)
    raise FileNotFoundError(f"{workdir / CHECKPOINTS} holds no sound checkpoint")
