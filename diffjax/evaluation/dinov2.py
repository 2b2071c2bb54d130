"""The network of FDD: DINOv2's ViT-L/14 (Oquab et al. 2023), with weights that the user brings.

FDD is the Frechet distance of its class tokens (Stein et al. 2023; Karras et al. 2024 report it).
The weights are those of `dinov2_vitl14_pretrain.pth` (Apache-2.0), or safetensors with the same
names. Other sizes without registers are read as well; only the weights of that file give FDD.
"""

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from ..published.arrays import refuse_lines
from ..types import Array

KNOWN = ("d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428",)
"""The SHA-256 of the file with FDD's weights."""
SIDE, PATCH, HEAD = 224, 14, 64
"""The side of images and patches in pixels, and the width of an attention head."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of the red, green and blue of ImageNet, in [0, 1]."""
HIGHEST = jax.lax.Precision.HIGHEST  # else a GPU or TPU rounds to 10 or 7 bits


class Block(nn.Module):
    """Attention and a multilayer perceptron, each normalised before and scaled after."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        n, tokens, width = x.shape
        scaled = lambda name, x: self.param(name, nn.initializers.ones, (width,))[None, None] * x
        qkv = _dense(3 * width, "attn.qkv")(_norm("norm1")(x))
        q, k, v = jnp.moveaxis(qkv.reshape(n, tokens, 3, width // HEAD, HEAD), 2, 0)
        attended = nn.dot_product_attention(q, k, v, precision=HIGHEST).reshape(x.shape)
        x += scaled("ls1.gamma", _dense(width, "attn.proj")(attended))
        hidden = nn.gelu(_dense(4 * width, "mlp.fc1")(_norm("norm2")(x)), approximate=False)
        return x + scaled("ls2.gamma", _dense(width, "mlp.fc2")(hidden))


class ViT(nn.Module):
    """The vision transformer.

    Attributes:
      width: of a token.
      depth: number of blocks.
    """

    width: int = 1024
    depth: int = 24

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Images `[n, 224, 224, 3]` from `scaled` -> the class token `[n, width]`."""
        patches = (PATCH, PATCH)
        embed = nn.Conv(
            self.width, patches, patches, "VALID", precision=HIGHEST, name="patch_embed.proj"
        )
        x = embed(x).reshape(len(x), -1, self.width)
        first = self.param("cls_token", nn.initializers.zeros, (1, 1, self.width))
        x = jnp.concatenate([jnp.broadcast_to(first, (len(x), 1, self.width)), x], 1)
        x += self.param("pos_embed", nn.initializers.zeros, (1, x.shape[1], self.width))
        for i in range(self.depth):
            x = Block(name=f"blocks.{i}")(x)
        return _norm("norm")(x)[:, 0]


def _dense(width, name):
    return nn.Dense(width, precision=HIGHEST, name=name)


def _norm(name):
    return nn.LayerNorm(epsilon=1e-6, name=name)


def scaled(images: Array) -> Array:
    """uint8 images `[n, height, width, 1 or 3]` -> what the network takes; grey is repeated.

    The images are resized by an antialiased cubic and not rounded, as EDM2 does; dgm-eval rounds.
    """
    x = jnp.broadcast_to(images, (*images.shape[:3], 3)).astype(jnp.float32)
    x = jax.image.resize(x, (len(x), SIDE, SIDE, 3), "cubic", precision=HIGHEST) / 255
    mean, std = (jnp.asarray(value)[None, None, None] for value in (MEAN, STD))
    return (x - mean) / std


def outputs(params: Any, images: Array) -> dict[str, Array]:
    """The `features` that the network makes of uint8 images `[n, height, width, 1 or 3]`."""
    depth = sum(name.startswith("blocks.") for name in params)
    vit = ViT(params["cls_token"].shape[-1], depth)
    x: Any = vit.apply({"params": params}, scaled(images))
    return {"features": x}


def convert(where: Path, arrays: dict[str, np.ndarray]) -> Any:
    """Convert published arrays to the parameters of `ViT`; every array must be used.

    Args:
      where: the file, for messages.
      arrays: by name.

    Raises:
      ValueError: if one is missing, left over or of another shape; the message lists the first few.
    """
    left = {name: x for name, x in arrays.items() if name != "mask_token"}
    width = left["cls_token"].shape[-1] if left.get("cls_token", np.zeros(0)).ndim == 3 else 1024
    depth = len([name for name in left if name.endswith(".norm1.weight")]) or 24
    if width % HEAD:
        raise ValueError(f"{where} is not DINOv2's: its tokens have {width} numbers")
    if "pos_embed" in left:
        left["pos_embed"] = positions(left["pos_embed"])
    vit, image = ViT(width, depth), jnp.zeros((1, SIDE, SIDE, 3))
    shapes: Any = jax.eval_shape(vit.init, jax.random.key(0), image)["params"]
    params, wrong = {}, []
    expected: Any = flatten_dict(shapes)
    for path, like in expected.items():
        leaf = "weight" if path[-1] in ("kernel", "scale") else path[-1]
        name = ".".join((*path[:-1], leaf))
        x = left.pop(name, np.zeros(0))
        if path[-1] == "kernel" and x.ndim == len(like.shape):
            x = np.moveaxis(x, (0, 1), (-1, -2))
        if x.shape != like.shape:
            wrong.append(f"{name} is missing, or gives {x.shape}: need {like.shape}")
        params[path] = np.asarray(x, np.float32)
    wrong += [f"{name} is not an array of it" for name in left]
    refuse_lines(f"{where} is not a network of DINOv2 without registers", wrong)
    return unflatten_dict(params)


def positions(embedding: np.ndarray, side: int = SIDE // PATCH) -> np.ndarray:
    """Interpolate an embedding of positions `[1, 1 + n n, width]` to `[1, 1 + side side, width]`.

    Cubic with a = -3/4, as PyTorch's, without antialiasing, edges repeated. DINOv2 adds 0.1 to the
    side before it divides, which is a part of the network as published.

    Raises:
      ValueError: if the positions are no square.
    """
    _, count, width = embedding.shape if embedding.ndim == 3 else (0, 0, 0)
    n = round(max(count - 1, 0) ** 0.5)
    if not n or n * n != count - 1:
        raise ValueError(
            f"pos_embed is {embedding.shape}: need one position, and those of a square"
        )
    if n == side:
        return embedding
    at = (np.arange(side) + 0.5) * n / (side + 0.1) - 0.5
    matrix = np.zeros((side, n))
    for tap in range(-1, 3):
        from_tap = np.abs(at - (np.floor(at) + tap))
        index = np.clip(np.floor(at).astype(int) + tap, 0, n - 1)
        np.add.at(matrix, (np.arange(side), index), _cubic(from_tap))
    square = np.asarray(embedding[0, 1:], np.float64).reshape(n, n, width)
    square = np.einsum("ia,jb,abc->ijc", matrix, matrix, square).reshape(1, -1, width)
    return np.concatenate([embedding[:, :1], square.astype(embedding.dtype)], 1)


def _cubic(d, a=-0.75):
    """The weight of a pixel at a distance of at most 2."""
    near, far = ((a + 2) * d - (a + 3)) * d**2 + 1, a * (((d - 5) * d + 8) * d - 4)
    return np.where(d <= 1, near, far)
