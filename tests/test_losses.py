import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import diffjax
from catalogue import SCHEDULES, TARGETS, WEIGHTINGS, each, slow
from diffjax import densities, likelihood, losses, oracles, weightings
from diffjax.schedules import rate_at

every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
some_schedules = pytest.mark.parametrize("schedule", each(SCHEDULES, "cosine", "rectified_flow"))


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
        jax.random.key(1), network, schedule, target, x_0, weight=weightings.elbo(), t=t
    )
    return jnp.mean(losses)


def loss_and_gradients(target, schedule, bound, dtype):
    t = jnp.linspace(0, 1, 257, dtype=dtype)
    inside = np.flatnonzero(np.abs(schedule.log_snr(t)) <= bound)
    t = t[inside[np.linspace(0, len(inside) - 1, 64).astype(int)]]
    params = (jnp.eye(3, dtype=dtype) / 2, jnp.full((1, 3), 0.1, dtype))
    return jax.value_and_grad(elbo_loss)(params, target, schedule, t, dtype)


@some_schedules
def test_all_targets_have_one_loss_and_one_gradient_in_float64(x64, schedule):
    loss, gradients = loss_and_gradients("eps", schedule, 15, jnp.float64)
    for target in TARGETS:
        other, others = loss_and_gradients(target, schedule, 15, jnp.float64)
        np.testing.assert_allclose(other, loss, rtol=1e-9, err_msg=target)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), others, gradients)


@some_schedules
def test_all_targets_have_one_loss_and_one_gradient_in_float32(schedule):
    loss, gradients = loss_and_gradients("eps", schedule, 10, jnp.float32)
    size = max(float(jnp.abs(g).max()) for g in gradients)
    for target in TARGETS:
        other, others = loss_and_gradients(target, schedule, 10, jnp.float32)
        np.testing.assert_allclose(other, loss, rtol=1e-3, err_msg=target)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3 * size), others, gradients
        )


@pytest.mark.parametrize("weight", each(WEIGHTINGS, "elbo", "min_snr", "edm"))
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
        got = weightings.elbo()(schedule.log_snr(t), rate_at(schedule, t, 1000))
        np.testing.assert_allclose(got, coefficient, rtol=1e-7)


@pytest.mark.parametrize("weight", each(WEIGHTINGS, "min_snr"))
@pytest.mark.parametrize(
    ("target", "density", "steps"),
    [("eps", None, None), ("F", (1.0, 3.0), None), ("x_0", None, 50)],
    ids=["eps", "F of a normal density", "x_0 in discrete time"],
)
def test_the_effective_weight_is_what_the_gradients_do(x64, target, weight, density, steps):
    """A network that errs by theta_j in the j-th stretch of log-SNR, on data at zero.

    The loss then is the sum of theta_j^2 times the integral of the effective weight over stretch
    j, and its gradient twice theta_j times that.
    """
    schedule = diffjax.cosine(-6.0, 6.0)
    edges = jnp.linspace(-5, 5, 6)
    if steps is not None:  # stretches of whole steps
        edges = schedule.log_snr(jnp.array([45, 36, 27, 18, 9, 4]) / steps)
    theta = jnp.array([1.0, -2.0, 0.5, 1.5, -1.0])
    density = density and densities.normal(schedule, *density)
    n = 20000
    t = diffjax.sample_times(jax.random.key(0), n, steps, density=density)

    def loss(theta):
        def network(x_t, log_snr, cond):
            # A step's own time is the end of its stretch.
            j = jnp.searchsorted(edges, log_snr + 1e-9) - 1
            inside = (log_snr + 1e-9 > edges[0]) & (log_snr + 1e-9 < edges[-1])
            x_0 = jnp.where(inside, theta[jnp.clip(j, 0, 4)], 0.0)[:, None]
            alpha, sigma = (scale[:, None] for scale in schedule.scales(log_snr))
            return diffjax.convert(x_0, x_t, alpha, sigma, "x_0", target)

        each = diffjax.diffusion_loss(
            jax.random.key(0),
            network,
            schedule,
            target,
            jnp.zeros((n, 1)),
            weight=weight,
            t=t,
            steps=steps,
        )
        return jnp.mean(each)

    weighs = diffjax.effective_weight(schedule, target, weight, density, steps)
    grid = jnp.linspace(edges[:-1], edges[1:], 2001)
    areas = jnp.trapezoid(weighs(grid.reshape(-1)).reshape(grid.shape), grid, axis=0)
    np.testing.assert_allclose(jax.grad(loss)(theta), 2 * theta * areas, rtol=5e-3)


def test_edms_density_and_weight_are_its_weighting_of_uniform_times(x64):
    """Karras et al. 2022, table 1: lambda = (sigma^2 + 0.25) / (0.5 sigma)^2 on x_0's error."""
    schedule = diffjax.log_uniform(0.002, 80.0)
    log_snr = jnp.linspace(-8.0, 12.0, 41)
    density = densities.normal(schedule, 2.4, 2.4)
    drawn = diffjax.effective_weight(schedule, "F", weightings.preconditioned(), density)(log_snr)
    weighted = diffjax.effective_weight(schedule, "F", weightings.edm())(log_snr)
    ends = -2 * np.log([80.0, 0.002])
    np.testing.assert_allclose(
        drawn, weighted / np.diff(scipy.stats.norm.cdf(ends, 2.4, 2.4)), rtol=1e-5
    )


@pytest.mark.parametrize(
    ("target", "schedule", "weight"),
    [
        ("F", diffjax.log_uniform(0.002, 80.0), weightings.preconditioned()),
        ("flow", diffjax.rectified_flow(), weightings.velocity()),
    ],
)
def test_a_target_has_weight_one_by_its_own_weighting(target, schedule, weight):
    """The loss is the mean squared error of the target itself, at every time."""
    x_0, t = jax.random.normal(jax.random.key(1), (64, 5)) / 2, jnp.linspace(0.02, 0.98, 64)
    seen = {}

    def network(x_t, log_snr, cond):
        seen["out"] = jnp.sin(x_t)
        seen["eps"] = (x_t - alpha[:, None] * x_0) / sigma[:, None]
        return seen["out"]

    alpha, sigma = schedule(t)
    loss = diffjax.diffusion_loss(
        jax.random.key(0), network, schedule, target, x_0, weight=weight, t=t
    )
    row = diffjax.TARGETS[target](alpha, sigma)
    a, b = (jnp.broadcast_to(x, t.shape)[:, None] for x in row)
    wanted = a * x_0 + b * seen["eps"]
    np.testing.assert_allclose(loss, ((seen["out"] - wanted) ** 2).mean(1), rtol=2e-3)


def test_the_weight_of_jit_is_limited_where_little_noise_is_left():
    """1 / max(1 - t, 0.05)^2 on the error of x_0, with t the share of the data."""
    t = jnp.array([0.1, 0.5, 0.94, 0.96, 0.999])
    log_snr = 2 * jnp.log(t / (1 - t))
    of_x_0 = weightings.velocity(0.05)(log_snr, log_snr) * jnp.exp(log_snr)
    expected = [1 / 0.81, 4, 1 / 0.0036, 400, 400]
    np.testing.assert_allclose(of_x_0, expected, rtol=1e-4)
    with pytest.raises(ValueError, match="least=1"):
        weightings.velocity(1.0)


DENSITIES = {name: make for name, make in densities.DENSITIES.items()} | {
    "narrow": functools.partial(densities.normal, mean=-1.0, std=0.7),
    "beyond an end": functools.partial(densities.normal, mean=9.0, std=3.0),
}


@pytest.mark.parametrize("make", DENSITIES.values(), ids=DENSITIES)
def test_a_density_is_drawn_and_cut_off_at_the_ends_of_the_schedule(make):
    """Against SciPy's truncated normal; the quantiles of stratified times are spread evenly."""
    schedule = diffjax.cosine(-6.0, 7.0)
    density, n = make(schedule), 4096
    t = diffjax.sample_times(jax.random.key(0), n, density=density)
    assert ((t >= 0) & (t <= 1)).all()
    u = (np.arange(n) + 0.5) / n
    found = np.sort(schedule.log_snr(t))
    if make is densities.uniform:
        wanted = np.sort(schedule.log_snr(jnp.asarray(u)))
    else:
        mean, std = (make.keywords if hasattr(make, "keywords") else {"m": 2.4, "s": 2.4}).values()
        ends = [(end - mean) / std for end in (-6.0, 7.0)]
        wanted = scipy.stats.truncnorm(*ends, mean, std).ppf(u)
    inner = slice(8, -8)
    np.testing.assert_allclose(found[inner], wanted[inner], atol=0.05)
    part = diffjax.sample_times(jax.random.key(0), n, None, jnp.array([7, 2]), density)
    assert jnp.array_equal(part, t[jnp.array([7, 2])])


@pytest.mark.parametrize("steps", [None, *slow(20)])
@pytest.mark.parametrize("make", DENSITIES.values(), ids=DENSITIES)
def test_losses_over_their_density_keep_their_mean_and_vary_as_promised(make, steps):
    """A loss that is a known function of t, and the variance of importance sampling.

    Var = integral of loss^2 / p over [0, 1] - mean^2, where p is the density of the times.
    """
    schedule = diffjax.cosine(-6.0, 7.0)
    density, n = make(schedule), 40_000
    loss = lambda t: jnp.exp(-((schedule.log_snr(t) - 1.0) ** 2) / 8) + 0.1 * t

    def estimate(t):
        return loss(t) / densities.relative(density, t, steps)

    keys = jax.random.split(jax.random.key(1), n)
    t = jax.vmap(lambda k: diffjax.sample_times(k, 1, steps, density=density)[0])(keys)
    each = estimate(t)
    at = (jnp.arange(4000) + 0.5) / 4000 if steps is None else jnp.arange(1, steps + 1) / steps
    mean = loss(at).mean()
    variance = (loss(at) ** 2 / densities.relative(density, at, steps)).mean() - mean**2
    assert abs(each.mean() - mean) < 5 * jnp.sqrt(variance / n)
    if make is not DENSITIES["narrow"]:  # whose fourth moment is too large to be measured
        np.testing.assert_allclose(each.var(), variance, rtol=0.1)
    if steps is not None:
        counts = np.bincount(np.round(t * steps).astype(int), minlength=steps + 1)[1:] / n
        expected = densities.relative(density, at, steps) / steps
        np.testing.assert_allclose(counts, expected, atol=5 * 0.5 / np.sqrt(n))
        np.testing.assert_allclose(expected.sum(), 1, rtol=1e-5)


@pytest.mark.faults
def test_the_fitted_density_is_the_one_that_varies_least(x64):
    """Losses in proportion to a normal density over that of uniform times ask for this density."""
    schedule, edges = diffjax.cosine(-12.0, 12.0), jnp.linspace(-12, 12, 97)
    wanted = densities.normal(schedule, 1.5, 2.0)
    t = (jnp.arange(200_000) + 0.5) / 200_000
    losses_at = densities.relative(wanted, t)
    sums, counts = (
        np.histogram(schedule.log_snr(t), edges, weights=w)[0] for w in (losses_at, None)
    )
    mean, std = densities.fit_normal(schedule, edges, sums / counts)
    np.testing.assert_allclose([mean, std], [1.5, 2.0], atol=0.01)
    # A loss that is drawn in proportion to itself does not vary at all.
    fitted = densities.normal(schedule, mean, std)
    assert (losses_at / densities.relative(fitted, t)).std() < 0.05
    assert losses_at.std() > 0.5


@pytest.mark.faults
@pytest.mark.parametrize("name", ["elbo", "min_snr", "constant", "edm"])
def test_losses_over_their_fitted_density_vary_less_than_at_uniform_times(name):
    """The exact losses of data N(0, 0.25); min_snr's fall slower on one side than normal tails."""
    schedule = diffjax.cosine(-13.0, 12.0)
    t = (jnp.arange(20_000) + 0.5) / 20_000
    log_snr = schedule.log_snr(t)
    loss = losses.loss_weight(schedule, "eps", t, WEIGHTINGS[name])
    loss *= 0.25 * jnp.exp(log_snr) / (1 + 0.25 * jnp.exp(log_snr))
    sums, counts = losses.by_log_snr(log_snr, loss)
    mean, std = densities.fit_normal(schedule, losses.LOG_SNR_EDGES, sums / counts)
    p = densities.relative(densities.normal(schedule, mean, std), t)
    spread = lambda p: float(jnp.sqrt((loss**2 / p).mean() / loss.mean() ** 2 - 1))
    assert spread(p) < 0.6 * spread(jnp.ones_like(t))


@pytest.mark.parametrize(("mean", "std"), [(2.4, 2.4), (1.0, 1.6), (0.0, 2.0)])
def test_the_tails_of_a_density_are_exact_in_float32(mean, std):
    """The probability of each step by SciPy; and no time is drawn whose weight is infinite."""
    schedule, steps = diffjax.cosine(), 1000
    density, exact = densities.normal(schedule, mean, std), scipy.stats.norm(mean, std)
    t = np.arange(steps + 1, dtype=np.float32) / steps
    log_snr = np.asarray(schedule.log_snr(t), np.float64)
    tails = -np.diff(exact.cdf(log_snr)), np.diff(exact.sf(log_snr))
    mass = np.where(log_snr[1:] > mean, tails[1], tails[0]) / -np.diff(exact.cdf(log_snr[[0, -1]]))
    got = densities.relative(density, jnp.asarray(t[1:]), steps)
    np.testing.assert_allclose(got, steps * mass, rtol=2e-3)
    key = jax.random.fold_in(jax.random.key(0), 68457)  # whose first u rounds to 1
    for grid in (None, steps):
        drawn = diffjax.sample_times(key, 128, grid, density=density)
        weights = 1 / densities.relative(density, drawn, grid)
        assert weights.max() < 1e5, weights.max()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: densities.normal(s, 2.0, 0.0), "std=0.0: must be positive"),
        (
            lambda s: densities.normal(s, 40.0, 2.0),
            "from -6 to 6, where a normal density",
        ),
        (lambda s: densities.fit_normal(s, [0, 1], jnp.ones(2)), "2 losses between 2 edges"),
        (lambda s: densities.normal(s, jnp.nan, 1.0), "mean=nan must be finite"),
        (lambda s: densities.fit_normal(s, [0, 1], jnp.zeros(1)), "a positive loss"),
        (lambda s: densities.fit_normal(s, [0, 1], jnp.array([jnp.inf])), "finite"),
        (lambda s: densities.fit_normal(s, [1, 0], jnp.ones(1)), "edges that ascend"),
        (
            lambda s: densities.fit_normal(s, [7, 8, 9, 10], jnp.array([0.0, 1.0, 0.0])),
            "all losses lie outside of the schedule, which has log-SNR from -6 to 6",
        ),
    ],
)
def test_a_density_that_the_schedule_cannot_draw_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(diffjax.cosine(-6.0, 6.0))


@pytest.mark.faults
def test_effective_weights_that_the_papers_state(x64):
    log_snr = jnp.linspace(-8, 8, 33)
    weighs = lambda *a: diffjax.effective_weight(*a)(log_snr)
    cosine, flow = diffjax.cosine(), diffjax.rectified_flow()
    # The bound is half the SNR whatever the schedule and the target.
    for schedule in (cosine, flow):
        for target in TARGETS:
            got = weighs(schedule, target, weightings.elbo())
            np.testing.assert_allclose(got, jnp.exp(log_snr) / 2, rtol=1e-6)
    faded = weighs(cosine, "v", weightings.sigmoid(2.0)) / weighs(cosine, "v", weightings.elbo())
    np.testing.assert_allclose(faded, 1 / (1 + jnp.exp(log_snr - 2)), rtol=1e-6)
    # Kingma & Gao 2023, table 1: DDPM's L_simple on the cosine schedule is sech(log_snr / 2).
    simple = weighs(cosine, "eps", weightings.constant()) / (jnp.exp(log_snr) / 2)
    shape = 1 / jnp.cosh(log_snr / 2)
    np.testing.assert_allclose(simple / shape, simple[16] / shape[16], rtol=1e-3)
    # EDM: in the space of F a normal density of log-SNR, of mean 2.4 and standard deviation 2.4.
    a, b = diffjax.TARGETS["F"](*cosine.scales(log_snr))
    alpha, sigma = cosine.scales(log_snr)
    f_per_x_0 = (a * sigma - b * alpha) / sigma
    density = weighs(cosine, "F", weightings.edm()) / f_per_x_0**2
    np.testing.assert_allclose(density, jax.scipy.stats.norm.pdf(log_snr, 2.4, 2.4), rtol=1e-6)
    on_x_0 = lambda weight: weight(log_snr, log_snr) * jnp.exp(log_snr)
    np.testing.assert_allclose(
        on_x_0(weightings.truncated_snr()), jnp.maximum(jnp.exp(log_snr), 1), rtol=1e-9
    )
    np.testing.assert_allclose(weightings.p2()(log_snr, log_snr)[16], 0.5)


def learned(x_t, log_snr, cond=None, scale=1.0, slope=0.3):
    """A network of twice the channels: the second half says the variance."""
    return jnp.concatenate([scale * jnp.sin(x_t), jnp.tanh(slope * x_t)], -1)


def test_the_hybrid_loss_learns_the_mean_by_one_part_and_the_variance_by_the_other(x64):
    """Nichol & Dhariwal 2021, equation 16: no gradient of the bound reaches the mean."""
    schedule, steps = diffjax.from_betas(diffjax.linear_betas(20, 1e-3, 0.3)), 20
    x_0 = jnp.linspace(-1, 1, 6 * 4).reshape(6, 4)
    t = jnp.array([1, 2, 5, 10, 15, 20]) / steps
    key = jax.random.key(0)
    mean = lambda loss, **kw: (
        lambda scale, slope: loss(
            key,
            lambda x, l, c: learned(x, l, c, scale, slope),
            schedule,
            "eps",
            x_0,
            t=t,
            steps=steps,
            **kw,
        ).mean()
    )
    whole = jax.jit(jax.grad(mean(diffjax.hybrid_loss, bound_weight=0.01), (0, 1)))(1.0, 0.3)
    bound = jax.jit(jax.grad(mean(diffjax.bound_loss), (0, 1)))(1.0, 0.3)
    simple = jax.grad(
        lambda scale: diffjax.diffusion_loss(
            key, lambda x, l, c: scale * jnp.sin(x), schedule, "eps", x_0, t=t, steps=steps
        ).mean()
    )
    simple = jax.jit(simple)(1.0)
    np.testing.assert_allclose(whole[0], simple, rtol=1e-9)
    np.testing.assert_allclose(whole[1], 0.01 * bound[1], rtol=1e-9)
    assert abs(bound[0]) > 0 and abs(bound[1]) > 0


@pytest.mark.parametrize("variance", ["posterior", "learned"])
def test_the_mean_of_the_bound_loss_over_all_steps_is_the_bound(x64, variance):
    schedule, steps = diffjax.from_betas(diffjax.linear_betas(10, 1e-3, 0.3)), 10
    network = learned if variance == "learned" else lambda x, l, c: jnp.sin(x)
    x_0 = jnp.broadcast_to(jnp.array([[-1.0, -0.2, 0.6, 1.0]]), (5000, 4))
    options = dict(steps=steps, variance=variance)
    loss = jax.jit(
        lambda key, t: diffjax.bound_loss(key, network, schedule, "eps", x_0, t=t, **options)
    )
    each = [loss(jax.random.key(i), i / steps) for i in range(1, steps + 1)]
    denoise = diffjax.denoiser(network, schedule, "eps", learned_variance=variance == "learned")
    elbo = lambda x_0: likelihood.elbo(
        jax.random.key(0), denoise, schedule, x_0, samples=None, **options
    )
    exact = jax.jit(elbo)(x_0)
    nats = 4 * np.mean(each)
    np.testing.assert_allclose(nats, (exact.reconstruction + exact.denoising).mean(), rtol=0.02)


@pytest.mark.faults
def test_the_best_learned_variance_is_the_true_one(x64):
    """On Gaussian data the gradient of the bound vanishes where the reverse's variance is right."""
    schedule, steps, std = diffjax.cosine(-8.0, 8.0), 8, 0.6
    t, s = 5 / steps, 4 / steps
    (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule(t), schedule(s)
    c = jnp.exp(schedule.log_snr(t) - schedule.log_snr(s))
    spread = lambda alpha, sigma: alpha**2 * std**2 + sigma**2
    true = spread(alpha_s, sigma_s) * sigma_t**2 * (1 - c) / spread(alpha_t, sigma_t)
    best = jnp.log(true / (sigma_s**2 * (1 - c))) / jnp.log(sigma_t**2 / sigma_s**2)
    oracle = oracles.gaussian(schedule, [0.0], std**2)

    def network(fraction):
        def f(x_t, log_snr, cond):
            raw = jnp.full_like(x_t, 2 * fraction - 1)
            return jnp.concatenate([oracle(x_t, t).eps, raw], -1)

        return f

    z = jax.scipy.stats.norm.ppf((jnp.arange(400) + 0.5) / 400)
    x_0 = jnp.tile(std * z, 50)[:, None]
    loss = lambda fraction: diffjax.bound_loss(
        jax.random.key(0), network(fraction), schedule, "eps", x_0, t=t, steps=steps
    ).mean()
    slope = jax.jit(jax.grad(loss))
    assert slope(best - 0.1) < 0 < slope(best + 0.1)
    assert abs(slope(best)) < 0.1 * slope(best + 0.1)


def test_gradients_of_the_bound_are_finite_at_both_ends_of_the_values_and_of_the_steps():
    schedule, steps = diffjax.from_betas(diffjax.linear_betas(1000)), 1000
    x_0 = jnp.tile(jnp.array([-1.0, -0.5, 0.0, 1.0]), (4, 1))
    t = jnp.array([1, 2, 500, 1000]) / steps

    @jax.jit
    @jax.grad
    def slope(p, dress):
        network = lambda x, l, c: dress * learned(x, l, c, p, p)
        key = jax.random.key(0)
        return diffjax.bound_loss(key, network, schedule, "eps", x_0, t=t, steps=steps).sum()

    assert jnp.isfinite(slope(0.3, 1.0))
    assert jnp.isfinite(slope(0.3, 30.0))  # a network that is far off, too


def test_losses_are_remembered_as_in_a_queue_for_each_time():
    """improved-diffusion's LossSecondMomentResampler, in plain Python."""
    steps, n = 5, 3
    history, queues = diffjax.loss_history(steps, n), [[] for _ in range(steps)]
    rng = np.random.default_rng(0)
    for _ in range(4):
        i, loss = rng.integers(1, steps + 1, 8), rng.random(8).astype(np.float32)
        history = diffjax.remember_losses(history, jnp.asarray(i / steps), jnp.asarray(loss))
        for j, value in zip(i, loss, strict=True):
            queues[j - 1] = [*queues[j - 1], value][-n:]
    for row, seen, queue in zip(history.losses, history.seen, queues, strict=True):
        assert int(seen) == len(queue)
        np.testing.assert_allclose(row[: len(queue)], queue)


@pytest.mark.faults
def test_loss_aware_times_follow_the_losses_and_their_weights_keep_the_mean():
    steps = 8
    size = jnp.array([8.0, 4.0, 2.0, 1.0, 1.0, 1.0, 1.0, 2.0])
    full = diffjax.LossHistory(jnp.tile(size[:, None], 3), jnp.full(steps, 3))
    t, weight = diffjax.loss_aware_times(jax.random.key(0), full, 8000)
    counts = np.bincount(np.round(t * steps).astype(int) - 1, minlength=steps) / 8000
    np.testing.assert_allclose(counts, 0.999 * size / 20 + 0.001 / 8, atol=2e-3)
    f = lambda t: jnp.cos(3 * t) + 2
    np.testing.assert_allclose(jnp.mean(weight * f(t)), np.mean(f(np.arange(1, 9) / 8)), rtol=2e-2)
    part = diffjax.loss_aware_times(jax.random.key(0), full, 8000, jnp.array([7, 2]))
    assert jnp.array_equal(part[0], t[jnp.array([7, 2])])
    # One loss is still missing: uniform.
    t, weight = diffjax.loss_aware_times(
        jax.random.key(0), full._replace(seen=full.seen.at[0].set(2)), 64
    )
    np.testing.assert_allclose(weight, 1)
    assert (np.bincount(np.round(t * steps).astype(int) - 1) == 8).all()
    with pytest.raises(ValueError, match="steps=0"):
        diffjax.loss_history(0)


def test_min_snr_caps_the_x_0_weight_at_gamma():
    log_snr = jnp.linspace(-10, 10, 41)
    on_x_0 = weightings.min_snr(5.0)(log_snr, log_snr) * jnp.exp(log_snr)
    np.testing.assert_allclose(on_x_0, np.minimum(np.exp(np.linspace(-10, 10, 41)), 5), rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("min_snr", {"gamma": 0.0}),
        ("edm", {"p_std": -1.2}),
        ("edm", {"sigma_data": 0.0}),
        ("preconditioned", {"sigma_data": 0.0}),
        ("p2", {"k": -1.0}),
    ],
)
def test_weightings_that_are_negative_or_undefined_are_refused(name, options):
    (option, value) = next(iter(options.items()))
    with pytest.raises(ValueError, match=f"{option}={value}: must be positive"):
        weightings.WEIGHTINGS[name](**options)


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


def test_a_noise_level_that_the_schedule_never_has_weighs_nothing():
    weighs = diffjax.effective_weight(diffjax.cosine(-10.0, 10.0), "x_0", weightings.constant())
    found = weighs(jnp.array([-30.0, -10.1, -9.9, 9.9, 10.1]))
    assert ((found > 0) == jnp.array([False, False, True, True, False])).all()
    with pytest.raises(ValueError, match="unknown target 'foo'"):
        diffjax.effective_weight(diffjax.cosine(), "foo")
    with pytest.raises(ValueError, match="unknown target 'foo'"):
        diffjax.unit_output(lambda *a: a[0], "foo", diffjax.cosine())


def test_whole_numbers_are_times_too():
    schedule, x_0 = diffjax.linear(), jnp.linspace(-1, 1, 6).reshape(2, 3)
    network = lambda x_t, log_snr, cond: jnp.sin(x_t)
    for weight in (None, weightings.elbo()):
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


@pytest.mark.faults
@pytest.mark.parametrize("steps", [7, 10, 1000])
def test_the_effective_weight_at_a_step_of_the_grid_is_that_of_the_step(steps):
    """DDPM's simple loss over uniform steps, in closed form: snr_i / T over each step's range.

    At a step's own log-SNR, and a little above and below it.
    """
    schedule = diffjax.cosine()
    weigh = losses.effective_weight(schedule, "eps", weightings.constant(), steps=steps)
    i = np.unique(np.linspace(1, steps, 10).round())
    t = i / steps
    rate = lambda t: -jax.vmap(jax.grad(schedule.log_snr))(jnp.asarray(t, jnp.float32))
    at = schedule.log_snr(t.astype(np.float32))
    np.testing.assert_allclose(weigh(at) * rate(t), jnp.exp(at), rtol=2e-3)
    later = t[:-1] + 0.1 / steps  # noisier than step i, and therefore of step i + 1
    above = np.floor(later * steps + 1) / steps
    expected = jnp.exp(schedule.log_snr(above.astype(np.float32)))
    np.testing.assert_allclose(
        weigh(schedule.log_snr(later.astype(np.float32))) * rate(later), expected, rtol=5e-3
    )
