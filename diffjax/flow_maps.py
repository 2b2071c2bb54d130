r"""Flow maps: one evaluation takes x_t to any other time s, learned by one of three identities.

A flow map predicts a whole step of the probability-flow ODE, from t to s. Its network is given both
times, and its output is decoded at t, by the table of targets as ever:

    x_s = alpha_s x_0 + sigma_s eps,    Prediction(x_0, eps) = flow_map(x_t, t, s=s)

which is DDIM's step. At s = t the step is the identity for any network, and the prediction is that
of a denoiser. On the circle of `ode`, with delta = phi_t - phi_s and the velocity u = (alpha eps -
sigma x_0) / sqrt(alpha^2 + sigma^2) of the prediction, the step Y is exact if and only if u is v,
the velocity of the ODE, at s = t, and one of three residuals R vanishes everywhere:

    Y(y, t, s) = cos(delta) y - sin(delta) u(y, t, s)
    Eulerian     cos(delta) (u - v) + sin(delta) (y + du/dphi_t)    = -dY/dphi_t along the path
    Lagrangian   dY/dphi_s - v(Y, s)
    semigroup    u - (the u of two shorter steps, t to r and r to s)

(Boffi, Albergo & Vanden-Eijnden 2024, "Flow map matching"; 2025, "How to build a consistency model:
learning flow maps via self-distillation".) No residual depends on the target or on the scales.
`docs/theory.md` derives them, and says which are consistency models, shortcut models and MeanFlow.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from . import checks, keys, ode, types
from .denoisers import flow_map, is_flow_map, known_schedule, schedule_of
from .losses import draw
from .process import scales_at
from .schedules import Schedule, rate_at
from .targets import Row
from .types import Array, Cond, Data, Denoiser, FlowMap, Key, Network, Time
from .weightings import Weighting

Step = Callable[[Data, Array, Array], Data]
"""(y, t, s) -> a velocity on the circle, of the shape of y."""


def velocity_of(mean: Denoiser | FlowMap, schedule: Schedule, cond: Cond = None) -> Step:
    """The velocity on the circle: of a flow map u, which turns y at time t to its step at time s.

    That of a denoiser is dy/dphi of the ODE at time t, whatever s is.
    """
    bound = mean if cond is None else functools.partial(mean, cond=cond)
    until = lambda s: functools.partial(bound, s=s) if is_flow_map(mean) else bound
    return lambda y, t, s: ode.velocity(until(s), schedule, y, t)[0]


def eulerian(schedule: Schedule, u: Step, v: Step, y: Data, t: Array, s: Array, r: Array):
    """The end of the step does not move while its start moves along the path."""
    turn, along = _turn(schedule, y, t, s), v(y, t, t)
    tangents = along, _per_angle(schedule, t)
    step, slope = jax.jvp(lambda y, t: u(y, t, s), (y, t), tangents)
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
    step = u(y, t, s)
    return step, step - _two_steps(schedule, v, u, y, t, s, r)


def progressive(schedule: Schedule, u: Step, v: Step, y: Data, t: Array, s: Array, r: Array):
    """Two shorter steps, both by a teacher's v, end where one of the map does."""
    step = u(y, t, s)
    return step, step - _two_steps(schedule, v, v, y, t, s, r)


IDENTITIES = {f.__name__: f for f in (semigroup, eulerian, lagrangian, progressive)}
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
    velocity: str | Denoiser | FlowMap = "own",
    s: Time | None = None,
    first: float | None = None,
    diagonal: float = 0.75,
    to_data: float = 0.0,
    normalise: float = 0.0,
) -> Float[Array, " batch"]:
    """The loss of a flow map of each example, |u - stop_gradient(u - R)|^2, at one pair of times.

    Where s = t it is the denoising loss of the same network, |u - v|^2 with the velocity v of the
    drawn (x_0, eps), or of the teacher. The gradient passes through u alone, so that its mean is
    zero at the exact map, also with the noisy velocity of the pair.

    Args:
      key: one key, or one per example `[batch]`.
      network: a network of two times (see `flow_map`).
      schedule: a `Schedule`.
      target: the target of the network. The loss of one map is the same for all.
      x_0: clean data `[batch, ...]`.
      cond: conditioning of the network and of a teacher, a dict or None.
      weight: a weighting of the eps error; None weighs the error of u equally at all times.
      t: times at which steps start, `[]` or `[batch]`; drawn by default, as in `diffusion_loss`.
      steps: T for times on the grid i/T, None for continuous times.
      identity: a name in `IDENTITIES`.
      velocity: what stands for v: "own", the map itself at s = t; "pair", that of the drawn (x_0,
        eps), whose mean is v; or a teacher, a `Denoiser` or a `flow_map`. The semigroup takes its
        first step with it: "own" and a teacher that is a map take their own step, a denoiser takes
        DDIM's. `progressive` takes both steps with it, and needs a teacher.
      s: times at which steps end, `[]` or `[batch]`; drawn by default, uniform in [0, t].
      first: the share of t - s that the first of two steps takes, in (0, 1); None draws it. Only
        the identities semigroup and progressive take two.
      diagonal: the fraction of examples with s = t, if s is drawn.
      to_data: the fraction of examples with s = 0, if s is drawn.
      normalise: the power p of a factor stop_gradient(loss + 0.001)^-p (Geng et al. 2025), on
        each loss whose regression target does not contain the noise of the pair.

    Returns:
      Losses `[batch]`, averaged over the data axes.

    Raises:
      TypeError, ValueError: as `check`, `flow_map` and `schedule_of` (of the teacher).
    """
    check(identity, velocity, first, diagonal, to_data, normalise)
    checks.network(network)
    teacher: Any = velocity if callable(velocity) else None
    if teacher is not None and known_schedule(teacher) is not None:
        schedule_of(teacher, schedule)
    t, eps = draw(key, x_0, t, steps)
    own = keys.per_example(key, len(x_0))
    uniform = lambda i: jax.vmap(jax.random.uniform)(keys.fold_in(own, i))
    if s is None:
        kind, s = uniform(2), t * uniform(3)
        s = s if steps is None else jnp.floor(s * steps) / steps
        s = jnp.where(kind < diagonal, t, jnp.where(kind < diagonal + to_data, 0, s))
    types.check_times(s, len(x_0))
    s = jnp.broadcast_to(jnp.asarray(s, t.dtype), t.shape)
    r = t + (uniform(4) if first is None else first) * (s - t)

    alpha, sigma = scales_at(schedule, t, x_0)
    radius = ode.radius(schedule, t, x_0)
    y, of_pair = (alpha * x_0 + sigma * eps) / radius, (alpha * eps - sigma * x_0) / radius
    u = velocity_of(flow_map(network, schedule, target), schedule, cond)
    v = u if velocity == "own" else lambda *_: of_pair
    v = v if teacher is None else velocity_of(teacher, schedule, cond)
    step, residual = IDENTITIES[identity](schedule, u, v, y, t, s, r)
    # At s = t this is v. The map's own v is itself, so that the velocity of the pair is the aim.
    aim = step - residual
    aim = jax.lax.stop_gradient(types.select(s == t, of_pair, aim) if teacher is None else aim)
    loss = jnp.mean((step - aim).astype(t.dtype) ** 2, axis=range(1, x_0.ndim))
    if weight is not None:  # eps changes by cos(phi) where u changes by 1
        cos = jnp.cos(ode.angle(schedule, t))
        loss *= weight(schedule.log_snr(t), rate_at(schedule, t, steps)) * cos**2
    power = jnp.where((s == t) & (teacher is None), 0, -normalise)  # the pair's aim is noisy
    return loss * jax.lax.stop_gradient(loss + 1e-3) ** power if normalise else loss


def check(
    identity: str,
    velocity: str | Denoiser | FlowMap,
    first: int | float | None = None,
    diagonal: int | float = 0.0,
    to_data: int | float = 0.0,
    normalise: int | float = 0.0,
) -> None:
    """Raise a ValueError unless `flow_map_loss` accepts these options."""
    taught = callable(velocity)
    for holds, message in (
        (identity in IDENTITIES, f"unknown {identity=}: one of {', '.join(IDENTITIES)}"),
        (taught or velocity in ("own", "pair"), f"unknown {velocity=}: own, pair, or a teacher"),
        (
            velocity != "pair" or identity != "lagrangian",
            f"{identity=} needs the velocity where the step ends, which {velocity=} does not have: "
            "use own, a teacher, or identity=eulerian",
        ),
        (
            taught or identity != "progressive",
            f"{identity=} takes both steps by a teacher, and {velocity=} is none: give one, or use "
            "identity=semigroup",
        ),
        (
            velocity != "pair" or not normalise,
            f"{normalise=} with {velocity=}: a factor that depends on the noise of the pair makes "
            "the mean gradient wrong; use velocity=own, or normalise=0",
        ),
        (first is None or 0 < first < 1, f"{first=}: must be between 0 and 1, or None to draw it"),
        (
            first is None or identity in ("semigroup", "progressive"),
            f"{first=}: {identity=} takes no two steps; leave it out, or use identity=semigroup",
        ),
        (
            all(x >= 0 for x in (diagonal, to_data, normalise)) and diagonal + to_data <= 1,
            f"{diagonal=}, {to_data=}, {normalise=}: must be at least 0, the first two at most 1",
        ),
    ):
        if not holds:
            raise ValueError(message)


def _two_steps(schedule, first_by, second_by, y, t, s, r):
    """The u of one step from t to s that ends where two do, over r."""
    first, second, u_1 = _turn(schedule, y, t, r), _turn(schedule, y, r, s), first_by(y, t, r)
    u_2 = second_by(jnp.cos(first) * y - jnp.sin(first) * u_1, r, s)
    # (cos(first + second) y - the end) / sin(first + second), without the difference.
    a, b = jnp.sin(first) * jnp.cos(second), jnp.sin(second)
    none = first + second == 0
    whole = jnp.where(none, 1, jnp.sin(first + second))
    return jnp.where(none, u_1, (a * u_1 + b * u_2 - b * jnp.sin(first) * y) / whole)


def _turn(schedule, y, t, s):
    """delta = phi_t - phi_s, shaped to multiply the data y."""
    return types.expand(ode.angle(schedule, t) - ode.angle(schedule, s), y)


def _per_angle(schedule, t):
    """dt / dphi, the tangent of t for which a derivative is one by the angle."""
    angle = functools.partial(ode.angle, schedule)
    return 1 / jax.jvp(angle, (t,), (jnp.ones_like(t),))[1]
