"""Reference statistics: the moments of a data set's features, as a file.

Those of EDM and pytorch-fid (`.npz` with `mu` and `sigma`), ADM (the same, with `mu_s` and
`sigma_s` for sFID, and 10,000 images, `arr_0`, for precision and recall) and EDM2 (`.pkl`, for FID
and FDD) are read, and nothing in them is executed. `write` makes files of the first form, which
those read, with a field `about` that says what the statistics are of.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .. import data
from ..data import limits
from ..experiment.config import Eval
from ..published import torchfile
from ..training import parsing
from ..training.files import digest, file_digest, replacing
from ..training.runners import Runner
from ..training.store import as_path, fetched
from . import features, sampling, summing
from .distances import Moments, Summary
from .features import Space

EDM2 = {"inception": "fid", "dinov2": "fd_dinov2"}
"""EDM2's names of our feature spaces."""


class Statistics(NamedTuple):
    """The statistics of a data set that a file holds.

    Attributes:
      summary: its moments.
      images: some of its images, uint8 `[n, height, width, 3]`, if the file has any.
      sha256: of the file.
    """

    summary: Summary
    images: np.ndarray | None
    sha256: str


class Reference(NamedTuple):
    """A reference, and how to summarise samples in the same feature space.

    Attributes:
      summary: of the reference.
      summarise: (parts of samples, their number in all) -> their `Summary`.
      features: the name, the hash and the dimension of the feature space.
      about: what the reference is.
    """

    summary: Summary
    summarise: Callable[[Iterable[np.ndarray], int], Summary]
    features: dict[str, Any]
    about: dict[str, Any]


POOL = 10_000
"""The number of real examples that Inception's precision and recall compare with, as ADM's."""


def load(which: Eval, dataset: data.Dataset, data_name: str, runner: Runner) -> Reference:
    """Summarise a reference, a part of the data or a file, in a feature space.

    Args:
      which: the feature space, its weights, and the reference.
      dataset: the run's data.
      data_name: its name.
      runner: maps over the devices.

    Raises:
      FileNotFoundError: if a file is not there.
      ValueError: if a file does not hold what it is taken for, or the space takes no such data.
    """
    name = which.features or ""
    part = dataset.test if which.reference == "test" else dataset.train
    # Of a network with weights one example is enough, because it is not fitted to them.
    fitted = not features.takes_weights(name)
    examples = data.first(part, len(part.x) if fitted else 1)["x"]
    space = features.named(name, examples, which.weights)
    summarise = summing.summariser(space, runner)
    if is_file(which.reference):
        file = read(as_path(which.reference), name, space)
        summary, about = file.summary, {"file": Path(which.reference).name, "sha256": file.sha256}
        if file.images is not None:
            pool = summarise(sampling.parts_of(file.images), len(file.images)).pool
            summary = summary._replace(pool=pool)
    else:
        about = {"data": data_name, "part": which.reference, "n": len(part.x)}
        about["sha256"] = digest(part.x.source if isinstance(part.x, data.Mapped) else part.x)
        # In random order, so that the first features, which are kept, are of all classes.
        order = None if fitted else np.random.default_rng(0).permutation(len(part.x))
        summary = summarise(sampling.parts_of(part.x, order), POOL)
    of_samples = lambda parts, n: summarise(parts, 0 if summary.pool is None else n)
    dimension = 0 if summary.moments is None else len(summary.moments.mean)
    named = {"name": space.name, "sha256": space.sha256, "dimension": dimension}
    return Reference(summary, of_samples, named, about)


def is_file(reference: str) -> bool:
    """Whether a reference is named by a file, and not a part of the run's data."""
    return reference.endswith((".npz", ".pkl"))


def read(path: Path, name: str, space: Space) -> Statistics:
    """Read a file of statistics.

    Args:
      path: the file.
      name: the name of the feature space, in `FEATURES`.
      space: the feature space.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is damaged, holds something else, or was made in another feature space.
    """
    if not path.is_file():
        raise FileNotFoundError(f"reference={path}: there is no such file")
    if space.network is None:
        raise ValueError(f"reference={path}: features={name} need examples: give train or test")
    try:
        arrays = _edm2(path, name) if path.suffix == ".pkl" else _archive(path)
        found: dict[str, Any] = {
            field: _moments(arrays, *names) for field, names in FIELDS.items() if names[0] in arrays
        }
        images, about = arrays.get("arr_0"), _about(arrays)
        if images is not None and (images.ndim != 4 or images.dtype != np.uint8):
            raise ValueError(f"arr_0 is {images.dtype}{images.shape}, need uint8 images")
    except Exception as error:  # untrusted input may raise anything
        raise ValueError(f"{path} holds no statistics: {parsing.short(error)}") from error
    shapes = space.network.shapes()
    for field, moments in found.items():
        d = shapes[OUTPUTS[field]][-1]
        if len(moments.mean) != d:
            raise ValueError(
                f"reference={path}: its {FIELDS[field][0]} is of {len(moments.mean)} features, "
                f"features={name} are {d}"
            )
    sha256 = about.get("features", {}).get("sha256", space.sha256)
    if sha256 != space.sha256:
        raise ValueError(f"reference={path}: it was made with other weights, of SHA-256 {sha256}")
    return Statistics(Summary(**found), images, file_digest(path))


FIELDS = {"moments": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
"""The names of the arrays of moments, by our name for them."""
OUTPUTS = {"moments": "features", "spatial": "spatial"}
"""The outputs of a network whose moments they are."""


def write(path: Path, summary: Summary, about: dict[str, Any]) -> None:
    """Write the moments of a summary, and JSON that says what they are of.

    Raises:
      OSError: if the file cannot be written; an existing file is then left as it is.
    """
    arrays = {"about": np.array(json.dumps(about))}
    for field, names in FIELDS.items():
        moments = getattr(summary, field)
        if moments is not None:
            arrays |= dict(zip(names, moments, strict=True))
    with replacing(path) as new, new.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def _archive(path):
    with fetched(path) as here:
        return limits.read_npz(here, FIELDS["moments"], (*FIELDS["spatial"], "arr_0", "about"))


def _edm2(path, name):
    found = torchfile.read(path)
    field = EDM2.get(name, name)
    if not isinstance(found, dict) or not isinstance(found.get(field), dict):
        raise ValueError(f"it has no {field}")
    return {part: torchfile.numpy_array(found[field][part]) for part in FIELDS["moments"]}


def _moments(arrays, mean, covariance):
    m, c = (np.asarray(arrays[name], np.float64) for name in (mean, covariance))
    if m.ndim != 1 or c.shape != (len(m), len(m)):
        raise ValueError(f"{mean} is {m.shape} and {covariance} {c.shape}: need [d] and [d, d]")
    if not (np.isfinite(m).all() and np.isfinite(c).all()):
        raise ValueError(f"{mean} or {covariance} is not finite")
    return Moments(m, c)


def _about(arrays):
    about = parsing.parse(str(arrays["about"])) if "about" in arrays else {}
    return about if isinstance(about, dict) else {}
