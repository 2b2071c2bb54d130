"""Solvers that change a denoiser: from denoiser to denoiser, so that any sampler can walk by it."""

import jax
import jax.numpy as jnp

from ..denoisers import add_score, predict, schedule_of, with_schedule, with_x_0
from ..process import scales_at
from ..schedules import Schedule
from ..types import Array, Denoiser, Scalar, Time, expand, known, whole
from .operators import Measure, Measurement, check, check_linear


def pigdm(
    denoise: Denoiser,
    schedule: Schedule,
    operator: Measure,
    y: Measurement,
    noise_std: Scalar = 0.0,
    sigma_data: Scalar = 1.0,
) -> Denoiser:
    r"""Guide a denoiser by a measurement: the score of p(y | x_t) ~ N(A x_0, r^2 A A^T + noise^2).

    Song et al. 2023, "Pseudoinverse-guided diffusion models for inverse problems". x_0 is the
    prediction, and the score includes its Jacobian; r^2 is the variance of the data given x_t,
    r^2 = sigma^2 d^2 / (alpha^2 d^2 + sigma^2) for data of standard deviation d. For data
    N(m, d^2 I) the result is exact. The linear system of each example is solved separately, by
    conjugate gradients; where A A^T is a multiple of the identity, this takes one iteration.

    Args:
      denoise: a `Denoiser` without clipping; clip the result instead.
      schedule: its `Schedule`.
      operator: A, linear or affine.
      y: the measurement, `[batch, ...]`.
      noise_std: standard deviation of the measurement's noise.
      sigma_data: d, the standard deviation of the data.

    Raises:
      ValueError: if `noise_std` is negative or `sigma_data` is not positive; when called, if y does
        not have the shape of A x_0, or A is not linear.
    """
    if known(noise_std, sigma_data) and not (noise_std >= 0 and sigma_data > 0):
        raise ValueError(f"{noise_std=}, {sigma_data=}: need noise_std >= 0 and sigma_data > 0")

    schedule = schedule_of(denoise, schedule)

    def guided(x_t, t, cond=None):
        check(operator, x_t, y)
        check_linear("pigdm", operator, x_t)

        def estimate(x):
            prediction = predict(denoise, x, t, cond)
            return prediction.x_0, prediction

        x_0, pull_back, prediction = jax.vjp(estimate, x_t, has_aux=True)
        spread = spread_at(schedule, t, sigma_data)
        (score,) = pull_back(_toward(operator, x_0, y, spread, noise_std))
        return add_score(prediction, schedule, t, score)

    return with_schedule(schedule, guided)


def diffpir(
    denoise: Denoiser,
    schedule: Schedule,
    operator: Measure,
    y: Measurement,
    noise_std: Scalar = 0.0,
    strength: Scalar = 1.0,
) -> Denoiser:
    r"""Move x_0 towards the measurement: minimise |y - A x|^2 / noise^2 + |x - x_0|^2 / r^2.

    Zhu et al. 2023, "Denoising diffusion models for plug-and-play image restoration", Algorithm 1,
    with r = sigma / (alpha sqrt(strength)); their lambda is `strength`. There is no derivative of
    the network. Without noise, A x_0 becomes y. Their step to s mixes eps with fresh noise of
    variance zeta: use `ddim`, whose eta is sqrt(zeta) where a step is long.

    Args:
      denoise: a `Denoiser`.
      schedule: its `Schedule`.
      operator: A, linear or affine.
      y: the measurement, `[batch, ...]`.
      noise_std: standard deviation of the measurement's noise.
      strength: how strongly the prediction holds, relative to the measurement.

    Raises:
      ValueError: if `noise_std` is negative or `strength` is not positive; when called, if y does
        not have the shape of A x_0, or A is not linear.
    """
    if known(noise_std, strength) and not (noise_std >= 0 and strength > 0):
        raise ValueError(f"{noise_std=}, {strength=}: need noise_std >= 0 and strength > 0")

    schedule = schedule_of(denoise, schedule)

    def change(x_0, x_t, t, cond):
        check(operator, x_t, y)
        check_linear("diffpir", operator, x_t)
        spread = jnp.exp(-schedule.log_snr(t)) / strength
        return x_0 + expand(spread, x_0) * _toward(operator, x_0, y, spread, noise_std)

    return with_x_0(denoise, schedule, change)


def mmps(
    denoise: Denoiser,
    schedule: Schedule,
    operator: Measure,
    y: Measurement,
    noise_std: Scalar,
    iterations: int = 3,
) -> Denoiser:
    r"""Guide a denoiser by the score of p(y | x_t) ~ N(A x_0, A V A^T + noise^2), V the covariance.

    Rozet et al. 2024, "Learning diffusion priors from observations by expectation maximization",
    section 4.2 ("moment matching posterior sampling"). V = sigma^2 / alpha dx_0/dx_t is the
    covariance of the data given x_t, by Tweedie's formula, and the linear system is solved by a few
    conjugate gradients, each of which takes one derivative of the network. For Gaussian data the
    result is exact if there are as many iterations as measurements. An operator that is not linear
    is replaced by its derivative at the prediction.

    Args:
      denoise: a `Denoiser` without clipping; clip the result instead, above all if the network
        predicts eps, whose errors are large in x_0 near t = 1.
      schedule: its `Schedule`.
      operator: A.
      y: the measurement, `[batch, ...]`.
      noise_std: standard deviation of the measurement's noise, more than 0: it bounds the system's
        condition.
      iterations: of the conjugate gradients.

    Raises:
      ValueError: if `noise_std` is not positive or `iterations` is below 1; when called, if y does
        not have the shape of A x_0.
    """
    if not whole(iterations) or (known(noise_std) and not noise_std > 0):
        raise ValueError(f"{noise_std=}, {iterations=}: mmps needs noise_std > 0, iterations >= 1")

    schedule = schedule_of(denoise, schedule)

    def guided(x_t, t, cond=None):
        check(operator, x_t, y)
        alpha, sigma = scales_at(schedule, t, x_t)

        def estimate(x):
            prediction = predict(denoise, x, t, cond)
            return prediction.x_0, prediction

        x_0, pull_back, prediction = jax.vjp(estimate, x_t, has_aux=True)
        y_0, push = jax.linearize(operator, x_0)
        transpose = jax.linear_transpose(push, x_0)
        # The Jacobian of an exact denoiser is symmetric: its transpose serves as it in V.
        score = lambda residual: pull_back(*transpose(residual))[0]
        variance = jnp.asarray(noise_std, x_t.dtype) ** 2
        covariance = lambda r, of_r: variance * r + push(sigma**2 / alpha * of_r)
        guidance = _conjugate_gradients(score, covariance, y - y_0, iterations, x_0)
        return add_score(prediction, schedule, t, guidance)

    return with_schedule(schedule, guided)


def spread_at(schedule: Schedule, t: Time, sigma_data: Scalar) -> Array:
    """The variance of Gaussian data N(m, sigma_data^2 I) given x_t, of the shape of t."""
    return jnp.divide(1.0, 1 / sigma_data**2 + jnp.exp(schedule.log_snr(t)))


def _toward(operator, x_0, y, spread, noise_std):
    """A^T (spread A A^T + noise^2)^-1 (y - A x_0), the system of each example for itself."""
    # An affine operator is replaced by its linear part.
    _, one = jax.linearize(lambda x: operator(x[None])[0], x_0[0])
    transpose = jax.linear_transpose(one, x_0[0])
    variance = jnp.asarray(noise_std, x_0.dtype) ** 2

    def solve(residual, spread):
        # A^T (r^2 A A^T + noise^2)^-1 = (r^2 A^T A + noise^2)^-1 A^T, and this system has a
        # solution even for a y that no x_0 gives, such as one with pixels that a mask hides.
        precision = lambda x: spread * transpose(one(x))[0] + variance * x
        return jax.scipy.sparse.linalg.cg(precision, transpose(residual)[0], tol=1e-6)[0]

    spread = jnp.broadcast_to(spread, x_0.shape[:1]).astype(x_0.dtype)
    return jax.vmap(solve)(y - operator(x_0), spread)


def _conjugate_gradients(image, product, b, iterations, like):
    """The image of the solution of product(x, image(x)) = b, for each example of a batch.

    Both functions are linear, and take the whole batch. The image, of the shape of `like`, costs a
    derivative of the network: it is summed along the way, not computed again at the end.
    """
    dot = lambda u, v: jnp.sum(u * v, axis=tuple(range(1, u.ndim)), keepdims=True)
    ratio = lambda u, v: jnp.where(v > 0, u / jnp.where(v > 0, v, 1), 0)  # 0 once it is solved

    def step(_, state):
        total, residual, direction = state
        seen = image(direction)
        result = product(direction, seen)
        size = ratio(dot(residual, residual), dot(direction, result))
        new = residual - size * result
        turn = ratio(dot(new, new), dot(residual, residual))
        return total + expand(size.reshape(-1), seen) * seen, new, new + turn * direction

    return jax.lax.fori_loop(0, iterations, step, (jnp.zeros_like(like), b, b))[0]
