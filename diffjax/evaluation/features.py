"""Named feature spaces, in which `distances` between samples and data are measured.

Distances in different feature spaces cannot be compared, so a space has a name and the SHA-256 of
what determines it. FID is the Frechet distance in the features of one particular Inception network,
which does not come with diffjax; with your own function for these features, `yours:inception`, the
Frechet distance is FID.

A feature space is a function and a row of `FEATURES`.
"""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from ..training.files import digest, file_digest
from . import classifier
from .distances import Features, pca

BATCH = 256
"""The largest number of images in one call of a feature function."""


class Space(NamedTuple):
    """A feature space.

    Attributes:
      name: its name.
      sha256: hash of what determines it: weights, the examples it is fitted to, or code.
      features: images `[n, height, width, channels]` in [-1, 1] to features `[n, d]`.
    """

    name: str
    sha256: str
    features: Features


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


FEATURES: dict[str, Callable[[np.ndarray], Space]] = {
    "pca24": pca24,
    "fashion_classifier": fashion_classifier,
}


def named(name: str, reference: np.ndarray) -> Space:
    """The feature space with this name.

    Args:
      name: one of `FEATURES`, or `module:function`, your own function from images
        `[n, height, width, channels]` in [-1, 1], at most `BATCH` at once, to features `[n, d]`.
        The hash of such a space is that of the module's file: it does not cover files that the
        module reads.
      reference: examples `[n, ...]` in [-1, 1], which `pca24` is fitted to.

    Raises:
      ValueError: if there is no such space, or it does not accept such examples.
    """
    if name in FEATURES:
        return FEATURES[name](reference)
    function, file = _yours(name)
    return Space(name, file_digest(file), _in_parts(name, function))


def check(name: str) -> None:
    """Raise a ValueError unless there is a feature space of this name."""
    if name not in FEATURES:
        _yours(name)


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
