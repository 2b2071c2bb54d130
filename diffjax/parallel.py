"""From one core to a pod: process set-up, and two runners of the same pure functions.

A `Runner` maps a function over the batch. `pmap` maps a per-device function whose gradients are
averaged by `lax.pmean`, with a copy of the state on every device; `sharded` compiles the global
function for a mesh, lets XLA place the collectives, and can split the state over devices too.
State has the same pytree and shapes under both, so checkpoints do not know which runner, or how
many devices, wrote them.

Each process feeds its own slots of every global batch, and gets every output.
"""

import contextlib
import dataclasses
import functools
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from . import preemption, telemetry

AXIS = "batch"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffjax"
"""Where programs that were compiled are kept; it may be deleted at any time."""
CRASHED = 70
"""Exit status after an error that is nobody's input: EX_SOFTWARE."""
PATIENCE = "--xla_cpu_collective_call_terminate_timeout_seconds"
"""The flag of XLA for how long a CPU device waits for the others before it ends the process: 40 s,
which on a busy machine a core may well be kept from its work."""


@dataclasses.dataclass(frozen=True)
class Distributed:
    """Which of how many processes this is. A TPU pod, Slurm and Open MPI tell it."""

    coordinator: str | None = None
    """HOST:PORT of process 0. None: ask the cluster, and be alone if there is none."""
    processes: int | None = None
    """How many there are. 1 without a coordinator: be alone whatever the cluster says."""
    process: int | None = None
    """Which one this is, from 0."""


ALONE = Distributed(processes=1)
CLUSTER = {"JAX_COORDINATOR_ADDRESS", "SLURM_PROCID", "OMPI_COMM_WORLD_SIZE"}
"""Environment variables that only a process of a cluster has."""


class Runner(NamedTuple):
    """How to run on all devices of all processes.

    Attributes:
      init: (f() -> state) to that state, born where it stays: no device ever holds more of it.
      step: (step(state, batch, axis_name) -> (state, metrics)) to the same function of
        (state, batch), compiled; the state is donated, except by `pmap` among processes.
      map: (f(params, batch) -> outputs `[batch, ...]`) to the same function, compiled; every
        process gets all of the outputs.
      slots: size of a global batch to the positions in it that this process feeds, ascending.
      put: a host batch, a pytree of numpy arrays `[len(slots), ...]`, to the devices.
      flops: a step made by `step`, its state and batch to its operations on one device.
    """

    init: Callable[[Callable], Any]
    step: Callable[[Callable], Callable]
    map: Callable[[Callable], Callable]
    slots: Callable[[int], np.ndarray]
    put: Callable[[Any], Any]
    flops: Callable[..., float]


def setup(distributed: Distributed, batch_size: int, accumulate: int = 1) -> None:
    """Find the other processes; alone on a CPU, make its cores devices. Call before all else.

    Compiled programs are kept in `CACHE` for the next start, unless the user has chosen a place
    (`JAX_COMPILATION_CACHE_DIR`) or wants none (`JAX_ENABLE_COMPILATION_CACHE=false`).

    XLA runs one program on one core's worth of threads better than on many: two cores as two
    devices train 1.4 times faster than as one. Takes the largest number of cores that divides
    the batch, lets them wait ten minutes for each other (`PATIENCE`), and does nothing where the
    user has chosen (by `JAX_NUM_CPU_DEVICES`, or by `--xla_force_host_platform_device_count` in
    `XLA_FLAGS`) or JAX has started already.

    Raises:
      ValueError: if `distributed` is given in part, or makes no sense.
      RuntimeError: if the others cannot be reached.
    """
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(CACHE))
        if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    if not _join(distributed):
        _make_cores_devices(batch_size, accumulate)


def _join(distributed):
    """Find the other processes; returns whether there are any."""
    given = dataclasses.astuple(distributed)
    if given not in [(None, None, None), (None, 1, None)] and None in given:
        raise ValueError(
            f"{distributed}: give coordinator, processes and process together, or none of them, "
            "or processes=1 to be alone"
        )
    processes, process = distributed.processes, distributed.process
    if processes is not None and process is not None and not 0 <= process < processes:
        raise ValueError(f"{distributed}: process must be in 0..{processes - 1}")
    # A process that died is noticed after about half of the heartbeat's timeout.
    join = functools.partial(
        jax.distributed.initialize, heartbeat_timeout_seconds=30, shutdown_timeout_seconds=60
    )
    if distributed.coordinator is not None:
        join(distributed.coordinator, processes, process, cluster_detection_method="deactivate")
        return True
    if processes is None and not jax.distributed.is_initialized():
        try:
            join()
            return True
        except (ValueError, RuntimeError) as error:
            # There is no cluster; or JAX has started already, in a notebook, say. Where there is
            # one, though, a process that thinks itself alone would spoil the others' run.
            alone = "coordinator_address should be defined", "before any JAX calls"
            if CLUSTER & set(os.environ) or not any(why in str(error) for why in alone):
                raise
    return False


def _make_cores_devices(batch_size, accumulate):
    flags = os.environ.get("XLA_FLAGS", "")
    if "host_platform_device_count" in flags or "JAX_NUM_CPU_DEVICES" in os.environ:
        return
    if PATIENCE not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {PATIENCE}=600".strip()
    fits = [n for n in range(1, cores() + 1) if batch_size % (n * accumulate) == 0]
    with contextlib.suppress(RuntimeError):  # JAX has started
        jax.config.update("jax_num_cpu_devices", max(fits, default=1))


def cores() -> int:
    """How many CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextlib.contextmanager
def failing_fast() -> Iterator[None]:
    """Around all that a process of many does: an error ends it at once.

    Otherwise it would wait for the others, and they for it, until JAX gives up. Exit status: that
    of a SystemExit, 1 if it has a message; else `CRASHED`.
    """
    try:
        yield
    except SystemExit as stop:
        if not jax.distributed.is_initialized() or isinstance(stop.code, int | None):
            raise
        print(stop.code, file=sys.stderr, flush=True)
        os._exit(1)
    except BaseException as error:
        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(130 if isinstance(error, KeyboardInterrupt) else CRASHED)


def check_batch(batch_size: int, accumulate: int = 1) -> None:
    """Raise a ValueError unless the batch divides evenly over devices and accumulation."""
    devices = jax.device_count()
    if batch_size < 1 or batch_size % (devices * accumulate):
        raise ValueError(
            f"batch_size={batch_size} must be a positive multiple of {devices} devices x "
            f"{accumulate} accumulated parts = {devices * accumulate}"
        )


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
    # With remote devices a donated replicated argument is deleted under the next call's feet.
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
        # Now, by the thread that makes batches ahead, and not when the step is called.
        def to_devices(x):
            parts = x.reshape(len(local), -1, *x.shape[1:])
            return jax.make_array_from_process_local_data(one_each, parts)

        return jax.tree.map(to_devices, batch)

    # XLA counts what a device does.
    return Runner(init, step, map_, slots, put, telemetry.flops)


def sharded(fsdp: int = 1) -> Runner:
    """Compile for all devices at once by `jax.jit` over a mesh of (copies of the state) x `fsdp`.

    Args:
      fsdp: how many devices share one copy of the state, each large array split along its largest
        divisible axis (fully sharded data parallelism, Zhao et al. 2023; Rajbhandari et al. 2020,
        ZeRO-3); 1: each has its own; 0: all devices share one.

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
        # Which device has which part is the mesh's affair: it may follow the wires of a pod.
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
        return telemetry.flops(*args) / len(devices)  # XLA counts what they all do

    return Runner(init, step, map_, slots, put, flops)


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
      f's outputs, `[n, ...]`, on the host, in every process.
    """
    n = len(batch["index"])
    parts = []
    for start in range(0, n, size):
        rows = np.minimum(start + runner.slots(size), n - 1)
        part = jax.tree.map(lambda x, rows=rows: x[rows], batch)
        parts.append(np.asarray(mapped(params, runner.put(part))))
        preemption.tell_alive()
    return np.concatenate(parts)[:n]


RUNNERS: dict[str, Callable[[int], Runner]] = {"pmap": pmap, "sharded": sharded}

SMALL = 2**12
"""Arrays of fewer numbers stay whole: to gather them would cost more than they weigh."""


def _split_largest(shape, axis_name, n):
    divisible = [(size, -axis) for axis, size in enumerate(shape) if size % n == 0]
    if np.prod(shape) < SMALL or not divisible:
        return PartitionSpec()
    return PartitionSpec(*[None] * -max(divisible)[1], axis_name)


def _compile_once(f, **shardings):
    # It runs once: a program that is not optimised is compiled five times sooner on a CPU.
    quick = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return jax.jit(f, compiler_options=quick, **shardings)()


def _devices():
    return jax.devices()  # by this name, so that the tests can run on fewer
