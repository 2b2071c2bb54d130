import functools
import math

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
import scipy.stats

import diffjax
from catalogue import SCHEDULES, each, slow
from diffjax import keys, likelihood, oracles
from diffjax.process import decoder
from diffjax.types import LearnedPrediction

SPREAD = {
    name: SCHEDULES[name]
    for name in ("cosine", "linear", "log_uniform", "rectified_flow", "linear_betas")
}
every_schedule = pytest.mark.parametrize("schedule", each(SPREAD, "cosine", "linear_betas"))
MEAN, STD = 0.4, 0.6
ENTROPY = 0.5 * math.log(2 * math.pi * math.e * STD**2)
COV = np.array([[1.0, 0.3], [0.3, 0.2]])


def gaussian(schedule):
    return oracles.gaussian(schedule, [MEAN], STD**2)


def compiled_elbo(denoise, schedule, **options):
    """(key, x_0) -> `elbo` in one program: many small ones would take longer to compile."""
    elbo = lambda key, x_0, **more: likelihood.elbo(key, denoise, schedule, x_0, **options, **more)
    return jax.jit(elbo, static_argnames=("samples", "at_once"))


def with_fraction(denoise, fraction):
    """A denoiser that has learned a variance: `fraction` is a function of t."""

    def learned(x_t, t, cond=None):
        x_0, eps = denoise(x_t, t)
        f = jnp.broadcast_to(jnp.reshape(fraction(t), (-1, *[1] * (x_t.ndim - 1))), x_t.shape)
        return LearnedPrediction(x_0, eps, f)

    return learned


def expectation(term):
    """E over x_0 ~ N(MEAN, STD^2) and eps ~ N(0, 1) of term(x_0, eps), exact for quadratics."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(4)
    a, b = (g.reshape(-1, 1) for g in np.meshgrid(nodes, nodes))
    w = np.outer(weights, weights).reshape(-1) / (2 * math.pi)
    return jnp.sum(w * term(jnp.asarray(MEAN + STD * a), jnp.asarray(b)))


def kl(mean, std, other, width):
    """KL of two diagonal Gaussians, summed: the textbook's formula."""
    ratio = jnp.broadcast_to(std, mean.shape) / jnp.broadcast_to(width, mean.shape)
    by_element = (ratio**2 + ((mean - other) / width) ** 2 - 1) / 2 - jnp.log(ratio)
    return by_element.reshape(len(mean), -1).sum(1)


@every_schedule
@pytest.mark.parametrize("variance", ["posterior", "beta", "learned"])
def test_a_denoising_term_is_the_kl_of_the_two_gaussians(x64, schedule, variance):
    network = lambda x_t, log_snr, cond: jnp.sin(x_t)
    denoise = with_fraction(diffjax.denoiser(network, schedule, "v"), lambda t: 0.3 + 0 * t)
    x_0, eps = jax.random.normal(jax.random.key(0), (2, 4, 2, 3))
    t, s = jnp.array([0.9, 0.6, 0.3, 0.2]), jnp.array([0.8, 0.1, 0.29, 0.05])
    x_t = diffjax.q_sample(schedule, x_0, t, eps)
    expected = kl(
        *diffjax.q_posterior(schedule, x_0, x_t, t, s),
        *decoder(schedule, denoise(x_t, t), x_t, t, s, variance),
    )
    got = likelihood.denoising_term(denoise, schedule, x_0, eps, t, s, variance)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


@every_schedule
def test_terms_on_gaussian_data_have_their_closed_forms(x64, schedule):
    denoise = gaussian(schedule)
    snr = lambda t: jnp.exp(schedule.log_snr(t))
    prior = expectation(lambda x_0, eps: likelihood.prior_term(schedule, x_0))
    np.testing.assert_allclose(prior, 0.5 * snr(1.0) * (MEAN**2 + STD**2), rtol=1e-9)
    for t, s in ((0.9, 0.7), (0.5, 0.49), (0.2, 0.0)):
        alpha, sigma = schedule(t)
        left = STD**2 * sigma**2 / (alpha**2 * STD**2 + sigma**2)  # Var[x_0 | x_t]
        term = lambda x_0, eps, s=s, t=t: likelihood.denoising_term(
            denoise, schedule, x_0, eps, t, s
        )
        np.testing.assert_allclose(expectation(term), 0.5 * (snr(s) - snr(t)) * left, rtol=1e-7)
    # The integrand is the limit of the term for a short step.
    rate = expectation(lambda x, e: likelihood.denoising_term(denoise, schedule, x, e, 0.5, None))
    step = expectation(lambda x, e: likelihood.denoising_term(denoise, schedule, x, e, 0.5, 0.4999))
    np.testing.assert_allclose(rate, step / 1e-4, rtol=1e-2)


def chain(schedule, denoise, steps, variance):
    """The expected prior and denoising terms of Gaussian data, by quadrature."""
    terms = [
        expectation(
            lambda x, e, i=i: likelihood.denoising_term(
                denoise, schedule, x, e, i / steps, (i - 1) / steps, variance
            )
        )
        for i in range(2, steps + 1)
    ]
    return sum(terms) + expectation(lambda x, e: likelihood.prior_term(schedule, x))


def least(schedule, steps):
    """What these cost at the least: I(x_0; x_{1/T}), and the prior's mean, which is not the data's.

    KL(q(x_{1/T}, ..., x_1 | x_0) || p) is this for the p that reverses the process exactly.
    """
    alpha, sigma = schedule(1 / steps)
    information = 0.5 * jnp.log1p(alpha**2 * STD**2 / sigma**2)
    return information + 0.5 * jnp.exp(schedule.log_snr(1.0)) * MEAN**2


def test_the_bound_comes_down_to_the_likelihood_with_more_steps(x64):
    schedule = diffjax.log_uniform(0.01, 100.0)
    gaps = [
        chain(schedule, gaussian(schedule), n, "posterior") - least(schedule, n)
        for n in (32, 64, 128)
    ]
    np.testing.assert_allclose([gaps[0] / gaps[1], gaps[1] / gaps[2]], 2, rtol=0.1)
    assert 0 < gaps[2] < 0.4


@pytest.mark.parametrize("steps", [4, 20])
def test_the_whole_bound_lies_above_the_entropy(x64, steps):
    for schedule in (diffjax.cosine(-12.0, 12.0), diffjax.log_uniform(0.01, 100.0)):
        for variance in ("posterior", "beta"):
            start = expectation(
                lambda x, e, s=schedule, v=variance: likelihood.reconstruction_term(
                    gaussian(s), s, x, e, steps, v, levels=None
                )
            )
            bound = start + chain(schedule, gaussian(schedule), steps, variance)
            assert bound > ENTROPY + 0.02


def test_with_the_true_variance_each_step_is_exact_however_long(x64):
    """The reverse of a Gaussian's process is Gaussian: the right learned variance leaves no gap."""
    schedule, steps = diffjax.cosine(-12.0, 12.0), 8

    def fraction(t):
        s = t - 1 / steps
        (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule(t), schedule(s)
        spread = lambda alpha, sigma: alpha**2 * STD**2 + sigma**2
        c = jnp.exp(schedule.log_snr(t) - schedule.log_snr(s))
        forward = sigma_t**2 * (1 - c)  # Var[x_t | x_s]
        true = spread(alpha_s, sigma_s) * forward / spread(alpha_t, sigma_t)  # Var[x_s | x_t]
        return jnp.log(true / (sigma_s**2 * (1 - c))) / jnp.log(sigma_t**2 / sigma_s**2)

    for t in np.arange(2, steps + 1) / steps:
        assert 0 < fraction(t) < 1  # Nichol & Dhariwal's bounds
    exact = with_fraction(gaussian(schedule), fraction)
    floor = least(schedule, steps)
    np.testing.assert_allclose(chain(schedule, exact, steps, "learned"), floor, rtol=1e-4)
    for variance in ("posterior", "beta"):
        assert chain(schedule, exact, steps, variance) > floor + 0.03


@pytest.mark.parametrize("variance", ["posterior", "beta", "learned"])
def test_the_discrete_bound_is_that_of_improved_diffusion(x64, variance):
    """Its tables of betas, posteriors and log-variances, indexed from 0, in numpy."""
    steps = 10
    betas = diffjax.linear_betas(steps, 1e-3, 0.3)
    schedule = diffjax.from_betas(betas)
    network = lambda x_t, log_snr, cond: jnp.tanh(x_t)
    fraction = 0.3
    denoise = with_fraction(diffjax.denoiser(network, schedule, "eps"), lambda t: fraction + 0 * t)

    abar = np.cumprod(1 - betas)
    before = np.append(1.0, abar[:-1])
    posterior = betas * (1 - before) / (1 - abar)
    clipped = np.log(np.append(posterior[1], posterior[1:]))
    log_variance = {
        "posterior": clipped,
        "beta": np.log(np.append(posterior[1], betas[1:])),
        "learned": fraction * np.log(betas) + (1 - fraction) * clipped,
    }[variance]
    x_0 = jnp.round((jnp.array([[-1.0, -0.5, 0.1, 1.0]]) + 1) * 127.5) / 127.5 - 1
    eps = jax.random.normal(jax.random.key(0), x_0.shape)
    for i in range(steps):
        x_t = np.sqrt(abar[i]) * x_0 + np.sqrt(1 - abar[i]) * eps
        x_hat = (x_t - np.sqrt(1 - abar[i]) * np.tanh(x_t)) / np.sqrt(abar[i])
        on_x_0 = betas[i] * np.sqrt(before[i]) / (1 - abar[i])
        on_x_t = (1 - before[i]) * np.sqrt(1 - betas[i]) / (1 - abar[i])
        std = np.exp(0.5 * log_variance[i])
        mean = on_x_0 * x_hat + on_x_t * x_t
        t, s = (i + 1) / steps, i / steps
        if i:
            got = likelihood.denoising_term(denoise, schedule, x_0, eps, t, s, variance)
            true = np.exp(0.5 * clipped[i])
            expected = kl(on_x_0 * x_0 + on_x_t * x_t, true, mean, std)
        else:
            got = likelihood.reconstruction_term(denoise, schedule, x_0, eps, steps, variance)
            cdf = functools.partial(scipy.stats.norm.cdf, loc=mean, scale=std)
            upper = np.where(x_0 > 0.999, 1.0, cdf(x_0 + 1 / 255))
            lower = np.where(x_0 < -0.999, 0.0, cdf(x_0 - 1 / 255))
            expected = -np.log(upper - lower).sum(1)
        np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize("steps", [None, 10])
@pytest.mark.parametrize("levels", [5, 256])
def test_the_probabilities_of_all_values_add_up_to_one(x64, steps, levels):
    schedule = diffjax.cosine(-6.0, 4.0)
    values = jnp.linspace(-1, 1, levels)[:, None]
    # The same x_t for each value: what it is x_0 of is all that changes.
    t = 0.0 if steps is None else 1 / steps
    alpha, sigma = schedule(t)
    eps = (0.3 - alpha * values) / sigma
    nats = likelihood.reconstruction_term(
        gaussian(schedule), schedule, values, eps, steps, levels=levels
    )
    np.testing.assert_allclose(jnp.exp(-nats).sum(), 1, rtol=1e-6)


def test_cells_far_out_in_either_tail_keep_their_digits():
    """float32 against scipy's log-probabilities in the upper and the lower tail."""
    x = jnp.array([[0.5], [-0.5], [1.0], [-1.0]])
    got = likelihood._log_cell(x, jnp.zeros((4, 1)), jnp.full((4, 1), -2.5), 256)[:, 0]
    std, half = math.exp(-2.5), 1 / 255
    near, far = (scipy.stats.norm.logcdf(-v / std) for v in (0.5 - half, 0.5 + half))
    inner = near + np.log1p(-np.exp(far - near))
    outer = scipy.stats.norm.logcdf(-(1 - half) / std)
    np.testing.assert_allclose(got, [inner, inner, outer, outer], rtol=1e-4)


@pytest.mark.faults
@pytest.mark.parametrize("steps", [None, 1000])
def test_the_estimate_is_unbiased_and_its_error_honest(steps):
    """Many estimates of one bound: their mean is its value, their spread what they say it is."""
    schedule = diffjax.from_betas(diffjax.linear_betas(1000)) if steps else diffjax.cosine()
    denoise, n = gaussian(schedule), 2000
    x_0 = jnp.full((n, 1), 0.1)
    elbo = compiled_elbo(denoise, schedule, steps=steps, levels=None)
    estimate = elbo(jax.random.key(0), x_0, samples=16)
    if steps:
        exact = elbo(jax.random.key(1), x_0[:200], samples=None)
        target, error = exact.nats.mean(), exact.nats.std() / math.sqrt(200)
        np.testing.assert_allclose(exact.standard_error.mean(), exact.nats.std(), rtol=0.3)
    else:
        target, error = -denoise.log_density(x_0[:1], 0.0)[0], 0.0
    mean, spread = estimate.nats.mean(), estimate.nats.std()
    assert abs(mean - target) < 4 * math.hypot(spread / math.sqrt(n), error) + 0.01
    said = jnp.sqrt(jnp.mean(estimate.standard_error**2))
    assert spread * 0.95 < said < spread * 1.5
    assert all(part.shape == (n,) for part in estimate)


@pytest.mark.parametrize("samples", [16, *slow(None)])
def test_the_standard_error_is_of_the_noise_and_not_of_the_curve(samples):
    """In 300 dimensions the terms change more from step to step than the noise moves them."""
    schedule = diffjax.from_betas(diffjax.linear_betas(50))
    denoise = oracles.gaussian(schedule, jnp.zeros(300), STD**2)
    x_0 = jnp.broadcast_to(denoise.sample(jax.random.key(3), 1), (400, 300))
    elbo = compiled_elbo(denoise, schedule, steps=50, levels=None)
    found = elbo(jax.random.key(0), x_0, samples=samples)
    said = jnp.sqrt(jnp.mean(found.standard_error**2))
    assert 0.85 < said / found.nats.std() < 1.6


def test_in_continuous_time_there_is_one_variance():
    schedule = diffjax.cosine()
    with pytest.raises(ValueError, match="variance='learned': in continuous time"):
        likelihood.elbo(
            jax.random.key(0), gaussian(schedule), schedule, jnp.ones((2, 1)), variance="learned"
        )


@pytest.mark.faults
def test_the_bound_on_a_model_that_is_wrong_is_above_that_of_the_right_one():
    schedule = diffjax.cosine()
    x_0 = oracles.gaussian(schedule, [MEAN], STD**2).sample(jax.random.key(0), 500)
    wrong = oracles.gaussian(schedule, [0.0], 1.5)
    nats = [
        compiled_elbo(d, schedule, levels=None)(jax.random.key(1), x_0).nats.mean()
        for d in (gaussian(schedule), wrong)
    ]
    # By the KL of the two, because each is tight for its own model.
    gap = 0.5 * (STD**2 / 1.5 + MEAN**2 / 1.5 - 1 - math.log(STD**2 / 1.5))
    np.testing.assert_allclose(nats[1] - nats[0], gap, atol=0.15)


@pytest.mark.faults
def test_an_examples_bound_does_not_depend_on_its_batch_mates():
    schedule = diffjax.cosine()
    x_0 = jnp.linspace(-1, 1, 6)[:, None]
    elbo = compiled_elbo(gaussian(schedule), schedule)
    whole, part = elbo(jax.random.key(0), x_0), elbo(jax.random.key(0), x_0[:2])
    for a, b in zip(whole, part, strict=True):
        np.testing.assert_allclose(a[:2], b, rtol=1e-5)


def pulled_back(schedule, oracle, x):
    """log of N(0, sigma_1^2 I) pulled back through the exact flow of Gaussian data."""
    (alpha_0, sigma_0), (alpha_1, sigma_1) = schedule(0.0), schedule(1.0)
    variances = np.linalg.eigvalsh(COV)
    stretch = (alpha_1**2 * variances + sigma_1**2) / (alpha_0**2 * variances + sigma_0**2)
    x_1 = oracle.flow_map(x, 0.0, 1.0)
    prior = -0.5 * (x_1**2).sum(-1) / sigma_1**2 - jnp.log(2 * math.pi * sigma_1**2)
    return prior + 0.5 * jnp.log(stretch).sum()


@every_schedule
def test_flow_likelihood_is_the_pull_back_of_the_prior(schedule):
    oracle = oracles.gaussian(schedule, [0.3, -0.2], COV)
    x = oracle.sample(jax.random.key(0), 6)
    got = jax.jit(lambda x: likelihood.flow_log_likelihood(oracle, schedule, x))(x)
    np.testing.assert_allclose(got, pulled_back(schedule, oracle, x), atol=1e-4)


@pytest.mark.faults
def test_flow_likelihood_to_nine_digits_with_adaptive_steps(x64):
    schedule = diffjax.cosine()
    oracle = oracles.gaussian(schedule, [0.3, -0.2], COV)
    x = oracle.sample(jax.random.key(0), 4)
    got = jax.jit(lambda x: likelihood.flow_log_likelihood(oracle, schedule, x, tolerance=1e-11))(x)
    np.testing.assert_allclose(got, pulled_back(schedule, oracle, x), atol=1e-9)


def test_flow_likelihood_of_a_mixture_is_its_density(x64):
    """Not linear, not Gaussian; with the prior's mismatch made small by a wide schedule."""
    schedule = diffjax.cosine(-24.0, 24.0)
    oracle = oracles.gaussian_mixture(
        schedule, [0.3, 0.7], [[-1.0, 0.5], [0.8, -0.3]], np.stack([COV, 0.1 * np.eye(2)])
    )
    x = oracle.sample(jax.random.key(0), 6)
    got = jax.jit(lambda x: likelihood.flow_log_likelihood(oracle, schedule, x, steps=200))(x)
    np.testing.assert_allclose(got, oracle.log_density(x, 0.0), atol=1e-4)


@pytest.mark.faults
def test_hutchinsons_estimate_is_unbiased():
    """One sign vector an example: over many of them the mean is the exact divergence's."""
    schedule = diffjax.cosine()
    oracle = oracles.gaussian(schedule, [0.3, -0.2], COV)
    x = jnp.broadcast_to(jnp.array([[0.5, 0.1]]), (2000, 2))
    flow = jax.jit(lambda *a: likelihood.flow_log_likelihood(oracle, schedule, *a, steps=50))
    exact, got = flow(x[:1])[0], flow(x, jax.random.key(0))
    assert got.std() > 0.1
    np.testing.assert_allclose(got.mean(), exact, atol=4 * got.std() / math.sqrt(2000))


@pytest.mark.parametrize("key", [None, 0])
def test_the_flow_needs_no_derivative_of_forward_mode(key):
    """Some layers have none: cuDNN's attention, and any function with a rule of reverse mode."""
    schedule = diffjax.cosine()
    oracle = oracles.gaussian(schedule, [0.3, -0.2], COV)

    @jax.custom_vjp
    def layer(x):
        return x

    layer.defvjp(lambda x: (x, None), lambda _, slope: (slope,))
    denoise = lambda x_t, t, cond=None: oracle(layer(x_t), t)
    x = jnp.array([[0.5, 0.1], [0.0, -1.0]])
    key = None if key is None else jax.random.key(key)
    flow = lambda d: likelihood.flow_log_likelihood(d, schedule, x, key, steps=4)
    np.testing.assert_allclose(flow(denoise), flow(oracle), rtol=1e-5)


def test_dequantised_density_bounds_the_probability_of_a_value():
    """Values of a Gaussian rounded to 17 levels, and the Gaussian as the model of densities."""
    levels, std = 17, 0.2
    values = jnp.linspace(-1, 1, levels)[:, None]
    cell = 1 / (levels - 1)
    exact = np.log(
        scipy.stats.norm.cdf((values + cell) / std) - scipy.stats.norm.cdf((values - cell) / std)
    )[:, 0]
    many = jnp.repeat(values, 4000, axis=0)
    x, log_volume = likelihood.dequantise(jax.random.key(0), many, levels)
    assert jnp.abs(x - many).max() <= cell + 1e-6
    model = oracles.gaussian(diffjax.cosine(-15.0, 24.0), [0.0], std**2)
    below = (model.log_density(x, 0.0) + log_volume).reshape(levels, 4000).mean(1)
    assert (below < exact + 0.02).all()
    np.testing.assert_allclose(below[6:11], exact[6:11], atol=0.08)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f, d, s, x: f.elbo(jax.random.key(0), d, s, x, steps=1), "steps=1: must be"),
        (lambda f, d, s, x: f.elbo(jax.random.key(0), d, s, x, samples=1), "samples=1: must"),
        (
            lambda f, d, s, x: f.elbo(jax.random.key(0), d, s, x, samples=None),
            "needs discrete time",
        ),
        (
            lambda f, d, s, x: f.elbo(jax.random.key(0), d, s, x, levels=1),
            "levels=1: must",
        ),
        (
            lambda f, d, s, x: f.elbo(jax.random.key(0), d, s, x, steps=4, variance="learned"),
            "needs a denoiser that has learned one",
        ),
        (
            lambda f, d, s, x: f.elbo(jax.random.key(0), d, s, x, steps=4, variance="none"),
            "unknown variance 'none'",
        ),
        (lambda f, d, s, x: f.flow_log_likelihood(d, s, x, steps=0), "steps=0"),
        (lambda f, d, s, x: f.flow_log_likelihood(d, s, x, tolerance=-1.0), "tolerance=-1.0"),
    ],
)
def test_what_has_no_meaning_is_refused(call, message):
    schedule = diffjax.cosine()
    with pytest.raises(ValueError, match=message):
        call(likelihood, gaussian(schedule), schedule, jnp.ones((2, 1)))


@pytest.mark.faults
def test_looks_at_once_say_the_same():
    schedule = diffjax.cosine()
    x_0 = jax.random.normal(jax.random.key(0), (3, 1))
    elbo = compiled_elbo(gaussian(schedule), schedule, steps=10, levels=None)
    bound = functools.partial(elbo, jax.random.key(1), x_0)
    for samples in (32, None):
        one, several = (bound(samples=samples, at_once=n) for n in (1, 5))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), one, several)
    # The walk over the looks is as much shorter.
    jaxprs = [str(jax.make_jaxpr(lambda n=n: bound(at_once=n))()) for n in (1, 8)]
    lengths = [jaxpr.count("length=32") for jaxpr in jaxprs]
    assert lengths[0] > 0 and lengths[1] == 0
    with pytest.raises(ValueError, match="at_once=0: must be at least 1"):
        bound(at_once=0)


@pytest.mark.parametrize(
    ("steps", "dtype"),
    [(10, jnp.bfloat16), (None, np.float16), (None, jnp.bfloat16), (10, np.float16)],
)
@pytest.mark.faults
def test_the_bound_of_half_precision_data_is_that_of_the_same_numbers_in_float32(dtype, steps):
    schedule = diffjax.log_uniform()
    x_0 = jnp.asarray(np.round(np.random.default_rng(0).uniform(-1, 1, (3, 500)) * 8) / 8)
    denoise = oracles.gaussian(schedule, jnp.zeros(500), 0.5)
    elbo = lambda x: likelihood.elbo(jax.random.key(0), denoise, schedule, x, steps, samples=4)
    for levels in (17, None):
        elbo = functools.partial(
            likelihood.elbo,
            jax.random.key(0),
            denoise,
            schedule,
            steps=steps,
            levels=levels,
            samples=4,
        )
        for got, expected in zip(elbo(x_0.astype(dtype)), elbo(x_0), strict=True):
            assert got.dtype == jnp.float32
            np.testing.assert_array_equal(got, expected)
    flow = lambda x: likelihood.flow_log_likelihood(
        denoise, schedule, x, jax.random.key(1), steps=4
    )
    np.testing.assert_array_equal(flow(x_0.astype(dtype)), flow(x_0))


def test_sums_do_not_overflow_and_numpy_arrays_are_data(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as users run it
    schedule = diffjax.cosine(log_snr_min=0.0)
    x_0 = np.full((2, 70_000), 2.0)
    for dtype in (np.float16, np.float32, np.float64, jnp.bfloat16):
        np.testing.assert_allclose(
            likelihood.prior_term(schedule, x_0.astype(dtype)), 140_000, rtol=1e-5
        )
    with pytest.raises(TypeError, match="floating point"):
        likelihood.prior_term(schedule, np.ones((2, 3), np.uint8))
    denoise = gaussian(schedule)
    x = np.linspace(-1, 1, 3)[:, None]
    elbo = lambda x: likelihood.elbo(jax.random.key(0), denoise, schedule, x, samples=2).nats
    np.testing.assert_array_equal(elbo(x), elbo(jnp.asarray(x)))


@pytest.mark.parametrize(
    ("steps", "looks"),
    [
        (None, 8),
        *slow((10, 4), (1000, 8), (None, 32), (10, 8), (10, 32), (1000, 4), (1000, 32), (None, 4)),
    ],
)
def test_the_standard_error_is_calibrated_for_few_looks(steps, looks):
    """The root mean square of what 8,000 estimates say is the spread of the estimates."""
    betas = {10: np.linspace(0.05, 0.5, 10), 1000: diffjax.linear_betas(1000)}
    schedule = diffjax.from_betas(betas[steps]) if steps else diffjax.cosine()
    denoise = oracles.gaussian(schedule, jnp.zeros(8), 0.25)
    x_0 = jnp.broadcast_to(denoise.sample(jax.random.key(1), 1), (8000, 8))
    elbo = compiled_elbo(denoise, schedule, steps=steps, levels=None)
    found = elbo(jax.random.key(0), x_0, samples=looks)
    said = jnp.sqrt(jnp.mean(found.standard_error**2))
    np.testing.assert_allclose(said, found.nats.std(), rtol=0.05)


@pytest.mark.faults
@pytest.mark.parametrize("check_vma", [True, False])
def test_likelihoods_under_shard_map_are_those_of_one_device(check_vma):
    schedule = diffjax.cosine()
    denoise = gaussian(schedule)
    x_0 = jnp.linspace(-1, 1, 8)[:, None]
    over = jax.sharding.PartitionSpec("i")
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), "i")
    example_keys = keys.per_example(jax.random.key(0), 8)
    bounds = [
        lambda k, x: likelihood.flow_log_likelihood(denoise, schedule, x, steps=4),
        lambda k, x: likelihood.flow_log_likelihood(denoise, schedule, x, k, steps=4),
        lambda k, x: likelihood.elbo(k, denoise, schedule, x, samples=4).nats,
    ]
    for bound in bounds:
        mapped = jax.shard_map(bound, mesh=mesh, in_specs=over, out_specs=over, check_vma=check_vma)
        expected = bound(example_keys, x_0)
        np.testing.assert_allclose(jax.jit(mapped)(example_keys, x_0), expected, rtol=1e-4)
