"""Checkpoints of a training state, by Orbax, sealed.

A folder of checkpoints holds `<step>/`, written asynchronously. Before Orbax commits a checkpoint,
it gets a seal, the size and SHA-256 of each of its files, and a list of its arrays. A checkpoint
that does not match its seal is never read: Orbax itself would return wrong numbers for a flipped
bit. A state may be read back onto any number of devices and processes.
"""

import contextlib
import json
import shutil
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

from . import orbax
from .files import file_digest, unequal, write_text

SEAL = "seal.json"
ARRAYS = "arrays.json"
# A checkpoint counts once Orbax's commit file is there, not because its name is a number.
COMMITTED = "commit_success.txt"
METADATA = "_CHECKPOINT_METADATA"
ATOMICITY = AtomicityOptions(mode=AtomicityMode.COMMIT_FILE)

orbax.silence_logs()


class UnwrittenError(OSError):
    """The last checkpoint of a run could not be written."""


class Checkpoints:
    """The checkpoints of a run in training; use as a context manager.

    A checkpoint that cannot be written is reported, and training goes on; leaving the context
    raises `UnwrittenError` if the last one could not be written.

    Args:
      directory: the folder of the checkpoints.
      keep: the number of newest checkpoints to keep.
      keep_every: also keep every checkpoint whose step is a multiple of this; None: no others.
      keep_best: also keep this many checkpoints with the lowest held-out loss.

    Attributes:
      failed: why the last save failed, or None.
    """

    def __init__(
        self, directory: Path, keep: int = 2, keep_every: int | None = None, keep_best: int = 0
    ) -> None:
        self.directory = directory.absolute()
        self.failed: str | None = None
        self._saving: int | None = None
        self._arrays: dict[str, str] = {}
        self._failed_saves: set[Path] = set()
        self._context = contextlib.ExitStack()
        self._policies: list[policy.PreservationPolicy] = [policy.LatestN(keep)]
        if keep_every is not None:
            self._policies.append(policy.EveryNSteps(keep_every))
        if keep_best:
            self._policies.append(policy.BestN(get_metric_fn=_loss, reverse=True, n=keep_best))
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        if jax.process_count() > 1:
            # The first process may have set damaged checkpoints aside: wait until it has.
            multihost_utils.sync_global_devices("checkpoints")
        options = ocp.CheckpointManagerOptions(
            best_fn=_loss,  # so that Orbax stores the loss
            preservation_policy=policy.AnyPreservationPolicy(self._policies),
            cleanup_tmp_directories=True,
            atomicity_options=ATOMICITY,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
        )
        return ocp.CheckpointManager(self.directory, options=options)

    def __enter__(self) -> "Checkpoints":
        self._context.enter_context(orbax.without_event_loop_complaints())
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._context.close()
        together = kind is None or issubclass(kind, (SystemExit, FloatingPointError))
        if jax.process_count() > 1 and not together:
            return  # only this process failed: waiting for the others here would never end
        self.wait()
        if kind is not None and issubclass(kind, Exception) and jax.process_index() == 0:
            print(f"the newest checkpoint: step {self.newest()}", flush=True)
        self._manager.close()
        self._remove_failed_saves()
        if kind is None:
            self.require()

    def newest(self) -> int | None:
        """The step of the newest checkpoint, or None. Call `wait` first."""
        return self._manager.latest_step()

    def restore(self, like: Any) -> Any | None:
        """The newest checkpoint, or None if there is none.

        Args:
          like: a pytree of arrays of the shapes, dtypes and shardings wanted.

        Raises:
          ValueError: if the checkpoint holds other arrays; lists them.
        """
        step = self.newest()
        if step is None:
            return None
        path = self.directory / str(step)
        lines = unequal(_json(path / ARRAYS), _describe(like), "it has {}, this config makes {}")
        if lines:
            raise ValueError(f"{path} is of another state:\n  " + "\n  ".join(lines.values()))
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        return self._manager.restore(step, args=ocp.args.StandardRestore(abstract))

    def save(self, step: int, state: Any, eval_loss: float = float("inf")) -> None:
        """Start to write a checkpoint, after the one before is written.

        Args:
          step: steps taken.
          state: a pytree of arrays.
          eval_loss: the held-out loss, by which `keep_best` chooses.
        """
        self.wait()
        self._remove_failed_saves()
        if step in self._manager.all_steps():
            return
        self._saving, self._arrays, self.failed = step, _describe(state), None
        args = ocp.args.StandardSave(jax.tree.map(_savable, state))
        metrics = {"eval_loss": eval_loss if np.isfinite(eval_loss) else float("inf")}
        self._reporting(lambda: self._manager.save(step, args=args, metrics=metrics))

    def wait(self) -> None:
        """Wait until the checkpoint that is being written is complete, or has failed."""
        if self._saving is None:
            return
        self._reporting(self._manager.wait_until_finished)
        step, self._saving = self._saving, None
        failed = self.failed is not None
        if jax.process_count() > 1:
            failed = bool(multihost_utils.process_allgather(np.array(failed)).any())
        if failed:
            self.failed = self.failed or f"checkpoint {step} failed in another process"
            # This manager would fail again, and no longer knows which checkpoints to delete.
            orbax.close_failed(self._manager)
            self._failed_saves.add(folder := self.directory / str(step))
            if jax.process_index() == 0:
                orbax.remove_failed_save(folder, folder / COMMITTED)
            self._manager = self._open()

    def _remove_failed_saves(self) -> None:
        # Repeated at every save: the threads of a failed save may create its folder again later.
        for path in self._failed_saves if jax.process_index() == 0 else ():
            if path.exists():
                orbax.remove_failed_save(path, path / COMMITTED)

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
        # Orbax still adds the time of the commit to its metadata, which restoring does not need.
        files = [f for f in sorted(path.rglob("*")) if f.is_file() and f.name != METADATA]
        seal = {str(f.relative_to(path)): _fingerprint(f) for f in files}
        write_text(path / SEAL, json.dumps(seal, indent=1))


def list_checkpoints(directory: Path) -> list[Path]:
    """The finished checkpoints in a folder, sound or not, oldest first."""
    # Interrupted saves and foreign folders have neither file. A checkpoint with a seal is complete
    # even if the process was killed before Orbax committed it.
    steps = [p for p in directory.absolute().glob("*") if p.name.isdecimal()]
    ours = [p for p in steps if (p / SEAL).is_file() or (p / COMMITTED).is_file()]
    return sorted(ours, key=lambda path: int(path.name))


def read(path: Path, *fields: str) -> dict[str, Any]:
    """A checkpoint's arrays on one device, whatever devices wrote them.

    Args:
      path: one of `list_checkpoints`; it is not verified.
      fields: the fields of `TrainState` to read; all of them by default.
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
      OSError: if a file exists and cannot be read, which does not show that it is damaged.
    """
    if not (path / SEAL).is_file():
        return f"{SEAL} is missing"
    try:
        seal = {path / name: tuple(print_) for name, print_ in _json(path / SEAL).items()}
    except (ValueError, AttributeError, TypeError) as error:
        return f"{SEAL} cannot be parsed ({error})"
    for file, fingerprint in seal.items():
        name = file.relative_to(path)
        if not file.is_file():
            return f"{name} is missing"
        if _fingerprint(file) != fingerprint:
            return f"{name} has changed"
    return None if path / ARRAYS in seal else f"{SEAL} does not list {ARRAYS}"


def set_damaged_aside(directory: Path) -> None:
    """Rename the checkpoints newer than the newest sound one to `damaged-<step>`, and print why.

    Raises:
      ValueError: if there are checkpoints, and none is sound.
    """
    paths = list_checkpoints(directory)
    damaged = {}
    for path in reversed(paths):
        damage = damage_of(path)
        if damage is None:
            (path / COMMITTED).touch()  # in case the process was killed between seal and commit
            break
        damaged[path] = damage
    if damaged and len(damaged) == len(paths):
        lines = [f"{path}: {damage}" for path, damage in damaged.items()]
        raise ValueError(
            "no checkpoint is sound; choose another --workdir:\n  " + "\n  ".join(lines)
        )
    for path, damage in damaged.items():
        renamed = path.with_name(f"damaged-{path.name}")
        shutil.rmtree(renamed, ignore_errors=True)
        path.rename(renamed)
        print(f"{path} is damaged: {damage}; renamed to {renamed.name}", flush=True)


def _loss(metrics):
    return metrics["eval_loss"]


def _json(path):
    return json.loads(path.read_text())


def _fingerprint(file):
    return file.stat().st_size, file_digest(file)


def _describe(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): f"{x.dtype}{list(x.shape)}" for path, x in leaves}


def _savable(x):
    if jax.process_count() > 1 and x.is_fully_addressable:
        # pmap's replicated outputs belong to each process; Orbax needs one array of all processes.
        mesh = Mesh(np.array(jax.devices()), ("all",))
        everywhere = NamedSharding(mesh, PartitionSpec())
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(_savable(jax.random.key_data(x)))
        here = np.asarray(x)
        return jax.make_array_from_callback(x.shape, everywhere, lambda part: here[part])
    # Orbax splits the writing of a replicated array among its replicas, which gains nothing on one
    # host and compiles a slice for every shape.
    return x.addressable_data(0) if x.is_fully_replicated and x.is_fully_addressable else x
