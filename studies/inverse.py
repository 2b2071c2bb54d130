"""Measure the solvers of inverse problems against exact posteriors, and write docs/inverse.md.

    python studies/inverse.py mixture   # measures; half an hour on two cores
    python studies/inverse.py picture   # draws docs/images/inverse.png; ten minutes
    python studies/inverse.py page      # writes docs/inverse.md from what was measured

The data of `mixture` are images of 4 x 4 pixels from a mixture of five Gaussians, whose posterior
given a linear measurement with normal noise is again such a mixture. What is measured is kept in
studies/results/inverse.json, and a second call measures what is missing.
"""

import datetime
import functools
import itertools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

import diffjax
from diffjax import inverse, oracles
from diffjax.inverse import SOLVERS

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "studies" / "results" / "inverse.json"
SHAPE = (4, 4, 1)
SIZE = 16
NOISE = 0.2
SEEDS = (0, 1, 2)
MEASURED = 64
"""Measurements for each seed, each of another truth."""
DRAWN = 64
"""Samples for each measurement."""
BUDGETS = (25, 100, 400)
"""Passes of the network, forward or backward, for one sample."""
SCHEDULES = {
    "VP": diffjax.cosine(-10.0, 10.0),
    "VE": diffjax.log_uniform(0.0067, 148.0),
    "flow": diffjax.rectified_flow(-10.0, 10.0),
}
METRICS = {
    "mean": "error of the mean",
    "covariance": "error of the covariance",
    "coverage": "coverage",
    "distance": "sliced Wasserstein",
}


class Variant(NamedTuple):
    """A solver with its options.

    Attributes:
      solver: its name in `SOLVERS`.
      passes: passes of the network that a step takes, forward and backward.
      times: its grid, a name in `TIMES`.
      options: those of its walk.
    """

    solver: str
    passes: int
    times: str
    options: dict[str, Any]


def variant(solver: str, passes: int, times: str = "uniform", **options: Any) -> Variant:
    """A row of `VARIANTS`."""
    return Variant(solver, passes, times, options)


def mixture() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights, means and covariances of five kinds of smooth image."""
    rng = np.random.default_rng(0)
    places = np.indices(SHAPE[:2]).reshape(2, -1).T
    near = lambda length: np.exp(-((places[:, None] - places[None]) ** 2).sum(-1) / (2 * length**2))
    means = rng.multivariate_normal(np.zeros(SIZE), near(1.5), size=5)
    scales = rng.uniform(0.2, 0.6, size=5)
    covs = [s**2 * near(length) for s, length in zip(scales, rng.uniform(0.7, 2, 5), strict=True)]
    return rng.dirichlet(np.full(5, 4.0)), means, np.stack(covs) + 0.05**2 * np.eye(SIZE)


WEIGHTS, MEANS, COVS = mixture()
CENTRE = WEIGHTS @ MEANS
STD = float(
    np.sqrt((WEIGHTS @ (np.trace(COVS, axis1=1, axis2=2) + ((MEANS - CENTRE) ** 2).sum(1))) / SIZE)
)
KERNEL = np.outer([1, 2, 1], [1, 2, 1]) / 16
OPERATORS = {
    "inpainting": inverse.inpainting(jnp.zeros(SHAPE).at[:, :2].set(1.0)),
    "super-resolution": inverse.downsampling(2),
    "deblurring": inverse.blurring(KERNEL),
    "compressed sensing": inverse.compressed_sensing(jax.random.key(0), 6, SHAPE),
}
DPM = {"times": "log_snr", "make": diffjax.dpm_solver_pp_2m}
VARIANTS = {
    "pigdm": variant("pigdm", 2, sigma_data=STD),
    "pigdm, dpm_solver_pp_2m": variant("pigdm", 2, sigma_data=STD, **DPM),
    "mmps": variant("mmps", 5),
    "mmps, dpm_solver_pp_2m": variant("mmps", 5, **DPM),
    "mmps, 1 iteration": variant("mmps", 3, iterations=1),
    "diffpir": variant("diffpir", 1),
    "diffpir, strength 0.3": variant("diffpir", 1, strength=0.3),
    "diffpir, ddim": variant("diffpir", 1, make=diffjax.ddim),
    "dps, scale 0.1": variant("dps", 2, scale=0.1),
    "dps, scale 0.3": variant("dps", 2, scale=0.3),
    "dps, scale 1": variant("dps", 2, scale=1.0),
    "repaint": variant("repaint", 5, repeats=5),
    "ddrm": variant("ddrm", 1),
    "ddrm, eta 1": variant("ddrm", 1, eta=1.0),
    "tds, 8 particles": variant("tds", 2, particles=8, sigma_data=STD),
    "tds, 64 particles": variant("tds", 2, particles=DRAWN, sigma_data=STD),
}
"""Solvers as they are measured: with `ancestral` where a row names no sampler."""
ON_SCHEDULES = ("pigdm", "mmps", "diffpir", "dps, scale 0.3", "ddrm", "tds, 64 particles")
"""Those that are measured on other schedules, too, for super-resolution by `BUDGETS[1]` passes."""


class System(NamedTuple):
    """A linear operator of flat images as a matrix with 16 rows, the last of which may be zero.

    All are of one shape, so that one compiled program serves all operators.
    """

    a: np.ndarray
    u: np.ndarray
    values: np.ndarray
    v_t: np.ndarray

    def operator(self) -> inverse.Operator:
        """The operator, with its singular value decomposition."""
        product = lambda m: lambda x: jnp.matmul(x, m.T, precision="highest")
        svd = inverse.SVD(self.values, product(self.v_t), product(self.v_t.T), product(self.u.T))
        return inverse.Operator(product(self.a), svd, mask=jnp.diag(self.a))


@functools.cache
def system(name: str) -> System:
    """One of `OPERATORS`, in float32."""
    rows = OPERATORS[name](jnp.eye(SIZE).reshape(SIZE, *SHAPE))
    a = np.zeros((SIZE, SIZE))
    a[: rows[0].size] = np.asarray(rows, np.float64).reshape(SIZE, -1).T
    u, values, v_t = np.linalg.svd(a)
    return System(*(m.astype(np.float32) for m in (a, u, np.where(values < 1e-6, 0, values), v_t)))


class Posterior(NamedTuple):
    """The mixture given a measurement: its components have the same covariances for every y."""

    log_weights: np.ndarray
    means: np.ndarray
    covs: np.ndarray

    def moments(self):
        share = np.exp(self.log_weights)
        mean = share @ self.means
        apart = self.means - mean
        return mean, np.tensordot(share, self.covs, 1) + (share[:, None] * apart).T @ apart

    def draw(self, rng, n):
        which = rng.choice(len(self.log_weights), size=n, p=np.exp(self.log_weights))
        roots = np.linalg.cholesky(self.covs)
        return self.means[which] + np.einsum("nij,nj->ni", roots[which], rng.normal(size=(n, SIZE)))


def posterior(a: np.ndarray, y: np.ndarray) -> Posterior:
    """Bayes' rule for each component, and for their weights."""
    log_weights, means, covs = [], [], []
    for weight, mean, cov in zip(WEIGHTS, MEANS, COVS, strict=True):
        spread = a @ cov @ a.T + NOISE**2 * np.eye(len(a))
        error = y - a @ mean
        gain = np.linalg.solve(spread, a @ cov).T
        log_weights.append(
            np.log(weight)
            - 0.5 * (error @ np.linalg.solve(spread, error) + np.linalg.slogdet(spread)[1])
        )
        means.append(mean + gain @ error)
        covs.append(cov - gain @ a @ cov)
    log_weights = np.array(log_weights) - np.logaddexp.reduce(log_weights)
    return Posterior(log_weights, np.stack(means), np.stack(covs))


class Problem(NamedTuple):
    """Measurements of one operator and seed: truths and y `[n, 16]`, posteriors and directions."""

    truth: np.ndarray
    y: np.ndarray
    posteriors: list[Posterior]
    directions: np.ndarray


@functools.cache
def problem(name: str, seed: int) -> Problem:
    """Draw truths from the mixture, and measure them."""
    rng, a = np.random.default_rng(seed), system(name).a.astype(np.float64)
    truth = Posterior(np.log(WEIGHTS), MEANS, COVS).draw(rng, MEASURED)
    measured = np.abs(a).sum(1) > 0
    y = (truth @ a.T + NOISE * rng.normal(size=truth.shape)) * measured
    directions = rng.normal(size=(SIZE, 32))
    return Problem(
        truth,
        y.astype(np.float32),
        [posterior(a[measured], each[measured]) for each in y],
        directions / np.linalg.norm(directions, axis=0),
    )


def measures(p: Problem, x: np.ndarray, seed: int) -> list[float]:
    """The `METRICS` of samples `[measurements, drawn, 16]`."""
    found, rng = [], np.random.default_rng(1000 + seed)
    for truth, exact, draws in zip(p.truth, p.posteriors, x, strict=True):
        mean, cov = exact.moments()
        along, theirs = draws @ p.directions, exact.draw(rng, len(draws)) @ p.directions
        low, high = np.quantile(along, [0.05, 0.95], axis=0, method="weibull")
        inside = (low <= truth @ p.directions) & (truth @ p.directions <= high)
        found.append(
            [
                np.sqrt(((draws.mean(0) - mean) ** 2).sum() / np.trace(cov)),
                np.linalg.norm(np.cov(draws.T) - cov) / np.linalg.norm(cov),
                inside.mean(),
                np.abs(np.sort(along, 0) - np.sort(theirs, 0)).mean(),
            ]
        )
    return np.mean(found, 0).tolist()


@functools.cache
def program(label: str, kind: str, passes: int) -> Callable:
    """(key, system, y) -> `DRAWN` samples for each measurement, `[measurements, drawn, 16]`."""
    row, schedule = VARIANTS[label], SCHEDULES[kind]
    denoise = oracles.gaussian_mixture(schedule, WEIGHTS, MEANS, COVS)
    ts = diffjax.TIMES[row.times](schedule, passes // row.passes)

    @jax.jit
    def draw(key, system, y):
        every = jnp.repeat(y, DRAWN // row.options.get("particles", 1), axis=0)
        walk = SOLVERS[row.solver].walk(
            denoise, schedule, system.operator(), every, NOISE, **row.options
        )
        of_prior, of_walk = jax.random.split(key)
        x_1 = diffjax.prior_sample(of_prior, schedule, (DRAWN * len(y), SIZE))
        x_0, _ = diffjax.sample(of_walk, walk, x_1, ts)
        return x_0.reshape(len(y), DRAWN, SIZE)

    return draw


def references(name: str, seed: int) -> dict[str, list[float]]:
    """The measures of draws of the exact posterior, and of draws that know nothing of y."""
    p, rng = problem(name, seed), np.random.default_rng(2000 + seed)
    prior = Posterior(np.log(WEIGHTS), MEANS, COVS)
    return {
        "exact": measures(p, np.stack([each.draw(rng, DRAWN) for each in p.posteriors]), seed),
        "no measurement": measures(
            p, np.stack([prior.draw(rng, DRAWN) for _ in p.posteriors]), seed
        ),
    }


def cells() -> Iterator[tuple[str, str, str, int, int]]:
    """Operator, label, kind of schedule, passes and seed of each number."""
    for seed, passes, label, name in itertools.product(SEEDS, BUDGETS, VARIANTS, OPERATORS):
        if VARIANTS[label].solver != "repaint" or name == "inpainting":
            yield name, label, "VP", passes, seed
    for seed, label, kind in itertools.product(SEEDS, ON_SCHEDULES, ("VE", "flow")):
        yield "super-resolution", label, kind, BUDGETS[1], seed


def measure() -> None:
    """Measure what is not on record, and record it."""
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {"runs": {}}
    runs = record["runs"]
    for name, seed in itertools.product(OPERATORS, SEEDS):
        runs |= {f"{name}/{label}/{seed}": m for label, m in references(name, seed).items()}
    for name, label, kind, passes, seed in cells():
        if (cell := f"{name}/{label}/{kind}/{passes}/{seed}") not in runs:
            p = problem(name, seed)
            x = program(label, kind, passes)(jax.random.key(seed), system(name), p.y)
            runs[cell] = measures(p, np.asarray(x, np.float64), seed)
            record |= {"date": datetime.date.today().isoformat(), "jax": jax.__version__}
            RECORD.write_text(json.dumps(record, indent=1) + "\n")
            print(cell, *(f"{m:.3f}" for m in runs[cell]), flush=True)


if __name__ == "__main__":
    measure()
