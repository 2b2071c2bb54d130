"""diffjax: the mathematics of diffusion models as pure functions of arrays.

    x_t = alpha_t x_0 + sigma_t eps,    log_snr = log(alpha^2 / sigma^2),    t = 0 data, 1 noise

A diffusion model is made of four things: a `Schedule`, a network with a target that it regresses, a
denoiser that turns the network's output into (x_0, eps), and a sampler that walks from noise to
data. Everything else, guidance, losses, likelihoods and inverse problems, is a function of these.

Importing this imports jax and numpy only; networks are in `diffjax.models`, the training step is in
`diffjax.training`.
"""

from . import couplings, densities, guidance, inverse, oracles, samplers, schedules, weightings
from .denoisers import (
    clip_x_0,
    denoiser,
    flow_map,
    fourier_features,
    time_input,
    unit_input,
    unit_output,
)
from .flow_maps import IDENTITIES, flow_map_loss
from .guidance import *
from .learned_schedule import continuous_bound_loss
from .learned_variance import bound_loss, hybrid_loss
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
from .loss_aware import LossHistory, loss_aware_times, loss_history, remember_losses
from .losses import diffusion_loss, effective_weight, sample_times
from .process import prior_sample, q_posterior, q_sample, q_transition, scales_at
from .samplers import *
from .schedules import *
from .targets import TARGETS, convert, decode, encode
from .tiling import tiled
from .types import Denoiser, FlowMap, LearnedPrediction, Network, Prediction

__all__ = [
    "IDENTITIES",
    "TARGETS",
    "Denoiser",
    "Elbo",
    "FlowMap",
    "LearnedPrediction",
    "LossHistory",
    "Network",
    "Prediction",
    "bits_per_dim",
    "bound_loss",
    "clip_x_0",
    "continuous_bound_loss",
    "convert",
    "couplings",
    "decode",
    "densities",
    "denoiser",
    "denoising_term",
    "dequantise",
    "diffusion_loss",
    "effective_weight",
    "elbo",
    "encode",
    "flow_log_likelihood",
    "flow_map",
    "flow_map_loss",
    "fourier_features",
    "guidance",
    "hybrid_loss",
    "inverse",
    "loss_aware_times",
    "loss_history",
    "oracles",
    "prior_sample",
    "prior_term",
    "q_posterior",
    "q_sample",
    "q_transition",
    "reconstruction_term",
    "remember_losses",
    "sample_times",
    "samplers",
    "scales_at",
    "schedules",
    "tiled",
    "time_input",
    "unit_input",
    "unit_output",
    "weightings",
    *guidance.__all__,
    *samplers.__all__,
    *schedules.__all__,
]
__version__ = "0.2.0.dev0"
