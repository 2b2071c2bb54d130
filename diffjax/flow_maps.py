r"""Flow maps: one evaluation takes x_t to any other time s, learned by one of three identities.

The probability-flow ODE takes x_t to x_s = X(x_t, t, s). A flow map predicts that whole step. Its
network is given both times, and its output is decoded at t, by the table of targets as ever:

    x_s = alpha_s x_0 + sigma_s eps,    Prediction(x_0, eps) = flow_map(x_t, t, s=s)

which is DDIM's step. At s = t it is the identity for any network, and the prediction is that of an
ordinary denoiser; a `FlowMap` called without s is one. On the circle of `ode`, where
delta = phi_t - phi_s, with u = (alpha eps - sigma x_0) / sqrt(alpha^2 + sigma^2) of the prediction,
the step and its exact value Y obey

    Y(y, t, s) = cos(delta) y - sin(delta) u(y, t, s),    dY/dphi_s = v(Y, s),    Y(y, t, t) = y

with the velocity v of the ODE. The map is exact if and only if one of these residuals R vanishes:

    Eulerian     cos(delta) (u - v) + sin(delta) (y + du/dphi_t)    = -dY/dphi_t along the path
    Lagrangian   dY/dphi_s - v(Y, s)
    semigroup    u - (the u of two shorter steps, t to r and r to s)

(Boffi, Albergo & Vanden-Eijnden 2024, "Flow map matching"; 2025, "How to build a consistency model:
learning flow maps via self-distillation".) No residual depends on the target or on the scales, only
on log-SNR. `docs/theory.md` derives them, and says which rows are consistency models, shortcut
models and MeanFlow.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Float

from . import checks, keys, ode
from .denoisers import denoiser, known_schedule, schedule_of, with_schedule
from .losses import draw
from .process import scales_at
from .schedules import Schedule, rate_at
from .targets import Row
from .types import (
    Array,
    Cond,
    Data,
    Denoiser,
    FlowMap,
    Key,
    Network,
    Time,
    check_times,
    expand,
    known,
    select,
)
from .weightings import Weighting

Step = Callable[[Data, Array, Array], Data]
"""(y, t, s) -> a velocity on the circle, of the shape of y."""


def flow_map(network: Network, schedule: Schedule, target: str | Row) -> FlowMap:
    """Make a flow map from a network of two times: decode its output into x_0 and eps.

    Args:
      network: (x_t `[batch, ...]`, log_snr `[batch]`, cond) -> an estimate of the target, where
        `cond["log_snr_s"]` `[batch]` is the log-SNR at which the step ends.
      schedule: the `Schedule` it was trained with.
      target: the target that it regresses, a name in `TARGETS` or a row function. For s other than
        t its best value is a mean of the target along the path from t to s.

    Returns:
      A function (x_t, t, cond=None, s=None) -> `Prediction`; with s=None it is a `Denoiser`.

    Raises:
      TypeError: if the network or the schedule is something else; when called, if `cond` is neither
        a dict nor None.
      ValueError: if the target is unknown; when called, if the network's output has a wrong shape.

    >>> import diffjax
    >>> schedule = diffjax.cosine()
    >>> network = lambda x_t, log_snr, cond: jnp.tanh(cond["log_snr_s"])[:, None] * x_t
    >>> jump = diffjax.jump(flow_map(network, schedule, "v"))
    >>> x_1 = diffjax.prior_sample(jax.random.key(0), schedule, (4, 2))
    >>> diffjax.sample(jax.random.key(1), jump, x_1, jnp.array([1.0, 0.0]))[0].shape
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

    return with_schedule(schedule, mean)


def velocity_of(mean: FlowMap, schedule: Schedule, cond: Cond = None) -> Step:
    """u of a flow map: the velocity on the circle that takes y from time t to time s in one turn."""

    def u(y, t, s):
        given = {"s": s} if cond is None else {"s": s, "cond": cond}
        return ode.velocity(functools.partial(mean, **given), schedule, y, t)[0]

    return u


def eulerian(schedule: Schedule, u: Step, v: Step, y: Data, t: Array, s: Array, r: Array):
    """The end of the step does not move while its start moves along the path."""
    turn = _turn(schedule, y, t, s)
    along = v(y, t, t)
    at_start = lambda y, t: u(y, t, s)
    step, slope = jax.jvp(at_start, (y, t), (along, _per_angle(schedule, t)))
    return step, jnp.cos(turn) * (step - along) + jnp.sin(turn) * (y + slope)


def lagrangian(schedule: Schedule, u: Step, v: Step, y: Data, t: Array, s: Array, r: Array):
    """The end of the step moves with the velocity of the ODE there."""

    def at_end(s):
        step, turn = u(y, t, s), _turn(schedule, y, t, s)
        return jnp.cos(turn) * y - jnp.sin(turn) * step, step

    end, slope, step = jax.jvp(at_end, (s,), (_per_angle(schedule, s),), has_aux=True)
    return step, slope - v(end, s, s)


def semigroup(schedule: Schedule, u: Step, v: Step, y: Data, t: Array, s: Array, r: Array):
    """Two shorter steps, by v from t to r, and by the map from r to s, end where one does."""
    first, second = _turn(schedule, y, t, r), _turn(schedule, y, r, s)
    by_v = v(y, t, r)
    by_u = u(jnp.cos(first) * y - jnp.sin(first) * by_v, r, s)
    # (cos(first + second) y - the end) / sin(first + second), without the difference.
    a, b = jnp.sin(first) * jnp.cos(second), jnp.sin(second)
    whole = jnp.where(first + second == 0, 1, jnp.sin(first + second))
    both = (a * by_v + b * by_u - b * jnp.sin(first) * y) / whole
    step = u(y, t, s)
    return step, step - both


IDENTITIES: dict[str, Callable[..., tuple[Data, Data]]] = {
    "semigroup": semigroup,
    "eulerian": eulerian,
    "lagrangian": lagrangian,
}
"""Identities by name: (schedule, u, v, y, t, s, r) -> u at (y, t, s), and the residual."""


def flow_map_loss(
    key: Key,
    network: Network,
    schedule: Schedule,
    target: str | Row,
    x_0: Data,
    cond: Cond = None,
    weight: Weighting | None = None,
    t: Time | None = None,
    steps: int | None = None,
    *,
    identity: str = "lagrangian",
    velocity: str | Denoiser = "own",
    s: Time | None = None,
    first: float | None = None,
    diagonal: float = 0.75,
    to_data: float = 0.0,
    normalise: float = 0.0,
) -> Float[Array, " batch"]:
    """The loss of a flow map of each example, |u - stop_gradient(u - R)|^2, at one pair of times.

    Where s = t it is instead the denoising loss of the same network, |u - v|^2, from which the
    velocity "own" is learned. The gradient passes through u alone, so it vanishes on average at the
    exact map with either velocity, although that of the pair is noisy.

    Args:
      key: one key, or one per example `[batch]`.
      network: a network of two times (see `flow_map`).
      schedule: a `Schedule`.
      target: the target that the network regresses. The loss of one map is the same for all.
      x_0: clean data `[batch, ...]`.
      cond: conditioning passed to the network and to a teacher, a dict or None.
      weight: a weighting of the eps error; None weighs the error of u equally at all times.
      t: times at which steps start, `[]` or `[batch]`; drawn by default, as in `diffusion_loss`.
      steps: T for times on the grid i/T, None for continuous times.
      identity: a name in `IDENTITIES`.
      velocity: what stands for v: "own", the map itself at s = t; "pair", that of the drawn (x_0,
        eps), which is v on average; or a teacher, a `Denoiser`. The semigroup takes its first step
        with it; "own" takes it with the map.
      s: times at which steps end, `[]` or `[batch]`, at most t; drawn by default, uniform in
        [0, t].
      first: the share of t - s that the first of the semigroup's two steps takes, in (0, 1); None
        draws it uniformly. A half is the shortcut models', a small one the consistency models'.
      diagonal: the fraction of examples with s = t, if s is drawn.
      to_data: the fraction of examples with s = 0, if s is drawn.
      normalise: the power p of a factor stop_gradient(loss + 0.001)^-p (Geng et al. 2025), on
        losses whose aim does not contain the noise of the pair.

    Returns:
      Losses `[batch]`, averaged over the data axes.

    Raises:
      TypeError: if the velocity is neither a name nor a denoiser, or as in `flow_map`.
      ValueError: if a name is unknown, a number is out of range, the identity cannot use the
        velocity of the pair, or that is to be normalised: a factor that depends on the noise would
        shift the mean gradient.

    >>> import diffjax
    >>> x_0 = jax.random.normal(jax.random.key(0), (8, 2))
    >>> zero = lambda x_t, log_snr, cond: 0 * x_t
    >>> flow_map_loss(jax.random.key(1), zero, diffjax.cosine(), "v", x_0).shape
    (8,)
    """
    check(identity, velocity, first, diagonal, to_data, normalise)
    checks.network(network)
    checks.schedule(schedule)
    t, eps = draw(key, x_0, t, steps)
    batch = len(x_0)
    key_r, key_s, key_kind = (keys.fold_in(keys.per_example(key, batch), i) for i in (2, 3, 4))
    if s is None:
        kind = jax.vmap(jax.random.uniform)(key_kind)
        s = t * jax.vmap(jax.random.uniform)(key_s) * (kind >= diagonal + to_data)
        s = jnp.where(kind < diagonal, t, s if steps is None else jnp.floor(s * steps) / steps)
    check_times(s, batch)
    s = jnp.broadcast_to(jnp.asarray(s, t.dtype), t.shape)
    share = jax.vmap(jax.random.uniform)(key_r) if first is None else first
    r = t + share * (s - t)

    alpha, sigma = scales_at(schedule, t, x_0)
    radius = ode.radius(schedule, t, x_0)
    y, of_pair = (alpha * x_0 + sigma * eps) / radius, (alpha * eps - sigma * x_0) / radius
    u = velocity_of(flow_map(network, schedule, target), schedule, cond)
    if callable(velocity):
        if known_schedule(velocity) is not None:
            schedule_of(velocity, schedule)
        teacher = velocity if cond is None else functools.partial(velocity, cond=cond)
        v = lambda y, t, s: ode.velocity(teacher, schedule, y, t)[0]
    else:
        v = u if velocity == "own" else lambda y, t, s: of_pair
    step, residual = IDENTITIES[identity](schedule, u, v, y, t, s, r)
    on_diagonal = v(y, t, t) if callable(velocity) else of_pair
    aim = jax.lax.stop_gradient(select(s == t, on_diagonal, step - residual))
    loss = jnp.mean((step - aim).astype(t.dtype) ** 2, axis=range(1, x_0.ndim))
    if weight is not None:  # eps changes by alpha / radius where u changes by 1
        cos = jnp.cos(ode.angle(schedule, t))
        loss *= weight(schedule.log_snr(t), rate_at(schedule, t, steps)) * cos**2
    if normalise:  # the denoising loss is noisy, as in `check`
        factor = jax.lax.stop_gradient(loss + 1e-3) ** -normalise
        loss *= jnp.where((s == t) & (not callable(velocity)), 1, factor)
    return loss


def check(
    identity: str,
    velocity: str | Denoiser,
    first: float | None = None,
    diagonal: float = 0.0,
    to_data: float = 0.0,
    normalise: float = 0.0,
) -> None:
    """Raise a ValueError, or a TypeError, unless `flow_map_loss` accepts these options."""
    if identity not in IDENTITIES:
        raise ValueError(f"unknown identity {identity!r}: one of {', '.join(IDENTITIES)}")
    if isinstance(velocity, str) and velocity not in ("own", "pair"):
        raise ValueError(f"unknown velocity {velocity!r}: own, pair, or a teacher, a denoiser")
    if not callable(velocity) and not isinstance(velocity, str):
        raise TypeError(f"velocity is a {type(velocity).__name__}: own, pair, or a denoiser")
    if velocity == "pair" and identity == "lagrangian":
        raise ValueError(
            "identity=lagrangian needs the velocity where the step ends, which velocity=pair does "
            "not have: use own, a teacher, or identity=eulerian"
        )
    if velocity == "pair" and normalise:
        raise ValueError(
            f"{normalise=} with velocity=pair: a factor that depends on the noise of the pair makes"
            " the mean gradient wrong; use velocity=own, or normalise=0"
        )
    if known(first) and first is not None and not 0 < first < 1:
        raise ValueError(f"{first=}: must be between 0 and 1, or None to draw it")
    if min(diagonal, to_data) < 0 or diagonal + to_data > 1 or normalise < 0:
        raise ValueError(
            f"{diagonal=}, {to_data=}, {normalise=}: must be at least 0, and the first two fractions"
            " at most 1 together"
        )


def _turn(schedule, y, t, s):
    """delta = phi_t - phi_s, shaped to multiply the data y."""
    return expand(ode.angle(schedule, t) - ode.angle(schedule, s), y)


def _per_angle(schedule, t):
    """dt / dphi, the tangent of t for which a derivative is one by the angle."""
    angle = functools.partial(ode.angle, schedule)
    return 1 / jax.jvp(angle, (t,), (jnp.ones_like(t),))[1]
