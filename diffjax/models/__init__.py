"""Flax Linen networks, and the one line that turns a module into a function diffjax can use.

The core takes any function `network(x_t, log_snr, cond)`; these are the ones that come with it.
`functools.partial(apply, module, params)` is such a function.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ..types import Array, Cond, Key
from .mlp import MLP, MLPConfig
from .song_unet import SongUNet, SongUNetConfig
from .unet import UNet, UNetConfig

MODELS = {UNetConfig: UNet, SongUNetConfig: SongUNet, MLPConfig: MLP}

__all__ = [
    "MLP",
    "MODELS",
    "MLPConfig",
    "SongUNet",
    "SongUNetConfig",
    "UNet",
    "UNetConfig",
    "apply",
]


def apply(
    module: nn.Module,
    params: Any,
    x_t: Array,
    log_snr: Array,
    cond: Cond = None,
    *,
    dropout: Key | None = None,
) -> Array:
    """The output of a Linen module; with `dropout` keys `[batch]`, in training mode.

    Dropout masks are drawn under `vmap`, each example from its own key, so that they do not
    depend on how the batch is split over devices.
    """
    if dropout is None:
        return jnp.asarray(module.apply({"params": params}, x_t, log_snr, cond))

    def one(x_t, log_snr, cond, key):
        x_t, log_snr, cond = jax.tree.map(lambda a: a[None], (x_t, log_snr, cond))
        return module.apply({"params": params}, x_t, log_snr, cond, rngs={"dropout": key})[0]

    return jax.vmap(one)(x_t, log_snr, cond, dropout)
