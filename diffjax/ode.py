r"""The probability-flow ODE, in coordinates where it is smooth up to both ends.

Deterministic sampling, encoding and exact likelihoods all solve one ODE, dx = x_0 dalpha + eps
dsigma, where (x_0, eps) is the prediction at x_t. On the circle

    y = x / sqrt(alpha^2 + sigma^2) = cos(phi) x_0 + sin(phi) eps,    phi = atan2(sigma, alpha),

it reads dy/dphi = cos(phi) eps - sin(phi) x_0, which is bounded at both ends and the same for all
schedules with the same log-SNR; for variance-preserving scales it is the v of Salimans & Ho 2022,
appendix D.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .denoisers import predict
from .process import scales_at
from .schedules import Schedule, time_at
from .types import Array, Data, Denoiser, Scale, Time, expand


def radius(schedule: Schedule, t: Time, like: Data) -> Scale:
    """sqrt(alpha^2 + sigma^2), by which x_t is divided; shaped to divide data `like`."""
    return jnp.hypot(*scales_at(schedule, t, like))


def angle(schedule: Schedule, t: Time) -> Array:
    """phi = atan2(sigma, alpha) in (0, pi/2), of the shape of t."""
    return jnp.atan(jnp.exp(-schedule.log_snr(t) / 2))


def velocity(denoise: Denoiser, schedule: Schedule, y: Data, t: Time) -> tuple[Data, Data]:
    """dy/dphi at a point of the circle, and the estimate of x_0 that it uses.

    Args:
      denoise: a `Denoiser`.
      schedule: its `Schedule`.
      y: x_t / radius, `[batch, ...]`.
      t: times `[]` or `[batch]`.
    """
    alpha, sigma = scales_at(schedule, t, y)
    r = radius(schedule, t, y)
    prediction = predict(denoise, y * r, t)
    return (alpha * prediction.eps - sigma * prediction.x_0) / r, prediction.x_0


def along_log_snr(slope: Callable[[Any, Any], Any], schedule: Schedule, y: Any, t: Time) -> Any:
    """dy/dlog_snr where `slope(y, t)` is dy/dphi; y is a pytree."""
    ratio = jnp.exp(-schedule.log_snr(t) / 2)
    speed = -0.5 * ratio / (1 + ratio**2)  # dphi / dlog_snr
    return jax.tree.map(lambda d: expand(speed, d) * d, slope(y, t))


def solve(
    slope: Callable[[Any, Any], Any], schedule: Schedule, y: Any, t: Time, s: Time, steps: int
) -> Any:
    """Solve an ODE by the fourth-order Runge-Kutta method, with equal steps in log-SNR.

    Structure of the data at each scale matters to the flow in its own range of log-SNR; equal steps
    in log-SNR treat all scales alike.

    Args:
      slope: (y, t) -> dy/dphi.
      schedule: a `Schedule`.
      y: a pytree of arrays, at time t.
      t: start time, `[]` or `[batch]`.
      s: end time, `[]` or `[batch]`.
      steps: number of steps; each calls `slope` four times.

    Returns:
      y at time s.
    """
    start, end = schedule.log_snr(t), schedule.log_snr(s)
    h = (end - start) / steps
    halves = jnp.arange(2 * steps + 1).reshape(-1, *[1] * jnp.ndim(h)) / 2
    times = time_at(schedule, start[None] + halves * h[None])

    field = functools.partial(along_log_snr, slope, schedule)

    def plus(y, factor, k):
        return jax.tree.map(lambda a, d: a + expand(factor, d) * d, y, k)

    def step(y, ts):
        first, middle, last = ts
        k1 = field(y, first)
        k2 = field(plus(y, h / 2, k1), middle)
        k3 = field(plus(y, h / 2, k2), middle)
        k4 = field(plus(y, h, k3), last)
        mean = jax.tree.map(lambda a, b, c, d: (a + 2 * b + 2 * c + d) / 6, k1, k2, k3, k4)
        return plus(y, h, mean), None

    return jax.lax.scan(step, y, (times[:-2:2], times[1::2], times[2::2]))[0]
