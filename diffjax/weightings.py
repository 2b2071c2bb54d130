r"""Loss weightings: functions of (log_snr, rate) that multiply the mean squared **eps** error.

`rate` is -d log_snr / dt in continuous time, or T expm1(log_snr_s - log_snr_t) for a step of the
grid i/T (`losses.rate_at`). In every other target's space the same weight is
weight (alpha / det)^2, which `diffusion_loss` takes care of; so a weighting means the same
objective whichever target is trained.

The first two are weightings; the others make one from their parameters.
"""

from collections.abc import Callable

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


def min_snr(gamma: float = 5.0) -> Weighting:
    """min(snr, gamma) / snr: x_0's error weighted by its SNR, up to gamma.

    Hang et al. 2023, "Efficient diffusion training via Min-SNR weighting strategy", section 3.4.

    Raises:
      ValueError: unless `gamma > 0`.
    """
    if gamma <= 0:
        raise ValueError(f"{gamma=}: must be positive")
    return lambda log_snr, rate: jnp.minimum(gamma * jnp.exp(-log_snr), 1)
