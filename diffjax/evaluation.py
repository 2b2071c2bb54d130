"""Distances between samples and data, in a feature space that is always named.

None of these is FID: that name belongs to one network's features.
"""

from collections.abc import Callable

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
    Landau 1982; Heusel et al. 2017, equation 6). It is biased upwards by small samples: compare at
    equal n.

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


def nearest_neighbour(x: np.ndarray, label: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """The classifier that gives an example the label of the nearest of x, by Euclidean distance.

    Returns:
      A function `[m, ...]` -> labels `[m]`.
    """
    flat = _flat(x)

    def nearest(y):
        return ((flat**2).sum(1) - 2 * y @ flat.T).argmin(1)

    def classify(y):
        parts = np.array_split(_flat(y), -(-len(y) // 1000))  # 1000 rows of distances at a time
        return label[np.concatenate([nearest(part) for part in parts])]

    return classify


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
