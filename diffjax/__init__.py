"""diffjax: the mathematics of diffusion models as pure functions of arrays.

    x_t = alpha_t x_0 + sigma_t eps,    log_snr = log(alpha^2 / sigma^2),    t = 0 data, 1 noise

A `Schedule` says how fast and how normalised; the forward process has no parameters; a target
says what a network regresses; a denoiser turns its output into (x_0, eps); a sampler walks from
noise to data. Importing this imports jax and numpy only; networks are in `diffjax.models`, and
training in `diffjax.training`.
"""

from . import oracles, samplers, weightings
from .denoisers import classifier_free, clip_x_0, denoiser, unit_output
from .likelihood import (
    Elbo,
    bits_per_dim,
    denoising_term,
    dequantise,
    elbo,
    flow_log_likelihood,
    prior_term,
    reconstruction_term,
)
from .losses import diffusion_loss, sample_times
from .process import prior_sample, q_posterior, q_sample, q_transition, scales_at
from .samplers import (
    Sampler,
    ancestral,
    ddim,
    discrete_times,
    dpm_solver_pp_2m,
    dpm_solver_pp_2m_sde,
    dpm_solver_pp_3m,
    edm,
    euler_maruyama,
    heun,
    karras_times,
    lms,
    log_snr_times,
    predictor_corrector,
    sample,
    uniform_times,
    unipc,
)
from .schedules import (
    Schedule,
    cosine,
    cosine_betas,
    flow,
    from_betas,
    linear,
    linear_betas,
    log_uniform,
    rectified_flow,
    scaled_linear_betas,
    shift,
    sigmoid,
    time_at,
    ve,
    vp,
    zero_terminal_snr,
)
from .targets import TARGETS, convert, decode, encode
from .types import Denoiser, Network, Prediction

__all__ = [
    "TARGETS",
    "Denoiser",
    "Elbo",
    "Network",
    "Prediction",
    "Sampler",
    "Schedule",
    "ancestral",
    "bits_per_dim",
    "classifier_free",
    "clip_x_0",
    "convert",
    "cosine",
    "cosine_betas",
    "ddim",
    "decode",
    "denoiser",
    "denoising_term",
    "dequantise",
    "diffusion_loss",
    "discrete_times",
    "dpm_solver_pp_2m",
    "dpm_solver_pp_2m_sde",
    "dpm_solver_pp_3m",
    "edm",
    "elbo",
    "encode",
    "euler_maruyama",
    "flow",
    "flow_log_likelihood",
    "from_betas",
    "heun",
    "karras_times",
    "linear",
    "linear_betas",
    "lms",
    "log_snr_times",
    "log_uniform",
    "oracles",
    "predictor_corrector",
    "prior_sample",
    "prior_term",
    "q_posterior",
    "q_sample",
    "q_transition",
    "reconstruction_term",
    "rectified_flow",
    "sample",
    "sample_times",
    "samplers",
    "scaled_linear_betas",
    "scales_at",
    "shift",
    "sigmoid",
    "time_at",
    "uniform_times",
    "unipc",
    "unit_output",
    "ve",
    "vp",
    "weightings",
    "zero_terminal_snr",
]
__version__ = "0.1.0"
