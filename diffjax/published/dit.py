"""A reader of the transformers DiT, SiT and JiT, and the names of diffusers' DiT.

Their files hold only arrays, whose names and shapes determine the architecture, except the number
of heads, which the width determines in the published networks. The arrays of DiT (Peebles & Xie
2023) and of SiT (Ma et al. 2024) are alike, so the file's name must say which of them it is. JiT
(Li & He 2025) has arrays of its own.

DiT and SiT make latents of Stable Diffusion's autoencoder, times 0.18215 (`latents.LATENTS`), which
`autoencoder_kl` reads.
"""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from ..experiment import Config, Data, Sampling
from ..models import DiTConfig
from ..models.layers import positions
from ..models.sizes import DIT, JIT
from . import torchfile
from .arrays import Names, convert, refuse_lines

AVERAGES = ("ema", "model_ema1")
"""The moving averages in checkpoints of training, as DiT and SiT, and as JiT name them."""
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "DiT": (
        dict(
            target="eps",
            schedule="linear_betas",
            schedule_options={"steps": 1000},
            time_steps=1000,
            time_input=True,
        ),
        dict(log_snr_scale=1.0),
    ),
    "SiT": (dict(target="flow", schedule="rectified_flow"), dict(flow_time=True)),
    "JiT": (
        dict(target="x_0", schedule="rectified_flow"),
        dict(flow_time=True, rms_norm=True, qk_norm=True, rope=True, swiglu=True),
    ),
}
"""Fields of the config, and of the network's config, by the kind of the network."""
LATENTS = {"DiT": "sd", "SiT": "sd", "JiT": None}
"""Whose latents they make; None for images."""
MODULES = {
    "embed_0": "t_embedder.mlp.0",
    "embed_1": "t_embedder.mlp.2",
    "label": "y_embedder.embedding_table",
    "patch": "x_embedder.proj",
    "modulation_out": "final_layer.adaLN_modulation.1",
    "out": "final_layer.linear",
}
MODULES_OF_JIT = MODULES | {
    "bottleneck": "x_embedder.proj1",
    "patch": "x_embedder.proj2",
    "norm_out": "final_layer.norm_final",
    "": "in_context_posemb",  # the positions of the label's tokens belong to no module
}
LAYERS = {
    "modulation": "adaLN_modulation.1",
    "qkv": "attn.qkv",
    "attention_out": "attn.proj",
    "mlp_0": "mlp.fc1",
    "mlp_1": "mlp.fc2",
}
LAYERS_OF_JIT = LAYERS | {
    "norm_0": "norm1",
    "norm_1": "norm2",
    "norm_q": "attn.q_norm",
    "norm_k": "attn.k_norm",
    "mlp_0": "mlp.w12",
    "mlp_1": "mlp.w3",
}
EMBEDDING = "transformer_blocks.{}.norm1.emb."
"""Where each block of diffusers' has a copy of the embedding of the time and the label."""
MODULES_OF_DIFFUSERS = {
    "embed_0": EMBEDDING.format(0) + "timestep_embedder.linear_1",
    "embed_1": EMBEDDING.format(0) + "timestep_embedder.linear_2",
    "label": EMBEDDING.format(0) + "class_embedder.embedding_table",
    "patch": "pos_embed.proj",
    "modulation_out": "proj_out_1",
    "out": "proj_out_2",
}
LAYERS_OF_DIFFUSERS = {
    "modulation": "norm1.linear",
    "qkv": "attn1.to_qkv",
    "attention_out": "attn1.to_out.0",
    "mlp_0": "ff.net.0.proj",
    "mlp_1": "ff.net.2",
}


def load(path: Path, kind: str | None = None, heads: int | None = None) -> tuple[Any, Config]:
    """Read the parameters (the moving average, if the file has it) and the config of a file.

    Args:
      path: the file, a state dict or a checkpoint of training.
      kind: a name in `KINDS`; by default what the file's name begins with, such as
        DiT-XL-2-256x256.pt, or JiT if its arrays are there.
      heads: attention heads; by default those of the published network of the same width.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is damaged, or of another network; the message names the arrays.
    """
    found = torchfile.read(path)
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds {type(found).__name__}, not a state dict")
    found = next((found[name] for name in AVERAGES if name in found), found)
    arrays = torchfile.arrays(found)
    state = {name.removeprefix("net."): value for name, value in arrays.items()}
    if kind is None:
        kind = "JiT" if "x_embedder.proj1.weight" in state else path.stem.partition("-")[0]
    if kind not in KINDS:
        raise ValueError(
            f"{path}: its arrays do not say whether it is a DiT or a SiT; let its name begin with "
            "DiT- or SiT-, or pass `kind` to published.dit.load"
        )
    config = make_config(path, state, kind, heads)
    return convert(path, renamed(path, state, kind, config), config, names(kind, config)), config


def make_config(
    path: Path, state: dict[str, np.ndarray], kind: str, heads: int | None = None
) -> Config:
    """Make our config from the names and shapes of a network's arrays.

    Args:
      path: the file, for messages.
      state: the arrays, by name.
      kind: a name in `KINDS`.
      heads: attention heads; None for those of the published network of the same width.

    Raises:
      ValueError: if an array that says how large the network is is missing or has other axes, or if
        there is no such network.
    """
    jit = kind == "JiT"
    patch = "x_embedder.proj1.weight" if jit else "x_embedder.proj.weight"
    axes = {
        patch: 4,
        "t_embedder.mlp.2.weight": 2,
        "y_embedder.embedding_table.weight": 2,
        "pos_embed": 3,
        "final_layer.linear.weight": 2,
    }
    axes |= {"blocks.0.attn.q_norm.weight": 1, "in_context_posemb": 3} if jit else {}
    wrong = {name: n for name, n in axes.items() if np.ndim(state.get(name, 0)) != n}
    refuse_lines(
        f"{path} is not the {kind} that it is taken for",
        [f"{name} is missing, or not of {n} axes" for name, n in wrong.items()],
    )
    shape = {name: state[name].shape for name in axes}
    width = shape["t_embedder.mlp.2.weight"][0]
    if heads is None:
        of_width = {size["width"]: size["heads"] for size in (DIT | JIT).values()}
        if jit:
            heads = width // shape["blocks.0.attn.q_norm.weight"][0]
        elif width in of_width:
            heads = of_width[width]
        else:
            raise ValueError(
                f"{path}: no published {kind} is {width} wide, so that the number of its heads is "
                "not known; pass `heads` to published.dit.load"
            )
    numbers = [re.match(r"blocks\.(\d{1,6})\.", name) for name in state]
    blocks = 1 + max((int(m[1]) for m in numbers if m), default=0)
    first, channels, p, _ = shape[patch]
    side = math.isqrt(shape["pos_embed"][1]) * p
    if jit and side > 256:
        raise ValueError(
            f"{path}: JiT's networks of more than 256 x 256 pixels were trained with noise of "
            "twice the size, which no schedule of diffjax has with their input"
        )
    options: dict[str, Any] = dict(
        width=width,
        blocks=blocks,
        heads=heads,
        patch=p,
        labels=shape["y_embedder.embedding_table.weight"][0] - 1,
        null_label=True,
    )
    if jit:
        tokens = shape["in_context_posemb"][1]
        # Theirs begin at a third of the blocks: 4 of 12, 8 of 24, 10 of 32.
        options |= dict(bottleneck=first, class_tokens=tokens, class_tokens_from=blocks // 3)
    learned = shape["final_layer.linear.weight"][0] == 2 * p * p * channels
    return described(kind, options, (side, side, channels), learned)


def described(
    kind: str, options: dict[str, Any], shape: tuple[int, int, int], learned: bool
) -> Config:
    """Our config of a network.

    Args:
      kind: a name in `KINDS`.
      options: those of `DiTConfig` that `KINDS` does not have.
      shape: that of an example.
      learned: whether there are as many outputs again as x_t has channels. They are the variance of
        a DiT; those of a SiT mean nothing.
    """
    fields, fixed = KINDS[kind]
    sampling, bound_weight = Sampling("heun", steps=50), None
    if kind == "DiT":
        variance = "learned" if learned else "beta"
        sampling = Sampling("ancestral", {"variance": variance}, steps=250)
    if kind == "DiT" and learned:
        bound_weight, options = 0.001, {**options, "out_channels": 2 * shape[-1]}
    return Config(
        data=Data("npz", shape=shape, latents=LATENTS[kind]),
        model=DiTConfig(**fixed, **options),
        sampling=sampling,
        bound_weight=bound_weight,
        **fields,
    )


def renamed(
    path: Path, state: dict[str, np.ndarray], kind: str, config: Config
) -> dict[str, np.ndarray]:
    """Keep the arrays that our network has, in its units, and name all of them as weights.

    Raises:
      ValueError: if the positions of tokens are not the fixed ones that our network computes.
    """
    state = dict(state)
    assert isinstance(config.model, DiTConfig)
    assert config.data.shape is not None
    side, _, channels = config.data.shape
    width, patch = config.model.width, config.model.patch
    at, fixed = state.pop("pos_embed"), positions(side // patch, side // patch, width)[None]
    if at.shape != fixed.shape or not np.allclose(np.asarray(at, float), fixed, atol=5e-3):
        raise ValueError(f"{path}: pos_embed is not the fixed sines and cosines of positions")
    if kind == "JiT":
        state["in_context_posemb.weight"] = state.pop("in_context_posemb")[0]
    if kind == "SiT":
        for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
            rows = state.get(name, np.zeros(0))
            if len(rows) == 2 * patch**2 * channels:
                # The second half of each pixel's channels is thrown away.
                rows = rows.reshape(patch**2, 2, channels, -1)[:, 0].reshape(-1, *rows.shape[1:])
            state[name] = -rows  # its velocity is x_0 - eps
    return state


def names(kind: str, config: Config) -> Names:
    """The names of a kind's arrays."""
    modules, layers = (MODULES_OF_JIT, LAYERS_OF_JIT) if kind == "JiT" else (MODULES, LAYERS)
    return Names(modules | blocks(config, "blocks"), layers)


def blocks(config: Config, theirs: str) -> dict[str, str]:
    """Map our stacked blocks to theirs, which are numbered."""
    c = config.model
    assert isinstance(c, DiTConfig)
    first = c.class_tokens_from if c.class_tokens else c.blocks
    stacks = {"blocks": range(first), "blocks_with_class": range(first, c.blocks)}
    return {
        f"{stack}/{i}": f"{theirs}.{number}"
        for stack, numbers in stacks.items()
        for i, number in enumerate(numbers)
    }


def shared(path: Path, state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Keep one of the copies that diffusers' blocks have of the embedding of time and label.

    Raises:
      ValueError: if a block has another embedding than the first; the message names the arrays.
    """
    first, kept, other = EMBEDDING.format(0), {}, []
    for name, value in state.items():
        copy = re.match(r"transformer_blocks\.\d+\.norm1\.emb\.", name)
        if copy is None or copy[0] == first:
            kept[name] = value
            continue
        same = state.get(first + name[copy.end() :])
        if same is None or not np.array_equal(same, value):
            other.append(f"{name} is not equal to that of the first block")
    refuse_lines(f"{path} has an embedding of its own in each block, which DiT has not", other)
    return kept
