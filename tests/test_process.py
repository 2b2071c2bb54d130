import math

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import diffjax
from catalogue import SCHEDULES

every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
PAIRS = [(0.0, 0.3), (0.2, 0.7), (0.45, 0.46), (0.6, 1.0), (0.0, 1.0)]
"""(s, t) with s < t: from the end, to the end, close together, all the way."""


def condition(mean, cov, value):
    """The Gaussian of z[0] given z[1] = value, from the joint mean and covariance."""
    gain = cov[0, 1] / cov[1, 1]
    return mean[0] + gain * (value - mean[1]), cov[0, 0] - gain * cov[1, 0]


@every_schedule
@pytest.mark.parametrize(("s", "t"), PAIRS)
def test_posterior_is_bayes_rule(x64, schedule, s, t):
    """Condition the joint Gaussian of (x_s, x_t) given x_0, built from the marginals alone."""
    x_0, x_t = 0.7, -1.3
    (alpha_s, sigma_s), (alpha_t, sigma_t) = schedule(s), schedule(t)
    ratio = alpha_t / alpha_s  # x_t = ratio x_s + independent noise
    mean = np.array([alpha_s, alpha_t]) * x_0
    cov = np.array([[sigma_s**2, ratio * sigma_s**2], [ratio * sigma_s**2, sigma_t**2]])
    expected_mean, expected_var = condition(mean, cov, x_t)

    data = lambda x: jnp.full((1, 1), x)
    got_mean, got_std = diffjax.q_posterior(schedule, data(x_0), data(x_t), t, s)
    np.testing.assert_allclose(got_mean, [[expected_mean]], rtol=1e-7)
    np.testing.assert_allclose(got_std**2, [[expected_var]], rtol=1e-6, atol=1e-14)


@every_schedule
@pytest.mark.parametrize(("s", "t"), PAIRS)
def test_transition_carries_the_marginal_at_s_to_the_marginal_at_t(x64, schedule, s, t):
    (alpha_s, sigma_s), (alpha_t, sigma_t) = schedule(s), schedule(t)
    slope, std = diffjax.q_transition(schedule, jnp.ones((1, 1)), s, t)
    np.testing.assert_allclose(slope * alpha_s, [[alpha_t]], rtol=1e-9)
    np.testing.assert_allclose((slope * sigma_s) ** 2 + std**2, [[sigma_t**2]], rtol=1e-9)


def test_posterior_is_ddpms_table(x64):
    """Ho et al. 2020, equations 6 and 7, in their own discrete notation."""
    betas = diffjax.linear_betas(1000)
    alphas = 1 - betas
    abar = np.cumprod(alphas)
    previous = np.concatenate([[1.0], abar[:-1]])
    x_0, x_t = np.array([[0.3]]), np.array([[-0.8]])
    schedule = diffjax.from_betas(betas)
    for i in (2, 3, 10, 500, 999, 1000):  # the paper's t; its x_0 at t = 1 has no finite log-SNR
        a, b, p = alphas[i - 1], abar[i - 1], previous[i - 1]
        mean = (np.sqrt(p) * (1 - a) * x_0 + np.sqrt(a) * (1 - p) * x_t) / (1 - b)
        variance = (1 - p) / (1 - b) * (1 - a)
        got_mean, got_std = diffjax.q_posterior(
            schedule, jnp.asarray(x_0), jnp.asarray(x_t), i / 1000, (i - 1) / 1000
        )
        np.testing.assert_allclose(got_mean, mean, rtol=1e-8)
        np.testing.assert_allclose(got_std**2, [[variance]], rtol=1e-7)


@every_schedule
@pytest.mark.parametrize(("s", "t"), PAIRS)
@pytest.mark.parametrize("way", ["x_0", "eps", "score"])
def test_three_ways_to_write_the_posterior_mean(x64, schedule, s, t, way):
    """The lecture's three formulas, for scales that need not preserve variance.

    With alpha_t|s = alpha_t/alpha_s and var_t|s = sigma_t^2 - alpha_t|s^2 sigma_s^2 they are, for
    VP, those of the papers: sqrt(alpha_t) is alpha_t|s and 1 - alpha_t is var_t|s.
    """
    key_x, key_eps = jax.random.split(jax.random.key(1))
    x_0, eps = jax.random.normal(key_x, (3, 2)), jax.random.normal(key_eps, (3, 2))
    (alpha_s, sigma_s), (alpha_t, sigma_t) = schedule(s), schedule(t)
    x_t = alpha_t * x_0 + sigma_t * eps
    step = alpha_t / alpha_s
    var = sigma_t**2 * (1 - jnp.exp(schedule.log_snr(t) - schedule.log_snr(s)))
    out = diffjax.encode(way, x_0, eps, alpha_t, sigma_t)
    mean = {
        "x_0": lambda x_0: (step * sigma_s**2 * x_t + alpha_s * var * x_0) / sigma_t**2,
        "eps": lambda eps: x_t / step - var / (sigma_t * step) * eps,
        "score": lambda score: x_t / step + var / step * score,
    }[way](out)

    decoded = diffjax.decode(way, out, x_t, alpha_t, sigma_t)
    got, _ = diffjax.q_posterior(schedule, decoded.x_0, x_t, t, s)
    np.testing.assert_allclose(got, mean, rtol=1e-6, atol=1e-7)


@every_schedule
def test_posterior_variance_depends_on_the_times_alone(schedule):
    x = jax.random.normal(jax.random.key(0), (4, 5, 3))
    _, std = diffjax.q_posterior(schedule, x, 100 * x, 0.6, 0.2)
    _, again = diffjax.q_posterior(schedule, -x, x**2, 0.6, 0.2)
    assert std.size == 1
    assert jnp.array_equal(std, again)


@every_schedule
@pytest.mark.parametrize(("r", "s", "t"), [(0.0, 0.4, 1.0), (0.1, 0.5, 0.8), (0.3, 0.31, 0.32)])
def test_posteriors_chain(x64, schedule, r, s, t):
    """Walking t -> s -> r given x_0 is walking t -> r: same mean, same variance."""
    x_0, x_t = jnp.full((1, 1), 0.4), jnp.full((1, 1), 1.1)
    mean_s, std_s = diffjax.q_posterior(schedule, x_0, x_t, t, s)
    mean_r, std_r = diffjax.q_posterior(schedule, x_0, mean_s, s, r)
    # The mean of the second step is affine in x_s; its slope carries the first step's noise.
    slope = (diffjax.q_posterior(schedule, x_0, mean_s + 1, s, r)[0] - mean_r).item()
    direct_mean, direct_std = diffjax.q_posterior(schedule, x_0, x_t, t, r)
    np.testing.assert_allclose(mean_r, direct_mean, rtol=1e-6)
    np.testing.assert_allclose((slope * std_s) ** 2 + std_r**2, direct_std**2, rtol=1e-6)


def test_q_sample_takes_one_time_or_one_per_example():
    schedule, eps = diffjax.cosine(), jnp.ones((3, 2, 2, 1))
    t = jnp.array([0.1, 0.5, 0.9])
    together = diffjax.q_sample(schedule, 0 * eps, t, eps)
    alone = [diffjax.q_sample(schedule, 0 * eps[:1], t[i], eps[:1]) for i in range(3)]
    assert jnp.array_equal(together, jnp.concatenate(alone))
    np.testing.assert_allclose(together[:, 0, 0, 0], schedule(t)[1], rtol=1e-6)


def test_bfloat16_data_stays_bfloat16_with_scales_computed_in_float32():
    x = jnp.ones((2, 3), jnp.bfloat16)
    x_t = diffjax.q_sample(diffjax.cosine(), x, jnp.array([0.0, 0.3]), 0 * x)
    assert x_t.dtype == jnp.bfloat16
    exact = diffjax.cosine()(jnp.array([0.0, 0.3]))[0].astype(jnp.bfloat16)
    assert jnp.array_equal(x_t[:, 0], exact)


@every_schedule
def test_prior_sample_has_the_variance_of_x_1(schedule):
    x_1 = diffjax.prior_sample(jax.random.key(0), schedule, (20000, 2))
    sigma = schedule(1.0)[1]
    np.testing.assert_allclose(jnp.std(x_1) / sigma, 1, atol=0.02)


def test_prior_sample_of_one_example_does_not_depend_on_the_others():
    key = jax.random.key(3)
    many = diffjax.prior_sample(key, diffjax.cosine(), (8, 4))
    few = diffjax.prior_sample(key, diffjax.cosine(), (2, 4))
    assert jnp.array_equal(many[:2], few)
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.array([5, 1]))
    chosen = diffjax.prior_sample(keys, diffjax.cosine(), (2, 4))
    assert jnp.array_equal(chosen, many[jnp.array([5, 1])])


def test_prior_sample_is_in_double_precision_where_that_is_on(x64):
    assert diffjax.prior_sample(jax.random.key(0), diffjax.cosine(), (2, 3)).dtype == jnp.float64


def test_integer_data_is_refused():
    with pytest.raises(TypeError, match="data must be floating point, got int32"):
        diffjax.types.expand(0.5, jnp.ones((2, 3), jnp.int32))


def test_keys_of_another_length_than_the_batch_are_refused():
    keys = jax.random.split(jax.random.key(0), 3)
    with pytest.raises(ValueError, match=r"keys of shape \(3,\) for a batch of 4"):
        diffjax.prior_sample(keys, diffjax.cosine(), (4, 2))


def test_what_is_no_time_is_refused_where_a_schedule_meets_data(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as users run it
    schedule = diffjax.cosine()
    x, eps = jax.random.normal(jax.random.key(0), (2, 4, 3))
    predict = diffjax.denoiser(lambda x_t, log_snr, cond: x_t, schedule, "eps")
    uses = [
        lambda t: diffjax.q_sample(schedule, x, t, eps),
        lambda t: diffjax.q_posterior(schedule, x, eps, 1.0, t),
        lambda t: diffjax.q_posterior(schedule, x, eps, t, 0.0),
        lambda t: predict(x, t),
        lambda t: diffjax.diffusion_loss(
            jax.random.key(1), lambda x_t, log_snr, cond: x_t, schedule, "eps", x, t=t
        ),
        lambda t: jax.jit(lambda x: diffjax.q_sample(schedule, x, t, eps))(x),
    ]
    wrong = [500, 1.01, -1e-6, math.nan, np.array([0.0, 0.5, 1.0, 2.0]), np.full((4, 1), 0.5), x]
    for use in uses:
        for t in (0.25, np.float32(0.25), jnp.full(4, 0.25), np.full(4, 0.25, np.float16)):
            use(t)
        for t in wrong:
            with pytest.raises(ValueError, match="times of|times from"):
                use(t)
        for t in (np.array([1, 0, 1, 0]), jnp.int32(1)):
            with pytest.raises(TypeError, match="floating point"):
                use(t)
    # An integer is no time where its value is unknown either.
    with pytest.raises(TypeError, match="floating point, got int32"):
        jax.jit(lambda t: schedule(t))(jnp.arange(4))


@pytest.mark.parametrize("name", [*diffjax.SCHEDULES, "shifted"])
def test_every_schedule_checks_its_times_and_computes_in_float32(name, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    make = diffjax.SCHEDULES | {
        "monotone": lambda: diffjax.monotone(diffjax.monotone_params(4)),
        "shifted": lambda: diffjax.shift(diffjax.cosine(), -1.0),
    }
    schedule = make[name]()
    for t in (500, -0.1, np.array([0.0, 1.5])):
        with pytest.raises(ValueError, match="step i of T is the time i / T"):
            schedule(t)
    ts = np.array([0.0, 0.125, 0.5, 0.75, 1.0])
    for dtype in (jnp.float16, jnp.bfloat16):
        got = schedule(jnp.asarray(ts, dtype))
        np.testing.assert_array_equal(got, schedule(ts.astype(np.float32)))


def test_noise_of_another_shape_is_refused_and_not_broadcast(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    schedule, x, eps = diffjax.cosine(), jnp.ones((4, 3)), jnp.ones((4, 1))
    with pytest.raises(ValueError, match=r"eps of shape \(4, 1\) for data \(4, 3\)"):
        diffjax.q_sample(schedule, x, 0.5, eps)
    with pytest.raises(ValueError, match=r"x_t of shape \(4, 1\)"):
        diffjax.q_posterior(schedule, x, eps, 0.5, 0.25)
