"""EDM2's magnitude-preserving U-Net: (x_t, log_snr, cond) -> an image of the same size.

Every layer keeps the root mean square of its activations near one in expectation. There are no
biases and no group normalisations: the filter of each output channel is normalised where it is
used, and activations, sums and concatenations are scaled by constants. The network depends on the
directions of its filters alone, so that training keeps their lengths at one (`normalised`).

Karras et al. 2024, "Analyzing and improving the training dynamics of diffusion models", whose
configuration G this is, written from its appendix B. `sizes.edm2_config` has the paper's.
As published it is trained with target F, unit_input and weighting edm, as EDM's networks are.
"""

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ..types import Array, Cond
from .layers import Zero, attention, check_levels, check_options, class_index, double, halve

Unit = nn.initializers.normal(1.0)

EPSILON = 1e-4  # added to each root mean square that divides
RESIDUAL = 0.3  # the part of a block's or an attention's branch in its sum
LARGEST = 256.0  # the activations between blocks are clipped to this


@dataclasses.dataclass(frozen=True)
class EDM2UNetConfig:
    """The options of EDM2's U-Net; the defaults are those of the size XS."""

    width: int = 128
    """Channels of the first level, and number of random frequencies that embed log-SNR."""
    mults: tuple[int, ...] = (1, 2, 3, 4)
    """Channels of each level, in units of `width`; each level halves the image."""
    blocks: int = 3
    """Residual blocks per level on the way down; one more on the way up."""
    attention: tuple[int, ...] = (16, 8)
    """Heights of the image at which blocks have self-attention. The first block in the middle
    always has it; blocks that halve or double the image never do."""
    head_width: int = 64
    """Channels per attention head."""
    dropout: float = 0.0
    """Probability of dropping an activation inside a block."""
    out_channels: int | None = None
    """Channels of the output; None for as many as x_t has."""
    labels: int = 0
    """Number of classes of `cond["label"]`; 0 for no label."""
    null_label: bool = False
    """Let the index `labels` mean "no label", for classifier-free guidance; it adds no weights."""
    remat: bool = False
    """Recompute blocks in the backward pass, which saves memory and costs time."""
    bfloat16: bool = False
    """Compute in bfloat16; parameters, root mean squares and softmax stay float32."""

    def __post_init__(self) -> None:
        numbers = (self.width, self.blocks, self.head_width, *self.mults)
        if not self.mults or min(numbers) < 1:
            raise ValueError(f"sizes and counts must be at least 1, mults not empty: {self}")
        check_options(self)
        for mult in self.mults:
            if self.width * mult % self.head_width:
                raise ValueError(
                    f"head_width={self.head_width}: must divide the channels of every level: "
                    f"width {self.width} x {mult} = {self.width * mult}"
                )

    def check_input(self, shape: tuple[int, ...]) -> None:
        """Raise a ValueError unless the network takes examples of this shape: images that halve."""
        check_levels(shape, len(self.mults), self.attention)


class EDM2UNet(nn.Module):
    """EDM2's U-Net. Dropout is on if and only if `apply` is given a "dropout" key.

    Call with x_t `[batch, height, width, channels]` of root mean square one (`unit_input`),
    log_snr `[batch]`, and a dict `cond` with `label` `[batch]` integers if the config has labels
    (None otherwise). Returns `[batch, height, width, out_channels]`, in float32 or wider.

    >>> model = EDM2UNet(EDM2UNetConfig(width=8, mults=(1, 2), head_width=8, attention=(4,)))
    >>> inputs = jnp.zeros((1, 8, 8, 3)), jnp.zeros(1), None
    >>> out, params = jax.eval_shape(model.init_with_output, jax.random.key(0), *inputs)
    >>> out.shape
    (1, 8, 8, 3)
    """

    config: EDM2UNetConfig

    @nn.compact
    def __call__(self, x_t: Array, log_snr: Array, cond: Cond) -> Array:
        c = self.config
        c.check_input(x_t.shape[1:])
        dtype = jnp.dtype(jnp.bfloat16 if c.bfloat16 else x_t.dtype)
        block = functools.partial(nn.remat(Block) if c.remat else Block, c)

        wide = c.width * max(c.mults)
        frequencies, phases = (
            # They are random and are not trained.
            jax.lax.stop_gradient(self.param(name, init, (c.width,)))
            for name, init in (("frequencies", frequency_init), ("phases", phase_init))
        )
        emb = fourier(-log_snr / 8, frequencies, phases)  # of log(sigma / alpha) / 4
        emb = Linear(wide, name="embed_noise")(emb)
        if c.labels:
            index = class_index(cond["label"], c.labels, c.null_label)
            one_hot = nn.one_hot(index, c.labels, dtype=emb.dtype)  # zeros for no label
            label = Linear(wide, name="embed_label")(math.sqrt(c.labels) * one_hot)
            emb = mix(emb, label, 0.5)
        emb = silu(emb).astype(dtype)

        # The channel of ones takes the place of biases.
        h = jnp.pad(x_t.astype(dtype), ((0, 0),) * 3 + ((0, 1),), constant_values=1)
        h = Linear(c.width * c.mults[0], side=3, name="conv_in")(h)
        skips = [h]
        for level, mult in enumerate(c.mults):
            if level != 0:
                h = block(h.shape[-1], normal=True, name=f"down_{level - 1}_half")(halve(h), emb)
                skips.append(h)
            for i in range(c.blocks):
                attend = h.shape[1] in c.attention
                name = f"down_{level}_{i}"
                h = block(c.width * mult, normal=True, attend=attend, name=name)(h, emb)
                skips.append(h)

        h = block(h.shape[-1], attend=True, name="middle_0")(h, emb)
        h = block(h.shape[-1], name="middle_1")(h, emb)

        for level, mult in reversed(list(enumerate(c.mults))):
            for i in range(c.blocks + 1):
                attend = h.shape[1] in c.attention
                h = join(h, skips.pop())
                h = block(c.width * mult, attend=attend, name=f"up_{level}_{i}")(h, emb)
            if level != 0:
                h = block(h.shape[-1], name=f"up_{level}_double")(double(h), emb)

        h = Linear(c.out_channels or x_t.shape[-1], side=3, name="conv_out")(h)
        return self.param("gain_out", Zero, ()) * h.astype(x_t.dtype)


class Block(nn.Module):
    """Two convolutions, between which the embedding scales channels, and a shortcut; attention.

    With `normal`, on the way down, each pixel is first normalised over its channels.
    """

    config: EDM2UNetConfig
    channels: int
    normal: bool = False
    attend: bool = False

    @nn.compact
    def __call__(self, x: Array, emb: Array) -> Array:
        c = self.config
        if x.shape[-1] != self.channels:
            shortcut = Linear(self.channels, name="shortcut")
        else:
            shortcut = lambda x: x
        if self.normal:
            x = normalise(shortcut(x), -1)

        h = Linear(self.channels, side=3, name="conv_0")(silu(x))
        gain = self.param("gain", Zero, ()).astype(h.dtype)
        scale = 1 + gain * Linear(self.channels, name="embed")(emb)
        h = silu(h * scale[:, None, None])
        h = nn.Dropout(c.dropout, deterministic=not self.has_rng("dropout"))(h)
        h = Linear(self.channels, side=3, name="conv_1")(h)
        h = mix(x if self.normal else shortcut(x), h, RESIDUAL)

        if self.attend:
            batch, height, width, channels = h.shape
            heads = (batch, height * width, channels // c.head_width, c.head_width)
            qkv = Linear(3 * channels, name="qkv")(h).reshape(*heads, 3)
            qkv = normalise(qkv, -2)
            mixed = attention(qkv[..., 0], qkv[..., 1], qkv[..., 2]).reshape(h.shape)
            h = mix(h, Linear(channels, name="out")(mixed), RESIDUAL)
        return jnp.clip(h, -LARGEST, LARGEST)


class Uncertainty(nn.Module):
    """The logarithm of a loss as a function of log-SNR, `[batch]` -> `[batch]` (equation 21).

    With u its value, training minimises exp(-u) loss + u, whose minimum over u is at the logarithm
    of the mean loss, so that every noise level then contributes equally.
    """

    @nn.compact
    def __call__(self, log_snr: Array) -> Array:
        frequencies, phases = (
            jax.lax.stop_gradient(self.param(name, init, (128,)))
            for name, init in (("frequencies", frequency_init), ("phases", phase_init))
        )
        return Linear(1, name="linear")(fourier(-log_snr / 8, frequencies, phases))[:, 0]


class Linear(nn.Module):
    """A linear map of channels, or of `side` x `side` pixels, whose filters have length one.

    Inputs of root mean square one, uncorrelated, give outputs of root mean square one.
    """

    features: int
    side: int | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        window = () if self.side is None else (self.side, self.side)
        shape = (*window, x.shape[-1], self.features)
        kernel = self.param("kernel", Unit, shape)
        kernel = (unit(kernel) / math.sqrt(math.prod(shape[:-1]))).astype(x.dtype)
        if self.side is None:
            return x @ kernel
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers)


def normalised(params: Any) -> Any:
    """The same parameters with every filter at root mean square one (the paper's section 2.3).

    The network depends on the directions of its filters alone. Left to itself, training makes them
    longer, which lowers the effective learning rate; so it normalises them after each step.
    Filters are the arrays of two axes or more: gains, frequencies and phases stay as they are.
    """
    return jax.tree.map(lambda p: unit(p) if p.ndim > 1 else p, params)


def unit(kernel: Array) -> Array:
    """A kernel with the filter of each output, its last axis, at root mean square one."""
    return normalise(kernel, range(kernel.ndim - 1))


def normalise(x: Array, axis: Any) -> Array:
    """x divided by its root mean square over these axes, which is computed in float32 or wider."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    square = jnp.mean(wide**2, axis=axis, keepdims=True)
    # The square root of zero has no gradient.
    rms = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
    return (wide / (EPSILON + rms)).astype(x.dtype)


def silu(x: Array) -> Array:
    """SiLU, scaled so that standard normal numbers keep their root mean square."""
    return nn.silu(x) / 0.596


def mix(a: Array, b: Array, part: float) -> Array:
    """(1 - part) a + part b, scaled to the root mean square of each (equation 88)."""
    return ((1 - part) * a + part * b) / math.hypot(1 - part, part)


def join(a: Array, b: Array) -> Array:
    """The channels of both, scaled so that each half contributes equally."""
    n, m = a.shape[-1], b.shape[-1]
    scale = math.sqrt((n + m) / 2)
    return jnp.concatenate([scale / math.sqrt(n) * a, scale / math.sqrt(m) * b], axis=-1)


def fourier(noise: Array, frequencies: Array, phases: Array) -> Array:
    """Random Fourier features of a noise level: `[batch]` -> `[batch, n]`."""
    return math.sqrt(2) * jnp.cos(noise[:, None] * frequencies[None] + phases[None])


def frequency_init(key, shape, dtype=jnp.float32):
    """Random angular frequencies."""
    return 2 * jnp.pi * jax.random.normal(key, shape, dtype)


def phase_init(key, shape, dtype=jnp.float32):
    """Random phases."""
    return 2 * jnp.pi * jax.random.uniform(key, shape, dtype)
