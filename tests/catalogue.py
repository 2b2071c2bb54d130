"""Every public schedule, target, weighting and sampler: a new one is tested by being added here.

The tests are parametrised over these; `test_catalogue_is_complete` compares with what is public.
"""

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
}
SAMPLERS = {
    "ancestral": diffjax.ancestral,
    "ancestral_beta": lambda d, s: diffjax.ancestral(d, s, variance="beta"),
    "ddim": diffjax.ddim,
    "ddim_half": lambda d, s: diffjax.ddim(d, s, eta=0.5),
    "ddim_one": lambda d, s: diffjax.ddim(d, s, eta=1.0),
}
