"""A schedule that is learned beside the network, against closed forms of Gaussian data."""

import functools
import math

import diffjax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffjax import keys, weightings
from diffjax.schedules import MonotoneParams, split, tangent

STD, ENDS = 0.5, (-6.0, 4.0)
B = math.log(STD**2)  # eps is estimated with the mean squared error sigmoid(log_snr + B)


def bent(width=8):
    """Parameters of a curve that is not straight."""
    params = diffjax.monotone_params(width)
    return params._replace(height=params.height + jnp.linspace(0, 4, width))


def exact(x_t, log_snr, cond):
    """E[eps | x_t] for data N(0, STD^2) and variance-preserving scales."""
    alpha, sigma = (s[:, None] for s in diffjax.vp(log_snr))
    return sigma * x_t / (alpha**2 * STD**2 + sigma**2)


def draws(n, dims=4, dtype=None):
    x_0 = STD * jax.random.normal(jax.random.key(1), (n, dims), dtype)
    return x_0, diffjax.sample_times(jax.random.key(2), n)


def loss_of(params, ends, x_0, t, network=exact, **options):
    schedule = diffjax.monotone(params, *ends)
    key = jax.random.key(3)
    return diffjax.continuous_bound_loss(key, network, schedule, "eps", x_0, t=t, **options)


def test_the_gradients_are_those_of_the_bound_and_of_the_mean_square(x64):
    """One backward pass gives what naive passes give: of the network and the ends, through the
    sum of the three terms; of the inside, through the square of the diffusion loss."""
    x_0, t = draws(64, dtype=jnp.float64)
    key = jax.random.key(3)

    def network_of(theta):
        return lambda x_t, log_snr, cond: jnp.tanh(x_t * theta + jnp.sin(log_snr)[:, None])

    def learned(theta, params, ends):
        return loss_of(params, ends, x_0, t, network_of(theta), levels=None)

    def naive(theta, params, ends):
        schedule, network = diffjax.monotone(params, *ends), network_of(theta)
        weight = weightings.elbo()
        diffusion = diffjax.diffusion_loss(
            key, network, schedule, "eps", x_0, weight=weight, t=t
        )
        eps = keys.normal(
            keys.fold_in(keys.fold_in(keys.per_example(key, 64), 2), 0), x_0.shape, x_0.dtype
        )
        denoise = diffjax.denoiser(network, schedule, "eps")
        rest = diffjax.prior_term(schedule, x_0) + diffjax.reconstruction_term(
            denoise, schedule, x_0, eps, levels=None
        )
        return diffusion, diffusion + rest / x_0.shape[1]

    at = jnp.float64(0.7), bent(), tuple(map(jnp.float64, ENDS))
    value, got = jax.value_and_grad(lambda *a: learned(*a).mean(), (0, 1, 2))(*at)
    _, bound = naive(*at)
    np.testing.assert_allclose(value, bound.mean(), rtol=1e-12)
    of_bound = jax.grad(lambda *a: naive(*a)[1].mean(), (0, 2))(*at)
    of_square = jax.grad(lambda *a: (naive(*a)[0] ** 2).mean(), 1)(*at)
    wanted = of_bound[0], of_square, of_bound[1]
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
    assert all(np.abs(x).max() > 1e-3 for x in jax.tree.leaves(got))


def test_the_ends_follow_the_closed_form_of_the_bound_and_the_inside_does_not_enter(x64):
    """With h and w the log-SNR at t = 0 and 1, the bound of Gaussian data per dimension is
    STD^2 e^w / 2 + (log 2 pi - h + 1) / 2 + (softplus(h + B) - softplus(w + B)) / 2.
    """
    low, high = map(jnp.float64, ENDS)

    @jax.jit
    def grads(key):
        key_x, key_t, key = jax.random.split(key, 3)
        x_0 = STD * jax.random.normal(key_x, (2500, 1))
        t = diffjax.sample_times(key_t, len(x_0))
        at = lambda params, ends: diffjax.monotone(params, *ends)
        bound = lambda *a: diffjax.continuous_bound_loss(
            key, exact, at(*a), "eps", x_0, t=t, levels=None
        )
        diffusion = lambda *a: diffjax.diffusion_loss(
            key, exact, at(*a), "eps", x_0, weight=weightings.elbo(), t=t
        )
        mean = lambda f: lambda *a: f(*a).mean()
        value, of_ends = jax.value_and_grad(mean(bound), 1)(bent(), (low, high))
        return (value, *of_ends), jax.grad(mean(diffusion))(bent(), (low, high))

    keys = jax.random.split(jax.random.key(0), 16)  # as many estimates, for a standard error
    found, inside = jax.lax.map(grads, keys)
    bound = lambda w, h: 0.5 * (
        STD**2 * jnp.exp(w)
        + math.log(2 * math.pi)
        - h
        + 1
        + jax.nn.softplus(h + B)
        - jax.nn.softplus(w + B)
    )
    exactly = bound(low, high), *jax.grad(bound, (0, 1))(low, high)
    for got, wanted in zip(jax.tree.leaves((found, inside)), (*exactly, 0, 0, 0, 0), strict=True):
        error = got.std(0, ddof=1) / len(keys) ** 0.5
        assert (np.abs(got.mean(0) - wanted) < 4.5 * error + 1e-12).all()
        assert (error < 0.02).all()


def test_the_schedule_that_is_learned_has_nearly_the_least_variance():
    """The least is that of a curve whose slope is the inverse of the error, sigmoid(l + B)."""
    n, dims, ends = 512, 16, (-8.0, 8.0)

    def std(schedule):
        x_0, t = draws(8192, dims)
        f = functools.partial(diffjax.diffusion_loss, jax.random.key(5), exact, schedule, "eps")
        return float(f(x_0, weight=weightings.elbo(), t=t).std())

    @jax.jit
    def learn(params):
        def step(carry, k):
            params, mean, square = carry
            key = jax.random.key(k)
            x_0 = STD * jax.random.normal(jax.random.fold_in(key, 0), (n, dims))
            t = diffjax.sample_times(jax.random.fold_in(key, 1), n)
            g = jax.grad(lambda p: loss_of(p, ends, x_0, t, levels=None).mean())(params)
            mean = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, mean, g)
            square = jax.tree.map(lambda s, g: 0.99 * s + 0.01 * g**2, square, g)
            move = lambda p, m, s: p - 1e-2 * m / (jnp.sqrt(s) + 1e-8)
            return (jax.tree.map(move, params, mean, square), mean, square), None

        start = jax.tree.map(jnp.zeros_like, params)
        return jax.lax.scan(step, (params, start, start), jnp.arange(600))[0][0]

    soft = lambda l: jax.nn.softplus(l + B)

    def best(t):  # softplus(l + B) falls in a straight line
        high, low = soft(ends[1]), soft(ends[0])
        y = high - t * (high - low)
        return y + jnp.log(-jnp.expm1(-y)) - B

    params = diffjax.monotone_params()
    straight = std(diffjax.monotone(params, *ends))
    least = std(diffjax.Schedule(best, diffjax.vp))
    learned = std(diffjax.monotone(learn(params), *ends))
    print(straight, least, learned)
    assert straight > 3 * least
    assert learned < 1.25 * least


def test_a_discrete_time_and_another_schedule_are_refused():
    x_0, t = draws(4)
    with pytest.raises(ValueError, match="discrete time"):
        loss_of(bent(), ENDS, x_0, t, steps=10)
    with pytest.raises(TypeError, match="monotone"):
        diffjax.continuous_bound_loss(jax.random.key(0), exact, diffjax.cosine(), "eps", x_0)
    assert isinstance(split(diffjax.monotone(bent()))[0].log_snr.args[0], MonotoneParams)
    line = tangent(diffjax.cosine(), t, t + 1, 2 * t)
    assert (line.log_snr(t) == t + 1).all()
