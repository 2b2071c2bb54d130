"""A reader of EDM's pickles (Karras et al. 2022); `edm2` reads those of EDM2.

`SongUNet` is DDPM++ or NCSN++; `DhariwalUNet` is EDM's version of ADM's network. A pickle holds the
network as objects, with the source of their classes. The source is not run: the arrays are
extracted, and their names and shapes determine the architecture.
"""

import math
import re
import reprlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..experiment import Config, Data, Sampling
from ..models import SongUNetConfig, UNetConfig
from . import edm2, torchfile
from .arrays import Names, convert

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


class Preconditioning(NamedTuple):
    """A preconditioning of EDM's, in terms of our config.

    Attributes:
      numbers: values that it must have.
      level: (scale, shift): the input c_noise of their network is scale times the input of ours,
        plus shift.
      config: fields of our config.
    """

    numbers: dict[str, float]
    level: tuple[float, float]
    config: dict[str, Any]


PRECONDITIONINGS = {
    # c_noise = log(sigma / alpha) / 4.
    "EDMPrecond": Preconditioning(
        {"sigma_data": 0.5},
        (-1 / 8, 0.0),
        dict(target="F", unit_input=True, schedule="log_uniform", weighting="edm"),
    ),
    # c_noise = 999 t; our network is given 1000 t - 1.
    "VPPrecond": Preconditioning(
        {"beta_min": 0.1, "beta_d": 19.9, "M": 1000},
        (0.999, 0.999),
        dict(target="eps", schedule="linear", time_steps=1000, time_input=True),
    ),
    # c_noise = log(sigma / 2), and the output is sigma times the score.
    "VEPrecond": Preconditioning(
        {},
        (-1 / 2, -math.log(2)),
        dict(
            target="score",
            unit_output=True,
            schedule="log_uniform",
            schedule_options={"sigma_min": 0.02, "sigma_max": 100.0},
        ),
    ),
}
"""Preconditionings by the names of their classes (Karras et al. 2022, table 1)."""
NETWORKS = {"DhariwalUNet": ("EDMPrecond",), "SongUNet": tuple(PRECONDITIONINGS)}
"""The preconditionings that each network may have."""


def load(path: Path) -> tuple[Any, Config]:
    """Read the parameters (the moving average) and the config of a pickle.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is damaged, or holds another network.
    """
    found = torchfile.read(path)
    net: Any = found.get("ema") if isinstance(found, dict) else None
    outer, parts = torchfile.class_name(net), torchfile.modules(net)
    if (outer, torchfile.class_name(parts.get("unet"))) == ("Precond", "UNet"):
        return edm2.load(path, found)
    inner = torchfile.class_name(parts.get("model"))
    if outer not in NETWORKS.get(inner, ()):
        known = ", ".join(f"{o} of {i}" for i, outers in NETWORKS.items() for o in outers)
        raise ValueError(f"{path} holds {outer} of {inner}, need {known}")
    for name, value in PRECONDITIONINGS[outer].numbers.items():
        has = torchfile.attributes(net).get(name, value)
        if has != value:
            raise ValueError(f"{path}: {outer} with {name}={reprlib.repr(has)}, need {value}")
    state = {name.removeprefix("model."): value for name, value in torchfile.arrays(net).items()}
    config = make_config(path, state, outer, inner)
    names = Names(modules(config), LAYERS, "hck", cos_first=inner == "DhariwalUNet")
    return convert(path, renamed(state, inner), config, names), config


def make_config(path: Path, state: dict[str, np.ndarray], outer: str, inner: str) -> Config:
    """Make our config from the names and shapes of a network's arrays.

    Args:
      path: the file, for messages.
      state: the arrays, by name.
      outer: the class of the preconditioning.
      inner: the class of the network.
    """
    blocks = [re.fullmatch(r"enc\.(\d+)x\d+_block(\d+)\.conv1\.weight", name) for name in state]
    shapes = {(int(m[1]), int(m[2])): state[m[0]].shape for m in blocks if m}
    sizes = sorted({size for size, _ in shapes}, reverse=True)
    first = state.get(f"enc.{sizes[0]}x{sizes[0]}_conv.weight") if sizes else None
    if first is None or (inner == "DhariwalUNet" and len(first) < 128):
        # In a narrower DhariwalUNet some normalisations have fewer groups than others.
        raise ValueError(f"{path}: need a SongUNet, or a DhariwalUNet of at least 128 channels")
    size, (width, channels) = sizes[0], first.shape[:2]
    around = PRECONDITIONINGS[outer]
    read: dict[str, Any] = dict(
        width=width,
        mults=tuple(shapes[size, 0][0] // width for size in sizes),
        blocks=sum(s == size for s, _ in shapes),
        attention=tuple(s for s in sizes if f"enc.{s}x{s}_block0.qkv.weight" in state),
        log_snr_scale=around.level[0],
        out_channels=channels,
        labels=state["map_label.weight"].shape[1] if "map_label.weight" in state else 0,
    )
    if inner == "SongUNet":
        filters = [value for name, value in state.items() if name.endswith("resample_filter")]
        model = SongUNetConfig(
            taps=tuple(filters[0].sum((0, 1, 2)).tolist()) if filters else (1.0, 1.0),
            fourier="map_noise.freqs" in state,
            residual_input=any("_aux_residual." in name for name in state),
            log_snr_shift=around.level[1],
            **read,
        )
    else:
        model = UNetConfig(
            head_width=64, epsilon=1e-5, scale_shift=True, resblock_updown=True, **read
        )
    return Config(
        data=Data("folder", size=size, shape=(size, size, channels)),
        model=model,
        sampling=Sampling("edm", times="karras", steps=40),
        **around.config,
    )


def renamed(state: dict[str, np.ndarray], inner: str) -> dict[str, np.ndarray]:
    """Keep the arrays that our network has, and name all of them as weights of a layer."""
    # In training, another input describes the augmentation of an image. It is 0 in sampling, and
    # its layer has no bias.
    unused = re.compile(r"^map_augment\.|resample_filter$")
    state = {name: value for name, value in state.items() if not unused.search(name)}
    if "map_noise.freqs" in state:
        state["map_noise.weight"] = state.pop("map_noise.freqs")
    if inner == "DhariwalUNet" and "map_label.weight" in state:
        state["map_label.weight"] = state["map_label.weight"].T  # ours is a table of rows
    return state


def modules(config: Config) -> dict[str, str]:
    """Map our names of modules to theirs, which contain the size of the image."""
    c: Any = config.model
    song, last, size = isinstance(c, SongUNetConfig), len(c.mults) - 1, config.data.size or 0
    at = [f"{size // 2**level}x{size // 2**level}" for level in range(last + 1)]
    names = {
        "": "map_noise",  # the frequencies belong to no module
        "embed_0": "map_layer0",
        "embed_1": "map_layer1",
        "label": "map_label",
        "conv_in": f"enc.{at[0]}_conv",
        "norm_out": f"dec.{at[0]}_aux_norm" if song else "out_norm",
        "conv_out": f"dec.{at[0]}_aux_conv" if song else "out_conv",
        "middle_0": f"dec.{at[last]}_in0",
        "middle_1": f"dec.{at[last]}_in1",
    }
    for level in range(last + 1):
        for i in range(c.blocks + 1):
            names[f"down_{level}_{i}"] = f"enc.{at[level]}_block{i}"
            names[f"up_{level}_{i}"] = f"dec.{at[level]}_block{i}"
        if level:
            names[f"down_{level - 1}_half"] = f"enc.{at[level]}_down"
            names[f"down_{level - 1}_image"] = f"enc.{at[level]}_aux_residual"
            names[f"up_{level}_double"] = f"dec.{at[level - 1]}_up"
    # Their attention is part of its block.
    return names | {f"{ours}/attention": theirs for ours, theirs in names.items()}
