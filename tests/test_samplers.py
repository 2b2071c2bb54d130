import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax
from catalogue import SAMPLERS, SCHEDULES
from diffjax import samplers

every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
every_sampler = pytest.mark.parametrize("make", SAMPLERS.values(), ids=SAMPLERS)
GRIDS = {
    "uniform": lambda schedule, n: diffjax.uniform_times(n),
    "log_snr": diffjax.log_snr_times,
    "karras": diffjax.karras_times,
    "discrete": lambda schedule, n: diffjax.discrete_times(1000, n),
}
every_grid = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
MEAN, STD = 0.4, 0.6


def gaussian(schedule):
    """The exact denoiser of data N(MEAN, STD^2)."""

    def denoise(x_t, t, cond=None):
        alpha, sigma = diffjax.scales_at(schedule, t, x_t)
        gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
        x_0 = MEAN + gain * (x_t - alpha * MEAN)
        return diffjax.decode("x_0", x_0, x_t, alpha, sigma)

    return denoise


def standardise(schedule, x_t, t):
    """Where x_t lies in its marginal N(alpha MEAN, alpha^2 STD^2 + sigma^2).

    The probability flow of a Gaussian keeps this number: its exact solution in closed form.
    """
    alpha, sigma = schedule(t)
    return (x_t - alpha * MEAN) / jnp.sqrt(alpha**2 * STD**2 + sigma**2)


def walk(make, schedule, x_1, ts, key=jax.random.key(0)):
    return diffjax.sample(key, make(gaussian(schedule), schedule), x_1, ts)[0]


@every_schedule
def test_ddim_converges_to_the_exact_probability_flow_at_first_order(x64, schedule):
    """Between t = 0.9 and 0.1, where no schedule's end is felt."""
    z = jnp.linspace(-2, 2, 9)[:, None]
    alpha, sigma = schedule(0.9)
    x = z * jnp.sqrt(alpha**2 * STD**2 + sigma**2) + alpha * MEAN
    steps = np.array([80, 160, 320, 640])
    errors = []
    for n in steps:
        got = walk(diffjax.ddim, schedule, x, jnp.linspace(0.9, 0.1, n + 1))
        errors.append(float(jnp.abs(standardise(schedule, got, 0.1) - z).max()))
    order = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert 0.85 < order < 1.2, (order, errors)


@every_schedule
def test_ddim_encodes_and_comes_back(x64, schedule):
    x_0 = jnp.linspace(-1, 1, 7)[:, None]
    ts = jnp.linspace(0, 1, 2001)
    x_1 = walk(diffjax.ddim, schedule, x_0, ts)
    back = walk(diffjax.ddim, schedule, x_1, ts[::-1])
    np.testing.assert_allclose(back, x_0, atol=0.02)


@every_schedule
@pytest.mark.parametrize("make", SAMPLERS.values(), ids=SAMPLERS)
def test_samples_have_the_mean_and_variance_of_the_data(schedule, make):
    """Weak convergence: to sampling error, and the bias of 300 steps."""
    x_1 = diffjax.prior_sample(jax.random.key(1), schedule, (4000, 1))
    x_0 = walk(make, schedule, x_1, diffjax.uniform_times(300), jax.random.key(2))
    # x_1 is drawn without the data's mean, as is usual; what alpha_1 leaves of it shows.
    left = schedule(1.0)[0] / schedule(1.0)[1]
    np.testing.assert_allclose(jnp.mean(x_0), MEAN, atol=0.05 + left)
    np.testing.assert_allclose(jnp.std(x_0), STD, atol=0.05)


@every_schedule
def test_ddim_with_eta_one_is_ancestral(x64, schedule):
    x_1 = diffjax.prior_sample(jax.random.key(1), schedule, (4, 3))
    ts = diffjax.uniform_times(20)
    one = walk(functools.partial(diffjax.ddim, eta=1.0), schedule, x_1, ts)
    other = walk(diffjax.ancestral, schedule, x_1, ts)
    np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("variance", ["posterior", "beta"])
def test_ancestral_variances_bracket_the_truth(x64, variance):
    """Propagate the variance exactly through few, coarse steps on Gaussian data.

    With the posterior's variance samples come out too narrow for spread data, with beta too wide
    for data at a point (Nichol & Dhariwal 2021, section 3.1, after Sohl-Dickstein et al. 2015).
    """
    schedule = diffjax.cosine(-8.0, 8.0)
    for std, sign in ((1.0, -1), (0.01, +1)):

        def denoise(x_t, t, cond=None, std=std):
            alpha, sigma = diffjax.scales_at(schedule, t, x_t)
            gain = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
            return diffjax.decode("x_0", gain * x_t, x_t, alpha, sigma)

        sampler = diffjax.ancestral(denoise, schedule, variance=variance)
        x_1 = diffjax.prior_sample(jax.random.key(0), schedule, (50000, 1))
        ts = jnp.array([1.0, 0.75, 0.5, 0.25])
        x, _ = diffjax.sample(jax.random.key(1), sampler, x_1, ts)
        alpha, sigma = schedule(0.25)
        ratio = jnp.std(x) / jnp.sqrt(alpha**2 * std**2 + sigma**2) - 1
        exact = (variance == "posterior") == (std == 0.01)
        assert abs(ratio) < 0.01 if exact else sign * ratio > 0.02


def test_beta_variance_adds_no_noise_in_the_last_step():
    schedule = diffjax.cosine()
    sampler = diffjax.ancestral(gaussian(schedule), schedule, variance="beta")
    state = sampler.init(jnp.ones((2, 1)))
    a, b = (sampler.step(jax.random.key(k), state, 0.3, 0.0).x for k in (0, 1))
    assert jnp.array_equal(a, b)
    a, b = (sampler.step(jax.random.key(k), state, 0.3, 0.1).x for k in (0, 1))
    assert not jnp.array_equal(a, b)


@every_schedule
@every_sampler
def test_finite_over_the_whole_of_every_grid(schedule, make):
    x_1 = diffjax.prior_sample(jax.random.key(1), schedule, (8, 2))
    run = jax.jit(lambda ts: walk(make, schedule, x_1, ts))
    for name, grid in GRIDS.items():
        x_0 = run(grid(schedule, 12))
        assert jnp.isfinite(x_0).all(), name
        assert jnp.abs(x_0 - MEAN).max() < 20, name


@every_schedule
@every_grid
def test_grids_run_strictly_from_exactly_one_to_exactly_zero(schedule, grid):
    ts = np.asarray(grid(schedule, 40))
    assert len(ts) == 41 and ts[0] == 1 and ts[-1] == 0
    assert (np.diff(ts) < 0).all()


@every_schedule
def test_grids_are_even_in_what_they_say(x64, schedule):
    log_snr = schedule.log_snr(diffjax.log_snr_times(schedule, 10))
    np.testing.assert_allclose(np.diff(log_snr), np.ptp(log_snr) / 10, rtol=1e-5)
    rho_root = jnp.exp(-schedule.log_snr(diffjax.karras_times(schedule, 10, rho=5.0)) / 10)
    np.testing.assert_allclose(np.diff(rho_root), -np.ptp(rho_root) / 10, rtol=1e-5)


def test_karras_times_are_edms_sigmas(x64):
    """Karras et al. 2022, equation 5 with sigma 0.002 to 80, rho 7, 18 of them."""
    schedule = diffjax.log_uniform(0.002, 80.0)
    sigma = schedule(diffjax.karras_times(schedule, 17))[1]
    i = np.arange(18)
    expected = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    np.testing.assert_allclose(sigma, expected, rtol=1e-6)


def test_discrete_times_are_on_the_grid():
    np.testing.assert_allclose(diffjax.discrete_times(4, 4), [1, 0.75, 0.5, 0.25, 0])
    times = np.asarray(diffjax.discrete_times(1000, 37), np.float64) * 1000
    np.testing.assert_allclose(times, np.round(times), atol=1e-4)
    with pytest.raises(ValueError, match="8 steps on a grid of 4"):
        diffjax.discrete_times(4, 8)


@every_sampler
def test_a_sample_does_not_depend_on_its_batch_mates(make):
    schedule = diffjax.cosine()
    key = jax.random.key(5)
    x_1 = diffjax.prior_sample(key, schedule, (6, 2))
    ts = diffjax.uniform_times(6)
    many = walk(make, schedule, x_1, ts, key)
    few = walk(make, schedule, x_1[:2], ts, key)
    np.testing.assert_allclose(many[:2], few, rtol=1e-6)
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.array([4, 2]))
    chosen = walk(make, schedule, x_1[jnp.array([4, 2])], ts, keys)
    np.testing.assert_allclose(chosen, many[jnp.array([4, 2])], rtol=1e-6)


@every_sampler
def test_a_walk_keeps_the_precision_it_is_started_in(make):
    schedule = diffjax.cosine()
    network = lambda x_t, log_snr, cond: jnp.sin(x_t.astype(jnp.float32))
    sampler = make(diffjax.denoiser(network, schedule, "v"), schedule)
    x_1 = jnp.ones((2, 3), jnp.bfloat16)
    x_0, _ = diffjax.sample(jax.random.key(0), sampler, x_1, diffjax.uniform_times(4))
    assert x_0.dtype == jnp.bfloat16


@every_sampler
def test_the_loop_the_scan_and_the_jit_agree(make):
    schedule = diffjax.linear()
    sampler = make(gaussian(schedule), schedule)
    key = jax.random.key(0)
    x_1 = diffjax.prior_sample(key, schedule, (3, 2))
    ts = diffjax.uniform_times(5)
    state = sampler.init(x_1)
    for k, (t, s) in enumerate(zip(ts[:-1], ts[1:], strict=True)):
        keys = jax.vmap(lambda i, k=k: jax.random.fold_in(jax.random.fold_in(key, i), k))(
            jnp.arange(3)
        )
        state = sampler.step(keys, state, t, s)
    scanned, _ = diffjax.sample(key, sampler, x_1, ts)
    jitted, _ = jax.jit(functools.partial(diffjax.sample, sampler=sampler))(key, x_1=x_1, ts=ts)
    np.testing.assert_allclose(state.x, scanned, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(jitted, scanned, rtol=2e-5, atol=1e-6)


def test_gradients_flow_through_a_whole_walk(x64):
    """d x_0 / d x_1 of the exact flow of a Gaussian is the ratio of the marginals' widths."""
    schedule = diffjax.cosine(-8.0, 8.0)
    ts = diffjax.uniform_times(2000)
    end = lambda x: walk(diffjax.ddim, schedule, x[None, None], ts)[0, 0]
    width = lambda t: jnp.sqrt(schedule(t)[0] ** 2 * STD**2 + schedule(t)[1] ** 2)
    np.testing.assert_allclose(jax.grad(end)(0.3), width(0.0) / width(1.0), rtol=5e-3)


def test_observe_records_each_step_where_it_arrives():
    schedule = diffjax.cosine()
    sampler = diffjax.ddim(gaussian(schedule), schedule)
    x_1 = diffjax.prior_sample(jax.random.key(0), schedule, (3, 2))
    ts = diffjax.uniform_times(5)
    look = lambda state, t: (state.x, t, state.prediction.x_0)
    x_0, (path, at, predicted) = diffjax.sample(jax.random.key(1), sampler, x_1, ts, look)
    assert path.shape == predicted.shape == (5, 3, 2)
    assert jnp.array_equal(path[-1], x_0)
    assert jnp.array_equal(at, ts[1:])
    np.testing.assert_allclose(predicted[0], gaussian(schedule)(x_1, 1.0).x_0, rtol=1e-6)


@pytest.mark.parametrize(
    ("ts", "message"),
    [
        ([1.0, 0.5, 0.5, 0.0], "strictly decreasing or strictly increasing"),
        ([1.0, 0.2, 0.4, 0.0], "strictly decreasing or strictly increasing"),
        ([1.5, 0.5, 0.0], r"must lie in \[0, 1\]"),
        ([1.0], "at least two times"),
    ],
)
def test_bad_times_are_refused(ts, message):
    schedule = diffjax.cosine()
    sampler = diffjax.ddim(gaussian(schedule), schedule)
    with pytest.raises(ValueError, match=message):
        diffjax.sample(jax.random.key(0), sampler, jnp.ones((1, 1)), jnp.array(ts))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: diffjax.ddim(gaussian(None), diffjax.cosine(), eta=1.5), "eta=1.5"),
        (
            lambda: diffjax.ancestral(gaussian(None), diffjax.cosine(), variance="large"),
            "unknown variance 'large'",
        ),
        (lambda: diffjax.uniform_times(0), "0 steps"),
        (lambda: diffjax.log_snr_times(diffjax.cosine(), -3), "-3 steps"),
    ],
)
def test_bad_options_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_sampler_of_the_users_own_is_two_functions():
    """Euler's method on the flow ODE of x_0, written as a user would."""
    schedule = diffjax.rectified_flow()
    denoise = gaussian(schedule)

    def step(key, state, t, s):
        prediction = denoise(state.x, t)
        return samplers.State(state.x + (s - t) * (prediction.eps - prediction.x_0), prediction)

    own = diffjax.Sampler(samplers.init, step)
    x_1 = diffjax.prior_sample(jax.random.key(0), schedule, (2000, 1))
    x_0, _ = diffjax.sample(jax.random.key(1), own, x_1, diffjax.uniform_times(200))
    np.testing.assert_allclose(jnp.std(x_0), STD, atol=0.05)
