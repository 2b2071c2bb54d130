"""Power-function averages in training: an optimiser that tracks them, and their snapshots on disk.

`averaging` puts the averages beside the state of an optimiser, so that they are in checkpoints, are
split over devices as the parameters are, and do not count a batch that `train_step` skips. A
snapshot is a file `STEP-WIDTH.safetensors` of one average, which carries its own hash; no snapshot
is ever deleted, because the average of another width needs all of them (`diffjax.averages`).
"""

import contextlib
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import multihost_utils

from ..averages import Snapshot, gamma_of, next_average, update_weight
from ..types import Array, at_least_float32
from .files import digest, replacing
from .store import fetched

STEP, TIME, STD, SEAL = (f"diffjax.{name}" for name in ("step", "updates", "width", "sha256"))
DTYPES = ("float32", "float16")
"""The numbers that a snapshot can be stored in."""


class Averaging(NamedTuple):
    """The state of an optimiser that tracks averages.

    Attributes:
      inner: the state of the optimiser itself.
      updates: updates made, int32 `[]`; a batch that was skipped has made none.
      averages: the averages of the parameters, of at least float32, by ascending width.
    """

    inner: optax.OptState
    updates: Array
    averages: tuple[Any, ...]


def averaging(
    tx: optax.GradientTransformation, stds: Sequence[float]
) -> optax.GradientTransformationExtraArgs:
    """The same optimiser, which also tracks power-function averages of the parameters.

    It must be the last of a chain: it adds the updates that it passes on to the parameters.

    Args:
      tx: the optimiser.
      stds: the relative widths of the averages.

    Raises:
      ValueError: unless each width is above 0, and at most 1/sqrt(12).
    """
    tx, gammas = optax.with_extra_args_support(tx), [gamma_of(std) for std in sorted(stds)]

    def init(params):
        zeros = lambda p: jnp.zeros_like(at_least_float32(p) if _floating(p) else p)
        averages = tuple(jax.tree.map(zeros, params) for _ in gammas)
        return Averaging(tx.init(params), jnp.zeros((), jnp.int32), averages)

    def update(updates, state: Any, params: Any = None, **extra):
        updates, inner = tx.update(updates, state.inner, params, **extra)
        t, new = state.updates + 1, optax.apply_updates(params, updates)
        averages = (
            next_average(average, new, update_weight(gamma, t))
            for average, gamma in zip(state.averages, gammas, strict=True)
        )
        return updates, Averaging(inner, t, tuple(averages))

    return optax.GradientTransformationExtraArgs(init, update)


def name(step: int, std: float) -> str:
    """The name of the file of a snapshot."""
    return f"{step:08}-{std:g}.safetensors"


def snapshots_of(state: Averaging, stds: Sequence[float], dtype: str) -> list[Snapshot]:
    """The averages of a state on the host; every process of a pod must call this.

    Args:
      state: what `averaging` keeps.
      stds: the relative widths.
      dtype: of the numbers, one of `DTYPES`.
    """
    host = functools.partial(_on_host, dtype=dtype)
    return [
        Snapshot(int(state.updates), std, jax.tree.map(host, average))
        for std, average in zip(sorted(stds), state.averages, strict=True)
    ]


def write_snapshot(folder: Path, step: int, snapshot: Snapshot) -> None:
    """Write a snapshot of NumPy arrays to a file, which is complete or absent.

    Raises:
      OSError: if it cannot be written, or a number was too large for its dtype.
    """
    path = folder / name(step, snapshot.std)
    arrays: Any = flatten_dict(snapshot.params, sep="/")
    for key, x in arrays.items():
        if not np.isfinite(x).all():
            raise OSError(f"{path}: {key} has numbers that {x.dtype} does not hold")
    folder.mkdir(exist_ok=True)
    about = {STEP: step, TIME: snapshot.time, STD: snapshot.std, SEAL: _seal(step, snapshot)}
    try:
        with replacing(path) as new:
            safetensors.numpy.save_file(arrays, new, {k: str(v) for k, v in about.items()})
    except safetensors.SafetensorError as error:  # such as a full disk
        raise OSError(f"{path} could not be written: {error}") from error


def read_snapshot(path: Path) -> Snapshot:
    """Read a snapshot.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is damaged or not a snapshot; the message names it.
    """
    with _opened(path) as file:
        about = file.metadata()
        arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        params = unflatten_dict(arrays, sep="/")
        step, snapshot = int(about[STEP]), Snapshot(int(about[TIME]), float(about[STD]), params)
        sound = path.name == name(step, snapshot.std) and about[SEAL] == _seal(step, snapshot)
    if not sound:
        raise ValueError(f"{path} is damaged: it is not what was written")
    return snapshot


def read_time(path: Path) -> int:
    """The number of updates at which a snapshot was taken; raises what `read_snapshot` does."""
    with _opened(path) as file:
        return int(file.metadata()[TIME])


@contextlib.contextmanager
def _opened(path):
    if not path.is_file():
        raise FileNotFoundError(f"there is no snapshot {path}")
    try:
        with fetched(path) as here, safetensors.safe_open(here, "numpy") as file:
            yield file
    except Exception as error:  # untrusted input may raise anything
        raise ValueError(f"{path} is not a snapshot: {error!r:.200}") from error


def _seal(step, snapshot):
    about = {"step": step, "time": snapshot.time, "std": snapshot.std}
    return digest({"about": jax.tree.map(np.float64, about), "params": snapshot.params})


def _floating(x):
    return jnp.issubdtype(jnp.result_type(x), jnp.floating)


def _on_host(x, dtype):
    """The whole array on the host, gathered from the processes if it is split over them."""
    if not (x.is_fully_addressable or x.is_fully_replicated):
        x = multihost_utils.process_allgather(x, tiled=True)
    x = np.asarray(x)
    with np.errstate(over="ignore"):
        return np.asarray(x.astype(dtype) if _floating(x) else x, order="C")
