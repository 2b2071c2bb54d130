"""How a step runs on many devices: two runners of the same pure functions.

A `Runner` maps a function over the batch and keeps everything else replicated. `pmap` maps a
per-device function whose gradients are averaged by `lax.pmean`; `sharded` compiles the global
function for a mesh and lets XLA place the collectives. State has one layout under both,
replicated over all devices, so checkpoints do not know which runner wrote them.

Both take and return global batches `[batch, ...]` (in a process of many: its own slice).
"""

import contextlib
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

AXIS = "batch"


class Runner(NamedTuple):
    """How to run on all devices.

    Attributes:
      step: (step(state, batch, axis_name) -> (state, metrics)) to the same function of
        (state, batch), compiled; the state is donated.
      map: (f(params, batch) -> outputs `[batch, ...]`) to the same function, compiled.
      put: a host batch, a pytree of numpy arrays `[batch, ...]`, to the devices.
      replicate: (f() -> pytree) to that pytree, born replicated on every device.
    """

    step: Callable[[Callable], Callable]
    map: Callable[[Callable], Callable]
    put: Callable[[Any], Any]
    replicate: Callable[[Callable], Any]


def setup(batch_size: int, accumulate: int = 1) -> None:
    """Make a CPU's cores its devices. Call before anything else touches JAX.

    XLA runs one program on one core's worth of threads better than on many: two cores as two
    devices train 1.4 times faster than as one. Takes the largest number of cores that divides
    the batch, and does nothing where the user has chosen (by `JAX_NUM_CPU_DEVICES`, or by
    `--xla_force_host_platform_device_count` in `XLA_FLAGS`) or JAX has started already.
    """
    chosen = "host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if chosen or "JAX_NUM_CPU_DEVICES" in os.environ:
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    fits = [n for n in range(1, (cores or 1) + 1) if batch_size % (n * accumulate) == 0]
    with contextlib.suppress(RuntimeError):  # JAX has started: in a notebook, say
        jax.config.update("jax_num_cpu_devices", max(fits, default=1))


def check_batch(batch_size: int, accumulate: int = 1) -> None:
    """Raise a ValueError unless the batch divides evenly over devices and accumulation."""
    devices = jax.device_count()
    if batch_size < 1 or batch_size % (devices * accumulate):
        raise ValueError(
            f"batch_size={batch_size} must be a positive multiple of {devices} devices x "
            f"{accumulate} accumulated parts = {devices * accumulate}"
        )


def local_slots(batch_size: int) -> slice:
    """The positions of the global batch that this process feeds."""
    size = batch_size // jax.process_count()
    return slice(jax.process_index() * size, (jax.process_index() + 1) * size)


def pmap() -> Runner:
    """Map over devices by `jax.pmap`."""
    devices = [d for d in _devices() if d.process_index == jax.process_index()]
    # With remote devices a donated replicated argument is deleted under the next call's feet.
    donate = 0 if jax.process_count() == 1 else ()

    def split(x):
        return np.reshape(x, (len(devices), -1, *np.shape(x)[1:]))

    def step(f):
        def on_device(state, batch):
            return f(state, batch, axis_name=AXIS)

        return jax.pmap(
            on_device,
            AXIS,
            in_axes=(None, 0),
            out_axes=None,
            devices=_devices(),
            donate_argnums=donate,
        )

    def mapped(f):
        g = jax.pmap(f, AXIS, in_axes=(None, 0), devices=_devices())

        def call(params, batch):
            return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), g(params, batch))

        return call

    return Runner(step, mapped, lambda batch: jax.tree.map(split, batch), _replicate)


def sharded() -> Runner:
    """Compile for all devices at once by `jax.jit` over a mesh."""
    mesh = _mesh()
    everywhere = NamedSharding(mesh, PartitionSpec())
    over_batch = NamedSharding(mesh, PartitionSpec(AXIS))

    def step(f):
        return jax.jit(
            f,
            in_shardings=(everywhere, over_batch),
            out_shardings=(everywhere, everywhere),
            donate_argnums=0,
        )

    def put(batch):
        make = jax.make_array_from_process_local_data
        return jax.tree.map(lambda x: make(over_batch, np.asarray(x)), batch)

    def mapped(f):
        return jax.jit(f, in_shardings=(everywhere, over_batch), out_shardings=over_batch)

    return Runner(step, mapped, put, _replicate)


def in_batches(
    runner: Runner, mapped: Callable, params: Any, batch: dict[str, np.ndarray], size: int
) -> np.ndarray:
    """Apply a mapped function to a host batch of any length, `size` examples at a time.

    Args:
      runner: the runner that `mapped` was made by.
      mapped: `runner.map(f)`.
      params: f's first argument.
      batch: arrays `[n, ...]`; the last part is filled up by repetition.
      size: examples per call, a multiple of the device count.

    Returns:
      f's outputs, `[n, ...]`, on the host.
    """
    n = len(batch["index"])
    parts = []
    for start in range(0, n, size):
        rows = np.minimum(np.arange(start, start + size), n - 1)
        part = jax.tree.map(lambda x, rows=rows: x[rows], batch)
        parts.append(np.asarray(mapped(params, runner.put(part))))
    return np.concatenate(parts)[:n]


RUNNERS: dict[str, Callable[[], Runner]] = {"pmap": pmap, "sharded": sharded}


def _replicate(f):
    # It runs once: a program that is not optimised is compiled five times sooner on a CPU.
    quick = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    everywhere = NamedSharding(_mesh(), PartitionSpec())
    return jax.jit(f, out_shardings=everywhere, compiler_options=quick)()


def _mesh():
    devices = _devices()
    return jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def _devices():
    return jax.devices()
