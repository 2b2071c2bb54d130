r"""Samplers: walks from x_1, noise, to x_0, data, along a grid of times of the caller's choice.

A `Sampler` is two pure functions. `init(x_1)` makes a state; `step(key, state, t, s)` moves it
from time t to time s. In a notebook call `step` in a `for` loop; `sample` is the same loop as one
`lax.scan`, to be jitted by its caller with the parameters as arguments.

Every sampler is a function (denoise, schedule, *, options) -> Sampler, and works with any
schedule over the whole of [0, 1]: log-SNR is finite there, so no step is special.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Float

from . import keys
from .process import q_posterior, q_transition, scales_at
from .schedules import Schedule
from .types import Array, Data, Denoiser, Key, Prediction, Real, Time, expand


class State(NamedTuple):
    """Where a walk is: the sample, and the prediction that the last step was made with."""

    x: Data
    prediction: Prediction


class Sampler(NamedTuple):
    """A walk: `init(x_1) -> state` and `step(key, state, t, s) -> state`; `state.x` is the sample.

    `key` is one key, or one per example `[batch]`; deterministic samplers ignore it.
    """

    init: Callable[[Data], State]
    step: Callable[[Key, State, Time, Time], State]


def sample(
    key: Key,
    sampler: Sampler,
    x_1: Data,
    ts: Float[Real, " times"],
    observe: Callable[[State, Array], Any] | None = None,
) -> tuple[Data, Any]:
    """Walk from `x_1` along the times `ts`, in one `lax.scan`.

    Args:
      key: one key, or one per example `[batch]`. Step k of example i draws from its own key folded
        with k, so a sample does not depend on what else is in the batch.
      sampler: a `Sampler`.
      x_1: where to start, `[batch, ...]`; usually `prior_sample`.
      ts: strictly monotone times in [0, 1], `[n + 1]` for n steps; usually from 1 to 0.
      observe: (state, t) -> anything to be recorded after each step; t is the time arrived at.

    Returns:
      The sample at `ts[-1]`, of the shape of `x_1`, and what `observe` returned, stacked `[n, ...]`
      (None without `observe`).

    Raises:
      ValueError: if the times are concrete and not strictly monotone within [0, 1].

    >>> import diffjax
    >>> schedule = diffjax.cosine()
    >>> exact = lambda x_t, log_snr, cond: 0 * x_t  # all data is at zero
    >>> walk = ddim(diffjax.denoiser(exact, schedule, "x_0"), schedule)
    >>> x_1 = diffjax.prior_sample(jax.random.key(0), schedule, (4, 2))
    >>> x_0, _ = jax.jit(sample, static_argnums=1)(jax.random.key(1), walk, x_1, uniform_times(8))
    >>> bool(jnp.abs(x_0).max() < 0.01)
    True
    """
    if not isinstance(ts, Tracer):
        _check_times(np.asarray(ts))
    example_keys = keys.per_example(key, x_1.shape[0])
    ts = jnp.asarray(ts)

    def step(state, inputs):
        k, t, s = inputs
        state = sampler.step(keys.fold_in(example_keys, k), state, t, s)
        return state, None if observe is None else observe(state, s)

    walk = jnp.arange(len(ts) - 1), ts[:-1], ts[1:]
    state, observed = jax.lax.scan(step, sampler.init(x_1), walk)
    return state.x, observed


def _check_times(ts):
    steps = np.diff(ts)
    if ts.ndim != 1 or len(ts) < 2:
        raise ValueError(f"times of shape {ts.shape}: need one axis of at least two times")
    if not ((steps < 0).all() or (steps > 0).all()):
        raise ValueError(f"times must be strictly decreasing or strictly increasing, got {ts}")
    if not (ts.min() >= 0 and ts.max() <= 1):
        raise ValueError(f"times must lie in [0, 1], got {ts.min()} to {ts.max()}")


def init(x_1: Data) -> State:
    """The state of a one-step sampler before its first step, with a prediction of zero."""
    return State(x_1, Prediction(jnp.zeros_like(x_1), jnp.zeros_like(x_1)))


def ancestral(denoise: Denoiser, schedule: Schedule, *, variance: str = "posterior") -> Sampler:
    """DDPM's sampler: draw x_s from q(x_s | x_t, x_0) with the predicted x_0.

    Ho et al. 2020, Algorithm 2. Weak order 1; wants uniform t, hundreds of steps.

    Args:
      denoise: a `Denoiser`.
      schedule: its `Schedule`.
      variance: "posterior", that of q(x_s | x_t, x_0), the right one for data at a single point;
        or "beta", that of q(x_t | x_s), the right one for data that is standard normal. The
        latter adds no noise in a step to t = 0, as in Algorithm 2.

    Raises:
      ValueError: if `variance` is not one of these.
    """
    if variance not in ("posterior", "beta"):
        raise ValueError(f"unknown variance {variance!r}: one of 'posterior', 'beta'")

    def step(key, state, t, s):
        x = state.x
        prediction = denoise(x, t)
        mean, std = q_posterior(schedule, prediction.x_0, x, t, s)
        if variance == "beta":
            std = q_transition(schedule, x, s, t)[1] * expand(s > 0, x)
        return State(mean + std * keys.normal(key, x.shape, x.dtype), prediction)

    return Sampler(init, step)


def ddim(denoise: Denoiser, schedule: Schedule, *, eta: float = 0.0) -> Sampler:
    """DDIM: keep the predicted noise, or replace a part of it by fresh noise.

    x_s = alpha_s x_0 + sigma_s (sqrt(1 - eta^2 (1 - c)) eps + eta sqrt(1 - c) z), c = snr_t/snr_s.
    Song et al. 2021, "Denoising diffusion implicit models", equations 12 and 16. With eta = 0 it
    is deterministic, of order 1, the exponential integrator of the probability-flow ODE, and also
    Euler's method in sigma/alpha (k-diffusion's `sample_euler`); with eta = 1 it is `ancestral`.
    Wants uniform t.

    Args:
      denoise: a `Denoiser`.
      schedule: its `Schedule`.
      eta: from 0, deterministic, to 1, the posterior.

    Raises:
      ValueError: unless `0 <= eta <= 1`.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"{eta=}: must be in [0, 1]")

    def step(key, state, t, s):
        x = state.x
        prediction = denoise(x, t)
        alpha_s, sigma_s = scales_at(schedule, s, x)
        eps = prediction.eps
        if eta > 0:
            fresh = -(eta**2) * jnp.expm1(schedule.log_snr(t) - schedule.log_snr(s))
            z = keys.normal(key, x.shape, x.dtype)
            eps = expand(jnp.sqrt(1 - fresh), x) * eps + expand(jnp.sqrt(fresh), x) * z
        return State(alpha_s * prediction.x_0 + sigma_s * eps, prediction)

    return Sampler(init, step)


def uniform_times(n: int) -> Float[Array, " times"]:
    """n steps of equal length: n + 1 times from exactly 1 to exactly 0.

    >>> uniform_times(4).tolist()
    [1.0, 0.75, 0.5, 0.25, 0.0]
    """
    _check_steps(n)
    return jnp.linspace(1.0, 0.0, n + 1)


def log_snr_times(schedule: Schedule, n: int) -> Float[Array, " times"]:
    """n steps of equal length in log-SNR, from exactly 1 to exactly 0 (Lu et al. 2022)."""
    _check_steps(n)
    ends = schedule.log_snr(1.0), schedule.log_snr(0.0)
    return _times_at(schedule, jnp.linspace(*ends, n + 1))


def karras_times(schedule: Schedule, n: int, rho: float = 7.0) -> Float[Array, " times"]:
    """n steps of equal length in (sigma/alpha)^(1/rho), from exactly 1 to exactly 0.

    Karras et al. 2022, equation 5. Theirs are n times from sigma_max to sigma_min and then zero;
    these end at the schedule's own finite end.
    """
    _check_steps(n)
    high, low = (jnp.exp(-schedule.log_snr(t) / (2 * rho)) for t in (1.0, 0.0))
    return _times_at(schedule, -2 * rho * jnp.log(jnp.linspace(high, low, n + 1)))


def discrete_times(steps: int, n: int) -> Float[Array, " times"]:
    """n steps along the grid i/T, T = `steps`, as evenly spaced as it allows, from 1 to 0.

    Raises:
      ValueError: unless `1 <= n <= steps`.

    >>> (discrete_times(10, 4) * 10).tolist()
    [10.0, 8.0, 5.0, 2.0, 0.0]
    """
    _check_steps(n)
    if n > steps:
        raise ValueError(f"{n} steps on a grid of {steps}: there are only {steps}")
    return jnp.asarray(np.round(np.linspace(steps, 0, n + 1)) / steps, jnp.result_type(float))


def _check_steps(n):
    if n < 1:
        raise ValueError(f"{n} steps: need at least 1")


def _times_at(schedule, log_snr):
    """Invert a schedule by bisection; the ends are exactly 1 and 0."""

    def halve(_, bracket):
        low, high = bracket
        middle = (low + high) / 2
        noisier = schedule.log_snr(middle) < log_snr
        return jnp.where(noisier, low, middle), jnp.where(noisier, middle, high)

    # Times near 0 are resolved to their own precision, hence more halvings than a float has bits.
    bracket = jnp.zeros_like(log_snr), jnp.ones_like(log_snr)
    low, high = jax.lax.fori_loop(0, 100, halve, bracket)
    return ((low + high) / 2).at[0].set(1.0).at[-1].set(0.0)
