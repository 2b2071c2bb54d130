"""Stable Diffusion's autoencoder: images to latents of an eighth of their side, and back.

The encoder gives the mean and the standard deviation of a normal distribution for each image. Both
halves are convolutional residual networks, without an embedding of noise, with one self-attention
in the middle (Rombach et al. 2022, "High-resolution image synthesis with latent diffusion models",
appendix G). It is not trained here: `published.autoencoder_kl` reads published weights.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from ..types import Array
from .layers import Attention, DoubleConv

EPSILON = 1e-6  # added to the variance in each group normalisation


@dataclasses.dataclass(frozen=True)
class AutoencoderKLConfig:
    """The options of the autoencoder; the defaults are Stable Diffusion's, of version 1 and 2."""

    widths: tuple[int, ...] = (128, 256, 512, 512)
    """Channels of each level; each halves the image."""
    blocks: int = 2
    """Residual blocks per level of the encoder; one more in the decoder."""
    groups: int = 32
    """Groups of each group normalisation."""
    channels: int = 3
    """Channels of images."""
    latent_channels: int = 4
    """Channels of latents."""
    quant: bool = True
    """Map the moments, and latents, by a 1x1 convolution. The autoencoders with 16 channels, of
    Stable Diffusion 3 and Flux, do not."""

    def __post_init__(self) -> None:
        numbers = (self.blocks, self.groups, self.channels, self.latent_channels, *self.widths)
        if not self.widths or min(numbers) < 1:
            raise ValueError(f"sizes and counts must be at least 1, widths not empty: {self}")
        for width in self.widths:
            if width % self.groups:
                raise ValueError(f"groups={self.groups}: must divide each of widths={self.widths}")

    @property
    def factor(self) -> int:
        """Side of the square of pixels that becomes one pixel of a latent."""
        return 2 ** (len(self.widths) - 1)


class Encoder(nn.Module):
    """Images `[batch, h, w, channels]` -> mean and log-variance `[batch, h/8, w/8, 2 x 4]`."""

    config: AutoencoderKLConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = self.config
        conv = functools.partial(nn.Conv, kernel_size=(3, 3))
        h = conv(c.widths[0], name="conv_in")(x)
        for level, width in enumerate(c.widths):
            for i in range(c.blocks):
                h = Block(c, width, name=f"down_{level}_{i}")(h)
            if level != len(c.widths) - 1:
                # An even image is padded below and right only.
                h = conv(width, strides=2, name=f"down_{level}_half")(h)
        h = conv(2 * c.latent_channels, name="conv_out")(ends(c, middle(c, h)))
        return nn.Dense(h.shape[-1], name="quant")(h) if c.quant else h


class Decoder(nn.Module):
    """Latents `[batch, h/8, w/8, 4]` -> images `[batch, h, w, channels]`."""

    config: AutoencoderKLConfig

    @nn.compact
    def __call__(self, z: Array) -> Array:
        c = self.config
        conv = functools.partial(nn.Conv, kernel_size=(3, 3))
        z = nn.Dense(c.latent_channels, name="quant")(z) if c.quant else z
        h = middle(c, conv(c.widths[-1], name="conv_in")(z))
        for level, width in reversed(list(enumerate(c.widths))):
            for i in range(c.blocks + 1):
                h = Block(c, width, name=f"up_{level}_{i}")(h)
            if level != 0:
                h = DoubleConv(width, h.dtype, name=f"up_{level}_double")(h)
        return conv(c.channels, name="conv_out")(ends(c, h))


class Block(nn.Module):
    """Two convolutions, added to a shortcut."""

    config: AutoencoderKLConfig
    channels: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        conv = functools.partial(nn.Conv, self.channels, (3, 3))
        norm = functools.partial(nn.GroupNorm, self.config.groups, epsilon=EPSILON)
        h = conv(name="conv_0")(nn.silu(norm(name="norm_0")(x)))
        h = conv(name="conv_1")(nn.silu(norm(name="norm_1")(h)))
        return h + (nn.Dense(self.channels, name="shortcut")(x) if x.shape != h.shape else x)


def middle(c: AutoencoderKLConfig, h: Array) -> Array:
    """A block, self-attention with one head, and a block, as a part of the calling module."""
    h = Block(c, c.widths[-1], name="middle_0")(h)
    h = Attention(1, c.groups, EPSILON, name="attention")(h)
    return Block(c, c.widths[-1], name="middle_1")(h)


def ends(c: AutoencoderKLConfig, h: Array) -> Array:
    """The last normalisation, as a part of the calling module."""
    return nn.silu(nn.GroupNorm(c.groups, epsilon=EPSILON, name="norm_out")(h))


def encode(config: AutoencoderKLConfig, params: Any, images: Array) -> Array:
    """The moments of images: `[batch, h, w, channels]` -> `[batch, h/8, w/8, 2 x 4]`.

    Args:
      config: the autoencoder's.
      params: its parameters.
      images: in the range that the autoencoder takes.

    Returns:
      Means, then standard deviations, the logarithms of whose squares are clipped to [-30, 20].

    Raises:
      ValueError: unless height and width are divisible by `config.factor`.
    """
    if images.shape[1] % config.factor or images.shape[2] % config.factor:
        raise ValueError(
            f"images of {images.shape[1]} x {images.shape[2]} pixels: the autoencoder needs a "
            f"height and width that {config.factor} divides"
        )
    found = jnp.asarray(Encoder(config).apply({"params": params["encoder"]}, images))
    mean, log_variance = jnp.split(found, 2, axis=-1)
    return jnp.concatenate([mean, jnp.exp(jnp.clip(log_variance, -30, 20) / 2)], axis=-1)


def decode(config: AutoencoderKLConfig, params: Any, z: Array) -> Array:
    """The images of latents: `[batch, h/8, w/8, 4]` -> `[batch, h, w, channels]`."""
    return jnp.asarray(Decoder(config).apply({"params": params["decoder"]}, z))
