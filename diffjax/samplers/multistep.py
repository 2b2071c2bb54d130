r"""Multistep samplers, which extrapolate the prediction from earlier steps.

All of them use one idea. The probability-flow ODE is linear except for the prediction. In the step
from t to s, the prediction is replaced by the polynomial P through its values at t and at earlier
times, which is integrated exactly. With lambda = log_snr / 2 and h = lambda_s - lambda_t,

    x_s = sigma_s/sigma_t x_t + alpha_s int_0^1 h e^{h (u - 1)} P(u) du,        P = x_0(lambda),

is DPM-Solver++ and UniPC; in rho = sigma / alpha it is the linear multistep method

    x_s / alpha_s = x_t / alpha_t + (rho_s - rho_t) int_0^1 P(u) du,            P = eps(rho).

u runs from 0 at t to 1 at s, so that earlier nodes are negative. P is in Newton's form, in which
each further divided difference adds one order.

A step more than three times as long (in log-SNR) as the step before it would extrapolate too far;
such a step ignores the history and has first order. This happens at both ends of many grids.
"""

import itertools
import math
from typing import NamedTuple

import jax.numpy as jnp

from .. import keys
from ..denoisers import predict, schedule_of
from ..process import scales_at
from ..schedules import Schedule
from ..types import Array, Data, Denoiser, Scalar, expand, known, select, whole
from .walk import Sampler, State, in_use


class Node(NamedTuple):
    """A time on the trajectory: its log-SNR, and the prediction there."""

    log_snr: Array
    value: Data


class History(NamedTuple):
    """The previous nodes, newest first, and the number of them that are used."""

    nodes: tuple[Node, ...]
    used: Array


def dpm_solver_pp_2m(denoise: Denoiser, schedule: Schedule | None = None) -> Sampler:
    """DPM-Solver++(2M): second order from one evaluation per step.

    Lu et al. 2022, "DPM-Solver++", Algorithm 2. It is deterministic. Use `log_snr_times`.

    Args:
      denoise: a `Denoiser`.
      schedule: its `Schedule`; None if the denoiser carries it.
    """
    return _dpm_solver_pp(denoise, schedule, 2)


def dpm_solver_pp_3m(denoise: Denoiser, schedule: Schedule | None = None) -> Sampler:
    """DPM-Solver++(3M): third order from one evaluation per step.

    The multistep method of DPM-Solver's published code (Lu et al. 2022), with the quadratic
    integrated exactly; the published code takes half of its second derivative, and has a measured
    order of 2, although at 40 to 160 steps it can be nearer. It is deterministic. Use
    `log_snr_times`.

    Args:
      denoise: a `Denoiser`.
      schedule: its `Schedule`; None if the denoiser carries it.
    """
    return _dpm_solver_pp(denoise, schedule, 3)


def dpm_solver_pp_2m_sde(
    denoise: Denoiser, schedule: Schedule | None = None, *, eta: Scalar = 1.0
) -> Sampler:
    """SDE-DPM-Solver++(2M): `dpm_solver_pp_2m` for the reverse-time SDE.

    Lu et al. 2022, section 5 and appendix B (k-diffusion's `sample_dpmpp_2m_sde`, midpoint). Use
    `log_snr_times`.

    Args:
      denoise: a `Denoiser`.
      schedule: its `Schedule`; None if the denoiser carries it.
      eta: the amount of fresh noise; 1 is the SDE, 0 is `dpm_solver_pp_2m`.

    Raises:
      ValueError: if `eta` is negative.
    """
    return _dpm_solver_pp(denoise, schedule, 2, eta)


def unipc(denoise: Denoiser, schedule: Schedule | None = None, *, order: int = 2) -> Sampler:
    """UniPC: a multistep predictor, corrected when the next evaluation is known.

    Zhao et al. 2023, the multistep method with x_0 prediction and B_2(h) = e^h - 1. The evaluation
    at the predicted point corrects the step that led there, with one more node, and is then used
    for the next step, so there is one evaluation per step. The last step is not corrected. It is
    deterministic. Use `log_snr_times`.

    Args:
      denoise: a `Denoiser`.
      schedule: its `Schedule`; None if the denoiser carries it.
      order: order of the predictor, 1, 2 or 3; the corrector has one order more.

    Raises:
      ValueError: if `order` is not 1, 2 or 3.
    """
    _check_order("unipc", order, 3)

    schedule = schedule_of(denoise, schedule)

    def step(key, state, t, s):
        before, base, predicted = state.memory
        x_0 = predict(denoise, state.x, t).x_0
        here = Node(schedule.log_snr(t), x_0)
        redone = _exponential_step(
            base, schedule, (before.nodes[0], here, *before.nodes[1:]), before.used + 1, here
        )
        # Add the correction to x, so that changes made between steps, such as guidance, are kept.
        x = state.x + select(before.used > 0, redone - predicted, jnp.zeros_like(x_0))
        history = _after(before, here, schedule.log_snr(s), order)
        there = Node(schedule.log_snr(s), x_0)
        ahead = _exponential_step(x, schedule, history.nodes, history.used, there)
        return State(ahead, x_0, (history, x, ahead))

    def init(x_1):
        state = _init(order)(x_1)
        return state._replace(memory=(state.memory, x_1, x_1))

    return Sampler(init, step)


def lms(denoise: Denoiser, schedule: Schedule | None = None, *, order: int = 4) -> Sampler:
    """The linear multistep method in sigma/alpha, with the coefficients of uneven steps.

    Adams-Bashforth methods (k-diffusion's `sample_lms`); order 1 is `ddim`. It is deterministic,
    with one evaluation per step. Use `karras_times`.

    Args:
      denoise: a `Denoiser`.
      schedule: its `Schedule`; None if the denoiser carries it.
      order: 1 to 4, the number of evaluations that a step uses.

    Raises:
      ValueError: if `order` is not 1 to 4.
    """
    _check_order("lms", order, 4)

    schedule = schedule_of(denoise, schedule)

    def step(key, state, t, s):
        x = state.x
        x_0, eps = predict(denoise, x, t)[:2]
        log_snr_s = schedule.log_snr(s)
        history = _after(state.memory, Node(schedule.log_snr(t), eps), log_snr_s, order)
        ratio = lambda log_snr: jnp.exp(-log_snr / 2)
        rise = ratio(log_snr_s) - ratio(schedule.log_snr(t))
        u = [(ratio(node.log_snr) - ratio(schedule.log_snr(t))) / rise for node in history.nodes]
        moments = [1 / (k + 1) for k in range(len(u))]
        mean = _integral(history.nodes, u, history.used, moments)
        # x/alpha_t + rise mean, without the difference of large numbers.
        euler = x_0 + expand(ratio(log_snr_s), x) * eps
        alpha_s = scales_at(schedule, s, x)[0]
        return State(alpha_s * (euler + expand(rise, x) * (mean - eps)), x_0, history)

    return Sampler(_init(order), step)


def _dpm_solver_pp(denoise, schedule, order, eta: Scalar = 0.0):
    if known(eta) and not eta >= 0:
        raise ValueError(f"{eta=}: must be at least 0")

    schedule = schedule_of(denoise, schedule)

    def step(key, state, t, s):
        x_0 = predict(denoise, state.x, t).x_0
        there = Node(schedule.log_snr(s), x_0)
        history = _after(state.memory, Node(schedule.log_snr(t), x_0), there.log_snr, order)
        x = _exponential_step(state.x, schedule, history.nodes, history.used, there, eta)
        if in_use(eta):
            h = (there.log_snr - schedule.log_snr(t)) / 2
            std = scales_at(schedule, s, x)[1] * expand(jnp.sqrt(-jnp.expm1(-2 * eta * h)), x)
            x = x + std * keys.normal(key, x.shape, x.dtype)
        return State(x, x_0, history)

    return Sampler(_init(order), step, stochastic=in_use(eta))


def _init(order):
    def init(x_1):
        # Unused nodes are far outside any schedule, so that arithmetic on them and its gradients
        # are finite.
        nowhere = Node(jnp.full((), -100.0), jnp.zeros_like(x_1))
        return State(x_1, jnp.zeros_like(x_1), History((nowhere,) * order, jnp.zeros((), int)))

    return init


def _after(before, here, log_snr_s, order):
    """Put `here` first in the history; a step to `log_snr_s` may use the first `used` nodes."""
    last = before.nodes[0].log_snr
    long = jnp.abs(log_snr_s - here.log_snr) > 3 * jnp.abs(here.log_snr - last)
    count = jnp.where(long, 0, before.used)
    here = here._replace(log_snr=here.log_snr.astype(last.dtype))
    return History((here, *before.nodes)[:order], jnp.minimum(count + 1, order))


def _exponential_step(x, schedule, nodes, count, there, eta: Scalar = 0.0):
    """x at `there`, from x at the first node and the x_0 of the first `count` nodes."""
    h = (there.log_snr - nodes[0].log_snr) / 2
    u = [(node.log_snr - nodes[0].log_snr) / (2 * h) for node in nodes]
    moments = _exponential_moments((1 + eta) * h, len(nodes))
    if len(nodes) > 1:
        # The published second-order formulas take the exponential at the middle of the step.
        half = moments[0] / 2
        moments[1] = half if len(nodes) == 2 else jnp.where(count > 2, moments[1], half)
    (_, sigma_t), (alpha_s, sigma_s) = (schedule.scales(n.log_snr) for n in (nodes[0], there))
    decay = sigma_s / sigma_t * jnp.exp(-eta * h)
    return expand(decay, x) * x + expand(alpha_s, x) * _integral(nodes, u, count, moments)


def _exponential_moments(h, n):
    """int_0^1 h e^{h (u - 1)} u^k du for k = 0..n-1, by integration by parts."""
    up = [-jnp.expm1(-h)]
    for k in range(1, n):
        up.append(1 - k / h * up[-1])
    # For short steps the upward recursion loses precision, so use the downward recursion, from the
    # series of the last moment, int_0^1 e^{hu} u^k du = sum_j h^j / (j! (k + j + 1)).
    short = jnp.abs(h) < 1
    small, last = jnp.where(short, h, 0.0), 0.0
    for j in reversed(range(18)):
        last = last * small + 1 / (math.factorial(j) * (n + j))
    down = [small * jnp.exp(-small) * last]
    for k in reversed(range(1, n)):
        down.insert(0, (1 - down[0]) * small / k)
    return [jnp.where(short, a, b) for a, b in zip(down, up, strict=True)]


def _integral(nodes, u, count, moments):
    """The integral of the polynomial through the first `count` nodes, at u, by the moments of u^k.

    Newton's form: f[0] + f[0,1] (u - u_0) + f[0,1,2] (u - u_0)(u - u_1) + ...
    """
    differences = [node.value for node in nodes]
    total = 0
    basis = [1.0]  # the product of (u - u_i) so far, by powers of u
    for level in range(len(nodes)):
        weight = sum(c * m for c, m in zip(basis, moments, strict=False))
        weight = jnp.where(count > level, weight, 0.0)
        total = total + expand(weight, differences[0]) * differences[0]
        shifted, kept = [0.0, *basis], [-u[level] * c for c in basis] + [0.0]
        basis = [a + b for a, b in zip(shifted, kept, strict=True)]
        differences = [
            (b - a) * expand(1 / jnp.where(count > i + level + 1, u[i + level + 1] - u[i], 1.0), a)
            for i, (a, b) in enumerate(itertools.pairwise(differences))
        ]
    return total


def _check_order(name, order, highest):
    if not (whole(order) and order <= highest):
        raise ValueError(f"{name} of order {order}: there are orders 1 to {highest}")
