r"""Densities of noise levels: how often training visits each log-SNR.

Uniform times visit log-SNR with the density 1 / rate. Another density is drawn exactly, and still
stratified over the batch, by its quantile function: with u uniform on [0, 1],

    log_snr = quantile(u),    t = the time of the schedule at which it has this log-SNR.

The density relative to that of uniform times is du / dt. A loss that is divided by it keeps its
mean, whatever the density, so that the density decides only how much the mean of a batch varies
(importance sampling). EDM, EDM2 and flow models with logit-normal times do not divide: their
density is a part of the objective, which `effective_weight` shows.

Each function here takes a schedule, and returns a density that is truncated to the schedule's ends:

    density = densities.normal(schedule, mean=2.4, std=2.4)
    t = sample_times(key, n, density=density)
    loss = diffusion_loss(key, network, schedule, target, x_0, t=t)
    loss = loss / densities.relative(density, t)
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from .schedules import Schedule, time_at
from .types import Array, Real, Scalar, Time, at_least_float32, known

LEAST_MASS = 1e-3
"""The least probability that a density may have between the ends of the schedule."""


class Density(NamedTuple):
    """A density of noise levels on a schedule.

    Attributes:
      schedule: the schedule on which training visits them.
      quantile: u in [0, 1] -> log-SNR, decreasing from the schedule's log-SNR at t = 0 to that at
        t = 1, elementwise.
      cdf: the inverse of `quantile`.
      tail: 1 - cdf, exact where cdf is almost 1; None: that difference.
    """

    schedule: Schedule
    quantile: Callable[[Array], Array]
    cdf: Callable[[Array], Array]
    tail: Callable[[Array], Array] | None = None


def uniform(schedule: Schedule) -> Density:
    """The density of uniform times, whose quantile function is the schedule itself."""
    return Density(schedule, schedule.log_snr, lambda log_snr: time_at(schedule, log_snr))


def normal(schedule: Schedule, mean: Scalar = 2.4, std: Scalar = 2.4) -> Density:
    """A normal density of log-SNR.

    | paper | there | mean, std |
    |---|---|---|
    | EDM (the defaults) | ln sigma of mean -1.2, deviation 1.2 | 2.4, 2.4 |
    | EDM2, latents | -0.4, 1.0 | 0.8, 2.0 |
    | EDM2, 64 pixels | -0.8, 1.6 | 1.6, 3.2 |
    | Stable Diffusion 3 | logit t of mean 0, deviation 1 | 0, 2 |
    | JiT | logit of the data's share of mean -0.8, deviation 0.8 | -1.6, 1.6 |

    ln sigma is -log_snr / 2, and so is the logit of the time of a rectified flow.

    Raises:
      ValueError: unless `std > 0`, or if the schedule's ends hold less than `LEAST_MASS` of it.

    Source: Karras et al. 2022, table 1; Karras et al. 2024; Esser et al. 2024, section 3.1; Li & He
    2025.
    """
    if known(mean, std) and not (std > 0 and jnp.isfinite(mean)):
        raise ValueError(f"{mean=} must be finite, {std=}: must be positive")
    ends = jnp.zeros(()), jnp.ones(())
    least_noise, most_noise = (schedule.log_snr(t) for t in ends)
    # The probabilities of less and of more noise than this: each is exact where it is small.
    less = lambda log_snr: jax.scipy.special.ndtr((mean - log_snr) / std)
    more = lambda log_snr: jax.scipy.special.ndtr((log_snr - mean) / std)
    before, after = less(least_noise), more(most_noise)
    mass = less(most_noise) - before
    if known(mass) and not mass >= LEAST_MASS:
        raise ValueError(
            f"the schedule has log-SNR from {most_noise:.3g} to {least_noise:.3g}, where a normal "
            f"density with {mean=:g}, {std=:g} has a probability of only {mass:.2g}"
        )

    def quantile(u):
        low, high = before + u * mass, after + (1 - u) * mass
        z = jax.scipy.special.ndtri(jnp.minimum(low, high))
        return jnp.clip(mean - std * jnp.where(low < high, z, -z), most_noise, least_noise)

    return Density(
        schedule,
        quantile,
        cdf=lambda log_snr: (less(log_snr) - before) / mass,
        tail=lambda log_snr: (more(log_snr) - after) / mass,
    )


def relative(density: Density, t: Time, steps: int | None = None) -> Array:
    """The density at the times t over that of uniform times, of the shape of t.

    Args:
      density: a density.
      t: times `[]` or `[batch]`.
      steps: T, if times are rounded up to the grid i/T. The result is then the probability of the
        step, times T.
    """
    u = lambda t: density.cdf(density.schedule.log_snr(t))
    t = at_least_float32(t)
    if steps is None:
        return jax.jvp(u, (t,), (jnp.ones_like(t),))[1]
    i = jnp.round(t * steps)
    last, first = i / steps, (i - 1) / steps
    mass, tail = u(last) - u(first), density.tail
    if tail is not None:
        rest = lambda t: tail(density.schedule.log_snr(t))
        mass = jnp.where(u(first) > 0.5, rest(first) - rest(last), mass)
    return steps * mass


def fit_normal(
    schedule: Schedule, edges: Sequence[float | int] | Array, losses: Float[Real, " bins"]
) -> tuple[Array, Array]:
    """The mean and the standard deviation of the `normal` density that these losses ask for.

    It is the one with which the losses, divided by their density, vary least. They would not vary
    at all if each time were drawn in proportion to its mean loss. The normal density is near that,
    and its tails do not fall below those of the losses: a large loss over a small density would
    vary without bound, which a fit of the two moments does not see.

    Args:
      schedule: the schedule that the losses were measured on.
      edges: the edges of the bins of log-SNR, ascending, such as `losses.LOG_SNR_EDGES`; the
        outermost bins include all beyond.
      losses: the mean loss in each bin, at least 0; NaN where nothing was measured.

    Raises:
      ValueError: unless the edges ascend, there is one loss between each two of them, all are
        finite and at least 0, and one inside the schedule's ends is positive.

    >>> import diffjax
    >>> schedule, edges = diffjax.cosine(-10, 10), range(-12, 13)
    >>> loss = jnp.where(jnp.abs(jnp.arange(-11.5, 12)) < 3, 1.0, jnp.nan)
    >>> mean, std = fit_normal(schedule, edges, loss)
    >>> abs(float(mean)) < 0.01, 1 < float(std) < 2
    (True, True)
    """
    losses = at_least_float32(losses)
    losses = jnp.where(jnp.isnan(losses), 0, losses)
    edges = jnp.asarray(edges, losses.dtype)
    sound = not known(losses, edges) or (
        losses.min() >= 0 and 0 < losses.max() < jnp.inf and bool((jnp.diff(edges) > 0).all())
    )
    if len(edges) != len(losses) + 1 or not sound:
        raise ValueError(
            f"{len(losses)} losses between {len(edges)} edges: need one less, finite, none "
            "negative, and a positive loss; and edges that ascend"
        )
    least, most = schedule.log_snr(jnp.ones(())), schedule.log_snr(jnp.zeros(()))
    edges = jnp.clip(edges, least, most).at[0].set(least).at[-1].set(most)
    share = -jnp.diff(time_at(schedule, edges)) * losses  # of uniform times, times their loss
    if known(share) and not share.sum() > 0:
        raise ValueError(
            f"all losses lie outside of the schedule, which has log-SNR from {least:.3g} to "
            f"{most:.3g}"
        )

    def square(mean, std):
        """The mean square of losses over their density, up to a constant, `[means, stds]`."""
        z = (edges[None, None] - mean[:, None, None]) / std[None, :, None]
        # In the nearer tail, where a difference is exact.
        a, b = (jnp.where(z[..., 1:] + z[..., :-1] > 0, -x, x) for x in (z[..., :-1], z[..., 1:]))
        mass = jnp.abs(jax.scipy.special.ndtr(b) - jax.scipy.special.ndtr(a))
        mass = mass / mass.sum(-1, keepdims=True)
        each = share[None, None]
        return jnp.where(each > 0, each**2 / mass, 0.0).sum(-1)

    centres, p = (edges[1:] + edges[:-1]) / 2, share / share.sum()
    mean = (p * centres).sum()
    within = jnp.diff(edges) ** 2 / 12  # of a bin, evenly filled
    std = jnp.sqrt((p * ((centres - mean) ** 2 + within)).sum())
    for k in range(10):  # from the moments on, a search of ever finer grids
        step = jnp.linspace(-1, 1, 9) / 2**k
        means, stds = mean + std * step, std * jnp.exp(step)
        best = jnp.argmin(jnp.nan_to_num(square(means, stds), nan=jnp.inf))
        mean, std = means[best // 9], stds[best % 9]
    return mean, std


DENSITIES: dict[str, Callable[..., Density]] = {"uniform": uniform, "normal": normal}
"""Densities by name, as configs and the command line choose them: (schedule, options)."""
