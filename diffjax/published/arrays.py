"""From others' state dicts to our parameters: one walk over our arrays, and a table of names.

All these U-Nets are DDPM's or its kin; they differ in what they call their layers, in the order of
the rows that make queries, keys and values, and in whether sines or cosines come first.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import unflatten_dict

from ..experiment import Config
from ..models import UNetConfig
from . import weights


class Names(NamedTuple):
    """How others name and order the arrays of our U-Net.

    Attributes:
      modules: our modules to theirs, as in `down_0_1/attention`.
      layers: our layers inside a block or an attention to theirs.
      order: of their rows of queries, keys and values: k, which of the three; h, head; c, channel.
      cos_first: whether their embedding of the noise level has its cosines first.
    """

    modules: dict[str, str]
    layers: dict[str, str]
    order: str = "khc"
    cos_first: bool = True


def convert(where: Path, state: dict[str, Any], config: Config, names: Names) -> Any:
    """Our parameters from their arrays, every one of which must have its place.

    Args:
      where: the file, for messages.
      state: their arrays, by their names.
      config: what our network is to be.
      names: how they name them.

    Raises:
      ValueError: if one is missing, left over or of another shape; lists the first of them.
    """
    left, flat, wrong = dict(state), {}, []
    for path, like in weights.expected(config).items():
        module, _, leaf = path.rpartition("/")
        block, _, layer = module.rpartition("/")
        theirs = names.modules.get(module) or f"{names.modules[block]}.{names.layers[layer]}"
        theirs += ".bias" if leaf == "bias" else ".weight"
        value = left.pop(theirs, None)
        if not isinstance(value, np.ndarray) or value.size != like.size:
            wrong.append(f"{theirs} is missing, or not of {like.size:,} numbers")
            continue
        if layer == "qkv":
            c, channels = config.model, like.shape[-1] // 3
            heads = c.heads_of(channels) if isinstance(c, UNetConfig) else 1
            value = _queries_first(value, heads, names.order)
        if leaf == "kernel":
            # Convolutions have (out, in, height, width); those that are but matrices may too.
            value = np.moveaxis(value, (0, 1), (-1, -2))
            value = value.reshape(value.shape[-len(like.shape) :])
        if path == "embed_0/kernel" and names.cos_first:
            value = np.roll(value, len(value) // 2, 0)
        if value.shape != like.shape:
            wrong.append(f"{theirs} gives {value.shape}, need {like.shape}")
        flat[path] = np.asarray(value, like.dtype)
    wrong += [f"{theirs} has no place" for theirs in left]
    if wrong:
        more = f"\n  and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        lines = "\n  ".join(wrong[:5])
        raise ValueError(f"{where} is not the network it is taken for:\n  {lines}{more}")
    return unflatten_dict(flat, sep="/")


def unet(config: Config) -> UNetConfig:
    """The config's network, where it is our U-Net."""
    assert isinstance(config.model, UNetConfig)
    return config.model


def _queries_first(rows, heads, order):
    """Rows in the order of which (query, key, value), head, channel, as ours are."""
    sizes = {"k": 3, "h": heads, "c": len(rows) // (3 * heads)}
    apart = rows.reshape(*(sizes[axis] for axis in order), *rows.shape[1:])
    return np.moveaxis(apart, [order.index(axis) for axis in "khc"], (0, 1, 2)).reshape(rows.shape)
