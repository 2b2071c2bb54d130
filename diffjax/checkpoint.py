"""Checkpoints of the training state, by Orbax, sealed; and what a run is read back with.

A run's directory holds `config.json` and `checkpoints/<step>/`. Saving is asynchronous. Before a
checkpoint is committed it gets a seal, the size and SHA-256 of each of its files, and a list of its
arrays. What is not as its seal says is never read: Orbax itself would return wrong numbers for a
flipped bit. A state may be read back onto any number of devices and processes.
"""

import contextlib
import json
import logging
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint.checkpoint_managers import preservation_policy as policy
from orbax.checkpoint.options import AtomicityMode, AtomicityOptions

from . import config as config_lib, provenance, weights
from .config import Config
from .experiment import make_network
from .files import write_text
from .pretrained import PRETRAINED
from .types import Data

CONFIG = "config.json"
CHECKPOINTS = "checkpoints"
SEAL = "seal.json"
ARRAYS = "arrays.json"
# A checkpoint counts once Orbax's commit file is there, not because its name is a number.
COMMITTED = "commit_success.txt"
METADATA = "_CHECKPOINT_METADATA"
ATOMICITY = AtomicityOptions(mode=AtomicityMode.COMMIT_FILE)

# Orbax tells of every file, and of a save that failed in hundreds of lines; we, in one.
logging.getLogger("absl").setLevel(logging.CRITICAL)


class UnwrittenError(OSError):
    """The last checkpoint of a run could not be written."""


class Checkpoints:
    """The checkpoints of a run that trains; use as a context manager.

    A checkpoint that cannot be written is reported, and training goes on; leaving the context
    raises `UnwrittenError` if the last one could not.

    Attributes:
      directory: where they are.
      failed: why the last save failed, or None.
    """

    def __init__(self, workdir: Path, config: Config) -> None:
        self.directory = (workdir / CHECKPOINTS).absolute()
        self.failed: str | None = None
        self._saving: int | None = None
        self._arrays: dict[str, str] = {}
        self._remains: set[Path] = set()
        self._config = config
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        config = self._config
        if jax.process_count() > 1:
            # What the first process has tidied up, all shall find.
            multihost_utils.sync_global_devices("checkpoints")
        keep: list[policy.PreservationPolicy] = [policy.LatestN(config.keep)]
        if config.keep_every is not None:
            keep.append(policy.EveryNSteps(config.keep_every))
        loss = lambda metrics: metrics["eval_loss"]
        if config.keep_best:
            keep.append(policy.BestN(get_metric_fn=loss, reverse=True, n=config.keep_best))
        options = ocp.CheckpointManagerOptions(
            best_fn=loss,  # for Orbax to store it
            preservation_policy=policy.AnyPreservationPolicy(keep),
            cleanup_tmp_directories=True,
            atomicity_options=ATOMICITY,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
        )
        return ocp.CheckpointManager(self.directory, options=options)

    def __enter__(self) -> "Checkpoints":
        # A save that failed leaves one such complaint behind for each array.
        self._unraisable = hook = sys.unraisablehook
        noise = "Event loop is closed"
        sys.unraisablehook = lambda what: None if noise in str(what.exc_value) else hook(what)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        sys.unraisablehook = self._unraisable
        together = kind is None or issubclass(kind, (SystemExit, FloatingPointError))
        if jax.process_count() > 1 and not together:
            return  # the others are elsewhere, and to wait for them would be for ever
        self.wait()
        if kind is not None and issubclass(kind, Exception) and jax.process_index() == 0:
            print(f"the newest checkpoint: step {self.newest()}", flush=True)
        self._manager.close()
        self._sweep()
        if kind is None:
            self.require()

    def newest(self) -> int | None:
        """The step of the newest checkpoint; None if there is none. Call `wait` before."""
        return self._manager.latest_step()

    def restore(self, like: Any) -> Any | None:
        """The newest checkpoint, or None if there is none.

        Args:
          like: a pytree of arrays of the shapes, dtypes and shardings wanted.

        Raises:
          ValueError: if it is of other arrays; lists them.
        """
        step = self.newest()
        if step is None:
            return None
        path = self.directory / str(step)
        lines = config_lib.unlike(
            _json(path / ARRAYS), _describe(like), "it has {}, this config makes {}"
        )
        if lines:
            raise ValueError(f"{path} is of another state:\n  " + "\n  ".join(lines.values()))
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        return self._manager.restore(step, args=ocp.args.StandardRestore(abstract))

    def save(self, step: int, state: Any, eval_loss: float = float("inf")) -> None:
        """Start to write a checkpoint, after the one before is written.

        Args:
          step: steps taken.
          state: a pytree of arrays.
          eval_loss: what the best are chosen by, less is better.
        """
        self.wait()
        self._sweep()
        if step in self._manager.all_steps():
            return
        self._saving, self._arrays, self.failed = step, _describe(state), None
        args = ocp.args.StandardSave(jax.tree.map(_savable, state))
        metrics = {"eval_loss": eval_loss if np.isfinite(eval_loss) else float("inf")}
        self._reporting(lambda: self._manager.save(step, args=args, metrics=metrics))

    def wait(self) -> None:
        """Wait until the checkpoint that is being written is there, or has failed."""
        if self._saving is None:
            return
        self._reporting(self._manager.wait_until_finished)
        step, self._saving = self._saving, None
        failed = self.failed is not None
        if jax.process_count() > 1:
            failed = bool(multihost_utils.process_allgather(np.array(failed)).any())
        if failed:
            self.failed = self.failed or f"checkpoint {step} failed in another process"
            # The manager that failed would fail again, and has forgotten what it was to delete.
            with contextlib.suppress(Exception):
                self._manager.close()
            remains = self.directory / str(step)
            self._remains.add(remains)
            for _ in range(20):
                self._sweep()
                time.sleep(0.1)  # its threads may still be writing, and would trip the next one
                if not remains.exists():
                    break
            self._manager = self._open()

    def _sweep(self) -> None:
        # And again later: its last thread may yet make the folder anew.
        for path in self._remains if jax.process_index() == 0 else ():
            if not (path / COMMITTED).exists():
                shutil.rmtree(path, ignore_errors=True)

    def require(self) -> None:
        """Wait, and raise an `UnwrittenError` if the last checkpoint could not be written."""
        self.wait()
        if self.failed:
            raise UnwrittenError(self.failed)

    def _reporting(self, write: Callable[[], Any]) -> None:
        try:
            write()
        except (OSError, ValueError) as error:
            if self.failed is None:
                self.failed = f"checkpoint {self._saving} could not be written: {error}"
                print(self.failed, flush=True)

    def _seal(self) -> None:
        """Called by Orbax when all files are there, before it commits them."""
        path = self.directory / str(self._saving)
        (path / ARRAYS).write_text(json.dumps(self._arrays, indent=1) + "\n")
        # Orbax will yet note in its metadata, which no restoring depends on, when it committed.
        files = [f for f in sorted(path.rglob("*")) if f.is_file() and f.name != METADATA]
        seal = {str(f.relative_to(path)): _fingerprint(f) for f in files}
        write_text(path / SEAL, json.dumps(seal, indent=1))


def open_run(workdir: Path, config: Config) -> Checkpoints:
    """Open a run's directory, new or to be continued, and write its `config.json`.

    A checkpoint newer than the newest sound one is set aside, under the name `damaged-<step>`, and
    what is wrong with it is printed.

    Raises:
      ValueError: if it holds a run of a config that this one cannot continue, and lists what
        differs; or if it holds checkpoints, and none is sound.
      OSError: if it cannot be read or written.
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
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        write_text(path, config_lib.to_json(config))
        _set_damaged_aside(found(workdir))
    return Checkpoints(workdir, config)


def load(workdir: Path | str) -> tuple[Callable[..., Data], Any, Config]:
    """A trained network from its run's directory, an exported file, or by its name.

    The directory is only read, so the run may still be going. A damaged checkpoint is warned of,
    and the next older one is read.

    Args:
      workdir: a run's directory; a file of `python -m diffjax.export`; or, where no such path is,
        a name in `PRETRAINED`, a model that comes with diffjax.

    Returns:
      `network`, a function (params, x_t, log_snr, cond) -> an estimate of `config.target`; the
      moving average of its parameters at the newest sound checkpoint; and the run's config.

    Raises:
      FileNotFoundError: if there is no config or no sound checkpoint.
      ValueError: if the config or the file cannot be read.

    With `functools.partial(network, params)` the core is at home:

        network, params, config = load("runs/digits")
        denoise = diffjax.denoiser(partial(network, params), make_schedule(config), config.target)
    """
    workdir = Path(workdir)
    if not workdir.exists():
        workdir = PRETRAINED.get(str(workdir), workdir)
    if workdir.is_file():
        params, config = weights.read(workdir)
        return make_network(config), params, config
    config = read_config(workdir)
    if not (workdir / CHECKPOINTS).is_dir():
        raise FileNotFoundError(f"{workdir} holds no {CHECKPOINTS}")
    for path in reversed(found(workdir)):
        damage = damage_of(path)
        if not path.exists():
            return load(workdir)  # the run has deleted it meanwhile, for newer ones
        if damage is None:
            # By way of the host, so that they are tied to no device.
            to_host = jax.tree.map(np.asarray, read(path, "ema_params")["ema_params"])
            return make_network(config), jax.tree.map(jnp.asarray, to_host), config
        warnings.warn(f"{path} is damaged: {damage}; trying an older one", stacklevel=2)
    raise FileNotFoundError(f"{workdir / CHECKPOINTS} holds no sound checkpoint")


def read_config(workdir: Path) -> Config:
    """The config of a run's directory.

    Raises:
      FileNotFoundError: if the directory is not that of a run.
      ValueError: if the config is damaged, or of another version; names the file.
    """
    path = workdir / CONFIG
    if not path.is_file():
        raise FileNotFoundError(
            f"{workdir} holds no {CONFIG}: not the directory of a run; nor is it a file, or one of "
            f"the models that come with diffjax, {', '.join(PRETRAINED)}"
        )
    try:
        return config_lib.from_json(path.read_text())
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is not a config of this diffjax: {error!r}") from error


def found(workdir: Path) -> list[Path]:
    """The finished checkpoints of a run, sound or not, oldest first."""
    # One that was cut off while it was written has neither file, nor has a folder that is not ours.
    # The seal comes first: what is as it says is whole, whether or not Orbax came to commit it.
    steps = [p for p in (workdir / CHECKPOINTS).absolute().glob("*") if p.name.isdecimal()]
    ours = [p for p in steps if (p / SEAL).is_file() or (p / COMMITTED).is_file()]
    return sorted(ours, key=lambda path: int(path.name))


def read(path: Path, *fields: str) -> dict[str, Any]:
    """A checkpoint's arrays on one device, whatever devices wrote them.

    Args:
      path: one of `found`; it is not verified.
      fields: which fields of `TrainState` to read, all if none are named.
    """
    reader = ocp.PyTreeCheckpointer()
    saved: Any = reader.metadata(path / "default").item_metadata
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here),
        {field: saved.tree[field] for field in fields or saved.tree},
    )
    how = ocp.checkpoint_utils.construct_restore_args(like)
    args = ocp.args.PyTreeRestore(like, how, partial_restore=True)
    return reader.restore(path / "default", args=args)


def damage_of(path: Path) -> str | None:
    """What is wrong with a finished checkpoint, or None if every file is as its seal says.

    Raises:
      OSError: if a file is there and cannot be read: that says nothing of what is in it.
    """
    if not (path / SEAL).is_file():
        return f"{SEAL} is missing"
    try:
        seal = {path / name: tuple(print_) for name, print_ in _json(path / SEAL).items()}
    except (ValueError, AttributeError, TypeError) as error:
        return f"{SEAL} cannot be understood ({error})"
    for file, fingerprint in seal.items():
        name = file.relative_to(path)
        if not file.is_file():
            return f"{name} is missing"
        if _fingerprint(file) != fingerprint:
            return f"{name} has changed"
    return None if path / ARRAYS in seal else f"{SEAL} does not know {ARRAYS}"


def _json(path):
    return json.loads(path.read_text())


def _set_damaged_aside(paths):
    damaged = {}
    for path in reversed(paths):
        damage = damage_of(path)
        if damage is None:
            (path / COMMITTED).touch()  # if a kill came between the seal and this
            break
        damaged[path] = damage
    if damaged and len(damaged) == len(paths):
        lines = [f"{path}: {damage}" for path, damage in damaged.items()]
        raise ValueError(
            "no checkpoint is sound; choose another --workdir:\n  " + "\n  ".join(lines)
        )
    for path, damage in damaged.items():
        aside = path.with_name(f"damaged-{path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        print(f"{path} is damaged: {damage}; set aside as {aside.name}", flush=True)


def _fingerprint(file):
    return file.stat().st_size, provenance.file_digest(file)


def _describe(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): f"{x.dtype}{list(x.shape)}" for path, x in leaves}


def _savable(x):
    if jax.process_count() > 1 and x.is_fully_addressable:
        # pmap's replicated outputs are each process' own; Orbax wants one array of all processes.
        mesh = Mesh(np.array(jax.devices()), ("all",))
        everywhere = NamedSharding(mesh, PartitionSpec())
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(_savable(jax.random.key_data(x)))
        here = np.asarray(x)
        return jax.make_array_from_callback(x.shape, everywhere, lambda part: here[part])
    # Orbax shares the writing of a replicated array between its replicas: on one host that gains
    # nothing and compiles a slice for every shape.
    return x.addressable_data(0) if x.is_fully_replicated and x.is_fully_addressable else x
