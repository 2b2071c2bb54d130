"""Measure the solvers of inverse problems against exact posteriors, and write docs/inverse.md.

    python studies/inverse.py mixture   # measures; took 40 minutes on two busy cores
    python studies/inverse.py picture   # draws docs/images/inverse.png; ten minutes more
    python studies/inverse.py colours --run=runs/emoji   # docs/images/colours.png, by a run
    python studies/inverse.py page      # writes docs/inverse.md from what was measured

The data of `mixture` are images of 4 x 4 pixels from a mixture of five Gaussians, whose posterior
given a linear measurement with normal noise is again such a mixture. What is measured is kept in
studies/results/inverse.json, and a second call measures what is missing.
"""

import argparse
import datetime
import functools
import itertools
import json
import math
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

import diffjax
from diffjax import data, inverse, oracles, plots
from diffjax.checkpoint import load
from diffjax.experiment import resolve
from diffjax.experiment.dataset import load_data
from diffjax.inverse import SOLVERS
from markdown_table import table

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "studies" / "results" / "inverse.json"
IMAGES = ROOT / "docs" / "images"
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
    "mmps": variant("mmps", 4),
    "mmps, dpm_solver_pp_2m": variant("mmps", 4, **DPM),
    "mmps, 1 iteration": variant("mmps", 2, iterations=1),
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
PLOTTED = ("pigdm", "mmps", "diffpir", "dps, scale 0.3", "ddrm", "tds, 64 particles")
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

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean `[16]` and covariance `[16, 16]`."""
        share = np.exp(self.log_weights)
        mean = share @ self.means
        apart = self.means - mean
        return mean, np.tensordot(share, self.covs, 1) + (share[:, None] * apart).T @ apart

    def draw(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """Draw n examples, `[n, 16]`."""
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


def over_seeds(runs: dict[str, list[float]], metric: str, *cell: Any) -> list[float]:
    """One of the `METRICS` of a cell, for each seed; empty if it was not measured."""
    found = (runs.get("/".join(map(str, (*cell, seed)))) for seed in SEEDS)
    return [values[list(METRICS).index(metric)] for values in found if values]


def operator_table(runs: dict[str, list[float]], name: str) -> str:
    """Each solver's distance by budget, and its other measures by the largest budget."""
    rows = []
    number = lambda metric, *cell: f"{statistics.mean(over_seeds(runs, metric, name, *cell)):.3f}"
    for label in VARIANTS:
        if over_seeds(runs, "mean", name, label, "VP", BUDGETS[-1]):
            distances = [number("distance", label, "VP", n) for n in BUDGETS]
            rest = [number(metric, label, "VP", BUDGETS[-1]) for metric in list(METRICS)[:3]]
            rows.append([label, *distances, *rest])
    for label in ("exact", "no measurement"):
        distances = [number("distance", label)] * len(BUDGETS)
        rows.append([label, *distances, *(number(metric, label) for metric in list(METRICS)[:3])])
    head = ["solver", *(f"{n} passes" for n in BUDGETS), "mean", "covariance", "coverage"]
    return table(head, rows)


def errors_figure(runs: dict[str, list[float]]) -> Figure:
    """Each of the `METRICS` against the passes, one line for each of `PLOTTED`."""
    figure, axes = plots.panels(len(METRICS), len(OPERATORS), width=2.7, height=2.3)
    cells = itertools.product(reversed(METRICS), OPERATORS)
    for i, (ax, (metric, name)) in enumerate(zip(axes, cells, strict=True)):
        mean = lambda *cell, metric=metric: statistics.mean(over_seeds(runs, metric, *cell))
        for label in PLOTTED:
            y = [mean(name, label, "VP", n) for n in BUDGETS]
            ax.plot(BUDGETS, y, marker="o", markersize=3, label=label)
        ax.axhline(mean(name, "exact"), color=plots.INK, linewidth=0.8, label="exact draws")
        ax.set_xscale("log")
        ax.set_xticks(BUDGETS, list(map(str, BUDGETS)))
        if metric == "distance":
            ax.set(title=name, yscale="log", ylim=(0.03, 0.8))
            ax.set_yticks((0.05, 0.1, 0.2, 0.4), ("0.05", "0.1", "0.2", "0.4"))
        else:
            ax.set(ylim=(0, 1 if metric == "coverage" else 1.6))
        ax.minorticks_off()
        if i % len(OPERATORS) == 0:
            ax.set_ylabel(METRICS[metric])
        if i >= len(OPERATORS) * (len(METRICS) - 1):
            ax.set_xlabel("passes of the network")
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=7, fontsize=8
    )
    return figure


class Restoration(NamedTuple):
    """A row of a picture.

    Attributes:
      title: what stands beside it.
      example: which of the held-out images is measured.
      operator: the measurement.
      shown: a measurement `[...]` as an image `[height, width]`.
      solvers: their names, and the options of their walks.
    """

    title: str
    example: int
    operator: inverse.Operator
    shown: Callable[[np.ndarray], np.ndarray]
    solvers: dict[str, dict[str, Any]]


NONLINEAR: dict[str, dict[str, Any]] = {"mmps": {}, "dps": {"scale": 0.5}}
LINEAR: dict[str, dict[str, Any]] = NONLINEAR | {"ddrm": {}}
"""Solvers of the pictures, and the options of their walks."""


def pixels(x: np.ndarray) -> np.ndarray:
    """An image `[height, width, channels]` of one channel or three as matplotlib takes it."""
    return x[..., 0] if x.shape[-1] == 1 else np.clip((x + 1) / 2, 0, 1)


def garments() -> Iterator[Restoration]:
    """The rows of the picture of Fashion-MNIST: an operator each."""
    shape = (28, 28, 1)
    spread = np.exp(-((np.arange(9) - 4) ** 2) / (2 * 2.0**2))
    blur = inverse.blurring(np.outer(spread, spread) / spread.sum() ** 2)
    sensing = inverse.compressed_sensing(jax.random.key(0), math.prod(shape) // 8, shape)
    upper_half = jnp.ones(shape).at[12:].set(0.0)
    magnitudes = lambda y: np.fft.fftshift(np.log(np.maximum(y[..., 0], 0.05)))
    yield Restoration("inpainting", 14, inverse.inpainting(upper_half), pixels, LINEAR)
    yield Restoration("super-resolution", 30, inverse.downsampling(4), pixels, LINEAR)
    yield Restoration("deblurring", 28, inverse.with_svd(blur, shape), pixels, LINEAR)
    sensed = lambda y: y.reshape(7, -1)
    yield Restoration("sensing 1 in 8", 10, inverse.with_svd(sensing, shape), sensed, LINEAR)
    yield Restoration("phase retrieval", 13, inverse.phase_retrieval(), magnitudes, NONLINEAR)


def colours() -> Iterator[Restoration]:
    """The rows of a picture of colourisation: an image each."""
    grey = lambda y: pixels(y.repeat(3, axis=-1))
    for example in (4, 8, 20, 31):
        yield Restoration("", example, inverse.greying(), grey, LINEAR)


def picture(
    run: str, rows: Sequence[Restoration], steps: int = 100, noise: float = 0.05, shown: int = 3
) -> Figure:
    """Truth, measurement and samples of each row, by the network of a run, without a label."""
    apply, params, config = load(run)
    e = resolve(config)
    network = e.denoiser(functools.partial(apply, params))
    if config.model.labels:
        cond = {"label": jnp.full(shown, config.model.labels)}
        network = functools.partial(network, cond=cond)
    schedule, clipped = e.schedule, diffjax.clip_x_0(network)
    examples = data.first(load_data(config)[1], max(row.example for row in rows) + 1)["x"]
    figure, axes = plots.panels(len(rows), 2 + 3 * shown, width=0.82, height=0.9)
    for ax in axes:
        ax.axis("off")
    for i, row in enumerate(rows):
        panels = iter(axes[i * (2 + 3 * shown) :])

        def draw(image, heading, panels=panels, first=i == 0, **limits):
            ax = next(panels)
            ax.imshow(image, cmap="gray", **limits)
            ax.set(title=heading if first else "")
            return ax

        truth = jnp.asarray(examples[row.example : row.example + 1])
        clean = row.operator(truth)
        y = clean + noise * jax.random.normal(jax.random.key(row.example), clean.shape)
        y = row.operator(y) if row.operator.mask is not None else y
        ax = draw(pixels(np.asarray(truth)[0]), "truth", vmin=-1, vmax=1)
        ax.text(
            -0.1,
            0.5,
            row.title,
            fontsize=7,
            rotation=90,
            va="center",
            ha="right",
            transform=ax.transAxes,
        )
        draw(row.shown(np.asarray(y)[0]), "measured")
        x_1 = diffjax.prior_sample(jax.random.key(1), schedule, (shown, *truth.shape[1:]))
        for solver, options in row.solvers.items():
            denoise = clipped
            if solver == "mmps":  # needs the derivative of the network, and is clipped itself
                options = {"make": lambda guided, s: diffjax.ancestral(diffjax.clip_x_0(guided, s))}
                denoise = network
            every = jnp.repeat(y, shown, axis=0)
            walk = SOLVERS[solver].walk(denoise, schedule, row.operator, every, noise, **options)
            sample = functools.partial(diffjax.sample, jax.random.key(2), walk)
            x_0, _ = jax.jit(sample)(x_1, diffjax.uniform_times(steps))
            for k, x in enumerate(np.asarray(x_0)):
                draw(pixels(x), solver if k == shown // 2 else "", vmin=-1, vmax=1)
            print(row.title or row.example, solver, flush=True)
    return figure


PAGE = """\
# Inverse problems

A measurement y = A x_0 + noise is known, and a trained denoiser stands for the distribution of
x_0. The solvers of `inverse` draw from the posterior p(x_0 | y), or from something near it. How
near is measured here on data whose posterior is known in closed form. Measured by `python
studies/inverse.py mixture` on {date}: JAX {jax}, float32, two cores of a shared Intel Xeon.

![A row for each operator: truth, measurement, and samples by three solvers](images/inverse.png)

The network is `fashion_mnist`, which comes with diffjax, without a label; the noise has a
standard deviation of 0.05 where a pixel is in [-1, 1]. Each solver takes 100 steps. What the
measurement does not determine differs from sample to sample. Two samples do not fit their
measurements, one by `dps` in super-resolution and one by `ddrm` in compressed sensing. An image and
its rotation by 180 degrees have the same Fourier magnitudes, so that two dresses are reconstructed
upside down, and one sample mixes both. `ddrm` cannot retrieve phases, because it needs a linear
operator.

![Truth, its mean over the channels, and coloured samples by three solvers](images/colours.png)

Colourisation is the inverse of `greying`. The network is `configs/folder.py` on 1,446 emoji of 32
pixels (`studies/emoji.py`), trained for 1,500 steps with a learning rate that decays to 0; none of
the pictured emoji was trained on. The measurement leaves colours open, so that samples differ in
them. One sample of `dps` has lost the arrow.

## What a solver needs

{needs}
"svd" is an operator with its singular value decomposition: `inpainting`, `downsampling` and
`greying` have it for images of any size, and `with_svd` computes it for small data. "Any"
includes operators that are not linear, such as `phase_retrieval`. A pass is one evaluation of the
network or of its derivative, which also needs memory for a backward pass. An operator or a noise
that a solver cannot take is refused before anything is compiled.

## Which to choose

{advice}
## Against exact posteriors

The data are images of 4 x 4 pixels from a mixture of five Gaussians with smooth means and
covariances, of standard deviation {std:.2f}; the denoiser is exact, so that all of the error is
the solver's. The noise has a standard deviation of {noise}. Numbers are means over {measured}
measurements of as many truths, {drawn} samples each, and {seeds} seeds.

![Each measure against passes of the network, for each operator](images/inverse_errors.png)

- **distance**: of the samples to as many draws of the exact posterior, the sliced Wasserstein
  distance of order one over 32 directions, by the number of passes for one sample.
- **mean**: the distance of the samples' mean to the exact one, in units of the square root of the
  posterior's total variance. The tables have it by {most} passes, as the rest, and the picture by
  all numbers of passes.
- **covariance**: the Frobenius norm of the error of the covariance, relative to the exact one.
- **coverage**: how often the truth lies between the 5 % and 95 % quantiles of the samples along a
  direction; 0.90 is right. Too narrow samples cover less. Draws that know nothing of the
  measurement cover 0.90, too, so that this number says something only beside the others.

"exact" are draws of the exact posterior, whose numbers are what so few samples leave of any
solver; "no measurement" are draws of the mixture. Solvers walk by `ancestral` where no other
sampler is named. The passes of `tds` are for one sample of a population, whose samples depend on
each other.

{tables}
Over seeds the distance differs by a standard deviation of at most {deviation:.3f}; half of them
differ by less than {half:.3f}.

## On other schedules

Super-resolution by {middle} passes, the distance:

{schedules}"""

ADVICE = """\
- **`mmps` first.** With three of the four operators it is the nearest from 100 passes on, or
  within 10 % of the nearest, and by 400 passes it covers 0.89 to 0.91. It needs no option but the
  noise, and takes any operator. Walk by `ancestral`; by 25 passes `dpm_solver_pp_2m` is
  better except in inpainting, because its samples are not too narrow then.
- **`pigdm` where time is short**: in super-resolution and deblurring here it is as near as `mmps`,
  for less. In compressed sensing and inpainting it is not: it assumes that the data are equally
  wide in all directions. Walk by `ancestral`; a deterministic sampler keeps the errors of the
  guidance.
- **`tds` where the posterior has several modes**, as in inpainting here, and time allows: its mean
  ends nearer than that of `mmps`. It is the only solver that converges to the exact posterior as
  steps and particles are added. With too few of either, a population collapses onto one sample:
  64 particles do by 25 passes.
- **`ddrm` where the network's derivative costs too much.** Of the solvers without it, it is the
  nearest by 100 passes, except in deblurring; in inpainting it ends as near as `tds`. Its samples
  are too narrow (coverage 0.4 to 0.8), and more steps make this worse, most in deblurring.
- **`diffpir`** needs neither the derivative nor a decomposition, and hardly depends on the number
  of steps; but more of them do not remove its bias.
- **`dps`** where nothing else applies. Its scale must be found for each operator, number of steps
  and schedule (here 1 by 25 passes and 0.1 by 400 under VP; the table of schedules has what the
  same scale does under others), and where its samples are near, they are too narrow.
- **`repaint`** needs no noise, but is no better than `pigdm` in inpainting.

A network that predicts eps has large errors in x_0 near t = 1, which the derivative of `mmps` and
`pigdm` amplifies: clip the guided denoiser, as the picture does, and give the other solvers a
clipped one.
"""


def page(record: dict[str, Any]) -> str:
    """The text of docs/inverse.md."""
    runs = record["runs"]
    cells = {cell.rsplit("/", 1)[0] for cell in runs}
    deviations = [
        statistics.stdev(over_seeds(runs, "distance", *cell.split("/"))) for cell in cells
    ]
    of = lambda label, kind: statistics.mean(
        over_seeds(runs, "distance", "super-resolution", label, kind, BUDGETS[1])
    )
    return PAGE.format(
        date=record["date"],
        jax=record["jax"],
        needs=table(["solver", "operators", "noise", "passes a step"], needs()),
        advice=ADVICE,
        std=STD,
        noise=NOISE,
        measured=MEASURED,
        drawn=DRAWN,
        seeds=len(SEEDS),
        most=BUDGETS[-1],
        middle=BUDGETS[1],
        tables="\n".join(
            f"### {name.capitalize()}\n\n{operator_table(runs, name)}" for name in OPERATORS
        ),
        deviation=max(deviations),
        half=statistics.median(deviations),
        schedules=table(
            ["solver", *SCHEDULES],
            ([label, *(f"{of(label, kind):.3f}" for kind in SCHEDULES)] for label in ON_SCHEDULES),
        ),
    )


def needs() -> Iterator[list[str]]:
    """What each row of `SOLVERS` needs, by the table itself."""
    passes = {
        "pigdm": "2",
        "mmps": "1 + `iterations`",
        "diffpir": "1",
        "dps": "2",
        "repaint": "`repeats`",
        "ddrm": "1",
        "tds": "2 for each particle",
    }
    noise = {"unused": "not used", "any": "any", "positive": "more than 0"}
    for name, row in SOLVERS.items():
        yield [f"`{name}`", row.operators, noise[row.noise], passes[name]]


def main() -> None:
    """Do what the command says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("part", choices=("mixture", "picture", "colours", "page"))
    parser.add_argument("--run", help="with colours: a run whose images have three channels")
    args = parser.parse_args()
    if (args.part == "colours") != (args.run is not None):
        parser.error(f"{args.part}: colours needs --run, and nothing else takes it")
    if args.part == "mixture":
        measure()
    elif args.part == "picture":
        picture("fashion_mnist", list(garments())).savefig(IMAGES / "inverse.png")
    elif args.part == "colours":
        picture(args.run, list(colours())).savefig(IMAGES / "colours.png")
    else:
        record = json.loads(RECORD.read_text())
        errors_figure(record["runs"]).savefig(IMAGES / "inverse_errors.png")
        (ROOT / "docs" / "inverse.md").write_text(page(record))


if __name__ == "__main__":
    main()
