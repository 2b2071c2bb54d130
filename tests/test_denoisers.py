import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax
from catalogue import SCHEDULES, TARGETS


def labelled(x_t, log_snr, cond):
    """A network that says something else for every label; 9 means none."""
    return jnp.tanh(x_t) * (1.0 + cond["label"][:, None]) + 0.01 * log_snr[:, None]


X = jax.random.normal(jax.random.key(0), (4, 3))
COND = {"label": jnp.array([0, 1, 2, 3])}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("target", TARGETS)
def test_a_prediction_explains_x_t_and_does_not_know_the_target(x64, schedule, target):
    x_t = X.astype(jnp.float64)

    def network(x_t, log_snr, cond):
        alpha, sigma = (s[:, None] for s in schedule.scales(log_snr))
        return diffjax.convert(jnp.tanh(x_t), x_t, alpha, sigma, "x_0", target)

    for t in (0.0, 0.5, 1.0):
        got = diffjax.denoiser(network, schedule, target)(x_t, t)
        alpha, sigma = schedule(t)
        np.testing.assert_allclose(alpha * got.x_0 + sigma * got.eps, x_t, rtol=1e-7, atol=1e-9)
        np.testing.assert_allclose(got.x_0, jnp.tanh(x_t), rtol=1e-6, atol=1e-7)


def test_the_network_sees_log_snr_per_example():
    seen = []
    network = lambda x_t, log_snr, cond: seen.append(log_snr) or x_t
    denoise = diffjax.denoiser(network, diffjax.cosine(), "eps")
    denoise(X, 0.5)
    denoise(X, jnp.array([0.1, 0.2, 0.3, 0.4]))
    assert [s.shape for s in seen] == [(4,), (4,)]
    np.testing.assert_allclose(seen[0], 0, atol=1e-6)


@pytest.mark.parametrize(("weight", "label"), [(1.0, None), (0.0, 9)])
def test_guidance_weight_one_is_conditional_and_zero_unconditional(weight, label):
    denoise = diffjax.denoiser(labelled, diffjax.cosine(), "v")
    guided = diffjax.classifier_free(denoise, weight, {"label": jnp.int32(9)})
    cond = COND if label is None else {"label": jnp.full(4, label)}
    for got, expected in zip(guided(X, 0.4, COND), denoise(X, 0.4, cond), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_guidance_is_linear_in_its_weight_and_takes_one_per_example():
    denoise = diffjax.denoiser(labelled, diffjax.cosine(), "v")
    null = {"label": jnp.int32(9)}
    at = lambda w: diffjax.classifier_free(denoise, w, null)(X, 0.4, COND).x_0
    np.testing.assert_allclose(at(3.0) - at(1.0), at(2.0) - at(0.0), rtol=1e-4, atol=1e-4)
    assert jnp.abs(at(3.0) - at(1.0)).max() > 0.1
    mixed = at(jnp.array([0.0, 1.0, 3.0, 1.0]))
    np.testing.assert_allclose(mixed[2], at(3.0)[2], rtol=1e-6)
    np.testing.assert_allclose(mixed[0], at(0.0)[0], rtol=1e-6)


def test_guidance_without_a_condition_is_refused():
    denoise = diffjax.denoiser(labelled, diffjax.cosine(), "v")
    guided = diffjax.classifier_free(denoise, 2.0, {"label": jnp.int32(9)})
    with pytest.raises(ValueError, match="a cond like its null"):
        guided(X, 0.4)


def test_guided_prediction_still_explains_x_t():
    schedule = diffjax.cosine()
    denoise = diffjax.denoiser(labelled, schedule, "v")
    got = diffjax.classifier_free(denoise, 4.0, {"label": jnp.int32(9)})(X, 0.4, COND)
    alpha, sigma = schedule(0.4)
    np.testing.assert_allclose(alpha * got.x_0 + sigma * got.eps, X, rtol=1e-4, atol=1e-5)


def test_clip_x_0_clips_and_lets_eps_follow():
    schedule = diffjax.cosine()
    denoise = diffjax.denoiser(lambda x, l, c: 3 * x, schedule, "x_0")
    got = diffjax.clip_x_0(denoise, schedule)(X, 0.6)
    alpha, sigma = schedule(0.6)
    np.testing.assert_allclose(got.x_0, np.clip(3 * X, -1, 1), rtol=1e-6)
    np.testing.assert_allclose(alpha * got.x_0 + sigma * got.eps, X, rtol=1e-5, atol=1e-6)
    inside = diffjax.denoiser(lambda x, l, c: 0.1 * x, schedule, "x_0")
    same = diffjax.clip_x_0(inside, schedule)(X, 0.6)
    np.testing.assert_allclose(same.eps, inside(X, 0.6).eps, rtol=1e-5)
    with pytest.raises(ValueError, match=r"low=1\.0 must be below high=-1\.0"):
        diffjax.clip_x_0(denoise, schedule, 1.0, -1.0)


@pytest.mark.parametrize("target", TARGETS)
def test_unit_output_gives_the_network_numbers_of_unit_variance(target):
    """Feed it the target of unit data divided by what unit_output multiplies: it is N(0, 1)."""
    schedule = diffjax.cosine()
    key_x, key_eps = jax.random.split(jax.random.key(0))
    x_0, eps = jax.random.normal(key_x, (20000, 1)), jax.random.normal(key_eps, (20000, 1))
    one = lambda x_t, log_snr, cond: jnp.ones_like(x_t)
    for t in (0.0, 0.3, 1.0):
        alpha, sigma = schedule(t)
        scale = diffjax.unit_output(one, target, schedule)(
            x_0, jnp.full(20000, schedule.log_snr(t)), None
        )
        out = diffjax.encode(target, x_0, eps, alpha, sigma) / scale
        np.testing.assert_allclose(jnp.std(out), 1, atol=0.03)


def test_denoisers_compose():
    schedule = diffjax.cosine()
    denoise = diffjax.denoiser(labelled, schedule, "v")
    guided = diffjax.classifier_free(denoise, 2.0, {"label": jnp.int32(9)})
    bound = functools.partial(diffjax.clip_x_0(guided, schedule), cond=COND)
    assert jnp.abs(bound(X, 0.9).x_0).max() <= 1
