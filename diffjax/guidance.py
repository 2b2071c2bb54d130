"""Guidance: functions from denoiser to denoiser that steer sampling.

They compose: the first argument of each is the denoiser that it guides, which may already be
guided. Some also take the denoiser without guidance, as a reference or for other noise levels.

    guided = diffjax.classifier_free(denoise, weight=3.0, null={"label": 10})
    guided = diffjax.within(guided, denoise, schedule, low=-2.0, high=4.0)

Those of `STEP_GUIDANCES` depend on the step, from t to s, or on earlier steps. They take the
function that makes the sampler, and return the sampler:

    walk = diffjax.cfg_plus_plus(diffjax.ddim, denoise, schedule, weight=0.6, null={"label": 10})

A config gives a chain by the names in both tables.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from . import checks
from .denoisers import (
    add_score,
    bound_cond,
    known_schedule,
    predict,
    schedule_of,
    with_schedule,
    with_x_0,
)
from .process import scales_at
from .samplers.walk import Sampler
from .schedules import Schedule
from .targets import decode
from .types import Array, Cond, Data, Denoiser, Scalar, Time, expand, known, select, whole


def classifier_free(
    denoise: Denoiser, weight: Time, null: Cond, channels: int | None = None
) -> Denoiser:
    """Classifier-free guidance: (1 - w) unconditional + w conditional, in one call.

    Args:
      denoise: a denoiser trained with and without its conditioning.
      weight: w, `[]` or `[batch]`; 0 is unconditional, 1 is conditional, and more than 1 amplifies
        the effect of the condition (Ho & Salimans 2022, section 3.2, whose w is this w - 1).
      null: the conditioning that means "no condition", a pytree like `cond` whose leaves broadcast
        against those of `cond`, such as the label after the last class for the networks of
        `models`, which refuse any other; a function that makes it of `cond`, to keep a part of
        that; or None, if the network takes None for this, which is then called twice.
      channels: guide this many leading channels, and leave the others as the condition has them;
        None guides all. The published samplers of DiT and SiT guide 3 of the 4 channels of latents.

    Raises:
      ValueError: unless `channels` is a whole number of at least 1; when called, if `cond` is not a
        pytree like `null`, or if x_t has fewer channels.
    """
    if not (channels is None or whole(channels)):
        raise ValueError(f"{channels=}: must be a whole number of at least 1, or None")
    both = _with_and_without(denoise, null)

    def guided(x_t, t, cond=None):
        w = expand(weight, x_t)
        if channels is not None:
            if channels > x_t.shape[-1]:
                raise ValueError(f"{channels=}: x_t has {x_t.shape[-1]}")
            w = jnp.where(jnp.arange(x_t.shape[-1]) < channels, w, 1.0).astype(x_t.dtype)
        return _extrapolate(*both(x_t, t, cond), w)

    return _like(denoise, guided)


def apg(
    denoise: Denoiser,
    schedule: Schedule,
    weight: Time,
    null: Cond,
    eta: Scalar = 0.0,
    radius: Scalar = math.inf,
) -> Denoiser:
    """Adaptive projected guidance: classifier-free guidance that saturates less.

    The difference of the two estimates of x_0 is shortened to a radius, and the part of it that is
    parallel to the conditional estimate, which raises the contrast, is scaled by eta (Sadat et al.
    2025, arXiv 2410.02416; with their momentum it is `apg_momentum`). With `eta=1` and no radius it
    is `classifier_free`.

    Args:
      denoise: a denoiser trained with and without its conditioning.
      schedule: its `Schedule`.
      weight: w, `[]` or `[batch]`, as in `classifier_free`.
      null: the conditioning that means "no condition", as in `classifier_free`.
      eta: factor on the parallel part.
      radius: the largest norm of an example's difference.

    Raises:
      ValueError: unless `radius > 0`; when called, if `cond` is not a pytree like `null`.
    """
    return _apg(denoise, schedule, weight, null, eta, radius, lambda difference: difference)


def _apg(denoise, schedule, weight, null, eta, radius, change):
    """`apg`, with a change of the difference of the two estimates of x_0 before the projection."""
    if known(radius) and not radius > 0:
        raise ValueError(f"{radius=}: must be positive")
    schedule, both = schedule_of(denoise, schedule), _with_and_without(denoise, null)

    def guided(x_t, t, cond=None):
        without, given = both(x_t, t, cond)
        step = change(given.x_0 - without.x_0)
        step *= jnp.minimum(1, radius / jnp.sqrt(jnp.maximum(_product(step, step), 1e-20)))
        along = _product(step, given.x_0) / jnp.maximum(_product(given.x_0, given.x_0), 1e-20)
        x_0 = given.x_0 + (expand(weight, x_t) - 1) * (step - (1 - eta) * along * given.x_0)
        return given._replace(
            x_0=x_0, eps=decode("x_0", x_0, x_t, *scales_at(schedule, t, x_t)).eps
        )

    return with_schedule(schedule, guided)


def cfg_zero(
    denoise: Denoiser,
    schedule: Schedule,
    weight: Time,
    null: Cond,
    zero_below: Scalar = -math.inf,
) -> Denoiser:
    """CFG-Zero*: guide the velocity eps - x_0, whose unconditional part is rescaled first.

    The factor <v_c, v_u> / <v_u, v_u> makes the unconditional velocity the nearest to the
    conditional one, so that guidance amplifies the difference in direction alone. The first steps
    of a walk can stand still, where an estimate is worse than none (Fan et al. 2025, arXiv
    2503.18886; they stop for the first 4 % of the times).

    Args:
      denoise: a denoiser trained with and without its conditioning.
      schedule: its `Schedule`.
      weight: w, `[]` or `[batch]`, as in `classifier_free`.
      null: the conditioning that means "no condition", as in `classifier_free`.
      zero_below: the log-SNR below which the velocity is zero; none by default.

    Raises:
      ValueError: when called, if `cond` is not a pytree like `null`.
    """
    schedule, both = schedule_of(denoise, schedule), _with_and_without(denoise, null)

    def guided(x_t, t, cond=None):
        without, given = both(x_t, t, cond)
        v_u, v_c = without.eps - without.x_0, given.eps - given.x_0
        factor = _product(v_c, v_u) / (_product(v_u, v_u) + 1e-8)
        w = expand(weight, x_t)
        v = (1 - w) * factor * v_u + w * v_c
        v = jnp.where(expand(schedule.log_snr(t) < zero_below, x_t), 0.0, v)
        alpha, sigma = scales_at(schedule, t, x_t)
        x_0 = (x_t - sigma * v) / (alpha + sigma)  # x_t = alpha x_0 + sigma (x_0 + v)
        return given._replace(x_0=x_0, eps=x_0 + v)

    return with_schedule(schedule, guided)


def _with_and_without(denoise, null):
    """(x_t, t, cond) -> the predictions without and with the condition, by one call if possible."""
    checks.takes(denoise, None, None, cond=None)

    def apart(x_t, t, cond=None):
        return denoise(x_t, t, cond=None), predict(denoise, x_t, t, cond)

    def together(x_t, t, cond=None):
        cond = bound_cond(denoise) if cond is None else cond
        nothing = null(cond) if callable(null) else null
        if jax.tree.structure(cond) != jax.tree.structure(nothing):
            raise ValueError(f"guidance needs a cond like its null {nothing!r}, got {cond!r}")
        # The two copies of an example are neighbours, so that a batch split over devices stays in
        # place.
        twice = lambda a, b: jnp.stack([a, b], 1).reshape(2 * len(a), *a.shape[1:])
        with jax.ensure_compile_time_eval():  # so that the network can check what is concrete
            pair = lambda c, n: twice(c, jnp.broadcast_to(n, jnp.shape(c)))
            conds = jax.tree.map(pair, cond, nothing)
        both = predict(denoise, twice(x_t, x_t), t if jnp.ndim(t) == 0 else twice(t, t), conds)
        given, without = (jax.tree.map(lambda a, i=i: a[i::2], both) for i in (0, 1))
        return without, given

    return apart if null is None else together


def _product(a, b):
    """The scalar product of each example of two batches, which broadcasts against them."""
    return jnp.sum(a * b, axis=tuple(range(1, a.ndim)), keepdims=True)


def autoguidance(denoise: Denoiser, weaker: Denoiser, weight: Time) -> Denoiser:
    """Guide a denoiser away from a weaker one: (1 - w) weaker + w denoise.

    Karras et al. 2024, "Guiding a diffusion model with a bad version of itself".
    `classifier_free` is the case in which the weaker denoiser is the unconditional one.

    Args:
      denoise: a denoiser.
      weaker: a smaller or less trained denoiser for the same task and schedule.
      weight: w, `[]` or `[batch]`; 1 is no guidance.

    Raises:
      ValueError: if the two carry different schedules.
    """
    if None not in (known_schedule(denoise), known_schedule(weaker)):
        schedule_of(weaker, known_schedule(denoise))

    def guided(x_t, t, cond=None):
        without, given = predict(weaker, x_t, t, cond), predict(denoise, x_t, t, cond)
        return _extrapolate(without, given, expand(weight, x_t))

    return _like(denoise, guided)


def _like(denoise, guided):
    """The guided denoiser, with the schedule that the unguided one carries."""
    return with_schedule(known_schedule(denoise), guided)


def _extrapolate(without, given, w):
    mix = lambda field: (1 - w) * getattr(without, field) + w * getattr(given, field)
    return given._replace(x_0=mix("x_0"), eps=mix("eps"))


def classifier_guidance(
    denoise: Denoiser,
    schedule: Schedule,
    log_prob: Callable[[Data, Time, Cond], Array],
    weight: Time = 1.0,
) -> Denoiser:
    """Add w grad log p(y | x_t), from a classifier of noisy data, to the score.

    Dhariwal & Nichol 2021, "Diffusion models beat GANs", Algorithm 2: eps - sigma w grad.

    Args:
      denoise: a denoiser.
      schedule: its `Schedule`.
      log_prob: (x_t, t, cond) -> log p(y | x_t) of each example, `[batch]`; y may be fixed or
        part of `cond`.
      weight: w, `[]` or `[batch]`; 1 is Bayes' rule, 0 is no guidance.
    """
    schedule = schedule_of(denoise, schedule)

    def guided(x_t, t, cond=None):
        cond = bound_cond(denoise) if cond is None else cond
        slope = jax.grad(lambda x: log_prob(x, t, cond).sum())(x_t)
        score = expand(weight, x_t) * slope
        return add_score(predict(denoise, x_t, t, cond), schedule, t, score)

    return with_schedule(schedule, guided)


def within(
    guided: Denoiser, denoise: Denoiser, schedule: Schedule, low: Scalar, high: Scalar
) -> Denoiser:
    """Guide at some noise levels only: `guided` where low <= log-SNR <= high, else `denoise`.

    Kynkaanniemi et al. 2024, "Applying guidance in a limited interval". With one time for the whole
    batch, as in `sample`, only the denoiser that is needed is evaluated.

    Args:
      guided: a denoiser with guidance.
      denoise: the same denoiser without guidance.
      schedule: their `Schedule`.
      low: the smallest log-SNR at which to guide.
      high: the largest log-SNR at which to guide.

    Raises:
      ValueError: unless `low < high`, and some log-SNR of the schedule is between them.
    """
    if known(low, high) and not low < high:
        raise ValueError(f"{low=} must be below {high=}, in log-SNR")
    schedule = schedule_of(denoise, schedule_of(guided, schedule))
    with jax.ensure_compile_time_eval():
        least, most = schedule.log_snr(1.0), schedule.log_snr(0.0)
    if known(low, high, least, most) and not (low <= float(most) and float(least) <= high):
        raise ValueError(
            f"{low=}, {high=}: the schedule has log-SNR from {float(least):.3g} to "
            f"{float(most):.3g}, and none between them"
        )

    def inside(x_t, t, cond=None):
        log_snr = schedule.log_snr(t)
        chosen = (low <= log_snr) & (log_snr <= high)
        if jnp.ndim(chosen) == 0:
            return jax.lax.cond(
                chosen,
                lambda: predict(guided, x_t, t, cond),
                lambda: predict(denoise, x_t, t, cond),
            )
        return select(chosen, predict(guided, x_t, t, cond), predict(denoise, x_t, t, cond))

    return with_schedule(schedule, inside)


def rescale(
    guided: Denoiser, denoise: Denoiser, schedule: Schedule, amount: Scalar = 0.7
) -> Denoiser:
    """Give each example's guided x_0 the standard deviation that it has without guidance.

    Lin et al. 2024, "Common diffusion noise schedules and sample steps are flawed", section 3.4,
    applied to x_0: strong guidance otherwise overexposes images.

    Args:
      guided: a denoiser with guidance.
      denoise: the same denoiser without guidance.
      schedule: their `Schedule`.
      amount: strength, from 0 (no change) to 1.

    Raises:
      ValueError: unless `0 <= amount <= 1`.
    """
    if known(amount) and not 0 <= amount <= 1:
        raise ValueError(f"{amount=}: must be in [0, 1]")

    def rescaled(x_0, x_t, t, cond):
        variance = lambda x: jnp.var(x, axis=tuple(range(1, x.ndim)), keepdims=True) + 1e-12
        factor = jnp.sqrt(variance(predict(denoise, x_t, t, cond).x_0) / variance(x_0))
        return x_0 * (1 + amount * (factor - 1))

    return with_x_0(guided, schedule, rescaled)


def dynamic_threshold(
    denoise: Denoiser, schedule: Schedule, quantile: Scalar = 0.995, limit: Scalar = 1.0
) -> Denoiser:
    """Clip an x_0 that exceeds the data's range at a quantile, and scale it back into the range.

    Saharia et al. 2022, "Photorealistic text-to-image diffusion models", section 2.3: let s be a
    quantile of |x_0| over the example, but at least `limit`; then x_0 becomes
    clip(x_0, -s, s) limit / s. Guided samples saturate less than with `clip_x_0`.

    Args:
      denoise: a denoiser.
      schedule: its `Schedule`.
      quantile: a number from 0 to 1; 1 only scales, and does not clip.
      limit: the largest absolute value of the data.

    Raises:
      ValueError: unless `0 <= quantile <= 1` and `limit > 0`.
    """
    if known(quantile) and not 0 <= quantile <= 1:
        raise ValueError(f"{quantile=}: must be in [0, 1]")
    if known(limit) and not limit > 0:
        raise ValueError(f"{limit=}: must be positive")

    def shrink(x_0, x_t, t, cond):
        size = jnp.abs(x_0).reshape(len(x_0), -1)
        part = jnp.asarray(quantile, size.dtype)  # which may be the whole number 1
        s = expand(jnp.maximum(jnp.quantile(size, part, axis=1), limit), x_0)
        return jnp.clip(x_0, -s, s) * (limit / s)

    return with_x_0(denoise, schedule, shrink)


MakeSampler = Callable[[Denoiser, Schedule], Sampler]


def cfg_plus_plus(
    make: MakeSampler, denoise: Denoiser, schedule: Schedule, weight: Time, null: Cond
) -> Sampler:
    """CFG++: guide the estimate of x_0, and add the noise of the unconditional estimate.

    In a step of DDIM from t to s, x_s = alpha_s (x_0 of weight lambda) + sigma_s (eps of weight 0).
    That is the step of `classifier_free` with w = lambda / (1 - exp((l_t - l_s) / 2)), where l is
    the log-SNR, so that the weight grows as the steps become shorter. In this form it applies to
    every sampler.

    Args:
      make: (denoise, schedule) -> `Sampler`, such as `ddim`.
      denoise: a denoiser trained with and without its conditioning.
      schedule: its `Schedule`.
      weight: lambda, `[]` or `[batch]`, from 0, which is unconditional, to 1.
      null: the conditioning that means "no condition", as in `classifier_free`.

    Raises:
      ValueError: if `weight` is one number outside of [0, 1].

    Source: Chung et al. 2025, "CFG++: manifold-constrained classifier free guidance", arXiv
    2406.08070.
    """
    if known(weight) and jnp.ndim(weight) == 0 and not 0 <= weight <= 1:
        raise ValueError(f"{weight=}: that of cfg_plus_plus is from 0 to 1")
    schedule = schedule_of(denoise, schedule)

    def step(key, state, t, s):
        w = weight / -jnp.expm1((schedule.log_snr(t) - schedule.log_snr(s)) / 2)
        return make(classifier_free(denoise, w, null), schedule).step(key, state, t, s)

    unguided = make(denoise, schedule)
    return Sampler(unguided.init, step, unguided.stochastic)


def apg_momentum(
    make: MakeSampler,
    denoise: Denoiser,
    schedule: Schedule,
    weight: Time,
    null: Cond,
    momentum: Scalar = -0.5,
    eta: Scalar = 0.0,
    radius: Scalar = math.inf,
) -> Sampler:
    """`apg` with momentum: add a multiple of the difference of the evaluation before.

    With d the difference of the two estimates of x_0, d + momentum (that of the evaluation before)
    takes its place. Negative momentum takes away what was already added (Sadat et al. 2025, arXiv
    2410.02416, section 4). The difference stays in the state's memory from step to step.

    Args:
      make: (denoise, schedule) -> `Sampler`, such as `ddim`.
      denoise: a denoiser trained with and without its conditioning.
      schedule: its `Schedule`.
      weight: w, `[]` or `[batch]`, as in `classifier_free`.
      null: the conditioning that means "no condition", as in `classifier_free`.
      momentum: 0 is `apg`.
      eta: factor on the parallel part.
      radius: the largest norm of an example's difference.

    Raises:
      ValueError: unless `radius > 0` and `-1 < momentum < 1`.
    """
    if known(momentum) and not -1 < momentum < 1:
        raise ValueError(f"{momentum=}: must be in (-1, 1)")

    def guided(change):
        return _apg(denoise, schedule, weight, null, eta, radius, change)

    unguided = make(guided(lambda difference: difference), schedule)

    def init(x_1):
        state = unguided.init(x_1)
        return state._replace(memory=(state.memory, jnp.zeros_like(x_1)))

    def step(key, state, t, s):
        memory, difference = state.memory

        def change(new):
            nonlocal difference
            difference = new + momentum * difference
            return difference

        state = make(guided(change), schedule).step(key, state._replace(memory=memory), t, s)
        return state._replace(memory=(state.memory, difference))

    return Sampler(init, step, unguided.stochastic)


GUIDANCES: dict[str, Callable[..., Denoiser]] = {
    "classifier_free": classifier_free,
    "apg": apg,
    "cfg_zero": cfg_zero,
    "autoguidance": autoguidance,
    "within": within,
    "rescale": rescale,
    "dynamic_threshold": dynamic_threshold,
}
"""The guidances that a config may chain. The first argument of each is the denoiser that it guides.
The run supplies `denoise` (the denoiser without guidance), `schedule`, `null` and `weaker`; every
other argument is an option."""

STEP_GUIDANCES: dict[str, Callable[..., Sampler]] = {
    "cfg_plus_plus": cfg_plus_plus,
    "apg_momentum": apg_momentum,
}
"""The guidances of a whole step, one of which may begin a chain. The run supplies `make`,
`denoise`, `schedule` and `null`."""

__all__ = ["GUIDANCES", "STEP_GUIDANCES", "classifier_guidance", *GUIDANCES, *STEP_GUIDANCES]
