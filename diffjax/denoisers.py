"""From networks to denoisers: `denoise(x_t, t, cond) -> Prediction(x_0, eps)`.

A sampler calls a denoiser and never learns what the network behind it predicts. Clipping, and all of
`guidance`, takes a denoiser and returns a denoiser, so they compose;
`functools.partial(denoise, cond=...)` binds the conditioning.
"""

from collections.abc import Callable

import jax.numpy as jnp

from .process import scales_at
from .schedules import Schedule, time_at
from .targets import Row, decode, row, unit_variance
from .types import (
    Data,
    Denoiser,
    LearnedPrediction,
    Network,
    Prediction,
    Scalar,
    Time,
    expand,
    known,
)


def denoiser(
    network: Network, schedule: Schedule, target: str | Row, *, learned_variance: bool = False
) -> Denoiser:
    """Give a network its meaning: decode its output into x_0 and eps.

    Args:
      network: (x_t `[batch, ...]`, log_snr `[batch]`, cond) -> an estimate of the target.
      schedule: the `Schedule` it was trained with.
      target: what it was trained to predict, a name in `TARGETS` or a row function.
      learned_variance: whether the last axis of its output is twice as long, the second half
        saying where the decoder's variance lies: v in [-1, 1], and (v + 1) / 2 is the `fraction`
        of a `LearnedPrediction` (improved-diffusion's convention).

    Raises:
      ValueError: if the target is unknown; when called, if the network's output has not the shape.

    >>> import diffjax
    >>> schedule = diffjax.cosine()
    >>> zero = lambda x_t, log_snr, cond: 0 * x_t
    >>> denoise = denoiser(zero, schedule, "eps")
    >>> denoise(jnp.ones((1, 2)), 0.5).x_0  # x_t / alpha_t
    Array([[1.4142135, 1.4142135]], dtype=float32)
    """
    row(target)

    def denoise(x_t, t, cond=None):
        log_snr = jnp.broadcast_to(schedule.log_snr(t), x_t.shape[:1])
        out = network(x_t, log_snr, cond).astype(jnp.result_type(x_t))
        scales = scales_at(schedule, t, x_t)
        if not learned_variance:
            return decode(target, _shaped(out, x_t, 1), x_t, *scales)
        out, raw = jnp.split(_shaped(out, x_t, 2), 2, axis=-1)
        return LearnedPrediction(*decode(target, out, x_t, *scales), (raw + 1) / 2)

    return denoise


def _shaped(out, x_t, factor):
    expected = (*x_t.shape[:-1], factor * x_t.shape[-1])
    if out.shape != expected:
        why = "" if factor == 1 else ", twice the channels for a learned variance"
        raise ValueError(f"the network gave {out.shape} for data {x_t.shape}: need {expected}{why}")
    return out


def unit_output(network: Network, target: str | Row, schedule: Schedule) -> Network:
    """Scale a network's output by sqrt(a^2 + b^2), so that it need only produce numbers near one.

    A score spans 1 to 1800 over log-SNR in [-15, 15]; for it this is the division by sigma of Song
    & Ermon 2020, "Improved techniques for training score-based generative models", technique 3.
    Train and sample with the same wrapping.

    Raises:
      ValueError: if the target is unknown.
    """
    row(target)  # refused now if it is unknown

    def scaled(x_t, log_snr, cond):
        variance = unit_variance(target, *schedule.scales(log_snr))
        return expand(jnp.sqrt(variance), x_t) * network(x_t, log_snr, cond)

    return scaled


def unit_input(network: Network, schedule: Schedule, sigma_data: Scalar = 0.5) -> Network:
    """Scale a network's input to variance one: divide by sqrt(alpha^2 sigma_data^2 + sigma^2).

    With target "F" (of the same sigma_data) this is the preconditioning of Karras et al. 2022,
    equation 7: c_in before the network, c_skip and c_out behind it; the network sees log-SNR, where
    theirs sees c_noise = log(sigma / alpha) / 4 = -log_snr / 8. Train and sample with the same
    wrapping.

    Args:
      network: (x_t, log_snr `[batch]`, cond) -> an estimate of the target.
      schedule: the `Schedule` it is trained with.
      sigma_data: standard deviation of the data.
    """

    def scaled(x_t, log_snr, cond):
        alpha, sigma = schedule.scales(log_snr)
        std = jnp.hypot(alpha * sigma_data, sigma)
        return network(x_t / expand(std, x_t), log_snr, cond)

    return scaled


def time_input(network: Network, schedule: Schedule, steps: int) -> Network:
    """Let a network see its discrete time, 0 to T - 1 as t goes from 1/T to 1, in place of log-SNR.

    What DDPM's descendants see, here at any time between too: steps t - 1, with the t at which the
    schedule has the log-SNR. Train and sample with the same wrapping.

    Args:
      network: (x_t, time `[batch]`, cond) -> an estimate of the target.
      schedule: the `Schedule` it is trained with, such as `from_betas`.
      steps: T.
    """
    return lambda x_t, log_snr, cond: network(x_t, steps * time_at(schedule, log_snr) - 1, cond)


def clip_x_0(
    denoise: Denoiser, schedule: Schedule, low: Scalar = -1.0, high: Scalar = 1.0
) -> Denoiser:
    """Clip the estimate of x_0 to the range of the data, and let eps follow.

    Ho et al. 2020, as in their code ("clip_denoised"); static thresholding in Saharia et al. 2022.

    Args:
      denoise: a denoiser.
      schedule: its `Schedule`.
      low: the least value of the data.
      high: the greatest.

    Raises:
      ValueError: unless `low < high`.
    """
    if known(low, high) and low >= high:
        raise ValueError(f"{low=} must be below {high=}")
    return with_x_0(denoise, schedule, lambda x_0, x_t, t, cond: jnp.clip(x_0, low, high))


def add_score(
    prediction: Prediction | LearnedPrediction, schedule: Schedule, t: Time, score: Data
) -> Prediction | LearnedPrediction:
    """The prediction whose score is `score` more: eps - sigma score, and x_0 follows.

    Args:
      prediction: at some x_t.
      schedule: its `Schedule`.
      t: times `[]` or `[batch]`.
      score: what to add, `[batch, ...]`.
    """
    alpha, sigma = scales_at(schedule, t, score)
    return prediction._replace(
        x_0=prediction.x_0 + sigma**2 / alpha * score, eps=prediction.eps - sigma * score
    )


def with_x_0(denoise: Denoiser, schedule: Schedule, change: Callable[..., Data]) -> Denoiser:
    """A denoiser whose x_0 is changed, and whose eps follows.

    Args:
      denoise: a denoiser.
      schedule: its `Schedule`.
      change: (x_0, x_t, t, cond) -> the new estimate of x_0.
    """

    def changed(x_t, t, cond=None):
        prediction = denoise(x_t, t, cond)
        x_0 = change(prediction.x_0, x_t, t, cond)
        eps = decode("x_0", x_0, x_t, *scales_at(schedule, t, x_t)).eps
        return prediction._replace(x_0=x_0, eps=eps)

    return changed
