"""Checkpoints of the training state, by Orbax, and what a finished run is read back with.

A run's directory holds `config.json` and `checkpoints/<step>/`. Saving is asynchronous; only
finished checkpoints are ever seen. The state is replicated, so it is written once and read back
onto any number of devices.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as policy
from orbax.checkpoint.options import AtomicityMode, AtomicityOptions

from . import config as config_lib
from .config import Config
from .experiment import make_network
from .types import Data

CONFIG = "config.json"
CHECKPOINTS = "checkpoints"
# A checkpoint counts once its commit file is there, not because its name is a number.
ATOMICITY = AtomicityOptions(mode=AtomicityMode.COMMIT_FILE)


def open_run(workdir: Path, config: Config) -> ocp.CheckpointManager:
    """Open a run's directory, new or to be continued, and write its `config.json`.

    Raises:
      ValueError: if it holds a run of a config that this one cannot continue; lists what differs.
      OSError: if it cannot be written to.
    """
    path = workdir / CONFIG
    if path.exists():
        differences = config_lib.differences(read_config(workdir), config)
        if differences:
            raise ValueError(
                f"{workdir} holds a run of another config; choose another --workdir, or undo:\n  "
                + "\n  ".join(differences)
            )
    elif list((workdir / CHECKPOINTS).glob("*")):
        raise ValueError(f"{workdir} holds checkpoints but no {CONFIG}: choose another --workdir")
    workdir.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(config_lib.to_json(config))
    temporary.replace(path)
    return _manager(workdir, config)


def restore(manager: ocp.CheckpointManager, like: Any) -> Any | None:
    """The newest finished checkpoint, or None if there is none.

    Args:
      manager: from `open_run`.
      like: a pytree of arrays of the shapes, dtypes and shardings wanted.
    """
    step = manager.latest_step()
    if step is None:
        return None
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    return manager.restore(step, args=ocp.args.StandardRestore(abstract))


def save(manager: ocp.CheckpointManager, step: int, state: Any) -> None:
    """Start writing a checkpoint; `manager.wait_until_finished()` waits for it."""
    if step not in manager.all_steps():
        manager.save(step, args=ocp.args.StandardSave(jax.tree.map(_one_copy, state)))


def load(workdir: Path | str) -> tuple[Callable[..., Data], Any, Config]:
    """A trained network from its run's directory.

    The directory is only read, so the run may still be going.

    Returns:
      `network`, a function (params, x_t, log_snr, cond) -> an estimate of `config.target`; the
      moving average of its parameters at the newest checkpoint; and the run's config.

    Raises:
      FileNotFoundError: if there is no config or no finished checkpoint.
      ValueError: if the config cannot be read.

    With `functools.partial(network, params)` the core is at home:

        network, params, config = load("runs/digits")
        denoise = diffjax.denoiser(partial(network, params), make_schedule(config), config.target)
    """
    workdir = Path(workdir)
    config = read_config(workdir)
    if not (workdir / CHECKPOINTS).is_dir():
        raise FileNotFoundError(f"{workdir} holds no {CHECKPOINTS}")
    options = ocp.CheckpointManagerOptions(read_only=True, atomicity_options=ATOMICITY)
    with ocp.CheckpointManager((workdir / CHECKPOINTS).absolute(), options=options) as manager:
        step = manager.latest_step()
        if step is None:
            raise FileNotFoundError(f"{workdir / CHECKPOINTS} holds no finished checkpoint")
        tree = manager.restore(step, args=ocp.args.StandardRestore())
    return make_network(config), jax.tree.map(jnp.asarray, tree["ema_params"]), config


def read_config(workdir: Path) -> Config:
    """The config of a run's directory.

    Raises:
      FileNotFoundError: if the directory is not that of a run.
      ValueError: if the config is damaged, or of another version; names the file.
    """
    path = workdir / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{workdir} holds no {CONFIG}: not the directory of a run")
    try:
        return config_lib.from_json(path.read_text())
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is not a config of this diffjax: {error!r}") from error


def _one_copy(x):
    # Orbax shares the writing of a replicated array between its replicas: on one host that gains
    # nothing and compiles a slice for every shape.
    return x.addressable_data(0) if x.is_fully_replicated and x.is_fully_addressable else x


def _manager(workdir, config):
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax tells of every file
    keep: list[policy.PreservationPolicy] = [policy.LatestN(config.keep)]
    if config.keep_every is not None:
        keep.append(policy.EveryNSteps(config.keep_every))
    options = ocp.CheckpointManagerOptions(
        preservation_policy=policy.AnyPreservationPolicy(keep),
        cleanup_tmp_directories=True,
        atomicity_options=ATOMICITY,
    )
    return ocp.CheckpointManager((workdir / CHECKPOINTS).absolute(), options=options)
