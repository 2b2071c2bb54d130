"""A reader of OpenAI's networks.

They are improved-diffusion (Nichol & Dhariwal 2021) and guided-diffusion (Dhariwal & Nichol 2021).
Their files hold only arrays; their READMEs give the architectures, which `PUBLISHED` repeats. The
network for 512 x 512 is not supported, because its first level is half as wide as its embedding
requires.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..experiment import Config, Data, Sampling
from ..models import UNetConfig
from . import torchfile
from .arrays import Names, convert, unet

MULTS = {
    32: (1, 2, 2, 2),
    64: (1, 2, 3, 4),
    128: (1, 1, 2, 3, 4),
    256: (1, 1, 2, 2, 4, 4),
    512: (1, 1, 2, 2, 4, 4),
}
"""The default `mults` of each image size."""
LAYERS = {
    "norm_0": "in_layers.0",
    "conv_0": "in_layers.2",
    "level": "emb_layers.1",
    "norm_1": "out_layers.0",
    "conv_1": "out_layers.3",
    "shortcut": "skip_connection",
    "norm": "norm",
    "qkv": "qkv",
    "out": "proj_out",
}


class OpenAI(NamedTuple):
    """What a published file does not contain.

    Attributes:
      config: our config of the network.
      order: order of the rows of queries, keys and values: "hkc", or "khc" with their option
        use_new_attention_order.
    """

    config: Config
    order: str = "hkc"


def improved(
    size: int,
    width: int,
    blocks: int,
    *,
    steps: int = 4000,
    betas: str = "cosine_betas",
    rescale: bool = True,
    low: int | None = None,
    **model: Any,
) -> Config:
    """Make our config from improved-diffusion's flags.

    Args:
      size: their image_size.
      width: their num_channels.
      blocks: their num_res_blocks.
      steps: their diffusion_steps.
      betas: their noise_schedule, "cosine_betas" or "linear_betas".
      rescale: their rescale_timesteps: whether the network is given times from 0 to 1000.
      low: their small_size, for an upsampler.
      model: options of `UNetConfig` that differ from their defaults.
    """
    options: dict[str, Any] = {"steps": steps}
    if betas == "linear_betas":
        options |= {"start": 0.1 / steps, "end": 20 / steps}
    defaults: dict[str, Any] = dict(attention=(16, 8), heads=4, scale_shift=True, dropout=0.0)
    return Config(
        data=Data("folder", size=size, shape=(size, size, 3)),
        schedule=betas,
        schedule_options=options,
        time_steps=steps,
        time_input=True,
        bound_weight=0.001,
        low_resolution=low,
        model=UNetConfig(
            width=width,
            mults=MULTS[size],
            blocks=blocks,
            out_channels=6,
            epsilon=1e-5,
            pad_both=True,
            log_snr_scale=1000 / steps if rescale else 1.0,
            image_cond=low is not None,
            embed_image_log_snr=False,
            **defaults | model,
        ),
        sampling=Sampling("ancestral", {"variance": "learned"}, steps=steps),
    )


def guided(size: int, width: int, blocks: int, betas: str = "linear_betas", **model: Any) -> Config:
    """Make our config from guided-diffusion's flags; the arguments are those of `improved`."""
    defaults: dict[str, Any] = dict(attention=(32, 16, 8), head_width=64, resblock_updown=True)
    return improved(size, width, blocks, steps=1000, betas=betas, **defaults | model)


_CIFAR_10 = OpenAI(improved(32, 128, 3, dropout=0.3))
_IMAGENET_64 = OpenAI(improved(64, 128, 3))
_BEDROOM = OpenAI(
    improved(
        *(256, 128, 2),
        steps=1000,
        betas="linear_betas",
        rescale=False,
        attention=(16,),
        heads=1,
        scale_shift=False,
    )
)
_LSUN = OpenAI(guided(256, 256, 2, dropout=0.1))
PUBLISHED: Mapping[str, OpenAI] = {
    "cifar10_uncond_50M_500K": _CIFAR_10,
    "cifar10_uncond_vlb_50M_500K": _CIFAR_10,
    "imagenet64_uncond_100M_1500K": _IMAGENET_64,
    "imagenet64_uncond_vlb_100M_1500K": _IMAGENET_64,
    "imagenet64_cond_270M_250K": OpenAI(improved(64, 192, 3, rescale=False, labels=1000)),
    "upsample_cond_500K": OpenAI(
        improved(*(256, 192, 2), betas="linear_betas", rescale=False, labels=1000, low=64)
    ),
    "lsun_uncond_100M_1200K_bs128": _BEDROOM,
    "lsun_uncond_100M_2400K_bs64": _BEDROOM,
    "64x64_diffusion": OpenAI(
        guided(64, 192, 3, "cosine_betas", labels=1000, dropout=0.1), order="khc"
    ),
    "128x128_diffusion": OpenAI(guided(128, 256, 2, labels=1000, heads=4, head_width=None)),
    "256x256_diffusion": OpenAI(guided(256, 256, 2, labels=1000)),
    "256x256_diffusion_uncond": OpenAI(guided(256, 256, 2)),
    "64_256_upsampler": OpenAI(guided(256, 192, 2, labels=1000, heads=4, head_width=None, low=64)),
    "128_512_upsampler": OpenAI(guided(512, 192, 2, attention=(32, 16), labels=1000, low=128)),
    "lsun_bedroom": _LSUN,
    "lsun_cat": _LSUN,
    "lsun_horse": _LSUN,
    "lsun_horse_nodropout": OpenAI(guided(256, 256, 2)),
}
"""The published networks by the names of their files, without ".pt"."""


def load(path: Path, known: OpenAI | None = None) -> tuple[Any, Config]:
    """Read the parameters and the config of a file.

    Args:
      path: the file.
      known: what the file does not contain; by default the entry of `PUBLISHED` for its name.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if its name is not known, it is damaged, or it is of another network.
    """
    known = known or PUBLISHED.get(path.stem)
    if known is None:
        raise ValueError(
            f"{path}: its name is none of {', '.join(PUBLISHED)}, and does not begin with DiT- or "
            "SiT-; for a network of your own, pass `known` to published.openai.load, or `kind` to "
            "published.dit.load"
        )
    state = torchfile.read(path)
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds {type(state).__name__}, not a state dict")
    size = known.config.data.size or 0
    names = Names(modules(unet(known.config), size), LAYERS, known.order)
    return convert(path, state, known.config, names), known.config


def modules(c: UNetConfig, size: int) -> dict[str, str]:
    """Map our names of modules to theirs, which are numbered in the order in which they run."""
    names = {
        "embed_0": "time_embed.0",
        "embed_1": "time_embed.2",
        "label": "label_emb",
        "conv_in": "input_blocks.0.0",
        "norm_out": "out.0",
        "conv_out": "out.2",
        "middle_0": "middle_block.0",
        "middle_0/attention": "middle_block.1",
        "middle_1": "middle_block.2",
    }
    down = up = 0
    for level in range(len(c.mults)):
        for i in range(c.blocks):
            down += 1
            names[f"down_{level}_{i}"] = f"input_blocks.{down}.0"
            names[f"down_{level}_{i}/attention"] = f"input_blocks.{down}.1"
        down += 1
        names[f"down_{level}_half"] = f"input_blocks.{down}.0{'' if c.resblock_updown else '.op'}"
    for level in reversed(range(len(c.mults))):
        for i in range(c.blocks + 1):
            names[f"up_{level}_{i}"] = f"output_blocks.{up}.0"
            names[f"up_{level}_{i}/attention"] = f"output_blocks.{up}.1"
            up += 1
        after = 1 + (size // 2**level in c.attention)
        resample = "" if c.resblock_updown else ".conv"
        names[f"up_{level}_double"] = f"output_blocks.{up - 1}.{after}{resample}"
    return names
