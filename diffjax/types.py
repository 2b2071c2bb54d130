"""The vocabulary: array shapes, keys, and the two functions everything else is made of.

Arrays are `[batch, ...]`, images are NHWC, times are `[]` or `[batch]`. The shapes are checked
in the tests (jaxtyping + beartype); at run time they are documentation and cost nothing.
"""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Float

Array = jax.Array
Key = jax.Array
"""One `jax.random.key`, or one per example, `[batch]`."""

Real = jax.Array | np.ndarray
Data = Float[Real, "batch *data"]
"""Clean or noisy examples, `[batch, ...]`."""
Scale = float | int | Float[Real, "..."]
"""alpha or sigma, already of a shape that broadcasts against the data (see `scales_at`)."""
Time = float | int | np.floating | Float[Real, ""] | Float[Real, " batch"]
"""Diffusion time in [0, 1]: 0 is data, 1 is noise. One for the batch, or one per example."""
Scalar = float | int | np.floating | Float[Real, ""]
"""A number that may be traced: a schedule's parameter, a guidance weight."""
Cond = Any
"""Whatever the network is conditioned on: a pytree of arrays `[batch, ...]`, or None."""


class Prediction(NamedTuple):
    """What a denoiser knows about x_t: the clean data and the noise it was made of.

    The two satisfy `x_t = alpha_t x_0 + sigma_t eps`; both are kept so that nobody divides by a
    small alpha or sigma to get back what the network said.
    """

    x_0: Data
    eps: Data


class LearnedPrediction(NamedTuple):
    """A `Prediction` by a network that has learned the decoder's variance too.

    `fraction` says where log std^2 lies between that of the posterior, 0, and "beta", that of
    q(x_t | x_s), 1; for each element of the data (Nichol & Dhariwal 2021, equation 15).
    """

    x_0: Data
    eps: Data
    fraction: Data


@runtime_checkable
class Network(Protocol):
    """Any function of noisy data `[batch, ...]`, log-SNR `[batch]` and conditioning."""

    def __call__(self, x_t: Data, log_snr: Array, cond: Cond, /) -> Data: ...


@runtime_checkable
class Denoiser(Protocol):
    """A network with its meaning: noisy data and time to the `Prediction` of x_0 and eps."""

    def __call__(self, x_t: Data, t: Time, cond: Cond = None) -> Prediction | LearnedPrediction: ...


def known(*values: Any) -> bool:
    """Whether all of them have a value to check: none is traced, as under `jit` or `vmap`."""
    return not any(isinstance(value, Tracer) for value in values)


def select(chosen: Any, a: Any, b: Any) -> Any:
    """Of each example a where `chosen`, a condition `[]` or `[batch]`, else b; pytrees of data."""
    chosen = jnp.asarray(chosen)
    pick = lambda x, y: jnp.where(
        chosen.reshape(chosen.shape + (1,) * (x.ndim - chosen.ndim)), x, y
    )
    return jax.tree.map(pick, a, b)


def expand(value: Any, like: Any) -> Array:
    """Broadcast per-example numbers, `[]` or `[batch]`, against data `[batch, ...]`.

    Appends axes of length one and casts to the dtype of `like`. This and `select` are
    the only places where anything in diffjax is broadcast by rank.

    Raises:
      TypeError: if `like` is not floating point: integers would round every scale to 0 or 1.

    >>> import jax.numpy as jnp
    >>> expand(jnp.ones(4), like=jnp.ones((4, 8, 8, 3))).shape
    (4, 1, 1, 1)
    """
    value, dtype = jnp.asarray(value), jnp.result_type(like)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"data must be floating point, got {dtype}")
    return value.reshape(value.shape + (1,) * (like.ndim - value.ndim)).astype(dtype)
