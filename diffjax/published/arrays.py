"""Conversion of published state dicts to diffjax's parameters, by a table of names.

The U-Nets are variants of DDPM's, and the transformers are DiT's. They differ in the names of their
layers, in the order of the rows that make queries, keys and values, and in whether sines or cosines
come first.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors.numpy
from flax.traverse_util import unflatten_dict

from ..experiment import Config
from ..models import UNetConfig
from ..training.store import fetched
from . import torchfile, weights


class Names(NamedTuple):
    """The names and the order of arrays in a published state dict.

    Attributes:
      modules: their names of modules, by ours, such as `down_0_1/attention`; where the arrays of
        ours are stacked over blocks, one for each block, such as `blocks/0`; and their names of
        single arrays that have names of their own, such as `down_0_1/gain`.
      layers: their names of layers inside a block or an attention, by ours.
      order: order of their rows of queries, keys and values: k, which of the three; h, head;
        c, channel.
      cos_first: whether the cosines come first in their embedding of the noise level.
    """

    modules: dict[str, str]
    layers: dict[str, str]
    order: str = "khc"
    cos_first: bool = True


def convert(where: Path, state: dict[str, Any], config: Config, names: Names) -> Any:
    """Convert the published arrays of a diffusion network to our parameters.

    Args:
      where: the file, for messages.
      state: the published arrays, by their names.
      config: the config of our network.
      names: the names and the order of the published arrays.

    Raises:
      ValueError: as `matched` does.
    """
    weights.refuse_larger(config, len(state))
    c = config.model
    heads = c.heads_of if isinstance(c, UNetConfig) else lambda _: 1
    return matched(where, state, weights.expected(config), names, heads)


def matched(
    where: Path,
    state: dict[str, Any],
    expected: dict[str, Any],
    names: Names,
    heads: Callable[[int], int] = lambda _: 1,
) -> Any:
    """Convert published arrays to our parameters; every array must be used.

    Args:
      where: the file, for messages.
      state: the published arrays, by their names.
      expected: shapes and dtypes of our parameters, by their paths.
      names: the names and the order of the published arrays.
      heads: channels of an attention -> its heads, on which the order of the rows depends.

    Raises:
      ValueError: if an array is missing, left over or of another shape; the message lists the first
        few.
    """
    left, flat, wrong = dict(state), {}, []
    stacked = {path for path in expected if f"{path.partition('/')[0]}/0" in names.modules}
    for path, like in _apart(expected, stacked).items():
        module, _, leaf = path.rpartition("/")
        block, _, layer = module.rpartition("/")
        theirs = names.modules.get(path)
        if theirs is None:
            theirs = names.modules.get(module) or f"{names.modules[block]}.{names.layers[layer]}"
            theirs += ".bias" if leaf == "bias" else ".weight"
        value = left.pop(theirs, None)
        if not isinstance(value, np.ndarray) or value.size != like.size:
            wrong.append(f"{theirs} is missing, or not of {like.size:,} numbers")
            continue
        if layer == "qkv":
            value = _queries_first(value, heads(like.shape[-1] // 3), names.order)
        if leaf == "kernel":
            # Convolutions have (out, in, height, width), and matrices may be convolutions too: of
            # 1x1, or of the pixels of a patch, which ours folds in the order row, column, channel.
            value = np.moveaxis(value, (0, 1), (-1, -2))
            value = value.reshape(-1, *value.shape[1 + value.ndim - len(like.shape) :])
        if path == "embed_0/kernel" and names.cos_first:
            value = np.roll(value, len(value) // 2, 0)
        if value.shape != like.shape:
            wrong.append(f"{theirs} gives {value.shape}, need {like.shape}")
        flat[path] = np.asarray(value, like.dtype)
    wrong += [f"{theirs} is not an array of this network" for theirs in left]
    refuse_lines(f"{where} is not the network it is taken for", wrong)
    together = lambda path, like: np.stack([flat[block] for block in _blocks(path, like)])
    tree = {p: together(p, x) if p in stacked else flat[p] for p, x in expected.items()}
    return unflatten_dict(tree, sep="/")


def refuse_lines(what: str, lines: list[str]) -> None:
    """Raise a ValueError that says what is wrong, and the lines, if there are any."""
    if lines:
        raise ValueError(f"{what}:\n  " + "\n  ".join(lines))


def read(path: Path) -> dict[str, np.ndarray]:
    """Read the arrays of a network, by name, from a file of safetensors or of PyTorch.

    Nothing in the file is executed, and its architecture is not looked at.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is damaged, or holds no arrays.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    if path.suffix == ".safetensors":
        try:
            with fetched(path) as here:
                return safetensors.numpy.load_file(here)
        except Exception as error:  # untrusted input may raise anything
            raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    found = torchfile.arrays(torchfile.read(path))
    if not found:
        raise ValueError(f"{path} holds no arrays of a network")
    return found


def unet(config: Config) -> UNetConfig:
    """The network of a config for which it is a U-Net."""
    assert isinstance(config.model, UNetConfig)
    return config.model


def _blocks(path, like):
    """The paths of each block's part, such as `blocks/0/qkv/kernel`, of a stacked array."""
    stack, _, rest = path.partition("/")
    return [f"{stack}/{i}/{rest}" for i in range(like.shape[0])]


def _apart(expected, stacked):
    """The expected arrays, with those of each block in place of those stacked over blocks."""
    apart = {}
    for path, like in expected.items():
        one = jax.ShapeDtypeStruct(like.shape[1:], like.dtype)
        apart |= dict.fromkeys(_blocks(path, like), one) if path in stacked else {path: like}
    return apart


def _queries_first(rows, heads, order):
    """Put rows in our order: query, key or value; then head; then channel."""
    sizes = {"k": 3, "h": heads, "c": len(rows) // (3 * heads)}
    apart = rows.reshape(*(sizes[axis] for axis in order), *rows.shape[1:])
    return np.moveaxis(apart, [order.index(axis) for axis in "khc"], (0, 1, 2)).reshape(rows.shape)
