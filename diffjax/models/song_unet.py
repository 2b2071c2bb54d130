"""DDPM++ and NCSN++, the networks of Song et al. 2021 and of EDM.

They are DDPM's U-Net with two changes: residual blocks change the resolution, and every sum of two
branches is divided by sqrt(2), so that it does not grow with the depth. NCSN++ also resamples with
a smoother filter, embeds the noise level by random Fourier features, and adds the downsampled image
at every level on the way down ("residual" progressive input).

Song et al. 2021, "Score-based generative modeling through stochastic differential equations",
appendix H; Karras et al. 2022 (EDM) train and publish the variants in this module.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from ..types import Array, Cond
from .layers import (
    Attention,
    Init,
    Zero,
    check_levels,
    check_options,
    class_index,
    noise_embedding,
)

ROOT = math.sqrt(0.5)  # scales a sum of two branches, so that it is no larger than they are
EPSILON = 1e-6  # added to the variance in each group normalisation


@dataclasses.dataclass(frozen=True)
class SongUNetConfig:
    """The options of DDPM++ and NCSN++; the defaults are EDM's DDPM++ for CIFAR-10."""

    width: int = 128
    """Channels of the first level."""
    mults: tuple[int, ...] = (2, 2, 2)
    """Channels of each level, in units of `width`; each level halves the image."""
    blocks: int = 4
    """Residual blocks per level on the way down; one more on the way up."""
    attention: tuple[int, ...] = (16,)
    """Heights of the image at which blocks have self-attention with one head: all blocks on the way
    down, and the last block on the way up. The first block in the middle always has it."""
    dropout: float = 0.1
    """Probability of dropping an activation inside a block."""
    taps: tuple[float, ...] = (1.0, 1.0)
    """Filter that halves and doubles images, up to a factor; NCSN++ has (1, 3, 3, 1)."""
    fourier: bool = False
    """Embed log-SNR with `width` random frequencies (NCSN++)."""
    residual_input: bool = False
    """Add the image, halved by convolutions, to the activations of each smaller level (NCSN++)."""
    log_snr_scale: float = -1 / 8
    """The network embeds log_snr_scale * log_snr + log_snr_shift; EDM: log(sigma / alpha) / 4."""
    log_snr_shift: float = 0.0
    """See log_snr_scale."""
    out_channels: int | None = None
    """Channels of the output; None for as many as x_t has."""
    labels: int = 0
    """Number of classes of `cond["label"]`; 0 for no label."""
    null_label: bool = False
    """Let the index `labels` mean "no label", for classifier-free guidance; it adds no weights."""
    augment_dim: int = 0
    """Numbers of `cond["augment"]`, which say how an image was augmented; 0 for none."""
    remat: bool = False
    """Recompute blocks in the backward pass, which saves memory and costs time."""
    bfloat16: bool = False
    """Compute in bfloat16; parameters, normalisation statistics and softmax stay float32."""

    def __post_init__(self) -> None:
        if not self.mults or min(self.width, self.blocks, *self.mults) < 1:
            raise ValueError(f"sizes and counts must be at least 1, mults not empty: {self}")
        check_options(self)
        if self.width % 32:
            raise ValueError(f"width={self.width}: must be a multiple of 32, for the group norms")
        if len(self.taps) % 2 or self.taps != self.taps[::-1] or sum(self.taps) <= 0:
            raise ValueError(f"taps={self.taps}: need an even, symmetric list with a positive sum")

    def check_input(self, shape: tuple[int, ...]) -> None:
        """Raise a ValueError unless the network takes examples of this shape: images that halve."""
        check_levels(shape, len(self.mults), self.attention)


class SongUNet(nn.Module):
    """DDPM++ and NCSN++. Dropout is on if and only if `apply` is given a "dropout" key.

    Call with x_t `[batch, height, width, channels]`, log_snr `[batch]`, and a dict `cond` with
    `label` `[batch]` integers and `augment` `[batch, augment_dim]`, if the config has them. Returns
    `[batch, height, width, out_channels]`, in float32 or wider.

    >>> model = SongUNet(SongUNetConfig(width=32, mults=(1, 1), blocks=1, attention=(4,)))
    >>> inputs = jnp.zeros((1, 8, 8, 3)), jnp.zeros(1), None
    >>> out, params = jax.eval_shape(model.init_with_output, jax.random.key(0), *inputs)
    >>> out.shape
    (1, 8, 8, 3)
    """

    config: SongUNetConfig

    @nn.compact
    def __call__(self, x_t: Array, log_snr: Array, cond: Cond) -> Array:
        c = self.config
        c.check_input(x_t.shape[1:])
        dtype = jnp.dtype(jnp.bfloat16 if c.bfloat16 else x_t.dtype)
        conv = functools.partial(nn.Conv, kernel_size=(3, 3), kernel_init=Init, dtype=dtype)
        dense = functools.partial(nn.Dense, kernel_init=Init, dtype=dtype)
        block = functools.partial(nn.remat(Block) if c.remat else Block, c, dtype)

        noise = c.log_snr_scale * log_snr + c.log_snr_shift
        if c.fourier:
            # The frequencies are random and are not trained (Tancik et al. 2020).
            drawn = self.param("frequencies", nn.initializers.normal(16.0), (c.width,))
            angles = noise[:, None] * (2 * jnp.pi * jax.lax.stop_gradient(drawn))[None]
            emb = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
        else:
            # The last of the frequencies is exactly 1/10000.
            emb = noise_embedding(noise, c.width, 10000 ** (c.width / (c.width - 2)))
        emb = emb.astype(dtype)
        if c.labels:
            label = class_index(cond["label"], c.labels, c.null_label)
            one_hot = nn.one_hot(label, c.labels, dtype=dtype)  # zeros for no label
            emb += dense(emb.shape[-1], name="label")(math.sqrt(c.labels) * one_hot)
        if c.augment_dim:
            emb += dense(emb.shape[-1], use_bias=False, name="augment")(cond["augment"])
        emb = nn.silu(dense(4 * c.width, name="embed_0")(emb))
        emb = nn.silu(dense(4 * c.width, name="embed_1")(emb))

        image = x_t.astype(dtype)
        h = conv(c.width, name="conv_in")(image)
        skips = [h]
        for level, mult in enumerate(c.mults):
            if level != 0:
                h = block(h.shape[-1], resize=halve, name=f"down_{level - 1}_half")(h, emb)
                if c.residual_input:
                    image = conv(h.shape[-1], name=f"down_{level - 1}_image")(pad(image, c.taps))
                    h = image = (h + every_other(image, c.taps)) * ROOT
                skips.append(h)
            for i in range(c.blocks):
                attend = h.shape[1] in c.attention
                h = block(c.width * mult, attend=attend, name=f"down_{level}_{i}")(h, emb)
                skips.append(h)

        h = block(h.shape[-1], attend=True, name="middle_0")(h, emb)
        h = block(h.shape[-1], name="middle_1")(h, emb)

        for level, mult in reversed(list(enumerate(c.mults))):
            for i in range(c.blocks + 1):
                attend = i == c.blocks and h.shape[1] in c.attention
                h = jnp.concatenate([h, skips.pop()], axis=-1)
                h = block(c.width * mult, attend=attend, name=f"up_{level}_{i}")(h, emb)
            if level != 0:
                h = block(h.shape[-1], resize=double, name=f"up_{level}_double")(h, emb)

        norm = nn.GroupNorm(groups(h.shape[-1]), epsilon=EPSILON, dtype=dtype, name="norm_out")
        h = nn.silu(norm(h))
        channels = c.out_channels or x_t.shape[-1]
        return conv(channels, kernel_init=Zero, name="conv_out")(h).astype(x_t.dtype)


class Block(nn.Module):
    """Two convolutions with the embedded log-SNR between them, and a shortcut; then attention.

    `resize`, `halve` or `double`, acts on both branches.
    """

    config: SongUNetConfig
    dtype: jnp.dtype
    channels: int
    resize: Callable[[Array, Sequence[float]], Array] | None = None
    attend: bool = False

    @nn.compact
    def __call__(self, x: Array, emb: Array) -> Array:
        c = self.config
        dense = functools.partial(nn.Dense, self.channels, kernel_init=Init, dtype=self.dtype)
        conv = functools.partial(nn.Conv, self.channels, (3, 3), dtype=self.dtype)
        norm = functools.partial(nn.GroupNorm, epsilon=EPSILON, dtype=self.dtype)

        project = self.resize is not None or x.shape[-1] != self.channels
        h = nn.silu(norm(groups(x.shape[-1]), name="norm_0")(x))
        if self.resize is not None:
            h, x = self.resize(h, c.taps), self.resize(x, c.taps)
        h = conv(kernel_init=Init, name="conv_0")(h)
        h += dense(name="level")(emb)[:, None, None]
        h = nn.silu(norm(groups(self.channels), name="norm_1")(h))
        h = nn.Dropout(c.dropout, deterministic=not self.has_rng("dropout"))(h)
        h = conv(kernel_init=Zero, name="conv_1")(h)
        h = (h + (dense(name="shortcut")(x) if project else x)) * ROOT
        if not self.attend:
            return h
        return Attention(1, groups(self.channels), EPSILON, self.dtype, name="attention")(h) * ROOT


def groups(channels: int) -> int:
    """Groups of a normalisation: 32, or fewer, so that each has at least four channels."""
    return min(32, channels // 4)


def halve(x: Array, taps: Sequence[float]) -> Array:
    """Filter an image and keep every other pixel: `[b, h, w, c]` -> `[b, h/2, w/2, c]`.

    The image is padded with zeros. With taps (1, 1) this is the mean of each 2x2 square.
    """
    return every_other(pad(x, taps), taps)


def double(x: Array, taps: Sequence[float]) -> Array:
    """Insert zeros between the pixels and filter: `[b, h, w, c]` -> `[b, 2 h, 2 w, c]`.

    This is four times the transpose of `halve`. With taps (1, 1) it repeats each pixel as a 2x2
    square.
    """
    b, h, w, c = x.shape
    large = jax.ShapeDtypeStruct((b, 2 * h, 2 * w, c), x.dtype)
    return 4 * jax.linear_transpose(functools.partial(halve, taps=taps), large)(x)[0]


def pad(x: Array, taps: Sequence[float]) -> Array:
    """Pad an image with as many zeros as there are taps on each side of the middle two."""
    margin = len(taps) // 2 - 1
    return jnp.pad(x, ((0, 0), (margin, margin), (margin, margin), (0, 0)))


def every_other(x: Array, taps: Sequence[float]) -> Array:
    """Filter along both axes, where all taps are inside, and keep every other pixel."""
    # A sum of slices, because XLA's depthwise convolution takes seven times as long on a CPU.
    for axis in (1, 2):
        end = x.shape[axis] - len(taps) + 1
        parts = (
            tap / sum(taps) * jax.lax.slice_in_dim(x, k, k + end, 2, axis)
            for k, tap in enumerate(taps)
        )
        x = functools.reduce(jnp.add, parts)
    return x
