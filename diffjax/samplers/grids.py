"""Grids of times for samplers. `SAMPLERS` gives the best grid for each sampler.

A grid that takes a schedule is for the walks of that schedule: along another one it is a valid
grid, but its steps are not even in what its docstring says. No grid repeats a time: where a
schedule falls so steeply that a float cannot tell two times of a grid apart, they are neighbouring
floats.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from .. import checks
from ..schedules import LONGEST, Schedule, time_at
from ..types import Array, whole


def uniform_times(n: int) -> Float[np.ndarray, " times"]:
    """n steps of equal length: n + 1 times from exactly 1 to exactly 0.

    Raises:
      ValueError: unless `1 <= n <= 2**20`, as for all grids.

    >>> uniform_times(4).tolist()
    [1.0, 0.75, 0.5, 0.25, 0.0]
    """
    _check_steps(n)
    return _known(np.linspace(1.0, 0.0, n + 1))


def log_snr_times(schedule: Schedule, n: int) -> Float[Array, " times"]:
    """n steps of equal length in log-SNR, from exactly 1 to exactly 0 (Lu et al. 2022).

    Args:
      schedule: the `Schedule` of the walk.
      n: number of steps.
    """
    checks.schedule(schedule)
    _check_steps(n)
    ends = schedule.log_snr(1.0), schedule.log_snr(0.0)
    return _between(schedule, jnp.linspace(*ends, n + 1))


def karras_times(schedule: Schedule, n: int, rho: float = 7.0) -> Float[Array, " times"]:
    """n steps of equal length in (sigma/alpha)^(1/rho), from exactly 1 to exactly 0.

    Karras et al. 2022, equation 5. Their grid is n times from sigma_max to sigma_min and then zero;
    this grid ends at the schedule's own finite end.

    Args:
      schedule: the `Schedule` of the walk.
      n: number of steps.
      rho: a larger one makes the steps at low noise shorter.

    Raises:
      ValueError: unless `1 <= n <= 2**20` and `rho` is positive.
    """
    checks.schedule(schedule)
    _check_steps(n)
    if not 0 < rho < math.inf:
        raise ValueError(f"{rho=}: must be positive")
    high, low = (jnp.exp(-schedule.log_snr(t) / (2 * rho)) for t in (1.0, 0.0))
    return _between(schedule, -2 * rho * jnp.log(jnp.linspace(high, low, n + 1)))


def discrete_times(steps: int, n: int) -> Float[np.ndarray, " times"]:
    """n steps along the grid i/T, T = `steps`, as evenly spaced as possible, from 1 to 0.

    Raises:
      ValueError: unless `1 <= n <= steps`.

    >>> (discrete_times(10, 4) * 10).tolist()
    [10.0, 8.0, 5.0, 2.0, 0.0]
    """
    _check_steps(n)
    if not whole(steps, n):
        raise ValueError(f"{n} steps on a grid of {steps}: need at most {steps}, a whole number")
    return _known(np.round(np.linspace(steps, 0, n + 1)) / steps)


TIMES: dict[str, Callable[[Schedule, int], Float[Array | np.ndarray, " times"]]] = {
    "uniform": lambda schedule, n: uniform_times(n),
    "log_snr": log_snr_times,
    "karras": karras_times,
}
"""Grids by name: functions of a schedule and the number of steps."""


def _known(ts):
    # A NumPy array stays concrete under `jit`, so that `sample` can check its values there.
    return ts.astype(jnp.result_type(float))


def _check_steps(n):
    if not (whole(n) and n <= LONGEST):
        raise ValueError(f"{n} steps: need at least 1, at most {LONGEST}, a whole number")


def _between(schedule, log_snr):
    """Times at falling values of log-SNR from end to end of a schedule, at exactly 1 and 0."""
    return _apart(time_at(schedule, log_snr).at[0].set(1.0).at[-1].set(0.0))


def _apart(ts):
    """The nearest times that fall strictly: one that does not is moved to the next smaller float.

    The floats from 0 on have the order of the integers with the same bits.
    """
    kind = jnp.int32 if ts.dtype == jnp.float32 else jnp.int64
    bits, k = jax.lax.bitcast_convert_type(ts, kind), jnp.arange(len(ts), dtype=kind)
    moved = jax.lax.bitcast_convert_type(jax.lax.cummin(bits + k) - k, ts.dtype)
    # The sum is exact, and has the derivative of ts, which bits have not.
    return ts + jax.lax.stop_gradient(moved - ts)
