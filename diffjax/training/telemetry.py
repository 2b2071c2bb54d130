"""The cost of a run: operations, waiting, compiling and memory; and traces of its steps."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.monitoring
from jax.extend.core import jaxpr_as_fun, jaxprs_in_params

PEAK_FLOPS = {
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA A100": 312e12,
    "NVIDIA L4": 121e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}
"""Dense bfloat16 operations per second, as manufacturers state them, by the kind of the device."""

TUNABLES = "GLIBC_TUNABLES"
ALLOCATOR = (
    "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:"
    "glibc.malloc.trim_threshold=17179869184:glibc.malloc.arena_max=1"
)
"""The glibc setting that keeps large buffers allocated between steps."""

_COMPILED = "/jax/core/compile/backend_compile_duration"


class Meter:
    """Measures what a run spends from one reading to the next; use as a context manager.

    Attributes:
      flops: operations of one step on one device; 0 if unknown.
    """

    def __init__(self) -> None:
        self.flops = 0.0
        self._compiling = self._waiting = 0.0

    def __enter__(self) -> "Meter":
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **_: Any) -> None:
        if event == _COMPILED:
            self._compiling += duration_secs

    def waited(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The same batches; the time until each of them is available counts as waiting."""
        while True:
            began = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self._waiting += time.perf_counter() - began
            yield batch

    def read(self, steps: int, seconds: float) -> dict[str, float]:
        """Numbers for a row of metrics that covers `steps` steps in `seconds` seconds.

        Returns:
          `data_stall`, the fraction of the time spent waiting for input; `tflop_per_s` of one
          device, and `mfu`, its fraction of the hardware's peak in bfloat16, where they are known;
          `memory_gb`, the peak of a device's memory, on a CPU that of the process; and `compile_s`,
          the seconds spent compiling, if any.
        """
        row = {"data_stall": self._waiting / seconds, "memory_gb": peak_memory() / 1e9}
        if self.flops:
            speed = self.flops * steps / seconds
            row["tflop_per_s"] = speed / 1e12
            peak = peak_flops(jax.devices()[0].device_kind)
            if peak:
                row["mfu"] = speed / peak
        if self._compiling:
            row["compile_s"] = self._compiling
        self._compiling = 0.0
        self.start()
        return row

    def start(self) -> None:
        """Measure waiting from here."""
        self._waiting = 0.0


def flops(step: Any, *args: Any) -> float:
    """Operations of a compiled function, as XLA counts them before it optimises.

    The count includes recomputation (`remat`) and what a fused kernel does, and every round of a
    `scan`. It is 0 if unknown: if the function is not a compiled one, or XLA gives no count.
    """
    if not hasattr(step, "lower"):
        return 0.0
    once = _counted(step, *args)
    return once and once + _of_further_rounds(jax.make_jaxpr(step)(*args).jaxpr)


def _counted(step, *args):
    return float((step.lower(*args).cost_analysis() or {}).get("flops", 0.0))


def _of_further_rounds(jaxpr):
    """Operations of the rounds of each scan but the first, the only one that XLA counts."""
    count = 0.0
    for equation in jaxpr.eqns:
        inner = sum(_of_further_rounds(j) for j in jaxprs_in_params(equation.params))
        if equation.primitive.name == "scan":
            body, rounds = equation.params["jaxpr"], equation.params["length"]
            like = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in body.in_avals]
            first = _counted(jax.jit(jaxpr_as_fun(body)), *like)
            inner = rounds * inner + (rounds - 1) * first
        count += inner
    return count


def peak_flops(kind: str) -> float | None:
    """The peak of `PEAK_FLOPS` for a device's kind, or None.

    >>> peak_flops("NVIDIA H100 80GB HBM3") / 1e12
    989.0
    """
    return next((peak for name, peak in PEAK_FLOPS.items() if kind.startswith(name)), None)


def peak_memory() -> float:
    """Peak memory in bytes of one of this process' devices; on a CPU, of the process."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    if all(stats):
        return float(max(s.get("peak_bytes_in_use", 0) for s in stats if s))
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def advice() -> str | None:
    """A line that says which page describes a faster setting for this CPU; or None.

    XLA allocates large buffers at every step, and glibc by default returns them to the kernel.
    """
    if jax.default_backend() != "cpu" or not hasattr(os, "confstr"):
        return None
    with contextlib.suppress(ValueError, OSError):
        libc = os.confstr("CS_GNU_LIBC_VERSION") or ""
        other = "malloc" in os.environ.get("LD_PRELOAD", "")  # jemalloc, tcmalloc, mimalloc
        if libc.startswith("glibc") and not other and TUNABLES not in os.environ:
            return 'for speed on a CPU, see "On a CPU" in docs/start.md (`make train` does it)'
    return None


@contextlib.contextmanager
def traced(folder: Path, steps: range) -> Iterator[Callable[[int, Any], None]]:
    """Trace some steps, for TensorBoard's profiler and for https://ui.perfetto.dev.

    Args:
      folder: where `plugins/profile/` goes, with a `perfetto_trace.json.gz` in it.
      steps: the numbers of steps taken between which to trace; empty: no trace.

    Yields:
      A function to call after each step: (steps taken, outputs to wait for before the trace begins
      or ends).
    """
    tracing = False

    def at(taken, outputs):
        nonlocal tracing
        if tracing == (taken in steps):
            return
        jax.block_until_ready(outputs)
        if tracing:
            jax.profiler.stop_trace()
        else:
            jax.profiler.start_trace(folder, create_perfetto_trace=True)
        tracing = not tracing

    try:
        yield at
    finally:
        if tracing:
            jax.profiler.stop_trace()
