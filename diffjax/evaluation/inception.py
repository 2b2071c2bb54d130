"""The Inception network of FID: TensorFlow's of 2015-12-05, with weights that the user brings.

FID, sFID and the Inception Score are numbers of this one network after one way of resizing, that of
TensorFlow 1 (Heusel et al. 2017; Nash et al. 2021; Salimans et al. 2016; Dhariwal & Nichol 2021).
The architecture is Inception v3 (Szegedy et al. 2015) with two particularities: the mean over a
neighbourhood does not count the padding, and the last block pools by a maximum.

The weights are those of TensorFlow's models (Apache-2.0), in any of the files in which others
distribute them: `pt_inception-2015-12-05-6726825d.pth` (pytorch-fid; torch-fidelity has the same),
`inception-2015-12-05.pt` (TorchScript) and `.pkl` (both of NVIDIA), or safetensors with the names
of one of these. torchvision's Inception v3 has the same names and is another network.
"""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ..published.arrays import refuse_lines
from ..types import Array

SIDE = 299
"""The side of the images that the network sees, in pixels."""
KNOWN = (
    "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",
)
"""The SHA-256 of the files with FID's weights: pytorch-fid's .pth, and NVIDIA's .pt."""
EPSILON = 1e-3
"""What every batch normalisation adds to the variance."""


class Layer(NamedTuple):
    """A convolution, a batch normalisation, and a ReLU.

    Attributes:
      name: its name in PyTorch's files, within its block.
      tensorflow: its name in TensorFlow's graph, within its block.
      width: its output channels.
      kernel: height and width of its kernel.
      stride: in both directions.
      padding: SAME or VALID.
    """

    name: str
    tensorflow: str
    width: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: str = "SAME"


class Block(NamedTuple):
    """Branches whose outputs are concatenated.

    Attributes:
      name: its name in PyTorch's files.
      tensorflow: its name in TensorFlow's graph.
      branches: each of them layers and poolings, one after another; a tuple among them is of layers
        side by side.
    """

    name: str
    tensorflow: str
    branches: tuple


_max = functools.partial(nn.max_pool, window_shape=(3, 3), strides=(1, 1), padding="SAME")
_max_half = functools.partial(nn.max_pool, window_shape=(3, 3), strides=(2, 2))
_mean = functools.partial(nn.avg_pool, window_shape=(3, 3), padding="SAME", count_include_pad=False)


def _stem():
    return (
        (
            Layer("Conv2d_1a_3x3", "conv", 32, (3, 3), 2, "VALID"),
            Layer("Conv2d_2a_3x3", "conv_1", 32, (3, 3), 1, "VALID"),
            Layer("Conv2d_2b_3x3", "conv_2", 64, (3, 3)),
            _max_half,
            Layer("Conv2d_3b_1x1", "conv_3", 80),
            Layer("Conv2d_4a_3x3", "conv_4", 192, (3, 3), 1, "VALID"),
            _max_half,
        ),
    )


def _a(pool):
    return (
        (Layer("branch1x1", "conv", 64),),
        (
            Layer("branch5x5_1", "tower_conv", 48),
            Layer("branch5x5_2", "tower_conv_1", 64, (5, 5)),
        ),
        (
            Layer("branch3x3dbl_1", "tower_1_conv", 64),
            Layer("branch3x3dbl_2", "tower_1_conv_1", 96, (3, 3)),
            Layer("branch3x3dbl_3", "tower_1_conv_2", 96, (3, 3)),
        ),
        (_mean, Layer("branch_pool", "tower_2_conv", pool)),
    )


def _b():
    return (
        (Layer("branch3x3", "conv", 384, (3, 3), 2, "VALID"),),
        (
            Layer("branch3x3dbl_1", "tower_conv", 64),
            Layer("branch3x3dbl_2", "tower_conv_1", 96, (3, 3)),
            Layer("branch3x3dbl_3", "tower_conv_2", 96, (3, 3), 2, "VALID"),
        ),
        (_max_half,),
    )


def _c(c):
    return (
        (Layer("branch1x1", "conv", 192),),
        (
            Layer("branch7x7_1", "tower_conv", c),
            Layer("branch7x7_2", "tower_conv_1", c, (1, 7)),
            Layer("branch7x7_3", "tower_conv_2", 192, (7, 1)),
        ),
        (
            Layer("branch7x7dbl_1", "tower_1_conv", c),
            Layer("branch7x7dbl_2", "tower_1_conv_1", c, (7, 1)),
            Layer("branch7x7dbl_3", "tower_1_conv_2", c, (1, 7)),
            Layer("branch7x7dbl_4", "tower_1_conv_3", c, (7, 1)),
            Layer("branch7x7dbl_5", "tower_1_conv_4", 192, (1, 7)),
        ),
        (_mean, Layer("branch_pool", "tower_2_conv", 192)),
    )


def _d():
    return (
        (
            Layer("branch3x3_1", "tower_conv", 192),
            Layer("branch3x3_2", "tower_conv_1", 320, (3, 3), 2, "VALID"),
        ),
        (
            Layer("branch7x7x3_1", "tower_1_conv", 192),
            Layer("branch7x7x3_2", "tower_1_conv_1", 192, (1, 7)),
            Layer("branch7x7x3_3", "tower_1_conv_2", 192, (7, 1)),
            Layer("branch7x7x3_4", "tower_1_conv_3", 192, (3, 3), 2, "VALID"),
        ),
        (_max_half,),
    )


def _e(pool):
    return (
        (Layer("branch1x1", "conv", 320),),
        (
            Layer("branch3x3_1", "tower_conv", 384),
            (
                Layer("branch3x3_2a", "tower_mixed_conv", 384, (1, 3)),
                Layer("branch3x3_2b", "tower_mixed_conv_1", 384, (3, 1)),
            ),
        ),
        (
            Layer("branch3x3dbl_1", "tower_1_conv", 448),
            Layer("branch3x3dbl_2", "tower_1_conv_1", 384, (3, 3)),
            (
                Layer("branch3x3dbl_3a", "tower_1_mixed_conv", 384, (1, 3)),
                Layer("branch3x3dbl_3b", "tower_1_mixed_conv_1", 384, (3, 1)),
            ),
        ),
        (pool, Layer("branch_pool", "tower_2_conv", 192)),
    )


BLOCKS = (
    Block("", "", _stem()),
    Block("Mixed_5b", "mixed", _a(32)),
    Block("Mixed_5c", "mixed_1", _a(64)),
    Block("Mixed_5d", "mixed_2", _a(64)),
    Block("Mixed_6a", "mixed_3", _b()),
    Block("Mixed_6b", "mixed_4", _c(128)),
    Block("Mixed_6c", "mixed_5", _c(160)),
    Block("Mixed_6d", "mixed_6", _c(160)),
    Block("Mixed_6e", "mixed_7", _c(192)),
    Block("Mixed_7a", "mixed_8", _d()),
    Block("Mixed_7b", "mixed_9", _e(_mean)),
    Block("Mixed_7c", "mixed_10", _e(_max)),
)
"""The whole network but its last matrix."""
SPATIAL = "Mixed_6d"
"""The block of whose output sFID takes the first seven channels."""


class Inception(nn.Module):
    """The network.

    Attributes:
      shrink: divides all widths, for tests; at most 16.
    """

    shrink: int = 1

    @nn.compact
    def __call__(self, x: Array) -> dict[str, Array]:
        """Images `[n, 299, 299, 3]` from `scaled` -> what FID, sFID and the Inception Score need.

        Returns:
          `features` `[n, 2048]`; `spatial` `[n, 2023]`, by height, width and channel; and `logits`
          `[n, 1008]`, without the bias.
        """
        spatial = x
        for block in BLOCKS:
            x = jnp.concatenate([self._branch(x, block.name, b) for b in block.branches], -1)
            if block.name == SPATIAL:
                spatial = x[..., :7].reshape(len(x), -1)
        features = x.mean((1, 2))
        logits = nn.Dense(1008, use_bias=False, precision="highest", name="fc")(features)
        return {"features": features, "spatial": spatial, "logits": logits}

    def _branch(self, x, block, steps):
        for step in steps:
            if isinstance(step, Layer):
                x = self._layer(x, block, step)
            elif isinstance(step, tuple):
                x = jnp.concatenate([self._layer(x, block, layer) for layer in step], -1)
            else:
                x = step(x)
        return x

    def _layer(self, x, block, layer):
        # `convert` makes the batch normalisation a part of the convolution.
        convolution = nn.Conv(
            layer.width // self.shrink,
            layer.kernel,
            layer.stride,
            layer.padding,
            precision="highest",  # else a GPU or TPU rounds to 10 or 7 bits
            name=f"{block}.{layer.name}".lstrip("."),
        )
        return nn.relu(convolution(x))


def resize(x: Array, side: int = SIDE) -> Array:
    """Resize images `[n, height, width, c]` to squares as TensorFlow 1 does.

    Bilinear, from the corner: pixel i comes from position i * height / side. There is no half
    pixel and no antialiasing, and nothing is rounded.
    """
    for axis in (1, 2):
        size = x.shape[axis]
        position = np.arange(side, dtype=np.float32) * (np.float32(size) / np.float32(side))
        low = np.minimum(position.astype(np.int32), size - 1)
        high = np.minimum(low + 1, size - 1)
        weight = (position - low).reshape([-1 if a == axis else 1 for a in range(4)])
        first, second = jnp.take(x, low, axis), jnp.take(x, high, axis)
        x = first + (second - first) * weight
    return x


def scaled(images: Array) -> Array:
    """uint8 images `[n, height, width, 1 or 3]` -> what the network takes; grey is repeated."""
    x = jnp.broadcast_to(images, (*images.shape[:3], 3)).astype(jnp.float32)
    return (resize(x) - 128) / 128


def outputs(params: Any, images: Array, shrink: int = 1) -> dict[str, Array]:
    """What `Inception` says of uint8 images `[n, height, width, 1 or 3]`."""
    found: Any = Inception(shrink).apply({"params": params}, scaled(images))
    return found


class Files(NamedTuple):
    """How a kind of file names its arrays.

    Attributes:
      layer: the name of a layer.
      kernel, gamma, beta, mean, variance: the names of its arrays; without a gamma, it is 1.
      matrix: the last matrix.
      unused: the ends of names that the network does not need.
    """

    layer: Callable[[Block, Layer], str]
    kernel: str
    gamma: str | None
    beta: str
    mean: str
    variance: str
    matrix: str
    unused: tuple[str, ...]


PYTORCH = Files(
    lambda block, layer: f"{block.name}_{layer.name}".lstrip("_"),
    *("conv_weight", "bn_weight", "bn_bias", "bn_running_mean", "bn_running_var"),
    matrix="fc_weight",
    unused=("num_batches_tracked", "fc_bias"),
)
NVIDIA = Files(
    lambda block, layer: f"{block.tensorflow}_{layer.tensorflow}".lstrip("_"),
    *("weight", None, "beta", "mean", "var"),
    matrix="output_weight",
    unused=("output_bias",),
)


def layers() -> Iterator[tuple[Block, Layer]]:
    """All layers, with the blocks that they belong to."""
    for block in BLOCKS:
        for branch in block.branches:
            for step in (step for step in branch if isinstance(step, tuple)):
                for layer in (step,) if isinstance(step, Layer) else step:
                    yield block, layer


def convert(where: Path, arrays: dict[str, np.ndarray], shrink: int = 1) -> Any:
    """Convert published arrays to the parameters of `Inception`; every array must be used.

    Args:
      where: the file, for messages.
      arrays: by name, the kernels as (out, in, height, width).
      shrink: as in `Inception`.

    Raises:
      ValueError: if they are those of torchvision's network, or one is missing, left over or of
        another shape; the message lists the first few.
    """
    # Files differ in what separates the parts of a name.
    left = {
        name.removeprefix("layers.").replace(".", "_").replace("/", "_"): x
        for name, x in arrays.items()
    }
    if any("AuxLogits" in name for name in left) or len(left.get("fc_weight", "")) == 1000:
        raise ValueError(
            f"{where} holds torchvision's Inception v3, which has the same names and is another "
            "network: FID needs that of pt_inception-2015-12-05-6726825d.pth"
        )
    files = NVIDIA if NVIDIA.matrix in left else PYTORCH
    example = jnp.zeros((1, SIDE, SIDE, 3))
    shapes: Any = jax.eval_shape(Inception(shrink).init, jax.random.key(0), example)["params"]
    wrong: list[str] = []

    def found(name, shape):
        x = left.pop(name, None)
        if x is None or x.shape != shape:
            has = "is missing" if x is None else f"is {x.shape}"
            wrong.append(f"{name} {has}, need {shape}")
            x = np.ones(shape)
        return np.asarray(x, np.float64)

    params = {}
    for block, layer in layers():
        ours, theirs = f"{block.name}.{layer.name}".lstrip("."), files.layer(block, layer)
        height, width, inputs, channels = shapes[ours]["kernel"].shape
        kernel = found(f"{theirs}_{files.kernel}", (channels, inputs, height, width))
        gamma, beta, mean, variance = (
            found(f"{theirs}_{name}", (channels,)) if name else np.ones(channels)
            for name in (files.gamma, files.beta, files.mean, files.variance)
        )
        scale = gamma / np.sqrt(variance + EPSILON)
        params[ours] = {
            "kernel": np.float32(kernel.transpose(2, 3, 1, 0) * scale),
            "bias": np.float32(beta - mean * scale),
        }
    features, classes = shapes["fc"]["kernel"].shape
    params["fc"] = {"kernel": np.float32(found(files.matrix, (classes, features)).T)}
    wrong += [f"{name} is not an array of it" for name in left if not name.endswith(files.unused)]
    refuse_lines(f"{where} is not the Inception network of FID", wrong)
    return params
