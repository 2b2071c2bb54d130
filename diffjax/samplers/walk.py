"""The type of samplers, and the sampling loop."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from .. import checks, keys
from ..types import Array, Data, Key, Real, Time, known


class State(NamedTuple):
    """The state of a sampler.

    Attributes:
      x: the sample, `[batch, ...]`.
      x_0: the estimate of the clean data that the last step used; zero before the first step.
      memory: values that a multistep sampler keeps from earlier steps; a pytree.
    """

    x: Data
    x_0: Data
    memory: Any = ()


class Sampler(NamedTuple):
    """Two functions, `init(x_1) -> state` and `step(key, state, t, s) -> state`.

    `state.x` is the sample. `key` is one key, or one per example `[batch]`; deterministic samplers
    ignore it. A `stochastic` sampler cannot encode: it only steps towards the data.
    """

    init: Callable[[Data], State]
    step: Callable[[Key, State, Time, Time], State]
    stochastic: bool = False


def sample(
    key: Key,
    sampler: Sampler,
    x_1: Data,
    ts: Float[Real, " times"],
    observe: Callable[[State, Array], Any] | None = None,
) -> tuple[Data, Any]:
    """Run a sampler from `x_1` along the times `ts`, in one `lax.scan`.

    Args:
      key: one key, or one per example `[batch]`. Step k of example i draws from its own key folded
        with k, so a sample does not depend on what else is in the batch.
      sampler: a `Sampler`.
      x_1: the start, `[batch, ...]`; usually `prior_sample` with the sampler's schedule. An array
        does not say of which schedule it is: noise of another sigma_1 gives samples that are wrong.
      ts: strictly monotone times in [0, 1], `[n + 1]` for n steps; usually from 1 to 0. Rising
        times encode: a deterministic sampler then takes data to its noise (DDIM inversion). A grid
        made for another schedule is valid, but not as even as its docstring says.
      observe: (state, t) -> a pytree to record after each step, where t is the new time.

    Returns:
      The sample at `ts[-1]`, of the shape of `x_1`, and what `observe` returned, stacked `[n, ...]`
      (None without `observe`).

    Raises:
      TypeError: if `sampler` is no sampler, or `key` no key.
      ValueError: if `x_1` has no axis of examples, or the times are concrete and not strictly
        monotone within [0, 1], or rise and the sampler is stochastic.

    >>> import diffjax
    >>> schedule = diffjax.cosine()
    >>> denoise = diffjax.oracles.gaussian(schedule, jnp.array([3.0, 4.0]), 0.01)
    >>> walk = diffjax.ddim(denoise, schedule)
    >>> x_1 = diffjax.prior_sample(jax.random.key(0), schedule, (100, 2))
    >>> ts = diffjax.uniform_times(20)
    >>> x_0, _ = jax.jit(sample, static_argnums=1)(jax.random.key(1), walk, x_1, ts)
    >>> x_0.mean(0).round(1)
    Array([3., 4.], dtype=float32)
    """
    checks.sampler(sampler)
    checks.batched(x_1, "x_1")
    if known(ts):
        check_times(np.asarray(ts), sampler.stochastic)
    example_keys = keys.per_example(key, x_1.shape[0])
    ts = jnp.asarray(ts)

    def step(state, inputs):
        k, t, s = inputs
        state = sampler.step(keys.fold_in(example_keys, k), state, t, s)
        return state, None if observe is None else observe(state, s)

    walk = jnp.arange(len(ts) - 1), ts[:-1], ts[1:]
    state, observed = jax.lax.scan(step, sampler.init(x_1), walk)
    return state.x, observed


def check_times(ts: np.ndarray, stochastic: bool) -> None:
    """Raise a ValueError unless `sample` can step along these times."""
    if ts.ndim != 1 or len(ts) < 2:
        raise ValueError(
            f"times of shape {ts.shape}: need one axis of at least two times, "
            "such as uniform_times(50)"
        )
    steps = np.diff(ts)
    if not ((steps < 0).all() or (steps > 0).all()):
        k = int(np.argmin(steps * np.sign(ts[-1] - ts[0]) > 0))
        raise ValueError(
            "times must be strictly decreasing or strictly increasing, but "
            f"ts[{k}] = {ts[k]} and ts[{k + 1}] = {ts[k + 1]}"
        )
    if stochastic and ts[-1] > ts[0]:
        raise ValueError(
            f"times rise from {ts[0]} to {ts[-1]}: a stochastic sampler cannot encode. To "
            "sample, give times from 1 to 0 (ts[::-1]); to encode, use a deterministic sampler"
        )
    if not (ts.min() >= 0 and ts.max() <= 1):
        raise ValueError(f"times must lie in [0, 1], got {ts.min()} to {ts.max()}")


def init(x_1: Data) -> State:
    """The state of a one-step sampler before its first step."""
    return State(x_1, jnp.zeros_like(x_1))


def in_use(option: Any) -> bool:
    """Whether an option is on: not zero, or traced, so that its value is unknown."""
    return not known(option) or option != 0
