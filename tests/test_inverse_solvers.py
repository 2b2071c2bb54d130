"""Solvers of inverse problems, on data whose posterior is known, under schedules of each kind."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax
from catalogue import each, slow
from diffjax import inverse, oracles, plots
from diffjax.samplers import State

SCHEDULES = {
    "vp": diffjax.cosine(-10.0, 10.0),
    "ve": diffjax.log_uniform(0.005, 100.0),
    "flow": diffjax.rectified_flow(),  # whose alpha at t = 0 is 0.999
}
VP = SCHEDULES["vp"]
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
some_schedules = pytest.mark.parametrize("schedule", each(SCHEDULES, "vp"))
each_solver = pytest.mark.parametrize("name", inverse.SOLVERS)
NAMES = {name: name for name in inverse.SOLVERS}
FIRST = inverse.inpainting(jnp.array([1.0, 0.0]))
MEAN, COV = np.array([0.3, -0.2]), np.array([[0.25, 0.2], [0.2, 0.25]])
OPTIONS = {"tds": {"particles": 2}, "dps": {"scale": 0.1}, "repaint": {"repeats": 2}}


def posterior(mean, cov, a, y, noise):
    """Mean and covariance of N(mean, cov), given y = a x + noise z, by the precisions."""
    precision = np.linalg.inv(cov) + a.T @ a / noise**2
    cov_y = np.linalg.inv(precision)
    return cov_y @ (np.linalg.solve(cov, mean) + a.T @ y / noise**2), cov_y


def correlated(d, seed=0):
    """A mean and a covariance without structure, and 3 rows of a matrix."""
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(d, d)) / np.sqrt(d)
    return rng.normal(size=d), root @ root.T + 0.05 * np.eye(d), rng.normal(size=(3, d))


def of_matrix(a):
    return lambda x: x @ jnp.asarray(a.T, x.dtype)


@each_schedule
@pytest.mark.parametrize("noise", [0.05, *slow(1.0)])
def test_mmps_is_the_posteriors_denoiser_on_gaussian_data(x64, schedule, noise):
    """At all noise levels at once, with one iteration for each of three measurements."""
    mean, cov, a = correlated(5)
    y = np.array([0.5, -1.0, 2.0])
    exact = oracles.gaussian(schedule, *posterior(mean, cov, a, y, noise))
    denoise = oracles.gaussian(schedule, mean, cov)
    shown = jnp.broadcast_to(y, (7, 3))
    guided = inverse.mmps(denoise, schedule, of_matrix(a), shown, noise, iterations=3)
    t = jnp.linspace(0, 1, 7)
    z = jax.random.normal(jax.random.key(0), (2, 7, 5))
    x_t = diffjax.q_sample(schedule, z[0], t, z[1])
    for got, expected in zip(jax.jit(guided)(x_t, t), exact(x_t, t), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_mmps_approaches_it_with_each_iteration(x64):
    mean, cov, a = correlated(5)
    y = np.array([0.5, -1.0, 2.0])
    exact = oracles.gaussian(VP, *posterior(mean, cov, a, y, 0.1))
    denoise, x_t = oracles.gaussian(VP, mean, cov), jax.random.normal(jax.random.key(0), (1, 5))

    @functools.partial(jax.jit, static_argnums=0)
    def error(n):
        guided = inverse.mmps(denoise, VP, of_matrix(a), jnp.asarray(y)[None], 0.1, iterations=n)
        return jnp.linalg.norm(guided(x_t, 0.5).x_0 - exact(x_t, 0.5).x_0)

    errors = [error(n) for n in (1, 2, 6)]
    assert errors[0] > errors[1] > 1e-3, errors
    assert errors[2] < 1e-6, errors  # three are enough, and what is solved stays solved


@pytest.mark.parametrize("schedule", each(SCHEDULES))
def test_a_walk_by_mmps_converges_to_the_posteriors_flow_at_the_samplers_order(x64, schedule):
    mean, cov, a = correlated(3, seed=1)
    y = np.array([0.5, -1.0, 2.0])
    exact = oracles.gaussian(schedule, *posterior(mean, cov, a, y, 0.5))
    denoise = oracles.gaussian(schedule, mean, cov)
    shown = jnp.broadcast_to(y, (8, 3))
    walk = diffjax.dpm_solver_pp_2m(
        inverse.mmps(denoise, schedule, of_matrix(a), shown, 0.5), schedule
    )
    x_1 = diffjax.prior_sample(jax.random.key(0), schedule, (8, 3))

    def error(n):
        ts = diffjax.log_snr_times(schedule, n)
        x_0, _ = jax.jit(lambda x_1: diffjax.sample(jax.random.key(0), walk, x_1, ts))(x_1)
        return float(jnp.abs(x_0 - exact.flow_map(x_1, 1.0, 0.0)).max())

    steps = (40, 80)
    assert 1.7 < plots.order(steps, [error(n) for n in steps]) < 2.6


def test_mmps_takes_an_operator_that_is_not_linear_for_its_derivative(x64):
    """So that an added constant moves the measurement, and nothing else."""
    mean, cov, a = correlated(4)
    denoise, linear = oracles.gaussian(VP, mean, cov), of_matrix(a)
    y, x_t = jnp.ones((2, 3)), jax.random.normal(jax.random.key(0), (2, 4))
    shifted = lambda x: linear(x) + 0.7
    guided = lambda operator, y: inverse.mmps(denoise, VP, operator, y, 0.3)(x_t, 0.4).x_0
    both = jax.jit(lambda y: (guided(linear, y), guided(shifted, y + 0.7)))
    np.testing.assert_allclose(*both(y), rtol=1e-9)


@some_schedules
@pytest.mark.parametrize("noise", [0.0, 0.4])
def test_diffpir_predicts_the_mean_of_a_posterior_about_the_prediction(x64, schedule, noise):
    """Of N(x_0, r^2 I) given y, with r = sigma / (alpha sqrt(strength))."""
    mean, cov, a = correlated(5)
    denoise = oracles.gaussian(schedule, mean, cov)
    y, x_t = np.array([[0.5, -1.0, 2.0]]), jax.random.normal(jax.random.key(0), (1, 5))
    guided = inverse.diffpir(denoise, schedule, of_matrix(a), jnp.asarray(y), noise, strength=2.0)
    t = 0.6
    alpha, sigma = schedule(t)
    about = np.asarray(denoise(x_t, t).x_0)[0]
    r = float(sigma / alpha) / np.sqrt(2)
    expected, _ = posterior(about, r**2 * np.eye(5), a, y[0], noise or 1e-4 * r)
    got = guided(x_t, t)
    np.testing.assert_allclose(got.x_0[0], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(alpha * got.x_0 + sigma * got.eps, x_t, rtol=1e-8)


@each_schedule
@pytest.mark.parametrize(("eta", "eta_b"), [(0.85, 1.0), *slow((0.4, 0.6))])
def test_ddrms_steps_keep_the_noise_of_the_schedule(schedule, eta, eta_b):
    """If the prediction is right, x_s is from q(x_s | x_0), whatever is measured.

    One coordinate is measured well, one badly, and one not.
    """
    n, noise, x_0 = 20_000, 0.3, jnp.array([0.5, -0.3, 0.8])
    a = np.array([[1.0, 0.0, 0.0], [0.0, 0.2, 0.0]]) @ np.linalg.qr(correlated(3)[1])[0]
    operator = inverse.with_svd(of_matrix(a), (3,))
    truth = jnp.broadcast_to(x_0, (n, 3))
    y = operator(truth) + noise * jax.random.normal(jax.random.key(0), (n, 2))
    eps = jax.random.normal(jax.random.key(1), (n, 3))
    denoise = lambda x_t, t, cond=None: diffjax.Prediction(truth, eps)
    walk = inverse.ddrm(denoise, schedule, operator, y, noise, eta, eta_b)
    for log_ratio in (1.0, -0.3, -1.0, -3.0):  # of sigma / alpha; the noise is 0.3 and 1.5
        t, s = diffjax.schedules.time_at(schedule, -2 * (log_ratio + jnp.array([0.5, 0.0])))
        x_t = diffjax.q_sample(schedule, truth, t, eps)
        x_s = walk.step(jax.random.key(2), State(x_t, x_t), t, s).x
        alpha, sigma = schedule(s)
        z = np.asarray((x_s - alpha * truth) / sigma)
        np.testing.assert_allclose(z.mean(0), 0, atol=0.03)
        np.testing.assert_allclose(np.cov(z.T), np.eye(3), atol=0.04)


def test_ddrm_leaves_what_is_not_measured_to_ddim_and_ends_at_what_is():
    denoise = oracles.gaussian(VP, MEAN, 0.25)
    y = jnp.full((16, 2), 0.6) * jnp.array([[1.0, 0.0]])
    x_1 = diffjax.prior_sample(jax.random.key(0), VP, (16, 2))
    walk = inverse.ddrm(denoise, VP, FIRST, y, eta=0.0)
    ts, key = diffjax.uniform_times(20), jax.random.key(1)
    (x, _), (free, _) = (diffjax.sample(key, s, x_1, ts) for s in (walk, diffjax.ddim(denoise)))
    np.testing.assert_allclose(x[:, 1], free[:, 1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(x[:, 0], 0.6, atol=0.03)  # sigma at t = 0 is 0.007


@each_solver
@pytest.mark.parametrize("dtype", ["bfloat16", *slow("float32")])
def test_a_walk_keeps_the_type_of_the_data(x64, name, dtype):
    """Whatever the types of the schedule, the noise and the weights are."""
    denoise = oracles.gaussian(VP, MEAN, COV)
    x_1, noise = jnp.ones((4, 2), dtype), jnp.float32(0.2)
    walk = made(name, denoise, y=x_1, noise=noise)
    out = jax.eval_shape(lambda: diffjax.sample(jax.random.key(0), walk, x_1, jnp.array([1, 0.5])))
    assert out[0].dtype == dtype


def populations(walk, schedule, groups, particles, steps, key=0):
    x_1 = diffjax.prior_sample(jax.random.key(key), schedule, (groups * particles, 2))
    ts = diffjax.log_snr_times(schedule, steps)
    draw = jax.jit(lambda x_1: diffjax.sample(jax.random.key(key + 1), walk, x_1, ts)[0])
    return np.asarray(draw(x_1))


@pytest.mark.faults
@some_schedules
def test_tds_converges_to_the_posterior_as_particles_are_added(schedule):
    """With a twist that is much too wide, so that it guides late, and most particles are lost."""
    cov, noise, y = np.array([[0.25, 0.0], [0.0, 0.01]]), 0.1, np.array([0.8])
    a = np.array([[1.0, 1.0]])
    mean, cov_y = posterior(MEAN, cov, a, y, noise)
    denoise, total = oracles.gaussian(schedule, MEAN, cov), 8192

    def error(particles):
        shown = jnp.full((total // particles, 1), y[0])
        walk = inverse.tds(denoise, schedule, of_matrix(a), shown, noise, particles, 3.0)
        x = populations(walk, schedule, total // particles, particles, 120)
        return np.abs(x.mean(0) - mean).max(), np.abs(np.cov(x.T) - cov_y).max()

    few, many = error(2), error(64)
    assert few[0] > 3 * many[0], (few, many)
    assert many[0] < 0.005 and many[1] < 0.003, (few, many)


@pytest.mark.faults
def test_tds_takes_a_likelihood_that_is_not_linear():
    """|x|^2 is measured: the posterior is a ring, whose moments are integrals over the plane."""
    noise, seen, particles, groups = 0.2, 0.5, 32, 256
    denoise = oracles.gaussian(VP, MEAN, 0.25)
    measure = lambda x: jnp.sum(x**2, axis=1, keepdims=True)
    walk = inverse.tds(denoise, VP, measure, jnp.full((groups, 1), seen), noise, particles, 0.5)
    x = populations(walk, VP, groups, particles, 60)
    axis = np.linspace(-3, 3, 601)
    grid = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
    log_p = -(((grid - MEAN) ** 2).sum(1) / 0.25 + ((grid**2).sum(1) - seen) ** 2 / noise**2) / 2
    p = np.exp(log_p - log_p.max())
    p /= p.sum()
    mean = p @ grid
    np.testing.assert_allclose(x.mean(0), mean, atol=0.03)
    np.testing.assert_allclose(np.cov(x.T), ((grid - mean) * p[:, None]).T @ grid, atol=0.03)


def test_the_weights_of_tds_are_one_if_the_measurement_says_nothing():
    """The walk is then `ancestral`, and no particle is lost."""
    denoise = oracles.gaussian(VP, MEAN, COV)
    blind = inverse.inpainting(jnp.zeros(2))
    x_1 = diffjax.prior_sample(jax.random.key(0), VP, (8, 2))
    walk = inverse.tds(denoise, VP, blind, jnp.zeros((2, 2)), 0.1, particles=4)
    key, (t, s) = jax.random.key(1), (0.7, 0.5)
    state = jax.jit(walk.step)(key, walk.init(x_1), t, s)
    np.testing.assert_array_equal(state.memory, 0)
    free = diffjax.ancestral(denoise, VP)
    of_noise = diffjax.keys.fold_in(diffjax.keys.per_example(key, 8), 1)
    other = jax.jit(free.step)(of_noise, free.init(x_1), t, s)
    np.testing.assert_allclose(state.x, other.x, rtol=1e-6, atol=1e-6)


def test_a_particle_that_explains_the_measurement_takes_the_place_of_the_others():
    """In proportion to its weight, within its own population."""
    log_weights = jnp.log(jnp.array([0.5, 0.25, 0.125, 0.125, 1.0, 0.0, 0.0, 0.0]))
    key = diffjax.keys.per_example(jax.random.key(0), 8)
    many = jax.vmap(
        lambda i: inverse.walks._resampled(diffjax.keys.fold_in(key, i), log_weights, 4)
    )
    picks = many(jnp.arange(2000))
    assert (picks[:, :4] < 4).all() and (picks[:, 4:] == 4).all()
    share = np.bincount(np.asarray(picks[:, :4]).reshape(-1), minlength=4) / picks[:, :4].size
    np.testing.assert_allclose(share, [0.5, 0.25, 0.125, 0.125], atol=0.01)


def test_the_last_step_of_tds_leaves_samples_of_equal_weight():
    """One particle explains y and the other does not, which the wide twist hardly sees."""
    denoise = lambda x_t, t, cond=None: diffjax.Prediction(x_t, 0 * x_t)
    walk = inverse.tds(denoise, VP, lambda x: x, jnp.array([[0.6]]), 0.05, 2, sigma_data=10.0)
    start = walk.init(jnp.array([[0.6], [0.0]]))
    step = jax.jit(lambda s: walk.step(jax.random.key(0), start, 0.5, s))
    before, last = step(1e-3), step(0.0)
    assert np.ptp(before.x) > 0.1 and before.memory[0] > before.memory[1]
    np.testing.assert_allclose(last.x, 0.6, atol=0.03)
    np.testing.assert_allclose(last.x_0, 0.6, atol=0.03)  # the estimates of the same particles
    np.testing.assert_array_equal(last.memory, 0)


def made(name, denoise, schedule=VP, operator=FIRST, y=None, noise=0.2):
    """The walk of a row of the table; of a population, every measurement has two particles."""
    y = y[::2] if name == "tds" else y
    return inverse.SOLVERS[name].walk(
        denoise, schedule, operator, y, noise, **OPTIONS.get(name, {})
    )


@pytest.mark.parametrize("name", each(NAMES, "ddrm", "tds"))
def test_a_solution_does_not_depend_on_its_batch_mates(name):
    """Its key is that of its place, and populations keep to themselves."""
    denoise = oracles.gaussian(VP, MEAN, COV)
    y = FIRST(jax.random.normal(jax.random.key(2), (6, 2)))
    x_1 = diffjax.prior_sample(jax.random.key(0), VP, (6, 2))
    ts, keys = diffjax.uniform_times(5), diffjax.keys.per_example(jax.random.key(1), 6)
    run = jax.jit(lambda keys, y, x: diffjax.sample(keys, made(name, denoise, y=y), x, ts)[0])
    whole = run(keys, y, x_1)
    np.testing.assert_allclose(whole[2:4], run(keys[2:4], y[2:4], x_1[2:4]), rtol=1e-5, atol=1e-6)
    others = run(keys.at[:2].set(keys[4]), y.at[:2].set(0), x_1.at[:2].set(5.0))
    np.testing.assert_array_equal(whole[2:], others[2:])
    assert not np.allclose(whole[:2], others[:2], atol=1e-3)


@some_schedules
@pytest.mark.parametrize("name", each(NAMES, "mmps", "ddrm"))
def test_every_solver_moves_the_samples_towards_the_posterior(name, schedule):
    """Of correlated data, on every kind of schedule: nearer to its mean than draws without y."""
    denoise = oracles.gaussian(schedule, MEAN, COV)
    seen, n = MEAN[0] + 0.8, 256
    y = jnp.broadcast_to(jnp.array([seen, 0.0]), (n, 2))
    x_1 = diffjax.prior_sample(jax.random.key(0), schedule, (n, 2))
    ts = diffjax.log_snr_times(schedule, 30)
    walk = made(name, denoise, schedule, y=y)
    x_0, _ = jax.jit(lambda x_1: diffjax.sample(jax.random.key(1), walk, x_1, ts))(x_1)
    mean, _ = posterior(MEAN, COV, np.array([[1.0, 0.0]]), np.array([seen]), 0.2)
    gone = (np.asarray(x_0).mean(0) - MEAN) / (mean - MEAN)
    assert (gone > 0.2).all() and (gone < 1.35).all(), gone


@each_solver
@pytest.mark.parametrize(
    "operator", each({"phases": inverse.phase_retrieval(), "squares": lambda x: x**2}, "squares")
)
def test_an_operator_that_is_not_linear_is_solved_or_refused(name, operator):
    """By those that say so in the table, which bring the samples nearer to the measurement."""
    row = inverse.SOLVERS[name]
    schedule = VP
    flat = oracles.gaussian(schedule, np.linspace(-1, 1, 16), 0.25)
    shape = (-1, 4, 4, 1)

    def denoise(x_t, t, cond=None):
        prediction = flat(x_t.reshape(len(x_t), 16), t)
        return diffjax.Prediction(*(a.reshape(shape) for a in prediction))

    rng = np.random.default_rng(0)
    truth = np.linspace(-1, 1, 16) + 0.5 * rng.normal(size=(8, 16))
    y = operator(jnp.asarray(truth, jnp.float32).reshape(shape).repeat(8, axis=0))
    x_1 = jnp.asarray(rng.normal(size=(64, 4, 4, 1)), jnp.float32)
    ts, key = diffjax.log_snr_times(schedule, 30), jax.random.key(2)
    draw = lambda walk: diffjax.sample(key, walk, x_1, ts)[0]
    if row.operators != "any":
        with pytest.raises(ValueError, match="needs a"):
            draw(made(name, denoise, schedule, operator, y))
        return
    error = lambda x: float(jnp.square(operator(x) - y).mean())
    guided = draw(made(name, denoise, schedule, operator, y))
    assert error(guided) < 0.6 * error(draw(diffjax.ancestral(denoise, schedule)))


@pytest.mark.parametrize("name", ["pigdm", "diffpir", "ddrm"])
def test_an_operator_that_also_adds_a_constant_is_the_linear_one_of_the_difference(x64, name):
    _, _, a = correlated(2)
    linear, affine = of_matrix(a[:2]), lambda x: of_matrix(a[:2])(x) + 0.7
    denoise, y = oracles.gaussian(VP, MEAN, COV), jnp.array([[0.3, -0.4]] * 8)
    if name == "ddrm":
        linear, affine = (inverse.with_svd(operator, (2,)) for operator in (linear, affine))
    x_1, ts = jax.random.normal(jax.random.key(0), (8, 2)), diffjax.uniform_times(10)
    draw = lambda operator, y: diffjax.sample(
        jax.random.key(1), made(name, denoise, operator=operator, y=y), x_1, ts
    )[0]
    np.testing.assert_allclose(draw(affine, y + 0.7), draw(linear, y), atol=1e-6)


@each_solver
def test_the_noise_of_a_measurement_is_checked_at_once(name):
    """Before anything is traced, as the table says."""
    denoise, y = oracles.gaussian(VP, MEAN, COV), jnp.ones((2, 2))
    row = inverse.SOLVERS[name]
    for noise in (0.0, -0.1):
        if row.noise == "unused" or (row.noise == "any" and noise == 0):
            made(name, denoise, y=y, noise=noise)
        else:
            with pytest.raises(ValueError, match=f"noise_std={noise}"):
                made(name, denoise, y=y, noise=noise)


@each_solver
@pytest.mark.parametrize("shape", [(4, 3), (6, 2)], ids=["data", "batch"])
def test_a_measurement_of_another_shape_is_refused_by_every_solver(name, shape):
    walk = made(name, oracles.gaussian(VP, MEAN, COV), y=jnp.ones(shape))
    x_1 = jnp.ones((4, 2))
    with pytest.raises(ValueError, match=r"measurement"):
        jax.eval_shape(lambda: diffjax.sample(jax.random.key(0), walk, x_1, jnp.array([1.0, 0.5])))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d, y: inverse.mmps(d, VP, FIRST, y, 0.1, iterations=0), "iterations=0"),
        (lambda d, y: inverse.diffpir(d, VP, FIRST, y, strength=0.0), "strength=0.0"),
        (lambda d, y: inverse.ddrm(d, VP, FIRST, y, eta=1.5), "eta=1.5"),
        (lambda d, y: inverse.ddrm(d, VP, lambda x: x, y), r"inverse.with_svd\(operator, shape\)"),
        (
            lambda d, y: (
                walk := inverse.ddrm(d, VP, inverse.with_svd(lambda x: x[:, :2], (3,)), y)
            ).step(jax.random.key(0), walk.init(y), 1.0, 0.5),
            r"the decomposition is of examples of shape \(3,\), not \(2,\)",
        ),
        (lambda d, y: inverse.tds(d, VP, FIRST, y, 0.1, particles=1), "particles=1"),
        (lambda d, y: inverse.tds(d, VP, FIRST, y, 0.1, 4, sigma_data=0.0), "sigma_data=0.0"),
        (
            lambda d, y: (walk := inverse.tds(d, VP, FIRST, y, 0.1, 4)).step(
                jax.random.key(0), walk.init(jnp.ones((6, 2))), 1.0, 0.5
            ),
            "a batch of 6 for 2 measurements with particles=4: need 8 examples",
        ),
    ],
)
def test_options_that_cannot_be_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make(oracles.gaussian(VP, MEAN, COV), jnp.ones((2, 2)))
