"""A residual multilayer perceptron for vectors: (x_t, log_snr, cond) -> a vector."""

import dataclasses

import flax.linen as nn

from ..types import Array, Cond
from .layers import (
    Zero,
    also_embedded,
    check_embedding,
    check_options,
    class_index,
    noise_embedding,
    noise_level,
)


@dataclasses.dataclass(frozen=True)
class MLPConfig:
    """The MLP's options."""

    width: int = 128
    """Channels of each layer."""
    blocks: int = 3
    """Residual blocks."""
    embedding: str = "log_snr"
    """What embeds the noise level: log_snr, or angle, atan2(sigma, alpha), for flow maps."""
    two_times: bool = False
    """Embed `cond["log_snr_s"]` `[batch]` too, the log-SNR at which the step of a flow map ends; it
    needs embedding=angle."""
    guidance_weight: bool = False
    """Embed `cond["guidance"]` `[batch]` too, the weight of the guidance that a flow map learns."""
    dropout: float = 0.0
    """Probability of dropping an activation inside a block."""
    out_channels: int | None = None
    """Features of the output; None for as many as x_t has."""
    labels: int = 0
    """Number of classes of `cond["label"]`; 0 for no label."""
    null_label: bool = False
    """Add one class that means "no label", index `labels`, for classifier-free guidance."""

    def __post_init__(self) -> None:
        if min(self.width // 2, self.blocks) < 1:
            raise ValueError(f"width must be at least 2, other counts at least 1: {self}")
        check_embedding(self.embedding, self.two_times)
        check_options(self)

    def check_input(self, shape: tuple[int, ...]) -> None:
        """Raise a ValueError unless the network takes examples of this shape: vectors."""
        if len(shape) != 1:
            raise ValueError(f"examples of shape {shape}: an MLP needs vectors, [features]")


class MLP(nn.Module):
    """A residual MLP for two-dimensional toy data and other vectors, `[batch, features]`.

    Dropout is on if and only if `apply` is given a "dropout" key.

    >>> import jax, jax.numpy as jnp
    >>> x = jnp.zeros((4, 2))
    >>> params = MLP(MLPConfig()).init(jax.random.key(0), x, jnp.zeros(4), None)
    >>> MLP(MLPConfig()).apply(params, x, jnp.zeros(4), None).shape
    (4, 2)
    """

    config: MLPConfig

    @nn.compact
    def __call__(self, x_t: Array, log_snr: Array, cond: Cond) -> Array:
        c = self.config
        c.check_input(x_t.shape[1:])
        scaled = noise_level(c.embedding, 1.0)
        embed = lambda x: noise_embedding(scaled(x), c.width)
        h = nn.Dense(c.width)(x_t) + nn.Dense(c.width)(embed(log_snr))
        for name, value in also_embedded(c, embed, cond):
            h += nn.Dense(c.width, use_bias=False, kernel_init=Zero, name=name)(value)
        if c.labels:
            label = class_index(cond["label"], c.labels, c.null_label)
            h += nn.Embed(c.labels + c.null_label, c.width)(label)
        for _ in range(c.blocks):
            r = nn.silu(nn.Dense(c.width)(nn.silu(nn.LayerNorm()(h))))
            r = nn.Dropout(c.dropout, deterministic=not self.has_rng("dropout"))(r)
            h += nn.Dense(c.width)(r)
        features = c.out_channels or x_t.shape[-1]
        return nn.Dense(features, kernel_init=Zero)(nn.silu(h))
