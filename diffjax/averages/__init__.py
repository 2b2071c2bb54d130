r"""Averages of parameters over training, whose length is chosen after training.

After t updates, the power-function average of Karras et al. 2024 (arXiv 2312.02696, section 3 and
appendix C) weighs the parameters theta_i of update i by (i/t)^gamma:

    average(t) = beta average(t - 1) + (1 - beta) theta_t,    beta = (1 - 1/t)^(gamma + 1).

Its profile is a fixed shape relative to the length of training, so that a choice carries over to
longer runs; its relative width `std` is the standard deviation of the profile as a fraction of t.
The initial parameters never enter.

If averages of two widths are stored at intervals (snapshots), the average of any other width is
nearly a linear combination of the snapshots: `synthesise`. The coefficients are those that come
closest to the profile wanted; they depend on times and widths alone.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..types import Array

WIDEST = 1 / math.sqrt(12)
"""The largest relative width, 0.289: gamma = 0, the plain mean of all parameters."""


class Snapshot(NamedTuple):
    """A power-function average at one time.

    Attributes:
      time: updates made, at least 1.
      std: its relative width.
      params: the average, a pytree of arrays.
    """

    time: int
    std: float
    params: Any


def check_width(std: float) -> None:
    """Raise a ValueError unless there is a power-function average of this relative width."""
    if not 0 < std <= WIDEST:
        raise ValueError(
            f"relative width {std}: must be above 0, and at most 1/sqrt(12) = {WIDEST:.6f}, the "
            "plain mean of all steps"
        )


def gamma_of(std: float) -> float:
    """The exponent gamma of the profile of this relative width.

    It is the largest root of gamma^3 + 7 gamma^2 + (16 - std^-2) gamma + 12 - std^-2.

    Raises:
      ValueError: unless `0 < std <= 1/sqrt(12)`.

    >>> round(gamma_of(0.1), 6)
    6.937204
    """
    check_width(std)
    s = std**-2
    roots = np.roots([1, 7, 16 - s, 12 - s])
    return float(max(roots[np.abs(roots.imag) < 1e-6].real))


def std_of(gamma: float) -> float:
    """The relative width of the profile with this exponent; the inverse of `gamma_of`.

    >>> round(std_of(0.0), 6)
    0.288675
    """
    return math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


def update_weight(gamma: float, t: Array) -> Array:
    """1 - beta, the weight of the parameters of update t = 1, 2, ..., in float32.

    It keeps its relative precision when beta is close to 1.
    """
    t = jnp.asarray(t, jnp.float32)
    return -jnp.expm1((gamma + 1) * jnp.log1p(-1 / t))


def next_average(average: Any, params: Any, weight: Array) -> Any:
    """The next average, average + weight (params - average).

    Rounding errs ten times less this way than with beta average + (1 - beta) params.

    Args:
      average: a pytree of arrays; those of floating point are of at least float32.
      params: a pytree of the same structure; arrays that are not of floating point are copied.
      weight: of the new parameters, in [0, 1], such as `update_weight`.
    """

    def one(a, p):
        if not jnp.issubdtype(jnp.result_type(a), jnp.floating):
            return p
        return a + weight.astype(a.dtype) * (p.astype(a.dtype) - a)

    return jax.tree.map(one, average, params)


def inner_product(gamma_a: Any, t_a: Any, gamma_b: Any, t_b: Any) -> Any:
    """The integral of the product of two profiles, (gamma + 1) s^gamma / t^(gamma + 1) on [0, t].

    Numbers, or arrays that are broadcast against each other, in float64.
    """
    t_a, t_b = np.asarray(t_a, np.float64), np.asarray(t_b, np.float64)
    ratio = np.minimum(t_a, t_b) / np.maximum(t_a, t_b)
    longer = np.where(t_a < t_b, gamma_b, gamma_a)  # the exponent of the profile that goes on
    norm = (gamma_a + 1) * (gamma_b + 1) / ((gamma_a + gamma_b + 1) * np.maximum(t_a, t_b))
    return norm * ratio**longer


def solve(
    times: Sequence[int], stds: Sequence[float], std: float, time: int | None = None
) -> tuple[np.ndarray, float]:
    """The coefficients of snapshots whose sum comes closest to another average.

    The linear system is badly conditioned for many snapshots, so it is solved in float64. The
    coefficients are divided by their sum: constants stay what they are.

    Args:
      times: of the snapshots, updates made; no snapshot may occur twice.
      stds: their relative widths.
      std: the relative width wanted.
      time: the time wanted; None: the last of `times`.

    Returns:
      The coefficients, float64 `[snapshots]`, which are 0 after the time wanted; and the error of
      the profile: the norm of its difference from the one wanted, relative to that one.

    Raises:
      ValueError: if there is no average of this width, no snapshot up to this time, or a snapshot
        occurs twice.

    >>> coefficients, error = solve([50, 50, 100, 100], [0.05, 0.1, 0.05, 0.1], 0.1)
    >>> bool(np.abs(coefficients - [0, 0, 0, 1]).max() < 1e-9), error < 1e-6
    (True, True)
    """
    gamma = gamma_of(std)
    ts, gammas = np.asarray(times, np.float64), np.array([gamma_of(s) for s in stds])
    end = max(times, default=0) if time is None else time
    used = ts <= end
    if not used.any() or not (ts >= 1).all():
        raise ValueError(f"{end=}: need a snapshot up to this time, and times of at least 1")
    if len(set(zip(times, stds, strict=True))) < len(ts):
        raise ValueError("a snapshot occurs twice")
    t, g = ts[used], gammas[used]
    products = inner_product(g[:, None], t[:, None], g[None], t[None])
    wanted = inner_product(g, t, gamma, end)
    norm = inner_product(gamma, end, gamma, end)
    c = np.linalg.solve(products, wanted)
    c /= c.sum()
    error = max(float(norm - 2 * c @ wanted + c @ products @ c), 0.0)
    coefficients = np.zeros(len(ts))
    coefficients[used] = c
    return coefficients, math.sqrt(error / float(norm))


def weighted_sum(coefficients: np.ndarray | Sequence[float], trees: Iterable[Any]) -> Any:
    """The sum of pytrees by coefficients that add up to one, in float64 on the host.

    The trees may come from a generator, which reads one at a time.

    Returns:
      A pytree of NumPy arrays in float32; an array that is not of floating point is that of the
      last tree.
    """
    total: Any = None
    for c, tree in zip(coefficients, trees, strict=True):
        part = jax.tree.map(lambda x, c=c: c * np.float64(x) if _floating(x) else x, tree)
        total = part if total is None else jax.tree.map(_add, total, part)
    return jax.tree.map(lambda x: np.float32(x) if _floating(x) else np.asarray(x), total)


def synthesise(snapshots: Sequence[Snapshot], std: float) -> Any:
    """The average of another width at the time of the last snapshot.

    It is exact, but for rounding, at the widths of the snapshots. Between 0.05 and 0.25 it is
    accurate; the narrower it is than the snapshots' averages, the more their rounding is amplified.

    Args:
      snapshots: all from the start of training on: without the early ones the result has the wrong
        profile.
      std: the relative width wanted.

    Raises:
      ValueError: as `solve` does.

    >>> snapshots = [Snapshot(t, std, {"w": np.float32(3)}) for t in (1, 2) for std in (0.05, 0.1)]
    >>> float(synthesise(snapshots, 0.07)["w"])
    3.0
    """
    in_order = sorted(snapshots, key=lambda s: s.time)
    coefficients, _ = solve([s.time for s in in_order], [s.std for s in in_order], std)
    return weighted_sum(coefficients, (s.params for s in in_order))


def _floating(x):
    return jnp.issubdtype(jnp.result_type(x), jnp.floating)


def _add(a, b):
    return a + b if _floating(b) else b
