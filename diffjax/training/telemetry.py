"""The cost of a run: operations, waiting, compiling and memory; and traces of its steps."""

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.monitoring
from jax.extend.core import jaxprs_in_params

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
      flops: operations of one step on one device, as `flops` counts them; 0 if unknown.
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


def flops(f: Callable, *args: Any) -> float:
    """Floating-point operations of the convolutions and matrix products of a function.

    A multiplication and an addition are two operations. All rounds of a `scan` count; so does the
    most expensive branch of a `cond`, and one round of a `while`, whose rounds are not known. What
    `jax.checkpoint` recomputes does not count, and cuDNN's fused attention counts as the products
    that it replaces: these are the operations that the mathematics needs, as the utilisation of
    model FLOPs has them (MFU; Chowdhery et al. 2022, PaLM, section 4.1). Inside `pmap` and
    `shard_map` they are those of one device, and under `jit` those of all.

    f is traced and not compiled, and `args` may be `jax.ShapeDtypeStruct`.

    >>> flops(jax.grad(lambda w, x: (x @ w).sum()), jax.numpy.ones((3, 4)), jax.numpy.ones((5, 3)))
    240.0
    """
    return float(_of_all(jax.make_jaxpr(f)(*args).jaxpr))


def _of_all(jaxpr):
    return sum(map(_of_one, jaxpr.eqns))


def _of_one(equation):
    name, params = equation.primitive.name, equation.params
    if "rematted_computation" in str(equation.source_info.name_stack):  # JAX's mark
        return 0
    if name in PRODUCTS:
        shapes = [v.aval.shape for v in (*equation.invars, equation.outvars[0])]
        return 2 * PRODUCTS[name](params, *shapes)
    inside = [_of_all(jaxpr) for jaxpr in jaxprs_in_params(params)]
    if name == "cond":
        return max(inside)
    return sum(inside) * (params["length"] if name == "scan" else 1)


def _of_product(params, left, right, out):
    (contracted, _), _ = params["dimension_numbers"]
    return math.prod(out) * math.prod(left[axis] for axis in contracted)


def _of_convolution(params, image, kernel, out):
    """The same for a convolution as for its gradients.

    Each multiplication takes a pixel of the image and a tap of the kernel to a pixel of the output,
    and two of these places determine the third. So along an axis there are at most as many as the
    product of the two smaller of the three sizes.
    """
    i, k, o = params["dimension_numbers"]
    spatial = ([x[axis] for axis in s[2:]] for x, s in ((image, i), (kernel, k), (out, o)))
    places = math.prod(math.prod(sorted(sizes)[:2]) for sizes in zip(*spatial, strict=True))
    return places * out[o[0]] * out[o[1]] * kernel[k[1]]


def _of_attention(products):
    """That many products of queries `[batch, tokens, heads, width]` and keys, or as large."""
    return lambda params, query, key, *_: products * math.prod(query) * key[1]


PRODUCTS: dict[str, Callable[..., int]] = {
    "dot_general": _of_product,
    "conv_general_dilated": _of_convolution,
    "dot_product_attention_fwd_wrapper": _of_attention(2),
    "dot_product_attention_bwd_wrapper": _of_attention(4),
}
"""The multiplications of each primitive that `flops` counts, by its parameters and shapes."""


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
