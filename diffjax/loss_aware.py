"""Loss-aware times: look most often where the loss has been large.

The loss of the bound varies over orders of magnitude with t, and its gradient with it. A time is
drawn in proportion to the root mean square of its last losses, and its loss divided by that, so
that the mean stays what it was and varies less (Nichol & Dhariwal 2021, section 3.3).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from .losses import sample_times
from .types import Array, Key, Real


class LossHistory(NamedTuple):
    """The last losses at each step of discrete time; a pytree, to be carried in `TrainState.extra`.

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
