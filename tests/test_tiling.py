"""Windows that are blended: exact where pixels are independent, close where their range is short.

The oracle is a Gaussian field, whose exact denoiser is known for a window and for the whole image.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax
from diffjax.tiling import cover, tiled

SCHEDULE = diffjax.cosine(-10.0, 10.0)


def covariance(n, length):
    """Of pixels along one side: exp(-distance / length)."""
    return np.exp(-np.abs(np.arange(n)[:, None] - np.arange(n)) / length)


def field(height, width, length):
    """The exact denoiser of a Gaussian field, whose covariance is a product of both sides'."""
    (rows, down), (columns, right) = (
        map(jnp.asarray, np.linalg.eigh(covariance(n, length))) for n in (height, width)
    )
    turn = functools.partial(jnp.einsum, precision="highest")

    def denoise(x_t, t, cond=None):
        alpha, sigma = diffjax.scales_at(SCHEDULE, t, x_t)
        z = turn("bhwc,hi,wj->bijc", x_t, down, right)
        variance = jnp.outer(rows, columns)[None, :, :, None]
        spread = alpha**2 * variance + sigma**2
        back = lambda z: turn("bijc,hi,wj->bhwc", z, down, right)
        return diffjax.Prediction(back(alpha * variance * z / spread), back(sigma * z / spread))

    return denoise


@pytest.mark.parametrize(
    ("length", "size", "overlap"), [(16, 16, 3), (13, 8, 4), (100, 7, 1), (17, 16, 15), (65, 16, 5)]
)
def test_windows_cover_a_side_and_their_weights_add_up_to_one(length, size, overlap):
    starts, weights = cover(length, size, overlap)
    total = np.zeros(length)
    for start, weight in zip(starts, weights, strict=True):
        total[start : start + size] += weight
    np.testing.assert_allclose(total, 1, rtol=1e-12)
    assert (weights > 0).all() and (np.diff(starts) <= size - overlap).all()
    assert abs(np.diff(weights, axis=1)).max() <= np.pi / 2 / overlap + 1e-9  # sin^2 rises smoothly


@pytest.mark.parametrize("channels", [1, 4])
def test_what_needs_no_neighbours_is_the_same_in_windows(channels):
    """Any cond of the size of x_t is cut with it; t may differ in the batch."""
    x_t = jax.random.normal(jax.random.key(0), (3, 13, 20, channels))
    image = jax.random.normal(jax.random.key(1), x_t.shape)
    t, cond = jnp.array([0.2, 0.5, 0.9]), {"image": image, "label": jnp.arange(3)}

    def network(x_t, log_snr, cond):
        return jnp.tanh(x_t) * cond["image"] + cond["label"][:, None, None, None]

    denoise = diffjax.denoiser(network, SCHEDULE, "v", learned_variance=False)
    whole, parts = denoise(x_t, t, cond), tiled(denoise, (8, 6), 3)(x_t, t, cond)
    assert parts.x_0.shape == x_t.shape
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)
    bound = tiled(functools.partial(denoise, cond=cond), 8, 3)(x_t, t)
    np.testing.assert_allclose(bound.x_0, whole.x_0, atol=2e-6)


def test_the_small_images_of_super_resolution_are_cut_in_proportion():
    small = jax.random.normal(jax.random.key(1), (2, 8, 12, 1))
    enlarge = lambda x: jnp.repeat(jnp.repeat(x, 2, 1), 2, 2)

    def denoise(x_t, t, cond=None):
        return diffjax.Prediction(enlarge(cond["image"]), x_t)

    x_t, cond = jnp.zeros((2, 16, 24, 1)), {"image": small}
    found = tiled(denoise, 8, 4)(x_t, 0.5, cond).x_0
    np.testing.assert_allclose(found, enlarge(small), atol=1e-6)
    with pytest.raises(ValueError, match=r"image of .8, 12. in cond .* windows of .9, 9. at"):
        tiled(denoise, 9, 4)(x_t, 0.5, cond)


def test_a_variance_that_is_learned_is_blended_too():
    double = lambda x_t, log_snr, cond: jnp.concatenate([x_t, x_t / 2], -1)
    denoise = diffjax.denoiser(double, SCHEDULE, "eps", learned_variance=True)
    x_t = jax.random.normal(jax.random.key(0), (1, 12, 9, 2))
    found = tiled(denoise, 6, 2)(x_t, 0.5)
    np.testing.assert_allclose(found.fraction, denoise(x_t, 0.5).fraction, rtol=1e-5)


def test_windows_are_told_where_they_are():
    """From -1 at the first edge to 1 at the last, whatever the size, and 0 where there is one."""

    def denoise(x_t, t, cond=None):
        place = jnp.broadcast_to(cond["at"][None, None, None, :], x_t.shape)
        return diffjax.Prediction(place, place)

    tell = lambda cond, position: {"at": position}
    x_0 = tiled(denoise, 8, 4, tell)(jnp.zeros((1, 16, 32, 2)), 0.5).x_0[0]
    np.testing.assert_allclose(x_0[0, 0], [-1, -1], rtol=1e-6)
    np.testing.assert_allclose(x_0[-1, -1], [1, 1], rtol=1e-6)
    assert not tiled(denoise, 8, 4, tell)(jnp.zeros((1, 8, 32, 2)), 0.5).x_0[..., 0].any()
    assert (jnp.diff(x_0[:, 0, 0]) >= -1e-6).all() and (jnp.diff(x_0[0, :, 1]) >= -1e-6).all()


def test_a_field_in_windows_has_the_denoiser_of_the_whole_field():
    """Of 32 x 32 pixels with a correlation of 1/e at a distance of 1, in windows of 16 x 16."""
    whole, parts = field(32, 32, 1.0), tiled(field(16, 16, 1.0), 16, 8)
    x = jax.random.normal(jax.random.key(0), (4, 32, 32, 1))
    for t in (0.2, 0.5, 0.8):
        error = parts(x, t).x_0 - whole(x, t).x_0
        assert jnp.sqrt((error**2).mean()) < 2.5e-3  # of data of standard deviation 1


def drawn_covariance(denoise, make, height, width):
    """The covariance of the pixels of images that a sampler draws, `[pixels, pixels]`.

    Samplers of Gaussian data are linear, so that samples from unit vectors of noise are a square
    root of the covariance, without an error of chance.
    """
    x_1 = SCHEDULE(1.0)[1] * jnp.eye(height * width).reshape(-1, height, width, 1)
    ts = diffjax.log_snr_times(SCHEDULE, 40)
    walk = lambda x: diffjax.sample(jax.random.key(0), make(denoise, SCHEDULE), x, ts)[0]
    root = np.asarray(jax.jit(walk)(x_1)).reshape(height * width, -1)
    return root.T @ root


@pytest.mark.parametrize(
    ("make", "height", "length", "tolerance"),
    [
        (diffjax.heun, 1, 1.0, 0.005),
        (diffjax.heun, 1, 2.0, 0.018),
        (diffjax.dpm_solver_pp_2m, 1, 1.0, 0.005),
        (diffjax.dpm_solver_pp_2m, 24, 1.0, 0.005),
    ],
)
def test_a_field_drawn_in_windows_has_no_seams(make, height, length, tolerance):
    """The covariance of pixels that are drawn in windows of 16 is that of the whole field.

    It is compared with that of the sampler on the exact denoiser of the whole, whose steps are the
    same.
    """
    width, window = 64 if height == 1 else height, (min(height, 16), 16)
    exact = drawn_covariance(field(height, width, length), make, height, width)
    found = drawn_covariance(tiled(field(*window, length), window, 8), make, height, width)
    right = np.kron(covariance(height, length), covariance(width, length))
    assert abs(exact - right).max() < 0.02  # of the sampler's steps
    assert abs(found - exact).max() < tolerance
    starts, _ = cover(width, 16, 8)
    rows = found.reshape(height, width, height, width)[np.arange(height), :, np.arange(height)]
    for lag in (0, 1, 2, 4):
        pairs = np.diagonal(rows, lag, 1, 2).mean(0)
        across = np.isin(np.arange(len(pairs)) + lag, [*starts, *(starts + 16)])
        assert abs(pairs[across].mean() - pairs[~across].mean()) < tolerance


def test_windows_that_hardly_overlap_have_seams():
    """So that the test above can fail: their error is ten times as large."""
    whole, x = field(1, 64, 2.0), jax.random.normal(jax.random.key(0), (64, 1, 64, 1))
    error = lambda overlap: abs(
        tiled(field(1, 16, 2.0), (1, 16), overlap)(x, 0.4).x_0 - whole(x, 0.4).x_0
    ).max()
    assert error(1) > 3 * error(8)


@pytest.mark.parametrize(
    ("size", "overlap", "shape", "message"),
    [
        (8, 0, (16, 16), "size=8, overlap=0: need 1 <= overlap < size, or there are seams"),
        (8, 8, (16, 16), "size=8, overlap=8: need 1 <= overlap < size"),
        (0, 1, (16, 16), "size=0, overlap=1"),
        (8, 4, (16, 7), "windows of 8 pixels are larger than the image, of 7"),
        ((4, 16), 8, (16, 16), "overlap=8: windows of 4 pixels cannot cover 16 with it"),
        (8, 4, None, "need images"),
    ],
)
def test_windows_that_cannot_be_are_refused(size, overlap, shape, message):
    x_t = jnp.zeros((1, 8)) if shape is None else jnp.zeros((1, *shape, 1))
    with pytest.raises(ValueError, match=message):
        tiled(field(8, 8, 1.0), size, overlap)(x_t, 0.5)
