"""Latents: what an autoencoder makes of images, and the numbers that a network is trained on.

An autoencoder's latent of an image is a normal distribution, mean + std eps. Data sets store its
moments, the channels of the mean before those of the standard deviation, and training draws the
latent anew in each step. Its channels are then shifted and scaled, so that they are near the
standard deviation that the network is made for:

    x = (z - mean) std / spread

The rows of `LATENTS` are the conventions of published networks. They share one autoencoder, and
differ in this scale and in the range of the images that it was given.
"""

from typing import NamedTuple

import jax.numpy as jnp

from . import keys
from .types import Array, Key


class Latents(NamedTuple):
    """A convention of latents.

    Attributes:
      mean: what is subtracted from each channel, or from all.
      spread: the standard deviation of each channel, or of all.
      std: the standard deviation that they are scaled to.
      low: the autoencoder takes, and gives, images in [low, 1].
    """

    mean: tuple[float, ...]
    spread: tuple[float, ...]
    std: float = 1.0
    low: float = -1.0


LATENTS: dict[str, Latents] = {
    # Rombach et al. 2022; DiT and SiT were trained on them.
    "sd": Latents((0.0,), (1 / 0.18215,)),
    # Karras et al. 2024 (EDM2): of images in [0, 1], each channel normalised by itself.
    "edm2": Latents((5.81, 3.25, 0.12, -2.15), (4.17, 4.62, 3.71, 3.28), std=0.5, low=0.0),
}
"""Conventions of Stable Diffusion's latents by name, as configs choose them."""


def draw(key: Key, moments: Array, latents: Latents) -> Array:
    """Draw latents, and scale them.

    Args:
      key: one key, or one for each example `[batch]`.
      moments: `[batch, height, width, 2 channels]`, means and then standard deviations.
      latents: the convention.

    Returns:
      `[batch, height, width, channels]`.
    """
    mean, std = jnp.split(moments, 2, axis=-1)
    return scaled(mean + std * keys.normal(key, mean.shape, mean.dtype), latents)


def scaled(z: Array, latents: Latents) -> Array:
    """The numbers that a network is trained on, of an autoencoder's latents `[..., channels]`."""
    mean, spread = (_of_channels(numbers, z) for numbers in latents[:2])
    return (z - mean) * (latents.std / spread)


def unscaled(x: Array, latents: Latents) -> Array:
    """The inverse of `scaled`.

    >>> x = jnp.ones((1, 2, 2, 4))
    >>> bool(jnp.allclose(scaled(unscaled(x, LATENTS["edm2"]), LATENTS["edm2"]), x))
    True
    """
    mean, spread = (_of_channels(numbers, x) for numbers in latents[:2])
    return x * (spread / latents.std) + mean


def _of_channels(numbers, like):
    return jnp.asarray(numbers, like.dtype).reshape(*[1] * (like.ndim - 1), -1)
