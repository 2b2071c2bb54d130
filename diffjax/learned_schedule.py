"""The loss that learns a schedule beside a network: the bound, in continuous time.

Kingma et al. 2021, "Variational Diffusion Models", appendix I. The bound depends on the ends of the
log-SNR, which are therefore learned as the network is. It does not depend on the curve between
them, which only changes the variance of the estimate of the bound. The curve is learned by lowering
that variance: the mean of the estimate is the same for every curve, so the mean of its square is
the variance plus a constant.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from . import keys
from .likelihood import prior_term, reconstruction_term
from .losses import diffusion_loss, draw
from .schedules import Schedule, rate_at, split
from .targets import Row
from .types import Array, Cond, Data, Key, Network, Time
from .weightings import elbo


def continuous_bound_loss(
    key: Key,
    network: Network,
    schedule: Schedule,
    target: str | Row,
    x_0: Data,
    cond: Cond = None,
    t: Time | None = None,
    *,
    levels: int | None = 256,
) -> Float[Array, " batch"]:
    """An estimate of the bound in continuous time, whose gradient also learns the schedule.

    The value is `diffusion_loss` with `weightings.elbo()`, plus the prior and the reconstruction
    term. The gradient with respect to the network and to the schedule's ends is that of the sum of
    the losses. The gradient with respect to the schedule's inside is that of the sum of the squares
    of `diffusion_loss`. Both come from one backward pass.

    Args:
      key: one key, or one per example `[batch]`.
      network: (x_t, log_snr `[batch]`, cond) -> an estimate of the target.
      schedule: one of `schedules.monotone`.
      target: the target that the network regresses.
      x_0: clean data `[batch, ...]`.
      cond: conditioning passed to the network.
      t: times `[]` or `[batch]`; drawn by default.
      levels: number of values in [-1, 1] that an element of the data can take; None for continuous
        data.

    Returns:
      Losses `[batch]`, in nats per dimension.

    Raises:
      TypeError: if the schedule is not one of `monotone`.
    """
    ends, inside = split(schedule)
    t, _ = draw(key, x_0, t)
    _, eps = draw(keys.fold_in(keys.per_example(key, len(x_0)), 2), x_0, t)

    def loss(log_snr, rate):
        # At the time t a loss depends on its schedule by these two numbers alone, as on this line.
        line = schedule._replace(log_snr=lambda s: log_snr - rate * (s - t))
        return diffusion_loss(key, network, line, target, x_0, cond, elbo(), t)

    at = lambda schedule: (schedule.log_snr(t), rate_at(schedule, t))
    diffusion = _two_gradients(loss, at(ends), at(inside))
    rest = prior_term(ends, x_0) + _reconstruction(ends, x_0, eps, levels)
    return diffusion + rest / math.prod(x_0.shape[1:])


def _reconstruction(schedule, x_0, eps, levels):
    """The reconstruction term, whose only parameter is the log-SNR at t = 0.

    It has the derivative of forward mode, because that of reverse mode would store an intermediate
    result for each of the `levels`.
    """
    unused: Any = lambda x_t, t, cond=None: None  # in continuous time

    def term(log_snr):
        constant = schedule._replace(log_snr=lambda t: log_snr)
        return reconstruction_term(unused, constant, x_0, eps, levels=levels)

    log_snr = schedule.log_snr(0.0)
    still = jax.lax.stop_gradient(log_snr)
    value, slope = jax.jvp(term, (still,), (jnp.ones_like(still),))
    return value + slope * (log_snr - still)


def _two_gradients(loss, by_mean, by_square):
    """loss(*by_mean) `[batch]`; the derivative by `by_square`, which is equal, is that of loss^2.

    Args:
      loss: a function of arrays `[batch]` to losses `[batch]`, in which each example is apart.
      by_mean: its arguments, differentiated as usual.
      by_square: the same arguments.
    """
    # What the loss closes over, such as the network's parameters, has to be an argument too.
    loss, hidden = jax.closure_convert(loss, *by_mean)
    return _of_loss_and_square(loss, by_mean, by_square, hidden)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _of_loss_and_square(loss, by_mean, by_square, hidden):
    return loss(*by_mean, *hidden)


def _forward(loss, by_mean, by_square, hidden):
    each, back = jax.vjp(lambda args, hidden: loss(*args, *hidden), by_mean, hidden)
    return each, (each, back)


def _backward(loss, kept, weight):
    each, back = kept
    of_loss, of_hidden = back(weight)
    of_square = jax.tree.map(lambda g: 2 * each * g, of_loss)
    return of_loss, of_square, of_hidden


_of_loss_and_square.defvjp(_forward, _backward)
