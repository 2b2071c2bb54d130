"""Training: a regression on one target at random times, whatever the target and the weighting."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from . import keys
from .denoisers import denoiser
from .likelihood import bound_term
from .process import q_sample, scales_at
from .schedules import Schedule, at_least_float32, rate_at, time_at
from .targets import Row, encode, eps_per_out, unit_variance
from .types import (
    Array,
    Cond,
    Data,
    Key,
    Network,
    Real,
    Scalar,
    Scale,
    Time,
)
from .weightings import Weighting


def sample_times(
    key: Key, n: int, steps: int | None = None, index: Int[Real, " batch"] | None = None
) -> Float[Array, " batch"]:
    """Random times in (0, 1], stratified: one in each n-th of the interval.

    All n share one uniform offset, t_i = 1 - frac(u + i / n), so that each is uniform by itself
    while their mean over the batch varies little (Kingma et al. 2021, appendix I.1).

    Args:
      key: one key, shared by the whole batch.
      n: size of the whole (global) batch.
      steps: T for times on the grid i/T, i = 1..T, as in discrete-time diffusion; None for
        continuous time.
      index: positions in the global batch of the examples at hand; all of them by default.

    Returns:
      Times `[n]`, or one for each of `index`.

    Raises:
      ValueError: if `key` is several, or `n` or `steps` is below 1.

    >>> t = sample_times(jax.random.key(0), 4)
    >>> sorted((t * 4).astype(int).tolist())
    [0, 1, 2, 3]
    """
    if keys.typed(key).ndim or n < 1 or (steps is not None and steps < 1):
        raise ValueError(
            f"{n=}, {steps=}, key of shape {key.shape}: need one key for the whole batch, n and "
            "steps at least 1"
        )
    index = jnp.arange(n) if index is None else index
    t = 1 - (jax.random.uniform(key) + index / n) % 1
    return t if steps is None else jnp.ceil(t * steps) / steps


class LossHistory(NamedTuple):
    """The last losses at each step of discrete time, to draw times by: loss-aware sampling.

    Nichol & Dhariwal 2021, section 3.3, equation 18: a time is drawn in proportion to the root mean
    square of its last losses, and its loss divided by that, so that the mean stays what it was and
    varies less. A pytree, to be carried in `TrainState.extra`.

    Attributes:
      losses: `[steps, n]`, unweighted, newest last.
      seen: how many of them there are, `[steps]`.
    """

    losses: Float[Array, "steps n"]
    seen: Int[Array, " steps"]


def loss_history(steps: int, n: int = 10) -> LossHistory:
    """An empty history of T = `steps` times, n losses each.

    Raises:
      ValueError: if either is below 1.
    """
    if min(steps, n) < 1:
        raise ValueError(f"{steps=}, {n=}: must be at least 1")
    return LossHistory(jnp.zeros((steps, n)), jnp.zeros(steps, jnp.int32))


def loss_aware_times(
    key: Key,
    history: LossHistory,
    n: int,
    index: Int[Real, " batch"] | None = None,
    uniform: float = 0.001,
) -> tuple[Float[Array, " batch"], Float[Array, " batch"]]:
    """Random times on the grid i/T in proportion to their losses, stratified.

    Args:
      key: one key, shared by the whole batch.
      history: until every time has its n losses, times are uniform.
      n: size of the whole (global) batch.
      index: positions in the global batch of the examples at hand; all of them by default.
      uniform: probability of drawing uniformly instead, so that none is forgotten.

    Returns:
      Times, and the weights 1 / (T p) to multiply their losses by; `[n]`, or one for each of
      `index`.
    """
    steps, length = history.losses.shape
    size = jnp.sqrt(jnp.mean(history.losses**2, axis=1))
    p = (1 - uniform) * size / jnp.maximum(size.sum(), 1e-30) + uniform / steps
    p = jnp.where(jnp.all(history.seen == length), p, 1 / steps)
    cumulative = jnp.cumsum(p)
    u = sample_times(key, n, index=index) * cumulative[-1]
    i = jnp.clip(jnp.searchsorted(cumulative, u), 0, steps - 1)
    return (i + 1) / steps, 1 / (steps * p[i])


def remember_losses(
    history: LossHistory, t: Float[Array, " batch"], losses: Float[Array, " batch"]
) -> LossHistory:
    """The history with a batch of unweighted losses more, in the order of the batch.

    Args:
      history: the history so far.
      t: times on the grid i/T, `[batch]`.
      losses: unweighted, `[batch]`.
    """
    steps, length = history.losses.shape

    def add(history, pair):
        i, loss = pair
        row, seen = history.losses[i], history.seen[i]
        shifted = jnp.append(row[1:], loss)
        row = jnp.where(seen == length, shifted, row.at[jnp.minimum(seen, length - 1)].set(loss))
        return LossHistory(
            history.losses.at[i].set(row), history.seen.at[i].min(length - 1).at[i].add(1)
        ), None

    i = jnp.round(t * steps).astype(jnp.int32) - 1
    return jax.lax.scan(add, history, (i, losses))[0]


def loss_weight(
    schedule: Schedule,
    target: str | Row,
    t: Time,
    weight: Weighting | None = None,
    steps: int | None = None,
) -> Scale:
    """The factor on the squared error in the target's own space that `weight` amounts to.

    Args:
      schedule: a `Schedule`.
      target: a name in `TARGETS`, or a row function.
      t: times `[]` or `[batch]`.
      weight: a weighting of the eps error; None for a target of unit variance, 1 / (a^2 + b^2).
      steps: T, if time is discrete.

    Returns:
      Weights of the shape of t.
    """
    alpha, sigma = schedule(t)
    if weight is None:
        return 1 / unit_variance(target, alpha, sigma)
    return weight(schedule.log_snr(t), rate_at(schedule, t, steps)) * (
        eps_per_out(target, alpha, sigma) ** 2
    )


def effective_weight(
    schedule: Schedule,
    target: str | Row,
    weight: Weighting | None = None,
    density: Callable[[Array], Array] | None = None,
    steps: int | None = None,
) -> Callable[[Array], Array]:
    """What a loss weighs an error of x_0 by, as a function of log-SNR: the objective itself.

    Whatever the schedule, the target, the weighting and the density of times, the expected loss is
    the integral of this times the mean squared error of x_0 over log-SNR (Kingma & Gao 2023,
    section 3): two objectives are the same if and only if these functions are.

    Args:
      schedule: a `Schedule`.
      target: what the network regresses.
      weight: a weighting of the eps error, or None for unit variance, as in `diffusion_loss`.
      density: of the times, a function of t on [0, 1]; None for uniform ones.
      steps: T, if time is discrete; between the times of the grid it interpolates.

    Returns:
      A function of log-SNR, `[]` or `[n]`, to weights of that shape.

    >>> import diffjax
    >>> weighs = effective_weight(diffjax.cosine(), "x_0", diffjax.weightings.elbo)
    >>> bool(jnp.allclose(weighs(jnp.array([0.0, 2.0])), jnp.exp(jnp.array([0.0, 2.0])) / 2))
    True
    """

    def weighs(log_snr: Array) -> Array:
        t = time_at(schedule, jnp.asarray(log_snr))
        on_eps = loss_weight(schedule, target, t, weight, steps) / (
            eps_per_out(target, *schedule(t)) ** 2
        )
        of_times = 1.0 if density is None else density(t)
        return jnp.asarray(on_eps * jnp.exp(log_snr) * of_times / rate_at(schedule, t))

    return weighs


def diffusion_loss(
    key: Key,
    network: Network,
    schedule: Schedule,
    target: str | Row,
    x_0: Data,
    cond: Cond = None,
    weight: Weighting | None = None,
    t: Time | None = None,
    steps: int | None = None,
) -> Float[Array, " batch"]:
    """The weighted denoising loss of each example: one noise, one time, one squared error.

    Args:
      key: one key, or one per example `[batch]`.
      network: (x_t, log_snr `[batch]`, cond) -> an estimate of the target.
      schedule: a `Schedule`.
      target: what the network regresses, a name in `TARGETS` or a row function.
      x_0: clean data `[batch, ...]`; pixels are in [-1, 1] by convention.
      cond: conditioning passed to the network.
      weight: a weighting of the eps error (see `weightings`); None for 1 / (a^2 + b^2), which
        gives every target unit variance (1 for x_0, eps and v; Song's sigma^2 for the score).
      t: times `[]` or `[batch]`. By default they are drawn: stratified over the batch from one
        key, independently from one key per example.
      steps: T for discrete time, None for continuous.

    Returns:
      Losses `[batch]`, the mean over the data axes; with `weightings.elbo`, in nats per dimension.

    Raises:
      ValueError: if the target is unknown, or the network's output has another shape than `x_0`.

    Source: Ho et al. 2020, Algorithm 1; Kingma et al. 2021, equations 13 to 18.

    >>> import diffjax
    >>> x_0 = jax.random.normal(jax.random.key(0), (8, 2))
    >>> zero = lambda x_t, log_snr, cond: 0 * x_t
    >>> diffusion_loss(jax.random.key(1), zero, diffjax.cosine(), "eps", x_0).shape
    (8,)
    """
    t, eps = _draw(key, x_0, t, steps)
    alpha, sigma = scales_at(schedule, t, x_0)
    out = network(alpha * x_0 + sigma * eps, schedule.log_snr(t), cond)
    if out.shape != x_0.shape:
        raise ValueError(f"the network gave {out.shape} for data {x_0.shape}: must be equal")
    error = (out - encode(target, x_0, eps, alpha, sigma)).astype(t.dtype)
    mse = jnp.mean(error**2, axis=range(1, error.ndim))
    return mse * loss_weight(schedule, target, t, weight, steps)


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
    """`diffusion_loss`, and a little of the bound to learn the decoder's variance by.

    L_simple + bound_weight L_vlb, where the bound sees the predicted mean as a constant (Nichol &
    Dhariwal 2021, equation 16; theirs is in bits, 1.44 times ours).

    Args:
      key: one key, or one per example `[batch]`.
      network: its output has twice the channels (see `denoisers.denoiser`).
      schedule: a `Schedule`.
      target: what the first half of the output regresses.
      x_0: clean data `[batch, ...]`.
      cond: conditioning passed to the network.
      weight: a weighting of the eps error, of the first part alone.
      t: times on the grid i/T, `[]` or `[batch]`; drawn by default.
      steps: T, at least 2.
      bound_weight: weight of the bound, in nats per dimension.
      levels: how many values from -1 to 1 a number of the data may have; None if it is continuous.

    Returns:
      Losses `[batch]`.

    Raises:
      ValueError: if the network's output has not twice the channels.
    """
    t, eps = _draw(key, x_0, t, steps)
    prediction = denoiser(network, schedule, target, learned_variance=True)(
        q_sample(schedule, x_0, t, eps), t, cond
    )
    out = encode(target, prediction.x_0, prediction.eps, *scales_at(schedule, t, x_0))
    simple = diffusion_loss(key, lambda *_: out, schedule, target, x_0, cond, weight, t, steps)
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
    """The discrete bound itself: T times one of its terms, in nats per dimension.

    Its expectation over t is the bound without its prior term (Nichol & Dhariwal 2021, equation 4;
    their L_vlb). It is noisy: see `LossHistory` for times that make it less so.

    Args:
      key: one key, or one per example `[batch]`.
      network: its output has twice the channels if the variance is learned.
      schedule: a `Schedule`.
      target: what (the first half of) the output regresses.
      x_0: clean data `[batch, ...]`.
      cond: conditioning passed to the network.
      t: times on the grid i/T, `[]` or `[batch]`; drawn by default.
      steps: T, at least 2.
      variance: that of the decoder, "posterior", "beta" or "learned".
      levels: how many values from -1 to 1 a number of the data may have; None if it is continuous.

    Returns:
      Losses `[batch]`.

    Raises:
      ValueError: if there is no such variance, or the network's output has not the channels.
    """
    t, eps = _draw(key, x_0, t, steps)
    denoise = denoiser(network, schedule, target, learned_variance=variance == "learned")
    prediction = denoise(q_sample(schedule, x_0, t, eps), t, cond)
    nats = bound_term(schedule, prediction, x_0, eps, t, steps, variance, levels)
    return steps * nats / math.prod(x_0.shape[1:])


def _draw(key, x_0, t, steps):
    """The times `[batch]`, if they are not given, and the noise of each example."""
    batch, key = x_0.shape[0], keys.typed(key)
    if t is not None:
        t = jnp.broadcast_to(at_least_float32(t), (batch,))
    elif key.ndim == 0:
        t = sample_times(keys.fold_in(key, batch), batch, steps)  # 0..batch-1 are the examples'
    else:
        t = jax.vmap(lambda k: sample_times(k, 1, steps)[0])(keys.fold_in(key, 1))
    key_eps = keys.fold_in(keys.per_example(key, batch), 0)
    return t, keys.normal(key_eps, x_0.shape, x_0.dtype)
