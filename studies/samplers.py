"""Measure the samplers: orders of convergence, and error against evaluations, on exact denoisers.

    python studies/samplers.py        # writes docs/samplers.md; a quarter of an hour on one core

`tests/test_samplers.py` asserts the strong orders; here is how large the errors are.
"""

import datetime
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_ENABLE_X64", "1")

import jax
import jax.numpy as jnp
import numpy as np

import diffjax
from diffjax import oracles, plots
from diffjax.evaluation import distances, sampling
from diffjax.experiment import Config, Sampling, Walk, resolve
from diffjax.models import UNetConfig
from markdown_table import table

ROOT = Path(__file__).parents[1]
SCHEDULES = {
    "cosine": diffjax.cosine(),
    "linear": diffjax.linear(),
    "sigmoid": diffjax.sigmoid(),
    "DDPM's betas": diffjax.from_betas(diffjax.linear_betas(1000)),
    "zero-terminal betas": diffjax.from_betas(
        diffjax.zero_terminal_snr(diffjax.linear_betas(1000))
    ),
    "log_uniform (VE)": diffjax.log_uniform(),
    "rectified_flow": diffjax.rectified_flow(),
}
OPTIONS = {
    "ancestral": {"ancestral, beta": {"variance": "beta"}},
    "ddim": {"ddim, eta 0.5": {"eta": 0.5}},
    "edm": {"edm, churn 10": {"s_churn": 10.0}},
    "unipc": {"unipc, order 3": {"order": 3}},
}
"""Samplers that are measured with other options than the default ones, too, by their labels."""
EVALUATIONS = (10, 20, 40)
FEW = (1, 2, 3, 4)
"""Numbers of evaluations, of which a sampler can use only multiples of what one step takes."""
FEW_SCHEDULES = ("cosine", "log_uniform (VE)", "rectified_flow")
WEIGHTS, MEANS = np.array([0.3, 0.7]), np.array([[-1.0, 0.5], [0.8, -0.3]])
COVS = np.array([[[0.1, 0.05], [0.05, 0.2]], [[0.3, -0.1], [-0.1, 0.1]]])
MEAN, STD = 0.4, 0.6
CLASSES = np.array([[-0.25, 0.125], [0.25, -0.125]])
"""The means of two classes of equal weight, which overlap."""
OF_CLASS = np.array([[0.25, 0.1], [0.1, 0.25]])
"""The covariance of each."""
GUIDED = (1, 1.5, 2, 3, 4, 8)
"""Weights of guidance."""
DRAWN = 20_000
"""Samples that are drawn at each weight."""
CHAINS = {
    "none": (),
    "classifier_free": ("classifier_free:weight={w}",),
    "classifier_free, within -2 and 4": ("classifier_free:weight={w}", "within:low=-2,high=4"),
    "apg": ("apg:weight={w}",),
    "apg_momentum, -0.5": ("apg_momentum:weight={w}",),
    "cfg_zero": ("cfg_zero:weight={w}",),
    "cfg_plus_plus, weight / 8": ("cfg_plus_plus:weight={lambda_}",),
    "autoguidance": ("autoguidance:weight={w},weaker=weaker",),
}
"""Chains of guidances, by their labels in the table."""


class Subject(NamedTuple):
    """A sampler with its options bound.

    Attributes:
      label: its name in tables.
      make: (denoise, schedule) -> `Sampler`.
      evaluations: how often a step evaluates the denoiser.
      times: the grid that suits it.
    """

    label: str
    make: Callable[..., diffjax.Sampler]
    evaluations: int
    times: str


def subjects(stochastic):
    """All samplers of denoisers, with the `OPTIONS`, that are stochastic, or that are not."""
    by_denoisers = {name: row for name, row in diffjax.SAMPLERS.items() if not row.two_times}
    for name, row in by_denoisers.items():
        for label, options in ({name: {}} | OPTIONS.get(name, {})).items():
            make = functools.partial(row.make, **options)
            if make(lambda *_: None, SCHEDULES["cosine"]).stochastic == stochastic:
                drawing = sampling.Drawing(walk=Walk(sampler=name, options=options, steps=1))
                e = sampling.drawn_by(Config(), drawing)
                yield Subject(label, make, sampling.function_evaluations(e), row.times)


@functools.cache
def mixture(schedule):
    """The mixture's exact denoiser, 64 draws of the prior, and where its exact flow takes them."""
    oracle = oracles.gaussian_mixture(schedule, WEIGHTS, MEANS, COVS)
    x_1 = diffjax.prior_sample(jax.random.key(0), schedule, (64, 2))
    return oracle, x_1, jax.jit(lambda x: oracle.flow_map(x, 1.0, 0.0))(x_1)


def flow_errors(make, schedule, grids):
    """Largest distance from the exact flow of the mixture, 64 walks over the whole of [0, 1]."""
    oracle, x_1, exact = mixture(schedule)
    walk = jax.jit(lambda ts: diffjax.sample(jax.random.key(0), make(oracle, schedule), x_1, ts)[0])
    return [float(jnp.abs(walk(ts) - exact).max()) for ts in grids]


def spread_errors(make, schedule, grids, n=100_000):
    """Relative error of the standard deviation of n samples of Gaussian data."""
    oracle = oracles.gaussian(schedule, [MEAN], STD**2)
    x_1 = diffjax.prior_sample(jax.random.key(1), schedule, (n, 1))
    walk = jax.jit(lambda ts: diffjax.sample(jax.random.key(2), make(oracle, schedule), x_1, ts)[0])
    return [abs(float(walk(ts).std()) / STD - 1) for ts in grids]


def orders():
    """Rows of sampler, evaluations per step, kind and order, on uniform log-SNR."""
    schedule = diffjax.cosine(-7.0, 7.0)
    for label, make, evaluations, _ in subjects(stochastic=False):
        steps = (80, 160, 320)
        errors = flow_errors(make, schedule, [diffjax.log_snr_times(schedule, n) for n in steps])
        yield [label, evaluations, "strong", f"{plots.order(steps, errors):.2f}"]
    for label, make, evaluations, _ in subjects(stochastic=True):
        steps = (12, 24, 48)
        grids = [diffjax.log_snr_times(schedule, n) for n in steps]
        errors = spread_errors(make, schedule, grids, 400_000)
        found = f"{plots.order(steps, errors):.1f}" if min(errors) > 4e-3 else "below the noise"
        yield [label, evaluations, "weak", found]


def errors(stochastic, measure):
    """Rows of schedule, grid, sampler and the errors at each number of evaluations."""
    for schedule_name, schedule in SCHEDULES.items():
        for grid_name, grid in diffjax.TIMES.items():
            for label, make, evaluations, _ in subjects(stochastic):
                grids = [grid(schedule, n // evaluations) for n in EVALUATIONS]
                found = measure(make, schedule, grids)
                yield [schedule_name, grid_name, label, *(f"{e:.1e}" for e in found)]


def few_errors(stochastic, measure):
    """Rows of schedule, sampler and the errors after `FEW` evaluations, on the sampler's grid."""
    for schedule_name in FEW_SCHEDULES:
        schedule = SCHEDULES[schedule_name]
        for label, make, evaluations, times in subjects(stochastic):
            possible = [n for n in FEW if n % evaluations == 0]
            grids = [diffjax.TIMES[times](schedule, n // evaluations) for n in possible]
            found = dict(zip(possible, measure(make, schedule, grids), strict=True))
            shown = (f"{found[n]:.1e}" if n in found else "-" for n in FEW)
            yield [schedule_name, label, *shown]


def tilted(given, without, weight):
    """The mean and covariance of p_given^w p_without^(1 - w) of data, by quadrature."""
    axis = np.linspace(-6, 6, 1201)
    x = jnp.asarray(np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2))
    log_p = weight * given.log_density(x, 0.0) + (1 - weight) * without.log_density(x, 0.0)
    p = jax.nn.softmax(log_p)
    mean = p @ x
    return mean, (p[:, None] * (x - mean)).T @ (x - mean)


def guidance_errors(n=DRAWN, steps=100):
    """Rows of guidance and, at each weight, how far its samples are from the tilted density."""
    schedule = diffjax.cosine()
    given, wide = (oracles.gaussian(schedule, CLASSES[0], k * OF_CLASS) for k in (1, 2))
    whole = oracles.gaussian_mixture(schedule, [0.5, 0.5], CLASSES, [OF_CLASS, OF_CLASS])

    def denoise(x_t, t, cond=None):  # of the first class for the label 0, of both for 1
        pick = lambda a, b: jnp.where(cond["label"][:, None] == 0, a, b)
        return jax.tree.map(pick, given(x_t, t), whole(x_t, t))

    x_1 = diffjax.prior_sample(jax.random.key(1), schedule, (n, 2))
    cond = {"label": jnp.zeros(n, jnp.int32)}
    ts = diffjax.uniform_times(steps)
    model = UNetConfig(labels=1, null_label=True)
    for label, chain in CHAINS.items():
        without = wide if "auto" in label else whole
        found = []
        for w in GUIDED:
            words = tuple(word.format(w=w, lambda_=w / 8) for word in chain)
            e = resolve(Config(model=model, sampling=Sampling(guidance=words)))
            finish = lambda guided, e=e: functools.partial(
                e.guide(denoise, guided, wide), cond=cond
            )
            walk = lambda x_1, e=e, finish=finish: diffjax.sample(
                jax.random.key(0), e.sampler(denoise, finish), x_1, ts
            )[0]
            x = np.asarray(jax.jit(walk)(x_1))
            moments = distances.Moments(*map(np.asarray, tilted(given, without, w)))
            found.append(distances.frechet_distance(distances.moments(x), moments) ** 0.5)
        yield [label, *(f"{error:.3f}" for error in found)]


PAGE = """\
# Samplers

Measured on exact denoisers, so that all of the error is the sampler's. Written by
`python studies/samplers.py` on {date}: JAX {jax}, float64, CPU. `tests/test_samplers.py` asserts
the strong orders.

## Which to choose

- **10 to 20 evaluations of a trained network**: `unipc` or `dpm_solver_pp_2m`, both on `log_snr`
  times, which are their defaults. Where the network's errors add up, fresh noise at each step
  corrects them: on Fashion-MNIST `dpm_solver_pp_2m_sde` ends at a Frechet distance of 3.7 after 10
  evaluations, and the deterministic samplers at 10 or more ([performance](performance.md)).
- **50 evaluations or more**: `ancestral` is as near.
- **From an image to its noise and back**: a deterministic sampler of second order or more, such as
  `heun` or `dpm_solver_pp_2m`.
- **One to four evaluations**: a [flow map](howto/few_steps.md) and its sampler `jump`. No sampler
  makes up for a network that was not trained for this.

## Orders of convergence

The strong order is that of the largest distance from the exact probability flow of a Gaussian
mixture in two dimensions, from 80 to 320 steps. The weak order is that of the relative error of the
standard deviation of 400,000 samples of a Gaussian, from 12 to 48 steps; where that error is below
the sampling error (about 0.1 %), no order is given. The steps are of equal log-SNR, from -7 to 7.

A step of `edm` or `heun` that is too long for the method is of first order (see their docstrings).

UniPC's correction makes it one order better than its name says. The published code of
DPM-Solver++(3M) takes half of its second derivative and is of order 2, although at 40 to 160 steps
it can be nearer; this one is of order 3.

{orders}
## Error against evaluations: deterministic samplers

The error is the largest distance of 64 walks from the exact flow of the mixture, over all of
[0, 1], after {evaluations} evaluations of the denoiser.

{deterministic}
## Error against evaluations: stochastic samplers

The error is the relative error of the standard deviation of 100,000 samples of a Gaussian, whose
sampling error is 0.2 %.

{stochastic}
## One to four evaluations

The same errors, each sampler on the grid that suits it. A dash marks an odd number of evaluations
for a sampler that takes two a step. After
one evaluation all samplers give the denoiser's mean, and after so few none is near the flow. Those
that add the noise of beta, `euler_maruyama` and `ancestral` with it, are far too wide on a
variance-exploding schedule.

{few_deterministic}
{few_stochastic}
## Guidance

Guidance of weight w is meant to draw from the density p(x | c)^w p(x)^(1 - w), up to a constant.
Even with exact denoisers it does not: noise added to the tilted data does not have the tilted
density of noisy data (Bradley & Nakkiran 2024, arXiv 2408.09000). Here c is one of two classes
that overlap, each a Gaussian of standard deviation 0.5 in two dimensions. The tilted density is
known by quadrature. The error is the Frechet distance (not squared) of {guided} samples, by 100
steps of DDIM, from it. The first row says how far the class itself is from it.

{guidance}
- `classifier_free` overshoots: at a weight of 8 its samples are farther from the tilted density
  than those without guidance are. `within` keeps it to the noise levels that decide between the
  classes, and halves the error up to a weight of 2.
- `cfg_zero` has the least error at weights of 2 and more.
- `apg` removes what is parallel to the estimate, which in two dimensions is half of the
  difference. In an image it is a small part. Its momentum takes away what was already added.
- The weight of `cfg_plus_plus` is another one, from 0 to 1, and has no tilted density of its own:
  the weight of classifier-free guidance in its place depends on the length of the steps.
- The weaker denoiser of `autoguidance` is that of the class with twice the covariance, and the
  tilted density that of these two.
- `rescale` and `dynamic_threshold` look at all pixels of an image, and mean nothing in two
  dimensions.

A chain of guidances is given by words, to train.py as `--config.sampling.guidance` and to
sample.py:

```
python sample.py --workdir=digits --guidance apg_momentum:weight=3,momentum=-0.5 dynamic_threshold
python sample.py --workdir=digits --guidance autoguidance:weight=2,weaker=runs/small,average=0.2
```
"""


def main():
    """Write docs/samplers.md."""
    head = ["schedule", "grid", "sampler", *(f"{n} evaluations" for n in EVALUATIONS)]
    few_head = ["schedule", "sampler", *(f"after {n}" for n in FEW)]
    page = PAGE.format(
        date=datetime.date.today(),
        jax=jax.__version__,
        evaluations=", ".join(map(str, EVALUATIONS)),
        orders=table(["sampler", "evaluations per step", "kind", "order"], orders()),
        deterministic=table(head, errors(False, flow_errors)),
        stochastic=table(head, errors(True, spread_errors)),
        few_deterministic=table(few_head, few_errors(False, flow_errors)),
        few_stochastic=table(few_head, few_errors(True, spread_errors)),
        guided=f"{DRAWN:,}",
        guidance=table(
            ["guidance", *(f"weight {w:g}" for w in GUIDED)],
            guidance_errors(),
        ),
    )
    (ROOT / "docs" / "samplers.md").write_text(page)


if __name__ == "__main__":
    main()
