r"""Loss weightings: functions of (log_snr, rate) that multiply the mean squared **eps** error.

`rate` is -d log_snr / dt in continuous time, or T expm1(log_snr_s - log_snr_t) for a step of the
grid i/T (`schedules.rate_at`). In every other target's space the same weight is
weight (alpha / det)^2, and `diffusion_loss` applies that factor, so a weighting gives the same
objective for every target. `losses.effective_weight` computes the resulting objective.

Every function here takes a weighting's parameters and returns the weighting:

    diffusion_loss(key, network, schedule, target, x_0, weight=weightings.min_snr(gamma=5.0))
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from .types import Array

Weighting = Callable[[Array, Array], Array]


def unit() -> None:
    """No weighting of the eps error, but 1 / (a^2 + b^2) on the target's own error.

    Every target a x_0 + b eps then has unit variance for data of unit variance: the factor is 1 for
    x_0, eps and v, and Song's sigma^2 for the score.
    """


def constant() -> Weighting:
    """Weight 1: the L_simple of DDPM (Ho et al. 2020, equation 14)."""
    return lambda log_snr, rate: jnp.ones_like(log_snr)


def elbo() -> Weighting:
    """rate / 2: the denoising-matching terms of the bound, in nats per dimension.

    Kingma et al. 2021, equations 14 (discrete time) and 17 (continuous time).

    >>> weight = elbo()
    >>> weight(jnp.zeros(2), jnp.array([3.0, 4.0]))
    Array([1.5, 2. ], dtype=float32)
    """
    return lambda log_snr, rate: rate / 2


def truncated_snr() -> Weighting:
    """max(snr, 1) / snr: the x_0 error is weighted by its SNR, but by at least 1.

    Salimans & Ho 2022, "Progressive distillation", section 4.
    """
    return lambda log_snr, rate: jnp.maximum(jnp.exp(-log_snr), 1)


def p2(k: float = 1.0, gamma: float = 1.0) -> Weighting:
    """1 / (k + snr)^gamma: less weight where only imperceptible noise is left.

    Choi et al. 2022, "Perception prioritized training of diffusion models".

    Raises:
      ValueError: unless `k > 0`.
    """
    if not k > 0:
        raise ValueError(f"{k=}: must be positive")
    return lambda log_snr, rate: (k + jnp.exp(log_snr)) ** -gamma


def edm(p_mean: float = -1.2, p_std: float = 1.2, sigma_data: float = 0.5) -> Weighting:
    """EDM's loss: its weight, times the density of its noise levels over that of uniform t.

    Karras et al. 2022, section 5 and table 1: log(sigma/alpha) ~ N(p_mean, p_std^2), and weight 1
    on the target F with the same `sigma_data`.

    Raises:
      ValueError: unless `p_std > 0` and `sigma_data > 0`.
    """
    if not p_std > 0:
        raise ValueError(f"{p_std=}: must be positive")
    of_f = preconditioned(sigma_data)

    def weight(log_snr, rate):
        z = (-log_snr / 2 - p_mean) / p_std
        density = jnp.exp(-(z**2) / 2) / (2 * p_std * math.sqrt(2 * math.pi))  # of log_snr
        return rate * density * of_f(log_snr, rate)

    return weight


def preconditioned(sigma_data: float = 0.5) -> Weighting:
    """(1 / snr + sigma_data^2) / sigma_data^2: weight 1 on the target F, as in EDM and EDM2.

    With their density of noise levels as a part of the objective it is their loss, which `edm` is
    at uniform t.

    Raises:
      ValueError: unless `sigma_data > 0`.
    """
    if not sigma_data > 0:
        raise ValueError(f"{sigma_data=}: must be positive")
    return lambda log_snr, rate: (jnp.exp(-log_snr) + sigma_data**2) / sigma_data**2


def velocity(least: float = 0.0) -> Weighting:
    """1 / (snr max(sigma, least)^2): weight 1 on the velocity eps - x_0 of a rectified flow.

    sigma = sigmoid(-log_snr / 2) is the time of a straight line. Where it is small, an error of x_0
    counts for much; JiT limits that by least = 0.05 (Li & He 2025).

    Raises:
      ValueError: unless `0 <= least < 1`.
    """
    if not 0 <= least < 1:
        raise ValueError(f"{least=}: must be in [0, 1)")
    sigma = lambda log_snr: jnp.maximum(jax.nn.sigmoid(-log_snr / 2), least)
    return lambda log_snr, rate: jnp.exp(-log_snr) / sigma(log_snr) ** 2


def min_snr(gamma: float = 5.0) -> Weighting:
    """min(snr, gamma) / snr: the x_0 error is weighted by its SNR, but by at most gamma.

    Hang et al. 2023, "Efficient diffusion training via Min-SNR weighting strategy", section 3.4.

    Raises:
      ValueError: unless `gamma > 0`.
    """
    if not gamma > 0:
        raise ValueError(f"{gamma=}: must be positive")
    return lambda log_snr, rate: jnp.minimum(gamma * jnp.exp(-log_snr), 1)


def sigmoid(bias: float = 0.0) -> Weighting:
    """The bound with low noise levels weighted down: rate / 2 / (1 + exp(log_snr - bias)).

    Kingma & Gao 2023, "Understanding diffusion objectives as the ELBO with simple data
    augmentation"; Hoogeboom et al. 2024, "Simpler diffusion", section 3.1.
    """
    return lambda log_snr, rate: rate / 2 * jax.nn.sigmoid(bias - log_snr)


WEIGHTINGS: dict[str, Callable[..., Weighting | None]] = {
    "unit": unit,
    "constant": constant,
    "elbo": elbo,
    "truncated_snr": truncated_snr,
    "p2": p2,
    "edm": edm,
    "preconditioned": preconditioned,
    "velocity": velocity,
    "min_snr": min_snr,
    "sigmoid": sigmoid,
}
"""Weightings by name, as configs and the command line choose them."""
