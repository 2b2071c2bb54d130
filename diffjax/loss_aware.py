"""Loss-aware times: importance sampling of times by the size of their losses.

The loss of the bound and its gradient vary over orders of magnitude with t. A time is drawn with a
probability in proportion to the root mean square of its last losses, and its loss is divided by
that, which keeps the mean and reduces the variance (Nichol & Dhariwal 2021, section 3.3).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from .losses import sample_times
from .types import Array, Key, Real


class LossHistory(NamedTuple):
    """The last losses at each step of discrete time, a pytree that `TrainState.extra` can hold.

    Attributes:
      losses: unweighted losses `[steps, n]`, newest last.
      seen: number of losses recorded at each step, `[steps]`.
    """

    losses: Float[Array, "steps n"]
    seen: Int[Array, " steps"]


def loss_history(steps: int, n: int = 10) -> LossHistory:
    """Make an empty history of T = `steps` times with up to n losses each.

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
    """Draw stratified random times on the grid i/T, in proportion to their losses.

    Args:
      key: one key, shared by the whole batch.
      history: the last losses; times are uniform until every time has all of its losses.
      n: size of the whole (global) batch.
      index: positions in the global batch for which times are returned; all by default.
      uniform: probability of a uniform draw instead, so that every time is drawn.

    Returns:
      Times, and the weights 1 / (T p) by which to multiply their losses; `[n]`, or one for each of
      `index`.

    Raises:
      ValueError: unless `0 <= uniform <= 1`.
    """
    if not 0 <= uniform <= 1:
        raise ValueError(f"{uniform=}: must be in [0, 1]")
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
    """Add a batch of unweighted losses to the history, in the order of the batch.

    Args:
      history: the history so far.
      t: times on the grid i/T, `[batch]`.
      losses: unweighted losses `[batch]`.
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
