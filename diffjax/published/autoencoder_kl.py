"""A reader of Stable Diffusion's autoencoder, and functions between images and its latents.

The weights come as diffusers has them, a folder with `config.json` (or the sub-folder vae/ of a
pipeline), or a file of its arrays; or as CompVis has them, in a file of the autoencoder alone or of
a whole Stable Diffusion, `.ckpt` or `.safetensors`, of which the rest is left alone.

    autoencoder = load("sd-vae-ft-mse")
    moments = autoencoder.encode(images, LATENTS["sd"])     # images in [-1, 1]
    images = autoencoder.decode(x, LATENTS["sd"])           # x as a network is trained on it
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from ..latents import Latents, unscaled
from ..models import autoencoder_kl as models
from ..models.autoencoder_kl import AutoencoderKLConfig
from ..training import parsing
from ..training.files import digest
from ..training.store import as_path
from ..types import Array
from . import arrays
from .arrays import Names, matched, refuse_lines
from .diffusers import LAYERS as LAYERS_OF_DIFFUSERS, merged

ONLY = {"act_fn": "silu", "mid_block_add_attention": True}
"""Values that a config of diffusers must have, which are also the defaults."""
PREFIXES = ("", "first_stage_model.", "state_dict.", "state_dict.first_stage_model.")
"""What precedes the names of the autoencoder's arrays in a file."""
OURS = re.compile(r"(encoder|decoder|quant_conv|post_quant_conv)\.")
"""How the names of its arrays begin; a checkpoint of its training has others beside them."""
LAYERS = {
    "norm_0": "norm1",
    "conv_0": "conv1",
    "norm_1": "norm2",
    "conv_1": "conv2",
    "shortcut": "nin_shortcut",
    "norm": "norm",
    "qkv": "to_qkv",
    "out": "proj_out",
}
"""CompVis' names of the layers of a block or an attention, by ours."""


class Autoencoder(NamedTuple):
    """A published autoencoder. Its methods are pure functions of arrays.

    Attributes:
      config: its architecture.
      params: its parameters.
    """

    config: AutoencoderKLConfig
    params: Any

    def encode(self, images: Array, latents: Latents) -> Array:
        """The moments of images: `[batch, h, w, 3]` in [-1, 1] -> `[batch, h/8, w/8, 2 x 4]`.

        One is encoded after the other: the activations of one take as much memory as a thousand
        latents.
        """
        given = latents.low + (images + 1) / 2 * (1 - latents.low)
        one = lambda image: models.encode(self.config, self.params, image[None])[0]
        return jax.lax.map(one, given)

    def decode(self, x: Array, latents: Latents) -> Array:
        """The images, about in [-1, 1], of latents as a network makes them `[batch, h/8, w/8, 4]`.

        One is decoded after the other, as in `encode`.
        """
        one = lambda z: models.decode(self.config, self.params, z[None])[0]
        found = jax.lax.map(one, unscaled(x, latents))
        return (found - latents.low) / (1 - latents.low) * 2 - 1

    def sha256(self) -> str:
        """The hash of the parameters."""
        return digest(self.params)


def load(path: Path | str) -> Autoencoder:
    """Read an autoencoder.

    Raises:
      FileNotFoundError: if there is no such path, or a file in the folder is missing.
      ValueError: if a file is damaged, or holds another network; the message names the arrays.
    """
    path, groups = as_path(path), AutoencoderKLConfig().groups
    if path.is_dir():
        path = path / "vae" if (path / "vae").is_dir() else path
        groups = _groups(path / "config.json")
        path = path / "diffusion_pytorch_model.safetensors"
        path = path if path.is_file() else path.with_suffix(".bin")
    state = _state(path, arrays.read(path))
    compvis = "encoder.mid.block_1.conv1.weight" in state
    state = _joined(state) if compvis else merged(state)
    config = make_config(path, state, groups)
    names = names_of_compvis(config) if compvis else names_of_diffusers(config)
    return Autoencoder(config, matched(path, state, expected(config), names))


def make_config(path: Path, state: dict[str, np.ndarray], groups: int) -> AutoencoderKLConfig:
    """Make the config of an autoencoder from the names and shapes of its arrays.

    Args:
      path: the file, for messages.
      state: the arrays, by name.
      groups: of the group normalisations, which no array shows.

    Raises:
      ValueError: if an array that says how large the network is is missing or has other axes.
    """
    axes = {"encoder.conv_in.weight": 4, "decoder.conv_in.weight": 4}
    wrong = {name: n for name, n in axes.items() if np.ndim(state.get(name, 0)) != n}
    blocks = re.compile(r"encoder\.down(?:_blocks)?\.(\d\d?)\.(?:resnets|block)\.(\d\d?)\.conv1\.w")
    found = {tuple(map(int, m.groups())): state[m.string] for m in map(blocks.match, state) if m}
    refuse_lines(
        f"{path} is not the autoencoder that it is taken for",
        [f"{name} is missing, or not of {n} axes" for name, n in wrong.items()]
        + ["encoder.down_blocks (or encoder.down) is missing"] * (not found),
    )
    levels = 1 + max(level for level, _ in found)
    return AutoencoderKLConfig(
        widths=tuple(len(found.get((level, 0), ())) for level in range(levels)),
        blocks=1 + max(block for _, block in found),
        groups=groups,
        channels=state["encoder.conv_in.weight"].shape[1],
        latent_channels=state["decoder.conv_in.weight"].shape[1],
        quant="quant_conv.weight" in state,
    )


def expected(config: AutoencoderKLConfig) -> dict[str, Any]:
    """The names, shapes and dtypes of the arrays that such an autoencoder has."""
    image = jnp.zeros((1, config.factor, config.factor, config.channels))
    latent = jnp.zeros((1, 1, 1, config.latent_channels))
    key = jax.random.key(0)

    def init():
        encoder, decoder = models.Encoder(config), models.Decoder(config)
        return {
            "encoder": encoder.init(key, image)["params"],
            "decoder": decoder.init(key, latent)["params"],
        }

    tree: Any = flatten_dict(jax.eval_shape(init), sep="/")
    return tree


def names_of_diffusers(config: AutoencoderKLConfig) -> Names:
    """Diffusers' names."""
    modules, last = _ends("conv_norm_out"), len(config.widths) - 1
    for level in range(last + 1):
        for i in range(config.blocks + 1):
            modules[f"encoder/down_{level}_{i}"] = f"encoder.down_blocks.{level}.resnets.{i}"
            # Theirs are numbered as they are called, from the smallest image on.
            modules[f"decoder/up_{level}_{i}"] = f"decoder.up_blocks.{last - level}.resnets.{i}"
        modules[f"encoder/down_{level}_half"] = f"encoder.down_blocks.{level}.downsamplers.0.conv"
        modules[f"decoder/up_{level}_double"] = (
            f"decoder.up_blocks.{last - level}.upsamplers.0.conv"
        )
    for half in ("encoder", "decoder"):
        modules[f"{half}/attention"] = f"{half}.mid_block.attentions.0"
        for i in (0, 1):
            modules[f"{half}/middle_{i}"] = f"{half}.mid_block.resnets.{i}"
    return Names(modules, LAYERS_OF_DIFFUSERS)


def names_of_compvis(config: AutoencoderKLConfig) -> Names:
    """The names of CompVis, after `_joined`."""
    modules = _ends("norm_out")
    for level in range(len(config.widths)):
        for i in range(config.blocks + 1):
            modules[f"encoder/down_{level}_{i}"] = f"encoder.down.{level}.block.{i}"
            modules[f"decoder/up_{level}_{i}"] = f"decoder.up.{level}.block.{i}"
        modules[f"encoder/down_{level}_half"] = f"encoder.down.{level}.downsample.conv"
        modules[f"decoder/up_{level}_double"] = f"decoder.up.{level}.upsample.conv"
    for half in ("encoder", "decoder"):
        modules[f"{half}/attention"] = f"{half}.mid.attn_1"
        for i in (0, 1):
            modules[f"{half}/middle_{i}"] = f"{half}.mid.block_{i + 1}"
    return Names(modules, LAYERS)


def _ends(norm):
    """The names of the modules that both have, but for the last normalisation."""
    names = {"encoder/quant": "quant_conv", "decoder/quant": "post_quant_conv"}
    for half in ("encoder", "decoder"):
        names |= {f"{half}/{name}": f"{half}.{name}" for name in ("conv_in", "conv_out")}
        names[f"{half}/norm_out"] = f"{half}.{norm}"
    return names


def _state(path, found):
    """The arrays of the autoencoder in what a file holds."""
    for prefix in PREFIXES:
        if f"{prefix}encoder.conv_in.weight" in found:
            named = {n.removeprefix(prefix): x for n, x in found.items() if n.startswith(prefix)}
            # Files of half precision are made whole: our parameters are float32.
            return {n: np.asarray(x, np.float32) for n, x in named.items() if OURS.match(n)}
    raise ValueError(f"{path} holds no encoder.conv_in.weight: it is no autoencoder")


def _joined(state):
    """Join CompVis' queries, keys and values, which are 1x1 convolutions, into one array."""
    apart = re.compile(r"(.*\.attn_1)\.[qkv]\.(weight|bias)")
    joined = {name: x for name, x in state.items() if not apart.fullmatch(name)}
    for module, leaf in {m.groups() for m in map(apart.fullmatch, state) if m}:
        parts = [state.get(f"{module}.{which}.{leaf}") for which in "qkv"]
        if all(isinstance(x, np.ndarray) for x in parts):
            joined[f"{module}.to_qkv.{leaf}"] = np.concatenate(parts)
    return joined


def _groups(path):
    """The groups of the normalisations in diffusers' config, after it is checked."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}")
    c: dict[str, Any] = parsing.read(path)
    if c.get("_class_name") != "AutoencoderKL":
        raise ValueError(f"{path}: _class_name={c.get('_class_name')}, need AutoencoderKL")
    kinds = {*c.get("down_block_types", ()), *c.get("up_block_types", ())}
    wrong = {
        name: c.get(name, value) for name, value in ONLY.items() if c.get(name, value) != value
    }
    if wrong or not kinds <= {"DownEncoderBlock2D", "UpDecoderBlock2D"}:
        raise ValueError(
            f"{path}: {wrong or sorted(kinds)}, need {ONLY} and blocks DownEncoderBlock2D and "
            "UpDecoderBlock2D"
        )
    return c.get("norm_num_groups", 32)
