"""Distances between samples and data, in a named feature space.

`features` has the spaces. In some of them a distance has a name of its own: the Frechet distance in
the features of Inception is FID, in any other space it is not. A metric is a function and a row of
`METRICS`; `measure` applies those for which enough is known of both sets, which is a `Summary`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
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


class Moments(NamedTuple):
    """The mean `[d]` and the covariance `[d, d]`, divided by n - 1, of features, in float64."""

    mean: np.ndarray
    covariance: np.ndarray


def moments(features: np.ndarray) -> Moments:
    """The moments of features `[n, d]`.

    >>> moments(np.array([[1, 0], [3, 0]]))
    Moments(mean=array([2., 0.]), covariance=array([[2., 0.],
           [0., 0.]]))
    """
    (features,) = _float64(features)
    if len(features) < 2:
        raise ValueError(f"Frechet distance of {len(features)} examples: need at least 2")
    return Moments(features.mean(0), np.cov(features, rowvar=False).reshape(2 * features.shape[1:]))


def frechet_distance(a: np.ndarray | Moments, b: np.ndarray | Moments) -> float:
    """The Frechet distance between Gaussians fitted to features `[n, d]` and `[m, d]`.

    |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), in squared units of the features (Dowson &
    Landau 1982; Heusel et al. 2017). Small samples bias it upwards, so compare at equal n. Of a
    large set, its `Moments` are enough.

    Raises:
      ValueError: if there are fewer than two examples in either.

    >>> rng = np.random.default_rng(0)
    >>> a = rng.standard_normal((1000, 3))
    >>> print(f"{frechet_distance(a, a + [1, 2, 0]):.4f}")
    5.0000
    """
    (m_a, c_a), (m_b, c_b) = (x if isinstance(x, Moments) else moments(x) for x in (a, b))
    values, vectors = np.linalg.eigh(c_a)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    # C_a C_b has the eigenvalues of the symmetric root(C_a) C_b root(C_a).
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ c_b @ root), 0)).sum()
    gap = m_a - m_b
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


def precision_of_all(samples: np.ndarray, real: np.ndarray, k: int = 3) -> float:
    """As `precision`, with all examples of either set, however many.

    Dhariwal & Nichol 2021 compare 50,000 samples with 10,000 real examples in this way.

    >>> x = np.random.default_rng(0).standard_normal((100, 2))
    >>> precision_of_all(x[:10], x), precision_of_all(x[:10] + 100, x)
    (1.0, 0.0)
    """
    _enough(samples, real, k)
    samples, real = _float64(samples, real)
    return _in_manifold(samples, real, k)


def recall_of_all(samples: np.ndarray, real: np.ndarray, k: int = 3) -> float:
    """As `recall`, with all examples of either set, however many."""
    return precision_of_all(real, samples, k)


def inception_score(scores: Sequence[float]) -> float:
    """The mean of the scores of parts of the samples (Salimans et al. 2016).

    The score of a part is exp(E KL(p(class|sample), p(class))) (`summing.class_score`).
    """
    return float(np.mean(scores))


def _enough(samples, real, k):
    n = min(len(samples), len(real))
    if not 0 < k < n:
        raise ValueError(
            f"precision and recall of {len(samples)} samples and {len(real)} real "
            f"examples: need more than k={k} of each, and k at least 1"
        )
    return n


def _equally_many(samples, real, k):
    n = _enough(samples, real, k)
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


class Summary(NamedTuple):
    """What is known of a set of samples or real examples, in a feature space.

    Attributes:
      features: of all of them, `[n, d]`; None if they were not kept, or there are too many.
      moments: of the features.
      pool: features of Inception's, `[n, 2048]`, if they were kept.
      spatial: the moments of Inception's features of places in the image.
      scores: of parts of the samples, one after another, by Inception's probabilities of classes.
    """

    features: np.ndarray | None = None
    moments: Moments | None = None
    pool: np.ndarray | None = None
    spatial: Moments | None = None
    scores: tuple[float, ...] | None = None


class Metric(NamedTuple):
    """A row of `METRICS`.

    Attributes:
      measure: a function of two fields of `Summary`, of samples and of real examples, or, if
        `alone`, of one -> a number or `Estimate`.
      title: its name in tables.
      best: `min` or `max`, whichever is better.
      of: the field of `Summary`; of several, the first that both have.
      alone: whether it is a property of the samples.
      names: what it is called in feature spaces in which it has a name of its own.
    """

    measure: Callable[..., float | Estimate]
    title: str
    best: Callable[..., float]
    of: tuple[str, ...] = ("features",)
    alone: bool = False
    names: Mapping[str, str] = MappingProxyType({})


METRICS = {
    "frechet": Metric(
        frechet_distance,
        "Frechet distance",
        min,
        of=("moments",),
        names={"inception": "FID", "dinov2": "FDD"},
    ),
    "spatial_frechet": Metric(
        frechet_distance,
        "spatial Frechet distance",
        min,
        of=("spatial",),
        names={"inception": "sFID"},
    ),
    "kernel": Metric(
        kernel_distance,
        "kernel distance",
        min,
        of=("features", "pool"),
        names={"inception": "KID"},
    ),
    "class_score": Metric(
        inception_score,
        "score of classes",
        max,
        of=("scores",),
        alone=True,
        names={"inception": "Inception Score"},
    ),
    "precision": Metric(precision, "precision", max),
    "recall": Metric(recall, "recall", max),
    "precision_of_all": Metric(precision_of_all, "precision of all", max, of=("pool",)),
    "recall_of_all": Metric(recall_of_all, "recall of all", max, of=("pool",)),
}
"""Every metric that evaluate.py measures, by its name in evaluation.json."""


def measure(samples: np.ndarray | Summary, real: np.ndarray | Summary) -> dict[str, float]:
    """All of `METRICS` that what is known of samples and of real examples allows.

    Features `[n, d]` and `[m, d]` are enough for those that need no particular network. An
    `Estimate` adds `NAME_standard_error`.
    """
    samples, real = (
        x if isinstance(x, Summary) else Summary(x, moments(x)) for x in (samples, real)
    )
    found = {}
    for name, metric in METRICS.items():
        both = [(getattr(samples, field), getattr(real, field)) for field in metric.of]
        given = [ab[:1] if metric.alone else ab for ab in both]
        given = [ab for ab in given if all(x is not None for x in ab)]
        if not given:
            continue
        value = metric.measure(*given[0])
        if isinstance(value, Estimate):
            found |= {name: value.value, f"{name}_standard_error": value.standard_error}
        else:
            found[name] = value
    return found


def best_of(each: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The best value of every metric over several draws, and its mean, `NAME_mean`.

    >>> best_of([{"frechet": 2.0, "recall": 0.5}, {"frechet": 1.0, "recall": 0.75}])
    {'frechet': 1.0, 'frechet_mean': 1.5, 'recall': 0.75, 'recall_mean': 0.625}
    """
    found = {}
    for name in METRICS.keys() & each[0].keys():
        values = [scores[name] for scores in each]
        found |= {name: METRICS[name].best(values), f"{name}_mean": float(np.mean(values))}
    return dict(sorted(found.items()))


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
