"""From networks to denoisers: `denoise(x_t, t, cond) -> Prediction(x_0, eps)`.

A sampler calls a denoiser, so it does not depend on the target of the network. Clipping and the
functions of `guidance` take a denoiser and return a denoiser, so they compose.
`functools.partial(denoise, cond=...)` binds the conditioning, before such functions or after them.

A denoiser carries its schedule in the attribute `schedule`, which these functions pass on. Where a
schedule is an argument too, it must be the same; it may be None if the denoiser carries one. The
attribute `two_times` says whether it is a flow map, which predicts whole steps (`flow_maps`).
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import checks
from .process import scales_at
from .schedules import Schedule, time_at
from .targets import Row, decode, row, unit_variance
from .types import (
    Array,
    Cond,
    Data,
    Denoiser,
    FlowMap,
    LearnedPrediction,
    Network,
    Prediction,
    Real,
    Scalar,
    Time,
    check_times,
    expand,
    known,
)


def denoiser(
    network: Network, schedule: Schedule, target: str | Row, *, learned_variance: bool = False
) -> Denoiser:
    """Make a denoiser from a network: decode its output into x_0 and eps.

    Args:
      network: (x_t `[batch, ...]`, log_snr `[batch]`, cond) -> an estimate of the target.
      schedule: the `Schedule` it was trained with.
      target: the target it was trained on, a name in `TARGETS` or a row function. For "eps" and
        "score" the estimate of x_0 divides by alpha: at a log-SNR of -24, as at the end of a table
        with zero terminal SNR, an error of the network is multiplied by 160,000. v and x_0 have no
        such factor.
      learned_variance: whether the last axis of its output is twice as long, and the second half
        gives the decoder's variance: v in [-1, 1], where (v + 1) / 2 is the `fraction` of a
        `LearnedPrediction` (improved-diffusion's convention).

    Raises:
      TypeError: if the network or the schedule is something else, such as the other one.
      ValueError: if the target is unknown; when called, if the network's output has a wrong shape.

    >>> import diffjax
    >>> schedule = diffjax.cosine()
    >>> zero = lambda x_t, log_snr, cond: 0 * x_t
    >>> denoise = denoiser(zero, schedule, "eps")
    >>> denoise(jnp.ones((1, 2)), 0.5).x_0  # x_t / alpha_t
    Array([[1.4142135, 1.4142135]], dtype=float32)
    """
    checks.network(network)
    checks.schedule(schedule)
    row(target)

    def denoise(x_t, t, cond=None):
        check_times(t, len(x_t))
        log_snr = jnp.broadcast_to(schedule.log_snr(t), x_t.shape[:1])
        out = call(network, x_t, log_snr, cond).astype(jnp.result_type(x_t))
        scales = scales_at(schedule, t, x_t)
        if not learned_variance:
            return decode(target, _shaped(out, x_t, 1), x_t, *scales)
        out, raw = jnp.split(_shaped(out, x_t, 2), 2, axis=-1)
        return LearnedPrediction(*decode(target, out, x_t, *scales), (raw + 1) / 2)

    return with_schedule(schedule, denoise)


def flow_map(network: Network, schedule: Schedule, target: str | Row) -> FlowMap:
    """Make a flow map from a network of two times: decode its output into x_0 and eps.

    Args:
      network: (x_t `[batch, ...]`, log_snr `[batch]`, cond) -> an estimate of the target, where
        `cond["log_snr_s"]` `[batch]` is the log-SNR at which the step ends.
      schedule: the `Schedule` it was trained with.
      target: the target, a name in `TARGETS` or a row function. For s other than t, the best output
        is a mean of the target along the path from t to s.

    Returns:
      A function (x_t, t, cond=None, s=None) -> `Prediction`; with s=None it is a `Denoiser`.

    Raises:
      TypeError, ValueError: as `denoiser`; when called, a TypeError if `cond` is no dict.

    >>> import diffjax
    >>> network = lambda x_t, log_snr, cond: jnp.tanh(cond["log_snr_s"])[:, None] * x_t
    >>> jump = diffjax.jump(flow_map(network, diffjax.cosine(), "v"))
    >>> diffjax.sample(jax.random.key(1), jump, jnp.ones((4, 2)), jnp.array([1.0, 0.0]))[0].shape
    (4, 2)
    """
    denoise = denoiser(network, schedule, target)

    def mean(x_t, t, cond=None, s=None):
        if not (cond is None or isinstance(cond, dict)):
            raise TypeError(f"cond is a {type(cond).__name__}: a flow map needs a dict, or None")
        s = t if s is None else s
        check_times(s, len(x_t))
        log_snr_s = jnp.broadcast_to(schedule.log_snr(s), x_t.shape[:1])
        return denoise(x_t, t, {**(cond or {}), "log_snr_s": log_snr_s})

    with_schedule(schedule, mean, two_times=True)
    return mean


def with_schedule(schedule: Schedule | None, denoise: Any, two_times: bool = False) -> Denoiser:
    """Set the attributes `schedule` and `two_times` of a function, in place; return it."""
    denoise.schedule, denoise.two_times = schedule, two_times
    return denoise


def schedule_of(denoise: Denoiser, schedule: Schedule | None = None) -> Schedule:
    """The schedule that a denoiser carries, or `schedule` if it carries none.

    Raises:
      TypeError: if `schedule` is no schedule.
      ValueError: if there is neither, or the two differ (where neither is traced).
    """
    if schedule is not None:
        checks.schedule(schedule)
    own = known_schedule(denoise)
    if own is None or schedule is None:
        either = own or schedule
        if either is None:
            raise ValueError("the denoiser does not know its schedule: give it as an argument")
        return either
    if not _same(own, schedule):
        ends = [tuple(float(s.log_snr(t)) for t in (0.0, 1.0)) for s in (own, schedule)]
        raise ValueError(
            f"the denoiser has another schedule than the one given: log-SNR from {ends[0][0]:.4g} "
            f"to {ends[0][1]:.4g}, not from {ends[1][0]:.4g} to {ends[1][1]:.4g}, or other scales"
        )
    return schedule


def known_schedule(denoise: Any) -> Schedule | None:
    """The schedule of a denoiser, also under `functools.partial` or `jax.jit`; None if unknown."""
    return _carried(denoise, "schedule")


def is_flow_map(denoise: Any) -> bool:
    """Whether a denoiser is a flow map, which also takes the time s at which a step ends.

    A function that does not say so, in the attribute `two_times`, is one if it has an argument s.
    """
    said = _carried(denoise, "two_times")
    return "s" in inspect.signature(denoise).parameters if said is None else said


def _carried(denoise, name):
    """An attribute of a denoiser, or of the function inside; None if there is none."""
    while getattr(denoise, name, None) is None:
        inner = getattr(denoise, "func", None) or getattr(denoise, "__wrapped__", None)
        if inner is None:
            return None
        denoise = inner
    return getattr(denoise, name)


def _same(a, b):
    """Whether two schedules have the same curve and scales; traced ones count as the same."""
    if a is b or not known(*jax.tree.leaves((a, b))):
        return True
    with jax.ensure_compile_time_eval():
        t = jnp.linspace(0, 1, 17)
        curves = [np.stack([s.log_snr(t), *s(t)]) for s in (a, b)]
    return np.allclose(*curves, rtol=1e-4, atol=1e-5)


def predict(
    denoise: Denoiser, x_t: Data, t: Time, cond: Cond = None, s: Time | None = None
) -> Prediction | LearnedPrediction:
    """Call a denoiser, or, with the time s at which a step ends, a flow map.

    A `cond` of None leaves it with the one that `functools.partial` bound.

    Raises:
      TypeError: if it cannot be called, or returns something else, as a network does.
      ValueError: if what it predicts has another shape than x_t.
    """
    given = {name: x for name, x in (("cond", cond), ("s", s)) if x is not None}
    checks.takes(denoise, x_t, t, **given)
    try:
        out = denoise(x_t, t, **given)
    except Exception as error:
        if known_schedule(denoise) is None:
            checks.note_denoiser(error)
        raise
    checks.prediction(out, x_t)
    return out


def call(network: Network, x_t: Data, log_snr: Array, cond: Cond) -> Real:
    """Call a network; its errors note it if it was given no condition.

    Raises:
      TypeError: if it returns something else than an array.
    """
    try:
        out = network(x_t, log_snr, cond)
    except (AttributeError, TypeError) as error:
        if cond is None:
            checks.note_cond(error)
        raise
    checks.output(out, x_t)
    return out


def bound_cond(denoise: Denoiser) -> Cond:
    """The conditioning that `functools.partial` bound to a denoiser, or None."""
    return denoise.keywords.get("cond") if isinstance(denoise, functools.partial) else None


def _shaped(out, x_t, factor):
    expected = (*x_t.shape[:-1], factor * x_t.shape[-1])
    if out.shape != expected:
        why = "" if factor == 1 else ", twice the channels for a learned variance"
        raise ValueError(f"the network gave {out.shape} for data {x_t.shape}: need {expected}{why}")
    return out


def unit_output(network: Network, target: str | Row, schedule: Schedule) -> Network:
    """Scale a network's output by sqrt(a^2 + b^2), so that the network's own output is of order 1.

    The scale of a score runs from 1 to 1800 over log-SNR in [-15, 15]; for the score this is the
    division by sigma of Song & Ermon 2020, "Improved techniques for training score-based generative
    models", technique 3. Use the same wrapper in training and in sampling.

    Raises:
      ValueError: if the target is unknown.
    """
    row(target)  # raises now if the target is unknown

    def scaled(x_t, log_snr, cond):
        variance = unit_variance(target, *schedule.scales(log_snr))
        return expand(jnp.sqrt(variance), x_t) * network(x_t, log_snr, cond)

    return scaled


def unit_input(network: Network, schedule: Schedule, sigma_data: Scalar = 0.5) -> Network:
    """Scale a network's input to unit variance: divide by sqrt(alpha^2 sigma_data^2 + sigma^2).

    With target "F" (of the same sigma_data) this is the preconditioning of Karras et al. 2022,
    equation 7: c_in scales the input, and the target applies c_skip and c_out to the output. The
    network is given log-SNR, and theirs c_noise = log(sigma / alpha) / 4 = -log_snr / 8. Use the
    same wrapper in training and in sampling.

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
    """Give a network discrete time, 0 to T - 1 for t from 1/T to 1, in place of log-SNR.

    This is the input of DDPM and its descendants, extended to times between the steps: steps t - 1,
    with the t at which the schedule has the log-SNR. Use the same wrapper in training and in
    sampling.

    Args:
      network: (x_t, time `[batch]`, cond) -> an estimate of the target.
      schedule: the `Schedule` it is trained with, such as `from_betas`.
      steps: T.
    """
    return lambda x_t, log_snr, cond: network(x_t, steps * time_at(schedule, log_snr) - 1, cond)


def fourier_features(
    network: Network, exponents: Sequence[int] = (7, 8), levels: int = 256
) -> Network:
    """Give a network sin and cos(2^n pi z) of each channel beside x_t, for each n in `exponents`.

    A network sees the values of single pixels badly, and the likelihood of pixels depends on them
    (Kingma et al. 2021, section 4 and appendix C). z is x_t (levels - 1) / levels, which puts the
    pixels of [-1, 1] at the middles of `levels` cells; a period is then a whole number of cells.
    The network's input has 1 + 2 `len(exponents)` times the channels, x_t first. Use the same
    wrapper in training and in sampling.

    Args:
      network: (features, log_snr `[batch]`, cond) -> an estimate of the target.
      exponents: the n.
      levels: number of values of the data's grid in [-1, 1].

    >>> network = fourier_features(lambda x, log_snr, cond: x, exponents=(0,), levels=2)
    >>> network(jnp.ones((1, 1)), jnp.zeros(1), None).round(3) + 0  # sin, cos(pi / 2)
    Array([[1., 1., 0.]], dtype=float32)
    """

    def featured(x_t, log_snr, cond):
        z = x_t * ((levels - 1) / levels)
        turns = [2.0 ** (n - 1) * z for n in exponents]
        # Whole turns are taken off while they are exact, before the product with pi is rounded.
        waves = [f(2 * jnp.pi * (a - jnp.round(a))) for a in turns for f in (jnp.sin, jnp.cos)]
        return network(jnp.concatenate([x_t, *waves], axis=-1), log_snr, cond)

    return featured


def clip_x_0(
    denoise: Denoiser, schedule: Schedule | None = None, low: Scalar = -1.0, high: Scalar = 1.0
) -> Denoiser:
    """Clip the estimate of x_0 to the range of the data, and recompute eps.

    Ho et al. 2020, in their code ("clip_denoised"); static thresholding in Saharia et al. 2022.

    Args:
      denoise: a denoiser.
      schedule: its `Schedule`.
      low: the smallest value of the data.
      high: the largest value of the data.

    Raises:
      ValueError: unless `low < high`, or if the schedule is not the denoiser's.
    """
    if known(low, high) and not low < high:
        raise ValueError(f"{low=} must be below {high=}")
    return with_x_0(denoise, schedule, lambda x_0, x_t, t, cond: jnp.clip(x_0, low, high))


def add_score(
    prediction: Prediction | LearnedPrediction, schedule: Schedule, t: Time, score: Data
) -> Prediction | LearnedPrediction:
    """Add `score` to the score of a prediction: eps becomes eps - sigma score, and x_0 follows.

    Args:
      prediction: a prediction at some x_t.
      schedule: its `Schedule`.
      t: times `[]` or `[batch]`.
      score: the score to add, `[batch, ...]`.
    """
    alpha, sigma = scales_at(schedule, t, score)
    return prediction._replace(
        x_0=prediction.x_0 + sigma**2 / alpha * score, eps=prediction.eps - sigma * score
    )


def with_x_0(denoise: Denoiser, schedule: Schedule | None, change: Callable[..., Data]) -> Denoiser:
    """Change the x_0 of a denoiser, and recompute eps.

    Args:
      denoise: a denoiser.
      schedule: its `Schedule`.
      change: (x_0, x_t, t, cond) -> the new estimate of x_0.

    Raises:
      ValueError: if the denoiser has another schedule, or none is known (see `schedule_of`).
    """
    schedule = schedule_of(denoise, schedule)

    def changed(x_t, t, cond=None, s=None):
        prediction = predict(denoise, x_t, t, cond, s)
        x_0 = change(prediction.x_0, x_t, t, cond)
        eps = decode("x_0", x_0, x_t, *scales_at(schedule, t, x_t)).eps
        return prediction._replace(x_0=x_0, eps=eps)

    return with_schedule(schedule, changed, is_flow_map(denoise))
