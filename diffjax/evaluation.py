"""Distances between samples and data, in a feature space that is always named.

None of these is FID or KID: those names belong to one network's features. `features` has the
spaces that come with diffjax, and takes others.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

Features = Callable[[np.ndarray], np.ndarray]


def pca(x: np.ndarray, components: int) -> Features:
    """The projection on the leading principal components of data `[n, ...]`.

    Returns:
      A function `[m, ...]` -> `[m, components]`.
    """
    flat = _flat(x)
    mean = flat.mean(0)
    _, _, axes = np.linalg.svd(flat - mean, full_matrices=False)
    return lambda y: (_flat(y) - mean) @ axes[:components].T


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """The Frechet distance between Gaussians fitted to features `[n, d]` and `[m, d]`.

    |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), squared units of the features (Dowson &
    Landau 1982; Heusel et al. 2017). It is biased upwards by small samples: compare at equal n.

    >>> rng = np.random.default_rng(0)
    >>> a = rng.standard_normal((1000, 3))
    >>> print(f"{frechet_distance(a, a + [1, 2, 0]):.4f}")
    5.0000
    """
    c_a, c_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(c_a)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    # C_a C_b has the eigenvalues of the symmetric root(C_a) C_b root(C_a).
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ c_b @ root), 0)).sum()
    gap = a.mean(0) - b.mean(0)
    return float(gap @ gap + np.trace(c_a) + np.trace(c_b) - 2 * cross)


class Estimate(NamedTuple):
    """A number and its standard error."""

    value: float
    standard_error: float


def kernel_distance(a: np.ndarray, b: np.ndarray, block: int = 1000) -> Estimate:
    """The squared kernel distance of the distributions of features `[n, d]` and `[m, d]`.

    MMD^2 with k(x, y) = (x . y / d + 1)^3 (Binkowski et al. 2018, section 4; there in Inception's
    features, as KID): the mean of its unbiased estimate over disjoint blocks, drawn at random, with
    the standard error that the blocks' spread gives (Zaremba et al. 2013, "B-test"). It has no bias
    at any n, and so may be negative.

    Args:
      a: features.
      b: features of another set.
      block: examples in a block, at most: fewer if there would be less than ten blocks.

    Raises:
      ValueError: if there are less than 20 examples in either.

    >>> rng = np.random.default_rng(0)
    >>> a, b = rng.standard_normal((2, 5000, 2))
    >>> value, error = kernel_distance(a, b)
    >>> abs(value) < 3 * error
    True
    """
    n = min(len(a), len(b))
    block = min(block, n // 10)
    if block < 2:
        raise ValueError(f"kernel distance of {len(a)} and {len(b)} examples: need at least 20")
    rng = np.random.default_rng(0)  # the order of the examples may mean something
    blocks = [rng.permutation(len(x))[: n // block * block].reshape(-1, block) for x in (a, b)]
    found = [_squared_mmd(a[i], b[j]) for i, j in zip(*blocks, strict=True)]
    return Estimate(float(np.mean(found)), float(np.std(found, ddof=1) / np.sqrt(len(found))))


def _squared_mmd(x, y):
    """The unbiased estimate from as many x as y: no example is compared with itself."""
    n, d = x.shape
    within = sum(k.sum() - np.trace(k) for k in ((z @ z.T / d + 1) ** 3 for z in (x, y)))
    return within / (n * (n - 1)) - 2 * ((x @ y.T / d + 1) ** 3).mean()


class PrecisionRecall(NamedTuple):
    """How much of the samples looks like data, and how much of the data the samples cover."""

    precision: float
    recall: float


def precision_recall(samples: np.ndarray, real: np.ndarray, k: int = 3) -> PrecisionRecall:
    """The precision and recall of samples, by the manifolds of nearest neighbours.

    Kynkaanniemi et al. 2019: a set's manifold is the union of the balls about its examples that
    reach to the k-th nearest other one; precision is the fraction of the samples in the data's
    manifold, recall that of the data in the samples' manifold. Both depend on the size of the
    sets, so as many examples are taken of either.

    Args:
      samples: features `[n, d]`.
      real: features `[m, d]`.
      k: which neighbour a ball reaches to.

    Raises:
      ValueError: unless there are more than k examples in either.

    >>> x = np.random.default_rng(0).standard_normal((100, 2))
    >>> precision_recall(x[:50], x[:50])
    PrecisionRecall(precision=1.0, recall=1.0)
    >>> precision_recall(x[:50], x[50:] + 100)
    PrecisionRecall(precision=0.0, recall=0.0)
    """
    n = min(len(samples), len(real))
    if not 0 < k < n:
        raise ValueError(
            f"precision and recall of {len(samples)} samples and {len(real)} real "
            f"examples: need more than k={k} of each, and k at least 1"
        )
    rng = np.random.default_rng(0)
    samples, real = (x[rng.permutation(len(x))[:n]].astype(np.float64) for x in (samples, real))
    return PrecisionRecall(_in_manifold(samples, real, k), _in_manifold(real, samples, k))


def _in_manifold(x, of, k):
    """The fraction of x within the manifold of another set."""
    # The nearest example to each of them is itself, so the k-th other one is number k.
    radii = np.concatenate([np.partition(d, k, axis=1)[:, k] for d in _distances(of, of)])
    return float(np.mean(np.concatenate([(d <= radii).any(1) for d in _distances(x, of)])))


def _distances(x, y, rows=1000) -> Iterator[np.ndarray]:
    """Squared distances `[<= rows, len(y)]`, so many rows of x at a time."""
    for part in np.array_split(x, -(-len(x) // rows)):
        squares = (part**2).sum(1)[:, None] + (y**2).sum(1)[None] - 2 * part @ y.T
        yield np.maximum(squares, 0)


def distances(samples: np.ndarray, real: np.ndarray) -> dict[str, float]:
    """All of the above between the features of samples `[n, d]` and of real examples `[m, d]`.

    Returns:
      `frechet`, `kernel` and `kernel_standard_error`, `precision`, `recall`.
    """
    kernel = kernel_distance(samples, real)
    return {
        "frechet": frechet_distance(samples, real),
        "kernel": kernel.value,
        "kernel_standard_error": kernel.standard_error,
        **precision_recall(samples, real)._asdict(),
    }


def nearest_neighbour(x: np.ndarray, label: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """The classifier that gives an example the label of the nearest of x, by Euclidean distance.

    Returns:
      A function `[m, ...]` -> labels `[m]`.
    """
    flat = _flat(x)
    return lambda y: label[np.concatenate([d.argmin(1) for d in _distances(_flat(y), flat)])]


def score(
    x: np.ndarray, label: np.ndarray | None, real: np.ndarray, real_label: np.ndarray | None
) -> dict[str, float]:
    """How near samples are to data, and how often they are of the class asked for.

    Args:
      x: samples `[n, ...]` in [-1, 1].
      label: the classes asked for `[n]`, or None.
      real: data `[m, ...]` in [-1, 1].
      real_label: its classes `[m]`, or None.

    Returns:
      `frechet_pca24`: the Frechet distance of the samples from one random half of the data, in the
      data's 24 principal components; `frechet_pca24_real`: that of the other half. With labels,
      `accuracy`: how often the label of the nearest example in that other half is the label asked
      for; `accuracy_real`: the same for the first half's own examples.
    """
    order = np.random.default_rng(0).permutation(len(real))
    one, other = order[: len(real) // 2], order[len(real) // 2 :]
    features = pca(real, 24)
    n = min(len(x), len(one))  # the distance is biased by n: as many of either
    result = {
        "frechet_pca24": frechet_distance(features(x[:n]), features(real[one])),
        "frechet_pca24_real": frechet_distance(features(real[other[:n]]), features(real[one])),
    }
    if label is not None and real_label is not None:
        classify = nearest_neighbour(real[other], real_label[other])
        result["accuracy"] = float(np.mean(classify(x) == label))
        result["accuracy_real"] = float(np.mean(classify(real[one]) == real_label[one]))
    return result


def _flat(x):
    return np.asarray(x, np.float64).reshape(len(x), -1)
