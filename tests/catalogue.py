"""Every schedule, target, weighting and sampler: each row of a table, and variants of some.

The tests are parametrised over these, so that a new row is tested because it is there.
"""

import functools

import pytest

import diffjax
from diffjax import weightings

SCHEDULES = {name: make() for name, make in diffjax.SCHEDULES.items()} | {
    "cosine_short": diffjax.cosine(-10.0, 10.0),
    "sigmoid_sharp": diffjax.sigmoid(start=0.0, end=3.0, tau=0.5),
    "log_uniform_vp": diffjax.log_uniform(0.001, 1000.0, scales=diffjax.vp),
    "shift": diffjax.shift(diffjax.cosine(), -2.0),
    "cosine_betas": diffjax.from_betas(diffjax.cosine_betas(100)),
    "zero_terminal_snr": diffjax.from_betas(diffjax.zero_terminal_snr(diffjax.linear_betas(1000))),
}
TARGETS = list(diffjax.TARGETS)
WEIGHTINGS = {name: make() for name, make in weightings.WEIGHTINGS.items()} | {
    "sigmoid": weightings.sigmoid(-1.0),
}
SAMPLERS = {name: row.make for name, row in diffjax.SAMPLERS.items() if not row.two_times} | {
    "ancestral_beta": functools.partial(diffjax.ancestral, variance="beta"),
    "ddim_half": functools.partial(diffjax.ddim, eta=0.5),
    "ddim_one": functools.partial(diffjax.ddim, eta=1.0),
    "edm_churn": functools.partial(diffjax.edm, s_churn=10.0, s_max=50.0),
    "unipc_third": functools.partial(diffjax.unipc, order=3),
}
EXACT = diffjax.oracles.gaussian(SCHEDULES["cosine"], [0.0], 1.0)
DETERMINISTIC = {
    name: make for name, make in SAMPLERS.items() if not make(EXACT, SCHEDULES["cosine"]).stochastic
}


def slow(*cases):
    """Cases of `pytest.mark.parametrize` that only `make test-faults` runs."""
    values = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*each, marks=pytest.mark.faults) for each in values]


def each(table, *quick):
    """The rows of a table as cases; `make test` runs the quick ones only."""
    mark = lambda name: () if name in quick else pytest.mark.faults
    values = lambda row: row if type(row) is tuple else (row,)  # of several arguments
    return [pytest.param(*values(row), id=name, marks=mark(name)) for name, row in table.items()]
