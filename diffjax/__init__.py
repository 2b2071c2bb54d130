"""diffjax: the mathematics of diffusion models as pure functions of arrays.

    x_t = alpha_t x_0 + sigma_t eps,    log_snr = log(alpha^2 / sigma^2),    t = 0 data, 1 noise

A `Schedule` says how fast and how normalised; the forward process has no parameters; a target
says what a network regresses; a denoiser turns its output into (x_0, eps); a sampler walks from
noise to data. Importing this imports jax and numpy only; networks are in `diffjax.models`, and
training in `diffjax.training`.
"""

from . import weightings
from .denoisers import classifier_free, clip_x_0, denoiser, unit_output
from .losses import diffusion_loss, sample_times
from .process import prior_sample, q_posterior, q_sample, q_transition, scales_at
from .samplers import (
    Sampler,
    ancestral,
    ddim,
    discrete_times,
    karras_times,
    log_snr_times,
    sample,
    uniform_times,
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
    ve,
    vp,
    zero_terminal_snr,
)
from .targets import TARGETS, convert, decode, encode
from .types import Denoiser, Network, Prediction

__all__ = [
    "TARGETS",
    "Denoiser",
    "Network",
    "Prediction",
    "Sampler",
    "Schedule",
    "ancestral",
    "classifier_free",
    "clip_x_0",
    "convert",
    "cosine",
    "cosine_betas",
    "ddim",
    "decode",
    "denoiser",
    "diffusion_loss",
    "discrete_times",
    "encode",
    "flow",
    "from_betas",
    "karras_times",
    "linear",
    "linear_betas",
    "log_snr_times",
    "log_uniform",
    "prior_sample",
    "q_posterior",
    "q_sample",
    "q_transition",
    "rectified_flow",
    "sample",
    "sample_times",
    "scaled_linear_betas",
    "scales_at",
    "shift",
    "sigmoid",
    "uniform_times",
    "unit_output",
    "ve",
    "vp",
    "weightings",
    "zero_terminal_snr",
]
__version__ = "0.1.0"
