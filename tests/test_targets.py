import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax
from catalogue import SCHEDULES, TARGETS

every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
every_target = pytest.mark.parametrize("target", TARGETS)


def draw(key, n=64):
    key_x, key_eps = jax.random.split(key)
    return jax.random.normal(key_x, (n, 3)), jax.random.normal(key_eps, (n, 3))


@every_schedule
@every_target
def test_decode_inverts_encode_in_float64(x64, schedule, target):
    x_0, eps = draw(jax.random.key(0))
    t = jnp.linspace(0, 1, 64)
    alpha, sigma = diffjax.scales_at(schedule, t, x_0)
    out = diffjax.encode(target, x_0, eps, alpha, sigma)
    got = diffjax.decode(target, out, alpha * x_0 + sigma * eps, alpha, sigma)
    np.testing.assert_allclose(got.x_0, x_0, atol=1e-9)
    np.testing.assert_allclose(got.eps, eps, atol=1e-9)


@every_schedule
@every_target
def test_decode_inverts_encode_in_float32_where_it_is_well_conditioned(schedule, target):
    """Within log-SNR [-10, 10] rounding is amplified by at most exp(5) = 148."""
    x_0, eps = draw(jax.random.key(0), 512)
    t = jnp.linspace(0, 1, 512)
    inside = np.abs(schedule.log_snr(t)) <= 10
    alpha, sigma = diffjax.scales_at(schedule, t, x_0)
    out = diffjax.encode(target, x_0, eps, alpha, sigma)
    got = diffjax.decode(target, out, alpha * x_0 + sigma * eps, alpha, sigma)
    np.testing.assert_allclose(got.x_0[inside], x_0[inside], atol=3e-4)
    np.testing.assert_allclose(got.eps[inside], eps[inside], atol=3e-4)


@every_target
@pytest.mark.parametrize("to", TARGETS)
def test_every_conversion_is_the_other_targets_value(x64, target, to):
    x_0, eps = draw(jax.random.key(1), 5)
    alpha, sigma = diffjax.scales_at(diffjax.linear(), 0.4, x_0)
    out = diffjax.encode(target, x_0, eps, alpha, sigma)
    got = diffjax.convert(out, alpha * x_0 + sigma * eps, alpha, sigma, target, to)
    np.testing.assert_allclose(got, diffjax.encode(to, x_0, eps, alpha, sigma), atol=1e-11)


def test_score_is_the_gradient_of_the_log_density(x64):
    x_0, eps = draw(jax.random.key(2), 1)
    alpha, sigma = diffjax.cosine()(0.3)
    log_q = lambda x: -jnp.sum((x - alpha * x_0) ** 2) / (2 * sigma**2)
    gradient = jax.grad(log_q)(alpha * x_0 + sigma * eps)
    np.testing.assert_allclose(diffjax.encode("score", x_0, eps, alpha, sigma), gradient)


def test_flow_is_the_velocity_of_the_straight_line(x64):
    x_0, eps = draw(jax.random.key(3), 1)
    velocity = jax.jvp(lambda t: (1 - t) * x_0 + t * eps, (0.3,), (1.0,))[1]
    np.testing.assert_allclose(diffjax.encode("flow", x_0, eps, 0.7, 0.3), velocity)


def test_v_is_the_velocity_along_the_circle(x64):
    """Salimans & Ho 2022, appendix D: v = d x_phi / d phi with alpha = cos phi, sigma = sin phi."""
    x_0, eps = draw(jax.random.key(4), 1)
    velocity = jax.jvp(lambda p: jnp.cos(p) * x_0 + jnp.sin(p) * eps, (0.8,), (1.0,))[1]
    got = diffjax.encode("v", x_0, eps, jnp.cos(0.8), jnp.sin(0.8))
    np.testing.assert_allclose(got, velocity)


@pytest.mark.parametrize("sigma_data", [0.5, 1.3])
def test_f_is_edms_preconditioned_target(x64, sigma_data):
    """Karras et al. 2022, table 1: D(x) = c_skip x + c_out F, with alpha = 1."""
    x_0, eps = draw(jax.random.key(5), 4)
    sigma = 0.7
    c_skip = sigma_data**2 / (sigma**2 + sigma_data**2)
    c_out = sigma * sigma_data / np.sqrt(sigma**2 + sigma_data**2)
    f = (x_0 - c_skip * (x_0 + sigma * eps)) / c_out
    row = functools.partial(diffjax.TARGETS["F"], sigma_data=sigma_data)
    np.testing.assert_allclose(diffjax.encode(row, x_0, eps, 1.0, sigma), f, rtol=1e-12)


def test_a_target_of_the_users_own_is_a_row_function(x64):
    x_0, eps = draw(jax.random.key(6), 4)
    own = lambda alpha, sigma: (alpha / 2, 3.0 * sigma)
    out = diffjax.encode(own, x_0, eps, 0.6, 0.8)
    got = diffjax.decode(own, out, 0.6 * x_0 + 0.8 * eps, 0.6, 0.8)
    np.testing.assert_allclose(got.x_0, x_0, atol=1e-12)
    eps_again = diffjax.convert(out, 0.6 * x_0 + 0.8 * eps, 0.6, 0.8, own, "eps")
    np.testing.assert_allclose(eps_again, eps, atol=1e-12)


@pytest.mark.parametrize(
    "use",
    [
        lambda: diffjax.encode("epsilon", jnp.ones((1, 1)), jnp.ones((1, 1)), 0.6, 0.8),
        lambda: diffjax.denoiser(lambda *_: None, diffjax.cosine(), "epsilon"),
    ],
)
def test_an_unknown_target_is_named_with_the_choices(use):
    with pytest.raises(ValueError, match="unknown target 'epsilon': one of x_0, eps, score, v"):
        use()
