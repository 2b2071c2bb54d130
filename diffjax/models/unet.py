"""The U-Net of DDPM and its descendants: (x_t, log_snr, cond) -> an image of the same size.

A `Block` is two 3x3 convolutions with the embedded log-SNR added between them. A level is a few
blocks at one resolution, with self-attention where the image is small enough; the way down keeps
every activation, and the way up concatenates them. The options span Ho et al. 2020 (DDPM), Nichol &
Dhariwal 2021 (improved DDPM), Dhariwal & Nichol 2021 (ADM) and Kingma et al. 2021 (VDM, which has
one level and never changes the resolution).
"""

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from ..types import Array, Cond
from .layers import (
    Attention,
    DoubleConv,
    Init,
    Zero,
    also_embedded,
    check_embedding,
    check_options,
    class_index,
    double,
    fold,
    halve,
    noise_embedding,
    noise_level,
    unfold,
)


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """The options of the U-Net; the defaults are DDPM's network for CIFAR-10."""

    width: int = 128
    """Channels of the first level."""
    mults: tuple[int, ...] = (1, 2, 2, 2)
    """Channels of each level, in units of `width`; each level halves the image."""
    blocks: int = 2
    """Residual blocks per level on the way down; one more on the way up."""
    patch: int = 1
    """Fold squares of this many pixels per side into channels first, which is cheaper."""
    attention: tuple[int, ...] = (16,)
    """Heights of the (folded) image at which blocks are followed by self-attention."""
    heads: int = 1
    """Attention heads."""
    head_width: int | None = None
    """Channels per attention head, instead of a fixed number of heads (ADM: 64)."""
    groups: int = 32
    """Groups of each group normalisation."""
    epsilon: float = 1e-6
    """Constant added to the variance in each group normalisation."""
    dropout: float = 0.1
    """Probability of dropping an activation inside a block."""
    scale_shift: bool = False
    """Let the embedded log-SNR scale and shift activations (ADM), not only shift them (DDPM)."""
    noise_from_zero: bool = False
    """Start the effect of the embedded log-SNR on each block at zero, and without a bias (VDM)."""
    residual: bool = False
    """Add the first channels of x_t to the output, as many as it has (VDM)."""
    resblock_updown: bool = False
    """Change resolution inside a residual block (ADM), not by a convolution (DDPM)."""
    pad_both: bool = False
    """Pad convolutions that halve on all sides (improved DDPM), not only below and right (DDPM)."""
    log_snr_scale: float = 25.0
    """Factor on log-SNR before it is embedded: [-20, 20] becomes the 1000 units of DDPM's time."""
    log_snr_shift: float = 0.0
    """The network embeds log_snr_scale * log_snr + log_snr_shift."""
    embedding_period: float = 10000.0
    """The sinusoids that embed log-SNR have frequencies from 1 down to just above 1 / this."""
    embedding: str = "log_snr"
    """What embeds the noise level: log_snr, or angle, atan2(sigma, alpha), for flow maps."""
    two_times: bool = False
    """Embed `cond["log_snr_s"]` `[batch]` too, the log-SNR at which the step of a flow map ends; it
    needs embedding=angle."""
    guidance_weight: bool = False
    """Embed `cond["guidance"]` `[batch]` too, the weight of the guidance that a flow map learns."""
    out_channels: int | None = None
    """Channels of the output; None for as many as x_t has."""
    labels: int = 0
    """Number of classes of `cond["label"]`; 0 for no label."""
    null_label: bool = False
    """Add one class that means "no label", index `labels`, for classifier-free guidance."""
    augment_dim: int = 0
    """Numbers of `cond["augment"]`, which say how an image was augmented; 0 for none."""
    image_cond: bool = False
    """Concatenate `cond["image"]`, enlarged to the height and width of x_t, to the input."""
    embed_image_log_snr: bool = True
    """With image_cond, also embed `cond["image_log_snr"]` `[batch]`, the image's own log-SNR.
    OpenAI's upsamplers do not."""
    remat: bool = False
    """Recompute blocks in the backward pass, which saves memory and costs time."""
    bfloat16: bool = False
    """Compute in bfloat16; parameters, normalisation statistics and softmax stay float32."""

    def __post_init__(self) -> None:
        numbers = (self.width, self.blocks, self.patch, self.heads, self.groups, *self.mults)
        if not self.mults or min(numbers) < 1 or (self.head_width or 1) < 1:
            raise ValueError(f"sizes and counts must be at least 1, mults not empty: {self}")
        check_options(self)
        check_embedding(self.embedding, self.two_times)
        for mult in self.mults:
            channels = self.width * mult
            if channels % self.groups:
                raise ValueError(
                    f"groups={self.groups} must divide the channels of every level: "
                    f"width {self.width} x {mult} = {channels}"
                )
            if channels % (self.head_width or self.heads):
                raise ValueError(
                    f"heads={self.heads} or head_width={self.head_width} must divide the channels "
                    f"of every level: width {self.width} x {mult} = {channels}"
                )

    def heads_of(self, channels: int) -> int:
        """Number of heads of an attention over this many channels."""
        return channels // self.head_width if self.head_width else self.heads

    def check_input(self, shape: tuple[int, ...]) -> None:
        """Raise a ValueError unless such examples fit, and have each height of attention."""
        self.check_size(shape)
        heights = [shape[0] // self.patch // 2**level for level in range(len(self.mults))]
        if not set(self.attention) <= set(heights):
            raise ValueError(f"attention={self.attention}: the heights are {heights}")
        if self.residual and (self.out_channels or 0) > shape[-1]:
            raise ValueError(
                f"residual=True: x_t has {shape[-1]} channels, fewer than the output, "
                f"out_channels={self.out_channels}"
            )

    def check_size(self, shape: tuple[int, ...]) -> None:
        """Raise a ValueError unless the network takes examples of this shape: images that halve."""
        halvings = self.patch * 2 ** (len(self.mults) - 1)
        if len(shape) != 3 or shape[0] % halvings or shape[1] % halvings:
            raise ValueError(
                f"examples of shape {shape}: a U-Net of {len(self.mults)} levels and patch "
                f"{self.patch} needs [height, width, channels] with height and width divisible by "
                f"{halvings}; give `mults` fewer levels, or crop or pad the images"
            )


class UNet(nn.Module):
    """The U-Net. Dropout is on if and only if `apply` is given a "dropout" key.

    Call with x_t `[batch, height, width, channels]`, log_snr `[batch]`, and a dict `cond` with
    `label` `[batch]` integers, `augment` `[batch, augment_dim]`, `image`
    `[batch, any, any, any]` with `image_log_snr` `[batch]`, and `log_snr_s` `[batch]`, as the
    config requires (None if it requires none of them). Returns
    `[batch, height, width, out_channels]`, in float32 or wider.

    >>> model = UNet(UNetConfig(width=8, mults=(1, 2), groups=4, attention=(4,)))
    >>> inputs = jnp.zeros((1, 8, 8, 3)), jnp.zeros(1), None
    >>> out, params = jax.eval_shape(model.init_with_output, jax.random.key(0), *inputs)
    >>> out.shape
    (1, 8, 8, 3)
    """

    config: UNetConfig

    @nn.compact
    def __call__(self, x_t: Array, log_snr: Array, cond: Cond) -> Array:
        c = self.config
        c.check_size(x_t.shape[1:])
        dtype = jnp.dtype(jnp.bfloat16 if c.bfloat16 else x_t.dtype)
        conv = functools.partial(nn.Conv, kernel_size=(3, 3), kernel_init=Init, dtype=dtype)
        block = functools.partial(nn.remat(Block) if c.remat else Block, c, dtype)

        scaled = noise_level(c.embedding, c.log_snr_scale)
        embed = lambda x: noise_embedding(scaled(x) + c.log_snr_shift, c.width, c.embedding_period)
        emb = embed(log_snr)
        if c.image_cond and c.embed_image_log_snr:
            emb = jnp.concatenate([emb, embed(cond["image_log_snr"])], axis=-1)
        emb = emb.astype(dtype)
        emb = nn.Dense(4 * c.width, kernel_init=Init, dtype=dtype, name="embed_0")(emb)
        for name, value in also_embedded(c, embed, cond):
            emb += nn.Dense(4 * c.width, use_bias=False, kernel_init=Zero, dtype=dtype, name=name)(
                value.astype(dtype)
            )
        emb = nn.Dense(4 * c.width, kernel_init=Init, dtype=dtype, name="embed_1")(nn.silu(emb))
        if c.labels:
            rows = c.labels + c.null_label
            label = class_index(cond["label"], c.labels, c.null_label)
            emb += nn.Embed(rows, 4 * c.width, dtype=dtype, name="label")(label)
        if c.augment_dim:
            # Without a bias, so that what was not augmented adds nothing.
            told = nn.Dense(4 * c.width, use_bias=False, dtype=dtype, name="augment")
            emb += told(cond["augment"])

        x = x_t.astype(dtype)
        if c.image_cond:
            image = cond["image"].astype(dtype)
            image = jax.image.resize(image, (*x.shape[:3], image.shape[-1]), "cubic")
            x = jnp.concatenate([x, image], axis=-1)
        h = conv(c.width, name="conv_in")(fold(x, c.patch))
        skips = [h]
        last = len(c.mults) - 1
        for level, mult in enumerate(c.mults):
            for i in range(c.blocks):
                h = block(c.width * mult, name=f"down_{level}_{i}")(h, emb)
                skips.append(h)
            if level != last:
                name = f"down_{level}_half"
                if c.resblock_updown:
                    h = block(c.width * mult, resize=halve, name=name)(h, emb)
                else:
                    padding = 1 if c.pad_both else "SAME"
                    h = conv(c.width * mult, strides=2, padding=padding, name=name)(h)
                skips.append(h)

        h = block(c.width * c.mults[-1], attend=True, name="middle_0")(h, emb)
        h = block(c.width * c.mults[-1], attend=False, name="middle_1")(h, emb)

        for level, mult in reversed(list(enumerate(c.mults))):
            for i in range(c.blocks + 1):
                h = jnp.concatenate([h, skips.pop()], axis=-1)
                h = block(c.width * mult, name=f"up_{level}_{i}")(h, emb)
            if level != 0:
                name = f"up_{level}_double"
                if c.resblock_updown:
                    h = block(c.width * mult, resize=double, name=name)(h, emb)
                else:
                    h = DoubleConv(c.width * mult, dtype, name=name)(h)

        h = nn.silu(nn.GroupNorm(c.groups, epsilon=c.epsilon, dtype=dtype, name="norm_out")(h))
        channels = c.patch**2 * (c.out_channels or x_t.shape[-1])
        h = conv(channels, kernel_init=Zero, name="conv_out")(h)
        out = unfold(h, c.patch).astype(x_t.dtype)
        return out + x_t[..., : out.shape[-1]] if c.residual else out


class Block(nn.Module):
    """Two convolutions with the embedded log-SNR between them, added to a shortcut; then attention.

    `resize` halves or doubles the image on both branches (ADM's resampling blocks). By default,
    there is attention if the image's height is one of the config's `attention`, and never in a
    resampling block.
    """

    config: UNetConfig
    dtype: jnp.dtype
    channels: int
    resize: Callable[[Array], Array] | None = None
    attend: bool | None = None

    @nn.compact
    def __call__(self, x: Array, emb: Array) -> Array:
        c = self.config
        dense = functools.partial(nn.Dense, kernel_init=Init, dtype=self.dtype)
        conv = functools.partial(nn.Conv, self.channels, (3, 3), dtype=self.dtype)
        norm = functools.partial(nn.GroupNorm, c.groups, epsilon=c.epsilon, dtype=self.dtype)

        h = nn.silu(norm(name="norm_0")(x))
        if self.resize is not None:
            h, x = self.resize(h), self.resize(x)
        h = conv(kernel_init=Init, name="conv_0")(h)
        # The parameters are named "level" in all existing checkpoints, so the name stays.
        plain = {"kernel_init": Zero, "use_bias": False} if c.noise_from_zero else {}
        noise = dense(self.channels * (1 + c.scale_shift), name="level", **plain)(nn.silu(emb))
        noise = noise[:, None, None]
        if c.scale_shift:
            scale, shift = jnp.split(noise, 2, axis=-1)
            h = norm(name="norm_1")(h) * (1 + scale) + shift
        else:
            h = norm(name="norm_1")(h + noise)
        h = nn.Dropout(c.dropout, deterministic=not self.has_rng("dropout"))(nn.silu(h))
        h = conv(kernel_init=Zero, name="conv_1")(h)
        if x.shape[-1] != self.channels:
            x = dense(self.channels, name="shortcut")(x)
        h = x + h

        attend = self.attend
        if attend is None:
            attend = self.resize is None and h.shape[1] in c.attention
        if not attend:
            return h
        heads = c.heads_of(self.channels)
        attention = Attention(
            heads, c.groups, c.epsilon, self.dtype, fused=not c.two_times, name="attention"
        )
        return attention(h)
