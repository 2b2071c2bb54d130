import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax
from catalogue import SCHEDULES, each
from diffjax import oracles

COV = np.array([[1.0, 0.3], [0.3, 0.2]])
POINTS = np.array([[-1.0, 0.5], [0.8, -0.3], [0.2, 0.9]])
MAKE = {
    "gaussian": lambda schedule: oracles.gaussian(schedule, [0.3, -0.2], COV),
    "gaussian_mixture": lambda schedule: oracles.gaussian_mixture(
        schedule, [1.0, 3.0, 1.0], POINTS, np.stack([COV, 0.1 * COV, np.zeros((2, 2))])
    ),
    "dataset": lambda schedule: oracles.dataset(schedule, POINTS),
}
every_oracle = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
SOME = {
    name: SCHEDULES[name]
    for name in ("cosine", "log_uniform", "rectified_flow", "zero_terminal_snr")
}
some_schedules = pytest.mark.parametrize("schedule", each(SOME, "cosine", "log_uniform"))


@some_schedules
@every_oracle
def test_the_score_is_the_gradient_of_the_log_density_and_the_prediction_explains_x_t(
    x64, make, schedule
):
    oracle, t = make(schedule), jnp.array([0.1, 0.3, 0.5, 0.7, 0.9])
    x_t = jax.random.normal(jax.random.key(0), (5, 2)) * jnp.hypot(*schedule(t))[:, None]
    slope = jax.grad(lambda x: oracle.log_density(x, t).sum())(x_t)
    np.testing.assert_allclose(oracle.score(x_t, t), slope, rtol=1e-7, atol=1e-9)
    x_0, eps = oracle(x_t, t)
    alpha, sigma = diffjax.scales_at(schedule, t, x_t)
    np.testing.assert_allclose(alpha * x_0 + sigma * eps, x_t, rtol=1e-9, atol=1e-9)


def test_the_prediction_is_the_posterior_mean_and_the_density_is_one(x64):
    """Bayes' rule and total probability by brute quadrature over x_0, in one dimension."""
    schedule, t = diffjax.cosine(), 0.6
    weights, means, variances = [0.3, 0.7], [-1.0, 0.8], [0.04, 0.25]
    oracle = oracles.gaussian_mixture(
        schedule, weights, np.array(means)[:, None], np.array(variances)
    )
    grid = np.linspace(-6, 6, 20001)
    normal = lambda x, m, v: np.exp(-((x - m) ** 2) / (2 * v)) / math.sqrt(2 * math.pi * v)
    prior = sum(w * normal(grid, m, v) for w, m, v in zip(weights, means, variances, strict=True))
    alpha, sigma = map(float, schedule(t))
    x_t = np.linspace(-1.5, 1.5, 7)
    joint = prior[None] * normal(x_t[:, None], alpha * grid[None], sigma**2)
    total = np.trapezoid(joint, grid, axis=1)
    mean = np.trapezoid(joint * grid[None], grid, axis=1) / total
    np.testing.assert_allclose(oracle(x_t[:, None], t).x_0[:, 0], mean, rtol=1e-8)
    np.testing.assert_allclose(oracle.log_density(x_t[:, None], t), np.log(total), rtol=1e-8)


@pytest.mark.faults
def test_the_flow_of_a_mixture_keeps_its_cumulative_distribution(x64):
    """In one dimension the probability flow is the monotone map between two distributions."""
    weights, means, variances = np.array([0.3, 0.7]), np.array([-1.0, 0.8]), np.array([0.04, 0.25])

    def cdf(x, t):
        alpha, sigma = schedule(t)
        std = jnp.sqrt(alpha**2 * variances + sigma**2)
        below = jax.scipy.stats.norm.cdf((x - alpha * means[None]) / std[None])
        return (weights[None] * below).sum(-1)

    x = jnp.array([[-1.2], [-0.3], [0.2], [1.1]])
    for schedule in (diffjax.cosine(), diffjax.log_uniform(), diffjax.rectified_flow()):
        oracle = oracles.gaussian_mixture(schedule, weights, means[:, None], variances)
        for t, s in ((0.9, 0.05), (0.05, 0.9)):
            x_t = x * schedule(t)[1] if t > 0.5 else x
            there = oracle.flow_map(x_t, t, s)
            np.testing.assert_allclose(cdf(there, s), cdf(x_t, t), atol=1e-8)


def test_one_gaussian_said_in_three_ways(x64):
    schedule, t = diffjax.linear(), 0.4
    x_t = jax.random.normal(jax.random.key(0), (5, 2))
    one = oracles.gaussian(schedule, [0.3, -0.2], COV)
    same = oracles.gaussian_mixture(
        schedule, [0.5, 0.5], [[0.3, -0.2], [0.3, -0.2]], np.stack([COV, COV])
    )
    np.testing.assert_allclose(one(x_t, t).x_0, same(x_t, t).x_0, rtol=1e-10)
    np.testing.assert_allclose(one.log_density(x_t, t), same.log_density(x_t, t), rtol=1e-10)
    # The closed form of its flow against Runge-Kutta's method.
    for s in (0.0, 1.0):
        np.testing.assert_allclose(one.flow_map(x_t, t, s), same.flow_map(x_t, t, s), rtol=1e-8)
    # A diagonal, and a multiple of the identity, are covariances too.
    for cov, full in (([0.5, 2.0], np.diag([0.5, 2.0])), (0.5, 0.5 * np.eye(2))):
        a, b = (oracles.gaussian(schedule, [0.0, 1.0], c) for c in (cov, full))
        np.testing.assert_allclose(a(x_t, t).eps, b(x_t, t).eps, rtol=1e-10)


def test_a_data_set_is_a_mixture_of_points_and_may_be_images(x64):
    schedule, t = diffjax.cosine(), jnp.array([0.2, 0.5, 0.8])
    x_t = jax.random.normal(jax.random.key(0), (3, 2))
    data = oracles.dataset(schedule, POINTS)
    points = oracles.gaussian_mixture(schedule, np.ones(3), POINTS, np.zeros(3))
    np.testing.assert_allclose(data(x_t, t).x_0, points(x_t, t).x_0, rtol=1e-9)
    np.testing.assert_allclose(data(x_t, t).eps, points(x_t, t).eps, rtol=1e-9)
    np.testing.assert_allclose(data.log_density(x_t, t), points.log_density(x_t, t), rtol=1e-9)
    images = oracles.dataset(schedule, POINTS.reshape(3, 2, 1, 1))
    got = images(x_t.reshape(3, 2, 1, 1), t).x_0
    assert got.shape == (3, 2, 1, 1)
    np.testing.assert_allclose(got.reshape(3, 2), data(x_t, t).x_0, rtol=1e-9)


def test_a_walk_on_a_data_set_ends_in_it():
    schedule = diffjax.cosine()
    oracle = oracles.dataset(schedule, POINTS)
    x_1 = diffjax.prior_sample(jax.random.key(0), schedule, (20, 2))
    walk = diffjax.dpm_solver_pp_2m(oracle, schedule)
    x_0, _ = diffjax.sample(jax.random.key(1), walk, x_1, diffjax.log_snr_times(schedule, 40))
    nearest = jnp.abs(x_0[:, None] - POINTS[None]).max(-1).min(1)
    assert nearest.max() < 0.01


@every_oracle
def test_samples_have_the_moments_that_the_denoiser_knows(make):
    """At pure noise the best guess is the mean; the samples' mean and each draw's own key."""
    schedule = diffjax.cosine(-24.0, 15.0)
    oracle = make(schedule)
    draws = oracle.sample(jax.random.key(0), 8000)
    mean = oracle(jnp.zeros((1, 2)), 1.0).x_0[0]
    np.testing.assert_allclose(draws.mean(0), mean, atol=0.05)
    if make is MAKE["gaussian"]:
        np.testing.assert_allclose(np.cov(draws.T), COV, atol=0.05)
    assert jnp.array_equal(draws[:3], oracle.sample(jax.random.key(0), 3))


@every_oracle
def test_float32_data_stays_float32_and_is_exact_at_both_ends(make):
    schedule = diffjax.linear()
    oracle = make(schedule)
    x_0 = oracle.sample(jax.random.key(0), 4)
    for t in (0.0, 1.0):
        x_t = diffjax.q_sample(schedule, x_0, t, jax.random.normal(jax.random.key(1), (4, 2)))
        single = oracle(x_t, t)
        with jax.enable_x64(True):
            double = make(schedule)(x_t.astype(jnp.float64), t)
        assert single.x_0.dtype == jnp.float32
        np.testing.assert_allclose(single.x_0, double.x_0, rtol=2e-4, atol=2e-5)
        np.testing.assert_allclose(single.eps, double.eps, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    "make",
    [
        lambda s: oracles.gaussian(s, [0.0], 1.0),
        lambda s: oracles.gaussian_mixture(s, [1.0, 1.0], [[0.0], [1.0]], [1.0, 1.0]),
        lambda s: oracles.dataset(s, np.array([[0.0], [1.0]])),
    ],
)
def test_data_of_another_width_are_refused(make):
    oracle = make(diffjax.cosine())
    calls = oracle, oracle.log_density, lambda x, t: oracle.flow_map(x, t, 0.2)
    for call in calls:
        with pytest.raises(ValueError, match=r"x_t of shape \(2, 3\): the oracle's data are"):
            call(jnp.zeros((2, 3)), 0.5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda s: oracles.gaussian(s, [0.0, 0.0], np.eye(3)), r"shape \(3, 3\) for 2 dimensions"),
        (lambda s: oracles.gaussian(s, [0.0, 0.0], [[1.0, 0.5], [0.0, 1.0]]), "not symmetric"),
        (lambda s: oracles.gaussian(s, [0.0], [[-1.0]]), "not positive semi-definite"),
        (
            lambda s: oracles.gaussian_mixture(s, [1.0], [[0.0], [1.0]], [1.0, 1.0]),
            r"weights \(1,\), means \(2, 1\)",
        ),
        (
            lambda s: oracles.gaussian_mixture(s, [1.0, 0.0], [[0.0], [1.0]], [1.0, 1.0]),
            "must be positive",
        ),
        (lambda s: oracles.dataset(s, np.zeros((0, 2))), r"shape \(0, 2\)"),
    ],
)
def test_what_is_no_distribution_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make(diffjax.cosine())
