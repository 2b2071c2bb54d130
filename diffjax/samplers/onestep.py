"""One-step samplers, whose steps do not depend on earlier steps."""

from collections.abc import Callable

import jax.numpy as jnp

from .. import keys, ode
from ..denoisers import predict, schedule_of
from ..process import check_variance, decoder, scales_at
from ..schedules import Schedule, time_at
from ..types import Denoiser, FlowMap, Scalar, expand, known, whole
from .walk import Sampler, State, in_use, init


def ancestral(
    denoise: Denoiser, schedule: Schedule | None = None, *, variance: str = "posterior"
) -> Sampler:
    """DDPM's sampler: draw x_s from the decoder, q(x_s | x_t, x_0) with the predicted x_0.

    Ho et al. 2020, Algorithm 2. It has weak order 1. Use `uniform_times` with hundreds of steps.

    Args:
      denoise: a `Denoiser`.
      schedule: its `Schedule`; None if the denoiser carries it.
      variance: "posterior", "beta" or "learned" (see `process.decoder`). The latter two add no
        noise in a step to t = 0, as in Algorithm 2.

    Raises:
      ValueError: if `variance` is not one of these; when called, if it is "learned" and the
        denoiser has not learned one.
    """
    check_variance(variance)

    schedule = schedule_of(denoise, schedule)

    def step(key, state, t, s):
        x = state.x
        prediction = predict(denoise, x, t)
        mean, std = decoder(schedule, prediction, x, t, s, variance)
        if variance != "posterior":
            std = std * expand(s > 0, x)
        return State(mean + std * keys.normal(key, x.shape, x.dtype), prediction.x_0)

    return Sampler(init, step, stochastic=True)


def ddim(denoise: Denoiser, schedule: Schedule | None = None, *, eta: Scalar = 0.0) -> Sampler:
    """DDIM: keep the predicted noise, or replace a part of it by fresh noise.

    x_s = alpha_s x_0 + sigma_s (sqrt(1 - eta^2 (1 - c)) eps + eta sqrt(1 - c) z), c = snr_t/snr_s.
    Song et al. 2021, "Denoising diffusion implicit models", equations 12 and 16. With eta = 0 it
    is deterministic and of order 1: the exponential integrator of the probability-flow ODE, and
    also Euler's method in sigma/alpha (k-diffusion's `sample_euler`). With eta = 1 it is
    `ancestral`. Use `uniform_times`.

    Args:
      denoise: a `Denoiser`.
      schedule: its `Schedule`; None if the denoiser carries it.
      eta: from 0 (deterministic) to 1 (the posterior).

    Raises:
      ValueError: unless `0 <= eta <= 1`.
    """
    if known(eta) and not 0 <= eta <= 1:
        raise ValueError(f"{eta=}: must be in [0, 1]")

    schedule = schedule_of(denoise, schedule)

    def step(key, state, t, s):
        x = state.x
        x_0, eps = predict(denoise, x, t)[:2]
        alpha_s, sigma_s = scales_at(schedule, s, x)
        if in_use(eta):
            # 1 - eta^2 (1 - c) could round to 0 for a small c, and its root would have no gradient.
            gap = schedule.log_snr(t) - schedule.log_snr(s)
            kept = jnp.sqrt((1 - eta**2) + eta**2 * jnp.exp(gap))
            fresh = eta * jnp.sqrt(-jnp.expm1(gap))
            z = keys.normal(key, x.shape, x.dtype)
            eps = expand(kept, x) * eps + expand(fresh, x) * z
        return State(alpha_s * x_0 + sigma_s * eps, x_0)

    return Sampler(init, step, stochastic=in_use(eta))


def jump(flow_map: FlowMap, schedule: Schedule | None = None, *, renoise: Scalar = 0.0) -> Sampler:
    """A step of a flow map, which is exact if the map is, for any times t and s.

    x_s = alpha_s x_0 + sigma_s eps, the step of `ddim`, with a prediction of both times. With
    `renoise` it overshoots s, to where sigma/alpha is sqrt(1 - renoise^2) of that at s, and adds
    the noise that is missing: with 1 this is the multistep sampling of consistency models (Song et
    al. 2023, Algorithm 1), between 0 and 1 the sampling of Kim et al. 2024 ("Consistency trajectory
    models"), whose gamma it is. Use `uniform_times` with few steps, such as 1, 2 or 4.

    Args:
      flow_map: a `FlowMap`.
      schedule: its `Schedule`; None if the map carries it.
      renoise: from 0 (deterministic) to 1 (each step predicts clean data).

    Raises:
      ValueError: unless `0 <= renoise <= 1`.
      TypeError: when called, if `flow_map` does not take the time s, as a denoiser does not.
    """
    if known(renoise) and not 0 <= renoise <= 1:
        raise ValueError(f"{renoise=}: must be in [0, 1]")
    schedule = schedule_of(flow_map, schedule)

    def step(key, state, t, s):
        x, end = state.x, s
        if in_use(renoise):
            beyond = schedule.log_snr(s) - jnp.log1p(-(renoise**2))
            end = time_at(schedule, jnp.minimum(beyond, schedule.log_snr(0.0)))
        x_0, eps = predict(flow_map, x, t, s=end)[:2]
        alpha, sigma = scales_at(schedule, end, x)
        x = alpha * x_0 + sigma * eps
        if in_use(renoise):
            added = jnp.exp(-schedule.log_snr(s)) - jnp.exp(-schedule.log_snr(end))
            std = expand(jnp.sqrt(jnp.maximum(added, 0)), x)
            z = keys.normal(key, x.shape, x.dtype)
            x = scales_at(schedule, s, x)[0] * (x / alpha + std * z)
        return State(x, x_0)

    return Sampler(init, step, stochastic=in_use(renoise))


def euler_maruyama(denoise: Denoiser, schedule: Schedule | None = None) -> Sampler:
    r"""Euler-Maruyama's method on the reverse-time SDE of Song et al. 2021, equation 6.

    dx = [f x - g^2 score] dt + g dw with f = dlog(alpha)/dt and g^2 = dsigma^2/dt - 2 f sigma^2.
    The state is constant over a step; f and g^2, known functions of time, are integrated over it (f
    exactly, g^2 by the trapezoid rule), because at the ends of a schedule they change by orders of
    magnitude in one step. The step to t = 0 adds no noise. It has weak order 1. Use `log_snr_times`
    or hundreds of steps.

    Args:
      denoise: a `Denoiser`.
      schedule: its `Schedule`; None if the denoiser carries it.
    """
    schedule = schedule_of(denoise, schedule)

    def step(key, state, t, s):
        x = state.x
        prediction = predict(denoise, x, t)
        (alpha_t, sigma_t), (alpha_s, sigma_s) = (scales_at(schedule, u, x) for u in (t, s))
        drift = jnp.log(alpha_s / alpha_t)
        diffusion = sigma_t**2 - sigma_s**2 + (sigma_t**2 + sigma_s**2) * drift
        mean = x + drift * x - diffusion * prediction.eps / sigma_t
        std = jnp.sqrt(diffusion) * expand(s > 0, x)
        return State(mean + std * keys.normal(key, x.shape, x.dtype), prediction.x_0)

    return Sampler(init, step, stochastic=True)


def heun(denoise: Denoiser, schedule: Schedule | None = None) -> Sampler:
    """Heun's method on the probability-flow ODE, in the angle atan2(sigma, alpha) (see `ode`).

    It is deterministic, of order 2, with two evaluations per step. The angle and the velocity in it
    are bounded: with equally many steps, the error is a fraction of the error of Heun's method in
    sigma/alpha, which is `edm`. A step of more than one radian, such as the whole walk in one step,
    takes the prediction for a constant, as `ddim` does. Use `uniform_times`.

    Args:
      denoise: a `Denoiser`.
      schedule: its `Schedule`; None if the denoiser carries it.
    """
    schedule = schedule_of(denoise, schedule)

    def step(key, state, t, s):
        y = state.x / ode.radius(schedule, t, state.x)
        turn = expand(ode.angle(schedule, s) - ode.angle(schedule, t), y)
        first, x_0 = ode.velocity(denoise, schedule, y, t)
        second, _ = ode.velocity(denoise, schedule, y + turn * first, s)
        # For a constant prediction, y moves on a circle.
        constant = jnp.cos(turn) * y + jnp.sin(turn) * first
        y = jnp.where(jnp.abs(turn) > 1, constant, y + turn * (first + second) / 2)
        return State(y * ode.radius(schedule, s, y), x_0)

    return Sampler(init, step)


def edm(
    denoise: Denoiser,
    schedule: Schedule | None = None,
    *,
    s_churn: Scalar = 0.0,
    s_min: Scalar = 0.0,
    s_max: Scalar = float("inf"),
    s_noise: Scalar = 1.0,
    steps: int | None = None,
) -> Sampler:
    """The EDM sampler: add a little noise, then take a step of Heun's method in sigma/alpha.

    Karras et al. 2022, Algorithm 2, in which sigma is our sigma/alpha. Without churn it is
    deterministic, of order 2 (k-diffusion's `sample_heun`). It takes two evaluations per step. Use
    `karras_times`. The paper's last step, an Euler step to sigma = 0, does not occur on a finite
    schedule. A step is Euler's only where Heun's is too long: where sigma/alpha starts above 3 and
    falls more than tenfold. In one step, as in the paper's N = 1, the sample is then the
    prediction.

    Args:
      denoise: a `Denoiser`.
      schedule: its `Schedule`; None if the denoiser carries it.
      s_churn: amount of noise to add over all steps; 0 adds none. A step multiplies sigma/alpha by
        1 + min(s_churn / N, sqrt(2) - 1), but never past t = 1.
      s_min: the smallest sigma/alpha at which to add noise.
      s_max: the largest sigma/alpha at which to add noise.
      s_noise: standard deviation of the added noise.
      steps: N, the number of steps; None uses the step's own t - s for 1/N, which is the same on
        `uniform_times`.

    Raises:
      ValueError: if `s_churn`, `s_min` or `s_noise` is negative, `s_max < s_min`, or `steps` is
        no whole number of at least 1.
    """
    values = s_churn, s_min, s_max, s_noise
    if known(*values) and not (min(values) >= 0 and s_max >= s_min and s_noise < float("inf")):
        raise ValueError(
            f"{s_churn=}, {s_min=}, {s_max=}, {s_noise=}: must be at least 0, and s_min <= s_max"
        )
    if not (steps is None or whole(steps)):
        raise ValueError(f"{steps=}: must be a whole number of at least 1")

    schedule = schedule_of(denoise, schedule)

    def churn(key, x, t, s):
        gamma = jnp.minimum(s_churn * (t - s if steps is None else 1 / steps), 2**0.5 - 1)
        log_snr = schedule.log_snr(t)
        ratio = jnp.exp(-log_snr / 2)
        gamma = jnp.where((ratio >= s_min) & (ratio <= s_max), gamma, 0.0)
        later = time_at(schedule, log_snr - 2 * jnp.log1p(gamma))
        later = jnp.where(gamma > 0, later, t)
        added = jnp.exp(-schedule.log_snr(later)) - jnp.exp(-log_snr)
        # At t = 1 nothing is added; the root of 0 would have no gradient.
        added = jnp.where(added > 0, jnp.sqrt(jnp.where(added > 0, added, 1.0)), 0.0)
        std = s_noise * expand(added, x)
        alpha_t, alpha_later = scales_at(schedule, t, x)[0], scales_at(schedule, later, x)[0]
        return alpha_later * (x / alpha_t + std * keys.normal(key, x.shape, x.dtype)), later

    def step(key, state, t, s):
        x = state.x
        if in_use(s_churn):
            x, t = churn(key, x, t, s)
        alpha_s = scales_at(schedule, s, x)[0]
        ratio_t, ratio_s = (jnp.exp(-schedule.log_snr(u) / 2) for u in (t, s))
        x_0, first = predict(denoise, x, t)[:2]
        # x/alpha_t + (ratio_s - ratio_t) first, without the difference of large numbers.
        euler = x_0 + expand(ratio_s, x) * first
        second = predict(denoise, alpha_s * euler, s).eps
        # Where the noise dwarfs the data at t and no longer does at s, the slope at s is not that
        # of the step: half of their difference would miss by half of sigma_t / alpha_t.
        long = ratio_t > jnp.maximum(3, 10 * ratio_s)
        rise = jnp.where(long, 0.0, ratio_s - ratio_t)
        return State(alpha_s * (euler + expand(rise, x) * (second - first) / 2), x_0)

    return Sampler(init, step, stochastic=in_use(s_churn))


def predictor_corrector(
    denoise: Denoiser,
    schedule: Schedule | None = None,
    *,
    predictor: Callable[[Denoiser, Schedule], Sampler] = ancestral,
    corrections: int = 1,
    snr: Scalar = 0.16,
) -> Sampler:
    """A step of any one-step sampler, then steps of Langevin dynamics at the new time.

    Song et al. 2021, Algorithm 1 with the corrector of Algorithms 4 and 5: x + h score +
    sqrt(2 h) z with h = 2 (snr sigma)^2. (They estimate sigma = |z| / |score| from the batch; here
    it is the schedule's sigma, so that no sample depends on another. Algorithm 5 multiplies h by
    1 - beta_i, which is nearly 1.) It takes 1 + `corrections` evaluations per step. Use
    `uniform_times`.

    Args:
      denoise: a `Denoiser`.
      schedule: its `Schedule`; None if the denoiser carries it.
      predictor: a function (denoise, schedule) -> one-step `Sampler`.
      corrections: steps of Langevin dynamics after each step of the predictor.
      snr: signal-to-noise ratio of the Langevin steps.

    Raises:
      ValueError: if `corrections` is no whole number of at least 1, or `snr` is not positive.
    """
    if not whole(corrections) or (known(snr) and not snr > 0):
        raise ValueError(
            f"{corrections=}, {snr=}: need a whole number of corrections, at least 1, and snr > 0"
        )
    schedule = schedule_of(denoise, schedule)
    walk = predictor(denoise, schedule)

    def step(key, state, t, s):
        example_keys = keys.per_example(key, len(state.x))
        state = walk.step(keys.fold_in(example_keys, 0), state, t, s)
        sigma = scales_at(schedule, s, state.x)[1]
        for i in range(corrections):
            z = keys.normal(keys.fold_in(example_keys, 1 + i), state.x.shape, state.x.dtype)
            # h score = -2 (snr sigma)^2 eps / sigma, and sqrt(2 h) = 2 snr sigma.
            drift = -2 * snr**2 * sigma * predict(denoise, state.x, s).eps
            state = state._replace(x=state.x + drift + 2 * snr * sigma * z)
        return state

    return Sampler(walk.init, step, stochastic=True)
