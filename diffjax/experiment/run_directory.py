"""The directory of a run: `config.json`, `checkpoints/<step>/`, `snapshots/`, metrics, pictures."""

import contextlib
import dataclasses
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..averages import check_width, solve, weighted_sum
from ..training import averaging, checkpoints, parsing, store
from ..training.checkpoints import Checkpoints
from ..training.files import flatten, unequal, write_text
from ..training.lease import lock
from . import config as config_lib
from .config import Config

CONFIG = "config.json"
CHECKPOINTS = "checkpoints"
SNAPSHOTS = "snapshots"


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
    workdir = store.as_path(workdir)
    folder = workdir / CHECKPOINTS
    if (workdir / CONFIG).exists() or list(folder.glob("*")):
        _refuse_others(workdir, config_lib.differences(read_config(workdir), config), "config")
    held = None
    if jax.process_index() == 0:
        checkpoints.check_path(folder)
        workdir.mkdir(parents=True, exist_ok=True)
        held = lock(workdir)
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
    return Checkpoints(folder, config.keep, config.keep_every, config.keep_best, about, held)


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


def with_runner(workdir: Path, config: Config) -> Config:
    """The config with the runner that a run in the directory has, unless it names one itself.

    So a run that is resumed keeps its runner until it is asked for another.

    Raises:
      ValueError: as `read_config`.
    """
    if config.parallel is not None:
        return config
    try:
        return dataclasses.replace(config, parallel=read_config(workdir).parallel)
    except FileNotFoundError:
        return config


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


def check_average(config: Config, std: float) -> None:
    """Raise a ValueError unless a run of this config can have an average of this relative width."""
    check_width(std)
    if not config.averages:
        raise ValueError(
            f"average={std}: the run has tracked no averages to make it from; train with "
            "--config.averages and --config.snapshot_every"
        )


def read_average(workdir: Path, std: float) -> tuple[Any, float]:
    """The power-function average of a relative width, made from a run's snapshots.

    It is the average at the newest snapshot. The directory is only read.

    Returns:
      The parameters, and the error of the profile (see `averages.solve`).

    Raises:
      ValueError: if there is no such width, the run has tracked no averages, or a snapshot is
        damaged.
      FileNotFoundError: if a snapshot since the start of training is missing; lists the steps.
    """
    config = read_config(workdir)
    check_average(config, std)
    paths = list_snapshots(workdir, config)
    # Two snapshots of the same time hold the same: the steps between them were skipped.
    at = {(averaging.read_time(path), width): path for width, path in paths}
    at = {key: path for key, path in at.items() if key[0]}
    times, widths = zip(*at, strict=True) if at else ((), ())
    coefficients, error = solve(times, widths, std)
    trees = (averaging.read_snapshot(path).params for path in at.values())
    return jax.tree.map(jnp.asarray, weighted_sum(coefficients, trees)), error


def list_snapshots(workdir: Path, config: Config) -> list[tuple[float, Path]]:
    """The widths and files of a run's snapshots, oldest first.

    Raises:
      FileNotFoundError: if one is missing from the start of training to the newest.
    """
    folder, every = workdir / SNAPSHOTS, config.snapshot_every or 1
    has: dict[int, set[str]] = {}
    for path in folder.glob("*-*.safetensors"):
        step = path.name.partition("-")[0]
        if step.isdecimal():
            has.setdefault(int(step), set()).add(path.name)
    files = lambda step: {averaging.name(step, std): std for std in config.averages}
    whole = [step for step in sorted(has) if files(step).keys() <= has[step]]
    # The run writes a snapshot before the checkpoint of the same step.
    saved = [int(path.name) for path in list_checkpoints(workdir)]
    newest = max(whole[-1:] + saved[-1:], default=every)
    missing = [step for step in range(every, newest + 1, every) if step not in whole]
    if missing:
        steps = ", ".join(map(str, missing[:5])) + ", ..." * (len(missing) > 5)
        raise FileNotFoundError(
            f"{folder} lacks {len(missing)} snapshots, those of step {steps}: an average needs all "
            "of them from the start of training"
        )
    return [(std, folder / name) for step in whole for name, std in files(step).items()]
