"""Types of arrays and keys, and the protocols of networks and denoisers.

Arrays are `[batch, ...]`, images are NHWC, times are `[]` or `[batch]`. The tests check the shapes
(jaxtyping + beartype); at run time they are documentation and cost nothing.
"""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Float

Array = jax.Array
Key = jax.Array
"""One `jax.random.key`, or one key per example, `[batch]`."""

Real = jax.Array | np.ndarray
Data = Float[Real, "batch *data"]
"""Clean or noisy examples, `[batch, ...]`."""
Scale = float | int | Float[Real, "..."]
"""alpha or sigma, in a shape that broadcasts against the data (see `scales_at`)."""
Time = float | int | np.floating | Float[Real, ""] | Float[Real, " batch"]
"""Diffusion time in [0, 1], 0 at data and 1 at noise; one for the batch, or one per example."""
Scalar = float | int | np.floating | Float[Real, ""]
"""A number that may be traced, such as a schedule's parameter or a guidance weight."""
Cond = Any
"""The conditioning of a network: a pytree of arrays `[batch, ...]`, or None."""


class Prediction(NamedTuple):
    """A denoiser's estimates of the clean data x_0 and of the noise eps in x_t.

    They satisfy `x_t = alpha_t x_0 + sigma_t eps`. Both are stored, because computing one from the
    other divides by alpha or sigma, which may be small.
    """

    x_0: Data
    eps: Data


class LearnedPrediction(NamedTuple):
    """A `Prediction` by a network that also learned the decoder's variance.

    For each element of the data, `fraction` interpolates log std^2 from the variance of the
    posterior, at 0, to "beta", the variance of q(x_t | x_s), at 1 (Nichol & Dhariwal 2021,
    equation 15).
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
    """Any function from noisy data and time to the `Prediction` of x_0 and eps."""

    def __call__(self, x_t: Data, t: Time, cond: Cond = None) -> Prediction | LearnedPrediction: ...


@runtime_checkable
class FlowMap(Protocol):
    """A denoiser of two times: with s it predicts the step of the probability-flow ODE to time s.

    The step is x_s = alpha_s x_0 + sigma_s eps. Without s, or with s = t, the `Prediction` is that
    of a denoiser.
    """

    def __call__(
        self, x_t: Data, t: Time, cond: Cond = None, s: Time | None = None
    ) -> Prediction | LearnedPrediction: ...


def known(*values: Any) -> bool:
    """Whether all values are concrete and can be checked: none is traced by `jit` or `vmap`."""
    return not any(isinstance(value, Tracer) for value in values)


def whole(value: Any, least: int = 1) -> bool:
    """Whether a value is a whole number of at least `least`.

    >>> whole(3), whole(2.5), whole(True), whole(0)
    (True, False, False, False)
    """
    number = isinstance(value, int | np.integer) and not isinstance(value, bool)
    return number and bool(value >= least)


def at_least_float32(x: Any) -> Array:
    """`x` as a JAX array of at least float32, for sums and for times.

    Sums in float16 overflow at 65,504, and neighbours on a grid of times differ in float32.

    Raises:
      TypeError: if `x` is an array of integers.
    """
    x = jnp.asarray(x)
    if not x.weak_type:
        check_floating(x.dtype)
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    return x if x.dtype == dtype else x.astype(dtype)


def check_floating(dtype: Any) -> None:
    """Raise a TypeError unless this is the dtype of times or data."""
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"times and data must be floating point, got {dtype}; pixels of bytes are x / 127.5 - 1"
        )


def check_times(t: Time, batch: int | None = None) -> None:
    """Check that t are times, `[]` or `[batch]`, in [0, 1]. Traced values cannot be checked.

    Raises:
      ValueError: if a time is outside [0, 1], or `batch` is given and the shape is another.
    """
    if batch is not None and jnp.shape(t) not in ((), (batch,)):
        raise ValueError(
            f"times of shape {jnp.shape(t)} for a batch of {batch}: need [] or [batch]"
        )
    if known(t) and not ((np.asarray(t) >= 0) & (np.asarray(t) <= 1)).all():
        low, high = np.min(t), np.max(t)
        raise ValueError(
            f"times from {low} to {high}: must lie in [0, 1]; step i of T is the time i / T"
        )


def check_like(x: Data, **others: Data) -> None:
    """Raise a ValueError unless all arrays have the shape of the data x."""
    for name, other in others.items():
        if jnp.shape(other) != jnp.shape(x):
            raise ValueError(f"{name} of shape {jnp.shape(other)} for data {jnp.shape(x)}")


def select(chosen: Any, a: Any, b: Any) -> Any:
    """Take each example from a where `chosen`, `[]` or `[batch]`, else from b; pytrees of data."""
    chosen = jnp.asarray(chosen)
    pick = lambda x, y: jnp.where(
        chosen.reshape(chosen.shape + (1,) * (x.ndim - chosen.ndim)), x, y
    )
    return jax.tree.map(pick, a, b)


def expand(value: Any, like: Any) -> Array:
    """Broadcast per-example numbers, `[]` or `[batch]`, against data `[batch, ...]`.

    Appends axes of length one and casts to the dtype of `like`. This and `select` are the only
    functions in diffjax that broadcast by rank.

    Raises:
      TypeError: if `like` is not floating point, because a cast would round the scales to integers.
      ValueError: if `value` is neither one number nor one for each example.

    >>> import jax.numpy as jnp
    >>> expand(jnp.ones(4), like=jnp.ones((4, 8, 8, 3))).shape
    (4, 1, 1, 1)
    """
    value, dtype = jnp.asarray(value), jnp.result_type(like)
    check_floating(dtype)
    if value.ndim == 1 and like.ndim and value.shape[0] not in (1, like.shape[0]):
        raise ValueError(f"{value.shape[0]} values for {like.shape[0]} examples: need one for each")
    return value.reshape(value.shape + (1,) * (like.ndim - value.ndim)).astype(dtype)
