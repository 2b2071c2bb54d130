"""EDM's networks (Karras et al. 2022), from their pickles: ADM's as they train it, `DhariwalUNet`.

A pickle holds the network as objects, with the source of their classes, which is not run: the
arrays are taken out, and the architecture is read off their names and shapes.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np

from ..config import Config, Data, Sampling, UNetConfig
from . import torchfile
from .arrays import Names, convert, unet

LAYERS = {
    "norm_0": "norm0",
    "conv_0": "conv0",
    "level": "affine",
    "norm_1": "norm1",
    "conv_1": "conv1",
    "shortcut": "skip",
    "norm": "norm2",
    "qkv": "qkv",
    "out": "proj",
}


def load(path: Path) -> tuple[Any, Config]:
    """The parameters (the moving average) and the config of a pickle.

    Raises:
      FileNotFoundError: if it is not there.
      ValueError: if it is damaged, or holds another network.
    """
    found = torchfile.read(path)
    net = found.get("ema") if isinstance(found, dict) else None
    kind, state = _class(net), _arrays(net)
    if kind != "EDMPrecond" or _class(_modules(net).get("model")) != "DhariwalUNet":
        inner = _class(_modules(net).get("model"))
        raise ValueError(f"{path} holds {kind} of {inner}, need EDMPrecond of DhariwalUNet")
    state = {name.removeprefix("model."): value for name, value in state.items()}
    ours = {name: value for name, value in state.items() if not _UNUSED.search(name)}
    if "map_label.weight" in ours:
        ours["map_label.weight"] = ours["map_label.weight"].T  # of one-hot vectors
    config = make_config(path, ours)
    size = config.data.size or 0
    return convert(path, ours, config, Names(modules(unet(config), size), LAYERS, "hck")), config


# They augment images while training, and say so by another input, which is 0 afterwards.
_UNUSED = re.compile(r"^map_augment\.|resample_filter$")


def make_config(path: Path, state: dict[str, np.ndarray]) -> Config:
    """What the names and shapes of the arrays of a `DhariwalUNet` say, as our config."""
    blocks = [re.fullmatch(r"enc\.(\d+)x\d+_block(\d+)\.conv1\.weight", name) for name in state]
    shapes = {(int(m[1]), int(m[2])): state[m[0]].shape for m in blocks if m}
    sizes = sorted({size for size, _ in shapes}, reverse=True)
    first = state.get(f"enc.{sizes[0]}x{sizes[0]}_conv.weight") if sizes else None
    if first is None or len(first) < 128:
        # Narrower networks have fewer groups in some normalisations than in others.
        raise ValueError(f"{path}: need a DhariwalUNet of at least 128 channels")
    width, channels = first.shape[:2]
    labels = state.get("map_label.weight", ())
    model = UNetConfig(
        width=width,
        mults=tuple(shapes[size, 0][0] // width for size in sizes),
        blocks=sum(size == sizes[0] for size, _ in shapes),
        attention=tuple(s for s in sizes if f"enc.{s}x{s}_block0.qkv.weight" in state),
        head_width=64,
        epsilon=1e-5,
        scale_shift=True,
        resblock_updown=True,
        level_scale=-1 / 8,  # their c_noise is log(sigma / alpha) / 4
        out_channels=channels,
        labels=len(labels),
    )
    size = sizes[0]
    return Config(
        data=Data("folder", size=size, shape=(size, size, channels)),
        target="F",
        unit_input=True,
        schedule="log_uniform",
        weighting="edm",
        model=model,
        sampling=Sampling("edm", times="karras", steps=40),
    )


def modules(c: UNetConfig, size: int) -> dict[str, str]:
    """Our modules' names to theirs, which are told apart by the size of the image."""
    last = len(c.mults) - 1
    at = [f"{size // 2**level}x{size // 2**level}" for level in range(last + 1)]
    names = {
        "embed_0": "map_layer0",
        "embed_1": "map_layer1",
        "label": "map_label",
        "conv_in": f"enc.{at[0]}_conv",
        "norm_out": "out_norm",
        "conv_out": "out_conv",
        "middle_0": f"dec.{at[last]}_in0",
        "middle_1": f"dec.{at[last]}_in1",
    }
    for level in range(last + 1):
        for i in range(c.blocks + 1):
            names[f"down_{level}_{i}"] = f"enc.{at[level]}_block{i}"
            names[f"up_{level}_{i}"] = f"dec.{at[level]}_block{i}"
        if level:
            names[f"down_{level - 1}_half"] = f"enc.{at[level]}_down"
            names[f"up_{level}_double"] = f"dec.{at[level - 1]}_up"
    # Their attention is part of its block.
    return names | {f"{ours}/attention": theirs for ours, theirs in names.items()}


def _state(net):
    """The attributes of a module: its own class keeps them where it kept its source."""
    if not isinstance(net, torchfile.Record):
        return {}
    meta = net.args[0] if net.args and isinstance(net.args[0], dict) else {}
    state = net.state or meta.get("state")
    return state if isinstance(state, dict) else {}


def _class(net):
    """The name of a module's class."""
    meta = net.args[0] if isinstance(net, torchfile.Record) and net.args else {}
    return meta.get("class_name") if isinstance(meta, dict) else type(net).__name__


def _modules(net):
    found = _state(net).get("_modules")
    return found if isinstance(found, dict) else {}


def _arrays(net, prefix=""):
    """The parameters and buffers of a module, by their names in its state dict."""
    state = _state(net)
    own = {**state.get("_parameters", {}), **state.get("_buffers", {})}
    found = {prefix + name: value for name, value in own.items() if isinstance(value, np.ndarray)}
    for name, module in _modules(net).items():
        found |= _arrays(module, f"{prefix}{name}.")
    return found
