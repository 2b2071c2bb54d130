"""Training losses: regression on one target at random times, for any target and weighting."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from . import checks, keys
from .couplings import Coupling, independent
from .denoisers import call
from .densities import Density, relative
from .process import scales_at
from .schedules import Schedule, rate_at, time_at
from .targets import Row, encode, eps_per_out, row, unit_variance
from .types import (
    Array,
    Cond,
    Data,
    Key,
    Network,
    Real,
    Scale,
    Time,
    at_least_float32,
    check_floating,
    check_times,
)
from .weightings import Weighting

LOG_SNR_EDGES = tuple(range(-12, 13))
"""Edges of the log-SNR bins in which losses are reported. They are the same for every run, so that
runs on different schedules can be compared."""


def sample_times(
    key: Key,
    n: int,
    steps: int | None = None,
    index: Int[Real, " batch"] | None = None,
    density: Density | None = None,
) -> Float[Array, " batch"]:
    """Draw stratified random times in (0, 1]: one in each n-th of the interval.

    All n share one uniform offset, t_i = 1 - frac(u + i / n), so that each time is uniform, but
    their mean over the batch varies little (Kingma et al. 2021, appendix I.1).

    Args:
      key: one key, shared by the whole batch.
      n: size of the whole (global) batch.
      steps: T for times on the grid i/T, i = 1..T, as in discrete-time diffusion; None for
        continuous time.
      index: positions in the global batch for which times are returned; all by default.
      density: the density of noise levels; None for uniform times. Its quantiles are stratified.

    Returns:
      Times `[n]`, or one for each of `index`.

    Raises:
      ValueError: if `key` is not a single key, or `n` or `steps` is below 1.

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
    if density is not None:
        # A whole tail rounds to 1, where its weight would be that of the very end.
        half = jnp.finfo(t.dtype).eps / 2
        u = jnp.clip(t, half, 1 - half)
        t = time_at(density.schedule, density.quantile(u))
    return t if steps is None else jnp.maximum(jnp.ceil(t * steps), 1) / steps


def loss_weight(
    schedule: Schedule,
    target: str | Row,
    t: Time,
    weight: Weighting | None = None,
    steps: int | None = None,
) -> Scale:
    """The factor on the squared error in the target's own space that corresponds to `weight`.

    Args:
      schedule: a `Schedule`.
      target: a name in `TARGETS`, or a row function.
      t: times `[]` or `[batch]`.
      weight: a weighting of the eps error; None for 1 / (a^2 + b^2), as in `diffusion_loss`.
      steps: T, if time is discrete.

    Returns:
      Weights of the shape of t.
    """
    checks.weighting(weight)
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
    density: Density | None = None,
    steps: int | None = None,
) -> Callable[[Array], Array]:
    """The weight that a loss gives to the error of x_0, as a function of log-SNR.

    For any schedule, target, weighting and density of times, the expected loss is the integral over
    log-SNR of this weight times the mean squared error of x_0 (Kingma & Gao 2023, section 3). Two
    objectives are therefore the same if and only if these functions are.

    Args:
      schedule: a `Schedule`.
      target: the target that the network regresses.
      weight: a weighting of the eps error, or None for unit variance, as in `diffusion_loss`.
      density: the density of noise levels, by which losses are not divided; None for uniform
        times.
      steps: T, if time is discrete; t is then rounded up to the grid i/T.

    Returns:
      A function from log-SNR, `[]` or `[n]`, to weights of the same shape, which are 0 outside the
      schedule's range.

    >>> import diffjax
    >>> weighs = effective_weight(diffjax.cosine(), "x_0", diffjax.weightings.elbo())
    >>> bool(jnp.allclose(weighs(jnp.array([0.0, 2.0])), jnp.exp(jnp.array([0.0, 2.0])) / 2))
    True
    """
    row(target)  # raises now if the target is unknown

    def weighs(log_snr: Array) -> Array:
        log_snr = jnp.asarray(log_snr)
        t = time_at(schedule, log_snr)
        drawn = t if steps is None else _on_grid(schedule, log_snr, t, steps)
        on_target = loss_weight(schedule, target, drawn, weight, steps)
        on_eps = on_target / eps_per_out(target, *schedule(drawn)) ** 2
        on_x_0 = on_eps * jnp.exp(schedule.log_snr(drawn))
        of_times = 1.0 if density is None else relative(density, t)
        visited = (log_snr >= schedule.log_snr(1.0)) & (log_snr <= schedule.log_snr(0.0))
        return jnp.where(visited, on_x_0 * of_times / rate_at(schedule, t), 0.0)

    return weighs


def _on_grid(schedule, log_snr, t, steps):
    """The time i/T to which t is rounded up; a time that is i/T but for rounding stays there."""
    nearest, above = (jnp.clip(f(t * steps), 1, steps) / steps for f in (jnp.round, jnp.ceil))
    there = jnp.isclose(schedule.log_snr(nearest), log_snr, rtol=1e-6, atol=4e-6)
    return jnp.where(there, nearest, above)


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
    coupling: Coupling = independent(),
) -> Float[Array, " batch"]:
    """The weighted denoising loss of each example, at one time and with one draw of noise.

    Args:
      key: one key, or one per example `[batch]`.
      network: (x_t, log_snr `[batch]`, cond) -> an estimate of the target.
      schedule: a `Schedule`.
      target: the target that the network regresses, a name in `TARGETS` or a row function.
      x_0: clean data `[batch, ...]`. Pixels are in [-1, 1] by convention, which is not checked: for
        those in [0, 255] the loss is a number, too, and a useless one.
      cond: conditioning passed to the network.
      weight: a weighting of the eps error (see `weightings`); None for 1 / (a^2 + b^2), which
        gives every target unit variance (1 for x_0, eps and v; Song's sigma^2 for the score).
      t: times `[]` or `[batch]`. By default they are drawn: stratified over the batch if `key` is
        one key, and independently if it is one key per example.
      steps: T for discrete time, None for continuous.
      coupling: which noise each example is given (see `couplings`); its own by default.

    Returns:
      Losses `[batch]`, averaged over the data axes; with `weightings.elbo()`, they are in nats per
      dimension.

    Raises:
      TypeError: if the data is not floating point, or an argument is none of what it should be.
      ValueError: if the target is unknown, the network's output has another shape than `x_0`, or t
        has another shape than `[]` and `[batch]` or is concrete and outside [0, 1].

    Source: Ho et al. 2020, Algorithm 1; Kingma et al. 2021, equations 13 to 18.

    >>> import diffjax
    >>> x_0 = jax.random.normal(jax.random.key(0), (8, 2))
    >>> zero = lambda x_t, log_snr, cond: 0 * x_t
    >>> diffusion_loss(jax.random.key(1), zero, diffjax.cosine(), "eps", x_0).shape
    (8,)
    """
    checks.network(network)
    checks.schedule(schedule)
    t, eps = draw(key, x_0, t, steps)
    eps = coupling(keys.fold_in(keys.per_example(key, len(x_0)), 2), x_0, eps, cond)
    alpha, sigma = scales_at(schedule, t, x_0)
    out = call(network, alpha * x_0 + sigma * eps, schedule.log_snr(t), cond)
    if out.shape != x_0.shape:
        raise ValueError(f"the network gave {out.shape} for data {x_0.shape}: must be equal")
    return weighted_error(schedule, target, out, x_0, eps, t, weight, steps)


def weighted_error(
    schedule: Schedule,
    target: str | Row,
    out: Data,
    x_0: Data,
    eps: Data,
    t: Float[Array, " batch"],
    weight: Weighting | None = None,
    steps: int | None = None,
) -> Float[Array, " batch"]:
    """The weighted mean squared error of a network's output: `diffusion_loss` after the network."""
    error = (out - encode(target, x_0, eps, *scales_at(schedule, t, x_0))).astype(t.dtype)
    mse = jnp.mean(error**2, axis=range(1, error.ndim))
    return mse * loss_weight(schedule, target, t, weight, steps)


def by_log_snr(
    log_snr: Float[Real, " batch"], losses: Float[Real, " batch"]
) -> Float[Array, "2 bins"]:
    """The sum of the losses in each bin of log-SNR, and the number of examples in it.

    The bins lie between neighbouring `LOG_SNR_EDGES`; the outermost two include all values beyond
    the edges.

    Args:
      log_snr: the log-SNR of each example.
      losses: the loss of each example.

    >>> by_log_snr(jnp.array([0.5, 0.0, -99.0]), jnp.array([1.0, 2.0, 4.0]))[:, jnp.array([0, 12])]
    Array([[4., 3.],
           [1., 2.]], dtype=float32)
    """
    inner = jnp.asarray(LOG_SNR_EDGES[1:-1], log_snr.dtype)
    which = jnp.searchsorted(inner, log_snr, side="right")
    here = which[:, None] == jnp.arange(len(LOG_SNR_EDGES) - 1)[None]
    sums = jnp.where(here, at_least_float32(losses)[:, None], 0).sum(0)
    return jnp.stack([sums, here.sum(0).astype(sums.dtype)])


def draw(
    key: Key, x_0: Data, t: Time | None = None, steps: int | None = None
) -> tuple[Float[Array, " batch"], Data]:
    """Draw the times `[batch]`, unless they are given, and the noise of a loss."""
    checks.batched(x_0, "x_0")
    check_floating(jnp.result_type(x_0))
    batch, key = x_0.shape[0], keys.typed(key)
    if t is not None:
        check_times(t, batch)
        t = jnp.broadcast_to(at_least_float32(t), (batch,))
    elif key.ndim == 0:
        # The examples' keys are folded with 0..batch-1.
        t = sample_times(keys.fold_in(key, batch), batch, steps)
    else:
        t = jax.vmap(lambda k: sample_times(k, 1, steps)[0])(keys.fold_in(key, 1))
    key_eps = keys.fold_in(keys.per_example(key, batch), 0)
    return t, keys.normal(key_eps, x_0.shape, x_0.dtype)
