"""Distances against closed forms, and feature spaces that say what they are."""

import json
import math
import sys

import numpy as np
import pytest

from diffjax import data
from diffjax.evaluation import classifier, comparison, distances, features
from diffjax.experiment import Config, Sampling, resolve
from diffjax.experiment.dataset import check_data, doubts
from diffjax.models import UNetConfig
from diffjax.schedules import SCHEDULES
from diffjax.training import files

MODEL = UNetConfig(width=8, mults=(1, 2), blocks=1, attention=(4,), groups=4)


def normal(seed, n, mean=0.0, std=1.0, d=1):
    return mean + std * np.random.default_rng(seed).standard_normal((n, d))


def test_the_frechet_distance_of_one_feature():
    """Of N(m, s^2): (m_a - m_b)^2 + (s_a - s_b)^2."""
    a, b = normal(0, 50, d=1), 3 * normal(1, 70, d=1) + 2
    exact = (a.mean() - b.mean()) ** 2 + (a.std(ddof=1) - b.std(ddof=1)) ** 2
    np.testing.assert_allclose(distances.frechet_distance(a, b), exact, rtol=1e-5)


def test_the_frechet_distance_of_gaussians_that_do_not_commute():
    """Bures' metric in two dimensions: tr (A B)^(1/2) = (tr AB + 2 (det AB)^(1/2))^(1/2)."""
    a_root, b_root = np.array([[1.0, 0.0], [0.9, 0.3]]), np.array([[0.5, 0.4], [0.0, 2.0]])
    n = 4000
    white = normal(0, n, d=2)
    white = (white - white.mean(0)) @ np.linalg.inv(
        np.linalg.cholesky(np.cov(white, rowvar=False)).T
    )
    a, b = white @ a_root.T, white @ b_root.T + [1.0, -2.0]
    cov_a, cov_b = a_root @ a_root.T, b_root @ b_root.T
    cross = math.sqrt(
        np.trace(cov_a @ cov_b) + 2 * math.sqrt(np.linalg.det(cov_a) * np.linalg.det(cov_b))
    )
    exact = 5 + np.trace(cov_a) + np.trace(cov_b) - 2 * cross
    np.testing.assert_allclose(distances.frechet_distance(a, b), exact, rtol=1e-9)
    assert abs(distances.frechet_distance(a, a)) < 1e-9


def test_the_kernel_distance_is_unbiased_and_its_error_honest():
    """In one dimension (xy + 1)^3 compares the first three moments: a closed form."""
    (m, s), (u, v) = (0.3, 0.5), (0.0, 0.6)
    gaps = m - u, m**2 + s**2 - u**2 - v**2, m**3 + 3 * m * s**2 - u**3 - 3 * u * v**2
    exact = 3 * gaps[0] ** 2 + 3 * gaps[1] ** 2 + gaps[2] ** 2
    # Blocks of three: with the diagonal the estimate would be nearly 1 too large.
    found = [
        distances.kernel_distance(normal((0, i), 60, m, s), normal((1, i), 45, u, v), block=3)
        for i in range(1000)
    ]
    values, errors = np.array(found).T
    spread = values.std()
    assert abs(values.mean() - exact) < 4 * spread / math.sqrt(len(found)) < 0.1
    np.testing.assert_allclose(math.sqrt((errors**2).mean()), spread, rtol=0.1)


def test_the_kernel_distance_of_a_set_in_any_order_is_about_zero():
    """Classes that come sorted are drawn into all of the blocks."""
    a, b = normal(0, 2000, d=3), normal(1, 2000, d=3)
    ordered = [np.sort(x, axis=0) for x in (a, b)]
    value, error = distances.kernel_distance(ordered[0], ordered[1][::-1])
    assert abs(value) < 4 * error
    with pytest.raises(ValueError, match="kernel distance of 19 and 2000 examples: need at least"):
        distances.kernel_distance(a[:19], b)


def precision_and_recall(samples, real, k=3):
    return distances.precision(samples, real, k), distances.recall(samples, real, k)


def test_precision_and_recall_see_what_is_missing_and_what_is_made_up():
    """Two modes far apart; a ball never reaches from one to the other."""
    left, right = normal(0, 300, -100, d=2), normal(1, 300, 100, d=2)
    both = np.concatenate([left, right])
    assert precision_and_recall(both, both) == (1, 1)
    assert precision_and_recall(left, right) == (0, 0)
    # One mode of two is dropped: all that is made is real, half of what is real is made.
    dropped = np.concatenate([normal(2, 300, -100, d=2), normal(3, 300, -100, d=2)])
    precision, recall = precision_and_recall(dropped, both)
    assert precision > 0.9 and 0.4 < recall < 0.5
    # One mode is made up: the other way round.
    precision, recall = precision_and_recall(both, dropped)
    assert 0.4 < precision < 0.5 and recall > 0.9
    with pytest.raises(ValueError, match="need more than k=3 of each"):
        precision_and_recall(left[:3], right)


def test_precision_and_recall_by_hand():
    """On a line, with k=1: each ball reaches to the nearest other example."""
    real, samples = np.array([[0.0], [1.0], [5.0]]), np.array([[1.9], [0.5], [20.0]])
    # Real balls: [-1, 1], [0, 2], [1, 9]. Balls of samples: [0.5, 3.3], [-0.9, 1.9], [1.9, 38.1].
    precision, recall = precision_and_recall(samples, real, k=1)
    assert (precision, recall) == (pytest.approx(2 / 3), 1)


def test_many_rows_are_taken_in_parts():
    a, b = normal(0, 2500, d=2), normal(1, 2500, d=2)
    found = precision_and_recall(a, b)
    assert min(found) > 0.95 and max(found) <= 1


IMAGES = np.random.default_rng(0).uniform(-1, 1, (40, 28, 28, 1)).astype(np.float32)


def test_every_feature_space_says_what_it_is():
    for name in features.FEATURES:
        features.check(name)
        space = features.named(name, IMAGES)
        found = space.features(IMAGES)
        assert space.name == name and len(space.sha256) == 64
        assert found.ndim == 2 and len(found) == 40 and np.isfinite(found).all()
        np.testing.assert_allclose(space.features(IMAGES[:7]), found[:7], rtol=1e-3, atol=1e-4)
    assert features.named("pca24", IMAGES[1:]).sha256 != features.named("pca24", IMAGES).sha256


def test_features_may_be_a_function_of_the_users(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    source = "def f(x): return x.mean((1, 2))\nbad = lambda x: x\n"
    (tmp_path / "mine.py").write_text(source)
    space = features.named("mine:f", IMAGES)
    np.testing.assert_allclose(space.features(IMAGES), IMAGES.mean((1, 2)))
    assert space.sha256 == files.file_digest(tmp_path / "mine.py")
    with pytest.raises(ValueError, match=r"features=mine:bad: gave an array \(40, 28, 28, 1\)"):
        features.named("mine:bad", IMAGES).features(IMAGES)
    for name, message in (
        ("inception", "unknown features 'inception': one of pca24, fashion_classifier, or module"),
        ("mine:g", "features=mine:g: .* no attribute 'g'"),
        ("nowhere:f", "features=nowhere:f: No module named 'nowhere'"),
    ):
        with pytest.raises(ValueError, match=message):
            features.check(name)
    sys.modules.pop("mine")
    with pytest.raises(ValueError, match=r"takes images \(28, 28, 1\), the reference .* \(8, 8, 1"):
        features.named("fashion_classifier", IMAGES[:, :8, :8])


def test_the_classifier_learns_and_is_kept(tmp_path):
    """Whether an image is bright at its top or at its bottom."""
    rng = np.random.default_rng(0)
    label = np.arange(128) % 2
    x = rng.uniform(-1, 0, (128, 28, 28, 1)).astype(np.float32)
    x[label == 0, :14] += 1
    x[label == 1, 14:] += 1
    examples = data.Examples(x, label)
    params = classifier.train(examples, epochs=3, batch_size=16, seed=0)
    classifier.save(params, tmp_path / "weights.safetensors")
    loaded = classifier.load(tmp_path / "weights.safetensors")
    assert classifier.accuracy(loaded, examples) > 0.95
    assert files.digest(loaded) == files.digest(params)
    assert classifier.WEIGHTS.stat().st_size < 1e6


def test_a_digest_is_of_places_dtypes_shapes_and_bytes():
    a = np.arange(6, dtype=np.int32)
    others = [{"a": a}, {"b": a}, {"a": a.astype(np.int64)}, {"a": a.reshape(2, 3)}, {"a": a[::-1]}]
    assert len({files.digest(tree) for tree in others}) == len(others)
    assert files.digest({"a": a.reshape(2, 3).T}) == files.digest(
        {"a": np.ascontiguousarray(a.reshape(2, 3).T)}
    )


def result(workdir, **changes):
    """A run's evaluation as evaluate.py writes it."""
    found = {"bound_bits_per_dim": 2.0, "bound_standard_error": 0.1, "frechet": 0.5, "recall": 0.6}
    found["held_out"] = {"n": 300, "levels": 17, "sha256": "a"}
    found["samples"] = {"n": 1000, "seed": 0}
    found["features"] = {"name": "pca24", "sha256": "b"}
    found["reference"] = {"sha256": "c"}
    workdir.mkdir()
    (workdir / comparison.RESULT).write_text(json.dumps(found | changes))
    return workdir


def test_runs_are_compared_and_the_best_are_marked(tmp_path):
    a = result(tmp_path / "a")
    result(tmp_path / "c", frechet=0.4, recall=0.5, flow_bits_per_dim=1.9)
    b = (tmp_path / "c" / comparison.RESULT).rename(tmp_path / "b.json")
    results = comparison.read([a, b])
    columns = {column.header: list(column.cells) for column in comparison.table(results).columns}
    assert columns == {
        "run": [str(a), str(b)],
        "bound, bits/dim": ["2 +- 0.1 *", "2 +- 0.1 *"],
        "flow, bits/dim": ["-", "1.9"],
        "Frechet distance": ["0.5", "0.4 *"],
        "recall": ["0.6 *", "0.5"],
    }
    panels = comparison.figure(results).axes
    assert [panel.get_xlabel().split("\n")[0] for panel in panels] == [*columns][1:]
    assert [len(panel.containers) for panel in panels] == [2, 1, 2, 2]


def test_a_frechet_distance_of_few_samples_says_so():
    found = {"frechet": 0.5, "features.dimension": 24, "features.name": "pca24"}
    found |= {"samples.n": 119, "reference.n": 1497}
    line, *more = comparison.lines(found)
    assert line == "Frechet distance: 0.5 (n=119, features=pca24)"
    assert len(more) == 1 and "mostly its own bias: 119 samples" in more[0]
    assert "120 or more" in more[0]
    assert len(comparison.lines(found | {"samples.n": 120})) == 1
    assert len(comparison.lines(found | {"samples.n": 120, "reference.n": 30})) == 2
    # As sampling shows: of sets from one distribution, the few are far apart.
    near = lambda n: distances.frechet_distance(normal(0, n, d=24), normal(1, 1000, d=24))
    assert near(30) > 3 * near(120) > 0


def test_the_distances_of_one_example_are_refused():
    for a, b in ((1, 30), (30, 1)):
        with pytest.raises(ValueError, match=f"distance of {a} and {b} examples: need at least 2"):
            distances.frechet_distance(normal(0, a, d=2), normal(1, b, d=2))
    with pytest.raises(ValueError, match=r"sampling.eval_samples=1: a distance needs at least 2"):
        resolve(Config(sampling=Sampling(eval_samples=1)))
    digits = data.load("digits")
    one = data.Examples(digits.test.x[:1])
    with pytest.raises(ValueError, match="at least 2 examples to train on and 2 held out, not 14"):
        check_data(Config(sampling=Sampling(eval_samples=9), model=MODEL), digits.train, one)


def test_what_is_not_comparable_is_refused_by_name(tmp_path):
    a = result(tmp_path / "a")
    for i, (changes, message) in enumerate(
        (
            ({"features": {"name": "pca24", "sha256": "d"}}, r"features.sha256: b \(.*, d \("),
            ({"samples": {"n": 50}}, r"samples.n: 1000 \(.*, 50 \("),
            ({"reference": {"sha256": "e"}}, "reference.sha256"),
            ({"held_out": {"n": 300, "levels": 17, "sha256": "f"}}, "held_out.sha256"),
        )
    ):
        b = result(tmp_path / str(i), **changes)
        with pytest.raises(ValueError, match=f"cannot be compared:\n  {message}"):
            comparison.read([a, b])
    # What another run has not measured stands in nobody's way.
    bits = result(tmp_path / "bits", held_out={"n": 9})
    found = json.loads((bits / comparison.RESULT).read_text())
    (bits / comparison.RESULT).write_text(
        json.dumps({k: v for k, v in found.items() if not k.startswith("bound")})
    )
    assert len(comparison.read([a, bits])) == 2
    with pytest.raises(FileNotFoundError, match="python evaluate.py --workdir="):
        comparison.read([tmp_path])
    (tmp_path / comparison.RESULT).write_text("{")
    with pytest.raises(ValueError, match="is not a file of evaluate.py"):
        comparison.read([tmp_path])


@pytest.mark.parametrize("name", [*distances.METRICS])
def test_distances_of_features_of_any_dtype_are_those_of_the_same_numbers_in_float64(name):
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 256, (2, 60, 4))
    metric = distances.METRICS[name].measure
    expected = metric(a.astype(np.float64), b.astype(np.float64))
    for dtype in (np.uint8, np.float16, np.float32, np.int32):
        np.testing.assert_array_equal(metric(a.astype(dtype), b.astype(dtype)), expected)


def test_what_is_hardly_meant_gets_a_line():
    digits = data.load("digits").train
    ramp = np.linspace(0, 1, 20, dtype=np.float32).reshape(10, 2)
    said = lambda x, **changes: doubts(
        config := Config(**changes), resolve(config).schedule, data.Examples(x)
    )
    zero_terminal = {"schedule": "cosine_betas", "schedule_options": {"max_beta": 1.0}}
    assert said(digits.x) == said(2 * ramp - 1) == []
    (line,) = said(ramp)
    assert "[0, 1]" in line and "store 2 x - 1" in line
    for target in ("eps", "score"):
        (line,) = said(digits.x, target=target, **zero_terminal)
        # 1 / alpha at the table's last log-SNR, -24.
        assert f"target={target}" in line and f"{math.exp(12):.1e} times" in line
    for target in ("x_0", "v", "flow", "F"):
        assert said(digits.x, target=target, **zero_terminal) == []
    for schedule in SCHEDULES:
        assert said(digits.x, schedule=schedule) == []
        assert said(digits.x, schedule=schedule, target="score") == []
