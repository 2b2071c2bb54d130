r"""Noise schedules: log-SNR as a function of t, and the scales alpha and sigma that it splits into.

A Gaussian diffusion x_t = alpha_t x_0 + sigma_t eps is determined by

    log_snr(t) = log(alpha_t^2 / sigma_t^2),    strictly decreasing and finite on [0, 1],

and by a convention that splits the ratio into alpha and sigma:

    vp    alpha^2 + sigma^2 = 1     alpha = sqrt(sigmoid(l)),  sigma = sqrt(sigmoid(-l))
    ve    alpha = 1                 sigma = exp(-l / 2)
    flow  alpha + sigma = 1         alpha = sigmoid(l / 2),    sigma = sigmoid(-l / 2)

(Kingma et al. 2021, "Variational Diffusion Models", section 3.) `alpha` is a *scale*: the
alpha-bar_t of DDPM (Ho et al. 2020) is `alpha_t**2`.

Schedules whose textbook form is infinite at an end are made finite by rescaling t, so that
`log_snr(0) == log_snr_max` and `log_snr(1) == log_snr_min`. They are not clipped, because that
would leave flat ends. No function computes `1 - alpha**2`, which loses precision. In float32
against float64, over log-SNR in [-20, 20] (`tests/test_schedules.py`), alpha and sigma are within
2e-6 relative for a given log-SNR, and log-SNR is within 4e-6 for a given t (the spacing of float32
at 20 is 1.9e-6).
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Float

from .types import Array, Real, Scalar, Time, at_least_float32, check_times, known, whole

Scales = Callable[[Array], tuple[Array, Array]]

LONGEST = 2**20
"""The largest number of steps of discrete time; float32 hardly tells more times apart."""


class Schedule(NamedTuple):
    """A noise schedule: two functions, and a pytree of their parameters.

    Because it is a pytree (of `jax.tree_util.Partial`), a schedule can be an argument of a jitted
    function without retracing, be vmapped over its parameters, and be learned by gradient descent.

    Attributes:
      log_snr: t in [0, 1] -> log(alpha_t^2 / sigma_t^2), strictly decreasing, elementwise. Those
        of this module compute in at least float32; they raise a ValueError for a concrete t outside
        [0, 1] and a TypeError for an array of integers.
      scales: log-SNR -> (alpha, sigma), elementwise: `vp`, `ve` or `flow`.

    >>> alpha, sigma = cosine()(0.5)
    >>> print(f"{alpha:.4f} {sigma:.4f}")
    0.7071 0.7071
    """

    log_snr: Callable[[Time], Array]
    scales: Scales

    def __call__(self, t: Time) -> tuple[Array, Array]:
        """The scales (alpha_t, sigma_t) at time t, of the shape of t."""
        return self.scales(self.log_snr(t))


def _curve(f):
    """A function (parameters, t) of times: it checks them, and computes in at least float32."""

    @functools.wraps(f)
    def curve(*args):
        check_times(args[-1])
        return f(*args[:-1], at_least_float32(args[-1]))

    return curve


def vp(log_snr: Array) -> tuple[Array, Array]:
    """Variance preserving scales: alpha^2 + sigma^2 = 1."""
    return jnp.sqrt(jax.nn.sigmoid(log_snr)), jnp.sqrt(jax.nn.sigmoid(-log_snr))


def ve(log_snr: Array) -> tuple[Array, Array]:
    """Variance exploding scales: alpha = 1."""
    return jnp.ones_like(log_snr), jnp.exp(-log_snr / 2)


def flow(log_snr: Array) -> tuple[Array, Array]:
    """Rectified-flow scales: alpha + sigma = 1."""
    return jax.nn.sigmoid(log_snr / 2), jax.nn.sigmoid(-log_snr / 2)


def cosine(
    log_snr_min: Scalar = -15.0, log_snr_max: Scalar = 15.0, scales: Scales = vp
) -> Schedule:
    """The cosine schedule, alpha_t = cos(pi t / 2), between two finite ends.

    log_snr(t) = -2 log tan(a) with a(t) linear in t (Nichol & Dhariwal 2021, equation 17, without
    their offset; rescaled as in Kingma et al. 2021 and Salimans & Ho 2022).

    Raises:
      ValueError: if `log_snr_min >= log_snr_max`.
    """
    _require_decreasing(log_snr_min, log_snr_max)
    return Schedule(Partial(_cosine, log_snr_min, log_snr_max), Partial(scales))


@_curve
def _cosine(log_snr_min, log_snr_max, t):
    # tan(a) = sin(a) / sin(pi/2 - a): each angle is computed from its own small end, so that
    # neither loses precision to pi/2.
    first, last = jnp.atan(jnp.exp(-log_snr_max / 2)), jnp.atan(jnp.exp(log_snr_min / 2))
    span = jnp.pi / 2 - first - last
    return 2 * (jnp.log(jnp.sin(last + (1 - t) * span)) - jnp.log(jnp.sin(first + t * span)))


def linear(beta_min: Scalar = 0.1, beta_max: Scalar = 20.0, log_snr_max: Scalar = 20.0) -> Schedule:
    """The VP-SDE with beta(t) linear in t: alpha_t^2 = exp(-B(t)), B' = beta.

    Song et al. 2021, "Score-based generative modeling through SDEs", equation 33. The
    log-SNR at t = 1 follows from the betas: -10.05 by default.

    Raises:
      ValueError: if a beta is negative or both are zero, or they are so small that the log-SNR at
        t = 1 is not below `log_snr_max`.
    """
    if known(beta_min, beta_max):
        if min(beta_min, beta_max) < 0 or beta_min + beta_max == 0:
            raise ValueError(f"beta_min={beta_min}, beta_max={beta_max}: must be >= 0, not both 0")
        total = (beta_min + beta_max) / 2
        _require_decreasing(-total - math.log(-math.expm1(-total)), log_snr_max)
    return Schedule(Partial(_linear, beta_min, beta_max, log_snr_max), Partial(vp))


@_curve
def _linear(beta_min, beta_max, log_snr_max, t):
    # B(t) = beta_min t + (beta_max - beta_min) t^2 / 2, started where B = log(1 + 1 / snr_max).
    first_b = jax.nn.softplus(-log_snr_max)
    slope = beta_max - beta_min
    first = 2 * first_b / (beta_min + jnp.sqrt(beta_min**2 + 2 * slope * first_b))
    u = first + t * (1 - first)
    b = u * (beta_min + slope * u / 2)
    return -b - jnp.log(-jnp.expm1(-b))


def sigmoid(
    start: Scalar = -3.0,
    end: Scalar = 3.0,
    tau: Scalar = 1.0,
    log_snr_min: Scalar = -15.0,
    log_snr_max: Scalar = 15.0,
    scales: Scales = vp,
) -> Schedule:
    """The sigmoid schedule: alpha_t^2 follows a section of the logistic curve, from start to end.

    With u = (start + t (end - start)) / tau, alpha_t^2 is sigmoid(-u) rescaled to run from 1 to 0
    (Jabri et al. 2022, "Scalable adaptive computation for iterative generation"; Chen 2023), and t
    is rescaled to finite ends.

    Args:
      start: the point on the logistic curve at t = 0.
      end: the point on the logistic curve at t = 1.
      tau: temperature; a smaller one makes the curve sharper.
      log_snr_min: log-SNR at t = 1.
      log_snr_max: log-SNR at t = 0.
      scales: how log-SNR splits into alpha and sigma.

    Raises:
      ValueError: if `start >= end`, `tau <= 0` or `log_snr_min >= log_snr_max`.
    """
    if known(start, end, tau) and (start >= end or tau <= 0):
        raise ValueError(f"{start=}, {end=}, {tau=}: need start < end and tau > 0")
    _require_decreasing(log_snr_min, log_snr_max)
    # jax.nn.sigmoid does not accept integers.
    params = [1.0 * value for value in (start, end, tau, log_snr_min, log_snr_max)]
    return Schedule(Partial(_sigmoid, *params), Partial(scales))


@_curve
def _sigmoid(start, end, tau, log_snr_min, log_snr_max, t):
    # With p = sigmoid(u) between p(low) and p(high), snr = (p(high) - p) / (p - p(low)), and
    # sigmoid(x) - sigmoid(y) = sigmoid(x) sigmoid(-y) (1 - exp(y - x)) has no cancellation.
    low, high = start / tau, end / tau
    p_low, p_high = jax.nn.sigmoid(low), jax.nn.sigmoid(high)
    rise = p_high * jax.nn.sigmoid(-low) * -jnp.expm1(low - high)
    # How far inside the ends the curve starts and stops: in units of p, then of u.
    d_max = rise * jax.nn.sigmoid(-log_snr_max)
    d_min = rise * jax.nn.sigmoid(log_snr_min)
    first = jnp.log1p(d_max / p_low) - jnp.log1p(-d_max / jax.nn.sigmoid(-low))
    last = jnp.log1p(d_min / jax.nn.sigmoid(-high)) - jnp.log1p(-d_min / p_high)
    span = high - low - first - last
    from_low, to_high = first + t * span, last + (1 - t) * span
    snr_at_middle = jax.nn.log_sigmoid(high) - jax.nn.log_sigmoid(-low) - (low + from_low)
    return snr_at_middle + jnp.log(-jnp.expm1(-to_high)) - jnp.log(-jnp.expm1(-from_low))


def log_uniform(
    sigma_min: Scalar = 0.002, sigma_max: Scalar = 80.0, scales: Scales = ve
) -> Schedule:
    """Geometric sigma / alpha in t, from `sigma_min` at t = 0 to `sigma_max` at t = 1.

    This is the VE-SDE of Song et al. 2021; the defaults are from Karras et al. 2022 (EDM).

    Raises:
      ValueError: unless `0 < sigma_min < sigma_max`.
    """
    if known(sigma_min, sigma_max) and not 0 < sigma_min < sigma_max:
        raise ValueError(f"{sigma_min=}, {sigma_max=}: need 0 < sigma_min < sigma_max")
    return Schedule(Partial(_log_uniform, sigma_min, sigma_max), Partial(scales))


@_curve
def _log_uniform(sigma_min, sigma_max, t):
    return -2 * ((1 - t) * jnp.log(sigma_min) + t * jnp.log(sigma_max))


def rectified_flow(
    log_snr_min: Scalar = -14.0, log_snr_max: Scalar = 14.0, scales: Scales = flow
) -> Schedule:
    """The straight line x_t = (1 - t) x_0 + t eps, with t rescaled to finite ends.

    Liu et al. 2023, "Flow straight and fast"; Lipman et al. 2023.

    Raises:
      ValueError: if `log_snr_min >= log_snr_max`.
    """
    _require_decreasing(log_snr_min, log_snr_max)
    return Schedule(Partial(_rectified_flow, log_snr_min, log_snr_max), Partial(scales))


@_curve
def _rectified_flow(log_snr_min, log_snr_max, t):
    first, last = jax.nn.sigmoid(-log_snr_max / 2), jax.nn.sigmoid(log_snr_min / 2)
    span = 1 - first - last
    return 2 * (jnp.log(last + (1 - t) * span) - jnp.log(first + t * span))


class MonotoneParams(NamedTuple):
    """Parameters of `monotone`: g = e^line t + sum e^height sigmoid(e^slope (t - centre)).

    Attributes:
      line: log of the slope of the line, `[]`.
      height: log of each sigmoid's height, `[width]`.
      slope: log of each sigmoid's slope, `[width]`.
      centre: the time at which each sigmoid is steepest, `[width]`.
    """

    line: Real
    height: Real
    slope: Real
    centre: Real


def monotone(
    params: MonotoneParams,
    log_snr_min: Scalar = -10.0,
    log_snr_max: Scalar = 10.0,
    scales: Scales = vp,
) -> Schedule:
    """A learnable schedule: a decreasing curve between two ends, parametrised by `params`.

    log_snr = max - (max - min) (g(t) - g(0)) / (g(1) - g(0)), where g is an increasing line plus
    increasing sigmoids (Kingma et al. 2021, appendix H). The bound in continuous time depends only
    on the ends; the curve between them changes the variance of its estimate, so VDM trains the
    curve on the mean squared loss (appendix I.2). `learned_schedule` has the loss that does both.

    Args:
      params: parameters, such as those of `monotone_params`.
      log_snr_min: log-SNR at t = 1; may be learned too.
      log_snr_max: log-SNR at t = 0; may be learned too.
      scales: how log-SNR splits into alpha and sigma.

    Raises:
      ValueError: if `log_snr_min >= log_snr_max`.
    """
    _require_decreasing(log_snr_min, log_snr_max)
    return Schedule(Partial(_monotone, params, log_snr_min, log_snr_max), Partial(scales))


def monotone_params(width: int = 32) -> MonotoneParams:
    """Make the parameters of a nearly straight `monotone` schedule with `width` sigmoids.

    Raises:
      ValueError: unless `width` is a whole number of at least 1.
    """
    if not isinstance(width, int | np.integer) or width < 1:
        raise ValueError(f"{width=}: must be a whole number of at least 1")
    # Arrays of NumPy, so that a config can be read before JAX starts.
    centre = (np.arange(width) + 0.5) / width
    made = np.zeros(()), np.full(width, -3.0), np.full(width, 2.0), centre
    return MonotoneParams(*(x.astype(jnp.result_type(float)) for x in made))


@_curve
def _monotone(params, log_snr_min, log_snr_max, t):
    def g(t):
        height, slope, centre = (p.reshape(-1, *[1] * t.ndim) for p in params[1:])
        bumps = jnp.exp(height) * jax.nn.sigmoid(jnp.exp(slope) * (t[None] - centre))
        return jnp.exp(params.line) * t + bumps.sum(0)

    first, last = g(jnp.zeros((), t.dtype)), g(jnp.ones((), t.dtype))
    return log_snr_max - (log_snr_max - log_snr_min) * (g(t) - first) / (last - first)


def split(schedule: Schedule) -> tuple[Schedule, Schedule]:
    """The same `monotone` schedule twice: only the ends of the first, and only the inside of the
    second, are differentiated.

    Raises:
      TypeError: if the schedule is not one of `monotone`.

    >>> at = lambda schedule, part: split(schedule)[part].log_snr(0.25)
    >>> slopes = [jax.grad(at)(monotone(monotone_params()), part) for part in (0, 1)]
    >>> [f"{float(slope.log_snr.args[1]):.3f}" for slope in slopes]  # by log_snr_min
    ['0.231', '0.000']
    """
    curve: Any = schedule.log_snr
    if getattr(curve, "func", None) is not _monotone:
        raise TypeError("the schedule is not one of `monotone`, whose ends and inside are known")
    params, *ends = curve.args
    still = jax.lax.stop_gradient
    return (
        schedule._replace(log_snr=Partial(_monotone, still(params), *ends)),
        schedule._replace(log_snr=Partial(_monotone, params, *still(ends))),
    )


def shift(schedule: Schedule, by: Scalar) -> Schedule:
    """The same schedule with `by` added to its log-SNR at every t.

    For images `r` times larger than those a schedule was tuned on, `by = -2 log(r)` keeps the
    signal-to-noise ratio of the downsampled image (Hoogeboom et al. 2023, "simple diffusion",
    equation 5): `resolution_shift`.
    """
    return Schedule(Partial(_shift, schedule.log_snr, by), schedule.scales)


def resolution_shift(height: int, width: int, base: int) -> float:
    """The `by` of `shift` for a schedule that was tuned on squares of `base` pixels per side.

    Averaging r^2 pixels keeps a smooth image and divides the variance of the noise by r^2, with
    r^2 = height width / base^2. This is the shift of rectified flows by the number of pixels too
    (Esser et al. 2024, "Scaling rectified flow transformers", equation 23).

    Raises:
      ValueError: unless all sides are at least 1.

    >>> round(resolution_shift(64, 64, 32), 4)  # -2 log(2)
    -1.3863
    """
    if min(height, width, base) < 1:
        raise ValueError(f"{height=}, {width=}, {base=}: must be at least 1")
    return math.log(base**2 / (height * width))


def _shift(log_snr, by, t):
    return log_snr(t) + by


def time_at(schedule: Schedule, log_snr: Float[Real, "..."]) -> Float[Array, "..."]:
    """Invert a schedule by bisection: the time in [0, 1] at which it has a given log-SNR.

    Gradients with respect to `log_snr` and the schedule's parameters are those of the implicit
    function.

    Args:
      schedule: a `Schedule`.
      log_snr: log-SNR of any shape; values outside the schedule's range give the nearer end.

    Raises:
      TypeError: if `log_snr` are integers.

    >>> float(time_at(cosine(), jnp.zeros(())))  # alpha = sigma half-way
    0.5
    """
    log_snr = at_least_float32(log_snr)

    def halve(_, bracket):
        low, high = bracket
        middle = (low + high) / 2
        noisier = schedule.log_snr(middle) < log_snr
        return jnp.where(noisier, low, middle), jnp.where(noisier, middle, high)

    # Times near 0 are resolved to their own precision, which takes more halvings than a float has
    # bits.
    bracket = jnp.zeros_like(log_snr), jnp.ones_like(log_snr)
    low, high = jax.lax.stop_gradient(jax.lax.fori_loop(0, 100, halve, bracket))
    t = (low + high) / 2
    found, rise = jax.jvp(schedule.log_snr, (t,), (jnp.ones_like(t),))
    error = found - log_snr
    # The value is t, and the derivative is that of a Newton step.
    return t - (error - jax.lax.stop_gradient(error)) / jax.lax.stop_gradient(rise)


def rate_at(schedule: Schedule, t: Time, steps: int | None = None) -> Array:
    """The rate at which the log-SNR falls at t, of the shape of t.

    In continuous time it is -d log_snr / dt. On the grid of T = `steps` it is
    T expm1(log_snr_s - log_snr_t) with s = t - 1/T, which tends to the former as T grows (Kingma
    et al. 2021, equations 14 and 17).
    """
    t = at_least_float32(t)
    if steps is None:
        return -jax.jvp(schedule.log_snr, (t,), (jnp.ones_like(t),))[1]
    s = (jnp.round(t * steps) - 1) / steps
    return steps * jnp.expm1(schedule.log_snr(s) - schedule.log_snr(t))


def from_betas(betas: Real, log_snr_max: Scalar = 24.0, log_snr_min: Scalar = -24.0) -> Schedule:
    """A discrete schedule of T steps: step i of DDPM at t = i/T, and linear log-SNR in between.

    Node i holds log(abar_i / (1 - abar_i)) with abar_i = prod_{j<=i} (1 - beta_j), i = 1..T. The
    papers define no node 0; here it is `log_snr_max`. The last node is `log_snr_min` if it would be
    infinite (beta_T = 1, zero terminal SNR). The table is computed and stored in float64, that of
    traced betas in their own dtype, at least float32; traced values are not checked.

    Args:
      betas: `[T]`, each in (0, 1); the last may be 1. `betas[i - 1]` is the papers' beta_i.
      log_snr_max: log-SNR at t = 0.
      log_snr_min: log-SNR at t = 1 if the last beta is 1, else unused.

    Raises:
      ValueError: if a beta is out of range, or the ends do not continue the table downwards.

    >>> schedule = from_betas(linear_betas(1000))
    >>> alpha, sigma = schedule(1 / 1000)
    >>> print(f"{alpha**2:.4f}")  # 1 - beta_1
    0.9999
    """
    checked = known(betas, log_snr_max, log_snr_min)
    xp: Any = np if checked else jnp
    betas = np.asarray(betas, np.float64) if checked else at_least_float32(betas)
    if betas.ndim != 1 or betas.size == 0:
        raise ValueError(f"betas of shape {betas.shape}: need one axis of at least one step")
    if checked:
        inside = (betas > 0) & (betas < 1)
        inside[-1] |= betas[-1] == 1
        if not inside.all():
            i = int(np.argmin(inside))
            raise ValueError(f"betas[{i}] = {betas[i]}: need 0 < beta < 1 (the last may be 1)")
    terminal = betas == 1
    # Any other beta at the end keeps infinity out of the derivatives.
    log_abar = xp.cumsum(xp.log1p(-xp.where(terminal, 0.5, betas)))
    nodes = xp.where(terminal, log_snr_min, log_abar - xp.log(-xp.expm1(log_abar)))
    table = xp.concatenate([xp.full(1, log_snr_max, nodes.dtype), nodes])
    if checked and not (np.diff(table) < 0).all():
        raise ValueError(
            f"log-SNR must fall strictly from log_snr_max={log_snr_max} at t = 0 through the "
            f"betas' {table[1]:.4g} ... {table[-2]:.4g} to {table[-1]:.4g} at t = 1"
        )
    return Schedule(Partial(_interpolate, table), Partial(vp))


@_curve
def _interpolate(table, t):
    # Steps are counted from the nearer end: in the second half 1 - t is exact, but t * steps is
    # not, which matters where a table falls steeply.
    steps = len(table) - 1
    late = t > 0.5
    position = jnp.where(late, 1 - t, t) * float(steps)
    near = jnp.clip(jnp.floor(position).astype(int), 0, steps - 1)
    table = jnp.asarray(table, position.dtype)
    start = table[jnp.where(late, steps - near, near)]
    end = table[jnp.where(late, steps - near - 1, near + 1)]
    return start + (position - near) * (end - start)


def linear_betas(steps: int, start: float = 1e-4, end: float = 0.02) -> np.ndarray:
    """beta_i linear in i, float64 `[steps]` (Ho et al. 2020, section 4).

    The ends are not rescaled by 1000 / steps; the defaults are DDPM's for `steps=1000`.

    Raises:
      ValueError: if `steps` is below 1 (`from_betas` checks that the betas are in range).
    """
    _require_steps(steps)
    return np.linspace(start, end, steps, dtype=np.float64)


def scaled_linear_betas(steps: int, start: float = 0.00085, end: float = 0.012) -> np.ndarray:
    """sqrt(beta_i) linear in i, float64 `[steps]` (Rombach et al. 2022, latent diffusion).

    Raises:
      ValueError: if `steps` is below 1.
    """
    _require_steps(steps)
    return np.linspace(start**0.5, end**0.5, steps, dtype=np.float64) ** 2


def cosine_betas(steps: int, max_beta: float = 0.999) -> np.ndarray:
    """The betas of abar(t) = cos^2((t + 0.008) / 1.008 pi / 2), float64 `[steps]`.

    Nichol & Dhariwal 2021, "Improved DDPM", equation 17, clipped at `max_beta`.

    Raises:
      ValueError: if `steps` is below 1, or unless `0 < max_beta <= 1`.
    """
    _require_steps(steps)
    if not 0 < max_beta <= 1:
        raise ValueError(f"{max_beta=}: must be in (0, 1]")
    t = np.arange(steps + 1, dtype=np.float64) / steps
    abar = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - abar[1:] / abar[:-1], max_beta)


def zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    """Rescale betas so that the last step is pure noise: abar_T = 0, beta_T = 1.

    Lin et al. 2024, "Common diffusion noise schedules and sample steps are flawed", Algorithm 1:
    sqrt(abar) is shifted to end at 0 and scaled to keep its first value. Use a target that is
    defined without signal, such as v or x_0: with eps, the estimate of x_0 at t = 1 divides by
    alpha_1, which is 0 but for `log_snr_min`, and is of the order of 1e5 unless it is clipped.

    Raises:
      ValueError: if there are fewer than two steps.
    """
    if len(betas) < 2:
        raise ValueError(f"{len(betas)} betas: need at least two to keep the first and end at 0")
    alpha = np.exp(0.5 * np.cumsum(np.log1p(-np.asarray(betas, np.float64))))
    alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
    return 1 - (alpha / np.concatenate([[1.0], alpha[:-1]])) ** 2


def _require_steps(steps):
    if not (whole(steps) and steps <= LONGEST):
        raise ValueError(f"{steps=}: must be at least 1 and at most {LONGEST}, a whole number")


def _require_decreasing(log_snr_min, log_snr_max):
    # The ends of a vmapped or learned schedule are traced and cannot be checked. Those that are
    # known are compared by NumPy, which gives a value while something else is traced too.
    ends = log_snr_min, log_snr_max
    if known(*ends) and not (np.less(*map(np.asarray, ends)) and np.isfinite(ends).all()):
        raise ValueError(f"{log_snr_min=} must be below {log_snr_max=}, and both finite")


def _linear_betas(steps: int = 1000, start=1e-4, end=0.02, log_snr_max=24.0):
    return from_betas(linear_betas(steps, start, end), log_snr_max)


def _scaled_linear_betas(steps: int = 1000, start=0.00085, end=0.012, log_snr_max=24.0):
    return from_betas(scaled_linear_betas(steps, start, end), log_snr_max)


def _cosine_betas(steps: int = 1000, max_beta=0.999, log_snr_max=24.0):
    return from_betas(cosine_betas(steps, max_beta), log_snr_max)


def _monotone_start(width: int = 32, log_snr_min=-10.0, log_snr_max=10.0):
    return monotone(monotone_params(width), log_snr_min, log_snr_max)


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "cosine": cosine,
    "linear": linear,
    "sigmoid": sigmoid,
    "log_uniform": log_uniform,
    "rectified_flow": rectified_flow,
    "linear_betas": _linear_betas,
    "scaled_linear_betas": _scaled_linear_betas,
    "cosine_betas": _cosine_betas,
    "monotone": _monotone_start,
}
"""Schedules by name, as configs and the command line choose them. A schedule with an option `steps`
is a table of that many steps of discrete time. A run learns `monotone`, which starts straight."""

__all__ = [
    "SCHEDULES",
    "Schedule",
    "flow",
    "from_betas",
    "monotone_params",
    "resolution_shift",
    "shift",
    "time_at",
    "ve",
    "vp",
    "zero_terminal_snr",
    *SCHEDULES,
]
