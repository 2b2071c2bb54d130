"""What several networks share: attention, embeddings, changes of resolution, checks of options."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ..types import Array, Cond, known

Init = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")
Zero = nn.initializers.zeros_init()  # the last layer of every residual branch starts at zero

EMBEDDINGS = ("log_snr", "angle")
"""What embeds noise levels: scaled log-SNR, or the angle atan2(sigma, alpha), which is bounded."""
OF_MAPS = ("embed_s", "embed_w")
"""The layers that only the network of a flow map has, for its second time and its guidance."""
UNTRAINED = ("frequencies", "phases")
"""Parameters that are drawn once: random features, through which no gradient passes."""
ANGLE_SCALE = 5.0
"""Factor on the angle before it is embedded. Flow maps differentiate the embedding, and learn worse
if it is 1 or 25."""


def check_options(config: Any) -> None:
    """Raise a ValueError unless the options that all networks have are possible."""
    if config.out_channels is not None and config.out_channels < 1:
        raise ValueError(f"out_channels={config.out_channels}: must be at least 1, or None")
    if config.labels < 0 or (config.null_label and not config.labels):
        raise ValueError(
            f"labels={config.labels}: must be at least 0, and null_label=True needs labels, the "
            "number of classes"
        )
    if not 0 <= config.dropout < 1:
        raise ValueError(f"dropout={config.dropout}: must be in [0, 1)")
    for name in ("log_snr_scale", "log_snr_shift"):
        if not math.isfinite(value := getattr(config, name, 0.0)):
            raise ValueError(f"{name}={value}: must be finite")
    if not 0 < (value := getattr(config, "epsilon", 1e-6)) < math.inf:
        raise ValueError(f"epsilon={value}: must be positive and finite")


def check_embedding(embedding: str, two_times: bool) -> None:
    """Raise a ValueError unless a network can embed noise levels like this."""
    if embedding not in EMBEDDINGS:
        raise ValueError(f"embedding={embedding!r}: one of {', '.join(EMBEDDINGS)}")
    if two_times and embedding != "angle":
        raise ValueError(
            "two_times=True needs embedding=angle: flow maps differentiate the embedding of times, "
            "and training diverges on that of log-SNR"
        )


def check_levels(shape: tuple[int, ...], levels: int, attention: Sequence[int]) -> None:
    """Raise a ValueError unless examples are images of so many levels with these heights."""
    halvings = 2 ** (levels - 1)
    if len(shape) != 3 or shape[0] % halvings or shape[1] % halvings:
        raise ValueError(
            f"examples of shape {shape}: a network of {levels} levels needs [height, width, "
            f"channels] with height and width divisible by {halvings}; give `mults` fewer levels, "
            "or crop or pad the images"
        )
    heights = [shape[0] // 2**level for level in range(levels)]
    if not set(attention) <= set(heights):
        raise ValueError(f"attention={tuple(attention)}: the heights are {heights}")


def noise_level(embedding: str, scale: float) -> Callable[[Array], Array]:
    """log-SNR `[batch]` -> the numbers `[batch]` that are embedded (see `EMBEDDINGS`).

    Args:
      embedding: a name in `EMBEDDINGS`.
      scale: factor on log-SNR.
    """
    if embedding == "angle":
        return lambda log_snr: ANGLE_SCALE * jnp.atan(jnp.exp(-log_snr / 2))
    return lambda log_snr: scale * log_snr


def noise_embedding(noise: Array, width: int, period: float = 10000.0) -> Array:
    """Sinusoidal embedding of a noise level, such as scaled log-SNR: `[batch]` -> `[batch, width]`.

    Vaswani et al. 2017, section 3.5, as DDPM embeds its t = 0..999.
    """
    frequencies = jnp.exp(-jnp.log(period) * jnp.arange(width // 2, dtype=float) / (width // 2))
    angles = noise[:, None] * frequencies[None].astype(noise.dtype)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def also_embedded(
    config: Any, embed: Callable[[Array], Array], cond: Cond
) -> Iterator[tuple[str, Array]]:
    """What a flow map's network embeds beside log-SNR: names of layers, and their inputs.

    The layers start at zero, so that the parameters of a denoiser are those of a map.

    Args:
      config: of the network, with `two_times` and `guidance_weight`.
      embed: log-SNR `[batch]` -> its embedding.
      cond: the network's conditioning.
    """
    if config.two_times:
        yield "embed_s", embed(cond["log_snr_s"])
    if config.guidance_weight:
        yield "embed_w", embed(-2 * jnp.log(cond["guidance"]))  # the angle of tan(angle) = w


def class_index(label: Array, classes: int, null_label: bool) -> Array:
    """Labels `[batch]` to look up in a table: those below 0 point beyond its end, not into it.

    Args:
      label: integers in [0, classes), or `classes` for no label, if there is a null label.
      classes: number of classes.
      null_label: whether there is a null label.

    Raises:
      ValueError: if a label is concrete and has no row in the table. Traced ones cannot be checked:
        `flax.linen.Embed` turns those that have no row into NaN, which the output then is, and
        `SongUNet` and `EDM2UNet` take them for no label.
    """
    most = classes - (not null_label)
    if known(label):
        low, high = np.asarray(label).min(), np.asarray(label).max()
        if not 0 <= low <= high <= most:
            null = f", or {classes} for no label" if null_label else ""
            raise ValueError(
                f"labels from {low} to {high}: the network has classes 0 to {classes - 1}{null}"
            )
    return jnp.where(label < 0, most + 1, label)


def attention(query: Array, key: Array, value: Array, fused: bool = True) -> Array:
    """softmax(query key^T / sqrt(width)) value, each `[batch, tokens, heads, width]`.

    The softmax is in float32. In bfloat16 on a GPU it uses cuDNN's fused kernel, if there is one
    for this size; otherwise it uses two batched matrix products, which XLA computes faster than
    products with a separate axis of heads. The fused kernel has no forward derivative: the networks
    of flow maps do not use it (`fused=False`).
    """
    batch, tokens, heads, width = query.shape
    half_on_gpu = jax.default_backend() == "gpu" and query.dtype == jnp.bfloat16
    if fused and half_on_gpu and width in (32, 64, 128) and tokens % 64 == 0:
        return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")
    together = lambda x: x.swapaxes(1, 2).reshape(batch * heads, tokens, width)
    query, key, value = together(query), together(key), together(value)
    precise = jnp.promote_types(query.dtype, jnp.float32)
    logits = jnp.einsum("bqc,bkc->bqk", query, key, preferred_element_type=precise)
    weights = nn.softmax(logits / width**0.5).astype(value.dtype)
    out = jnp.einsum("bqk,bkc->bqc", weights, value)
    return out.reshape(batch, heads, tokens, width).swapaxes(1, 2)


class Attention(nn.Module):
    """Self-attention over the pixels, added to its input; the softmax is in float32."""

    heads: int
    groups: int
    epsilon: float
    dtype: jnp.dtype | None = None
    fused: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        batch, height, width, channels = x.shape
        h = nn.GroupNorm(self.groups, epsilon=self.epsilon, dtype=self.dtype, name="norm")(x)
        qkv = nn.Dense(3 * channels, kernel_init=Init, dtype=self.dtype, name="qkv")(h)
        qkv = qkv.reshape(batch, height * width, 3, self.heads, channels // self.heads)
        h = attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], self.fused)
        h = nn.Dense(channels, kernel_init=Zero, dtype=self.dtype, name="out")(h.reshape(x.shape))
        return x + h


class DoubleConv(nn.Module):
    """A 3x3 convolution of the doubled image, computed without doubling it.

    `[batch, height, width, any]` -> `[batch, 2 height, 2 width, channels]`.

    The nine pixels under the kernel are copies of only four pixels of the image, so each of the
    four outputs of a pixel is a 2x2 convolution, whose kernel sums the taps on the same pixel. This
    takes 4/9 of the operations, and the doubled image is not written to memory.
    """

    channels: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        b, h, w, c = x.shape
        kernel = self.param("kernel", Init, (3, 3, c, self.channels))
        bias = self.param("bias", Zero, (self.channels,))
        # [phase, tap of 2, tap of 3]: for an even row of the doubled image, the three taps are on
        # the row above once and on its own row twice; for an odd row, on its own row twice and on
        # the row below once.
        taps = jnp.array([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], kernel.dtype)
        kernels = jnp.einsum("apr,bqs,rsio->abpqio", taps, taps, kernel).astype(self.dtype)
        conv = functools.partial(
            jax.lax.conv_general_dilated,
            x.astype(self.dtype),
            window_strides=(1, 1),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        rows = [
            jnp.stack([conv(kernels[i, j], padding=((1 - i, i), (1 - j, j))) for j in (0, 1)], 3)
            for i in (0, 1)
        ]
        h = jnp.stack(rows, 2).reshape(b, 2 * h, 2 * w, self.channels)
        return h + bias.astype(self.dtype)[None, None, None]


def halve(x: Array) -> Array:
    """The mean of each 2x2 square of pixels."""
    return nn.avg_pool(x, (2, 2), strides=(2, 2))


def double(x: Array) -> Array:
    """Repeat each pixel as a 2x2 square."""
    b, h, w, c = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c))
    return x.reshape(b, 2 * h, 2 * w, c)


def fold(x: Array, side: int) -> Array:
    """Fold squares of s x s pixels into channels: `[b, h, w, c]` -> `[b, h/s, w/s, s s c]`."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // side, side, w // side, side, c).swapaxes(2, 3)
    return x.reshape(b, h // side, w // side, side * side * c)


def unfold(x: Array, side: int) -> Array:
    """The inverse of `fold`."""
    b, h, w, c = x.shape
    x = x.reshape(b, h, w, side, side, c // side**2).swapaxes(2, 3)
    return x.reshape(b, h * side, w * side, c // side**2)


def angles(rows: int, columns: int, width: int) -> np.ndarray:
    """Angles of each token's row, then of its column, `[rows columns, width / 2]`.

    Su et al. 2021, "RoFormer", in two dimensions.
    """
    frequencies = 10000.0 ** (-np.arange(width // 4) / (width // 4))
    row, column = np.divmod(np.arange(rows * columns), columns)
    return np.concatenate([at[:, None] * frequencies for at in (row, column)], axis=1)


def positions(rows: int, columns: int, width: int) -> np.ndarray:
    """Sines and cosines of each token's column, then of its row, `[rows columns, width]`."""
    row, column = np.split(angles(rows, columns, width), 2, axis=1)
    return np.concatenate([np.sin(column), np.cos(column), np.sin(row), np.cos(row)], axis=1)


def rotate(x: Array, turns: Array) -> Array:
    """Turn neighbouring channels of `[batch, tokens, heads, width]` as pairs, by these angles."""
    cos, sin = (f(turns)[None, :, None].astype(x.dtype) for f in (jnp.cos, jnp.sin))
    a, b = x[..., 0::2], x[..., 1::2]
    return jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(x.shape)
