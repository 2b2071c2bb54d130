"""From what a network makes to what is stored, shown and measured: bytes, pixels, or numbers.

A network of images makes numbers in [-1, 1], which are rounded to bytes where the data are bytes.
A network of latents makes latents: with the autoencoder's weights they are decoded to images, in
which distances are then measured; without them they stay what they are. The bits of latents are
always those of the latents themselves, which are continuous.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .. import data
from ..experiment import Config
from ..latents import LATENTS, scaled
from ..published import autoencoder_kl
from ..published.autoencoder_kl import Autoencoder
from ..training.runners import Runner, in_batches

IMAGES = 64
"""Images that are encoded in one call."""


class Form(NamedTuple):
    """The form of samples outside the network.

    Attributes:
      decode: samples of the network `[n, ...]` -> images, or other examples, float32.
      shape: of a sample in this form.
      dtype: in which they are stored and measured: uint8 if they are images of bytes.
      about: for JSON, `space`, where it is not that of the data: of which latents bits are, whether
        `samples`, and the examples that they are compared with, are latents or decoded images, and
        the hash of the autoencoder.
      examples: examples of the data -> the same in this form, decoded when they are indexed.
    """

    decode: Callable[[np.ndarray], np.ndarray]
    shape: tuple[int, ...]
    dtype: type
    about: dict[str, Any]
    examples: Callable[[data.Examples], data.Examples]

    def store(self, x: np.ndarray) -> np.ndarray:
        """Samples of the network as they are stored and measured."""
        x = self.decode(x)
        return data.to_bytes(x) if self.dtype == np.uint8 else x

    def dataset(self, both: data.Dataset) -> data.Dataset:
        """Both parts of a data set in this form."""
        return data.Dataset(self.examples(both.train), self.examples(both.test))


def form(config: Config, runner: Runner, shape: tuple[int, ...], dtype: type) -> Form:
    """The form of a run's samples.

    Args:
      config: of the run; it names the autoencoder, whose weights are then read.
      runner: maps over the devices.
      shape: of an example as the network makes it.
      dtype: of the data.

    Raises:
      FileNotFoundError, ValueError: if the autoencoder cannot be read, or has latents of other
        channels.
    """
    kind, path = config.data.latents, config.data.autoencoder
    if kind is None:
        dtype = np.uint8 if dtype == np.uint8 else np.float32
        return Form(lambda x: x, shape, dtype, {}, lambda examples: examples)
    latents = LATENTS[kind]
    means = lambda x: np.asarray(scaled(jnp.split(jnp.asarray(x, float), 2, -1)[0], latents))
    if path is None:
        about = {"latents": kind, "samples": "latents"}
        examples = functools.partial(_mapped, means, shape, np.float32)
        return Form(lambda x: x, shape, np.float32, {"space": about}, examples)
    autoencoder = read(path, shape)
    mapped = runner.map(lambda params, batch: _decode(autoencoder, params, batch["x"], kind))
    params = jax.tree.map(jnp.asarray, autoencoder.params)

    def decode(x):
        batch = {"index": np.arange(len(x)), "x": np.asarray(x, np.float32)}
        return in_batches(runner, mapped, params, batch, min(len(x), config.batch_size))

    factor = autoencoder.config.factor
    pixels = (factor * shape[0], factor * shape[1], autoencoder.config.channels)
    about = {"latents": kind, "samples": "decoded images", "sha256": autoencoder.sha256()}
    examples = functools.partial(
        _mapped, lambda x: data.to_bytes(decode(means(x))), pixels, np.uint8
    )
    return Form(decode, pixels, np.uint8, {"space": about}, examples)


def read(path: Path, shape: tuple[int, ...]) -> Autoencoder:
    """Read the autoencoder of latents of this shape.

    Raises:
      FileNotFoundError, ValueError: as `autoencoder_kl.load`, or if its latents are others.
    """
    found = autoencoder_kl.load(path)
    if len(shape) != 3 or found.config.latent_channels != shape[-1]:
        raise ValueError(
            f"data.autoencoder={path}: its latents have {found.config.latent_channels} channels, "
            f"the network makes examples of shape {shape}"
        )
    return found


def encoded(examples: data.Examples, autoencoder: Autoencoder, kind: str) -> data.Examples:
    """The latents of images, as float16 moments `[n, h/8, w/8, 2 x 4]`, encoded when indexed.

    Args:
      examples: images of bytes, or in [-1, 1].
      autoencoder: the autoencoder.
      kind: a name in `LATENTS`: the range of the images that the autoencoder takes.

    Raises:
      ValueError: unless they are images of as many channels as the autoencoder takes, whose height
        and width its factor divides.
    """
    c, shape = autoencoder.config, examples.x.shape[1:]
    if len(shape) != 3 or shape[2] != c.channels or shape[0] % c.factor or shape[1] % c.factor:
        raise ValueError(
            f"examples of shape {shape}: the autoencoder takes [height, width, {c.channels}], with "
            f"height and width divisible by {c.factor}"
        )
    encode = jax.jit(lambda params, x: Autoencoder(c, params).encode(x, LATENTS[kind]))
    params = jax.tree.map(jnp.asarray, autoencoder.params)

    def moments(x):
        given = (data.take(data.Examples(part), np.arange(len(part)))["x"] for part in _parts(x))
        return np.concatenate([np.asarray(encode(params, part), np.float16) for part in given])

    latent = (shape[0] // c.factor, shape[1] // c.factor, 2 * c.latent_channels)
    about = {"latents": kind, "autoencoder": autoencoder.sha256()}
    return _mapped(moments, latent, np.float16, examples, about)


def _parts(x):
    return (x[start : start + IMAGES] for start in range(0, len(x), IMAGES))


def _decode(autoencoder, params, x, kind):
    return autoencoder._replace(params=params).decode(x, LATENTS[kind])


def _mapped(function, shape, dtype, examples, about=None):
    return examples._replace(
        x=data.Mapped(examples.x, function, shape, np.dtype(dtype), about or {})
    )
