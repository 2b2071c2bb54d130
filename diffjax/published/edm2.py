"""A reader of EDM2's pickles (Karras et al. 2024), those of 64 x 64 pixels and those of latents.

They are pickles as EDM's are: the arrays are extracted, and no code in a file is run. The names
and shapes of the arrays determine the architecture, except the channels of an attention head,
which are 64 in every published network. The encoder that a pickle names says whether the network
makes images or latents.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np

from ..experiment import Config, Data, Sampling
from ..models import EDM2UNetConfig
from . import torchfile
from .arrays import Names, convert

LAYERS = {
    "conv_0": "conv_res0",
    "embed": "emb_linear",
    "conv_1": "conv_res1",
    "shortcut": "conv_skip",
    "qkv": "attn_qkv",
    "out": "attn_proj",
}
ENCODERS = {"StandardRGBEncoder": None, "StabilityVAEEncoder": "edm2"}
"""Whose latents a network makes, by the class of its encoder; None for images."""
DENSITIES = {None: (-0.8, 1.6), "edm2": (-0.4, 1.0)}
"""Mean and standard deviation of ln sigma in training, for images of 64 x 64 and for latents."""
SIGMA_DATA = 0.5
ATTENTION = "unet.enc.{0}x{0}_block0.attn_qkv.weight"
LABEL = "unet.emb_label.weight"
UNUSED = re.compile(r"^logvar_")
"""Arrays of the uncertainty, which only training needs."""


def load(path: Path, found: dict[str, Any]) -> tuple[Any, Config]:
    """Convert the parameters (the average) of what `torchfile.read` found, and make the config.

    Raises:
      ValueError: if it holds another network; the message names the file.
    """
    net = found["ema"]
    sigma_data = torchfile.attributes(net).get("sigma_data", SIGMA_DATA)
    if sigma_data != SIGMA_DATA:
        raise ValueError(f"{path}: Precond with sigma_data={sigma_data!r:.50}, need {SIGMA_DATA}")
    arrays = torchfile.arrays(net)
    state = {name: value for name, value in arrays.items() if not UNUSED.search(name)}
    config = make_config(path, state, latents(path, found, state))
    return convert(path, state, config, Names(modules(config), LAYERS)), config


def latents(path: Path, found: dict[str, Any], state: dict[str, np.ndarray]) -> str | None:
    """The name in `latents.LATENTS` of what the network makes; None for images.

    Raises:
      ValueError: if the file's encoder is none that is known.
    """
    if found.get("encoder") is None:  # files that have none, such as snapshots, are told by this
        return "edm2" if state.get("unet.out_conv.weight", np.zeros(0)).shape[0] == 4 else None
    name = torchfile.class_name(found["encoder"])
    if name not in ENCODERS:
        raise ValueError(f"{path}: its encoder is {name}, need one of {', '.join(ENCODERS)}")
    return ENCODERS[name]


def make_config(path: Path, state: dict[str, np.ndarray], kind: str | None) -> Config:
    """Make our config from the names and shapes of a network's arrays.

    Args:
      path: the file, for messages.
      state: the arrays, by name.
      kind: a name in `latents.LATENTS`, or None for images.

    Raises:
      ValueError: if an array that says how large the network is is missing.
    """
    blocks = re.compile(r"unet\.enc\.(\d{1,4})x\1_block(\d{1,3})\.conv_res1\.weight")
    matches = [m for m in map(blocks.fullmatch, state) if m]
    shapes = {(int(m[1]), int(m[2])): state[m[0]].shape for m in matches}
    sizes = sorted({size for size, _ in shapes}, reverse=True)
    needed = [f"unet.enc.{sizes[0]}x{sizes[0]}_conv.weight"] if sizes else []
    needed += ["unet.emb_noise.weight", "unet.out_conv.weight"]
    missing = [name for name in needed if np.ndim(state.get(name, 0)) < 2]
    if not sizes or missing:
        what = ", ".join(missing) or "unet.enc"
        raise ValueError(f"{path}: need EDM2's UNet, of which {what} is missing")
    size, first = sizes[0], state[needed[0]].shape
    width, channels = state["unet.emb_noise.weight"].shape[1], first[1] - 1
    widths = [shapes.get((size, 0), (0,))[0] for size in sizes]
    if any(w % width for w in widths):
        raise ValueError(f"{path}: levels of {widths} channels, need multiples of {width}")
    mean, std = DENSITIES[kind]
    return Config(
        data=Data("npz", shape=(size, size, channels), latents=kind),
        model=EDM2UNetConfig(
            width=width,
            mults=tuple(w // width for w in widths),
            blocks=1 + max(block for _, block in shapes),
            attention=tuple(s for s in sizes if ATTENTION.format(s) in state),
            labels=state[LABEL].shape[1] if LABEL in state else 0,
        ),
        target="F",
        unit_input=True,
        schedule="log_uniform",
        weighting="preconditioned",
        density="normal",
        density_options={"mean": -2 * mean, "std": 2 * std},
        density_weights=False,
        sampling=Sampling("edm", times="karras", steps=32),
    )


def modules(config: Config) -> dict[str, str]:
    """Map our names of modules, and of arrays that belong to none, to theirs."""
    c: Any = config.model
    assert config.data.shape is not None
    last, size = len(c.mults) - 1, config.data.shape[0]
    at = [f"{size // 2**level}x{size // 2**level}" for level in range(last + 1)]
    blocks = {"middle_0": f"dec.{at[last]}_in0", "middle_1": f"dec.{at[last]}_in1"}
    for level in range(last + 1):
        for i in range(c.blocks + 1):
            blocks[f"down_{level}_{i}"] = f"enc.{at[level]}_block{i}"
            blocks[f"up_{level}_{i}"] = f"dec.{at[level]}_block{i}"
        if level:
            blocks[f"down_{level - 1}_half"] = f"enc.{at[level]}_down"
            blocks[f"up_{level}_double"] = f"dec.{at[level - 1]}_up"
    names = blocks | {f"{block}/gain": f"{theirs}.emb_gain" for block, theirs in blocks.items()}
    names |= {
        "frequencies": "emb_fourier.freqs",
        "phases": "emb_fourier.phases",
        "embed_noise": "emb_noise",
        "embed_label": "emb_label",
        "conv_in": f"enc.{at[0]}_conv",
        "conv_out": "out_conv",
        "gain_out": "out_gain",
    }
    return {ours: f"unet.{theirs}" for ours, theirs in names.items()}
