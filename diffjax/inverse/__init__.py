r"""Inverse problems y = A x_0 + noise, solved with any trained denoiser.

An operator A is a function of data `[batch, ...]` (see `operators`). A solver makes the samples of
a denoiser follow the measurement y; `docs/inverse.md` measures each on data whose posterior is
known, and says which to choose:

    pigdm     denoiser -> denoiser: adds the score of p(y | x_t), Gaussian about the predicted x_0
    mmps      denoiser -> denoiser: as pigdm, with the covariance by the denoiser's derivative
    diffpir   denoiser -> denoiser: moves the predicted x_0 towards the measurement
    dps       sampler -> sampler: takes a gradient step on the residual after each step
    repaint   sampler -> sampler, for inpainting: replaces the known part, and repeats each step
    ddrm      denoiser -> sampler: walks in the coordinates of A's singular value decomposition
    tds       denoiser -> sampler: a population of walks, resampled by the likelihood

On Gaussian data the exact posterior is known, and `tests/test_inverse.py` compares with it.
"""

from collections.abc import Callable
from typing import NamedTuple

from ..samplers import Sampler, ancestral
from .guided import diffpir, mmps, pigdm
from .operators import (
    SVD,
    Operator,
    blurring,
    compressed_sensing,
    downsampling,
    greying,
    inpainting,
    phase_retrieval,
    with_svd,
)
from .walks import ddrm, dps, repaint, tds


class Solver(NamedTuple):
    """A row of `SOLVERS`.

    Attributes:
      walk: (denoise, schedule, operator, y, noise_std, options) -> `Sampler`. For a solver that
        changes a denoiser or a sampler, the option `make` is the function (denoise, schedule) ->
        `Sampler`, by default `ancestral`.
      operators: which operators it takes: "inpainting", "svd" (those with an `SVD`), "linear" or
        "any".
      noise: what it does with the measurement's noise: "unused", "any", or "positive" if the
        standard deviation may not be 0.
    """

    walk: Callable[..., Sampler]
    operators: str
    noise: str


def _denoiser(change):
    def walk(denoise, schedule, operator, y, noise_std, *, make=ancestral, **options):
        return make(change(denoise, schedule, operator, y, noise_std, **options), schedule)

    return walk


def _dps(denoise, schedule, operator, y, noise_std, *, make=ancestral, **options):
    return dps(make(denoise, schedule), operator, y, **options)


def _repaint(denoise, schedule, operator, y, noise_std, *, make=ancestral, **options):
    mask = getattr(operator, "mask", None)
    if mask is None:
        raise ValueError("repaint needs an operator of inverse.inpainting")
    return repaint(make(denoise, schedule), schedule, mask, y, **options)


SOLVERS = {
    "pigdm": Solver(_denoiser(pigdm), "linear", "any"),
    "mmps": Solver(_denoiser(mmps), "any", "positive"),
    "diffpir": Solver(_denoiser(diffpir), "linear", "any"),
    "dps": Solver(_dps, "any", "unused"),
    "repaint": Solver(_repaint, "inpainting", "unused"),
    "ddrm": Solver(ddrm, "svd", "any"),
    "tds": Solver(tds, "any", "positive"),
}
"""Solvers by name, with one signature, for comparisons."""

__all__ = [
    "SOLVERS",
    "SVD",
    "Operator",
    "Solver",
    "blurring",
    "compressed_sensing",
    "ddrm",
    "diffpir",
    "downsampling",
    "dps",
    "greying",
    "inpainting",
    "mmps",
    "phase_retrieval",
    "pigdm",
    "repaint",
    "tds",
    "with_svd",
]
