"""The diffusion transformer: (x_t, log_snr, cond) -> an image of the same size.

The image is cut into patches, and each becomes a token. A `Block` is self-attention and a
perceptron, each added to its input; the embedded log-SNR and label scale and shift what enters
them, and gate what leaves them (adaLN-zero: every gate starts at zero). The options span Peebles &
Xie 2023 (DiT), Ma et al. 2024 (SiT, the same network on a rectified flow), and Li & He 2025 (JiT,
which takes large patches of pixels); `sizes` has the papers'.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ..types import Array, Cond
from .layers import (
    Zero,
    also_embedded,
    angles,
    attention,
    check_embedding,
    check_options,
    class_index,
    fold,
    noise_embedding,
    noise_level,
    positions,
    rotate,
    unfold,
)

Xavier = nn.initializers.xavier_uniform()
Small = nn.initializers.normal(0.02)
EMBEDDED = 256  # sinusoids that embed the noise level

REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
"""What the backward pass recomputes: nothing, each block, or each block but its matrix products."""


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """The options of the transformer; the defaults are those of DiT-S/2."""

    width: int = 384
    """Channels of a token."""
    blocks: int = 12
    """Blocks of attention and perceptron."""
    heads: int = 6
    """Attention heads."""
    patch: int = 2
    """Side of the squares of pixels that become one token."""
    bottleneck: int | None = None
    """Channels to which a patch is first projected (JiT: 128); None: none."""
    rms_norm: bool = False
    """Normalise by the root mean square, with learned weights (JiT), in place of the mean and the
    deviation (DiT)."""
    qk_norm: bool = False
    """Normalise the queries and keys of each head."""
    rope: bool = False
    """Rotate queries and keys by their row and column, beside the positions added to tokens."""
    swiglu: bool = False
    """Use SwiGLU of 8/3 the width in the perceptron, in place of GELU of four times the width."""
    class_tokens: int = 0
    """Tokens of the label that are put in front of those of the image (JiT: 32)."""
    class_tokens_from: int = 4
    """Index of the first block that has the tokens of the label."""
    dropout: float = 0.0
    """Probability of dropping an activation where a branch is added."""
    flow_time: bool = False
    """Embed the time of a rectified flow, sigmoid(log_snr / 2) (SiT, JiT), not scaled log-SNR."""
    log_snr_scale: float = 25.0
    """Factor on log-SNR before it is embedded, unless `flow_time` is set."""
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
    remat: str = "none"
    """What to recompute in the backward pass, which saves memory and costs time: none, full (each
    block) or dots (each block but its matrix products)."""
    bfloat16: bool = False
    """Compute in bfloat16; parameters, normalisation statistics and softmax stay float32."""

    def __post_init__(self) -> None:
        bottleneck = 1 if self.bottleneck is None else self.bottleneck
        if min(self.width, self.blocks, self.heads, self.patch, bottleneck) < 1:
            raise ValueError(f"sizes and counts must be at least 1: {self}")
        if self.width % (4 * self.heads):
            raise ValueError(
                f"heads={self.heads}: width={self.width} must be a multiple of 4 x {self.heads}, "
                "because each head encodes rows and columns in pairs of channels"
            )
        check_options(self)
        have_place = self.labels and self.class_tokens_from in range(self.blocks)
        if self.class_tokens < 0 or (self.class_tokens and not have_place):
            raise ValueError(
                f"class_tokens={self.class_tokens} need labels, and class_tokens_from="
                f"{self.class_tokens_from} in 0..{self.blocks - 1}"
            )
        check_embedding(self.embedding, self.two_times)
        if self.flow_time and self.embedding != "log_snr":
            raise ValueError(f"flow_time=True: needs embedding=log_snr, not {self.embedding}")
        if self.remat not in REMAT:
            raise ValueError(f"remat={self.remat!r}: one of {', '.join(REMAT)}")

    def check_input(self, shape: tuple[int, ...]) -> None:
        """Raise a ValueError unless the network takes examples of this shape: images of patches."""
        if len(shape) != 3 or shape[0] % self.patch or shape[1] % self.patch:
            raise ValueError(
                f"examples of shape {shape}: a transformer of patch {self.patch} needs "
                f"[height, width, channels] with height and width divisible by {self.patch}"
            )


class DiT(nn.Module):
    """The transformer. Dropout is on if and only if `apply` is given a "dropout" key.

    Call with x_t `[batch, height, width, channels]`, log_snr `[batch]`, and a dict `cond` with
    `label` `[batch]` integers if the config has labels, and `log_snr_s` `[batch]` if it has two
    times (None if it has neither). Returns `[batch, height, width, out_channels]`, in float32 or
    wider.

    >>> model = DiT(DiTConfig(width=32, blocks=2, heads=2))
    >>> inputs = jnp.zeros((1, 8, 8, 3)), jnp.zeros(1), None
    >>> out, params = jax.eval_shape(model.init_with_output, jax.random.key(0), *inputs)
    >>> out.shape
    (1, 8, 8, 3)
    """

    config: DiTConfig

    @nn.compact
    def __call__(self, x_t: Array, log_snr: Array, cond: Cond) -> Array:
        c = self.config
        c.check_input(x_t.shape[1:])
        dtype = jnp.dtype(jnp.bfloat16 if c.bfloat16 else x_t.dtype)
        dense = functools.partial(nn.Dense, kernel_init=Xavier, dtype=dtype)

        scaled = noise_level(c.embedding, c.log_snr_scale)
        if c.flow_time:
            scaled = lambda log_snr: nn.sigmoid(log_snr / 2)
        embed = lambda log_snr: noise_embedding(scaled(log_snr), EMBEDDED).astype(dtype)
        emb = dense(c.width, kernel_init=Small, name="embed_0")(embed(log_snr))
        for name, value in also_embedded(c, embed, cond):
            emb += dense(c.width, use_bias=False, kernel_init=Zero, name=name)(value)
        emb = dense(c.width, kernel_init=Small, name="embed_1")(nn.silu(emb))
        of_label = jnp.zeros_like(emb)
        if c.labels:
            rows = c.labels + c.null_label
            label = nn.Embed(rows, c.width, embedding_init=Small, dtype=dtype, name="label")
            of_label = label(class_index(cond["label"], c.labels, c.null_label))
        emb += of_label

        h = fold(x_t.astype(dtype), c.patch)
        batch, rows, columns, _ = h.shape
        if c.bottleneck:
            h = dense(c.bottleneck, use_bias=False, name="bottleneck")(h)
        h = dense(c.width, name="patch")(h).reshape(batch, rows * columns, c.width)
        h += jnp.asarray(positions(rows, columns, c.width), dtype)[None]
        turns = jnp.asarray(angles(rows, columns, c.width // c.heads), x_t.dtype)

        if n := (c.class_tokens_from if c.class_tokens else c.blocks):
            h = stack(c, dtype, n, "blocks")(h, emb, turns)[0]
        if c.class_tokens:
            place = self.param("class_positions", Small, (c.class_tokens, c.width))
            first = of_label[:, None] + place.astype(dtype)[None]
            turns = jnp.pad(turns, ((c.class_tokens, 0), (0, 0)))  # they are not rotated
            h = jnp.concatenate([first, h], axis=1)
            h = stack(c, dtype, c.blocks - n, "blocks_with_class")(h, emb, turns)[0]
            h = h[:, c.class_tokens :]

        modulation = dense(2 * c.width, kernel_init=Zero, name="modulation_out")(nn.silu(emb))
        shift, scale = jnp.split(modulation[:, None], 2, axis=-1)
        h = norm(c, dtype, "norm_out")(h) * (1 + scale) + shift
        out = dense(c.patch**2 * (c.out_channels or x_t.shape[-1]), kernel_init=Zero, name="out")(h)
        return unfold(out.reshape(batch, rows, columns, -1), c.patch).astype(x_t.dtype)


class Block(nn.Module):
    """Attention, then a perceptron, each modulated and gated by the embedding."""

    config: DiTConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, emb: Array, turns: Array) -> tuple[Array, None]:
        c = self.config
        dense = functools.partial(nn.Dense, kernel_init=Xavier, dtype=self.dtype)
        drop = nn.Dropout(c.dropout, deterministic=not self.has_rng("dropout"))
        modulation = dense(6 * c.width, kernel_init=Zero, name="modulation")(nn.silu(emb))
        shift_0, scale_0, gate_0, shift_1, scale_1, gate_1 = jnp.split(modulation[:, None], 6, -1)

        h = norm(c, self.dtype, "norm_0")(x) * (1 + scale_0) + shift_0
        qkv = dense(3 * c.width, name="qkv")(h).reshape(*h.shape[:2], 3, c.heads, -1)
        query, key, value = (qkv[:, :, i] for i in range(3))
        if c.qk_norm:
            query = nn.RMSNorm(epsilon=1e-6, dtype=self.dtype, name="norm_q")(query)
            key = nn.RMSNorm(epsilon=1e-6, dtype=self.dtype, name="norm_k")(key)
        if c.rope:
            query, key = rotate(query, turns), rotate(key, turns)
        h = attention(query, key, value, not c.two_times).reshape(x.shape)
        x += gate_0 * drop(dense(c.width, name="attention_out")(h))

        h = norm(c, self.dtype, "norm_1")(x) * (1 + scale_1) + shift_1
        if c.swiglu:
            gate, h = jnp.split(dense(2 * (8 * c.width // 3), name="mlp_0")(h), 2, axis=-1)
            h = nn.silu(gate) * h
        else:
            h = nn.gelu(dense(4 * c.width, name="mlp_0")(h))
        return x + gate_1 * drop(dense(c.width, name="mlp_1")(h)), None


def stack(config: DiTConfig, dtype: jnp.dtype, length: int, name: str) -> nn.Module:
    """One scanned block, whose time to compile does not depend on the number of blocks.

    It takes tokens, the embedding and turns, and returns (tokens, None).
    """
    policy = REMAT[config.remat]
    block = nn.remat(Block, policy=policy, prevent_cse=False) if policy else Block
    scan: Any = nn.scan  # whose annotation does not have nn.broadcast
    scanned = scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=nn.broadcast,
        length=length,
    )
    return scanned(config, dtype, name=name)


def norm(config: DiTConfig, dtype: jnp.dtype, name: str) -> nn.Module:
    """The normalisation of tokens. Only that by the root mean square has parameters."""
    if config.rms_norm:
        return nn.RMSNorm(epsilon=1e-6, dtype=dtype, name=name)
    return nn.LayerNorm(epsilon=1e-6, use_bias=False, use_scale=False, dtype=dtype, name=name)
