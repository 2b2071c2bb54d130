r"""Linear inverse problems y = A x_0 + noise, solved with any trained denoiser.

An operator A is any linear function of data `[batch, ...]`; this module has operators for
inpainting, super-resolution, deblurring and colourisation. A measurement conditions the samples in
one of three ways:

    pigdm     denoiser -> denoiser: adds the score of p(y | x_t), Gaussian about the predicted x_0
    dps       sampler -> sampler: takes a gradient step on the residual after each step
    repaint   sampler -> sampler, for inpainting: replaces the known part, and repeats each step

On Gaussian data the exact posterior is known, and `tests/test_inverse.py` compares with it.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Float

from . import keys
from .denoisers import add_score, predict, schedule_of, with_schedule
from .process import q_sample, q_transition
from .samplers import Sampler
from .schedules import Schedule
from .types import Data, Denoiser, Real, Scalar, at_least_float32, known

Operator = Callable[[Data], Data]
"""A linear function from data to measurements, both `[batch, ...]`, of each example separately."""


def inpainting(mask: Float[Real, "..."]) -> Operator:
    """Keep the data where `mask`, of the shape of one example, is 1, and zero it where it is 0."""
    return lambda x: x * jnp.broadcast_to(mask, x.shape).astype(x.dtype)


def downsampling(factor: int) -> Operator:
    """Average each square of factor x factor pixels of images `[batch, height, width, channels]`.

    Raises:
      ValueError: if `factor` is below 1; when called, if it does not divide height and width.
    """
    if factor < 1:
        raise ValueError(f"{factor=}: must be at least 1")

    def measure(x):
        batch, height, width, channels = x.shape
        if height % factor or width % factor:
            raise ValueError(f"{factor=} does not divide an image of {height} x {width}")
        squares = x.reshape(batch, height // factor, factor, width // factor, factor, channels)
        return squares.mean((2, 4))

    return measure


def blurring(kernel: Float[Real, "height width"]) -> Operator:
    """Convolve images with a kernel, with zeros beyond their edges; the size stays the same."""

    def measure(x):
        channels = x.shape[-1]
        each = jnp.broadcast_to(
            jnp.asarray(kernel, x.dtype)[::-1, ::-1, None, None], (*kernel.shape, 1, channels)
        )
        return jax.lax.conv_general_dilated(
            x,
            each,
            window_strides=(1, 1),
            padding="SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=channels,
            precision="highest",
        )

    return measure


def greying() -> Operator:
    """Average an image's channels, to `[batch, height, width, 1]`."""
    return lambda x: x.mean(-1, keepdims=True)


def pigdm(
    denoise: Denoiser,
    schedule: Schedule,
    operator: Operator,
    y: Data,
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
      operator: A, linear.
      y: the measurement, `[batch, ...]`.
      noise_std: standard deviation of the measurement's noise.
      sigma_data: d, the standard deviation of the data.

    Raises:
      ValueError: if `noise_std` is negative or `sigma_data` is not positive; when called, if y does
        not have the shape of A x_0.
    """
    if known(noise_std, sigma_data) and (noise_std < 0 or sigma_data <= 0):
        raise ValueError(f"{noise_std=}, {sigma_data=}: need noise_std >= 0 and sigma_data > 0")

    schedule = schedule_of(denoise, schedule)

    def guided(x_t, t, cond=None):
        _check(operator, x_t, y)
        snr = jnp.exp(schedule.log_snr(t))
        spread = jnp.broadcast_to(sigma_data**2 / (1 + snr * sigma_data**2), x_t.shape[:1])

        def estimate(x):
            prediction = predict(denoise, x, t, cond)
            return prediction.x_0, prediction

        x_0, pull_back, prediction = jax.vjp(estimate, x_t, has_aux=True)
        one = lambda x: operator(x[None])[0]
        transpose = jax.linear_transpose(one, x_t[0])

        def solve(residual, spread):
            # A^T (r^2 A A^T + noise^2)^-1 = (r^2 A^T A + noise^2)^-1 A^T, and this system has a
            # solution even for a y that no x_0 gives, such as one with pixels that a mask hides.
            precision = lambda x: spread * transpose(one(x))[0] + noise_std**2 * x
            return jax.scipy.sparse.linalg.cg(precision, transpose(residual)[0], tol=1e-6)[0]

        (score,) = pull_back(jax.vmap(solve)(y - operator(x_0), spread.astype(x_t.dtype)))
        return add_score(prediction, schedule, t, score)

    return with_schedule(schedule, guided)


def dps(sampler: Sampler, operator: Operator, y: Data, scale: Scalar = 1.0) -> Sampler:
    """Descend the gradient of |y - A x_0| with respect to x_t after each step of a sampler.

    Chung et al. 2023, "Diffusion posterior sampling for general noisy inverse problems", Algorithm
    1 with the step of their code, `scale` times the gradient of the residual's norm. The sampler's
    own step provides the prediction x_0, so there is no second evaluation. Use many steps, because
    each moves x_t by about `scale`.

    Args:
      sampler: a `Sampler`.
      operator: A, linear or not.
      y: the measurement, `[batch, ...]`.
      scale: the size of a gradient step.

    Raises:
      ValueError: when called, if y does not have the shape of A x_0.
    """

    def step(key, state, t, s):
        _check(operator, state.x, y)

        def residual(x):
            new = sampler.step(key, state._replace(x=x), t, s)
            error = at_least_float32(y - operator(new.x_0))
            squares = jnp.sum(error**2, axis=range(1, y.ndim))
            return jnp.sum(jnp.sqrt(squares + 1e-12)), new

        slope, new = jax.grad(residual, has_aux=True)(state.x)
        return new._replace(x=new.x - scale * slope)

    return Sampler(sampler.init, step, stochastic=sampler.stochastic)


def repaint(
    sampler: Sampler,
    schedule: Schedule,
    mask: Float[Real, "..."],
    y: Data,
    repeats: int = 10,
) -> Sampler:
    """Inpaint: after each step, replace the known part by the data, noised to the current time.

    With one repeat this is the replacement method (Song et al. 2021, appendix I.2), in which the
    generated part depends only weakly on the known part. Each further repeat goes back from s to t
    by q(x_t | x_s) and takes the step again, so that the two parts become consistent (Lugmayr et
    al. 2022, "RePaint", Algorithm 1 with a jump of one step).

    Args:
      sampler: a one-step `Sampler`.
      schedule: the denoiser's `Schedule`.
      mask: 1 where the data is known, 0 elsewhere; `[...]` or `[batch, ...]`.
      y: the data, `[batch, ...]`; its values where the mask is 0 are not used.
      repeats: how often to take each step.

    Raises:
      ValueError: if `repeats` is below 1; when called, if y or the mask does not have the data's
        shape, or the sampler is a multistep sampler.
    """
    if repeats < 1:
        raise ValueError(f"{repeats=}: must be at least 1")

    def step(key, state, t, s):
        _check(lambda x: jnp.broadcast_to(mask, x.shape), state.x, y)
        if jax.tree.leaves(state.memory):
            raise ValueError("repaint: needs a sampler of one step, not a multistep sampler")
        known = jnp.broadcast_to(mask, y.shape).astype(y.dtype)
        example_keys = keys.per_example(key, len(y))
        draw = lambda k: keys.normal(k, y.shape, y.dtype)

        def once(i, carry):
            x_t, _ = carry
            of_step, of_known, of_return = (keys.fold_in(example_keys, 3 * i + j) for j in range(3))
            new = sampler.step(of_step, state._replace(x=x_t), t, s)
            x_s = known * q_sample(schedule, y, s, draw(of_known)) + (1 - known) * new.x
            mean, std = q_transition(schedule, x_s, s, t)
            return mean + std * draw(of_return), new._replace(x=x_s)

        return jax.lax.fori_loop(1, repeats, once, once(0, (state.x, state)))[1]

    return Sampler(sampler.init, step, stochastic=True)


def _check(operator, x, y):
    try:
        shape = jax.eval_shape(operator, x).shape
    except (TypeError, ValueError) as error:
        raise ValueError(f"the operator does not take data of shape {x.shape}: {error}") from error
    if y.shape != shape:
        raise ValueError(f"a measurement of shape {y.shape}: the operator gives {shape}")
