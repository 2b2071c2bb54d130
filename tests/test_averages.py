"""Averages of parameters: their weights, and their synthesis from snapshots."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import averages
from diffjax.averages import Snapshot, gamma_of, solve, synthesise

WIDTHS = (0.05, 0.1)
TABLE = {0.05: 16.972199, 0.10: 6.937204, 0.15: 3.557869, 0.20: 1.826214, 0.25: 0.719824}
"""Relative widths and exponents gamma, from the paper's equation."""


def weights_of(n, gamma):
    """The weight of the parameters of each update in the average after n: powers of i telescope."""
    i = np.arange(n + 1, dtype=np.float64) / n
    return np.diff(i ** (gamma + 1))


@pytest.mark.parametrize(("std", "gamma"), TABLE.items())
def test_the_exponent_of_a_width(std, gamma):
    np.testing.assert_allclose(gamma_of(std), gamma, rtol=1e-6)
    np.testing.assert_allclose(averages.std_of(gamma), std, rtol=1e-6)
    s = (np.arange(10**5) + 0.5) / 10**5  # the width is that of the density (gamma + 1) s^gamma
    p = (gamma + 1) * s**gamma / 10**5
    np.testing.assert_allclose(np.sqrt(p @ s**2 - (p @ s) ** 2), std, rtol=1e-4)


@pytest.mark.parametrize("std", [0.0, -0.1, 0.29, float("nan"), float("inf")])
def test_a_width_that_no_profile_has_is_refused(std):
    with pytest.raises(ValueError, match="must be above 0, and at most"):
        gamma_of(std)


def tracked(stds, thetas, at):
    """Snapshots at some times of averages that follow parameters, a pytree of arrays `[n, ...]`."""
    gammas = [gamma_of(std) for std in stds]
    start = [jax.tree.map(lambda x: jnp.full(x.shape[1:], -7.0), thetas) for _ in stds]

    @jax.jit
    def follow(thetas):
        def step(state, inputs):
            t, theta = inputs
            new = [
                averages.next_average(a, theta, averages.update_weight(g, t))
                for a, g in zip(state, gammas, strict=True)
            ]
            return new, new

        n = len(jax.tree.leaves(thetas)[0])
        return jax.lax.scan(step, start, (jnp.arange(1, n + 1), thetas))[1]

    found = jax.device_get(follow(thetas))
    return [
        Snapshot(t, std, jax.tree.map(lambda x, t=t: x[t - 1], found[k]))
        for t in at
        for k, std in enumerate(stds)
    ]


@pytest.mark.parametrize("std", [0.05, 0.1, averages.WIDEST])
def test_the_average_weighs_each_update_by_its_share_of_the_profile(std):
    """Parameters that are a unit vector at each update show its weight; -7 at the start, none."""
    n = 200
    (last,) = tracked((std,), jnp.eye(n), [n])
    np.testing.assert_allclose(last.params, weights_of(n, gamma_of(std)), atol=2e-7)


def test_the_recursion_stays_accurate_in_float32_over_many_updates():
    n, gamma = 10**5, gamma_of(0.05)
    theta = (1 + 0.01 * np.sin(np.arange(n))).astype(np.float32)
    (last,) = tracked((0.05,), jnp.asarray(theta), [n])
    assert abs(last.params / (weights_of(n, gamma) @ theta.astype(np.float64)) - 1) < 3e-6


def test_the_inner_product_is_the_integral():
    s = (np.arange(2 * 10**5) + 0.5) / 10**5 * 100
    profile = lambda g, t: np.where(s < t, (g + 1) * (s / t) ** g / t, 0)
    for (ga, ta), (gb, tb) in itertools.product([(0.7, 60), (6.9, 100), (17, 150)], repeat=2):
        expected = (profile(ga, ta) * profile(gb, tb)).sum() * (s[1] - s[0])
        got = averages.inner_product(ga, ta, gb, tb)
        np.testing.assert_allclose(got, expected, rtol=1e-3)


@pytest.mark.parametrize("std", WIDTHS)
@pytest.mark.parametrize("time", [600, 1000])
def test_a_width_that_was_tracked_is_its_own_snapshot(std, time):
    """At an earlier time too; the snapshots after it have no part in it."""
    times = [t for t in range(100, 1001, 100) for _ in WIDTHS]
    stds = list(WIDTHS) * 10
    c, error = solve(times, stds, std, time)
    its_own = [t == time and s == std for t, s in zip(times, stds, strict=True)]
    np.testing.assert_allclose(c, its_own, atol=1e-10)
    assert error < 1e-6


@pytest.mark.parametrize(
    ("count", "std", "error"),
    [
        *[(8, 0.02, 0.25), (8, 0.03, 0.10), (8, 0.075, 1e-2), (8, 0.15, 3e-2), (8, 0.25, 0.18)],
        *[(16, 0.02, 0.12), (16, 0.075, 4e-3), (16, 0.15, 9e-3), (16, 0.20, 2e-2)],
        *[(64, 0.03, 3e-3), (64, 0.075, 2e-4), (64, 0.15, 6e-4), (64, 0.25, 2e-2)],
    ],
)
def test_the_error_of_a_profile_is_that_of_the_table(count, std, error):
    """The first digits that an independent implementation found for training of 100k updates."""
    n = 100_000
    times = [round(n * (k + 1) / count) for k in range(count) for _ in WIDTHS]
    c, found = solve(times, list(WIDTHS) * count, std)
    np.testing.assert_allclose(c.sum(), 1, rtol=1e-9)
    assert error / 1.5 < found < 1.5 * error
    # What the coefficients do to the updates themselves, without the formula of inner products.
    stored = np.stack(
        [np.pad(weights_of(t, gamma_of(s)), (0, n - t)) for t in times[::2] for s in WIDTHS]
    )
    wanted = weights_of(n, gamma_of(std))
    measured = np.linalg.norm(c @ stored - wanted) / np.linalg.norm(wanted)
    np.testing.assert_allclose(measured, found, rtol=1e-2, atol=1e-5)


def test_synthesis_finds_the_average_that_was_never_tracked():
    rng = np.random.default_rng(0)
    noise = jnp.asarray(np.cumsum(rng.standard_normal((1000, 3)), 0), jnp.float32)
    snapshots = tracked(WIDTHS, {"a": noise, "b": {"c": 2 * noise[:, 0] + 1}}, range(25, 1001, 25))
    got = synthesise(snapshots[::-1], 0.15)  # in any order
    (wanted,) = tracked((0.15,), {"a": noise, "b": {"c": 2 * noise[:, 0] + 1}}, [1000])
    scale = float(jnp.std(noise))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted.params), strict=True):
        assert a.dtype == np.float32
        np.testing.assert_allclose(a, b, atol=1e-3 * scale)
    assert np.abs(snapshots[-1].params["a"] - wanted.params["a"]).max() > 0.02 * scale


def test_constants_are_kept():
    """Also where the profile cannot be reached; what cannot be averaged is the newest."""
    at = lambda t: {"frequency": np.float32(123.456), "count": np.int32(t)}
    snapshots = [Snapshot(t, std, at(t)) for t in (200, 100) for std in WIDTHS]
    for std in (0.02, 0.15, 0.25):
        got = synthesise(snapshots, std)
        np.testing.assert_allclose(got["frequency"], 123.456, rtol=1e-7)
        assert got["count"] == 200 and got["count"].dtype == np.int32


def test_snapshots_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="need a snapshot up to this time"):
        solve([], [], 0.1)
    with pytest.raises(ValueError, match="need a snapshot up to this time"):
        solve([10], [0.1], 0.1, 5)
    with pytest.raises(ValueError, match="occurs twice"):
        solve([10, 10], [0.1, 0.1], 0.1)
