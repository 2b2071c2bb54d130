"""Solvers that change the walk: samplers whose steps, or whose population, follow a measurement."""

import jax
import jax.numpy as jnp
from jaxtyping import Float

from .. import keys
from ..denoisers import add_score, predict, schedule_of
from ..process import decoder, q_sample, q_transition, scales_at
from ..samplers import Sampler
from ..samplers.walk import State, init
from ..schedules import Schedule
from ..types import Denoiser, Real, Scalar, at_least_float32, expand, known, whole
from .guided import spread_at
from .operators import Measure, Measurement, check


def dps(sampler: Sampler, operator: Measure, y: Measurement, scale: Scalar = 1.0) -> Sampler:
    """Descend the gradient of |y - A x_0| with respect to x_t after each step of a sampler.

    Chung et al. 2023, "Diffusion posterior sampling for general noisy inverse problems", Algorithm
    1 with the step of their code, `scale` times the gradient of the residual's norm. The sampler's
    own step provides the prediction x_0, so there is no second evaluation. Use many steps, because
    each moves x_t by about `scale`.

    Args:
      sampler: a `Sampler`.
      operator: A, linear or not.
      y: the measurement, `[batch, ...]`.
      scale: the size of a gradient step, more than 0.

    Raises:
      ValueError: if `scale` is not positive; when called, if y does not have the shape of A x_0.
    """
    if known(scale) and not scale > 0:
        raise ValueError(f"{scale=}: must be more than 0")

    def step(key, state, t, s):
        check(operator, state.x, y)

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
    y: Measurement,
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
    if not whole(repeats):
        raise ValueError(f"{repeats=}: must be a whole number of at least 1")

    def step(key, state, t, s):
        check(lambda x: jnp.broadcast_to(mask, x.shape).astype(x.dtype), state.x, y)
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


def ddrm(
    denoise: Denoiser,
    schedule: Schedule,
    operator: Measure,
    y: Measurement,
    noise_std: Scalar = 0.0,
    eta: Scalar = 0.85,
    eta_b: Scalar = 1.0,
) -> Sampler:
    """Walk in the coordinates of the operator's singular value decomposition, each by its own rule.

    Kawar et al. 2022, "Denoising diffusion restoration models", equation 8, with x = x_t / alpha.
    A coordinate that is not measured takes a step of DDIM. A measured one is drawn about the
    measurement while the noise of x at s is more than that of the measurement, noise / singular
    value, and about the prediction after that. There is one evaluation a step, and no derivative of
    the network. It starts from the prior; the first step brings in the measurement.

    Args:
      denoise: a `Denoiser`.
      schedule: its `Schedule`.
      operator: A, with its `svd`.
      y: the measurement, `[batch, ...]`.
      noise_std: standard deviation of the measurement's noise.
      eta: the part of the noise that is fresh, where the prediction leads; from 0 to 1.
      eta_b: the weight of the measurement, where it leads; from 0 to 1.

    Raises:
      ValueError: if the operator has no `svd`, `noise_std` is negative, or `eta` or `eta_b` is
        outside of [0, 1]; when called, if y does not have the shape of A x_0.
    """
    svd = getattr(operator, "svd", None)
    if svd is None:
        raise ValueError(
            "ddrm needs an operator with its singular value decomposition: inverse.with_svd("
            "operator, shape) adds it to a linear one"
        )
    within = lambda x: 0 <= x <= 1
    if known(noise_std, eta, eta_b) and not (noise_std >= 0 and within(eta) and within(eta_b)):
        raise ValueError(
            f"{noise_std=}, {eta=}, {eta_b=}: need noise_std >= 0, and eta and eta_b in [0, 1]"
        )

    schedule = schedule_of(denoise, schedule)

    def step(key, state, t, s):
        check(operator, state.x, y)
        prediction = predict(denoise, state.x, t)
        x_0, eps = svd.coordinates(prediction.x_0), svd.coordinates(prediction.eps)
        values = jnp.broadcast_to(jnp.asarray(svd.values, x_0.dtype), x_0.shape)
        seen = values > 0
        known = svd.measured(y), jnp.asarray(noise_std, x_0.dtype)
        target, noise = (a / jnp.where(seen, values, 1) for a in known)
        ratio = jnp.broadcast_to(expand(jnp.exp(-schedule.log_snr(s) / 2), x_0), x_0.shape)
        leads = seen & (ratio >= noise)
        # The prediction leads: a part of the noise in x is kept, or of that in the measurement.
        kept = jnp.where(seen, (target - x_0) / jnp.where(leads, 1, noise), eps)
        mean = jnp.where(
            leads,
            x_0 + eta_b * (target - x_0),
            x_0 + jnp.sqrt(1.0 - eta**2) * ratio * kept,
        )
        std = jnp.where(leads, jnp.sqrt(jnp.abs(ratio**2 - (eta_b * noise) ** 2)), eta * ratio)
        x = svd.data(mean + std * keys.normal(key, x_0.shape, x_0.dtype))
        return State(scales_at(schedule, s, x)[0] * x, prediction.x_0)

    return Sampler(init, step, stochastic=True)


def tds(
    denoise: Denoiser,
    schedule: Schedule,
    operator: Measure,
    y: Measurement,
    noise_std: Scalar,
    particles: int,
    sigma_data: Scalar = 1.0,
) -> Sampler:
    """Twisted diffusion sampling: a weighted population of walks for each measurement.

    Wu et al. 2023, "Practical and asymptotically exact conditional sampling in diffusion models",
    Algorithm 1, with systematic resampling. The steps of `ancestral` are guided by the twist, the
    likelihood N(y; A x_0, noise^2 + r^2) of the prediction x_0, and the population is resampled by
    the ratio of the unguided step and the twist to the guided step, which corrects the guidance.
    r^2 is that of `pigdm`; any choice is correct. The step to t = 0 ends with the likelihood of the
    sample itself, so that all samples have equal weight. As the number of particles grows, they
    become exact draws of the posterior of the model that `ancestral` draws from.

    Examples i * particles to (i + 1) * particles - 1 of the batch are the population of
    measurement i, and have one condition; they depend on each other, and on no other population. A
    batch that is split over devices must keep populations together.

    Args:
      denoise: a `Denoiser`.
      schedule: its `Schedule`.
      operator: A, linear or not.
      y: the measurements, `[batch / particles, ...]`.
      noise_std: standard deviation of the measurement's noise, more than 0.
      particles: the size of a population, at least 2.
      sigma_data: the standard deviation of the data.

    Raises:
      ValueError: if `noise_std` or `sigma_data` is not positive, or there are fewer than 2
        particles; when called, if the batch is not that of the populations, or y does not have the
        shape of A x_0.
    """
    if known(noise_std, sigma_data) and not (noise_std > 0 and sigma_data > 0):
        raise ValueError(f"{noise_std=}, {sigma_data=}: tds needs both to be positive")
    if not whole(particles, 2):
        raise ValueError(f"{particles=}: tds resamples a population, of at least 2")

    schedule = schedule_of(denoise, schedule)

    def log_likelihood(x_0, variance):
        error = jnp.repeat(y, particles, axis=0) - operator(x_0)
        return -0.5 * jnp.sum(at_least_float32(error) ** 2, range(1, y.ndim)) / variance

    def step(key, state, t, s):
        x_t = state.x
        if len(x_t) != particles * len(y):
            raise ValueError(
                f"a batch of {len(x_t)} for {len(y)} measurements with {particles=}: need "
                f"{particles * len(y)} examples"
            )
        check(operator, x_t[: len(y)], y)
        of_pick, of_noise, of_end = (
            keys.fold_in(keys.per_example(key, len(x_t)), i) for i in range(3)
        )

        def twist(x):
            prediction = predict(denoise, x, t)
            variance = noise_std**2 + spread_at(schedule, t, sigma_data)
            value = log_likelihood(prediction.x_0, variance)
            return value.sum(), (value, prediction)

        score, (log_twist, prediction) = jax.grad(twist, has_aux=True)(x_t)
        pick = _resampled(of_pick, state.memory + log_twist, particles)
        x_t, score, log_twist, prediction = jax.tree.map(
            lambda a: a[pick], (x_t, score, log_twist, prediction)
        )
        mean, std = decoder(schedule, prediction, x_t, t, s)
        guided, _ = decoder(schedule, add_score(prediction, schedule, t, score), x_t, t, s)
        z, shift = keys.normal(of_noise, x_t.shape, x_t.dtype), (guided - mean) / std
        log_weight = -jnp.sum(shift * (z + shift / 2), range(1, z.ndim)) - log_twist
        x_s = guided + std * z
        last = log_weight + log_likelihood(x_s / scales_at(schedule, s, x_s)[0], noise_std**2)
        end = jnp.asarray(s) == 0
        kept = jnp.where(end, _resampled(of_end, last, particles), jnp.arange(len(x_s)))
        memory = jnp.where(end, 0, log_weight).astype(state.memory.dtype)
        return State(x_s[kept], prediction.x_0[kept], memory)

    def start(x_1):
        return State(x_1, jnp.zeros_like(x_1), jnp.zeros(len(x_1), at_least_float32(x_1).dtype))

    return Sampler(start, step, stochastic=True)


def _resampled(key, log_weights, particles):
    """Systematic resampling of each population: the positions in the batch of those to keep."""
    weights = jax.nn.softmax(log_weights.reshape(-1, particles), axis=-1)
    offsets = jax.vmap(jax.random.uniform)(key[::particles])
    points = (jnp.arange(particles)[None] + offsets[:, None]) / particles
    pick = jax.vmap(jnp.searchsorted)(jnp.cumsum(weights, axis=-1), points)
    first = particles * jnp.arange(len(weights))
    return (first[:, None] + jnp.minimum(pick, particles - 1)).reshape(-1)
