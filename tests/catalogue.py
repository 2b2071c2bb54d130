"""Every public schedule, target, weighting and sampler: a new one is tested by being added here.

The tests are parametrised over these; `test_catalogue_is_complete` compares with what is public.
"""

import functools

import diffjax
from diffjax import weightings

SCHEDULES = {
    "cosine": diffjax.cosine(),
    "cosine_short": diffjax.cosine(-10.0, 10.0),
    "linear": diffjax.linear(),
    "sigmoid": diffjax.sigmoid(),
    "sigmoid_sharp": diffjax.sigmoid(start=0.0, end=3.0, tau=0.5),
    "log_uniform": diffjax.log_uniform(),
    "log_uniform_vp": diffjax.log_uniform(0.001, 1000.0, scales=diffjax.vp),
    "rectified_flow": diffjax.rectified_flow(),
    "monotone": diffjax.monotone(diffjax.monotone_params()),
    "shift": diffjax.shift(diffjax.cosine(), -2.0),
    "linear_betas": diffjax.from_betas(diffjax.linear_betas(1000)),
    "scaled_linear_betas": diffjax.from_betas(diffjax.scaled_linear_betas(1000)),
    "cosine_betas": diffjax.from_betas(diffjax.cosine_betas(100)),
    "zero_terminal_snr": diffjax.from_betas(diffjax.zero_terminal_snr(diffjax.linear_betas(1000))),
}
TARGETS = list(diffjax.TARGETS)
WEIGHTINGS = {
    "unit": None,
    "constant": weightings.constant,
    "elbo": weightings.elbo,
    "min_snr": weightings.min_snr(5.0),
    "truncated_snr": weightings.truncated_snr,
    "p2": weightings.p2,
    "edm": weightings.edm,
    "sigmoid": weightings.sigmoid(-1.0),
}
SAMPLERS = {
    "ancestral": diffjax.ancestral,
    "ancestral_beta": functools.partial(diffjax.ancestral, variance="beta"),
    "ddim": diffjax.ddim,
    "ddim_half": functools.partial(diffjax.ddim, eta=0.5),
    "ddim_one": functools.partial(diffjax.ddim, eta=1.0),
    "dpm_solver_pp_2m": diffjax.dpm_solver_pp_2m,
    "dpm_solver_pp_2m_sde": diffjax.dpm_solver_pp_2m_sde,
    "dpm_solver_pp_3m": diffjax.dpm_solver_pp_3m,
    "edm": diffjax.edm,
    "edm_churn": functools.partial(diffjax.edm, s_churn=10.0, s_max=50.0),
    "euler_maruyama": diffjax.euler_maruyama,
    "heun": diffjax.heun,
    "lms": diffjax.lms,
    "predictor_corrector": diffjax.predictor_corrector,
    "unipc": diffjax.unipc,
    "unipc_third": functools.partial(diffjax.unipc, order=3),
}
EXACT = diffjax.oracles.gaussian(SCHEDULES["cosine"], [0.0], 1.0)
DETERMINISTIC = {
    name: make for name, make in SAMPLERS.items() if not make(EXACT, SCHEDULES["cosine"]).stochastic
}
