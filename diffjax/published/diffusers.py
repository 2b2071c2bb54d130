"""A reader of diffusers' folders: DDPM's networks for CIFAR-10, CelebA-HQ and LSUN, DiT, and more.

A folder holds config.json, the weights (safetensors, or a torch file) and scheduler_config.json; in
a pipeline they are in the sub-folders unet/ or transformer/, and scheduler/. The class in
config.json says whether it is a `UNet2DModel` or a `DiTTransformer2DModel`.

With the same weights the class `DiTTransformer2DModel` computes something else than DiT: its
sinusoids of the time have other frequencies, and one of its normalisations another epsilon. A
folder is read as the network that DiT's authors trained.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from ..experiment import Config, Data, Sampling
from ..models import UNetConfig
from ..training import parsing
from . import dit, torchfile
from .arrays import Names, convert, unet

ONLY = {
    "_class_name": "UNet2DModel",
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "mid_block_type": "UNetMidBlock2D",
    "mid_block_scale_factor": 1,
    "act_fn": "silu",
    "add_attention": True,
    "class_embed_type": None,
}
"""Values that a U-Net's config must have; all except the class are also the defaults."""
ONLY_OF_DIT = {
    "norm_type": "ada_norm_zero",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
}
"""Values that a transformer's config must have; they are the defaults of the newer class."""
DIT, OLD_DIT = "DiTTransformer2DModel", "Transformer2DModel"
"""The class of DiT, and the class that it was a case of, which the published folders name."""
PLAIN = {
    "conv": ("DownBlock2D", "UpBlock2D"),
    "resnet": ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"),
}
"""The blocks without attention, by how they change the resolution."""
TARGETS = {"epsilon": "eps", "sample": "x_0", "v_prediction": "v"}
BETAS = {
    "linear": "linear_betas",
    "scaled_linear": "scaled_linear_betas",
    "squaredcos_cap_v2": "cosine_betas",
}
VARIANCES = {
    "fixed_small": "posterior",
    "fixed_small_log": "posterior",
    "fixed_large": "beta",
    "fixed_large_log": "beta",
    "learned_range": "learned",
}
LAYERS = {
    "norm_0": "norm1",
    "conv_0": "conv1",
    "level": "time_emb_proj",
    "norm_1": "norm2",
    "conv_1": "conv2",
    "shortcut": "conv_shortcut",
    "norm": "group_norm",
    "qkv": "to_qkv",
    "out": "to_out.0",
}
OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Newer names of attention layers, by their names in older files."""


def load(folder: Path) -> tuple[Any, Config]:
    """Read the parameters and the config of a folder; without a scheduler's config, as DDPM.

    Raises:
      FileNotFoundError: if a file is missing.
      ValueError: if a file is damaged, or the network or the schedule is not one that diffjax has.
    """
    parts = [folder / name for name in ("unet", "transformer")]
    inside = next((part for part in parts if part.is_dir()), folder)
    where = inside / "config.json"
    c = _json(where)
    if c.get("_class_name") in (DIT, OLD_DIT):
        config = make_dit_config(folder, inside)
        state = dit.shared(inside, merged(_state(inside)))
        blocks = dit.blocks(config, "transformer_blocks")
        names = Names(dit.MODULES_OF_DIFFUSERS | blocks, dit.LAYERS_OF_DIFFUSERS)
    else:
        config, state = make_config(folder, inside), merged(_state(inside))
        flip = c.get("flip_sin_to_cos", True)
        names = Names(modules(unet(config)), LAYERS, "khc", flip)
    return convert(inside, state, config, names), config


def make_config(folder: Path, inside: Path) -> Config:
    """Make our config from the files in `folder`, whose network is in the folder `inside`."""
    where = inside / "config.json"
    c: dict[str, Any] = ONLY | {"_class_name": None} | _json(where)
    channels = c["block_out_channels"]
    down, up = c["down_block_types"], c["up_block_types"]
    size, groups = c["sample_size"], c.get("norm_num_groups", 32)
    resample = c.get("downsample_type", "conv")
    levels = range(len(channels))
    attend, plain = ("AttnDownBlock2D", "AttnUpBlock2D"), PLAIN.get(resample, ())
    for holds, what in (
        *((c[name] == value, f"{name}={c[name]}, need {value}") for name, value in ONLY.items()),
        (
            [attend[0] == kind for kind in down] == [attend[1] == kind for kind in up[::-1]]
            and {*down, *up} <= {*attend, *plain},
            f"blocks {down} and {up}: need {plain} and {attend}, alike on the way down and up",
        ),
        (
            resample == c.get("upsample_type", "conv"),
            f"downsample_type={resample} and upsample_type={c.get('upsample_type')} differ",
        ),
        (c.get("attn_norm_num_groups") in (None, groups), "attn_norm_num_groups differs"),
        (all(n % channels[0] == 0 for n in channels), f"channels {channels}: need multiples"),
        (isinstance(size, int), f"sample_size={size}: need one number, for a square"),
    ):
        if not holds:
            raise ValueError(f"{where}: {what}")
    half, learned = channels[0] // 2, c["out_channels"] == 2 * c["in_channels"]
    model = UNetConfig(
        width=channels[0],
        mults=tuple(n // channels[0] for n in channels),
        blocks=c["layers_per_block"],
        attention=tuple(size // 2**i for i in levels if down[i] == attend[0]),
        head_width=c.get("attention_head_dim", 8),
        groups=groups,
        epsilon=c.get("norm_eps", 1e-5),
        dropout=c.get("dropout", 0.0),
        scale_shift=c.get("resnet_time_scale_shift", "default") == "scale_shift",
        resblock_updown=resample == "resnet",
        pad_both=c.get("downsample_padding", 1) == 1,
        log_snr_scale=1.0,
        # With a shift of 1 the last frequency is exactly 1/10000.
        embedding_period=10000.0 ** (half / (half - c.get("freq_shift", 0))),
        out_channels=c["out_channels"],
        labels=c.get("num_class_embeds") or 0,
    )
    data = Data("folder", size=size, shape=(size, size, c["in_channels"]))
    return _with_schedule(Config(data=data, model=model), folder, learned)


def make_dit_config(folder: Path, inside: Path) -> Config:
    """Make our config from the files in `folder`, whose transformer is in the folder `inside`."""
    where = inside / "config.json"
    c: dict[str, Any] = _json(where)
    c = (ONLY_OF_DIT if c["_class_name"] == DIT else {}) | c
    for name, value in ONLY_OF_DIT.items():
        if c.get(name) != value:
            raise ValueError(f"{where}: {name}={c.get(name)}, need {value}")
    if c.get("norm_eps", 1e-5) not in (1e-5, 1e-6):  # between which the output hardly differs
        raise ValueError(f"{where}: norm_eps={c['norm_eps']}, need 1e-5 or 1e-6")
    size, channels, heads = c["sample_size"], c["in_channels"], c["num_attention_heads"]
    for name in ("sample_size", "num_embeds_ada_norm"):
        if not isinstance(c[name], int):
            raise ValueError(f"{where}: {name}={c[name]}, need one number")
    learned = c["out_channels"] == 2 * channels
    if not learned and c["out_channels"] not in (None, channels):
        raise ValueError(f"{where}: out_channels={c['out_channels']}, need {channels}, or twice it")
    options = dict(
        width=heads * c["attention_head_dim"],
        blocks=c["num_layers"],
        heads=heads,
        patch=c["patch_size"],
        dropout=c.get("dropout", 0.0),
        labels=c["num_embeds_ada_norm"],
        null_label=True,
    )
    config = dit.described("DiT", options, (size, size, channels), learned)
    return _with_schedule(config, folder, learned)


def _with_schedule(config, folder, learned):
    """Add the schedule, the target and the sampler of the scheduler's config."""
    files = [folder / "scheduler_config.json", folder / "scheduler" / "scheduler_config.json"]
    where = next((file for file in files if file.is_file()), None)
    c = _json(where) if where else {}
    betas, predicted = c.get("beta_schedule", "linear"), c.get("prediction_type", "epsilon")
    variance = c.get("variance_type", "learned_range" if learned else "fixed_large")
    for name, table in ((betas, BETAS), (predicted, TARGETS), (variance, VARIANCES)):
        if name not in table:
            raise ValueError(f"{where}: {name!r} is not one of {', '.join(table)}")
    if c.get("trained_betas") is not None or c.get("rescale_betas_zero_snr"):
        raise ValueError(f"{where}: trained_betas and rescale_betas_zero_snr are not supported")
    steps = c.get("num_train_timesteps", 1000)
    ends = {"start": c.get("beta_start", 1e-4), "end": c.get("beta_end", 0.02)}
    return dataclasses.replace(
        config,
        target=TARGETS[predicted],
        schedule=BETAS[betas],
        schedule_options={"steps": steps} | ({} if betas == "squaredcos_cap_v2" else ends),
        time_steps=steps,
        time_input=True,
        bound_weight=0.001 if learned else None,
        sampling=Sampling("ancestral", {"variance": VARIANCES[variance]}, steps=steps),
    )


def modules(c: UNetConfig) -> dict[str, str]:
    """Map our names of modules to diffusers' names."""
    names = {
        "embed_0": "time_embedding.linear_1",
        "embed_1": "time_embedding.linear_2",
        "label": "class_embedding",
        "conv_in": "conv_in",
        "norm_out": "conv_norm_out",
        "conv_out": "conv_out",
        "middle_0": "mid_block.resnets.0",
        "middle_0/attention": "mid_block.attentions.0",
        "middle_1": "mid_block.resnets.1",
    }
    last = len(c.mults) - 1
    resample = "" if c.resblock_updown else ".conv"
    for level in range(len(c.mults)):
        down, up = f"down_blocks.{level}", f"up_blocks.{last - level}"
        for i in range(c.blocks + 1):
            for ours, theirs in ((f"down_{level}_{i}", down), (f"up_{level}_{i}", up)):
                names[ours] = f"{theirs}.resnets.{i}"
                names[f"{ours}/attention"] = f"{theirs}.attentions.{i}"
        names[f"down_{level}_half"] = f"{down}.downsamplers.0{resample}"
        names[f"up_{level}_double"] = f"{up}.upsamplers.0{resample}"
    return names


def merged(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Rename arrays of older files, and join queries, keys and values into one array."""
    result, apart = {}, {}
    for name, value in state.items():
        module, _, leaf = name.rpartition(".")
        block, _, layer = module.rpartition(".")
        layer = OLD.get(layer, layer)
        if layer in ("to_q", "to_k", "to_v"):
            apart.setdefault(f"{block}.to_qkv.{leaf}", {})[layer] = value
        else:
            result[f"{block}.{layer}.{leaf}" if layer in OLD.values() else name] = value
    for name, parts in apart.items():
        if len(parts) == 3:
            result[name] = np.concatenate([parts[f"to_{x}"] for x in "qkv"])
    return result


def _state(folder):
    name = "diffusion_pytorch_model"
    file = folder / f"{name}.safetensors"
    if not file.is_file():
        return torchfile.read(folder / f"{name}.bin")
    try:
        return safetensors.numpy.load_file(file)
    except Exception as error:  # untrusted input may raise anything
        raise ValueError(f"{file} is not a readable safetensors file: {error}") from error


def _json(path):
    return parsing.read(path)
