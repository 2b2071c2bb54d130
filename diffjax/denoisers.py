"""From networks to denoisers, and from denoisers to denoisers.

A sampler calls `denoise(x_t, t, cond) -> Prediction(x_0, eps)` and never learns what the network
behind it predicts. Guidance and clipping take a denoiser and return a denoiser, so they compose;
`functools.partial(denoise, cond=...)` binds the conditioning.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from .process import scales_at
from .schedules import Schedule, time_at
from .targets import Row, decode, row, unit_variance
from .types import (
    Array,
    Cond,
    Data,
    Denoiser,
    LearnedPrediction,
    Network,
    Prediction,
    Scalar,
    Time,
    expand,
    known,
    select,
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
    return _with_x_0(denoise, schedule, lambda x_0, x_t, t, cond: jnp.clip(x_0, low, high))


def dynamic_threshold(
    denoise: Denoiser, schedule: Schedule, quantile: Scalar = 0.995, limit: Scalar = 1.0
) -> Denoiser:
    """Where an example's x_0 leaves the data's range, clip at a quantile and scale back into it.

    Saharia et al. 2022, "Photorealistic text-to-image diffusion models", section 2.3: with s a
    quantile of |x_0| over the example, but at least `limit`, x_0 becomes clip(x_0, -s, s) limit / s
    and guided samples saturate less than with `clip_x_0`.

    Args:
      denoise: a denoiser.
      schedule: its `Schedule`.
      quantile: from 0 to 1, which only scales.
      limit: the greatest absolute value of the data.

    Raises:
      ValueError: unless `0 <= quantile <= 1` and `limit > 0`.
    """
    if known(quantile) and not 0 <= quantile <= 1:
        raise ValueError(f"{quantile=}: must be in [0, 1]")
    if known(limit) and limit <= 0:
        raise ValueError(f"{limit=}: must be positive")

    def shrink(x_0, x_t, t, cond):
        size = jnp.abs(x_0).reshape(len(x_0), -1)
        s = expand(jnp.maximum(jnp.quantile(size, quantile, axis=1), limit), x_0)
        return jnp.clip(x_0, -s, s) * (limit / s)

    return _with_x_0(denoise, schedule, shrink)


def rescale(
    guided: Denoiser, denoise: Denoiser, schedule: Schedule, amount: Scalar = 0.7
) -> Denoiser:
    """Give each example's guided x_0 the standard deviation it has without guidance.

    Lin et al. 2024, "Common diffusion noise schedules and sample steps are flawed", section 3.4,
    on x_0: strong guidance otherwise overexposes.

    Args:
      guided: a denoiser with guidance.
      denoise: the same without.
      schedule: their `Schedule`.
      amount: how far to go, from 0, not at all, to 1.

    Raises:
      ValueError: unless `0 <= amount <= 1`.
    """
    if known(amount) and not 0 <= amount <= 1:
        raise ValueError(f"{amount=}: must be in [0, 1]")

    def rescaled(x_0, x_t, t, cond):
        variance = lambda x: jnp.var(x, axis=tuple(range(1, x.ndim)), keepdims=True) + 1e-12
        factor = jnp.sqrt(variance(denoise(x_t, t, cond).x_0) / variance(x_0))
        return x_0 * (1 + amount * (factor - 1))

    return _with_x_0(guided, schedule, rescaled)


def classifier_free(denoise: Denoiser, weight: Time, null: Cond) -> Denoiser:
    """Classifier-free guidance: (1 - w) unconditional + w conditional, in one call.

    Args:
      denoise: a denoiser trained with and without its conditioning.
      weight: w, `[]` or `[batch]`; 0 is unconditional, 1 conditional, above 1 exaggerates the
        condition. (Ho & Salimans 2022, section 3.2, with their w = this one - 1.)
      null: the conditioning that means "none", a pytree like `cond` whose leaves broadcast
        against cond's; None if the network takes None for it, which then is called twice.

    Raises:
      ValueError: when called, if `cond` is not a pytree like `null`.
    """
    if null is None:
        return autoguidance(denoise, lambda x_t, t, cond=None: denoise(x_t, t), weight)

    def guided(x_t, t, cond=None):
        if jax.tree.structure(cond) != jax.tree.structure(null):
            raise ValueError(f"guidance needs a cond like its null {null!r}, got {cond!r}")
        # Each example beside itself, so that one split over devices stays where it is.
        twice = lambda a, b: jnp.stack([a, b], 1).reshape(2 * len(a), *a.shape[1:])
        conds = jax.tree.map(lambda c, n: twice(c, jnp.broadcast_to(n, jnp.shape(c))), cond, null)
        both = denoise(twice(x_t, x_t), t if jnp.ndim(t) == 0 else twice(t, t), conds)
        given, without = (jax.tree.map(lambda a, i=i: a[i::2], both) for i in (0, 1))
        return _extrapolate(without, given, expand(weight, x_t))

    return guided


def autoguidance(denoise: Denoiser, weaker: Denoiser, weight: Time) -> Denoiser:
    """Guide a denoiser away from a weaker one: (1 - w) weaker + w denoise.

    Karras et al. 2024, "Guiding a diffusion model with a bad version of itself".
    `classifier_free` is this with the unconditional denoiser for the weaker one.

    Args:
      denoise: a denoiser.
      weaker: a smaller or less trained one of the same task and schedule.
      weight: w, `[]` or `[batch]`; 1 is no guidance.
    """

    def guided(x_t, t, cond=None):
        without, given = weaker(x_t, t, cond), denoise(x_t, t, cond)
        return _extrapolate(without, given, expand(weight, x_t))

    return guided


def _extrapolate(without, given, w):
    mix = lambda field: (1 - w) * getattr(without, field) + w * getattr(given, field)
    return given._replace(x_0=mix("x_0"), eps=mix("eps"))


def classifier_guidance(
    denoise: Denoiser,
    schedule: Schedule,
    log_prob: Callable[[Data, Time, Cond], Array],
    weight: Time = 1.0,
) -> Denoiser:
    """Add w grad log p(y | x_t), by a classifier of noisy data, to the score.

    Dhariwal & Nichol 2021, "Diffusion models beat GANs", Algorithm 2: eps - sigma w grad.

    Args:
      denoise: a denoiser.
      schedule: its `Schedule`.
      log_prob: (x_t, t, cond) -> log p(y | x_t) of each example, `[batch]`; what y is, it takes
        from `cond` or knows.
      weight: w, `[]` or `[batch]`; 1 is Bayes' rule, 0 no guidance.
    """

    def guided(x_t, t, cond=None):
        slope = jax.grad(lambda x: log_prob(x, t, cond).sum())(x_t)
        return add_score(denoise(x_t, t, cond), schedule, t, expand(weight, x_t) * slope)

    return guided


def within(
    guided: Denoiser, denoise: Denoiser, schedule: Schedule, low: Scalar, high: Scalar
) -> Denoiser:
    """Guide at some noise levels only: `guided` where low <= log-SNR <= high, else `denoise`.

    Kynkaanniemi et al. 2024, "Applying guidance in a limited interval". With one time for the whole
    batch, as in `sample`, only the one that is needed is evaluated.

    Args:
      guided: a denoiser with guidance.
      denoise: the same without.
      schedule: their `Schedule`.
      low: the least log-SNR to guide at.
      high: the greatest.

    Raises:
      ValueError: unless `low < high`.
    """
    if known(low, high) and low >= high:
        raise ValueError(f"{low=} must be below {high=}, in log-SNR")

    def inside(x_t, t, cond=None):
        log_snr = schedule.log_snr(t)
        chosen = (low <= log_snr) & (log_snr <= high)
        if jnp.ndim(chosen) == 0:
            return jax.lax.cond(chosen, lambda: guided(x_t, t, cond), lambda: denoise(x_t, t, cond))
        return select(chosen, guided(x_t, t, cond), denoise(x_t, t, cond))

    return inside


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


def _with_x_0(denoise, schedule, change):
    """Another estimate of x_0, change(x_0, x_t, t, cond); eps follows, all else stays."""

    def changed(x_t, t, cond=None):
        prediction = denoise(x_t, t, cond)
        x_0 = change(prediction.x_0, x_t, t, cond)
        eps = decode("x_0", x_0, x_t, *scales_at(schedule, t, x_t)).eps
        return prediction._replace(x_0=x_0, eps=eps)

    return changed
