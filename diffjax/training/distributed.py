"""Processes: how they find each other, how many devices each has, and how they fail together."""

import contextlib
import dataclasses
import functools
import os
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax

from ..extras import install
from . import store
from .output import tolerated

GRACE = 8.0
"""Seconds that threads have to end after the program has."""
CRASHED = 70
"""Exit status after an error that the input did not cause: EX_SOFTWARE."""
TIMEOUT = "--xla_cpu_collective_call_terminate_timeout_seconds"
"""The XLA flag for how long a CPU device waits for the others before XLA aborts. Its default is 40
seconds, which a busy machine can exceed."""


@dataclasses.dataclass(frozen=True)
class Distributed:
    """Where this process stands among several. On a TPU pod, Slurm and Open MPI JAX detects it."""

    coordinator: str | None = None
    """HOST:PORT of process 0. None: JAX asks the cluster; without one, the process is alone."""
    processes: int | None = None
    """Number of processes. 1 without a coordinator: run alone even inside a cluster."""
    process: int | None = None
    """Index of this process, from 0."""


ALONE = Distributed(processes=1)
CLUSTERS: dict[str, Callable[[Mapping[str, str]], bool]] = {
    "JAX_COORDINATOR_ADDRESS": lambda env: True,
    "SLURM_PROCID": lambda env: True,
    "OMPI_COMM_WORLD_SIZE": lambda env: True,
    "TPU_WORKER_HOSTNAMES": lambda env: "," in env["TPU_WORKER_HOSTNAMES"],
    "MEGASCALE_NUM_SLICES": lambda env: env["MEGASCALE_NUM_SLICES"] != "1",
    "JOB_COMPLETION_INDEX": lambda env: "KUBERNETES_SERVICE_HOST" in env,  # of an indexed Job
}
"""Environment variables that clusters set, and whether one that is set means several processes."""


def setup(distributed: Distributed, batch_size: int | None = None, accumulate: int = 1) -> None:
    """Find the other processes; for a single process on a CPU, turn its cores into devices.

    Call it before JAX starts. Compiled programs are kept in `cache()` for the next start, unless
    the user has chosen another place (`JAX_COMPILATION_CACHE_DIR`) or none
    (`JAX_ENABLE_COMPILATION_CACHE=false`).

    Two cores as two devices train 1.4 times faster than as one device with two threads. The number
    of devices is the largest number of cores that divides the batch, or all of them if batches are
    padded (`batch_size=None`), and XLA lets them wait ten minutes for each other (`TIMEOUT`).
    Nothing changes if the user has chosen a number (by `JAX_NUM_CPU_DEVICES`, or by
    `--xla_force_host_platform_device_count` in `XLA_FLAGS`), or if JAX has started already.

    Raises:
      ValueError: if `distributed` is given in part, or makes no sense; if the environment says
        that there are other processes, which JAX does not find; if there is no device of a platform
        that the user has chosen (`JAX_PLATFORMS`); or if the place for compiled programs is on a
        store that cannot be used.
      RuntimeError: if the others cannot be reached.
    """
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(cache()))
        if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    store.reach(jax.config.values["jax_compilation_cache_dir"])
    if not _join(distributed):
        _make_cores_devices(batch_size, accumulate)
    _start()


def cache() -> Path:
    """The folder of compiled programs, which may be deleted at any time.

    It is in XDG_CACHE_HOME or in ~/.cache, or, for a user without a home, among temporary files.
    """
    chosen = os.environ.get("XDG_CACHE_HOME")
    home = Path(os.path.expanduser("~"))  # which stays "~" where there is none
    fallback = home / ".cache" if home.is_absolute() else Path(tempfile.gettempdir())
    return (Path(chosen) if chosen else fallback) / "diffjax"


def _join(distributed):
    """Find the other processes; return whether there are any."""
    given = dataclasses.astuple(distributed)
    if given not in [(None, None, None), (None, 1, None)] and None in given:
        raise ValueError(
            f"{distributed}: give coordinator, processes and process together, or none of them, "
            "or processes=1 to be alone"
        )
    processes, process = distributed.processes, distributed.process
    if processes is not None and process is not None and not 0 <= process < processes:
        raise ValueError(f"{distributed}: process must be in 0..{processes - 1}")
    # JAX notices a dead process after about half of the heartbeat's timeout.
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
            # Either there is no cluster, or JAX has started already, as in a notebook.
            alone = "coordinator_address should be defined", "before any JAX calls"
            if not any(why in str(error) for why in alone):
                raise
            _refuse_inside_a_cluster(error)
    return False


def _refuse_inside_a_cluster(error):
    """Raise a ValueError if the environment says that there are other processes.

    Each of them would go on alone, and they would damage each other's run.
    """
    for name, several in CLUSTERS.items():
        if name in os.environ and several(os.environ):
            package = f"{install('k8s')}, or " if name == "JOB_COMPLETION_INDEX" else ""
            raise ValueError(
                f"{name}={os.environ[name]}: this process is one of several, and JAX does not find "
                f"the others ({error}): {package}give --distributed.coordinator, .processes and "
                ".process, or --distributed.processes=1 to run alone"
            ) from error


def _make_cores_devices(batch_size, accumulate):
    flags = os.environ.get("XLA_FLAGS", "")
    if "host_platform_device_count" in flags or "JAX_NUM_CPU_DEVICES" in os.environ:
        return
    if TIMEOUT not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {TIMEOUT}=600".strip()
    splits = lambda n: batch_size is None or batch_size % (n * accumulate) == 0
    fits = [n for n in range(1, cores() + 1) if splits(n)]
    with contextlib.suppress(RuntimeError):  # raised if JAX has started
        jax.config.update("jax_num_cpu_devices", max(fits, default=1))


def _start():
    """Start JAX, which finds its devices."""
    platforms = jax.config.values["jax_platforms"]
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # JAX asserts that it has found a platform
        if not platforms:
            raise
        why = str(error).partition("\n")[0] or "unset it, to use what there is"
        raise ValueError(
            f"JAX_PLATFORMS={platforms}: JAX finds no such device, or lacks its plugin: {why}"
        ) from error


def idle_cores(batch_size: int, accumulate: int = 1) -> str | None:
    """A line of advice if the batch does not divide over all cores; else None."""
    most = cores()
    used, share = jax.local_device_count(), most * accumulate
    if jax.process_count() > 1 or jax.default_backend() != "cpu" or used >= most:
        return None
    if batch_size % share == 0:
        return None  # the user has chosen fewer devices
    sizes = {batch_size // share * share, -(-batch_size // share) * share} - {0}
    return (
        f"batch_size={batch_size} splits over {used} of the {most} cores; "
        f"{' or '.join(map(str, sorted(sizes)))} would use all of them"
    )


def cores() -> int:
    """The number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextlib.contextmanager
def failing_fast() -> Iterator[None]:
    """End the process as soon as an error reaches this context; output may fail meanwhile.

    Otherwise this process and the others would wait for each other until JAX gives up. The exit
    status is that of a SystemExit (1 if it carries a message), else `CRASHED`.
    """
    with tolerated():
        try:
            yield
        except SystemExit as stop:
            code = stop.code or 0
            if isinstance(code, str):
                print(code, file=sys.stderr, flush=True)
                code = 1
            if not jax.distributed.is_initialized():
                _end_in(GRACE, int(code))
            elif code in (1, CRASHED):  # the others are not waited for
                os._exit(int(code))
            sys.exit(code)
        except BaseException as error:
            traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(130 if isinstance(error, KeyboardInterrupt) else CRASHED)


def _end_in(seconds, code):
    """End the process then at the latest: the threads of a failed save can wait for minutes."""

    def end():
        print(f"ended with status {code}: threads were still waiting", file=sys.stderr, flush=True)
        os._exit(code)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()


def check_batch(batch_size: int, accumulate: int = 1) -> None:
    """Raise a ValueError unless the batch divides evenly over devices and accumulation."""
    devices = jax.device_count()
    if batch_size < 1 or batch_size % (devices * accumulate):
        raise ValueError(
            f"batch_size={batch_size} must be a positive multiple of {devices} devices x "
            f"{accumulate} accumulated parts = {devices * accumulate}"
        )
