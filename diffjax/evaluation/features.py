"""Named feature spaces, in which `distances` between samples and data are measured.

Distances in different feature spaces cannot be compared, so a space has a name and the SHA-256 of
what determines it. FID and FDD are Frechet distances in the features of two particular networks,
`inception` and `dinov2`, whose weights do not come with diffjax: the user names a file. With any
other weights the space says so in its name, and its distances are not called FID or FDD.

A feature space is a function and a row of `FEATURES`; one whose function has a parameter `weights`
needs a file.
"""

import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ..data import to_bytes
from ..published.arrays import read
from ..training.files import digest, file_digest
from ..types import Array
from . import classifier, dinov2, inception
from .distances import Features, pca

BATCH = 256
"""The largest number of images in one call of a feature function."""


class Network(NamedTuple):
    """A network that makes features on the devices.

    Attributes:
      params: its parameters.
      outputs: (params, uint8 images `[n, height, width, 1 or 3]`) -> `features` `[n, d]`, and,
        of Inception, `spatial` and `logits`.
    """

    params: Any
    outputs: Callable[[Any, Array], dict[str, Array]]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of its outputs for one image."""
        image = jax.ShapeDtypeStruct((1, 32, 32, 3), np.uint8)
        return jax.tree.map(lambda x: x.shape, jax.eval_shape(self.outputs, self.params, image))


class Space(NamedTuple):
    """A feature space.

    Attributes:
      name: its name.
      sha256: hash of what determines it: weights, the examples it is fitted to, or code.
      features: images `[n, height, width, channels]` in [-1, 1] to features `[n, d]`.
      network: the network that makes the features, if `summing` may call it on the devices.
    """

    name: str
    sha256: str
    features: Features
    network: Network | None = None


def pca24(reference: np.ndarray) -> Space:
    """The 24 leading principal components of the reference examples' pixels."""
    return Space("pca24", digest(reference), pca(reference, 24))


def fashion_classifier(reference: np.ndarray) -> Space:
    """The hidden layer of a classifier of Fashion-MNIST, `[n, 64]` (see `classifier`)."""
    if reference.shape[1:] != classifier.SHAPE:
        raise ValueError(
            f"features=fashion_classifier: takes images {classifier.SHAPE}, the reference "
            f"examples are {reference.shape[1:]}"
        )
    params = classifier.load()
    hidden = jax.jit(lambda x: classifier.Classifier().apply({"params": params}, x)[1])
    sha256 = file_digest(classifier.WEIGHTS)
    return Space("fashion_classifier", sha256, _in_parts("fashion_classifier", hidden))


def of_network(
    name: str,
    known: tuple[str, ...],
    convert: Callable[[Path, dict[str, np.ndarray]], Any],
    outputs: Callable[[Any, Array], dict[str, Array]],
) -> Callable[[np.ndarray, Path], Space]:
    """A function (reference examples, file of weights) -> the space of a network.

    Args:
      name: of the space, with the published weights.
      known: hashes of the files that hold these.
      convert: (file, its arrays) -> parameters; a ValueError if the architecture is another.
      outputs: of `Network`.
    """

    def make(reference, weights):
        if reference.ndim != 4 or reference.shape[-1] not in (1, 3):
            raise ValueError(f"features={name}: takes images, not examples {reference.shape[1:]}")
        network = Network(convert(weights, read(weights)), outputs)
        sha256 = file_digest(weights)
        made = jax.jit(outputs)
        features = lambda x: made(network.params, to_bytes(x))["features"]
        called = name if sha256 in known else f"{name} of unknown weights"
        return Space(called, sha256, _in_parts(name, features), network)

    return make


FEATURES: dict[str, Callable[..., Space]] = {
    "pca24": pca24,
    "fashion_classifier": fashion_classifier,
    "inception": of_network("inception", inception.KNOWN, inception.convert, inception.outputs),
    "dinov2": of_network("dinov2", dinov2.KNOWN, dinov2.convert, dinov2.outputs),
}


def takes_weights(name: str) -> bool:
    """Whether a feature space needs a file of weights."""
    return name in FEATURES and "weights" in inspect.signature(FEATURES[name]).parameters


def named(name: str, reference: np.ndarray, weights: Path | None = None) -> Space:
    """The feature space with this name.

    Args:
      name: one of `FEATURES`, or `module:function`, your own function from images
        `[n, height, width, channels]` in [-1, 1], at most `BATCH` at once, to features `[n, d]`.
        The hash of such a space is that of the module's file: it does not cover files that the
        module reads.
      reference: examples `[n, ...]` in [-1, 1], which `pca24` is fitted to. Where the space
        `takes_weights`, one is enough.
      weights: the file of weights, where it takes one.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if there is no such space, it does not accept such examples, or the file does not
        hold its network.
    """
    check(name, weights)
    if name in FEATURES:
        return FEATURES[name](reference, **({} if weights is None else {"weights": weights}))
    function, file = _yours(name)
    return Space(name, file_digest(file), _in_parts(name, function))


def check(name: str, weights: Path | None = None) -> None:
    """Raise a ValueError unless there is such a space, with a file of weights if it needs one.

    Raises:
      FileNotFoundError: if there is no such file.
    """
    if name not in FEATURES:
        _yours(name)
    if takes_weights(name) != (weights is not None):
        needs = "needs a file of weights" if weights is None else "takes none"
        raise ValueError(f"features={name}, weights={weights}: it {needs}")
    if weights is not None and not weights.is_file():
        raise FileNotFoundError(f"weights={weights}: there is no such file")


def _yours(name):
    module_name, _, attribute = name.partition(":")
    if not attribute:
        raise ValueError(
            f"unknown features {name!r}: one of {', '.join(FEATURES)}, or module:function"
        )
    try:
        module = importlib.import_module(module_name)
        return getattr(module, attribute), Path(str(module.__file__))
    except (ImportError, AttributeError) as error:
        raise ValueError(f"features={name}: {error}") from error


def _in_parts(name, function):
    def features(x):
        parts = [np.asarray(function(x[k : k + BATCH])) for k in range(0, len(x), BATCH)]
        found = np.concatenate(parts)
        if found.ndim != 2 or len(found) != len(x) or not np.isfinite(found).all():
            raise ValueError(
                f"features={name}: gave an array {found.shape} for {len(x)} images: need finite "
                "numbers [n, d]"
            )
        return found

    return features
