"""Distances between samples and data, in a named feature space.

None of these is FID or KID, which are defined for the features of one network. `features` has the
spaces that come with diffjax, and accepts others. A metric is a function and a row of `METRICS`.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

Features = Callable[[np.ndarray], np.ndarray]


def pca(x: np.ndarray, components: int) -> Features:
    """The projection onto the leading principal components of data `[n, ...]`.

    Returns:
      A function `[m, ...]` -> `[m, components]`.
    """
    flat = _flat(x)
    mean = flat.mean(0)
    _, _, axes = np.linalg.svd(flat - mean, full_matrices=False)
    return lambda y: (_flat(y) - mean) @ axes[:components].T


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """The Frechet distance between Gaussians fitted to features `[n, d]` and `[m, d]`.

    |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), in squared units of the features (Dowson &
    Landau 1982; Heusel et al. 2017). Small samples bias it upwards, so compare at equal n.

    Raises:
      ValueError: if there are fewer than two examples in either.

    >>> rng = np.random.default_rng(0)
    >>> a = rng.standard_normal((1000, 3))
    >>> print(f"{frechet_distance(a, a + [1, 2, 0]):.4f}")
    5.0000
    """
    a, b = _float64(a, b)
    if min(len(a), len(b)) < 2:
        raise ValueError(f"Frechet distance of {len(a)} and {len(b)} examples: need at least 2")
    c_a, c_b = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (a, b))
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
    """The squared kernel distance between the distributions of features `[n, d]` and `[m, d]`.

    MMD^2 with k(x, y) = (x . y / d + 1)^3 (Binkowski et al. 2018, section 4; there in Inception's
    features, as KID). The value is the mean of unbiased estimates over disjoint random blocks, and
    the standard error comes from their spread (Zaremba et al. 2013, "B-test"). For two independent
    sets it has no bias at any n, and can therefore be negative.

    Args:
      a: features.
      b: features of another set.
      block: the largest number of examples in a block; there are always at least ten blocks.

    Raises:
      ValueError: if there are fewer than 20 examples in either.

    >>> rng = np.random.default_rng(0)
    >>> a, b = rng.standard_normal((2, 5000, 2))
    >>> value, error = kernel_distance(a, b)
    >>> abs(value) < 3 * error
    True
    """
    a, b = _float64(a, b)
    n = min(len(a), len(b))
    block = min(block, n // 10)
    if block < 2:
        raise ValueError(f"kernel distance of {len(a)} and {len(b)} examples: need at least 20")
    rng = np.random.default_rng(0)  # the examples may be sorted
    blocks = [rng.permutation(len(x))[: n // block * block].reshape(-1, block) for x in (a, b)]
    found = [_squared_mmd(a[i], b[j]) for i, j in zip(*blocks, strict=True)]
    return Estimate(float(np.mean(found)), float(np.std(found, ddof=1) / np.sqrt(len(found))))


def _squared_mmd(x, y):
    """The unbiased estimate from equally many x and y: no example is compared with itself."""
    n, d = x.shape
    within = sum(k.sum() - np.trace(k) for k in ((z @ z.T / d + 1) ** 3 for z in (x, y)))
    return within / (n * (n - 1)) - 2 * ((x @ y.T / d + 1) ** 3).mean()


def precision(samples: np.ndarray, real: np.ndarray, k: int = 3) -> float:
    """The fraction of the samples that lie in the manifold of the data.

    Kynkaanniemi et al. 2019: a set's manifold is the union of the balls about its examples that
    reach to the k-th nearest other example. It depends on the size of the sets, so equally many
    examples of each are used.

    Args:
      samples: features `[n, d]`.
      real: features `[m, d]`.
      k: the neighbour to which a ball reaches.

    Raises:
      ValueError: unless there are more than k examples in either.

    >>> x = np.random.default_rng(0).standard_normal((100, 2))
    >>> precision(x[:50], x[:50]), precision(x[:50], x[50:] + 100)
    (1.0, 0.0)
    """
    samples, real = _equally_many(samples, real, k)
    return _in_manifold(samples, real, k)


def recall(samples: np.ndarray, real: np.ndarray, k: int = 3) -> float:
    """The fraction of the data that lies in the manifold of the samples; see `precision`."""
    samples, real = _equally_many(samples, real, k)
    return _in_manifold(real, samples, k)


def _equally_many(samples, real, k):
    n = min(len(samples), len(real))
    if not 0 < k < n:
        raise ValueError(
            f"precision and recall of {len(samples)} samples and {len(real)} real "
            f"examples: need more than k={k} of each, and k at least 1"
        )
    rng = np.random.default_rng(0)
    return [x[rng.permutation(len(x))[:n]] for x in _float64(samples, real)]


def _in_manifold(x, of, k):
    """The fraction of x within the manifold of another set."""
    # The nearest neighbour of each example is itself, so index k is the k-th other example.
    radii = np.concatenate([np.partition(d, k, axis=1)[:, k] for d in _distances(of, of)])
    return float(np.mean(np.concatenate([(d <= radii).any(1) for d in _distances(x, of)])))


def _distances(x, y, rows=1000) -> Iterator[np.ndarray]:
    """Yield squared distances `[<= rows, len(y)]`, for at most `rows` rows of x at a time."""
    for part in np.array_split(x, -(-len(x) // rows)):
        squares = (part**2).sum(1)[:, None] + (y**2).sum(1)[None] - 2 * part @ y.T
        yield np.maximum(squares, 0)


class Metric(NamedTuple):
    """A row of `METRICS`.

    Attributes:
      measure: (features of samples `[n, d]`, of real examples `[m, d]`) -> a number or `Estimate`.
      title: its name in tables.
      best: `min` or `max`, whichever is better.
    """

    measure: Callable[[np.ndarray, np.ndarray], float | Estimate]
    title: str
    best: Callable[..., float]


METRICS = {
    "frechet": Metric(frechet_distance, "Frechet distance", min),
    "kernel": Metric(kernel_distance, "kernel distance", min),
    "precision": Metric(precision, "precision", max),
    "recall": Metric(recall, "recall", max),
}
"""Every metric that evaluate.py measures, by its name in evaluation.json."""


def measure(samples: np.ndarray, real: np.ndarray) -> dict[str, float]:
    """All of `METRICS` between the features of samples `[n, d]` and of real examples `[m, d]`.

    An `Estimate` adds `NAME_standard_error`.
    """
    found = {}
    for name, metric in METRICS.items():
        value = metric.measure(samples, real)
        if isinstance(value, Estimate):
            found |= {name: value.value, f"{name}_standard_error": value.standard_error}
        else:
            found[name] = value
    return found


def nearest_neighbour(x: np.ndarray, label: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """A classifier that gives an example the label of its nearest neighbour in x (Euclidean).

    Returns:
      A function `[m, ...]` -> labels `[m]`.
    """
    flat = _flat(x)
    return lambda y: label[np.concatenate([d.argmin(1) for d in _distances(_flat(y), flat)])]


def from_halves(
    x: np.ndarray, label: np.ndarray | None, real: np.ndarray, real_label: np.ndarray | None
) -> dict[str, float]:
    """Compare samples with one half of the data, and do the same with the other half as samples.

    Args:
      x: samples `[n, ...]` in [-1, 1].
      label: the classes that were requested `[n]`, or None.
      real: data `[m, ...]` in [-1, 1].
      real_label: the classes of the data `[m]`, or None.

    Returns:
      `frechet_pca24`: the Frechet distance of the samples from one random half of the data, in the
      data's 24 principal components; `frechet_pca24_real`: the same distance of the other half.
      With labels, `accuracy`: how often the nearest example in the other half has the requested
      label; `accuracy_real`: the same for the examples of the first half.
    """
    order = np.random.default_rng(0).permutation(len(real))
    one, other = order[: len(real) // 2], order[len(real) // 2 :]
    features = pca(real, 24)
    n = min(len(x), len(one))  # the distance is biased by n, so take equally many
    result = {
        "frechet_pca24": frechet_distance(features(x[:n]), features(real[one])),
        "frechet_pca24_real": frechet_distance(features(real[other[:n]]), features(real[one])),
    }
    if label is not None and real_label is not None:
        classify = nearest_neighbour(real[other], real_label[other])
        result["accuracy"] = float(np.mean(classify(x) == label))
        result["accuracy_real"] = float(np.mean(classify(real[one]) == real_label[one]))
    return result


def _float64(*features):
    """Features of any dtype: products of integers wrap, and those of float16 overflow."""
    return [np.asarray(x, np.float64) for x in features]


def _flat(x):
    return np.asarray(x, np.float64).reshape(len(x), -1)
