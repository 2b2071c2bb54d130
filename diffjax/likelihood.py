r"""Likelihoods: the variational bound, term by term, and the probability-flow ODE.

    -log p(x_0) <=  KL(q(x_1 | x_0) || p(x_1))                            prior matching
                  + E[-log p(x_0 | x_t)]  at the first t                  reconstruction
                  + sum E[KL(q(x_s | x_t, x_0) || p(x_s | x_t))]          denoising matching

The prior is N(0, sigma_1^2 I), as in `prior_sample`. Two Gaussians of equal variance differ only in
their means, so each denoising term is a squared error of the prediction (Ho et al. 2020,
equations 5 to 8); as the number of steps grows, their sum becomes an integral over t (Kingma et al.
2021, equation 17).

All terms are contributions to -log p, in nats per example `[batch]`; `bits_per_dim` converts them.
They are computed in at least float32, whatever the dtype of the data.

Pixels lie on a grid of `levels` values in [-1, 1], so the bound is on the probability of a value;
for continuous data, `levels=None`, it is on a density. The ODE gives only densities: `dequantise`
spreads each value uniformly over its cell, and by Jensen's inequality the mean log-density over the
cell, plus the log of the cell's volume, is at most the log of the value's probability.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from . import keys, ode
from .denoisers import predict, schedule_of
from .extras import install
from .process import (
    check_variance,
    log_variance_ratio,
    q_posterior,
    q_sample,
    scales_at,
    variance_fraction,
)
from .schedules import Schedule, rate_at, time_at
from .types import (
    Array,
    Data,
    Denoiser,
    Key,
    LearnedPrediction,
    Prediction,
    Real,
    Time,
    at_least_float32,
    check_like,
    expand,
    select,
    whole,
)

Nats = Float[Array, " batch"]
RECONSTRUCTIONS = 4
"""Draws of noise for the reconstruction term, which varies little, and for its standard error."""
REPEATS = 8
"""At most this many parts are evaluated twice, for the standard error of the denoising terms."""


class Elbo(NamedTuple):
    """An estimate of the bound: three parts of -log p(x_0), in nats, `[batch]` each.

    Attributes:
      prior: the prior term, which is exact.
      reconstruction: the reconstruction term, averaged over noise.
      denoising: the denoising terms, averaged over noise and times.
      standard_error: standard error of the sum of the three.
    """

    prior: Nats
    reconstruction: Nats
    denoising: Nats
    standard_error: Nats

    @property
    def nats(self) -> Nats:
        """The bound, which is the sum of the three parts."""
        return self.prior + self.reconstruction + self.denoising


def prior_term(schedule: Schedule, x_0: Data) -> Nats:
    """KL(q(x_1 | x_0) || N(0, sigma_1^2 I)) = snr_1 |x_0|^2 / 2, in nats.

    Args:
      schedule: a `Schedule`.
      x_0: clean data `[batch, ...]`.
    """
    return 0.5 * jnp.exp(schedule.log_snr(1.0)) * _sum(at_least_float32(x_0) ** 2)


def denoising_term(
    denoise: Denoiser,
    schedule: Schedule,
    x_0: Data,
    eps: Data,
    t: Time,
    s: Time | None,
    variance: str = "posterior",
) -> Nats:
    """KL(q(x_s | x_t, x_0) || p(x_s | x_t)) for x_t = alpha_t x_0 + sigma_t eps, in nats.

    This is a single KL, which is not multiplied by T.

    Args:
      denoise: a `Denoiser`.
      schedule: its `Schedule`.
      x_0: clean data `[batch, ...]`.
      eps: the noise, of the same shape.
      t: later times, `[]` or `[batch]`.
      s: earlier times; None for the limit of KL / (t - s) as s rises to t, the integrand of
        continuous time, in nats per unit of t.
      variance: variance of the decoder, "posterior", "beta" or "learned" (see `process.decoder`),
        which are equal in the limit.

    Source: Ho et al. 2020, equation 8; Kingma et al. 2021, equations 14 and 17; Nichol & Dhariwal
    2021, section 3.1.
    """
    x_0, eps = at_least_float32(x_0), at_least_float32(eps)
    x_t = q_sample(schedule, x_0, t, eps)
    return _kl(schedule, predict(denoise, x_t, t), x_0, eps, t, s, variance)


def reconstruction_term(
    denoise: Denoiser,
    schedule: Schedule,
    x_0: Data,
    eps: Data,
    steps: int | None = None,
    variance: str = "posterior",
    levels: int | None = 256,
) -> Nats:
    """-log p(x_0 | x_t) at the first t, for x_t = alpha_t x_0 + sigma_t eps, in nats.

    In discrete time t = 1/T, and p is a Gaussian about the predicted x_0, integrated over the cell
    of each value. Its variance, or the lower end of the range of a learned variance, is the
    posterior's one step later, because the posterior's variance is zero at t = 1/T (Ho et al. 2020,
    section 3.3; Nichol & Dhariwal 2021, in their code). In continuous time t = 0, and p(value) is
    proportional to q(x_t | value), which does not involve the network (Kingma et al. 2021,
    equation 8).

    Args:
      denoise: a `Denoiser`; unused in continuous time.
      schedule: its `Schedule`.
      x_0: clean data `[batch, ...]`, on the grid of `levels` values.
      eps: the noise, of the same shape.
      steps: T, at least 2; None for continuous time.
      variance: variance of the decoder, "posterior", "beta" or "learned".
      levels: number of values in [-1, 1] that an element of the data can take; None for the density
        of continuous data.

    Raises:
      ValueError: if `steps` or `levels` is below 2.
    """
    _check(steps=steps, levels=levels)
    check_variance(variance)
    check_like(x_0, eps=eps)
    x_0, eps = at_least_float32(x_0), at_least_float32(eps)
    if steps is None:
        log_std = jnp.broadcast_to(-schedule.log_snr(0.0) / 2, x_0.shape)  # of x_t / alpha_t
        if levels is None:
            return -_sum(_log_normal(eps, jnp.zeros_like(eps), jnp.zeros_like(eps)) - log_std)
        return -_sum(_log_categorical(x_0, eps, log_std, levels))
    prediction = predict(denoise, q_sample(schedule, x_0, 1 / steps, eps), 1 / steps)
    return _from_first_step(schedule, prediction, x_0, steps, variance, levels)


def bound_term(
    schedule: Schedule,
    prediction: Prediction | LearnedPrediction,
    x_0: Data,
    eps: Data,
    t: Time,
    steps: int,
    variance: str = "learned",
    levels: int | None = 256,
) -> Nats:
    """The term of the discrete bound at t = i/T: reconstruction for i = 1, else the KL, in nats.

    Args:
      schedule: a `Schedule`.
      prediction: a denoiser's prediction at x_t = alpha_t x_0 + sigma_t eps.
      x_0: clean data `[batch, ...]`.
      eps: the noise, of the same shape.
      t: times on the grid, `[]` or `[batch]`.
      steps: T, at least 2.
      variance: variance of the decoder.
      levels: how many values from -1 to 1 a number of the data may have; None if it is continuous.

    Raises:
      ValueError: if `steps` or `levels` is below 2.
    """
    _check(steps=steps, levels=levels)
    check_like(x_0, eps=eps)
    prediction, x_0, eps = jax.tree.map(at_least_float32, (prediction, x_0, eps))
    first = jnp.broadcast_to(jnp.round(t * steps) <= 1, x_0.shape[:1])
    # The term that is not selected must be finite too, or gradients would not be.
    t = jnp.where(first, 2 / steps, t)
    denoising = _kl(schedule, prediction, x_0, eps, t, t - 1 / steps, variance)
    here = prediction._replace(x_0=select(first, prediction.x_0, x_0))
    start = _from_first_step(schedule, here, x_0, steps, variance, levels)
    return jnp.where(first, start, denoising)


def elbo(
    key: Key,
    denoise: Denoiser,
    schedule: Schedule,
    x_0: Data,
    steps: int | None = None,
    *,
    variance: str = "posterior",
    levels: int | None = 256,
    samples: int | None = 32,
    at_once: int = 1,
) -> Elbo:
    """An unbiased estimate of the bound of each example, with its standard error.

    The terms of each example are evaluated at `samples` times, in one `lax.map`: one time is drawn
    from each of `samples` equal parts of the log-SNR range, over which the bound is spread most
    evenly. For the standard error, parts chosen at random are evaluated at a second time, so that
    its square has no bias, whatever the curve of the terms over the parts. It should be combined
    over many examples, because for a single example it is uncertain. A program that does not use it
    does not compute it.

    Args:
      key: one key, or one per example `[batch]`.
      denoise: a `Denoiser`.
      schedule: its `Schedule`.
      x_0: clean data `[batch, ...]`; pixels must be in [-1, 1], on the grid of `levels` values,
        which is not checked.
      steps: T for the discrete bound, a sum over i = 2..T and reconstruction from t = 1/T; None for
        continuous time, an integral and reconstruction from t = 0.
      variance: variance of the discrete decoder, "posterior", "beta" or "learned".
      levels: how many values from -1 to 1 a number of the data may have; None if it is continuous.
      samples: number of times to evaluate, at least 2; None, in discrete time, evaluates every step
        with two draws of noise.
      at_once: number of times to evaluate in one call of the network, for a batch too small to fill
        the device; memory grows with it.

    Returns:
      An `Elbo`.

    Raises:
      ValueError: if `steps`, `levels` or `samples` is below 2, `at_once` is below 1, `samples` is
        None in continuous time, `variance` is unknown, or is not "posterior" in continuous time, or
        the denoiser carries another schedule.

    >>> import diffjax
    >>> schedule = diffjax.cosine()
    >>> denoise = diffjax.oracles.gaussian(schedule, jnp.zeros(2), 1.0)
    >>> x_0 = denoise.sample(jax.random.key(0), 1000)
    >>> bound = elbo(jax.random.key(1), denoise, schedule, x_0, levels=None)
    >>> gap = bound.nats.mean() + denoise.log_density(x_0, 0.0).mean()
    >>> bool(abs(gap) < 0.3)  # zero, up to the sampling error
    True
    """
    _check(steps=steps, levels=levels, samples=samples)
    if samples is None and steps is None:
        raise ValueError(f"samples=None evaluates every step: needs discrete time, not {steps=}")
    if not whole(at_once):
        raise ValueError(f"{at_once=}: must be a whole number of at least 1")
    x_0, schedule = at_least_float32(x_0), schedule_of(denoise, schedule)
    example_keys = keys.per_example(key, len(x_0))
    parts = samples or 2 * ((steps or 2) - 1)
    repeats = min(parts, REPEATS)

    high, low = schedule.log_snr(0.0 if steps is None else 1 / steps), schedule.log_snr(1.0)

    def look(k, draw=None):
        part = keys.fold_in(example_keys, k if draw is None else draw)
        eps = keys.normal(keys.fold_in(part, 1), x_0.shape, x_0.dtype)
        offset = jax.vmap(jax.random.uniform)(keys.fold_in(part, 0))
        place = jnp.asarray(k).astype(offset.dtype)
        t = time_at(schedule, high - (high - low) * (place + offset) / parts)
        if steps is None:
            density = rate_at(schedule, t) / (high - low)
            return denoising_term(denoise, schedule, x_0, eps, t, None, variance) / density
        i = jnp.clip(jnp.ceil(t * steps), 2, steps)
        if samples is None:
            i = jnp.full_like(i, 2) + jnp.floor(place / 2)
        t, s = i / steps, (i - 1) / steps
        probability = (schedule.log_snr(s) - schedule.log_snr(t)) / (high - low)
        term = denoising_term(denoise, schedule, x_0, eps, t, s, variance)
        return term * (parts // 2) if samples is None else term / probability

    def look_again(j):
        key = keys.fold_in(example_keys, parts + RECONSTRUCTIONS + j)
        # One part from each equal share of the parts, so that each part is as likely as any other.
        offset = jax.vmap(jax.random.uniform)(keys.fold_in(key, 2))
        place = (jnp.asarray(j).astype(offset.dtype) + offset) / repeats
        k = jnp.minimum((place * parts).astype(int), parts - 1)
        return terms[k, jnp.arange(len(x_0))], look(k, parts + RECONSTRUCTIONS + j)

    def reconstruct(k):
        eps = keys.normal(keys.fold_in(example_keys, parts + k), x_0.shape, x_0.dtype)
        return reconstruction_term(denoise, schedule, x_0, eps, steps, variance, levels)

    with jax.default_matmul_precision("highest"):
        together = {"batch_size": at_once if at_once > 1 else None}
        terms = jax.lax.map(look, jnp.arange(parts), **together)
        starts = jax.lax.map(reconstruct, jnp.arange(RECONSTRUCTIONS))
        if samples is None:
            variance_of_mean = jnp.sum((terms[::2] - terms[1::2]) ** 2, axis=0) / parts**2
        else:
            # The mean over all parts of the variance within a part.
            first, second = jax.lax.map(look_again, jnp.arange(repeats), **together)
            variance_of_mean = jnp.mean((first - second) ** 2, axis=0) / 2 / parts
    variance_of_mean += jnp.var(starts, axis=0, ddof=1) / len(starts)
    return Elbo(
        prior_term(schedule, x_0), starts.mean(0), terms.mean(0), jnp.sqrt(variance_of_mean)
    )


def bits_per_dim(nats: Float[Real, "..."], shape: tuple[int, ...]) -> Float[Real, "..."]:
    """Convert nats per example to bits per dimension, without an offset for the data's scale.

    Args:
      nats: nats, of any shape.
      shape: shape of one example, without the batch.

    >>> float(bits_per_dim(jnp.log(2.0) * 12, (2, 2, 3)))
    1.0
    """
    return nats / (math.prod(shape) * math.log(2))


def dequantise(key: Key, x_0: Data, levels: int = 256) -> tuple[Data, float]:
    """Spread each value uniformly over its cell, for a model of densities.

    Args:
      key: one key, or one per example `[batch]`.
      x_0: data `[batch, ...]` on a grid of `levels` values from -1 to 1.
      levels: number of values of the grid.

    Returns:
      x, and the log of a cell's volume: log P(x_0) >= E[log p(x)] + log volume, so in nats
      `-flow_log_likelihood(denoise, schedule, x) - log_volume` bounds -log P(x_0) (Theis et al.
      2016, "A note on the evaluation of generative models", section 3.1).

    Raises:
      ValueError: if `levels` is below 2.
    """
    _check(levels=levels)
    width, x_0 = 2 / (levels - 1), at_least_float32(x_0)
    draw = lambda k: jax.random.uniform(k, x_0.shape[1:], x_0.dtype, -width / 2, width / 2)
    x = x_0 + jax.vmap(draw)(keys.per_example(key, len(x_0)))
    return x, math.prod(x_0.shape[1:]) * math.log(width)


def flow_log_likelihood(
    denoise: Denoiser,
    schedule: Schedule,
    x_0: Data,
    key: Key | None = None,
    *,
    steps: int = 100,
    tolerance: float | None = None,
) -> Nats:
    """log p(x_0) in nats: the log-density of the probability-flow ODE at t = 0.

    The ODE carries x to t = 1, where the density is N(0, sigma_1^2 I), and log p changes by the
    integral of the divergence (Song et al. 2021, section 4.3 and appendix D.2). The data must be
    continuous; see `dequantise` for pixels. The divergence is a derivative of reverse mode, so that
    it takes the memory of a training step on the same batch.

    Args:
      denoise: a `Denoiser` without clipping, whose edges the divergence does not account for.
      schedule: its `Schedule`.
      x_0: data `[batch, ...]`.
      key: None for the exact divergence, with one derivative for each of an example's dimensions;
        else one key, or one per example `[batch]`, for Hutchinson's unbiased estimate from one
        random sign vector per example, fixed along the trajectory (Grathwohl et al. 2019).
      steps: number of steps of the fourth-order Runge-Kutta method, equal in log-SNR (see
        `ode.solve`).
      tolerance: relative and absolute tolerance of adaptive steps, which diffrax (the extra `ode`)
        chooses for the whole batch; None for fixed steps.

    Raises:
      ValueError: if `steps` is below 1, `tolerance` is not positive, or the denoiser carries
        another schedule.
      ModuleNotFoundError: if `tolerance` is given and diffrax is not installed.

    >>> import diffjax
    >>> schedule = diffjax.cosine()
    >>> denoise = diffjax.oracles.gaussian(schedule, jnp.zeros(2), 1.0)
    >>> x = jnp.array([[0.0, 1.0]])
    >>> log_p = flow_log_likelihood(denoise, schedule, x)
    >>> bool(jnp.allclose(log_p, denoise.log_density(x, 0.0), atol=1e-4))
    True
    """
    if not whole(steps) or not (tolerance is None or tolerance > 0):
        raise ValueError(
            f"{steps=}, {tolerance=}: need a whole number of steps, at least 1, and a positive "
            "tolerance"
        )
    x_0, schedule = at_least_float32(x_0), schedule_of(denoise, schedule)
    divergence = _exact_divergence if key is None else _hutchinson(key, x_0)

    def slope(carry, t):
        y, _ = carry
        return divergence(lambda y: ode.velocity(denoise, schedule, y, t)[0], y)

    r_0 = ode.radius(schedule, 0.0, x_0)
    start = x_0 / r_0, jnp.zeros_like(x_0, shape=len(x_0))
    solve = ode.solve if tolerance is None else _adaptive(tolerance)
    with jax.default_matmul_precision("highest"):
        y, gained = solve(slope, schedule, start, 0.0, 1.0, steps)
    log_std = jnp.log(jax.nn.sigmoid(-schedule.log_snr(1.0))) / 2  # sigma_1 / radius
    log_prior = _log_normal(y, jnp.zeros_like(y), jnp.broadcast_to(log_std, y.shape))
    return _sum(log_prior - jnp.log(r_0)) + gained


def _kl(schedule, prediction, x_0, eps, t, s, variance):
    """`denoising_term` for a given prediction."""
    prediction = jax.tree.map(at_least_float32, prediction)
    alpha, sigma = scales_at(schedule, t, x_0)
    # alpha dx_0 + sigma deps = 0, so there is one error, which v resolves at every noise level.
    error = sigma * (x_0 - prediction.x_0) - alpha * (eps - prediction.eps)
    squared = (alpha * error / (alpha**2 + sigma**2)) ** 2  # of eps
    if s is None:
        if variance != "posterior":
            raise ValueError(f"{variance=}: in continuous time all variances are the posterior's")
        return 0.5 * _sum(expand(rate_at(schedule, t), x_0) * squared)
    gap = expand(jnp.expm1(schedule.log_snr(s) - schedule.log_snr(t)), x_0)
    log_ratio = log_variance_ratio(schedule, prediction, x_0, t, s, variance)
    spread = log_ratio + jnp.expm1(-log_ratio) + jnp.zeros_like(x_0)
    return 0.5 * _sum(gap * squared * jnp.exp(-log_ratio) + spread)


def _from_first_step(schedule, prediction, x_0, steps, variance, levels):
    """`reconstruction_term` in discrete time, for a given prediction at t = 1/T."""
    log_std = jnp.log(q_posterior(schedule, x_0, x_0, 2 / steps, 1 / steps)[1])
    if variance == "learned":
        # It ranges from there up to sigma_t, whose square is the beta of the first step.
        log_sigma = jnp.log(scales_at(schedule, 1 / steps, x_0)[1])
        log_std += variance_fraction(prediction, variance) * (log_sigma - log_std)
    log_std = jnp.broadcast_to(log_std, x_0.shape)
    if levels is None:
        return -_sum(_log_normal(x_0, prediction.x_0, log_std))
    return -_sum(_log_cell(x_0, prediction.x_0, log_std, levels))


# Both divergences are of reverse mode, as training is: some layers, such as cuDNN's attention, have
# no derivative of forward mode. The zeros give a vector the type of y, which under shard_map varies
# over the devices.


def _exact_divergence(f, y):
    value, pull_back = jax.vjp(f, y)
    size = math.prod(y.shape[1:])

    def one(i):
        along = jax.nn.one_hot(i, size, dtype=y.dtype).reshape(1, *y.shape[1:])
        return _sum(along * pull_back(along + jnp.zeros_like(y))[0])

    return value, jax.lax.map(one, jnp.arange(size)).sum(0)


def _hutchinson(key, like):
    draw = lambda k: jax.random.rademacher(k, like.shape[1:], like.dtype)
    signs = jax.vmap(draw)(keys.per_example(key, len(like))) + jnp.zeros_like(like)

    def divergence(f, y):
        value, pull_back = jax.vjp(f, y)
        return value, _sum(signs * pull_back(signs)[0])

    return divergence


def _adaptive(tolerance):
    try:
        import diffrax
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"a tolerance needs diffrax: {install('ode')}") from error

    def solve(slope, schedule, y, t, s, steps):
        def field(log_snr, y, _):
            return ode.along_log_snr(slope, schedule, y, time_at(schedule, log_snr))

        ends = schedule.log_snr(t), schedule.log_snr(s)
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            diffrax.Dopri8(),
            *ends,
            dt0=(ends[1] - ends[0]) / steps,
            y0=y,
            stepsize_controller=diffrax.PIDController(rtol=tolerance, atol=tolerance),
            max_steps=100_000,
        )
        return jax.tree.map(lambda a: a[-1], solution.ys)

    return solve


def _log_normal(x, mean, log_std):
    return -0.5 * ((x - mean) * jnp.exp(-log_std)) ** 2 - log_std - 0.5 * math.log(2 * math.pi)


def _log_cell(x, mean, log_std, levels):
    """log of a normal distribution's mass on the cell of x; the outermost cells are unbounded."""
    half, inverse = 1 / (levels - 1), jnp.exp(-log_std)
    low, high = (x - half - mean) * inverse, (x + half - mean) * inverse
    low = jnp.where(x < -1 + half, -jnp.inf, low)
    high = jnp.where(x > 1 - half, jnp.inf, high)
    # In the upper tail both distribution functions round to 1, so reflect it into the lower tail.
    above = low + high > 0
    low, high = jnp.where(above, -high, low), jnp.where(above, -low, high)
    log_high, log_low = jax.scipy.stats.norm.logcdf(high), jax.scipy.stats.norm.logcdf(low)
    return log_high + jnp.log1p(-jnp.exp(log_low - log_high))


def _log_categorical(x, eps, log_std, levels):
    """log softmax over all values of the log-density of x + std eps about each, at the value x."""

    def add(total, value):
        # The density about this value over that about x, which is at most exp(eps^2 / 2).
        u = (value - x) * jnp.exp(-log_std)
        return total + jnp.exp(u * eps - u**2 / 2), None

    # One value after another, which neither takes memory for all of them nor a second pass.
    values = jnp.linspace(-1, 1, levels, dtype=x.dtype)
    return -jnp.log(jax.lax.scan(add, 0 * x, values)[0])


def _sum(x):
    return x.sum(axis=range(1, x.ndim))


def _check(**numbers):
    for name, value in numbers.items():
        if not (value is None or whole(value, 2)):
            raise ValueError(f"{name}={value}: must be a whole number of at least 2")
