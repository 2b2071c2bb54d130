import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax
from catalogue import SCHEDULES, TARGETS, WEIGHTINGS
from diffjax import weightings
from diffjax.schedules import rate_at

every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


def seen_as(target, schedule, params):
    """One function of (x_t, log_snr), an arbitrary eps-network, in the dress of any target."""

    def network(x_t, log_snr, cond):
        alpha, sigma = (s[:, None] for s in schedule.scales(log_snr))
        w, b = params
        eps = jnp.tanh(x_t @ w + b + 0.1 * log_snr[:, None])
        return diffjax.convert(eps, x_t, alpha, sigma, "eps", target)

    return network


def elbo_loss(params, target, schedule, t, dtype):
    x_0 = jax.random.normal(jax.random.key(0), (len(t), 3), dtype)
    network = seen_as(target, schedule, params)
    losses = diffjax.diffusion_loss(
        jax.random.key(1), network, schedule, target, x_0, weight=weightings.elbo, t=t
    )
    return jnp.mean(losses)


def loss_and_gradients(target, schedule, bound, dtype):
    t = jnp.linspace(0, 1, 257, dtype=dtype)
    inside = np.flatnonzero(np.abs(schedule.log_snr(t)) <= bound)
    t = t[inside[np.linspace(0, len(inside) - 1, 64).astype(int)]]
    params = (jnp.eye(3, dtype=dtype) / 2, jnp.full((1, 3), 0.1, dtype))
    return jax.value_and_grad(elbo_loss)(params, target, schedule, t, dtype)


@every_schedule
def test_all_targets_have_one_loss_and_one_gradient_in_float64(x64, schedule):
    loss, gradients = loss_and_gradients("eps", schedule, 15, jnp.float64)
    for target in TARGETS:
        other, others = loss_and_gradients(target, schedule, 15, jnp.float64)
        np.testing.assert_allclose(other, loss, rtol=1e-9, err_msg=target)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), others, gradients)


@every_schedule
def test_all_targets_have_one_loss_and_one_gradient_in_float32(schedule):
    loss, gradients = loss_and_gradients("eps", schedule, 10, jnp.float32)
    size = max(float(jnp.abs(g).max()) for g in gradients)
    for target in TARGETS:
        other, others = loss_and_gradients(target, schedule, 10, jnp.float32)
        np.testing.assert_allclose(other, loss, rtol=1e-3, err_msg=target)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3 * size), others, gradients
        )


@pytest.mark.parametrize("weight", WEIGHTINGS.values(), ids=WEIGHTINGS)
@pytest.mark.parametrize("target", TARGETS)
def test_the_optimal_network_reaches_the_least_loss(target, weight):
    """Data N(0, c^2): E[eps | x_t] is known, and so is the variance it leaves, at every t."""
    schedule, c, n = diffjax.cosine(-8.0, 8.0), 0.7, 20000
    t = jnp.float32(0.37)
    alpha, sigma = schedule(t)
    total = alpha**2 * c**2 + sigma**2

    def optimal(x_t, log_snr, cond):
        return diffjax.encode(target, alpha * c**2 / total * x_t, sigma / total * x_t, alpha, sigma)

    x_0 = c * jax.random.normal(jax.random.key(0), (n, 1))
    loss = lambda network: jnp.mean(
        diffjax.diffusion_loss(
            jax.random.key(1), network, schedule, target, x_0, weight=weight, t=t
        )
    )
    least = alpha**2 * c**2 / total  # Var[eps | x_t]
    if weight is None:
        a, b = diffjax.TARGETS[target](alpha, sigma)
        scale = ((a * sigma - b * alpha) / alpha) ** 2 / (a**2 + b**2)
    else:
        scale = weight(schedule.log_snr(t), rate_at(schedule, t))
    np.testing.assert_allclose(loss(optimal), scale * least, rtol=0.04)
    worse = lambda x_t, log_snr, cond: 1.2 * optimal(x_t, log_snr, cond) + 0.1
    assert loss(worse) > loss(optimal)


@every_schedule
def test_rate_is_the_slope_of_the_log_snr(x64, schedule):
    t, h = jnp.linspace(0.1, 0.9, 17) + 0.00013, 1e-6
    slope = (schedule.log_snr(t + h) - schedule.log_snr(t - h)) / (2 * h)
    np.testing.assert_allclose(rate_at(schedule, t), -slope, rtol=1e-5)


def test_discrete_rate_tends_to_the_continuous_one(x64):
    schedule, t = diffjax.cosine(), jnp.array([0.2, 0.5, 0.8])
    gap = [
        jnp.abs(rate_at(schedule, t, steps) / rate_at(schedule, t) - 1).max()
        for steps in (1000, 10000)
    ]
    assert gap[0] < 0.02
    np.testing.assert_allclose(gap[0] / gap[1], 10, rtol=0.05)  # first order in 1/T


def test_discrete_elbo_weight_is_ddpms_coefficient(x64):
    """T times Ho et al. 2020, equation 12: beta^2 / (2 sigma^2 alpha (1 - abar)), per dimension."""
    betas = diffjax.linear_betas(1000)
    abar = np.cumprod(1 - betas)
    schedule = diffjax.from_betas(betas)
    for i in (2, 100, 1000):
        beta, a, p = betas[i - 1], abar[i - 1], abar[i - 2]
        variance = beta * (1 - p) / (1 - a)
        coefficient = 1000 * beta**2 / (2 * variance * (1 - beta) * (1 - a))
        t = jnp.asarray(i / 1000)
        got = weightings.elbo(schedule.log_snr(t), rate_at(schedule, t, 1000))
        np.testing.assert_allclose(got, coefficient, rtol=1e-7)


def test_min_snr_caps_the_x_0_weight_at_gamma():
    log_snr = jnp.linspace(-10, 10, 41)
    on_x_0 = weightings.min_snr(5.0)(log_snr, log_snr) * jnp.exp(log_snr)
    np.testing.assert_allclose(on_x_0, np.minimum(np.exp(np.linspace(-10, 10, 41)), 5), rtol=1e-5)
    with pytest.raises(ValueError, match="gamma=0"):
        weightings.min_snr(0.0)


@pytest.mark.parametrize("n", [1, 7, 64, 1000])
def test_times_are_stratified(n):
    t = np.sort(np.asarray(diffjax.sample_times(jax.random.key(n), n)))
    assert t[0] > 0 and t[-1] <= 1
    np.testing.assert_allclose(np.diff(t), 1 / n, atol=3e-7)  # one in each n-th


def test_each_time_is_uniform_by_itself():
    keys = jax.random.split(jax.random.key(0), 4000)
    third = jax.vmap(lambda k: diffjax.sample_times(k, 8)[3])(keys)
    counts, _ = np.histogram(third, bins=8, range=(0, 1))
    assert (np.abs(counts - 500) < 5 * np.sqrt(500)).all()


def test_discrete_times_lie_on_the_grid_and_reach_both_ends():
    t = diffjax.sample_times(jax.random.key(0), 10_000, steps=10)
    assert sorted({round(10 * float(v), 4) for v in t}) == list(range(1, 11))


def test_times_of_a_part_of_the_batch_are_those_of_the_whole():
    key = jax.random.key(2)
    index = jnp.array([5, 0, 3])
    part = diffjax.sample_times(key, 8, index=index)
    assert jnp.array_equal(part, diffjax.sample_times(key, 8)[index])


@pytest.mark.parametrize("single_key", [True, False])
def test_an_examples_loss_does_not_depend_on_its_batch_mates(single_key):
    schedule = diffjax.cosine()
    x_0 = jax.random.normal(jax.random.key(0), (6, 4))
    network = lambda x_t, log_snr, cond: jnp.sin(x_t) + 0.1 * log_snr[:, None]
    t = jnp.linspace(0.1, 0.9, 6) if single_key else None
    key = jax.random.key(1)
    if not single_key:
        key = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(6))
    whole = diffjax.diffusion_loss(key, network, schedule, "v", x_0, t=t)
    changed = x_0.at[3:].set(9.0)
    assert jnp.array_equal(
        whole[:3], diffjax.diffusion_loss(key, network, schedule, "v", changed, t=t)[:3]
    )
    part = (key, t[:2]) if single_key else (key[:2], None)
    fewer = diffjax.diffusion_loss(part[0], network, schedule, "v", x_0[:2], t=part[1])
    np.testing.assert_allclose(whole[:2], fewer, rtol=1e-6)


def test_unit_output_with_unit_variance_makes_the_score_network_the_eps_network():
    schedule = diffjax.cosine()
    x_0 = jax.random.normal(jax.random.key(0), (16, 3))
    network = lambda x_t, log_snr, cond: jnp.tanh(x_t)
    as_score = diffjax.unit_output(lambda *a: -network(*a), "score", schedule)
    key = jax.random.key(1)
    one = diffjax.diffusion_loss(key, network, schedule, "eps", x_0)
    other = diffjax.diffusion_loss(key, as_score, schedule, "score", x_0)
    np.testing.assert_allclose(one, other, rtol=1e-4)


def test_whole_numbers_are_times_too():
    schedule, x_0 = diffjax.linear(), jnp.linspace(-1, 1, 6).reshape(2, 3)
    network = lambda x_t, log_snr, cond: jnp.sin(x_t)
    for weight in (None, weightings.elbo):
        loss = lambda t, w=weight: diffjax.diffusion_loss(
            jax.random.key(0), network, schedule, "eps", x_0, weight=w, t=t
        )
        assert jnp.array_equal(loss(1), loss(1.0))


@pytest.mark.parametrize(
    "arguments",
    [{"n": 0}, {"n": 4, "steps": 0}, {"n": 4, "key": jax.random.split(jax.random.key(0), 4)}],
)
def test_times_refuse_what_has_no_meaning(arguments):
    with pytest.raises(ValueError, match="one key for the whole batch, n and steps at least 1"):
        diffjax.sample_times(**({"key": jax.random.key(0)} | arguments))


def test_a_network_of_another_output_shape_is_refused():
    bad = lambda x_t, log_snr, cond: jnp.concatenate([x_t, x_t], -1)
    with pytest.raises(ValueError, match=r"the network gave \(2, 6\) for data \(2, 3\)"):
        diffjax.diffusion_loss(jax.random.key(0), bad, diffjax.cosine(), "eps", jnp.ones((2, 3)))


def test_raw_uint32_keys_are_taken_too():
    network = lambda x_t, log_snr, cond: 0 * x_t
    x_0 = jnp.ones((4, 2))
    losses = [
        diffjax.diffusion_loss(key, network, diffjax.cosine(), "eps", x_0)
        for key in (jax.random.key(7), jax.random.PRNGKey(7))
    ]
    assert jnp.array_equal(*losses)
