"""Augmentations: what is known exactly of an affine map, and that the network is told."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sample
import train
from diffjax import augmentations, data
from diffjax.augmentations import AUGMENTATIONS, SYM6, crop, edm, warp
from diffjax.evaluation import sampling
from diffjax.experiment import Config, Data, Sampling, resolve
from diffjax.experiment.rules import cautions, check_data
from diffjax.models import UNetConfig
from diffjax.published import weights

NOISE = jnp.asarray(np.random.default_rng(0).standard_normal((16, 12, 3)), jnp.float32)


def turn(angle):
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def blob(centre, n=24):
    """A smooth image: a Gaussian about a point, (down, right) from the centre, in pixels."""
    r = np.arange(n) - (n - 1) / 2
    down, right = r[:, None] - centre[0], r[None] - centre[1]
    return jnp.asarray(np.exp(-(down**2 + right**2) / 18), jnp.float32)[..., None]


def test_the_wavelet_is_orthonormal():
    products = [SYM6[2 * k :] @ SYM6[: len(SYM6) - 2 * k] for k in range(6)]
    np.testing.assert_allclose(products, [1, 0, 0, 0, 0, 0], atol=1e-11)
    np.testing.assert_allclose(SYM6.sum(), np.sqrt(2))


def test_a_map_that_moves_whole_pixels_is_exact():
    inside = (slice(4, -4),) * 2
    still = warp(NOISE, jnp.eye(2), jnp.zeros(2))
    np.testing.assert_allclose(still[inside], NOISE[inside], atol=2e-6)
    moved = warp(NOISE, jnp.eye(2), jnp.array([2 / 16, -1 / 12]))
    np.testing.assert_allclose(moved[6:-4, 4:-4], NOISE[4:-6, 5:-3], atol=2e-6)


@pytest.mark.parametrize("angle", [0.4, np.pi / 2, -2.5])
def test_a_smooth_image_goes_where_the_map_says(angle):
    """Of a round blob the centre alone moves; enlarged, it is the blob of another width."""
    at = np.array([2.0, -3.0])
    found = warp(blob(at), jnp.asarray(turn(angle)), jnp.array([1 / 24, -2 / 24]))
    inside = (slice(5, -5),) * 2  # the corners show reflections
    expected = blob(turn(angle) @ at + [1, -2])
    np.testing.assert_allclose(found[inside], expected[inside], atol=0.03)


def test_what_lies_beyond_the_edges_is_the_reflection():
    both = jnp.concatenate([NOISE, NOISE[::-1]])  # the image and what follows below it
    found = warp(NOISE, jnp.eye(2), jnp.array([-6 / 16, 0]))
    np.testing.assert_allclose(found[:-4, 4:-4], both[6:18, 4:-4], atol=0.5)
    flat = warp(jnp.ones((8, 8, 1)), jnp.asarray(3 * turn(1.0)), jnp.array([2.3, -7.1]))
    np.testing.assert_allclose(flat, 1, atol=1e-5)


def test_nothing_is_told_of_an_image_that_was_not_augmented():
    for seed in range(4):
        x, told = edm(p=0.0).draw(jax.random.key(seed), NOISE)
        np.testing.assert_array_equal(told[1:], 0)
        np.testing.assert_array_equal(x, NOISE[:, ::-1] if told[0] else NOISE)


def test_what_is_told_is_what_was_done():
    """The numbers determine the map, so that it can be made again from them."""
    draw = jax.jit(edm(p=0.7).draw)
    for seed in range(5):
        x, told = draw(jax.random.key(seed), blob((3.0, -2.0), 48))
        mirrored, turned, larger, cos, sin, along, across, *moved = np.asarray(told, float)
        at = np.array([3.0, -2.0]) * [1 - 2 * turned, 1 - 2 * mirrored]
        longer, angle = np.hypot(along, across), np.arctan2(across, along)
        stretch = turn(angle) @ np.diag(2 ** (0.2 * longer * np.array([1, -1]))) @ turn(-angle)
        matrix = 2 ** (0.2 * larger) * stretch @ turn(np.arctan2(sin, cos + 1))
        centre = matrix @ at + 0.125 * 48 * np.array(moved)
        r = np.arange(48) - 23.5
        points = np.stack(np.meshgrid(r, r, indexing="ij"), -1) - centre
        expected = np.exp(-((points @ np.linalg.inv(matrix).T) ** 2).sum(-1) / 18)
        near = (abs(points) < 5).all(-1)  # where no reflection reaches
        np.testing.assert_allclose(x[..., 0][near], expected[near], atol=0.04)


@pytest.mark.faults
def test_each_happens_as_often_as_it_should():
    told = jax.vmap(lambda key: edm(p=0.25).draw(key, jnp.zeros((2, 2, 1)))[1])(
        jax.random.split(jax.random.key(0), 4000)
    )
    rates = np.asarray(told != 0).mean(0)
    np.testing.assert_allclose(rates, [0.5, 0.125, *[0.25] * 7], atol=0.03)
    assert abs(np.asarray(told[:, 2])[told[:, 2] != 0].std() - 1) < 0.1


def test_a_window_is_a_window_of_the_reflected_image():
    wide = np.pad(NOISE, ((3, 3), (3, 3), (0, 0)), "symmetric")
    seen = set()
    for seed in range(12):
        x, told = crop(pad=3.0).draw(jax.random.key(seed), NOISE)
        down, right = np.rint(3 * np.asarray(told)).astype(int) + 3
        np.testing.assert_array_equal(x, wide[down : down + 16, right : right + 12])
        seen.add((down, right))
    assert len(seen) > 6


def test_a_window_is_a_part_of_the_image_and_its_place_is_told():
    height, width = NOISE.shape[:2]
    room = np.array([height, width]) - 5
    draw, seen = jax.jit(augmentations.window(side=5).draw), set()
    for seed in range(40):
        x, told = draw(jax.random.key(seed), NOISE)
        down, right = np.rint((np.asarray(told) + 1) / 2 * room).astype(int)
        np.testing.assert_array_equal(x, NOISE[down : down + 5, right : right + 5])
        seen.add((down, right))
    rows, columns = zip(*seen, strict=True)
    assert min(rows) == min(columns) == 0
    assert max(rows) == height - 5 and max(columns) == width - 5
    x, told = augmentations.window(side=12.0).draw(jax.random.key(0), NOISE[:12, :12])
    np.testing.assert_array_equal(x, NOISE[:12, :12])
    assert not np.asarray(told).any()


CONFIG = Config(
    data=Data("digits"),
    augmentation="edm",
    augmentation_options={"p": 1.0},
    model=UNetConfig(width=8, mults=(1,), blocks=1, groups=4, attention=(), augment_dim=9),
    batch_size=8,
)


@pytest.mark.faults
def test_training_is_told_and_samples_and_held_out_losses_are_of_images_as_they_are():
    e = resolve(CONFIG)
    batch = data.train_batch(data.load("digits").train, 0, 0, 8)
    seen = []

    def apply(params, x_t, log_snr, cond, **_):
        seen.append(cond["augment"])
        return x_t

    e = e._replace(apply=apply)
    for held_out in (None, 8):
        loss = train.make_loss(e, None, held_out)
        loss(jax.random.key(0), {}, batch, e.times.init())
    assert (np.asarray(seen[0]) != 0).any(1).all() and not np.asarray(seen[1]).any()
    cond = e.condition(jax.random.split(jax.random.key(0), 8), batch)
    assert cond["augment"].shape == (8, 9) and not cond["augment"].any()


WINDOWS = dataclasses.replace(
    CONFIG,
    augmentation="window",
    augmentation_options={"side": 4},
    model=dataclasses.replace(CONFIG.model, augment_dim=2),
)


@pytest.mark.faults
def test_a_run_on_windows_is_told_where_they_are_and_draws_whole_images():
    e = resolve(WINDOWS)
    batch = data.train_batch(data.load("digits").train, 0, 0, 8)
    seen = []

    def apply(params, x_t, log_snr, cond, **_):
        seen.append((x_t.shape, cond["augment"]))
        return jnp.broadcast_to(cond["augment"][:, None, :1, None], x_t.shape)

    e = e._replace(apply=apply)
    for held_out in (None, 8):  # neither sees a whole image
        train.make_loss(e, None, held_out)(jax.random.key(0), {}, batch, e.times.init())
    for shape, told in seen:
        assert shape == (8, 4, 4, 1) and np.asarray(told).std(0).min() > 0.1
    denoise = e.denoiser(functools.partial(apply, {}))
    cond = e.condition(jax.random.split(jax.random.key(0), 2), batch)
    eps = denoise(jnp.zeros((2, 8, 12, 1)), 0.5, cond).eps  # the network's output: where it is
    np.testing.assert_allclose(eps[:, [0, -1], 3, 0], [[-1, 1]] * 2, atol=1e-6)
    assert (jnp.diff(eps[0, :, 0, 0]) >= 0).all()


def test_a_run_on_windows_has_the_parameters_of_a_window():
    shapes = lambda shape: jax.tree.map(
        jnp.shape, jax.eval_shape(lambda key: resolve(WINDOWS).init(key, shape), jax.random.key(0))
    )
    assert shapes((4, 4, 1)) == shapes((64, 32, 1))


@pytest.mark.faults
def test_a_run_on_windows_draws_samples_of_another_size(tmp_path):
    e = resolve(dataclasses.replace(WINDOWS, data=Data("digits", shape=(8, 8, 1))))
    weights.save(tmp_path / "a.safetensors", e.init(jax.random.key(0), (8, 8, 1)), e.config)
    for shape, overlap in (("8 8 1", 2), ("10 13 1", 3)):
        out = tmp_path / f"{overlap}.npz"
        sample.main(
            f"--workdir={tmp_path}/a.safetensors --shape {shape} --n=3 --steps=2 --out={out} "
            f"--overlap={overlap}".split()
        )
        assert sampling.read(out)[0].x.shape == (3, *map(int, shape.split()))
    with pytest.raises(SystemExit, match=r"side=4 is larger than images of \(3, 8\)"):
        sample.main(f"--workdir={tmp_path}/a.safetensors --shape 3 8 1 --out={out}".split())


@pytest.mark.faults
def test_a_network_reads_what_it_is_told():
    e = resolve(CONFIG)
    params = e.init(jax.random.key(0), (8, 8, 1))
    params = jax.tree.map(lambda x: x + 0.1, params)  # the last layer starts at zero
    x, t = jnp.ones((2, 8, 8, 1)), jnp.zeros(2)
    out = [e.apply(params, x, t, {"augment": jnp.full((2, 9), a)}) for a in (0.0, 0.5)]
    assert abs(out[0] - out[1]).max() > 1e-3


def test_windows_larger_than_the_images_are_refused_before_anything_is_compiled():
    config = dataclasses.replace(WINDOWS, augmentation_options={"side": 9})
    with pytest.raises(ValueError, match=r"window: side=9 is larger than images of \(8, 8\)"):
        check_data(config, *data.load("digits"))


WINDOW = {
    name: getattr(WINDOWS, name) for name in ("augmentation", "augmentation_options", "model")
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"augmentation": "cutout"}, "unknown augmentation 'cutout': one of edm, crop, window"),
        ({"augmentation_options": {"p": 2.0}}, r"p=2.0: must be in \[0, 1\]"),
        ({"augmentation_options": {"q": 2}}, "augmentation edm has no option q; it has p, scale"),
        ({"augmentation": "crop", "augmentation_options": {}}, "augmentation crop has 2 numbers"),
        (
            {"augmentation": "crop", "augmentation_options": {"pad": 0.5}},
            "pad=0.5: must be a",
        ),
        (
            {"augmentation": "window", "augmentation_options": {}},
            "augmentation window needs side=NUMBER",
        ),
        (
            {"augmentation": "window", "augmentation_options": {"side": 0}},
            "side=0: must be a whole number of at least 1",
        ),
        (
            {"sampling": Sampling(overlap=4)},
            "sampling.overlap=4: must be at least 1, with augmentation=window",
        ),
        (
            {**WINDOW, "sampling": Sampling(overlap=4)},
            "sampling.overlap=4: must be at least 1, and less than the side of windows, 4",
        ),
        ({**WINDOW, "sampling": Sampling(overlap=0)}, "sampling.overlap=0: must be at least 1"),
        ({"augmentation": None}, "model.augment_dim=9, augmentation_options={'p': 1.0}: need an"),
        ({"data": Data("npz", latents="sd")}, "augmentation=edm: latents are not augmented"),
    ],
)
def test_what_makes_no_sense_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        resolve(dataclasses.replace(CONFIG, **changes))


def test_a_network_that_is_not_told_is_worth_a_line():
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, augment_dim=0))
    (line,) = cautions(config, resolve(config).schedule, data.load("digits").train)
    assert "the network is not told of it" in line
    assert (
        set(AUGMENTATIONS) == {"edm", "crop", "window"}
        and augmentations.edm is AUGMENTATIONS["edm"]
    )
