"""Per-example randomness: the draws of example i depend only on the key of example i.

A `key` argument anywhere in diffjax is one key, or one key per example `[batch]`. A single key is
folded with the positions 0..batch-1. A caller that splits a batch over devices, processes or
micro-batches passes `fold_in(key, global_index)` instead, so that all draws are the same, bit for
bit. This holds for JAX's default threefry keys; `rbg` keys draw differently under `vmap`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from .types import Array, Key, Real


def typed(key: Key) -> Key:
    """Return `key` as typed keys, wrapping the raw `uint32` data of `jax.random.PRNGKey`.

    Raises:
      TypeError: if it is no key, such as an integer.
    """
    if getattr(key, "dtype", None) is None or not (
        key.dtype == jnp.uint32 or jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    ):
        raise TypeError(f"need a key, such as jax.random.key(0), got {key!r}: pass a key first")
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key
    return jax.random.wrap_key_data(key)


def fold_in(key: Key, data: int | Int[Real, "..."]) -> Key:
    """Apply `jax.random.fold_in` to one or many keys, and one or many numbers.

    Args:
      key: one key, or keys `[batch]`.
      data: an integer `[]` or integers `[batch]`.

    Returns:
      One key if both arguments are single, else keys `[batch]`.
    """
    key, data = typed(key), jnp.asarray(data)
    shape = jnp.broadcast_shapes(key.shape, data.shape)
    if not shape:
        return jax.random.fold_in(key, data)
    return jax.vmap(jax.random.fold_in)(jnp.broadcast_to(key, shape), jnp.broadcast_to(data, shape))


def per_example(key: Key, batch: int) -> Key:
    """Return one key per example, `[batch]`; a single `key` is folded with the positions.

    Raises:
      ValueError: if `key` is an array of keys of another length than `batch`.

    >>> key = jax.random.key(0)
    >>> keys = per_example(key, 4)
    >>> bool(keys[2] == jax.random.fold_in(key, 2))
    True
    """
    key = typed(key)
    if key.ndim == 0:
        return fold_in(key, jnp.arange(batch))
    if key.shape != (batch,):
        raise ValueError(
            f"keys of shape {key.shape} for a batch of {batch}: need one key, or keys [batch]"
        )
    return key


def normal(key: Key, shape: tuple[int, ...], dtype: Any = float) -> Float[Array, "..."]:
    """Draw standard normal noise `[batch, ...]`, each example from its own key.

    Args:
      key: one key, or one per example `[batch]`.
      shape: `[batch, ...]`.
      dtype: a floating-point dtype; by default float32, or float64 where that is enabled.
    """
    keys, dtype = per_example(key, shape[0]), jnp.result_type(dtype)
    return jax.vmap(lambda k: jax.random.normal(k, shape[1:], dtype))(keys)
