"""Measure the samplers: orders of convergence, and error against evaluations, on exact denoisers.

    python docs/samplers.py        # writes docs/samplers.md; a quarter of an hour on one core

`tests/test_samplers.py` asserts the strong orders; here is how large the errors are.
"""

import datetime
import functools
import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_ENABLE_X64", "1")

import jax
import jax.numpy as jnp
import numpy as np

import diffjax
from diffjax import oracles, plots

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
GRIDS = {
    "uniform t": lambda schedule, n: diffjax.uniform_times(n),
    "log-SNR": diffjax.log_snr_times,
    "Karras": diffjax.karras_times,
}
# Each with how often a step evaluates the denoiser.
DETERMINISTIC = {
    "ddim": (diffjax.ddim, 1),
    "heun": (diffjax.heun, 2),
    "edm": (diffjax.edm, 2),
    "dpm_solver_pp_2m": (diffjax.dpm_solver_pp_2m, 1),
    "dpm_solver_pp_3m": (diffjax.dpm_solver_pp_3m, 1),
    "unipc": (diffjax.unipc, 1),
    "unipc, order 3": (functools.partial(diffjax.unipc, order=3), 1),
    "lms": (diffjax.lms, 1),
}
STOCHASTIC = {
    "ancestral": (diffjax.ancestral, 1),
    "ancestral, beta": (functools.partial(diffjax.ancestral, variance="beta"), 1),
    "ddim, eta 0.5": (functools.partial(diffjax.ddim, eta=0.5), 1),
    "euler_maruyama": (diffjax.euler_maruyama, 1),
    "dpm_solver_pp_2m_sde": (diffjax.dpm_solver_pp_2m_sde, 1),
    "edm, churn 10": (functools.partial(diffjax.edm, s_churn=10.0), 2),
    "predictor_corrector": (diffjax.predictor_corrector, 2),
}
EVALUATIONS = (10, 20, 40)
WEIGHTS, MEANS = np.array([0.3, 0.7]), np.array([[-1.0, 0.5], [0.8, -0.3]])
COVS = np.array([[[0.1, 0.05], [0.05, 0.2]], [[0.3, -0.1], [-0.1, 0.1]]])
MEAN, STD = 0.4, 0.6


def flow_errors(make, schedule, grids):
    """Largest distance from the exact flow of the mixture, 64 walks over the whole of [0, 1]."""
    oracle = oracles.gaussian_mixture(schedule, WEIGHTS, MEANS, COVS)
    x_1 = diffjax.prior_sample(jax.random.key(0), schedule, (64, 2))
    exact = jax.jit(lambda x: oracle.flow_map(x, 1.0, 0.0))(x_1)
    walk = jax.jit(lambda ts: diffjax.sample(jax.random.key(0), make(oracle, schedule), x_1, ts)[0])
    return [float(jnp.abs(walk(ts) - exact).max()) for ts in grids]


def spread_errors(make, schedule, grids, n=100_000):
    """How far the standard deviation of n samples is from that of Gaussian data, relative."""
    oracle = oracles.gaussian(schedule, [MEAN], STD**2)
    x_1 = diffjax.prior_sample(jax.random.key(1), schedule, (n, 1))
    walk = jax.jit(lambda ts: diffjax.sample(jax.random.key(2), make(oracle, schedule), x_1, ts)[0])
    return [abs(float(walk(ts).std()) / STD - 1) for ts in grids]


def orders():
    """Rows of sampler, evaluations a step, kind and order, on uniform log-SNR."""
    schedule = diffjax.cosine(-7.0, 7.0)
    for name, (make, evaluations) in DETERMINISTIC.items():
        steps = (80, 160, 320)
        errors = flow_errors(make, schedule, [diffjax.log_snr_times(schedule, n) for n in steps])
        yield [name, str(evaluations), "strong", f"{plots.order(steps, errors):.2f}"]
    for name, (make, evaluations) in STOCHASTIC.items():
        steps = (12, 24, 48)
        grids = [diffjax.log_snr_times(schedule, n) for n in steps]
        errors = spread_errors(make, schedule, grids, 400_000)
        found = f"{plots.order(steps, errors):.1f}" if min(errors) > 4e-3 else "below the noise"
        yield [name, str(evaluations), "weak", found]


def errors(samplers, measure):
    """Rows of schedule, grid, sampler and the errors at each number of evaluations."""
    for schedule_name, schedule in SCHEDULES.items():
        for grid_name, grid in GRIDS.items():
            for name, (make, evaluations) in samplers.items():
                grids = [grid(schedule, n // evaluations) for n in EVALUATIONS]
                found = measure(make, schedule, grids)
                yield [schedule_name, grid_name, name, *(f"{e:.1e}" for e in found)]


def table(head, lines):
    """A markdown table."""
    lines = [head, ["---"] * len(head), *lines]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


PAGE = """\
# Samplers

Measured on exact denoisers, so that all of the error is the sampler's. Written by
`python docs/samplers.py` on {date}: JAX {jax}, float64, CPU.
`tests/test_samplers.py` asserts the strong orders.

## Orders of convergence

Strong: the largest distance from the exact probability flow of a Gaussian mixture in two
dimensions, 80 to 320 steps. Weak: the relative error of the standard deviation of 400,000 samples
of a Gaussian, 12 to 48 steps; where it sinks into the sampling error (about 0.1 %) no order is
given. Equal steps of log-SNR from -7 to 7.

UniPC's correction makes it one order better than its name. The published code of
DPM-Solver++(3M) takes half of its second derivative and is of order 2; this one is of order 3.

{orders}
## Error against evaluations: deterministic samplers

The largest distance of 64 walks from the exact flow of the mixture, over all of [0, 1], after
{evaluations} evaluations of the denoiser.

{deterministic}
## Error against evaluations: stochastic samplers

The relative error of the standard deviation of 100,000 samples of a Gaussian (0.2 % is the
sampling error).

{stochastic}"""


def main():
    """Write docs/samplers.md."""
    head = ["schedule", "grid", "sampler", *(f"{n} evaluations" for n in EVALUATIONS)]
    page = PAGE.format(
        date=datetime.date.today(),
        jax=jax.__version__,
        evaluations=", ".join(map(str, EVALUATIONS)),
        orders=table(["sampler", "evaluations a step", "kind", "order"], orders()),
        deterministic=table(head, errors(DETERMINISTIC, flow_errors)),
        stochastic=table(head, errors(STOCHASTIC, spread_errors)),
    )
    Path(__file__).with_suffix(".md").write_text(page)


if __name__ == "__main__":
    main()
