import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import diffjax
from catalogue import SCHEDULES
from diffjax.experiment import Config, Data, resolve

every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


@every_schedule
def test_strictly_decreasing_and_finite(schedule):
    t = jnp.linspace(0, 1, 4097)
    log_snr = np.asarray(schedule.log_snr(t))
    assert np.isfinite(log_snr).all()
    assert (np.diff(log_snr) < 0).all()
    alpha, sigma = schedule(t)
    assert (np.asarray(alpha) > 0).all() and (np.asarray(sigma) > 0).all()
    assert np.isfinite(alpha).all() and np.isfinite(sigma).all()


@pytest.mark.parametrize(
    ("schedule", "high", "low"),
    [
        (diffjax.cosine(-20.0, 20.0), 20, -20),
        (diffjax.cosine(-3.0, 18.0, scales=diffjax.flow), 18, -3),
        (diffjax.sigmoid(log_snr_min=-19.0, log_snr_max=17.0), 17, -19),
        (diffjax.sigmoid(0.0, 3.0, 0.3, log_snr_min=-20.0, log_snr_max=20.0), 20, -20),
        (diffjax.sigmoid(tau=0.05), 15, -15),
        (diffjax.rectified_flow(-20.0, 20.0), 20, -20),
        (diffjax.log_uniform(0.01, 50.0), -2 * np.log(0.01), -2 * np.log(50)),
        # B(1) = (0.1 + 20) / 2, and alpha^2 = exp(-B).
        (diffjax.linear(log_snr_max=20.0), 20, -np.log(np.expm1(10.05))),
        (diffjax.linear(0.0, 20.0), 20, -np.log(np.expm1(10.0))),
        (diffjax.linear(3.0, 3.0), 20, -np.log(np.expm1(3.0))),
    ],
)
def test_ends_are_where_asked(schedule, high, low):
    np.testing.assert_allclose(schedule.log_snr(jnp.array([0.0, 1.0])), [high, low], rtol=4e-7)


def snr_of_alpha(alpha):
    return np.log(alpha**2 / (1 - alpha**2))


def textbook_sigmoid(t, start=-3, end=3, tau=0.9):
    p = lambda u: 1 / (1 + np.exp(-u / tau))
    gamma = (p(end) - p(start + t * (end - start))) / (p(end) - p(start))
    return np.log(gamma / (1 - gamma))


@pytest.mark.parametrize(
    ("schedule", "textbook"),
    [
        (diffjax.cosine(-60.0, 60.0), lambda t: snr_of_alpha(np.cos(np.pi * t / 2))),
        (
            diffjax.linear(log_snr_max=60.0),
            lambda t: snr_of_alpha(np.exp(-0.25 * t**2 * (20 - 0.1) - 0.5 * t * 0.1)),
        ),
        (diffjax.sigmoid(tau=0.9, log_snr_min=-60.0, log_snr_max=60.0), textbook_sigmoid),
        (diffjax.rectified_flow(-60.0, 60.0), lambda t: 2 * np.log((1 - t) / t)),
        (diffjax.log_uniform(0.002, 80.0), lambda t: -2 * np.log(0.002 * (80 / 0.002) ** t)),
    ],
    ids=["cosine", "linear", "sigmoid", "rectified_flow", "log_uniform"],
)
def test_equals_the_papers_where_they_are_well_conditioned(x64, schedule, textbook):
    """Ends so far out that the rescaling of t is invisible: then the textbook form must appear."""
    t = np.linspace(0.02, 0.98, 49)
    np.testing.assert_allclose(schedule.log_snr(jnp.asarray(t)), textbook(t), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("scales", "textbook"),
    [
        (diffjax.vp, lambda snr: (np.sqrt(snr / (1 + snr)), np.sqrt(1 / (1 + snr)))),
        (diffjax.ve, lambda snr: (np.ones_like(snr), snr**-0.5)),
        (diffjax.flow, lambda snr: (snr**0.5 / (1 + snr**0.5), 1 / (1 + snr**0.5))),
    ],
)
def test_float32_accuracy_stated_in_the_docstring(scales, textbook):
    log_snr = np.linspace(-20, 20, 2001).astype(np.float32)
    for got, exact in zip(
        scales(jnp.asarray(log_snr)), textbook(np.exp(np.float64(log_snr))), strict=True
    ):
        np.testing.assert_allclose(got, exact, rtol=2e-6)


@pytest.mark.parametrize("name", ["cosine", "linear", "sigmoid", "rectified_flow", "log_uniform"])
def test_float32_log_snr_is_that_of_float64(name):
    make = {
        "cosine": lambda: diffjax.cosine(-20.0, 20.0),
        "linear": lambda: diffjax.linear(log_snr_max=20.0),
        "sigmoid": lambda: diffjax.sigmoid(log_snr_min=-20.0, log_snr_max=20.0),
        "rectified_flow": lambda: diffjax.rectified_flow(-20.0, 20.0),
        "log_uniform": lambda: diffjax.log_uniform(np.exp(-10), np.exp(10)),
    }[name]
    t = np.concatenate([np.geomspace(1e-7, 0.5, 500), np.linspace(0.5, 1, 500)]).astype(np.float32)
    single = make().log_snr(jnp.asarray(t))
    assert single.dtype == jnp.float32
    with jax.enable_x64(True):
        double = make().log_snr(jnp.asarray(np.float64(t)))
    np.testing.assert_allclose(single, double, atol=4e-6, rtol=0)


@pytest.mark.parametrize(
    "betas",
    [diffjax.linear_betas(1000), diffjax.scaled_linear_betas(1000), diffjax.cosine_betas(50)],
)
def test_from_betas_holds_the_cumulative_product_at_its_nodes(x64, betas):
    steps = len(betas)
    alpha, sigma = diffjax.from_betas(betas)(jnp.arange(1, steps + 1) / steps)
    abar = np.cumprod(1 - betas)
    np.testing.assert_allclose(alpha**2, abar, rtol=1e-10)
    np.testing.assert_allclose(sigma**2, 1 - abar, rtol=1e-10)


def test_beta_tables_have_their_published_values():
    linear = diffjax.linear_betas(1000)
    assert (linear[0], linear[-1]) == (1e-4, 0.02)
    assert np.ptp(np.diff(linear)) < 1e-16
    # Nichol & Dhariwal, figure 5: abar of the cosine schedule is near 1/2 at half time.
    abar = np.cumprod(1 - diffjax.cosine_betas(1000))
    np.testing.assert_allclose(abar[499], np.cos((0.5 + 0.008) / 1.008 * np.pi / 2) ** 2, rtol=2e-4)
    assert diffjax.cosine_betas(1000).max() == 0.999
    # Stable Diffusion's table: sqrt(abar_T) = 0.0683 (Lin et al. 2024, table 1).
    alpha_last = np.sqrt(np.prod(1 - diffjax.scaled_linear_betas(1000)))
    np.testing.assert_allclose(alpha_last, 0.068265, atol=1e-6)


def test_zero_terminal_snr_ends_in_pure_noise_and_keeps_its_start():
    betas = diffjax.scaled_linear_betas(1000)
    rescaled = diffjax.zero_terminal_snr(betas)
    assert rescaled[-1] == 1
    np.testing.assert_allclose(rescaled[0], betas[0], rtol=1e-9)
    schedule = diffjax.from_betas(rescaled, log_snr_min=-30.0)
    assert float(schedule.log_snr(1.0)) == -30


@every_schedule
def test_is_a_pytree_through_jit_without_a_retrace(schedule):
    traces = []

    @jax.jit
    def f(schedule, t):
        traces.append(None)
        return schedule(t)

    t = jnp.linspace(0, 1, 5)
    for _ in range(2):
        alpha, sigma = f(jax.tree.map(lambda leaf: leaf, schedule), t)
    assert len(traces) == 1
    np.testing.assert_allclose(alpha, schedule(t)[0], rtol=1e-5)
    np.testing.assert_allclose(sigma, schedule(t)[1], rtol=1e-5)


def test_vmaps_over_its_parameters_and_takes_gradients():
    ends = jnp.array([8.0, 12.0])
    got = jax.vmap(lambda end: diffjax.cosine(-end, end).log_snr(0.25))(ends)
    expected = [diffjax.cosine(-e, e).log_snr(0.25) for e in (8.0, 12.0)]
    np.testing.assert_allclose(got, expected, rtol=1e-6)

    schedule = diffjax.shift(diffjax.cosine(), 0.5)
    slope = jax.grad(lambda s: s.log_snr(0.3))(schedule)
    assert float(slope.log_snr.args[1]) == 1  # d (log_snr + by) / d by


@pytest.mark.parametrize("last", [0.02, 1.0])
def test_traced_betas_make_the_schedule_of_the_same_concrete_ones(last):
    betas = np.linspace(1e-3, 0.3, 10, dtype=np.float32)
    betas[-1] = last
    t = np.linspace(0, 1, 21, dtype=np.float32)
    log_snr = lambda betas: diffjax.from_betas(betas).log_snr(t)
    there = log_snr(betas)
    np.testing.assert_allclose(jax.jit(log_snr)(betas), there, rtol=1e-5, atol=1e-5)
    both = jax.vmap(log_snr)(np.stack([betas, betas / 2]))
    np.testing.assert_allclose(both[1], log_snr(betas / 2), rtol=1e-5, atol=1e-5)
    # At the first node, log-SNR is log(1 - beta) - log(beta).
    first = lambda betas: diffjax.from_betas(betas).log_snr(0.1)
    slope = jax.grad(first)(betas)
    exact = -1 / (1 - betas[0]) - 1 / betas[0]
    np.testing.assert_allclose(slope, np.r_[exact, np.zeros(9)], rtol=1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: diffjax.cosine(5.0, 5.0), "log_snr_min=5.0 must be below log_snr_max=5.0"),
        (lambda: diffjax.rectified_flow(3.0, -3.0), "must be below"),
        (lambda: diffjax.sigmoid(start=1.0, end=-1.0), "start < end"),
        (lambda: diffjax.sigmoid(tau=0.0), "tau > 0"),
        (lambda: diffjax.log_uniform(2.0, 1.0), "0 < sigma_min < sigma_max"),
        (lambda: diffjax.linear(-1.0, 2.0), "beta_min=-1.0"),
        (lambda: diffjax.linear(log_snr_max=-20.0), "must be below log_snr_max=-20"),
        (lambda: diffjax.linear(1e-10, 2e-10), "must be below"),
        (lambda: diffjax.cosine(float("nan"), 5.0), "must be below"),
        (lambda: diffjax.zero_terminal_snr(np.array([0.1])), "at least two"),
        (lambda: diffjax.from_betas(np.array([0.1, 1.5])), r"betas\[1\] = 1.5"),
        (lambda: diffjax.from_betas(np.array([1.0, 0.5])), r"betas\[0\] = 1.0"),
        (lambda: diffjax.from_betas(np.zeros((0,))), "at least one step"),
        (lambda: diffjax.from_betas(np.array([1e-12, 0.5])), "must fall strictly"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (diffjax.cosine, {"log_snr_min": -8, "log_snr_max": 7}),
        (diffjax.linear, {"beta_min": 1, "beta_max": 20, "log_snr_max": 7}),
        (diffjax.sigmoid, {"start": -3, "end": 3, "tau": 1, "log_snr_min": -8, "log_snr_max": 7}),
        (diffjax.log_uniform, {"sigma_min": 1, "sigma_max": 55}),
        (diffjax.rectified_flow, {"log_snr_min": -8, "log_snr_max": 7}),
    ],
)
def test_whole_numbers_are_numbers(make, options):
    t = jnp.linspace(0, 1, 5)
    floats = {name: float(value) for name, value in options.items()}
    np.testing.assert_array_equal(make(**options).log_snr(t), make(**floats).log_snr(t))


def test_shift_moves_log_snr_only():
    t = jnp.linspace(0, 1, 9)
    moved = diffjax.shift(diffjax.cosine(), -3.0)
    np.testing.assert_allclose(moved.log_snr(t), diffjax.cosine().log_snr(t) - 3, rtol=1e-6)
    alpha, sigma = moved(t)
    np.testing.assert_allclose(alpha**2 + sigma**2, 1, rtol=1e-6)


@pytest.mark.parametrize("base", [diffjax.cosine(-8.0, 8.0), diffjax.rectified_flow(-8.0, 8.0)])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (16, 64), (48, 48)])
def test_averaged_images_have_the_signal_to_noise_of_the_base_schedule(base, height, width):
    """Signal and noise of averaged x_t are measured; the base schedule says what their ratio is."""
    by = diffjax.resolution_shift(height, width, 16)
    shifted, factor = diffjax.shift(base, by), (height * width) ** 0.5 / 16
    means = diffjax.inverse.downsampling(round(factor))
    eps = jax.random.normal(jax.random.key(0), (64, height, width, 3))
    for t in (0.2, 0.5, 0.9):
        signal = means(diffjax.q_sample(shifted, jnp.ones_like(eps), t, 0 * eps)).mean()
        noise = means(diffjax.q_sample(shifted, 0 * eps, t, eps)).std()
        # The standard deviation of n numbers is known to 1 / sqrt(2 n), here at least 49,152.
        np.testing.assert_allclose(2 * jnp.log(signal / noise), base.log_snr(t), atol=0.03)
    with pytest.raises(ValueError, match="base=0: must be at least 1"):
        diffjax.resolution_shift(height, width, 0)


def test_a_config_shifts_its_schedule_by_the_size_of_its_images():
    t = jnp.linspace(0, 1, 9)
    log_snr = lambda **fields: resolve(Config(**fields)).schedule.log_snr(t)
    of_size = log_snr(data=Data("folder", size=64), schedule_base=32, schedule_shift=1.0)
    np.testing.assert_allclose(of_size, log_snr() - 2 * np.log(2) + 1, rtol=1e-5)
    of_shape = log_snr(data=Data("npz", shape=(8, 32, 3)), schedule_base=32)
    np.testing.assert_allclose(of_shape, log_snr() + 2 * np.log(2), rtol=1e-5)
    for fields, message in (
        (
            {"schedule_base": 32},
            "schedule_base=32: must be at least 1, and needs the size of the i",
        ),
        ({"data": Data("npz", shape=(2,)), "schedule_base": 32}, "needs the size of the images"),
        ({"data": Data(size=4), "schedule_base": 0}, "schedule_base=0: must be at least 1"),
        (
            {"data": Data(size=4), "schedule_base": 8, "schedule": "monotone"},
            r"schedule_shift=1.386\d+: schedule=monotone is learned",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            resolve(Config(**fields, weighting="elbo"))


def test_any_parameters_of_a_monotone_schedule_fall_between_its_ends():
    for seed in range(5):
        params = jax.tree.map(
            lambda a, seed=seed: a + jax.random.normal(jax.random.key(seed), a.shape),
            diffjax.monotone_params(16),
        )
        schedule = diffjax.monotone(params, -7.0, 9.0)
        log_snr = np.asarray(schedule.log_snr(jnp.linspace(0, 1, 201)))
        np.testing.assert_allclose(log_snr[[0, -1]], [9, -7], rtol=1e-5)
        assert (np.diff(log_snr) < 0).all()
    with pytest.raises(ValueError, match="width=0"):
        diffjax.monotone_params(0)


@pytest.mark.faults
def test_a_monotone_schedule_learns_to_vary_less_and_changes_no_bound(x64):
    """Kingma et al. 2021, sections 5.1 and 5.2, on an exact mixture and its exact denoiser.

    In continuous time the expected loss depends on the ends alone; its variance does not.
    """
    oracle = lambda schedule: diffjax.oracles.gaussian_mixture(
        schedule, [0.5, 0.5], [[-1.0], [1.0]], [0.01, 0.01]
    )
    x_0 = oracle(diffjax.cosine()).sample(jax.random.key(0), 256)

    @jax.jit
    def loss(params):
        schedule = diffjax.monotone(params, -8.0, 8.0)
        exact = oracle(schedule)

        def network(x_t, log_snr, cond):
            return exact(x_t, diffjax.time_at(schedule, log_snr)).eps

        return diffjax.diffusion_loss(
            jax.random.key(1), network, schedule, "eps", x_0, weight=diffjax.weightings.elbo()
        )

    tx = optax.adam(0.1)

    @jax.jit
    def step(params, state):
        slope = jax.grad(lambda params: jnp.mean(loss(params) ** 2))(params)
        updates, state = tx.update(slope, state)
        return optax.apply_updates(params, updates), state

    params = diffjax.monotone_params(8)
    before, mean = jnp.var(loss(params)), jnp.mean(loss(params))
    state = tx.init(params)
    for _ in range(30):
        params, state = step(params, state)
    after, same = jnp.var(loss(params)), jnp.mean(loss(params))
    assert after < 0.9 * before
    np.testing.assert_allclose(same, mean, rtol=0.1)
