"""Losses that learn the decoder's variance, between the posterior's and beta, from the bound.

Nichol & Dhariwal 2021, "Improved denoising diffusion probabilistic models", section 3.1. The
network's output has twice the channels, which `denoiser(..., learned_variance=True)` decodes.
"""

import math

import jax
from jaxtyping import Float

from .denoisers import denoiser
from .likelihood import bound_term
from .losses import draw, weighted_error
from .process import q_sample, scales_at
from .schedules import Schedule
from .targets import Row, encode
from .types import Array, Cond, Data, Key, Network, Scalar, Time
from .weightings import Weighting


def hybrid_loss(
    key: Key,
    network: Network,
    schedule: Schedule,
    target: str | Row,
    x_0: Data,
    cond: Cond = None,
    weight: Weighting | None = None,
    t: Time | None = None,
    *,
    steps: int,
    bound_weight: Scalar = 0.001,
    levels: int | None = 256,
) -> Float[Array, " batch"]:
    """`diffusion_loss` plus a small multiple of the bound, which trains the decoder's variance.

    L_simple + bound_weight L_vlb, where the predicted mean is a constant in the bound (Nichol &
    Dhariwal 2021, equation 16; theirs is in bits, 1.44 times ours).

    Args:
      key: one key, or one per example `[batch]`.
      network: its output has twice the channels (see `denoisers.denoiser`).
      schedule: a `Schedule`.
      target: the target that the first half of the output regresses.
      x_0: clean data `[batch, ...]`.
      cond: conditioning passed to the network.
      weight: a weighting of the eps error, which applies to L_simple only.
      t: times on the grid i/T, `[]` or `[batch]`; drawn by default.
      steps: T, at least 2.
      bound_weight: weight of the bound, in nats per dimension.
      levels: number of values in [-1, 1] that an element of the data can take; None for continuous
        data.

    Returns:
      Losses `[batch]`.

    Raises:
      ValueError: if the network's output does not have twice the channels.
    """
    t, eps = draw(key, x_0, t, steps)
    prediction = denoiser(network, schedule, target, learned_variance=True)(
        q_sample(schedule, x_0, t, eps), t, cond
    )
    out = encode(target, prediction.x_0, prediction.eps, *scales_at(schedule, t, x_0))
    simple = weighted_error(schedule, target, out, x_0, eps, t, weight, steps)
    x_0_hat, eps_hat = jax.lax.stop_gradient((prediction.x_0, prediction.eps))
    constant = prediction._replace(x_0=x_0_hat, eps=eps_hat)
    nats = bound_term(schedule, constant, x_0, eps, t, steps, "learned", levels)
    return simple + bound_weight * steps * nats / math.prod(x_0.shape[1:])


def bound_loss(
    key: Key,
    network: Network,
    schedule: Schedule,
    target: str | Row,
    x_0: Data,
    cond: Cond = None,
    t: Time | None = None,
    *,
    steps: int,
    variance: str = "learned",
    levels: int | None = 256,
) -> Float[Array, " batch"]:
    """An estimate of the discrete bound: T times one of its terms, in nats per dimension.

    Its expectation over t is the bound without its prior term (the L_vlb of Nichol & Dhariwal
    2021). Its variance is large; the times of `loss_aware_times` reduce it.

    Args:
      key: one key, or one per example `[batch]`.
      network: its output has twice the channels if the variance is learned.
      schedule: a `Schedule`.
      target: the target that (the first half of) the output regresses.
      x_0: clean data `[batch, ...]`.
      cond: conditioning passed to the network.
      t: times on the grid i/T, `[]` or `[batch]`; drawn by default.
      steps: T, at least 2.
      variance: variance of the decoder, "posterior", "beta" or "learned".
      levels: number of values in [-1, 1] that an element of the data can take; None for continuous
        data.

    Returns:
      Losses `[batch]`.

    Raises:
      ValueError: if `variance` is unknown, or the network's output has a wrong number of channels.
    """
    t, eps = draw(key, x_0, t, steps)
    denoise = denoiser(network, schedule, target, learned_variance=variance == "learned")
    prediction = denoise(q_sample(schedule, x_0, t, eps), t, cond)
    nats = bound_term(schedule, prediction, x_0, eps, t, steps, variance, levels)
    return steps * nats / math.prod(x_0.shape[1:])
