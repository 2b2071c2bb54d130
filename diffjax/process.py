r"""The forward process: Gaussians with no parameters to learn.

    q(x_t | x_0)      = N(alpha_t x_0, sigma_t^2 I)
    q(x_t | x_s)      = N(alpha_t/alpha_s x_s, sigma_t^2 (1 - c) I)                     s < t
    q(x_s | x_t, x_0) = N(alpha_s (x_0 + c (x_t/alpha_t - x_0)), sigma_s^2 (1 - c) I)

with c = snr_t / snr_s = exp(log_snr_t - log_snr_s) in (0, 1): the last line is Bayes' rule on the
two above it (Kingma et al. 2021, appendix A). Its mean walks from x_t towards x_0; its variance
depends on the two times alone, neither on x_0 nor on x_t. DDPM's posterior is s = t - 1/T.
"""

import jax.numpy as jnp

from . import keys
from .schedules import Schedule
from .types import Array, Data, Key, LearnedPrediction, Prediction, Scale, Time, expand


def scales_at(schedule: Schedule, t: Time, like: Data) -> tuple[Array, Array]:
    """The scales (alpha_t, sigma_t), shaped to multiply data `like` `[batch, ...]`.

    Args:
      schedule: a `Schedule`.
      t: times `[]` or `[batch]` in [0, 1].
      like: data `[batch, ...]`, which gives the rank and the dtype.

    >>> import jax.numpy as jnp, diffjax
    >>> alpha, sigma = scales_at(diffjax.cosine(), jnp.ones(4) / 2, like=jnp.ones((4, 8, 8, 1)))
    >>> alpha.shape
    (4, 1, 1, 1)
    """
    alpha, sigma = schedule(t)
    return expand(alpha, like), expand(sigma, like)


def q_sample(schedule: Schedule, x_0: Data, t: Time, eps: Data) -> Data:
    """A draw of q(x_t | x_0): x_t = alpha_t x_0 + sigma_t eps.

    Args:
      schedule: a `Schedule`.
      x_0: clean data `[batch, ...]`.
      t: times `[]` or `[batch]` in [0, 1].
      eps: standard normal noise of the shape of `x_0`.

    Returns:
      x_t, of the shape of `x_0`.

    Source: Ho et al. 2020, equation 4.
    """
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
    s = t - 1/T.
    """
    alpha_s, _ = scales_at(schedule, s, x_s)
    alpha_t, sigma_t = scales_at(schedule, t, x_s)
    return alpha_t / alpha_s * x_s, sigma_t * expand(_forgotten(schedule, t, s), x_s)


def q_posterior(schedule: Schedule, x_0: Data, x_t: Data, t: Time, s: Time) -> tuple[Data, Scale]:
    """Mean and standard deviation of q(x_s | x_t, x_0), s <= t: the step a decoder must imitate.

    Args:
      schedule: a `Schedule`.
      x_0: clean data `[batch, ...]`, or a network's estimate of it.
      x_t: noisy data of the same shape.
      t: later times, `[]` or `[batch]`.
      s: earlier times, `[]` or `[batch]`.

    Returns:
      The mean, of the shape of `x_0`, and the standard deviation, which broadcasts against it and
      is a function of t and s alone.

    Source: Ho et al. 2020, equations 6 and 7 (s = t - 1/T); Kingma et al. 2021, appendix A.2.
    """
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
    """Mean and standard deviation of p(x_s | x_t), the posterior with a prediction for x_0.

    Args:
      schedule: a `Schedule`.
      prediction: what a denoiser says of x_t.
      x_t: noisy data `[batch, ...]`.
      t: later times, `[]` or `[batch]`.
      s: earlier times, `[]` or `[batch]`.
      variance: "posterior", that of q(x_s | x_t, x_0), right for data at a single point; "beta",
        that of q(x_t | x_s), right for data that is standard normal; or "learned", between the
        two, by the prediction's `fraction`.

    Returns:
      The mean, of the shape of `x_t`, and the standard deviation, which broadcasts against it.

    Raises:
      ValueError: if `variance` is none of these, or learned and the prediction has none.

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
    """log of the decoder's variance over the posterior's: see `decoder`, whose arguments it has.

    0 for "posterior", log(sigma_t^2 / sigma_s^2) for "beta", a fraction of that if "learned".
    """
    fraction = variance_fraction(prediction, variance)
    sigma_s, sigma_t = (scales_at(schedule, u, x_t)[1] for u in (s, t))
    if variance == "posterior":
        # Not 0 times the logarithms: in a scan, XLA of jax 0.12.0 has been seen to lose the 0.
        return jnp.zeros_like(sigma_t)
    return 2 * fraction * (jnp.log(sigma_t) - jnp.log(sigma_s))


def variance_fraction(prediction: Prediction | LearnedPrediction, variance: str) -> Scale:
    """Where the log of the decoder's variance lies between the posterior's, 0, and beta, 1.

    Raises:
      ValueError: if there is no such variance, or it is learned and the prediction has none.
    """
    check_variance(variance)
    fraction = _FRACTIONS[variance](prediction)
    if fraction is None:
        raise ValueError(
            "variance='learned' needs a denoiser that has learned one: "
            "denoiser(..., learned_variance=True) of a network of twice the channels"
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
    """A draw of x_1 ~ N(0, sigma_1^2 I), where sampling starts.

    Args:
      key: one key, or one per example `[batch]`.
      schedule: a `Schedule`.
      shape: `[batch, ...]`.
    """
    eps = keys.normal(key, shape)
    return scales_at(schedule, 1.0, eps)[1] * eps


def _forgotten(schedule, t, s):
    """sqrt(1 - c): the part of the noise at t, or at s, that the other one does not determine."""
    return jnp.sqrt(-jnp.expm1(schedule.log_snr(t) - schedule.log_snr(s)))
