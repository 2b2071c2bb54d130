"""From networks to denoisers, and from denoisers to denoisers.

A sampler calls `denoise(x_t, t, cond) -> Prediction(x_0, eps)` and never learns what the network
behind it predicts. Guidance and clipping take a denoiser and return a denoiser, so they compose;
`functools.partial(denoise, cond=...)` binds the conditioning.
"""

import jax
import jax.numpy as jnp

from .process import scales_at
from .schedules import Schedule
from .targets import Row, decode, row, unit_variance
from .types import Cond, Denoiser, Network, Prediction, Time, expand


def denoiser(network: Network, schedule: Schedule, target: str | Row) -> Denoiser:
    """Give a network its meaning: decode its output into x_0 and eps.

    Args:
      network: (x_t `[batch, ...]`, log_snr `[batch]`, cond) -> an estimate of the target.
      schedule: the `Schedule` it was trained with.
      target: what it was trained to predict, a name in `TARGETS` or a row function.

    Raises:
      ValueError: if the target is unknown.

    >>> import diffjax
    >>> schedule = diffjax.cosine()
    >>> zero = lambda x_t, log_snr, cond: 0 * x_t
    >>> denoise = denoiser(zero, schedule, "eps")
    >>> denoise(jnp.ones((1, 2)), 0.5).x_0  # x_t / alpha_t
    Array([[1.4142135, 1.4142135]], dtype=float32)
    """
    row(target)

    def denoise(x_t, t, cond=None):
        log_snr = jnp.broadcast_to(schedule.log_snr(t), x_t.shape[:1])
        out = network(x_t, log_snr, cond).astype(x_t.dtype)
        return decode(target, out, x_t, *scales_at(schedule, t, x_t))

    return denoise


def unit_output(network: Network, target: str | Row, schedule: Schedule) -> Network:
    """Scale a network's output by sqrt(a^2 + b^2), so that it need only produce numbers near one.

    A score spans 1 to 1800 over log-SNR in [-15, 15]; for it this is the division by sigma of Song
    & Ermon 2020, "Improved techniques for training score-based generative models", technique 3.
    Train and sample with the same wrapping.
    """

    def scaled(x_t, log_snr, cond):
        variance = unit_variance(target, *schedule.scales(log_snr))
        return expand(jnp.sqrt(variance), x_t) * network(x_t, log_snr, cond)

    return scaled


def clip_x_0(
    denoise: Denoiser, schedule: Schedule, low: float = -1.0, high: float = 1.0
) -> Denoiser:
    """Clip the estimate of x_0 to the range of the data, and let eps follow.

    Ho et al. 2020, as in their code ("clip_denoised"); static thresholding in Saharia et al. 2022.

    Args:
      denoise: a denoiser.
      schedule: its `Schedule`.
      low: the least value of the data.
      high: the greatest.

    Raises:
      ValueError: unless `low < high`.
    """
    if low >= high:
        raise ValueError(f"{low=} must be below {high=}")

    def clipped(x_t, t, cond=None):
        x_0 = jnp.clip(denoise(x_t, t, cond).x_0, low, high)
        return decode("x_0", x_0, x_t, *scales_at(schedule, t, x_t))

    return clipped


def classifier_free(denoise: Denoiser, weight: Time, null: Cond) -> Denoiser:
    """Classifier-free guidance: (1 - w) unconditional + w conditional.

    Args:
      denoise: a denoiser trained with and without its conditioning.
      weight: w, `[]` or `[batch]`; 0 is unconditional, 1 conditional, above 1 exaggerates the
        condition. (Ho & Salimans 2022, equation 6, with their w = this one - 1.)
      null: the conditioning that means "none", a pytree like `cond` whose leaves broadcast
        against cond's; None if the network takes None for it.

    Raises:
      ValueError: when called, if `cond` is not a pytree like `null`.
    """

    def guided(x_t, t, cond=None):
        nothing = null
        if null is not None:
            if jax.tree.structure(cond) != jax.tree.structure(null):
                raise ValueError(f"guidance needs a cond like its null {null!r}, got {cond!r}")
            nothing = jax.tree.map(lambda n, c: jnp.broadcast_to(n, jnp.shape(c)), null, cond)
        without, given = denoise(x_t, t, nothing), denoise(x_t, t, cond)
        w = expand(weight, x_t)
        return Prediction(*((1 - w) * u + w * c for u, c in zip(without, given, strict=True)))

    return guided
