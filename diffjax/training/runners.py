"""Runners: ways to map the same pure functions over all devices of all processes.

`pmap` maps a per-device function whose gradients are averaged by `lax.pmean`, with a copy of the
state on every device; `sharded` compiles the global function for a mesh, lets XLA place the
collectives, and can split the state over devices too. The state has the same pytree and shapes
under both, so that a checkpoint does not depend on the runner or on the number of devices.

Each process feeds its own slots of every global batch, and gets every output.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from . import preemption, telemetry

AXIS = "batch"


class Runner(NamedTuple):
    """The functions that run a computation on all devices of all processes.

    Attributes:
      name: the name in `RUNNERS`.
      init: takes f() -> state, and returns that state, created where it stays: no device ever holds
        more than its part.
      step: takes step(state, batch, axis_name) -> (state, metrics), and returns the compiled
        function of (state, batch), which donates the state, except in `pmap` among processes.
      map: takes f(params, batch) -> outputs `[batch, ...]`, and returns the compiled function,
        which gives all of the outputs to every process.
      slots: takes the size of a global batch, and returns the positions in it that this process
        feeds, ascending.
      put: takes a host batch, a pytree of numpy arrays `[len(slots), ...]`, and moves it to the
        devices.
      flops: takes a step made by `step`, its state and its batch, and returns the operations of a
        call of it on one device.
      axis: the mapped axis over which a batch is split, for collectives; None where a function is
        given the whole batch.
    """

    name: str
    init: Callable[[Callable], Any]
    step: Callable[[Callable], Callable]
    map: Callable[[Callable], Callable]
    slots: Callable[[int], np.ndarray]
    put: Callable[[Any], Any]
    flops: Callable[..., float]
    axis: str | None = None


def pmap(fsdp: int = 1) -> Runner:
    """Map over devices by `jax.pmap`, with a copy of the state on each.

    Raises:
      ValueError: if `fsdp` is not 1.
    """
    if fsdp != 1:
        raise ValueError(f"parallel=pmap copies the state to each device: {fsdp=} needs sharded")
    # By process: then the positions that a process feeds, and gathered outputs, are in order.
    devices = sorted(_devices(), key=lambda device: (device.process_index, device.id))
    local = [device for device in devices if device.process_index == jax.process_index()]
    mesh = Mesh(np.array(devices), (AXIS,))
    one_each = NamedSharding(mesh, PartitionSpec(AXIS))
    # Among processes, JAX deletes a donated replicated argument that the next call still needs.
    donate = 0 if jax.process_count() == 1 else ()
    over_all = functools.partial(
        jax.pmap, axis_name=AXIS, in_axes=(None, 0), out_axes=None, devices=devices
    )

    def init(f):
        return _compile_once(f, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def step(f):
        def on_device(state, batch):
            return f(state, batch, axis_name=AXIS)

        return over_all(on_device, donate_argnums=donate)

    def map_(f):
        def on_device(params, batch):
            return jax.lax.all_gather(f(params, batch), AXIS, tiled=True)

        return over_all(on_device)

    def slots(batch_size):
        share = batch_size // jax.process_count()
        return np.arange(share) + share * jax.process_index()

    def put(batch):
        # The thread that makes batches ahead does this, so that the step need not wait for it.
        def to_devices(x):
            parts = x.reshape(len(local), -1, *x.shape[1:])
            return jax.make_array_from_process_local_data(one_each, parts)

        return jax.tree.map(to_devices, batch)

    def flops(f, params, batch):
        # JAX traces a mapped function for one device, given the part of the batch of this process.
        part = lambda x: jax.ShapeDtypeStruct((len(local), *x.shape[1:]), x.dtype)
        return telemetry.flops(f, params, jax.tree.map(part, batch))

    return Runner("pmap", init, step, map_, slots, put, flops, AXIS)


def sharded(fsdp: int = 1) -> Runner:
    """Compile for all devices at once by `jax.jit` over a mesh of (copies of the state) x `fsdp`.

    Args:
      fsdp: how many devices share one copy of the state, each large array split along its largest
        divisible axis (fully sharded data parallelism, Zhao et al. 2023; Rajbhandari et al. 2020,
        ZeRO-3). 1: every device has its own copy; 0: all devices share one.

    Raises:
      ValueError: if the number of devices is no multiple of `fsdp`.
    """
    devices = _devices()
    if fsdp < 0 or len(devices) % (fsdp or 1):
        raise ValueError(f"{fsdp=}: must be 0, for all, or divide the {len(devices)} devices")
    share = fsdp or len(devices)
    mesh = jax.make_mesh(
        (len(devices) // share, share),
        ("copy", "fsdp"),
        axis_types=(AxisType.Auto, AxisType.Auto),
        devices=devices,
    )
    everywhere = NamedSharding(mesh, PartitionSpec())
    over_batch = NamedSharding(mesh, PartitionSpec(("copy", "fsdp")))

    def place(state):
        at = lambda x: NamedSharding(mesh, _split_largest(x.shape, "fsdp", share))
        return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, at(x)), state)

    def init(f):
        return _compile_once(lambda: place(f()))

    def step(f):
        def placed(state, batch):
            state, metrics = f(state, batch)
            return place(state), jax.lax.with_sharding_constraint(metrics, everywhere)

        return jax.jit(placed, donate_argnums=0)

    def map_(f):
        return jax.jit(f, out_shardings=everywhere)

    def slots(batch_size):
        # The mesh decides which device has which part: its order may follow a pod's network.
        parts = over_batch.addressable_devices_indices_map((batch_size,)).values()
        return np.unique([np.arange(batch_size)[part] for part in parts])

    def put(batch):
        def to_devices(x):
            shape = (len(x) * jax.process_count(), *x.shape[1:])
            here = slots(shape[0])
            rows = lambda part: x[np.searchsorted(here, np.arange(shape[0])[part[0]])]
            return jax.make_array_from_callback(shape, over_batch, rows)

        return jax.tree.map(to_devices, batch)

    def flops(*args):
        return telemetry.flops(*args) / len(devices)  # under jit it counts those of all devices

    return Runner("sharded", init, step, map_, slots, put, flops)


def in_batches(
    runner: Runner, mapped: Callable, params: Any, batch: dict[str, np.ndarray], size: int
) -> np.ndarray:
    """Apply a mapped function to a host batch of any length, `size` examples at a time.

    Args:
      runner: the runner that `mapped` was made by.
      mapped: `runner.map(f)`.
      params: f's first argument.
      batch: arrays `[n, ...]`; the last part is padded by repeating the last example.
      size: examples per call, rounded up to a multiple of the device count.

    Returns:
      f's outputs, `[n, ...]`, on the host, in every process.
    """
    return np.concatenate(list(in_parts(runner, mapped, params, batch, size)))


def in_parts(
    runner: Runner, mapped: Callable, params: Any, batch: dict[str, np.ndarray], size: int
) -> Iterator[np.ndarray]:
    """Yield what `in_batches` returns, one batch after the other."""
    n, devices = len(batch["index"]), len(_devices())
    size = -(-size // devices) * devices
    for start in range(0, n, size):
        rows = np.minimum(start + runner.slots(size), n - 1)
        part = jax.tree.map(lambda x, rows=rows: x[rows], batch)
        yield np.asarray(mapped(params, runner.put(part)))[: n - start]
        preemption.report_progress()


SMALL = 2**12
"""Arrays with fewer elements are not split: gathering them would cost more than it saves."""


RUNNERS: dict[str, Callable[[int], Runner]] = {"pmap": pmap, "sharded": sharded}
"""Every runner by name, as configs and the command line choose it: functions of `fsdp`."""


def choose(name: str | None, fsdp: int = 1) -> Runner:
    """The runner of a name in `RUNNERS`; None: the one that suits the processes.

    That is `pmap` in a single process, and `sharded` among several, where `pmap` holds the state
    twice, or if the state is split.

    Raises:
      ValueError: as the runner.
    """
    if name is None:
        name = "pmap" if jax.process_count() == 1 and fsdp == 1 else "sharded"
    return RUNNERS[name](fsdp)


def _split_largest(shape, axis_name, n):
    divisible = [(size, -axis) for axis, size in enumerate(shape) if size % n == 0]
    if np.prod(shape) < SMALL or not divisible:
        return PartitionSpec()
    return PartitionSpec(*[None] * -max(divisible)[1], axis_name)


def _compile_once(f, **shardings):
    # This program runs once, and a CPU compiles it five times faster without optimisation.
    quick = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return jax.jit(f, compiler_options=quick, **shardings)()


def _devices():
    return jax.devices()  # a function of its own, so that tests can replace it
