r"""Loss weightings: functions of (log_snr, rate) that multiply the mean squared **eps** error.

`rate` is -d log_snr / dt in continuous time, or T expm1(log_snr_s - log_snr_t) for a step of the
grid i/T (`schedules.rate_at`). In every other target's space the same weight is
weight (alpha / det)^2, which `diffusion_loss` takes care of; so a weighting means the same
objective whichever target is trained. `losses.effective_weight` says what it amounts to.

`min_snr` and `sigmoid` make a weighting from their parameter; the others are weightings, whose
options `functools.partial` binds.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from .types import Array

Weighting = Callable[[Array, Array], Array]


def constant(log_snr: Array, rate: Array) -> Array:
    """1: the L_simple of DDPM (Ho et al. 2020, equation 14)."""
    return jnp.ones_like(log_snr)


def elbo(log_snr: Array, rate: Array) -> Array:
    """rate / 2: the denoising-matching terms of the bound, in nats per dimension.

    Kingma et al. 2021, equations 14 (discrete time) and 17 (continuous time).
    """
    return rate / 2


def truncated_snr(log_snr: Array, rate: Array) -> Array:
    """max(snr, 1) / snr: x_0's error weighted by its SNR, but by 1 at the least.

    Salimans & Ho 2022, "Progressive distillation", section 4.
    """
    return jnp.maximum(jnp.exp(-log_snr), 1)


def p2(log_snr: Array, rate: Array, *, k: float = 1.0, gamma: float = 1.0) -> Array:
    """1 / (k + snr)^gamma: less weight where only imperceptible noise is left.

    Choi et al. 2022, "Perception prioritized training of diffusion models".
    """
    return (k + jnp.exp(log_snr)) ** -gamma


def edm(
    log_snr: Array,
    rate: Array,
    *,
    p_mean: float = -1.2,
    p_std: float = 1.2,
    sigma_data: float = 0.5,
) -> Array:
    """EDM's loss: its weight, times the density of its noise levels over that of uniform t.

    Karras et al. 2022, section 5 and table 1: log(sigma/alpha) ~ N(p_mean, p_std^2), and target F
    of that `sigma_data` at weight 1.
    """
    z = (-log_snr / 2 - p_mean) / p_std
    density = jnp.exp(-(z**2) / 2) / (2 * p_std * math.sqrt(2 * math.pi))  # of log_snr
    return rate * density * (jnp.exp(-log_snr) + sigma_data**2) / sigma_data**2


def min_snr(gamma: float = 5.0) -> Weighting:
    """min(snr, gamma) / snr: x_0's error weighted by its SNR, up to gamma.

    Hang et al. 2023, "Efficient diffusion training via Min-SNR weighting strategy", section 3.4.

    Raises:
      ValueError: unless `gamma > 0`.
    """
    if gamma <= 0:
        raise ValueError(f"{gamma=}: must be positive")
    return lambda log_snr, rate: jnp.minimum(gamma * jnp.exp(-log_snr), 1)


def sigmoid(bias: float = 0.0) -> Weighting:
    """The bound with the low noise levels faded out: rate / 2 / (1 + exp(log_snr - bias)).

    Kingma & Gao 2023, "Understanding diffusion objectives as the ELBO with simple data
    augmentation"; Hoogeboom et al. 2024, "Simpler diffusion", section 3.1.
    """
    return lambda log_snr, rate: rate / 2 * jax.nn.sigmoid(bias - log_snr)
