"""Distances against closed forms, and feature spaces that say what they are."""

import json
import math
import pickle
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util

from diffjax import data
from diffjax.evaluation import (
    classifier,
    comparison,
    dinov2,
    distances,
    features,
    inception,
    reference,
    summing,
)
from diffjax.experiment import Config, Data, Sampling, resolve
from diffjax.experiment.dataset import cautions, check_data
from diffjax.models import UNetConfig
from diffjax.schedules import SCHEDULES
from diffjax.training import files
from diffjax.training.runners import RUNNERS

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
        if features.takes_weights(name):
            continue  # see below
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
        ("fid", "unknown features 'fid': one of pca24, fashion_classifier, inception, dinov2, or"),
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
        with pytest.raises(ValueError, match="distance of 1 examples: need at least 2"):
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


@pytest.mark.parametrize("name", [n for n, row in distances.METRICS.items() if not row.alone])
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
    said = lambda x, **changes: cautions(
        config := Config(**changes), resolve(config).schedule, data.Examples(x)
    )
    for shape, words in (
        ((8, 8, 2), "the 2 channels side by side, in grey"),
        ((5,), "the first two of 5 features"),
    ):
        (line,) = said(np.full((4, *shape), -1, np.float32))
        assert words in line
    moments = np.zeros((4, 8, 8, 8), np.float16)
    (line,) = said(moments, data=Data("npz", latents="sd"))
    assert "4 channels of latents" in line and "data.autoencoder=FILE" in line
    assert said(moments, data=Data("npz", latents="sd", autoencoder="vae")) == []
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
        weighting = "elbo" if schedule == "monotone" else "unit"
        for target in ("eps", "score"):
            options = {"schedule": schedule, "weighting": weighting, "target": target}
            assert said(digits.x, **options) == []


def random_params(shapes, seed=0):
    """Weights that keep the scale of what passes through them."""
    rng = np.random.default_rng(seed)
    draw = lambda x: np.float32(rng.standard_normal(x.shape) / np.sqrt(np.prod(x.shape[:-1])))
    return jax.tree.map(draw, shapes)


def published(style, shrink=16, seed=0):
    """A file's arrays of a narrow Inception, by the names of one kind of file."""
    rng = np.random.default_rng(seed)
    network = inception.Inception(shrink)
    shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 299, 299, 3)))["params"]
    arrays = {}
    for block, layer in inception.layers():
        height, width, inputs, outputs = shapes[f"{block.name}.{layer.name}".lstrip(".")][
            "kernel"
        ].shape
        kernel = rng.standard_normal((outputs, inputs, height, width))
        numbers = np.exp(0.1 * rng.standard_normal((4, outputs)))
        name = style.layer(block, layer)
        arrays[f"{name}_{style.kernel}"] = np.float32(kernel / np.sqrt(kernel[0].size / 2))
        for part, x in zip((style.beta, style.mean, style.variance), numbers[1:], strict=True):
            arrays[f"{name}_{part}"] = np.float32(x)
        if style.gamma:
            arrays[f"{name}_{style.gamma}"] = np.ones(outputs, np.float32)
    arrays[style.matrix] = np.float32(rng.standard_normal((1008, 2048 // shrink)))
    return arrays


@pytest.mark.parametrize("style", [inception.PYTORCH, inception.NVIDIA], ids=["pytorch", "nvidia"])
def test_inception_is_the_same_from_any_file(style, tmp_path):
    """The names of either kind of file lead to the same parameters, and unused arrays to none."""
    first = inception.convert(tmp_path, published(inception.PYTORCH), 16)
    arrays = published(style) | {style.unused[-1]: np.zeros(1008)}
    again = inception.convert(tmp_path, arrays, 16)
    jax.tree.map(np.testing.assert_array_equal, first, again)


def test_a_convolution_and_its_normalisation_are_one(tmp_path):
    """The first layer, by its definition: (conv(x) - mean) / sqrt(variance + 1e-3) gamma + beta."""
    arrays = published(inception.PYTORCH) | {
        "Conv2d_1a_3x3_bn_weight": np.float32([2.0, 0.5]),
    }
    layer = inception.convert(tmp_path, arrays, 16)["Conv2d_1a_3x3"]
    x = np.random.default_rng(1).standard_normal((3, 3, 3))
    kernel, (gamma, beta, mean, variance) = (
        arrays["Conv2d_1a_3x3_conv_weight"],
        (
            arrays[f"Conv2d_1a_3x3_bn_{part}"]
            for part in ("weight", "bias", "running_mean", "running_var")
        ),
    )
    plain = np.einsum("ocij,ijc->o", kernel, x)
    expected = (plain - mean) / np.sqrt(variance + 1e-3) * gamma + beta
    ours = np.einsum("ijco,ijc->o", layer["kernel"], x) + layer["bias"]
    np.testing.assert_allclose(ours, expected, rtol=1e-5)


def test_what_is_not_fids_network_is_refused_by_the_names_of_its_arrays(tmp_path):
    arrays = published(inception.PYTORCH)
    for change, message in (
        ({"fc_weight": np.zeros((1000, 128))}, "holds torchvision's Inception v3, which has the"),
        ({"AuxLogits.fc.weight": np.zeros(3)}, "holds torchvision's Inception v3, which has the"),
        ({"Mixed_6b_branch1x1_bn_bias": np.zeros(5)}, r"branch1x1_bn_bias is \(5,\), need \(12,\)"),
        ({"extra.weight": np.zeros(5)}, "extra_weight is not an array of it"),
    ):
        with pytest.raises(ValueError, match=message):
            inception.convert(tmp_path, arrays | change, 16)
    del arrays["Mixed_7c_branch_pool_conv_weight"]
    with pytest.raises(ValueError, match="Mixed_7c_branch_pool_conv_weight is missing, need"):
        inception.convert(tmp_path, arrays, 16)


def test_dinov2_is_built_from_the_names_of_its_file(tmp_path):
    """A narrow one: its arrays make the space; a missing or foreign one is named."""
    network = dinov2.ViT(width=64, depth=1)
    shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
    params = random_params(shapes["params"])
    arrays = {}
    for path, x in traverse_util.flatten_dict(params).items():
        x = np.moveaxis(x, (-1, -2), (0, 1)) if path[-1] == "kernel" else x
        leaf = "weight" if path[-1] in ("kernel", "scale") else path[-1]
        arrays[".".join((*path[:-1], leaf))] = np.ascontiguousarray(x)
    safetensors.numpy.save_file(arrays | {"mask_token": np.zeros(64)}, tmp_path / "a.safetensors")
    space = features.named("dinov2", IMAGES[:1], tmp_path / "a.safetensors")
    assert space.name == "dinov2 of unknown weights"
    jax.tree.map(np.testing.assert_array_equal, space.network.params, params)
    found = space.features(IMAGES[:2])
    # The class token is normalised last, then scaled and shifted: undone, its mean is 0, its std 1.
    plain = (found - arrays["norm.bias"]) / arrays["norm.weight"]
    np.testing.assert_allclose(plain.mean(1), 0, atol=1e-3)
    np.testing.assert_allclose(plain.std(1), 1, atol=1e-3)
    with pytest.raises(ValueError, match=r"blocks\.0\.ls1\.gamma is missing, or"):
        dinov2.convert(tmp_path, {n: x for n, x in arrays.items() if "ls1" not in n})
    with pytest.raises(ValueError, match="register_tokens is not an array of it"):
        dinov2.convert(tmp_path, arrays | {"register_tokens": np.zeros(3)})
    with pytest.raises(ValueError, match="need one position, and those of a square"):
        dinov2.convert(tmp_path, arrays | {"pos_embed": np.zeros((1, 8, 64))})


def test_images_are_resized_as_tensorflow_1_did():
    """A ramp tells where each pixel comes from: i * size / side, up to the last pixel."""
    for size in (32, 299, 512):
        ramp = jnp.broadcast_to(
            jnp.arange(size, dtype=jnp.float32)[None, :, None, None], (1, size, 4, 1)
        )
        rows = inception.resize(ramp)[0, :, 0, 0]
        exact = np.minimum(np.arange(299) * size / 299, size - 1)
        np.testing.assert_allclose(rows, exact, atol=1e-4)
    # By hand: two rows and two columns to four.
    small = jnp.array([[0.0, 10.0], [20.0, 50.0]])[None, :, :, None]
    found = inception.resize(small, 4)[0, :, :, 0]
    np.testing.assert_allclose(
        found, [[0, 5, 10, 10], [10, 20, 30, 30], [20, 35, 50, 50], [20, 35, 50, 50]]
    )
    grey = jnp.full((1, 8, 8, 1), 64, jnp.uint8)
    np.testing.assert_array_equal(inception.scaled(grey), np.full((1, 299, 299, 3), -0.5))


def toy_network(d=6):
    """Features by a random matrix, and as many more as Inception's."""
    rng = np.random.default_rng(0)
    params = np.float32(rng.standard_normal((12, d)) / 12)

    def outputs(params, x):
        flat = x[:, :2, :2].reshape(len(x), -1).astype(jnp.float32) / 64
        found = jnp.matmul(flat, params, precision="highest") + 100
        return {"features": found, "spatial": found[:, :3] ** 2, "logits": found[:, :5]}

    return features.Network(params, outputs)


BYTES = np.random.default_rng(2).integers(0, 256, (75, 32, 32, 3), np.uint8)


@pytest.mark.parametrize("parallel", [*RUNNERS])
def test_the_moments_on_the_devices_are_those_of_all_features_at_once(parallel, monkeypatch):
    """In parts of any length; a mean far from zero would cost the covariance its digits."""
    monkeypatch.setattr(summing, "PART", 30)
    network = toy_network()
    space = features.Space("toy", "0" * 64, None, network)
    summarise = summing.summariser(space, RUNNERS[parallel](1))
    summary = summarise([BYTES[:40], BYTES[40:43], BYTES[43:]], keep=50)
    out = jax.tree.map(np.float64, network.outputs(network.params, BYTES))
    for found, all_of in ((summary.moments, out["features"]), (summary.spatial, out["spatial"])):
        exact = distances.moments(all_of)
        np.testing.assert_allclose(found.mean, exact.mean, rtol=1e-6)
        scale = np.abs(exact.covariance).max()
        np.testing.assert_allclose(found.covariance, exact.covariance, atol=1e-5 * scale)
    np.testing.assert_allclose(summary.pool, out["features"][:50], rtol=1e-5)
    scores = [summing.class_score(out["logits"][k : k + 30]) for k in (0, 30, 60)]
    np.testing.assert_allclose(summary.scores, scores, rtol=1e-5)
    assert summarise([BYTES[:9]]).pool is None
    # Data of floats are rounded to the bytes that such networks are defined on.
    floats = summarise([data.take(data.Examples(BYTES), np.arange(75))["x"]])
    np.testing.assert_allclose(floats.moments.mean, summary.moments.mean, rtol=1e-6)


def test_the_score_of_classes_against_closed_forms():
    """n equally likely and certain classes give n; no information gives 1."""
    certain = 1e4 * np.eye(7)[np.arange(70) % 7]
    assert summing.class_score(certain) == pytest.approx(7)
    assert summing.class_score(np.ones((9, 4)) + np.arange(9)[:, None]) == pytest.approx(1)
    # Two classes, of probabilities 1/2 +- d: exp(KL) by hand.
    d = 0.3
    p = np.array([[0.5 + d, 0.5 - d], [0.5 - d, 0.5 + d]])
    expected = np.exp((0.5 + d) * np.log(1 + 2 * d) + (0.5 - d) * np.log(1 - 2 * d))
    assert summing.class_score(np.log(p)) == pytest.approx(expected)


def test_moments_are_enough_for_the_frechet_distance():
    a, b = normal(0, 50, d=3), normal(1, 60, d=3)
    of_moments = distances.frechet_distance(distances.moments(a), distances.moments(b))
    assert of_moments == distances.frechet_distance(a, b)
    found = distances.measure(
        distances.Summary(moments=distances.moments(a), scores=(2.0, 4.0)),
        distances.Summary(moments=distances.moments(b)),
    )
    assert found == {"frechet": of_moments, "class_score": 3}


def toy_space(sha256="0" * 64):
    return features.Space("toy", sha256, None, toy_network())


def test_statistics_are_read_from_the_files_of_others(tmp_path):
    rng = np.random.default_rng(0)
    mu, sigma, spatial = rng.standard_normal(6), np.eye(6), (np.zeros(3), np.eye(3))
    summary = distances.Summary(
        moments=distances.Moments(mu, sigma), spatial=distances.Moments(*spatial)
    )
    np.savez(tmp_path / "edm.npz", mu=mu, sigma=sigma)
    adm = {"mu": mu, "sigma": sigma, "mu_s": spatial[0], "sigma_s": spatial[1]}
    np.savez(tmp_path / "adm.npz", **adm, arr_0=BYTES)
    edm2 = {"num_images": 9, "fid": {"mu": mu, "sigma": sigma}, "fd_dinov2": {}}
    (tmp_path / "edm2.pkl").write_bytes(pickle.dumps(edm2, 4))
    reference.write(tmp_path / "ours.npz", summary, {"features": {"sha256": "0" * 64}})
    for name in ("edm.npz", "adm.npz", "edm2.pkl", "ours.npz"):
        found = reference.read(tmp_path / name, "inception", toy_space())
        np.testing.assert_array_equal(found.summary.moments.mean, mu)
        np.testing.assert_array_equal(found.summary.moments.covariance, sigma)
        assert (found.summary.spatial is not None) == (name in ("adm.npz", "ours.npz"))
        assert (found.images is not None) == (name == "adm.npz")
    with np.load(tmp_path / "ours.npz") as file:  # as EDM and pytorch-fid read it
        np.testing.assert_array_equal(file["mu"], mu)


def test_statistics_that_are_none_are_refused(tmp_path):
    mu, sigma = np.zeros(6), np.eye(6)
    good = distances.Summary(moments=distances.Moments(mu, sigma))
    reference.write(tmp_path / "ours.npz", good, {"features": {"sha256": "1" * 64}})
    for arrays, message in (
        ({"mu": np.zeros(5), "sigma": np.eye(5)}, "its mu is of 5 features, features=x are 6"),
        ({"mu": mu}, "lacks"),
        ({"mu": mu, "sigma": sigma * np.nan}, "mu or sigma is not finite"),
        ({"mu": mu, "sigma": np.eye(5)}, r"mu is \(6,\) and sigma \(5, 5\)"),
        ({"mu": mu, "sigma": sigma, "arr_0": np.zeros(3)}, "need uint8 images"),
    ):
        np.savez(tmp_path / "bad.npz", **arrays)
        with pytest.raises(ValueError, match=message):
            reference.read(tmp_path / "bad.npz", "x", toy_space())
    (tmp_path / "bad.pkl").write_bytes(pickle.dumps({"fid": print}))
    for name, message in (
        ("ours.npz", "it was made with other weights, of SHA-256 1111"),
        ("bad.pkl", "it has no fid"),
    ):
        with pytest.raises(ValueError, match=message):
            reference.read(tmp_path / name, "inception", toy_space())
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        reference.read(tmp_path / "none.npz", "inception", toy_space())
    with pytest.raises(ValueError, match="features=pca24 need examples"):
        reference.read(tmp_path / "ours.npz", "pca24", features.named("pca24", IMAGES))
