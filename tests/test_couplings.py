"""Couplings of data and noise: optimal pairs, and what they do to a flow."""

import functools
import itertools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
import scipy.integrate
import scipy.stats
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import diffjax
from diffjax import couplings

KEY = jax.random.key(0)


def draws(n, d, seed=1):
    """Data and noise, both standard normal."""
    return tuple(jax.random.normal(k, (n, d)) for k in jax.random.split(jax.random.key(seed)))


def paired(coupling, n, d, cond=None):
    x_0, eps = draws(n, d)
    return x_0, eps, coupling(KEY, x_0, eps, cond)


def is_permutation(a, b):
    return np.array_equal(np.sort(np.asarray(a), axis=0), np.sort(np.asarray(b), axis=0))


def test_the_assignment_is_the_best_of_all_permutations():
    x_0, eps, got = paired(couplings.ot(), 6, 3)
    cost = lambda e: float(((x_0 - e) ** 2).sum())
    best = min(cost(eps[jnp.array(p)]) for p in itertools.permutations(range(6)))
    assert cost(got) == pytest.approx(best, rel=1e-5) and best < 0.8 * cost(eps)
    assert is_permutation(got, eps)


def test_on_a_line_the_optimal_pairs_are_in_order_and_within_each_label():
    label = {"label": jnp.arange(60) % 3}
    for cond in (None, label):
        x_0, eps, got = paired(couplings.ot(), 60, 1, cond)
        groups = [jnp.arange(60)] if cond is None else [jnp.arange(i, 60, 3) for i in range(3)]
        for group in groups:
            order = jnp.argsort(x_0[group, 0])
            assert (jnp.diff(got[group][order, 0]) > 0).all()
            assert is_permutation(got[group], eps[group])
    assert not np.array_equal(got, paired(couplings.ot(), 60, 1)[2])


def test_unlike_conditions_leave_the_noise_where_it_is():
    """An image is unlike every other one: nothing is exchanged."""
    for limit in (512, 0):
        _, eps, got = paired(couplings.ot(exact=limit), 8, 3, {"image": draws(8, 5)[0]})
        np.testing.assert_array_equal(got, eps)


@pytest.mark.faults
def test_sinkhorn_is_nearly_as_good_as_the_assignment_and_keeps_the_noise_normal():
    x_0, eps, best = paired(couplings.ot(), 256, 2)
    cost = lambda e: float(((x_0 - e) ** 2).sum(1).mean())
    drawn = couplings.ot(exact=0)(KEY, x_0, eps, None)
    assert cost(best) < cost(drawn) < cost(best) + 0.05 * cost(eps)
    # Every noise is expected to be given once: over many draws each comes about as often.
    many = jax.vmap(lambda k: couplings.ot(exact=0)(k, x_0, eps, None))(jax.random.split(KEY, 16))
    mean, spread = many.mean((0, 1)), many.std((0, 1))
    np.testing.assert_allclose(mean, eps.mean(0), atol=0.02)
    np.testing.assert_allclose(spread, eps.std(0), atol=0.02)


def test_immiscible_noise_is_the_nearest_of_k():
    """Far from the noise that is the largest of k numbers; of two its mean is 1 / sqrt(pi)."""
    x_0, eps = jnp.full((4000, 1), 100.0), draws(4000, 1)[1]
    got = couplings.immiscible(2)(KEY, x_0, eps, None)
    assert float(got.mean()) == pytest.approx(np.pi**-0.5, abs=4 / 4000**0.5)
    assert (got >= eps).all() and (got > eps).any()
    np.testing.assert_array_equal(couplings.immiscible(1)(KEY, x_0, eps, None), eps)


def of_order(i, n):
    """The mean of the i-th of n ordered normal numbers."""
    density = scipy.stats.beta(i, n + 1 - i).pdf
    return scipy.integrate.quad(lambda u: scipy.stats.norm.ppf(u) * density(u), 0, 1)[0]


@pytest.mark.parametrize("batch", [2, 8, 32])
def test_pairs_of_a_small_batch_miss_the_optimal_map_by_a_known_amount(batch):
    """Data N(m, s^2) has the optimal map m + s eps. In one dimension a batch pairs numbers in
    order, so that the correlation with the map is the mean of squared means of ordered numbers.
    """
    groups = 2048 // batch
    x_0, eps = draws(groups * batch, 1)
    cond = {"label": jnp.arange(groups * batch) // batch}
    got = couplings.ot(exact=2048)(KEY, 0.5 * x_0 + 3, eps, cond)
    expected = np.mean([of_order(i, batch) ** 2 for i in range(1, batch + 1)])
    assert float((x_0 * got).mean()) == pytest.approx(expected, abs=0.05)


def coupled_denoiser(schedule, std, correlation):
    """E[x_0 | x_t] and E[eps | x_t] of jointly normal pairs: linear regression on x_t."""

    def denoise(x_t, t, cond=None):
        alpha, sigma = diffjax.scales_at(schedule, t, x_t)
        both = correlation * std
        variance = alpha**2 * std**2 + sigma**2 + 2 * alpha * sigma * both
        x_0 = (alpha * std**2 + sigma * both) / variance * x_t
        return diffjax.Prediction(x_0, (alpha * both + sigma) / variance * x_t)

    return denoise


@pytest.mark.parametrize("correlation", [0.0, 0.6, 1.0])
def test_the_flow_of_coupled_pairs_gives_the_data_and_ancestral_sampling_does_not(correlation):
    schedule, std = diffjax.rectified_flow(), 0.5
    denoise = coupled_denoiser(schedule, std, correlation)
    x_1 = diffjax.prior_sample(KEY, schedule, (10_000, 1))
    spread = lambda make: float(
        diffjax.sample(KEY, make(denoise, schedule), x_1, diffjax.uniform_times(100))[0].std()
    )
    assert spread(diffjax.heun) == pytest.approx(std, rel=0.03)
    off = abs(spread(diffjax.ancestral) / std - 1)
    assert off < 0.04 if correlation == 0 else off > 0.1


def test_the_loss_of_coupled_pairs_is_least_for_their_conditional_means():
    """The exact regression on pairs x_0 = 0.5 eps beats the one on independent pairs."""
    schedule, x_0 = diffjax.rectified_flow(), 0.5 * draws(400, 1)[0]

    def loss(correlation, coupling):
        denoise = coupled_denoiser(schedule, 0.5, correlation)
        network = lambda x_t, log_snr, cond: denoise(x_t, jax.nn.sigmoid(-log_snr / 2)).eps
        return float(
            diffjax.diffusion_loss(KEY, network, schedule, "eps", x_0, coupling=coupling).mean()
        )

    in_order = couplings.ot(exact=400)
    assert loss(1.0, in_order) < 0.03 < 0.3 * loss(0.0, in_order)
    assert loss(0.0, couplings.independent()) < loss(1.0, couplings.independent())


@pytest.mark.parametrize("exact", [512, 0])
def test_pairs_are_equal_on_every_layout(exact):
    x_0, eps = draws(16, 3)
    cond = {"label": jnp.arange(16) % 2}
    keys = jax.random.split(KEY, 16)
    alone = couplings.ot(exact=exact)(keys, x_0, eps, cond)

    split = lambda x: x.reshape(8, 2, *x.shape[1:])
    per_device = couplings.ot(axis_name="batch", exact=exact)
    mapped = jax.pmap(per_device, axis_name="batch")
    got = mapped(*jax.tree.map(split, (keys, x_0, eps, cond)))
    np.testing.assert_array_equal(got.reshape(16, 3), alone)

    over = NamedSharding(Mesh(np.array(jax.devices()), ("batch",)), PartitionSpec("batch"))
    placed = jax.device_put((keys, x_0, eps, cond), over)
    np.testing.assert_array_equal(jax.jit(couplings.ot(exact=exact))(*placed), alone)
    assert not np.array_equal(alone, eps)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (functools.partial(couplings.ot, epsilon=0.0), "need exact >= 0, epsilon > 0"),
        (functools.partial(couplings.ot, iterations=0), "iterations=0"),
        (functools.partial(couplings.ot, iterations=1.5), "iterations=1.5"),
        (functools.partial(couplings.immiscible, k=0), "k=0: must be a whole number, at least 1"),
    ],
)
def test_impossible_options_are_refused(make, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as users run it
    with pytest.raises(ValueError, match=message):
        make()
