r"""The forward process, whose Gaussians have no learned parameters, and the decoder.

    q(x_t | x_0)      = N(alpha_t x_0, sigma_t^2 I)
    q(x_t | x_s)      = N(alpha_t/alpha_s x_s, sigma_t^2 (1 - c) I)                     s < t
    q(x_s | x_t, x_0) = N(alpha_s (x_0 + c (x_t/alpha_t - x_0)), sigma_s^2 (1 - c) I)

with c = snr_t / snr_s = exp(log_snr_t - log_snr_s) in (0, 1). The last line follows from the two
above it by Bayes' rule (Kingma et al. 2021, appendix A). As s decreases, its mean moves from x_t
towards x_0; its variance depends only on the two times. DDPM's posterior is the case s = t - 1/T.
"""

import jax.numpy as jnp

from . import checks, keys
from .schedules import Schedule
from .types import (
    Array,
    Data,
    Key,
    LearnedPrediction,
    Prediction,
    Scale,
    Time,
    check_like,
    check_times,
    expand,
)


def scales_at(schedule: Schedule, t: Time, like: Data) -> tuple[Array, Array]:
    """The scales (alpha_t, sigma_t), shaped to multiply the data `like`.

    Args:
      schedule: a `Schedule`.
      t: times `[]` or `[batch]` in [0, 1].
      like: data `[batch, ...]`, which gives the rank and the dtype.

    Raises:
      ValueError: if t has another shape, or is concrete and outside [0, 1]; so does every function
        that takes a time and data.

    >>> import jax.numpy as jnp, diffjax
    >>> alpha, sigma = scales_at(diffjax.cosine(), jnp.ones(4) / 2, like=jnp.ones((4, 8, 8, 1)))
    >>> alpha.shape
    (4, 1, 1, 1)
    """
    checks.schedule(schedule)
    check_times(t, len(like))
    alpha, sigma = schedule(t)
    return expand(alpha, like), expand(sigma, like)


def q_sample(schedule: Schedule, x_0: Data, t: Time, eps: Data) -> Data:
    """Sample from q(x_t | x_0): x_t = alpha_t x_0 + sigma_t eps.

    Args:
      schedule: a `Schedule`.
      x_0: clean data `[batch, ...]`.
      t: times `[]` or `[batch]` in [0, 1].
      eps: standard normal noise of the shape of `x_0`.

    Returns:
      x_t, of the shape of `x_0`.

    Raises:
      ValueError: if `eps` has another shape than `x_0`, or t is no time (see `scales_at`).

    Source: Ho et al. 2020, equation 4.
    """
    check_like(x_0, eps=eps)
    alpha, sigma = scales_at(schedule, t, x_0)
    return alpha * x_0 + sigma * eps


def q_transition(schedule: Schedule, x_s: Data, s: Time, t: Time) -> tuple[Data, Scale]:
    """Mean and standard deviation of q(x_t | x_s), s <= t.

    Args:
      schedule: a `Schedule`.
      x_s: data at the earlier, cleaner time, `[batch, ...]`.
      s: earlier times, `[]` or `[batch]`.
      t: later times, `[]` or `[batch]`.

    Returns:
      The mean, of the shape of `x_s`, and the standard deviation, which broadcasts against it.

    Source: Kingma et al. 2021, appendix A.1; DDPM's sqrt(1 - beta_t) x_{t-1} and sqrt(beta_t) are
    the case s = t - 1/T.
    """
    alpha_s, _ = scales_at(schedule, s, x_s)
    alpha_t, sigma_t = scales_at(schedule, t, x_s)
    return alpha_t / alpha_s * x_s, sigma_t * expand(_forgotten(schedule, t, s), x_s)


def q_posterior(schedule: Schedule, x_0: Data, x_t: Data, t: Time, s: Time) -> tuple[Data, Scale]:
    """Mean and standard deviation of q(x_s | x_t, x_0), s <= t, which a decoder approximates.

    Args:
      schedule: a `Schedule`.
      x_0: clean data `[batch, ...]`, or a network's estimate of it.
      x_t: noisy data of the same shape.
      t: later times, `[]` or `[batch]`.
      s: earlier times, `[]` or `[batch]`.

    Returns:
      The mean, of the shape of `x_0`, and the standard deviation, which broadcasts against it and
      is a function of t and s alone.

    Raises:
      ValueError: if `x_t` has another shape than `x_0`, or t or s is no time (see `scales_at`).

    Source: Ho et al. 2020, equations 6 and 7 (s = t - 1/T); Kingma et al. 2021, appendix A.2.
    """
    check_like(x_0, x_t=x_t)
    alpha_s, sigma_s = scales_at(schedule, s, x_0)
    alpha_t, _ = scales_at(schedule, t, x_0)
    c = expand(jnp.exp(schedule.log_snr(t) - schedule.log_snr(s)), x_0)
    mean = alpha_s * (x_0 + c * (x_t / alpha_t - x_0))
    return mean, sigma_s * expand(_forgotten(schedule, t, s), x_0)


def decoder(
    schedule: Schedule,
    prediction: Prediction | LearnedPrediction,
    x_t: Data,
    t: Time,
    s: Time,
    variance: str = "posterior",
) -> tuple[Data, Scale]:
    """Mean and standard deviation of p(x_s | x_t), the posterior with a predicted x_0.

    Args:
      schedule: a `Schedule`.
      prediction: a denoiser's prediction at x_t.
      x_t: noisy data `[batch, ...]`.
      t: later times, `[]` or `[batch]`.
      s: earlier times, `[]` or `[batch]`.
      variance: "posterior", the variance of q(x_s | x_t, x_0), which is exact for data at a single
        point; "beta", the variance of q(x_t | x_s), which for variance-preserving scales is exact
        for standard normal data; or "learned", which interpolates between the two by the
        prediction's `fraction`.

    Returns:
      The mean, of the shape of `x_t`, and the standard deviation, which broadcasts against it.

    Raises:
      ValueError: if `variance` is none of these, or is "learned" and the prediction has no
        `fraction`.

    Source: Ho et al. 2020, section 3.2; Nichol & Dhariwal 2021, equation 15.
    """
    mean, std = q_posterior(schedule, prediction.x_0, x_t, t, s)
    return mean, std * jnp.exp(0.5 * log_variance_ratio(schedule, prediction, x_t, t, s, variance))


def log_variance_ratio(
    schedule: Schedule,
    prediction: Prediction | LearnedPrediction,
    x_t: Data,
    t: Time,
    s: Time,
    variance: str,
) -> Scale:
    """The log of the decoder's variance over the posterior's; the arguments are those of `decoder`.

    It is 0 for "posterior", log(sigma_t^2 / sigma_s^2) for "beta", and a fraction of the latter for
    "learned".
    """
    fraction = variance_fraction(prediction, variance)
    sigma_s, sigma_t = (scales_at(schedule, u, x_t)[1] for u in (s, t))
    if variance == "posterior":
        # Not 0 times the logarithms: in a scan, XLA of jax 0.12.0 was seen to drop the factor 0.
        return jnp.zeros_like(sigma_t)
    return 2 * fraction * (jnp.log(sigma_t) - jnp.log(sigma_s))


def variance_fraction(prediction: Prediction | LearnedPrediction, variance: str) -> Scale:
    """The position of the decoder's log variance between the posterior's, at 0, and beta, at 1.

    Raises:
      ValueError: if `variance` is unknown, or is "learned" and the prediction has no `fraction`.
    """
    check_variance(variance)
    fraction = _FRACTIONS[variance](prediction)
    if fraction is None:
        raise ValueError(
            "variance='learned' needs a denoiser that has learned one: "
            "denoiser(..., learned_variance=True) with a network of twice the channels"
        )
    return fraction


def check_variance(variance: str) -> None:
    """Raise a ValueError unless `variance` is a choice of `decoder`."""
    if variance not in _FRACTIONS:
        raise ValueError(f"unknown variance {variance!r}: one of {', '.join(_FRACTIONS)}")


_FRACTIONS = {
    "posterior": lambda prediction: 0.0,
    "beta": lambda prediction: 1.0,
    "learned": lambda prediction: getattr(prediction, "fraction", None),
}


def prior_sample(key: Key, schedule: Schedule, shape: tuple[int, ...]) -> Data:
    """Sample x_1 ~ N(0, sigma_1^2 I), from which sampling starts.

    Args:
      key: one key, or one per example `[batch]`.
      schedule: the `Schedule` of the denoiser and of the sampler. The sample does not know it, so
        that nothing can refuse the prior of another schedule: 80 eps for `log_uniform`, where
        variance-preserving scales need about 1 eps.
      shape: `[batch, ...]`.
    """
    eps = keys.normal(key, shape)
    return scales_at(schedule, 1.0, eps)[1] * eps


def _forgotten(schedule, t, s):
    """sqrt(1 - c), the fraction of fresh noise in q(x_t | x_s) and in q(x_s | x_t, x_0)."""
    return jnp.sqrt(-jnp.expm1(schedule.log_snr(t) - schedule.log_snr(s)))
