r"""Regression targets: x_0, eps, the score, or any other linear combination of x_0 and eps.

A target is a linear form in the clean data and the noise:

    target = a x_0 + b eps,    (a, b) = row(alpha, sigma).

Together with x_t = alpha x_0 + sigma eps, this gives two equations in two unknowns, so a network's
output and x_t determine both x_0 and eps:

    [ x_t    ]   [ alpha  sigma ] [ x_0 ]         x_0 = (b x_t - sigma out) / det
    [ target ] = [ a      b     ] [ eps ]         eps = (alpha out - a x_t) / det
                                                  det = alpha b - sigma a

`encode` computes the second row, and `decode` solves the system; a conversion between targets is
`decode` followed by `encode`. No other module distinguishes one target from another.
"""

from collections.abc import Callable

from .types import Data, Prediction, Scale

Row = Callable[[Scale, Scale], tuple[Scale, Scale]]


def edm(alpha: Scale, sigma: Scale, sigma_data: float = 0.5) -> tuple[Scale, Scale]:
    """The row of EDM's F, (x_0 - c_skip x_t) / c_out, for any alpha.

    Karras et al. 2022, equation 7 and table 1. For data of another standard deviation, pass
    `functools.partial(edm, sigma_data=...)` as the target.
    """
    std = (alpha**2 * sigma_data**2 + sigma**2) ** 0.5
    return sigma / (sigma_data * std), -alpha * sigma_data / std


TARGETS: dict[str, Row] = {
    "x_0": lambda alpha, sigma: (1.0, 0.0),
    "eps": lambda alpha, sigma: (0.0, 1.0),
    "score": lambda alpha, sigma: (0.0, -1 / sigma),  # grad log q(x_t | x_0)
    "v": lambda alpha, sigma: (-sigma, alpha),  # Salimans & Ho 2022, appendix D
    "flow": lambda alpha, sigma: (-1.0, 1.0),  # dx_t/dt of rectified_flow
    "F": edm,
}
"""Targets by name, as configs and the command line choose them."""


def row(target: str | Row) -> Row:
    """The row of a target, which is a name in `TARGETS` or a function (alpha, sigma) -> (a, b).

    Raises:
      ValueError: if `target` is a name that `TARGETS` does not have.
    """
    if callable(target):
        return target
    if target not in TARGETS:
        raise ValueError(
            f"unknown target {target!r}: one of {', '.join(TARGETS)}, "
            "or a function (alpha, sigma) -> (a, b)"
        )
    return TARGETS[target]


def encode(target: str | Row, x_0: Data, eps: Data, alpha: Scale, sigma: Scale) -> Data:
    """The regression target a x_0 + b eps.

    Args:
      target: a name in `TARGETS`, or a row function.
      x_0: clean data `[batch, ...]`.
      eps: the noise, of the same shape.
      alpha: scales that broadcast against the data (see `scales_at`).
      sigma: scales, as for alpha.

    Returns:
      The target, of the shape of `x_0`.

    >>> import jax.numpy as jnp
    >>> encode("flow", x_0=jnp.ones((2, 3)), eps=jnp.zeros((2, 3)), alpha=0.6, sigma=0.8)[0]
    Array([-1., -1., -1.], dtype=float32)
    """
    a, b = row(target)(alpha, sigma)
    return a * x_0 + b * eps


def decode(target: str | Row, out: Data, x_t: Data, alpha: Scale, sigma: Scale) -> Prediction:
    """Compute x_0 and eps from a network's output and x_t: the inverse of `encode`.

    Args:
      target: the target that `out` estimates, a name in `TARGETS` or a row function.
      out: the network's output `[batch, ...]`.
      x_t: the noisy data that the network was given, of the same shape.
      alpha: scales that broadcast against the data (see `scales_at`).
      sigma: scales, as for alpha.

    Returns:
      A `Prediction` with `alpha x_0 + sigma eps == x_t`.
    """
    a, b = row(target)(alpha, sigma)
    det = alpha * b - sigma * a
    return Prediction(x_0=(b * x_t - sigma * out) / det, eps=(alpha * out - a * x_t) / det)


def convert(
    out: Data, x_t: Data, alpha: Scale, sigma: Scale, source: str | Row, to: str | Row
) -> Data:
    """Convert a prediction of one target into a prediction of another.

    Args:
      out: the network's output `[batch, ...]`.
      x_t: the noisy data that the network was given, of the same shape.
      alpha: scales that broadcast against the data (see `scales_at`).
      sigma: scales, as for alpha.
      source: the target that `out` estimates.
      to: the target to convert to.

    >>> import jax.numpy as jnp
    >>> eps = jnp.ones((1, 2))
    >>> convert(eps, x_t=0.8 * eps, alpha=0.6, sigma=0.8, source="eps", to="score")[0]
    Array([-1.25, -1.25], dtype=float32)
    """
    return encode(to, *decode(source, out, x_t, alpha, sigma), alpha, sigma)


def unit_variance(target: str | Row, alpha: Scale, sigma: Scale) -> Scale:
    """a^2 + b^2: the variance of a target for data and noise of unit variance."""
    a, b = row(target)(alpha, sigma)
    return a**2 + b**2


def unbounded(target: str | Row) -> bool:
    """Whether the size of a target grows without bound as the noise vanishes, as a score's does.

    >>> [name for name in TARGETS if unbounded(name)]
    ['score']
    """
    return bool(unit_variance(target, 1.0, 1e-3) > 1e3)


def eps_per_out(target: str | Row, alpha: Scale, sigma: Scale) -> Scale:
    """alpha / det: the derivative of the decoded eps with respect to the output."""
    a, b = row(target)(alpha, sigma)
    return alpha / (alpha * b - sigma * a)
