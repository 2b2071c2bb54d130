import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax
from catalogue import DETERMINISTIC, each, slow
from diffjax import inverse, oracles

SCHEDULE = diffjax.cosine(-10.0, 10.0)
IMAGE = (2, 4, 4, 3)
KERNEL = np.array([[0.1, 0.2, 0.0], [0.2, 0.3, 0.1], [0.0, 0.1, 0.0]])
OPERATORS = {
    "inpainting": inverse.inpainting(jnp.zeros((4, 4, 3)).at[1:3].set(1.0)),
    "downsampling": inverse.downsampling(2),
    "blurring": inverse.with_svd(inverse.blurring(KERNEL), IMAGE[1:]),
    "greying": inverse.greying(),
    "sensing": inverse.with_svd(
        inverse.compressed_sensing(jax.random.key(3), 12, IMAGE[1:]), IMAGE[1:]
    ),
    "sensing, more than the data": inverse.with_svd(
        inverse.compressed_sensing(jax.random.key(3), 60, IMAGE[1:]), IMAGE[1:]
    ),
}
every_operator = pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)


def matrix(operator):
    """A as a matrix on flattened images."""
    basis = jnp.eye(48).reshape(48, 4, 4, 3)
    return np.asarray(operator(basis).reshape(48, -1).T, np.float64)


def images(oracle):
    """A denoiser of flat vectors as one of images."""

    def denoise(x_t, t, cond=None):
        prediction = oracle(x_t.reshape(len(x_t), -1), t)
        return diffjax.Prediction(*(p.reshape(x_t.shape) for p in prediction))

    return denoise


def posterior(mean, cov, a, y, noise):
    """Mean and covariance of N(mean, cov) given y = a x + noise z."""
    gain = cov @ a.T @ np.linalg.pinv(a @ cov @ a.T + noise**2 * np.eye(len(a)), rcond=1e-10)
    return mean + gain @ (y - a @ mean), cov - gain @ a @ cov


def test_a_blur_is_the_convolution_that_scipy_knows():
    from scipy.ndimage import convolve

    x = np.asarray(jax.random.normal(jax.random.key(0), IMAGE))
    got = inverse.blurring(KERNEL)(jnp.asarray(x))
    for i in range(2):
        for c in range(3):
            expected = convolve(x[i, ..., c], KERNEL, mode="constant")
            np.testing.assert_allclose(got[i, ..., c], expected, atol=1e-6)


@every_operator
def test_a_decomposition_is_that_of_the_matrix(operator):
    """Its coordinates are orthonormal, A is a product in them, and LAPACK has the same values."""
    svd, x = operator.svd, jax.random.normal(jax.random.key(0), IMAGE)
    z = svd.coordinates(x)
    np.testing.assert_allclose(svd.data(z), x, atol=1e-5)
    flat = lambda a: a.reshape(len(a), -1)
    np.testing.assert_allclose((flat(z) ** 2).sum(1), (flat(x) ** 2).sum(1), rtol=1e-5)
    values = np.broadcast_to(np.asarray(svd.values, np.float32), z.shape)
    measured = np.where(values > 0, svd.measured(operator(x)), 0)
    np.testing.assert_allclose(measured, values * z, atol=1e-5)
    theirs = np.linalg.svd(matrix(operator))[1]
    ours = np.sort(values[0].reshape(-1))[::-1]
    np.testing.assert_allclose(ours[: len(theirs)], theirs[: len(ours)], atol=1e-5)
    np.testing.assert_array_equal(ours[len(theirs) :], 0)


def test_random_combinations_are_as_large_as_what_they_combine():
    operator = inverse.compressed_sensing(jax.random.key(0), 40, (100,))
    y = operator(jax.random.normal(jax.random.key(1), (500, 100)))
    np.testing.assert_allclose(y.std(), 1.0, atol=0.05)


def test_phases_are_lost_and_nothing_else():
    """The energy stays, and neither a sign, a half-turn nor a shift within the padding is seen."""
    operator = inverse.phase_retrieval(2)
    x = jax.random.normal(jax.random.key(0), IMAGE)
    y = operator(x)
    assert y.shape == (2, 8, 8, 3)
    np.testing.assert_allclose((y**2).sum(), (x**2).sum(), rtol=1e-5)
    np.testing.assert_allclose(operator(-x), y, atol=1e-5)
    np.testing.assert_allclose(operator(x[:, ::-1, ::-1]), y, atol=1e-5)
    assert not np.allclose(operator(x[:, ::-1]), y, atol=0.1)
    wide = operator(jnp.pad(x, ((0, 0), (0, 2), (1, 1), (0, 0))))
    moved = operator(jnp.pad(x, ((0, 0), (2, 0), (2, 0), (0, 0))))
    np.testing.assert_allclose(moved, wide, atol=1e-5)
    np.testing.assert_array_less(-1e-6, y)


@every_operator
@pytest.mark.parametrize("noise", [0.3, *slow(0.0)])
def test_pigdm_is_the_exact_posterior_score_of_isotropic_data(x64, operator, noise):
    """With the score of p(x_t | y), in closed form, for every operator; at each noise level."""
    d, std = 48, 0.5
    mean = np.linspace(-0.5, 0.5, d)
    denoise = images(oracles.gaussian(SCHEDULE, mean, std**2))
    a = matrix(operator)
    y = operator(jax.random.normal(jax.random.key(0), IMAGE))
    guided = inverse.pigdm(denoise, SCHEDULE, operator, y, noise_std=noise, sigma_data=std)
    x_t = jax.random.normal(jax.random.key(1), IMAGE)
    got = jax.jit(guided)(x_t, t := jnp.array([0.2, 0.7]))
    for i in range(2):
        given = posterior(mean, std**2 * np.eye(d), a, np.asarray(y[i]).reshape(-1), noise)
        alpha, sigma = schedule_at = SCHEDULE(t[i])
        spread = alpha**2 * given[1] + sigma**2 * np.eye(d)
        score = -np.linalg.solve(spread, np.asarray(x_t[i]).reshape(-1) - alpha * given[0])
        np.testing.assert_allclose(-got.eps[i].reshape(-1) / sigma, score, rtol=2e-3, atol=2e-3)
        explained = schedule_at[0] * got.x_0[i] + schedule_at[1] * got.eps[i]
        np.testing.assert_allclose(explained, x_t[i], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_what_a_mask_hides_does_not_matter_to_pigdm(noise):
    denoise = oracles.gaussian(SCHEDULE, jnp.zeros(2), 0.25)
    x_t = jnp.array([[0.2, 0.3]])

    def guided(hidden):
        y, operator = jnp.array([[0.5, hidden]]), inverse.inpainting(FIRST)
        return inverse.pigdm(denoise, SCHEDULE, operator, y, noise, 0.5)(x_t, 0.5).x_0

    assert np.isfinite(guided(3.0)).all()
    np.testing.assert_allclose(guided(3.0), guided(0.0), atol=1e-6)


def test_samples_by_pigdm_are_those_of_the_posterior():
    """The mean and spread of 4000 draws, one measured and one free coordinate, with noise."""
    std, noise = 0.5, 0.2
    denoise = oracles.gaussian(SCHEDULE, [0.3, -0.2], std**2)
    operator = lambda x: x[:, :1] + x[:, 1:]
    y = jnp.full((4000, 1), 0.8)
    guided = inverse.pigdm(denoise, SCHEDULE, operator, y, noise, std)
    x_1 = diffjax.prior_sample(jax.random.key(0), SCHEDULE, (4000, 2))
    walk = diffjax.dpm_solver_pp_2m(guided, SCHEDULE)
    x_0, _ = diffjax.sample(jax.random.key(1), walk, x_1, diffjax.log_snr_times(SCHEDULE, 60))
    mean, cov = posterior(
        np.array([0.3, -0.2]), std**2 * np.eye(2), np.array([[1.0, 1.0]]), np.array([0.8]), noise
    )
    np.testing.assert_allclose(x_0.mean(0), mean, atol=0.03)
    np.testing.assert_allclose(np.cov(x_0.T), cov, atol=0.02)


CORRELATED = np.array([[0.25, 0.2], [0.2, 0.25]])
FIRST = jnp.array([1.0, 0.0])


def conditional(repeats=None, n=2000):
    """Draws of the second coordinate, given that the first is 0.6, on correlated data."""
    denoise = oracles.gaussian(SCHEDULE, [0.0, 0.0], CORRELATED)
    y = jnp.broadcast_to(jnp.array([0.6, 0.0]), (n, 2))
    x_1 = diffjax.prior_sample(jax.random.key(0), SCHEDULE, (n, 2))
    sampler = diffjax.ancestral(denoise, SCHEDULE)
    if repeats is None:
        sampler, ts = inverse.dps(sampler, inverse.inpainting(FIRST), y * FIRST[None], 0.05), 200
    else:
        sampler, ts = inverse.repaint(sampler, SCHEDULE, FIRST, y, repeats), 50
    return diffjax.sample(jax.random.key(1), sampler, x_1, diffjax.uniform_times(ts))[0]


@pytest.mark.faults
def test_repaint_comes_to_agree_with_what_is_known():
    """The exact E[x_2 | x_1 = 0.6] is 0.48 and its std 0.3; replacing alone falls short of it."""
    exact = posterior(np.zeros(2), CORRELATED, np.array([[1.0, 0.0]]), np.array([0.6]), 0.0)
    replaced, repainted = conditional(1), conditional(10)
    for x in (replaced, repainted):
        np.testing.assert_allclose(x[:, 0], 0.6, atol=0.05)
    off = [abs(float(x[:, 1].mean()) - exact[0][1]) for x in (replaced, repainted)]
    assert off[1] < 0.05 and off[0] > 3 * off[1], off
    np.testing.assert_allclose(repainted[:, 1].std(), np.sqrt(exact[1][1, 1]), atol=0.08)


def test_dps_agrees_with_the_measurement_and_draws_the_rest_along():
    """A heuristic: near the conditional mean, at a fraction of the prior's distance from it."""
    x = conditional()
    np.testing.assert_allclose(x[:, 0], 0.6, atol=0.1)
    assert abs(x[:, 1].mean() - 0.48) < 0.25 * 0.48
    assert x[:, 1].std() < 0.8 * np.sqrt(CORRELATED[1, 1])


@pytest.mark.parametrize("make", each(DETERMINISTIC, "ddim", "heun", "unipc"))
def test_dps_steers_any_sampler(make):
    """What it does to x between steps stays, whatever the sampler remembers."""
    denoise = oracles.gaussian(SCHEDULE, [0.0, 0.0], CORRELATED)
    y = jnp.broadcast_to(jnp.array([0.6, 0.0]), (64, 2))
    x_1 = diffjax.prior_sample(jax.random.key(0), SCHEDULE, (64, 2))
    sampler = inverse.dps(make(denoise, SCHEDULE), inverse.inpainting(FIRST), y, 0.05)
    x_0, _ = diffjax.sample(jax.random.key(1), sampler, x_1, diffjax.uniform_times(200))
    np.testing.assert_allclose(x_0[:, 0].mean(), 0.6, atol=0.05)
    assert x_0[:, 0].std() < 0.1  # of 0.5


def test_dps_leaves_alone_what_is_neither_measured_nor_related():
    denoise = oracles.gaussian(SCHEDULE, [0.0, 0.0], 0.25)
    x_1 = diffjax.prior_sample(jax.random.key(0), SCHEDULE, (16, 2))
    walk = diffjax.ancestral(denoise, SCHEDULE)
    y = jnp.broadcast_to(jnp.array([0.6, 0.0]), (16, 2))
    guided = inverse.dps(walk, inverse.inpainting(FIRST), y)
    ts, key = diffjax.uniform_times(20), jax.random.key(1)
    free, bound = (diffjax.sample(key, sampler, x_1, ts)[0] for sampler in (walk, guided))
    np.testing.assert_allclose(bound[:, 1], free[:, 1], rtol=1e-4, atol=1e-5)
    assert not np.allclose(bound[:, 0], free[:, 0], atol=0.1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda d, x: inverse.pigdm(d, SCHEDULE, inverse.downsampling(2), x)(x, 0.5),
            r"shape \(2, 4, 4, 3\): the operator gives \(2, 2, 2, 3\)",
        ),
        (
            lambda d, x: inverse.dps(diffjax.ddim(d, SCHEDULE), inverse.greying(), x).step(
                None, diffjax.samplers.init(x), 0.5, 0.4
            ),
            r"the operator gives \(2, 4, 4, 1\)",
        ),
        (
            lambda d, x: inverse.repaint(
                diffjax.ddim(d, SCHEDULE), SCHEDULE, jnp.ones(()), x[:1]
            ).step(jax.random.key(0), diffjax.samplers.init(x), 0.5, 0.4),
            r"the operator gives \(2, 4, 4, 3\)",
        ),
        (
            lambda d, x: inverse.repaint(diffjax.ddim(d, SCHEDULE), SCHEDULE, FIRST, x, repeats=0),
            "repeats=0",
        ),
        (
            lambda d, x: inverse.pigdm(d, SCHEDULE, inverse.inpainting(jnp.ones(5)), x)(x, 0.5),
            r"take data of .*a mask of shape \(5,\) for examples of \(4, 4, 3\)",
        ),
        (lambda d, x: inverse.inpainting(jnp.ones((4, 3)))(x), r"a mask of shape \(4, 3\) for"),
        (lambda d, x: inverse.inpainting(jnp.ones(x.shape))(x), r"a mask of shape \(2, 4, 4, 3\)"),
        (lambda d, x: inverse.blurring(jnp.ones(3)), r"a kernel of shape \(3,\)"),
        (
            lambda d, x: inverse.dps(diffjax.ddim(d, SCHEDULE), inverse.greying(), x, scale=-1.0),
            "scale=-1.0",
        ),
        (
            lambda d, x: inverse.mmps(d, SCHEDULE, lambda x: x + 0j, x, 0.1)(x, 0.5),
            "that gives complex64: .* the real and imaginary parts side by side",
        ),
        (
            lambda d, x: inverse.repaint(diffjax.ddim(d, SCHEDULE), SCHEDULE, jnp.ones(5), x).step(
                jax.random.key(0), diffjax.samplers.init(x), 0.5, 0.4
            ),
            r"the operator does not take data of shape \(2, 4, 4, 3\)",
        ),
        (
            lambda d, x: inverse.repaint(
                sampler := diffjax.lms(d, SCHEDULE), SCHEDULE, jnp.ones(()), x
            ).step(jax.random.key(0), sampler.init(x), 0.5, 0.4),
            "needs a sampler of one step",
        ),
        (lambda d, x: inverse.downsampling(0), "factor=0"),
        (lambda d, x: inverse.greying(4)(x), "channels=4: the images have 3"),
        (lambda d, x: inverse.greying(0), "channels=0: must be a whole number of at least 1"),
        (lambda d, x: inverse.inpainting(jnp.ones((5, 4, 1)))(x), r"a mask of shape \(5, 4, 1\) f"),
        (lambda d, x: inverse.downsampling(2)(x[0, 0]), "downsampling of data of.*must be images"),
        (
            lambda d, x: inverse.phase_retrieval()(x[0]),
            "phase retrieval of.*must be images",
        ),
        (lambda d, x: inverse.blurring(jnp.ones((2, 2)))(x[0]), "blurring of data.*must be images"),
        (lambda d, x: inverse.blurring(jnp.ones((0, 3))), r"a kernel of shape \(0, 3\): must be"),
        (lambda d, x: inverse.phase_retrieval(0), "oversampling=0"),
        (lambda d, x: inverse.compressed_sensing(jax.random.key(0), 0, (4,)), "measurements=0"),
        (
            lambda d, x: inverse.compressed_sensing(jax.random.key(0), 3, (4,))(x),
            r"of shape \(4,\), not \(4, 4, 3\)",
        ),
        (lambda d, x: inverse.with_svd(jnp.abs, (4,)), "with_svd needs a linear operator"),
        (lambda d, x: inverse.with_svd(inverse.downsampling(3), (4, 4, 1)), "does not take data"),
        (lambda d, x: inverse.downsampling(3)(x), "does not divide an image of 4 x 4"),
    ],
)
def test_measurements_of_the_wrong_shape_are_refused(make, message):
    denoise = images(oracles.gaussian(SCHEDULE, np.zeros(48), 1.0))
    with pytest.raises(ValueError, match=message):
        make(denoise, jnp.ones(IMAGE))
