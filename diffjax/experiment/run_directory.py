"""The directory of a run: `config.json`, `checkpoints/<step>/`, metrics and pictures."""

import contextlib
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..training import checkpoints, parsing
from ..training.checkpoints import Checkpoints
from ..training.files import Lock, flatten, unequal, write_text
from . import config as config_lib
from .config import Config

CONFIG = "config.json"
CHECKPOINTS = "checkpoints"


def open_run(workdir: Path, config: Config, data: dict[str, Any] | None = None) -> Checkpoints:
    """Open a run's directory, new or to be resumed, and write its `config.json`.

    The directory is locked until the run ends. Checkpoints newer than the newest sound one are
    renamed to `damaged-<step>`, and what is wrong with them is printed.

    Args:
      workdir: the directory.
      config: of the run.
      data: the fingerprint of its data; None: do not compare it.

    Raises:
      ValueError: if another process uses the directory; if it holds a run whose config or data
        these may not resume, and lists what differs; or if it holds checkpoints, and none is sound.
      OSError: if it cannot be read or written.
    """
    folder = workdir / CHECKPOINTS
    if (workdir / CONFIG).exists() or list(folder.glob("*")):
        _refuse_others(workdir, config_lib.differences(read_config(workdir), config), "config")
    lock = None
    if jax.process_index() == 0:
        checkpoints.check_path(folder)
        workdir.mkdir(parents=True, exist_ok=True)
        lock = Lock(workdir)
        checkpoints.set_damaged_aside(folder)
    saved = [checkpoints.read_seal(path).about for path in list_checkpoints(workdir)[-1:]]
    known = saved[0].get("data") if saved else None
    if known is not None and data is not None:
        differs = unequal(
            flatten(known), flatten(data), "the run was trained on {!r}, now it is {!r}"
        )
        _refuse_others(workdir, list(differs.values()), "data")
    if jax.process_index() == 0:
        write_text(workdir / CONFIG, config_lib.to_json(config))
    about = {"config": config_lib.to_tree(config), "data": data}
    return Checkpoints(folder, config.keep, config.keep_every, config.keep_best, about, lock)


def read_config(workdir: Path) -> Config:
    """The config of a run's directory, or, if its file is missing or damaged, of a checkpoint.

    Raises:
      FileNotFoundError: if the directory is not that of a run.
      ValueError: if the config is damaged, or of another version; names the file.
    """
    path = workdir / CONFIG
    why: Exception = FileNotFoundError(
        f"{workdir} holds no {CONFIG}: it is not the directory of a run"
    )
    if path.is_file():
        try:
            return config_lib.from_tree(parsing.read(path))
        except ValueError as error:
            why = ValueError(f"{path} is not a config of this diffjax: {parsing.short(error)}")
            why.__cause__ = error
    for checkpoint in reversed(list_checkpoints(workdir)):
        with contextlib.suppress(ValueError):
            config = config_lib.from_tree(checkpoints.read_seal(checkpoint).about.get("config"))
            print(f"{why}; read from {checkpoint} instead", flush=True)
            return config
    raise why


def _is_whole(path):
    """Whether every file of a checkpoint is there; deleting one takes a while."""
    try:
        return all((path / name).is_file() for name in checkpoints.read_seal(path).files)
    except (OSError, ValueError):
        return path.exists()


def _refuse_others(workdir, differences, what):
    if differences:
        raise ValueError(
            f"{workdir} holds a run of another {what}; choose another --workdir, or undo:\n  "
            + "\n  ".join(differences)
        )


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
    paths = list_checkpoints(workdir)
    for path in reversed(paths):
        damage = None
        try:
            damage = checkpoints.damage_of(path)
            if damage is None:
                saved = checkpoints.read(path, "ema_params")["ema_params"]
                # By way of the host, so that they are not committed to one device.
                return jax.tree.map(jnp.asarray, jax.tree.map(np.asarray, saved))
        except Exception:  # Orbax may raise anything if files vanish while it reads
            if _is_whole(path):
                raise
        if not path.exists() or list_checkpoints(workdir)[-1] not in paths:
            return read_params(workdir)  # the run is deleting it, because it has written another
        warnings.warn(f"{path} is damaged: {damage}; trying an older one", stacklevel=2)
    raise FileNotFoundError(f"{workdir / CHECKPOINTS} holds no sound checkpoint")
