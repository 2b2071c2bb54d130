import functools
import math

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import diffjax
from catalogue import DETERMINISTIC, SAMPLERS, SCHEDULES, each, slow
from diffjax import ode, oracles, samplers

every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
every_sampler = pytest.mark.parametrize("make", SAMPLERS.values(), ids=SAMPLERS)
GRIDS = {
    "uniform": lambda schedule, n: diffjax.uniform_times(n),
    "log_snr": diffjax.log_snr_times,
    "karras": diffjax.karras_times,
    "discrete": lambda schedule, n: diffjax.discrete_times(1000, n),
}
SOME = ("ancestral", "dpm_solver_pp_2m", "edm")
some_samplers = pytest.mark.parametrize("make", each(SAMPLERS, *SOME))


@functools.cache
def twelve_steps(name):
    """Every grid of a schedule; each is a search to be compiled."""
    return {grid: make(SCHEDULES[name], 12) for grid, make in GRIDS.items()}


every_grid = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
MEAN, STD = 0.4, 0.6
FEW = {name: SCHEDULES[name] for name in ("cosine", "log_uniform", "zero_terminal_snr")}
MIXTURE = (
    np.array([0.3, 0.7]),
    np.array([[-1.0, 0.5], [0.8, -0.3]]),
    np.array([[[0.1, 0.05], [0.05, 0.2]], [[0.3, -0.1], [-0.1, 0.1]]]),
)


def gaussian(schedule):
    """The exact denoiser of data N(MEAN, STD^2), in any number of dimensions."""

    def denoise(x_t, t, cond=None):
        d = x_t.shape[1]
        return oracles.gaussian(schedule, np.full(d, MEAN), STD**2)(x_t, t)

    return denoise


def walk(make, schedule, x_1, ts, key=jax.random.key(0)):
    return diffjax.sample(key, make(gaussian(schedule), schedule), x_1, ts)[0]


@pytest.mark.parametrize("schedule", FEW.values(), ids=FEW)
def test_ddim_converges_to_the_exact_probability_flow_at_first_order(x64, schedule):
    """Between t = 0.9 and 0.1, where no schedule's end is felt."""
    oracle = oracles.gaussian(schedule, [MEAN], STD**2)
    x = schedule(0.9)[1] * jnp.linspace(-2, 2, 9)[:, None]
    steps = np.array([80, 160, 320, 640])
    errors = []
    for n in steps:
        got = walk(diffjax.ddim, schedule, x, jnp.linspace(0.9, 0.1, n + 1))
        errors.append(float(jnp.abs(got - oracle.flow_map(x, 0.9, 0.1)).max()))
    order = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert 0.85 < order < 1.2, (order, errors)


ORDERS = {
    "ddim": (diffjax.ddim, 1),
    "heun": (diffjax.heun, 2),
    "edm": (diffjax.edm, 2),
    "dpm_solver_pp_2m": (diffjax.dpm_solver_pp_2m, 2),
    "dpm_solver_pp_3m": (diffjax.dpm_solver_pp_3m, 3),
    "unipc_1": (functools.partial(diffjax.unipc, order=1), 2),
    "unipc_2": (diffjax.unipc, 3),
    "unipc_3": (functools.partial(diffjax.unipc, order=3), 4),
    "lms_1": (functools.partial(diffjax.lms, order=1), 1),
    "lms_2": (functools.partial(diffjax.lms, order=2), 2),
    "lms_3": (functools.partial(diffjax.lms, order=3), 3),
    "lms_4": (diffjax.lms, 4),
}


@functools.cache
def exact_walks():
    """16 points of noise and where the exact flow of the mixture takes them."""
    schedule = diffjax.cosine(-7.0, 7.0)
    oracle = oracles.gaussian_mixture(schedule, *MIXTURE)
    x_1 = diffjax.prior_sample(jax.random.key(0), schedule, (16, 2))
    return schedule, oracle, x_1, oracle.flow_map(x_1, 1.0, 0.0)


def measured_order(make):
    """Of strong convergence, on uniform log-SNR over nearly all of the noise.

    The first steps of a multistep method are of a lower order; where the walk starts, at log-SNR
    -7, the prediction hardly changes, so that they do not show.
    """
    schedule, oracle, x_1, exact = exact_walks()
    errors = []
    for n in (80, 160):
        ts = diffjax.log_snr_times(schedule, n)
        got, _ = diffjax.sample(jax.random.key(0), make(oracle, schedule), x_1, ts)
        errors.append(float(jnp.abs(got - exact).max()))
    return np.log2(errors[0] / errors[1])


@pytest.mark.parametrize(
    ("make", "order"), each(ORDERS, "ddim", "heun", "dpm_solver_pp_3m", "unipc_2", "lms_4")
)
def test_order_of_convergence_on_a_mixture(x64, make, order):
    assert order - 0.3 < measured_order(make) < order + 0.5


def stale_heun(denoise, schedule):
    """A bug found in public code: the corrector takes the predictor's evaluation again."""

    def step(key, state, t, s):
        first = ode.velocity(denoise, schedule, state.x / ode.radius(schedule, t, state.x), t)[0]
        y = state.x / ode.radius(schedule, t, state.x)
        y = y + (ode.angle(schedule, s) - ode.angle(schedule, t)) * (first + first) / 2
        return samplers.State(y * ode.radius(schedule, s, y), y)

    return diffjax.Sampler(samplers.init, step)


def ddim_with_alpha_t(denoise, schedule):
    """Another: x_0 is scaled by alpha_t where alpha_s belongs."""

    def step(key, state, t, s):
        x_0, eps = denoise(state.x, t)
        alpha_t, sigma_s = schedule(t)[0], schedule(s)[1]
        return samplers.State(alpha_t * x_0 + sigma_s * eps, x_0)

    return diffjax.Sampler(samplers.init, step)


def published_3m(denoise, schedule):
    """DPM-Solver's multistep code, whose D2 is half of the second derivative it stands for."""

    def step(key, state, t, s):
        past = [(schedule.log_snr(t) / 2, denoise(state.x, t).x_0), *state.memory][:3]
        (l0, m0), (l1, m1), (l2, m2) = past
        h = schedule.log_snr(s) / 2 - l0
        r0, r1 = (l0 - l1) / h, (l1 - l2) / h
        first, before = (m0 - m1) / r0, (m1 - m2) / r1
        d1 = first + r0 / (r0 + r1) * (first - before)
        d2 = (first - before) / (r0 + r1)
        phi_1 = jnp.expm1(-h)
        phi_2 = phi_1 / h + 1
        phi_3 = phi_2 / h - 0.5
        (_, sigma_t), (alpha_s, sigma_s) = schedule(t), schedule(s)
        x = sigma_s / sigma_t * state.x - alpha_s * (phi_1 * m0 - phi_2 * d1 + phi_3 * d2)
        return samplers.State(x, m0, tuple(past[:2]))

    def init(x_1):
        nothing = jnp.zeros_like(x_1)
        return samplers.State(x_1, nothing, ((-30.0, nothing), (-60.0, nothing)))

    return diffjax.Sampler(init, step)


@pytest.mark.parametrize(
    ("bug", "order"), [(stale_heun, 1), (ddim_with_alpha_t, 0), (published_3m, 2)]
)
def test_the_measurement_of_orders_sees_a_bug(x64, bug, order):
    """The design's two planted bugs, and the published third order that is of second."""
    assert order - 0.3 < measured_order(bug) < order + 0.5


@some_samplers
def test_a_walk_depends_on_log_snr_alone_not_on_how_it_splits_into_scales(x64, make):
    """The same log-SNR with other scales is the same walk in other units, noise included."""
    if make in (diffjax.euler_maruyama, SAMPLERS["ancestral_beta"]):
        pytest.skip("the one freezes x_t, the other takes the noise of x_t for x_s: units matter")
    ends = []
    for scales in (diffjax.vp, diffjax.ve, diffjax.flow):
        schedule = diffjax.cosine(-12.0, 12.0, scales=scales)
        oracle = oracles.gaussian_mixture(schedule, *MIXTURE)
        start = jax.random.normal(jax.random.key(0), (4, 2))
        x_1 = start * jnp.hypot(*schedule(1.0))
        x_0, _ = diffjax.sample(
            jax.random.key(1), make(oracle, schedule), x_1, diffjax.uniform_times(6)
        )
        ends.append(x_0 / jnp.hypot(*schedule(0.0)))
    np.testing.assert_allclose(ends[1], ends[0], rtol=1e-6)
    np.testing.assert_allclose(ends[2], ends[0], rtol=1e-6)


@pytest.mark.parametrize("make", each(DETERMINISTIC, "ddim", "heun", "unipc"))
def test_data_is_encoded_and_decoded_again(x64, make):
    """x_0 -> x_1 -> x_0, and x_1 is where the exact flow takes x_0."""
    schedule, oracle, x_1, x_0 = exact_walks()
    sampler, ts = make(oracle, schedule), diffjax.log_snr_times(schedule, 200)
    encoded, _ = diffjax.sample(jax.random.key(0), sampler, x_0, ts[::-1])
    back, _ = diffjax.sample(jax.random.key(0), sampler, encoded, ts)
    tolerance = 0.1 if make is diffjax.ddim else 5e-3
    np.testing.assert_allclose(encoded, x_1, atol=tolerance)
    np.testing.assert_allclose(back, x_0, atol=tolerance)


@pytest.mark.parametrize("schedule", FEW.values(), ids=FEW)
def test_ddim_encodes_and_comes_back(x64, schedule):
    x_0 = jnp.linspace(-1, 1, 7)[:, None]
    ts = jnp.linspace(0, 1, 2001)
    x_1 = walk(diffjax.ddim, schedule, x_0, ts)
    back = walk(diffjax.ddim, schedule, x_1, ts[::-1])
    np.testing.assert_allclose(back, x_0, atol=0.02)


STOCHASTIC = [name for name in SAMPLERS if name not in DETERMINISTIC]


@pytest.mark.parametrize("schedule", FEW.values(), ids=FEW)
@pytest.mark.parametrize(
    "name", ["ancestral", *slow(*(name for name in STOCHASTIC if name != "ancestral"))]
)
def test_samples_have_the_mean_and_variance_of_the_data(schedule, name):
    """Weak convergence: to sampling error, and the bias of 200 steps."""
    x_1 = diffjax.prior_sample(jax.random.key(1), schedule, (4000, 1))
    x_0 = walk(SAMPLERS[name], schedule, x_1, diffjax.uniform_times(200), jax.random.key(2))
    # x_1 is drawn without the data's mean, as is usual; what alpha_1 leaves of it shows.
    left = schedule(1.0)[0] / schedule(1.0)[1]
    np.testing.assert_allclose(jnp.mean(x_0), MEAN, atol=0.05 + left)
    np.testing.assert_allclose(jnp.std(x_0), STD, atol=0.05)


@pytest.mark.parametrize("schedule", FEW.values(), ids=FEW)
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


@pytest.mark.parametrize("name", FEW)
@some_samplers
def test_finite_over_the_whole_of_every_grid(name, make):
    x_1 = diffjax.prior_sample(jax.random.key(1), FEW[name], (8, 2))
    run = jax.jit(lambda ts: walk(make, FEW[name], x_1, ts))
    for grid, ts in twelve_steps(name).items():
        x_0 = run(ts)
        assert jnp.isfinite(x_0).all(), grid
        assert jnp.abs(x_0 - MEAN).max() < 20, grid


@every_schedule
@every_grid
def test_grids_run_strictly_from_exactly_one_to_exactly_zero(schedule, grid):
    ts = np.asarray(grid(schedule, 40))
    assert len(ts) == 41 and ts[0] == 1 and ts[-1] == 0
    assert (np.diff(ts) < 0).all()


@pytest.mark.parametrize("grid", [diffjax.log_snr_times, diffjax.karras_times])
def test_a_grid_of_a_steep_schedule_never_repeats_a_time(x64, grid):
    """Near t = 1 the sigmoid falls by 0.2 from one float32 to the next."""
    schedule = diffjax.sigmoid()
    ts = np.asarray(jax.jit(lambda: grid(schedule, 1000))())
    assert ts.dtype == np.float64
    with jax.enable_x64(False):
        make = lambda: grid(schedule, 1000)
        rounded = [np.asarray(f()) for f in (make, jax.jit(make))]
    for found in rounded:
        assert found.dtype == np.float32 and found[0] == 1 and found[-1] == 0
        assert (np.diff(found) < 0).all()
        assert (np.diff(schedule.log_snr(found)) > 0).all()
        np.testing.assert_allclose(found, ts, rtol=1e-4)


@pytest.mark.faults
def test_the_times_of_a_grid_have_the_derivative_of_the_schedules_inverse(x64):
    """Against differences, where the noise at the end is learned."""
    times = lambda c: diffjax.karras_times(diffjax.log_uniform(0.01, c), 3)
    slope = jax.jacfwd(times)(5.0)
    np.testing.assert_allclose(slope, (times(5.0 + 1e-5) - times(5.0 - 1e-5)) / 2e-5, atol=1e-6)
    assert jnp.abs(slope).max() > 1e-3


@pytest.mark.parametrize("schedule", FEW.values(), ids=FEW)
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


@pytest.mark.parametrize(
    "make",
    [
        lambda d: diffjax.predictor_corrector(d, corrections=1.5),
        lambda d: diffjax.predictor_corrector(d, snr=math.nan),
        lambda d: diffjax.edm(d, steps=2.5),
        lambda d: diffjax.edm(d, s_churn=math.nan),
        lambda d: diffjax.edm(d, s_churn=1.0, s_noise=math.inf),
        lambda d: diffjax.dpm_solver_pp_2m_sde(d, eta=math.nan),
        lambda d: diffjax.unipc(d, order=1.5),
        lambda d: diffjax.uniform_times(2.5),
        lambda d: diffjax.discrete_times(10.5, 4),
        lambda d: diffjax.karras_times(diffjax.cosine(), 4, rho=math.nan),
        lambda d: diffjax.clip_x_0(d, low=math.nan),
        lambda d: diffjax.flow_log_likelihood(d, d.schedule, jnp.zeros((1, 2)), steps=2.5),
        lambda d: diffjax.tiled(d, 8, overlap=2.5),
        lambda d: diffjax.cosine(-15.0, math.inf),
    ],
)
def test_counts_that_are_not_whole_and_numbers_that_are_not_finite_are_refused(make, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as users run it
    with pytest.raises(ValueError, match=r"2\.5|1\.5|10\.5|nan|inf"):
        make(oracles.gaussian(diffjax.cosine(), [0.0, 0.0], 1.0))


def test_the_jump_of_a_gaussian_keeps_the_precision_it_is_started_in():
    jump = diffjax.jump(oracles.gaussian(diffjax.cosine(), jnp.zeros(3), 1.0))
    x_1 = jnp.ones((2, 3), jnp.bfloat16)
    x_0, _ = diffjax.sample(jax.random.key(0), jump, x_1, diffjax.uniform_times(4))
    assert x_0.dtype == jnp.bfloat16


@some_samplers
def test_a_walk_keeps_the_precision_it_is_started_in(make):
    schedule = diffjax.cosine()
    network = lambda x_t, log_snr, cond: jnp.sin(x_t.astype(jnp.float32))
    sampler = make(diffjax.denoiser(network, schedule, "v"), schedule)
    x_1 = jnp.ones((2, 3), jnp.bfloat16)
    x_0, _ = diffjax.sample(jax.random.key(0), sampler, x_1, diffjax.uniform_times(4))
    assert x_0.dtype == jnp.bfloat16


@some_samplers
def test_the_loop_and_the_scan_agree(make):
    schedule = diffjax.linear()
    sampler = make(gaussian(schedule), schedule)
    key = jax.random.key(0)
    x_1 = diffjax.prior_sample(key, schedule, (3, 2))
    ts = diffjax.uniform_times(3)
    state = sampler.init(x_1)
    for k, (t, s) in enumerate(zip(ts[:-1], ts[1:], strict=True)):
        keys = jax.vmap(lambda i, k=k: jax.random.fold_in(jax.random.fold_in(key, i), k))(
            jnp.arange(3)
        )
        state = sampler.step(keys, state, t, s)
    scanned, _ = diffjax.sample(key, sampler, x_1, ts)
    np.testing.assert_allclose(state.x, scanned, rtol=2e-5, atol=1e-6)


def published_unipc(denoise, schedule, x, ts, order):
    """Zhao et al. 2023, Algorithms 5 to 8 with B_2, coefficients from the linear system R a = b."""
    lam = np.asarray(schedule.log_snr(ts)) / 2
    alpha, sigma = (np.asarray(v) for v in schedule(ts))

    def move(x, base, rest, i, j):
        h = lam[j] - lam[i]
        r = np.array([(lam[k] - lam[i]) / h for k, _ in rest])
        basis = np.expm1(-h)
        b, phi, factorial = [], np.expm1(-h) / -h - 1, 1
        for n in range(1, len(rest) + 1):
            b.append(phi * factorial / basis)
            factorial *= n + 1
            phi = phi / -h - 1 / factorial
        system = np.array([r ** (n - 1) for n in range(1, len(rest) + 1)])
        a = [0.5] if len(rest) < 2 else np.linalg.solve(system, np.array(b))
        mix = sum(c * (m - base) / q for c, q, (_, m) in zip(a, r, rest, strict=False))
        return sigma[j] / sigma[i] * x - alpha[j] * basis * (base + mix)

    past, corrected = [], x
    for i in range(len(ts) - 1):
        m = np.asarray(denoise(jnp.asarray(x), ts[i]).x_0)
        if past:
            used = min(order, len(past))
            rest = [*past[-used:-1], (i, m)]
            x = move(corrected, past[-1][1], rest, i - 1, i)
        corrected = x
        past.append((i, m))
        used = min(order, len(past))
        x = move(x, m, past[-used:-1], i, i + 1)
    return x


def published_lms(denoise, schedule, x, ts, order):
    """k-diffusion's `sample_lms` with its integrals done by numpy's polynomials."""
    alpha, sigma = (np.asarray(v) for v in schedule(ts))
    rho, y, past = sigma / alpha, x / alpha[0], []
    for i in range(len(ts) - 1):
        past.insert(0, (rho[i], np.asarray(denoise(jnp.asarray(y * alpha[i]), ts[i]).eps)))
        past = past[:order]
        for j, (node, eps) in enumerate(past):
            basis = np.poly1d([1.0])
            for k, (other, _) in enumerate(past):
                if k != j:
                    basis = basis * np.poly1d([1.0, -other]) / (node - other)
            area = basis.integ()
            y = y + (area(rho[i + 1]) - area(rho[i])) * eps
    return y * alpha[-1]


@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_is_the_published_one(x64, order):
    schedule = diffjax.linear()
    oracle = oracles.gaussian_mixture(schedule, *MIXTURE)
    ts = diffjax.log_snr_times(schedule, 9)
    x_1 = diffjax.prior_sample(jax.random.key(0), schedule, (3, 2))
    sampler = diffjax.unipc(oracle, schedule, order=order)
    got, _ = diffjax.sample(jax.random.key(0), sampler, x_1, ts)
    expected = published_unipc(oracle, schedule, np.asarray(x_1), ts, order)
    np.testing.assert_allclose(got, expected, rtol=1e-9)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_lms_is_the_published_one(x64, order):
    schedule = diffjax.log_uniform()
    oracle = oracles.gaussian_mixture(schedule, *MIXTURE)
    ts = diffjax.karras_times(schedule, 9)
    x_1 = diffjax.prior_sample(jax.random.key(0), schedule, (3, 2))
    sampler = diffjax.lms(oracle, schedule, order=order)
    got, _ = diffjax.sample(jax.random.key(0), sampler, x_1, ts)
    expected = published_lms(oracle, schedule, np.asarray(x_1), ts, order)
    np.testing.assert_allclose(got, expected, rtol=1e-9)


def test_third_order_dpm_solver_is_unipc_without_correction_and_2m_its_second_order(x64):
    """Two derivations of one method: divided differences here, a linear system there."""
    schedule = diffjax.cosine()
    oracle = oracles.gaussian_mixture(schedule, *MIXTURE)
    ts = diffjax.log_snr_times(schedule, 3)
    x_1 = diffjax.prior_sample(jax.random.key(0), schedule, (3, 2))
    for make, order in ((diffjax.dpm_solver_pp_2m, 2), (diffjax.dpm_solver_pp_3m, 3)):
        state, past = make(oracle, schedule).init(x_1), []
        lam = schedule.log_snr(ts) / 2
        for i in range(3):
            x, m = state.x, np.asarray(oracle(state.x, ts[i]).x_0)
            past = [m, *past][:order]
            state = make(oracle, schedule).step(None, state, ts[i], ts[i + 1])
        h = lam[3] - lam[2]  # equal steps: differences are those of Newton's backward formula
        first = past[0] - past[1]
        second = past[0] - 2 * past[1] + past[2] if order == 3 else 0
        u = np.linspace(0, 1, 20001)[:, None, None]
        weight = float(h) * np.exp(float(h) * (u - 1))
        slope = u if order == 3 else 0.5
        curve = past[0] + slope * first + u * (u + 1) / 2 * second
        (_, sigma), (alpha_s, sigma_s) = schedule(ts[2]), schedule(ts[3])
        expected = sigma_s / sigma * np.asarray(x) + alpha_s * np.trapezoid(
            weight * curve, u, axis=0
        )
        np.testing.assert_allclose(state.x, expected, rtol=1e-7)


@pytest.mark.faults
def test_edms_churn_is_algorithm_2(x64):
    """Karras et al. 2022, Algorithm 2 in its own sigma, with the sampler's own noise."""
    schedule = diffjax.log_uniform(0.002, 80.0)
    oracle = oracles.gaussian_mixture(schedule, *MIXTURE)
    n, churn, s_noise = 8, 2.0, 1.003
    ts = diffjax.karras_times(schedule, n)[1:]
    x_1 = diffjax.prior_sample(jax.random.key(0), schedule, (3, 2))
    options = dict(s_churn=churn, s_min=0.05, s_max=50.0, s_noise=s_noise, steps=n)
    sampler = diffjax.edm(oracle, schedule, **options)
    key = jax.random.key(1)
    got, _ = diffjax.sample(key, sampler, x_1, ts)

    sigmas, x = schedule(ts)[1], x_1
    denoise = lambda x, sigma: oracle(x, diffjax.time_at(schedule, -2 * jnp.log(sigma))).x_0
    for k in range(len(ts) - 1):
        gamma = min(churn / n, 2**0.5 - 1) if 0.05 <= sigmas[k] <= 50 else 0.0
        hat = sigmas[k] * (1 + gamma)
        x = x + jnp.sqrt(jnp.maximum(hat**2 - sigmas[k] ** 2, 0)) * s_noise * noise(key, k, 3)
        d = (x - denoise(x, hat)) / hat
        x_next = x + (sigmas[k + 1] - hat) * d
        d_next = (x_next - denoise(x_next, sigmas[k + 1])) / sigmas[k + 1]
        x = x + (sigmas[k + 1] - hat) * (d + d_next) / 2
    np.testing.assert_allclose(got, x, rtol=1e-8)


def noise(key, k, batch):
    """What example i draws in step k: its key is that of the walk folded with i, then with k."""
    fold = lambda i: jax.random.fold_in(jax.random.fold_in(key, i), k)
    return jax.vmap(lambda i: jax.random.normal(fold(i), (2,)))(jnp.arange(batch))


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_2m_sde_is_the_published_one(x64, eta):
    """k-diffusion's `sample_dpmpp_2m_sde`, "midpoint", in its sigma, with the sampler's noise."""
    schedule = diffjax.log_uniform(0.002, 80.0)
    oracle = oracles.gaussian_mixture(schedule, *MIXTURE)
    ts, key = diffjax.log_snr_times(schedule, 9), jax.random.key(1)
    x = diffjax.prior_sample(jax.random.key(0), schedule, (3, 2))
    sampler = diffjax.dpm_solver_pp_2m_sde(oracle, schedule, eta=eta)
    got, _ = diffjax.sample(key, sampler, x, ts)
    sigmas, old, h_last = schedule(ts)[1], None, None
    for k in range(9):
        denoised = oracle(x, ts[k]).x_0
        h = jnp.log(sigmas[k] / sigmas[k + 1])
        x = sigmas[k + 1] / sigmas[k] * jnp.exp(-h * eta) * x - jnp.expm1(-h * (1 + eta)) * denoised
        if old is not None:
            x = x - 0.5 * jnp.expm1(-h * (1 + eta)) / (h_last / h) * (denoised - old)
        x = x + noise(key, k, 3) * sigmas[k + 1] * jnp.sqrt(-jnp.expm1(-2 * eta * h))
        old, h_last = denoised, h
    np.testing.assert_allclose(got, x, rtol=1e-9)


def test_euler_maruyama_is_eulers_step_of_the_reverse_sde(x64):
    """Song et al. 2021, equation 6, for short steps: drift f x - g^2 score, diffusion g."""
    schedule, t, h = diffjax.linear(log_snr_max=15.0), 0.6, 1e-5
    oracle = oracles.gaussian_mixture(schedule, *MIXTURE)
    x, key = jnp.array([[0.3, -0.7], [1.0, 0.2]]), jax.random.key(3)
    state = diffjax.euler_maruyama(oracle, schedule).step(key, samplers.init(x), t, t - h)
    alpha, slope = jax.jvp(lambda t: schedule(t)[0], (t,), (1.0,))
    f, g = slope / alpha, jnp.sqrt(-2 * slope / alpha)  # of a VP-SDE: g^2 = beta = -2 f
    z = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), (2,)))(jnp.arange(2))
    drift = f * x - g**2 * oracle.score(x, t)
    expected = x - h * drift + jnp.sqrt(h) * g * z
    np.testing.assert_allclose(state.x - x, expected - x, rtol=1e-3)


def test_a_correction_is_a_step_of_langevin_dynamics(x64):
    """Song et al. 2021, Algorithm 4, after a predictor that stands still."""
    schedule, s, snr = diffjax.log_uniform(), 0.4, 0.2
    oracle = oracles.gaussian_mixture(schedule, *MIXTURE)
    x, key = jnp.array([[0.3, -0.7], [1.0, 0.2]]), jax.random.key(3)
    still = lambda denoise, schedule: diffjax.Sampler(samplers.init, lambda k, state, t, s: state)
    sampler = diffjax.predictor_corrector(oracle, schedule, predictor=still, snr=snr)
    state = sampler.step(key, sampler.init(x), 0.5, s)
    h = 2 * (snr * schedule(s)[1]) ** 2
    z = noise(key, 1, 2)
    expected = x + h * oracle.score(x, s) + jnp.sqrt(2 * h) * z
    np.testing.assert_allclose(state.x, expected, rtol=1e-9)


@pytest.mark.faults
def test_long_steps_of_a_multistep_sampler_are_of_first_order(x64):
    """20 uniform steps of DDPM's table: its ends are steps many times the length of the others."""
    schedule = diffjax.from_betas(diffjax.linear_betas(1000))
    oracle = oracles.gaussian_mixture(schedule, *MIXTURE)
    x_1 = diffjax.prior_sample(jax.random.key(0), schedule, (16, 2))
    exact = oracle.flow_map(x_1, 1.0, 0.0)
    error = lambda make: float(
        jnp.abs(
            diffjax.sample(
                jax.random.key(0), make(oracle, schedule), x_1, diffjax.uniform_times(20)
            )[0]
            - exact
        ).max()
    )
    for make in (diffjax.dpm_solver_pp_2m, diffjax.dpm_solver_pp_3m, diffjax.unipc):
        assert error(make) < error(diffjax.ddim)


@some_samplers
def test_a_sample_is_the_same_in_any_batch_and_on_any_number_of_devices(make):
    """Eight at once, one on each of eight devices by pmap, and spread by jit, keyed by index."""
    schedule = diffjax.cosine(-6.0, 6.0)
    ts, index, key = diffjax.uniform_times(4), jnp.arange(8), jax.random.key(1)
    x_1 = diffjax.prior_sample(jax.random.key(0), schedule, (8, 2))

    def generate(x_1, index):
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(index)
        return walk(make, schedule, x_1, ts, keys)

    one = walk(make, schedule, x_1, ts, key)  # one key stands for these
    apart = jax.pmap(generate)(x_1.reshape(8, 1, 2), index.reshape(8, 1)).reshape(8, 2)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:8]), "data")
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    sharded = jax.jit(generate)(*jax.device_put((x_1, index), spread))
    np.testing.assert_allclose(apart, one, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(sharded, one, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "name",
    ["ancestral", *slow("unipc_third", "ddim_half", "edm_churn", "euler_maruyama", "lms")],
)
def test_gradients_through_a_walk_are_finite_and_those_of_differences(x64, name):
    """Also with respect to the schedule, whose ends the samplers must not make singular."""

    @jax.jit
    def end(x, low):
        schedule = diffjax.cosine(low, 6.0)
        ts = jnp.linspace(0.9, 0.1, 4)
        return walk(SAMPLERS[name], schedule, x[None, None], ts)[0, 0]

    at, h = (0.3, -6.0), 1e-6
    slopes = jax.jit(jax.grad(end, (0, 1)))(*map(jnp.asarray, at))
    for i, slope in enumerate(slopes):
        up, down = ([v + d * (j == i) for j, v in enumerate(at)] for d in (h, -h))
        difference = (end(*map(jnp.asarray, up)) - end(*map(jnp.asarray, down))) / (2 * h)
        np.testing.assert_allclose(slope, difference, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["ancestral", *slow("ddim_one", "edm_churn")])
def test_gradients_from_the_very_ends_are_finite(name):
    """From t = 1, where EDM adds no noise, on a schedule whose first step keeps nothing of eps."""
    make = {"ddim_one": functools.partial(diffjax.ddim, eta=1.0)}.get(name) or SAMPLERS[name]
    table = diffjax.from_betas(diffjax.zero_terminal_snr(diffjax.linear_betas(1000)))

    def end(by):
        return walk(
            make, diffjax.shift(table, by), jnp.ones((2, 1)), diffjax.uniform_times(6)
        ).sum()

    assert jnp.isfinite(jax.jit(jax.grad(end))(0.3))


def test_the_gradient_by_eta_is_finite_where_it_begins():
    schedule = diffjax.cosine()
    ts = diffjax.uniform_times(3)

    def end(eta):
        make = functools.partial(diffjax.ddim, eta=eta)
        return walk(make, schedule, jnp.ones((2, 1)), ts).sum()

    assert jnp.isfinite(jax.grad(end)(0.0))


@pytest.mark.parametrize("name", ["edm", "lms"])
def test_solvers_in_sigma_lose_no_digits_where_it_is_huge(name):
    """sigma/alpha is 160,000 at t = 1; float32 has seven digits of it, and needs them for x_0."""
    schedule = diffjax.from_betas(diffjax.zero_terminal_snr(diffjax.linear_betas(1000)))
    x_1, ts = jax.random.normal(jax.random.key(0), (8, 1)), np.linspace(1.0, 0.0, 21)
    single = walk(SAMPLERS[name], schedule, x_1, ts.astype(np.float32))
    with jax.enable_x64(True):
        double = walk(SAMPLERS[name], schedule, jnp.asarray(x_1, jnp.float64), ts)
    np.testing.assert_allclose(single, double, rtol=1e-3, atol=1e-3)


@pytest.mark.faults
def test_options_may_be_traced_and_vmapped():
    schedule = diffjax.cosine()
    oracle = oracles.gaussian(schedule, [MEAN], STD**2)
    x_1 = diffjax.prior_sample(jax.random.key(0), schedule, (3, 1))

    def run(make):
        return lambda option: diffjax.sample(
            jax.random.key(1), make(option), x_1, diffjax.uniform_times(4)
        )[0]

    for make in (
        lambda eta: diffjax.ddim(oracle, schedule, eta=eta),
        lambda eta: diffjax.dpm_solver_pp_2m_sde(oracle, schedule, eta=eta),
        lambda churn: diffjax.edm(oracle, schedule, s_churn=churn),
        lambda snr: diffjax.predictor_corrector(oracle, schedule, snr=snr),
    ):
        many = jax.vmap(run(make))(jnp.array([0.25, 1.0]))
        np.testing.assert_allclose(many[1], run(make)(1.0), rtol=1e-5, atol=1e-6)
        assert not jnp.allclose(many[0], many[1])


@pytest.mark.faults
def test_langevin_corrections_mend_what_a_coarse_predictor_got_wrong():
    """20 steps of DDIM from the wrong spread; corrections bring it back to the data's."""
    schedule = diffjax.cosine()
    denoise = gaussian(schedule)
    x_1 = 0.2 * diffjax.prior_sample(jax.random.key(1), schedule, (4000, 1))
    off = []
    for corrections in (1, 8):
        sampler = diffjax.predictor_corrector(
            denoise, schedule, predictor=diffjax.ddim, corrections=corrections
        )
        x_0, _ = diffjax.sample(jax.random.key(2), sampler, x_1, diffjax.uniform_times(20))
        off.append(abs(float(jnp.std(x_0)) - STD))
    plain = abs(float(jnp.std(walk(diffjax.ddim, schedule, x_1, diffjax.uniform_times(20)))) - STD)
    assert plain > 2 * off[0] > 3 * off[1], (plain, off)


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
    look = lambda state, t: (state.x, t, state.x_0)
    x_0, (path, at, predicted) = diffjax.sample(jax.random.key(1), sampler, x_1, ts, look)
    assert path.shape == predicted.shape == (5, 3, 2)
    assert jnp.array_equal(path[-1], x_0)
    assert jnp.array_equal(at, ts[1:])
    np.testing.assert_allclose(predicted[0], gaussian(schedule)(x_1, 1.0).x_0, rtol=1e-6)


@pytest.mark.parametrize("make", [diffjax.ancestral, diffjax.ddim])
def test_a_grid_of_known_values_is_checked_under_jit_too(make):
    schedule = diffjax.cosine()
    sampler = make(gaussian(schedule), schedule)
    grids = [2 * diffjax.uniform_times(4), diffjax.discrete_times(10, 4)[::-1]]
    for ts in grids[: 1 if make is diffjax.ddim else 2]:
        run = jax.jit(lambda x, ts=ts: diffjax.sample(jax.random.key(0), sampler, x, ts)[0])
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\]|stochastic"):
            run(jnp.ones((1, 1)))


@pytest.mark.parametrize(
    ("ts", "message"),
    [
        ([1.0, 0.5, 0.5, 0.0], r"strictly increasing, but ts\[1\] = 0.5 and ts\[2\] = 0.5"),
        ([0.0, 0.4, 0.25, 1.0], r"strictly increasing, but ts\[1\] = 0.4\d* and ts\[2\] = 0.25"),
        ([1.5, 0.5, 0.0], r"must lie in \[0, 1\]"),
        ([1.0], "at least two times"),
    ],
)
def test_bad_times_are_refused(ts, message):
    schedule = diffjax.cosine()
    sampler = diffjax.ddim(gaussian(schedule), schedule)
    with pytest.raises(ValueError, match=message):
        diffjax.sample(jax.random.key(0), sampler, jnp.ones((1, 1)), jnp.array(ts))


COSINE = gaussian(diffjax.cosine()), diffjax.cosine()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: diffjax.ddim(gaussian(None), diffjax.cosine(), eta=1.5), "eta=1.5"),
        (
            lambda: diffjax.ancestral(gaussian(None), diffjax.cosine(), variance="large"),
            "unknown variance 'large'",
        ),
        (
            lambda: diffjax.ancestral(gaussian(s := diffjax.cosine()), s, variance="learned").step(
                jax.random.key(0), samplers.init(jnp.ones((2, 1))), 0.5, 0.4
            ),
            "needs a denoiser that has learned one",
        ),
        (lambda: diffjax.unipc(*COSINE, order=4), "unipc of order 4: there are orders 1 to 3"),
        (lambda: diffjax.lms(*COSINE, order=0), "lms of order 0: there are orders 1 to 4"),
        (lambda: diffjax.edm(*COSINE, s_churn=-1.0), "s_churn=-1.0"),
        (lambda: diffjax.edm(*COSINE, s_min=2.0, s_max=1.0), "s_min <= s_max"),
        (lambda: diffjax.edm(*COSINE, steps=0), "steps=0"),
        (lambda: diffjax.dpm_solver_pp_2m_sde(*COSINE, eta=-0.1), "eta=-0.1"),
        (lambda: diffjax.predictor_corrector(*COSINE, corrections=0), "corrections=0"),
        (lambda: diffjax.predictor_corrector(*COSINE, snr=-1.0), "snr=-1.0"),
        (lambda: diffjax.uniform_times(0), "0 steps"),
        (lambda: diffjax.log_snr_times(diffjax.cosine(), -3), "-3 steps"),
    ],
)
def test_bad_options_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@every_sampler
def test_stochastic_samplers_refuse_to_encode(make):
    schedule = diffjax.cosine()
    sampler = make(gaussian(schedule), schedule)
    encode = lambda: diffjax.sample(
        jax.random.key(0), sampler, jnp.ones((1, 1)), jnp.array([0.0, 0.5])
    )
    if make in DETERMINISTIC.values():
        assert jnp.isfinite(encode()[0]).all()
    else:
        with pytest.raises(ValueError, match="a stochastic sampler cannot"):
            encode()


def test_a_sampler_of_the_users_own_is_two_functions():
    """Euler's method on the flow ODE of x_0, written as a user would."""
    schedule = diffjax.rectified_flow()
    denoise = gaussian(schedule)

    def step(key, state, t, s):
        prediction = denoise(state.x, t)
        x = state.x + (s - t) * (prediction.eps - prediction.x_0)
        return samplers.State(x, prediction.x_0)

    own = diffjax.Sampler(samplers.init, step)
    x_1 = diffjax.prior_sample(jax.random.key(0), schedule, (2000, 1))
    x_0, _ = diffjax.sample(jax.random.key(1), own, x_1, diffjax.uniform_times(200))
    np.testing.assert_allclose(jnp.std(x_0), STD, atol=0.05)


@pytest.mark.parametrize("name", ["ddim", "edm_churn", "dpm_solver_pp_3m", "predictor_corrector"])
def test_memory_does_not_grow_with_the_number_of_steps(name):
    """But for the times, and unless `observe` asks for the way."""
    schedule = SCHEDULES["cosine"]
    x_1 = jnp.ones((64, 1000))
    size = x_1.nbytes

    def needed(n, observe=None):
        def draw(key, x_1):
            walk = SAMPLERS[name](gaussian_everywhere, schedule)
            return diffjax.sample(key, walk, x_1, diffjax.uniform_times(n), observe)

        program = jax.jit(draw).lower(jax.random.key(0), x_1).compile().memory_analysis()
        return program.temp_size_in_bytes + program.output_size_in_bytes

    def gaussian_everywhere(x_t, t, cond=None):
        alpha, sigma = diffjax.scales_at(schedule, t, x_t)
        x_0 = alpha * x_t  # of unit variance
        return diffjax.Prediction(x_0, (x_t - alpha * x_0) / sigma)

    few, many = needed(5), needed(500)
    assert abs(many - few) < 0.1 * size
    assert needed(20, lambda state, t: state.x) > few + 15 * size


@pytest.mark.parametrize("name", diffjax.SAMPLERS)
def test_a_sampler_knows_its_denoisers_schedule_and_refuses_another(name):
    make = diffjax.SAMPLERS[name].make
    schedule = diffjax.cosine()
    # A flow map, which every sampler takes, because it is a denoiser too.
    denoise = diffjax.flow_map(lambda x_t, log_snr, cond: 0.5 * x_t, schedule, "v")
    bound = functools.partial(denoise, cond=None)
    for other in (diffjax.rectified_flow(), diffjax.cosine(-10.0), diffjax.shift(schedule, 1.0)):
        with pytest.raises(ValueError, match="another schedule"):
            make(bound, other)
    with pytest.raises(ValueError, match="another schedule"):
        make(denoise, diffjax.cosine(scales=diffjax.ve))
    with pytest.raises(ValueError, match="does not know its schedule"):
        make(lambda x_t, t, cond=None: denoise(x_t, t, cond))
    # An equal one is the same one, and needs not be given.
    x_1, ts = jnp.ones((2, 3)), diffjax.uniform_times(3)
    draw = lambda *args: diffjax.sample(jax.random.key(0), make(*args), x_1, ts)[0]
    np.testing.assert_array_equal(draw(denoise), draw(denoise, diffjax.cosine()))
    # Where a schedule is traced it cannot be compared.
    jax.jit(lambda low: make(denoise, diffjax.cosine(low)).init(x_1).x)(-15.0)


@pytest.mark.parametrize("name", ["edm", "heun"])
@pytest.mark.parametrize("times", ["uniform", "karras", "log_snr"])
@pytest.mark.parametrize(
    "make", [diffjax.cosine, *slow(diffjax.log_uniform, diffjax.rectified_flow)]
)
def test_one_step_of_a_second_order_method_lands_on_data_at_a_point(name, times, make):
    """The prediction is the point at every time, and one step of first order is exact."""
    schedule = make()
    point = jnp.full(2, 0.7)
    denoise = oracles.gaussian(schedule, point, 0.0)
    sampler = diffjax.SAMPLERS[name].make(denoise)
    x_1 = diffjax.prior_sample(jax.random.key(0), schedule, (64, 2))
    walk = lambda n: diffjax.sample(
        jax.random.key(1), sampler, x_1, diffjax.samplers.TIMES[times](schedule, n)
    )[0]
    np.testing.assert_allclose(walk(1), jnp.broadcast_to(point, (64, 2)), atol=0.02)


@pytest.mark.faults
@pytest.mark.parametrize("n", [1, 2, 3])
def test_edm_in_few_steps_is_as_near_as_ddim(n):
    schedule = diffjax.cosine()
    denoise = oracles.gaussian(schedule, jnp.zeros(2), 0.25)
    x_1 = diffjax.prior_sample(jax.random.key(0), schedule, (64, 2))
    exact, ts = denoise.flow_map(x_1, 1.0, 0.0), diffjax.karras_times(schedule, n)
    errors = {
        name: jnp.abs(
            diffjax.sample(jax.random.key(1), diffjax.SAMPLERS[name].make(denoise), x_1, ts)[0]
            - exact
        ).mean()
        for name in ("edm", "ddim")
    }
    assert errors["edm"] < 1.5 * errors["ddim"]  # it was up to 1,800 times as far
