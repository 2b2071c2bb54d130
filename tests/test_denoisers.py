import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax
from catalogue import SCHEDULES, TARGETS
from diffjax import denoisers, oracles, targets


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


@pytest.mark.parametrize("weight", [0.0, 3.0, jnp.array([0.0, 1.0, 3.0, 4.0])])
def test_guidance_of_the_leading_channels_leaves_the_others_conditional(weight):
    denoise = diffjax.denoiser(labelled, diffjax.cosine(), "v")
    null, n = {"label": jnp.int32(9)}, X.shape[-1] - 1
    given = denoise(X, 0.4, COND)
    every = diffjax.classifier_free(denoise, weight, null)(X, 0.4, COND)
    guided = diffjax.classifier_free(denoise, weight, null, channels=n)(X, 0.4, COND)
    for got, full, plain in zip(guided, every, given, strict=True):
        np.testing.assert_allclose(got[..., :n], full[..., :n], rtol=1e-6)
        np.testing.assert_allclose(got[..., n:], plain[..., n:], rtol=1e-6)
        assert jnp.abs(full[..., n:] - plain[..., n:]).max() > 0.1
    too_many = diffjax.classifier_free(denoise, 2.0, null, channels=n + 2)
    with pytest.raises(ValueError, match=f"channels={n + 2}: x_t has {n + 1}"):
        too_many(X, 0.4, COND)
    for bad in (0, -1):
        with pytest.raises(ValueError, match=f"channels={bad}: must be a whole number"):
            diffjax.classifier_free(denoise, 2.0, null, channels=bad)


NULL = {"label": jnp.int32(9)}


def guided_by(make, **options):
    """The predictions with a condition, without, and guided."""
    denoise = diffjax.denoiser(labelled, diffjax.cosine(), "v")
    without = denoise(X, 0.4, {"label": jnp.full(4, 9)})
    guided = make(denoise, denoise.schedule, null=NULL, **options)(X, 0.4, COND)
    return denoise(X, 0.4, COND), without, guided


def test_projected_guidance_without_projection_is_classifier_free():
    given, without, guided = guided_by(diffjax.apg, weight=3.0, eta=1.0)
    for a, b, c in zip(given, without, guided, strict=True):
        np.testing.assert_allclose(c, b + 3 * (a - b), rtol=1e-4, atol=1e-4)


def test_projected_guidance_moves_at_right_angles_and_no_further_than_its_radius():
    given, without, guided = guided_by(diffjax.apg, weight=4.0)
    moved = guided.x_0 - given.x_0
    size = jnp.linalg.norm(moved, axis=1) * jnp.linalg.norm(given.x_0, axis=1)
    assert (jnp.abs((moved * given.x_0).sum(1)) < 1e-5 * size).all() and (size > 0.01).all()
    full = jnp.linalg.norm(3 * (given.x_0 - without.x_0), axis=1)
    assert (jnp.linalg.norm(moved, axis=1) < full).all()

    radius = float(full.min()) / 30
    given, _, guided = guided_by(diffjax.apg, weight=4.0, eta=1.0, radius=radius)
    moved = jnp.linalg.norm(guided.x_0 - given.x_0, axis=1)
    np.testing.assert_allclose(moved, 3 * radius, rtol=1e-4)
    with pytest.raises(ValueError, match="radius=0: must be positive"):
        guided_by(diffjax.apg, weight=4.0, radius=0)


def test_the_rescaled_unconditional_velocity_is_the_nearest_to_the_conditional_one():
    """What guidance then adds is at right angles to the unconditional velocity."""
    given, without, guided = guided_by(diffjax.cfg_zero, weight=3.0)
    v_c, v_u, v = (p.eps - p.x_0 for p in (given, without, guided))
    added = (v - v_c) / 2
    size = jnp.linalg.norm(added, axis=1) * jnp.linalg.norm(v_u, axis=1)
    assert (jnp.abs((added * v_u).sum(1)) < 1e-4 * size).all() and (size > 0.01).all()
    at_1 = guided_by(diffjax.cfg_zero, weight=1.0)
    for a, b in zip(at_1[0], at_1[2], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_where_the_velocity_is_zero_a_rectified_flow_stands_still():
    schedule = diffjax.rectified_flow()
    denoise = diffjax.denoiser(labelled, schedule, "v")
    guided = diffjax.cfg_zero(denoise, schedule, 2.0, NULL, zero_below=-2.0)
    ts = jnp.array([1.0, 0.95, 0.9, 0.8])  # log-SNR -2 is at t = 0.73
    bound = functools.partial(guided, cond=COND)
    still, _ = diffjax.sample(jax.random.key(0), diffjax.ddim(bound, schedule), X, ts)
    np.testing.assert_allclose(still, X, rtol=1e-5)
    moving, _ = diffjax.sample(jax.random.key(0), diffjax.ddim(bound, schedule), X, ts - 0.4)
    assert (jnp.abs(moving - X).max(axis=1) > 1e-3).all()


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


@pytest.mark.parametrize("betas", [diffjax.linear_betas(1000), diffjax.cosine_betas(4000)])
def test_time_input_shows_the_network_the_step_it_was_trained_at(betas):
    """On the grid i/T a whole number, i - 1, to the precision that log-SNR has there."""
    schedule, steps = diffjax.from_betas(betas), len(betas)
    seen = diffjax.time_input(lambda x_t, time, cond: time, schedule, steps)
    i = np.arange(1, steps + 1)
    time = seen(jnp.zeros((steps, 1)), schedule.log_snr(i / np.float32(steps)), None)
    np.testing.assert_allclose(time, i - 1, atol=1e-6 * steps)


@pytest.mark.parametrize("sigma_data", [0.5, 1.3])
def test_row_f_with_scaled_input_is_edms_preconditioning(x64, sigma_data):
    """Karras et al. 2022, equation 7 and table 1: D = c_skip x + c_out F(c_in x)."""
    schedule = diffjax.log_uniform()
    network = lambda x, log_snr, cond: jnp.sin(x) + log_snr[:, None] / 8
    f_row = functools.partial(targets.edm, sigma_data=sigma_data)
    scaled = diffjax.unit_input(network, schedule, sigma_data)
    x = 3 * X.astype(jnp.float64)
    for t in (0.0, 0.5, 1.0):
        sigma = schedule(t)[1]
        total = sigma**2 + sigma_data**2
        c_skip, c_out, c_in = sigma_data**2 / total, sigma * sigma_data / total**0.5, total**-0.5
        c_noise = jnp.log(sigma) / 4  # of which log-SNR is -8 times
        f = network(c_in * x, jnp.full(4, -8 * c_noise), None)
        got = diffjax.denoiser(scaled, schedule, f_row)(x, t).x_0
        np.testing.assert_allclose(got, c_skip * x + c_out * f, rtol=1e-9, atol=1e-10)


MEANS, COVS = np.array([[-1.0, 0.5], [0.8, -0.3]]), np.array([0.1, 0.4])
X2 = np.random.default_rng(3).normal(size=(5, 2))


def two_classes(schedule):
    """Oracles of a mixture, of each of its two classes, and log p(first | x_t)."""
    both = oracles.gaussian_mixture(schedule, [0.3, 0.7], MEANS, COVS)
    each = [oracles.gaussian(schedule, m, c) for m, c in zip(MEANS, COVS, strict=True)]

    def log_prob(x_t, t, cond):
        return jnp.log(0.3) + each[0].log_density(x_t, t) - both.log_density(x_t, t)

    return both, each, log_prob


@pytest.mark.faults
@pytest.mark.parametrize("name", ["cosine", "log_uniform", "rectified_flow"])
def test_the_exact_classifier_makes_the_mixture_its_class(x64, name):
    schedule = SCHEDULES[name]
    both, each, log_prob = two_classes(schedule)
    guided = diffjax.classifier_guidance(both, schedule, log_prob, 1.0)
    for t in (0.1, 0.5, 0.9):
        x_t = X2 * jnp.hypot(*schedule(t))
        for got, expected in zip(guided(x_t, t), each[0](x_t, t), strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.faults
def test_classifier_free_guidance_is_guidance_by_the_implicit_classifier(x64):
    """Ho & Salimans 2022, section 3.2; and autoguidance is the same mix of two denoisers."""
    schedule, t, weight = diffjax.cosine(), 0.4, jnp.array([0.0, 1.0, 2.0, 3.5, -1.0])
    both, each, log_prob = two_classes(schedule)
    explicit = diffjax.classifier_guidance(both, schedule, log_prob, weight)(X2, t)

    def either(x_t, t, cond):  # cond 1: the class, 0: none
        pick = lambda a, b: jnp.where(cond[:, None] > 0, a, b)
        return diffjax.Prediction(*map(pick, each[0](x_t, t), both(x_t, t)))

    free = diffjax.classifier_free(either, weight, jnp.zeros(()))(X2, t, jnp.ones(5))
    auto = diffjax.autoguidance(each[0], both, weight)(X2, t)
    for a, b, c in zip(explicit, free, auto, strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-7, atol=1e-9)
        np.testing.assert_allclose(c, a, rtol=1e-7, atol=1e-9)


@pytest.mark.faults
def test_guidance_in_an_interval_of_log_snr():
    schedule = diffjax.cosine()
    both, each, _ = two_classes(schedule)
    low, high = -2.0, 3.0
    some = diffjax.within(each[0], both, schedule, low, high)
    ts = diffjax.time_at(schedule, jnp.array([-6.0, -1.9, 0.0, 2.9, 6.0]))
    chosen = [both, each[0], each[0], each[0], both]
    for t, expected in zip(ts, chosen, strict=True):
        np.testing.assert_allclose(some(X2, t).x_0, expected(X2, t).x_0, rtol=1e-6)
    mixed = some(X2, ts).eps
    for i, expected in enumerate(chosen):
        np.testing.assert_allclose(mixed[i], expected(X2, ts).eps[i], rtol=1e-6)
    # One time for the batch: only the branch that is needed runs.
    bad = lambda x_t, t, cond=None: jax.tree.map(lambda a: a * jnp.nan, both(x_t, t))
    with jax.debug_nans(False):
        assert jnp.isfinite(
            jax.jit(diffjax.within(bad, both, schedule, low, high))(X2, 0.9).x_0
        ).all()
    with pytest.raises(ValueError, match=r"low=2\.0 must be below high=1\.0"):
        diffjax.within(both, both, schedule, 2.0, 1.0)


def test_rescaled_guidance_has_the_spread_of_the_unguided():
    schedule, t = diffjax.cosine(), 0.6
    plain = diffjax.denoiser(labelled, schedule, "v")
    strong = diffjax.classifier_free(plain, 6.0, {"label": jnp.int32(9)})
    spread = lambda d: jnp.std(d(X, t, COND).x_0, axis=1)
    at = lambda amount: diffjax.rescale(strong, plain, schedule, amount)
    np.testing.assert_allclose(spread(at(1.0)), spread(plain), rtol=1e-5)
    np.testing.assert_allclose(spread(at(0.0)), spread(strong), rtol=1e-5)
    half = (spread(plain) + spread(strong)) / 2
    np.testing.assert_allclose(spread(at(0.5)), half, rtol=1e-5)
    direction = lambda d: d(X, t, COND).x_0 / spread(d)[:, None]
    np.testing.assert_allclose(direction(at(0.7)), direction(strong), rtol=1e-4)


def test_dynamic_threshold_brings_each_example_into_range_and_leaves_those_inside():
    schedule, t = diffjax.cosine(), 0.5
    x_0 = jnp.stack([jnp.linspace(-0.9, 0.9, 101), jnp.linspace(-4.0, 2.0, 101)])
    denoise = diffjax.denoiser(lambda x, l, c: x_0, schedule, "x_0")
    got = diffjax.dynamic_threshold(denoise, schedule, 0.9)(jnp.zeros((2, 101)), t)
    np.testing.assert_allclose(got.x_0[0], x_0[0], atol=1e-6)
    s = np.quantile(np.abs(x_0[1]), 0.9)
    np.testing.assert_allclose(got.x_0[1], np.clip(x_0[1], -s, s) / s, atol=1e-5)
    np.testing.assert_allclose(jnp.abs(got.x_0).max(), 1, rtol=1e-6)
    scaled = diffjax.dynamic_threshold(denoise, schedule, 1)(jnp.zeros((2, 101)), t).x_0
    np.testing.assert_allclose(scaled[1], x_0[1] / 4, atol=1e-6)
    for arguments, message in (((95.0,), r"quantile=95\.0"), ((0.5, 0.0), r"limit=0\.0")):
        with pytest.raises(ValueError, match=message):
            diffjax.dynamic_threshold(denoise, schedule, *arguments)


def test_a_learned_variance_is_half_of_the_output_and_outlives_guidance():
    schedule, t = diffjax.cosine(), 0.4
    network = lambda x_t, log_snr, cond: jnp.concatenate([jnp.tanh(x_t), 0.6 * x_t], -1)
    denoise = diffjax.denoiser(network, schedule, "v", learned_variance=True)
    plain = diffjax.denoiser(lambda x, l, c: jnp.tanh(x), schedule, "v")
    got = denoise(X, t)
    np.testing.assert_allclose(got.fraction, (0.6 * X + 1) / 2, rtol=1e-6)
    np.testing.assert_allclose(got.x_0, plain(X, t).x_0, rtol=1e-6)
    for changed in (
        diffjax.clip_x_0(denoise, schedule),
        diffjax.autoguidance(denoise, plain, 2.0),
        diffjax.rescale(denoise, plain, schedule),
        diffjax.classifier_guidance(denoise, schedule, lambda x, t, c: -(x**2).sum(-1)),
    ):
        np.testing.assert_allclose(changed(X, t).fraction, got.fraction)
    # Samplers that have no use for it take such a denoiser too.
    for make in (diffjax.ddim, diffjax.heun, diffjax.unipc):
        x_0, _ = diffjax.sample(
            jax.random.key(0), make(denoise, schedule), X, diffjax.uniform_times(3)
        )
        assert jnp.isfinite(x_0).all()


@pytest.mark.parametrize(("learned", "channels"), [(True, 3), (False, 6)])
def test_an_output_of_the_wrong_width_is_refused(learned, channels):
    network = lambda x_t, log_snr, cond: jnp.zeros((4, channels))
    denoise = diffjax.denoiser(network, diffjax.cosine(), "v", learned_variance=learned)
    with pytest.raises(
        ValueError, match=rf"\(4, {channels}\) for data \(4, 3\): need \(4, {9 - channels}\)"
    ):
        denoise(X, 0.5)


def test_denoisers_compose():
    schedule = diffjax.cosine()
    denoise = diffjax.denoiser(labelled, schedule, "v")
    guided = diffjax.classifier_free(denoise, 2.0, {"label": jnp.int32(9)})
    bound = functools.partial(diffjax.clip_x_0(guided, schedule), cond=COND)
    assert jnp.abs(bound(X, 0.9).x_0).max() <= 1
    all_of_it = diffjax.within(
        diffjax.dynamic_threshold(diffjax.rescale(guided, denoise, schedule), schedule),
        denoise,
        schedule,
        -5.0,
        5.0,
    )
    walk = diffjax.ancestral(functools.partial(all_of_it, cond=COND), schedule)
    x_0, _ = diffjax.sample(jax.random.key(0), walk, X, diffjax.uniform_times(4))
    assert jnp.isfinite(x_0).all()


def test_both_halves_of_guidance_are_one_call_and_nothing_is_traced_again():
    """Of the network, whatever the weights, labels, guidance weight and key."""
    seen, schedule = [], diffjax.cosine()

    @jax.jit
    def draw(key, params, label, weight):
        def network(x_t, log_snr, cond):
            seen.append(x_t.shape)
            return labelled(params * x_t, log_snr, cond)

        denoise = diffjax.denoiser(network, schedule, "v")
        guided = diffjax.classifier_free(denoise, weight, {"label": jnp.int32(9)})
        walk = diffjax.ddim(functools.partial(guided, cond={"label": label}), schedule)
        x_1 = diffjax.prior_sample(key, schedule, X.shape)
        return diffjax.sample(key, walk, x_1, diffjax.uniform_times(5))[0]

    for i in range(3):
        draw(jax.random.key(i), 1.0 + i, jnp.arange(4) + i, 2.0 + i)
    assert set(seen) == {(8, 3)} and draw._cache_size() == 1
    compiled = len(seen)
    draw(jax.random.key(9), 0.5, jnp.zeros(4, jnp.int32), 1.5)
    assert len(seen) == compiled


def echo():
    """A denoiser whose x_0 is the label of its condition."""
    network = lambda x_t, log_snr, cond: 0 * x_t + cond["label"][:, None]
    return diffjax.denoiser(network, diffjax.cosine(), "x_0")


def test_binding_the_condition_composes_in_any_order():
    denoise = echo()
    schedule = denoise.schedule
    cond, x_t = {"label": jnp.array([0.25, 0.5])}, jnp.ones((2, 3))
    bind = lambda denoise: functools.partial(denoise, cond=cond)
    mask = diffjax.inverse.inpainting(jnp.array([1.0, 0.0, 0.0]))
    wraps = {
        "clip": lambda d: diffjax.clip_x_0(d, schedule),
        "pigdm": lambda d: diffjax.inverse.pigdm(d, schedule, mask, mask(x_t)),
        "cfg": lambda d: diffjax.classifier_free(d, 1.5, {"label": jnp.float32(0.125)}),
        "apg": lambda d: diffjax.apg(d, schedule, 1.5, {"label": jnp.float32(0.125)}),
        "cfg zero": lambda d: diffjax.cfg_zero(d, schedule, 1.5, {"label": jnp.float32(0.125)}),
        "auto": lambda d: diffjax.autoguidance(d, d, 1.5),
        "classifier": lambda d: diffjax.classifier_guidance(
            d, schedule, lambda x, t, c: c["label"] * x.sum(-1)
        ),
        "threshold": lambda d: diffjax.dynamic_threshold(d, schedule),
        "rescale": lambda d: diffjax.rescale(d, d, schedule),
        "within": lambda d: diffjax.within(d, d, schedule, -1.0, 1.0),
    }
    for name, wrap in wraps.items():
        before, after = wrap(bind(denoise)), bind(wrap(denoise))
        for a, b in zip(before(x_t, 0.5), after(x_t, 0.5), strict=True):
            np.testing.assert_array_equal(a, b, err_msg=name)
        # Every wrapper hands the schedule on, through any number of bindings.
        assert denoisers.schedule_of(before) is denoise.schedule, name
        assert denoisers.schedule_of(jax.jit(after)) is denoise.schedule, name


def walked(make, guidance, denoise, ts, cond=COND, **options):
    """The estimates of x_0 that each step used, and the sample."""
    bound = lambda guided, schedule: make(functools.partial(guided, cond=cond), schedule)
    walk = guidance(bound, denoise, denoise.schedule, null=NULL, **options)
    seen = lambda state, t: state.x_0
    x, estimates = diffjax.sample(jax.random.key(0), walk, X.astype(ts.dtype), ts, seen)
    return estimates, x


@pytest.mark.parametrize("weight", [0.0, 0.6, jnp.array([0.0, 0.3, 0.6, 1.0])])
def test_cfg_plus_plus_adds_the_unconditional_noise_to_the_guided_x_0(x64, weight):
    """Algorithm 2 of the paper: with DDIM, for any schedule and step."""
    denoise = diffjax.denoiser(labelled, diffjax.cosine(), "v")
    for t, s in ((0.9, 0.7), (0.5, 0.49), (0.1, 0.0)):
        ts = jnp.array([t, s])
        _, got = walked(diffjax.ddim, diffjax.cfg_plus_plus, denoise, ts, weight=weight)
        given, without = denoise(X, t, COND), denoise(X, t, {"label": jnp.full(4, 9)})
        x_0 = without.x_0 + jnp.reshape(weight, (-1, 1)) * (given.x_0 - without.x_0)
        alpha, sigma = denoise.schedule(s)
        np.testing.assert_allclose(got, alpha * x_0 + sigma * without.eps, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["ancestral", "heun", "unipc"])
def test_guidances_of_a_step_take_every_kind_of_sampler(name):
    """Of weight 0 cfg_plus_plus is unconditional; without momentum apg_momentum is apg."""
    denoise, ts = diffjax.denoiser(labelled, diffjax.cosine(-5, 5), "v"), jnp.linspace(1, 0, 4)
    make, start = diffjax.SAMPLERS[name].make, jax.random.key(0)

    def plain(guided, cond):
        walk = make(functools.partial(guided, cond=cond), denoise.schedule)
        return diffjax.sample(start, walk, X, ts)[0]

    none = {"label": jnp.full(4, 9)}
    _, x = walked(make, diffjax.cfg_plus_plus, denoise, ts, weight=0.0)
    np.testing.assert_allclose(x, plain(denoise, none), rtol=1e-4, atol=1e-4)
    options = dict(weight=3.0, eta=0.5)
    _, x = walked(make, diffjax.apg_momentum, denoise, ts, momentum=0.0, **options)
    same = diffjax.apg(denoise, denoise.schedule, null=NULL, **options)
    np.testing.assert_allclose(x, plain(same, COND), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "evaluations"), [("ddim", 1), ("unipc", 1), ("heun", 2)])
def test_momentum_is_a_geometric_sum_over_the_evaluations(name, evaluations):
    """Where the two estimates never change, the difference is multiplied by 1 + m + m^2 + ..."""
    denoise, m, weight = echo(), -0.5, 3.0
    estimates, _ = walked(
        diffjax.SAMPLERS[name].make,
        diffjax.apg_momentum,
        denoise,
        jnp.linspace(1, 0, 5),
        weight=weight,
        momentum=m,
        eta=1.0,
    )
    label = np.asarray(COND["label"], float)[None]
    n = 1 + evaluations * np.arange(4)[:, None]
    expected = label + (weight - 1) * (label - 9) * (1 - m**n) / (1 - m)
    np.testing.assert_allclose(estimates[..., 0], expected, rtol=1e-4)
    with pytest.raises(ValueError, match=r"momentum=1.0: must be in \(-1, 1\)"):
        walked(diffjax.ddim, diffjax.apg_momentum, denoise, jnp.ones(2), weight=2.0, momentum=1.0)


def test_autoguidance_by_a_network_of_another_schedule_is_refused():
    zero = lambda x_t, log_snr, cond: 0 * x_t
    one, other = (diffjax.denoiser(zero, s, "v") for s in (diffjax.cosine(), diffjax.linear()))
    with pytest.raises(ValueError, match="another schedule than the one given"):
        diffjax.autoguidance(one, other, 2.0)


def test_a_bound_condition_does_not_hide_in_the_unconditional_half():
    network = lambda x_t, log_snr, cond: 0 * x_t + (1.0 if cond is not None else 0.0)
    denoise = diffjax.denoiser(network, diffjax.cosine(), "x_0")
    bound = functools.partial(denoise, cond={"label": jnp.zeros(2)})
    guided = diffjax.classifier_free(bound, 3.0, None)
    np.testing.assert_allclose(guided(jnp.ones((2, 3)), 0.5).x_0, 3.0)


def test_fourier_features_have_periods_of_whole_pixels():
    """With 256 levels, that of exponent n is 256 / 2^n levels; x_t comes first."""
    pixels = jnp.arange(256.0)[:, None] / 127.5 - 1
    seen = lambda x_t, *n: diffjax.fourier_features(lambda x, log_snr, cond: x, n)(x_t, None, None)
    features = seen(pixels, 6, 7)
    assert features.shape == (256, 5)
    np.testing.assert_array_equal(features[:, :1], pixels)
    for n, period in ((6, 4), (7, 2), (8, 1)):
        waves = seen(pixels, n)[:, 1:]
        np.testing.assert_allclose(waves[period:], waves[:-period], atol=2e-4)
        np.testing.assert_allclose((waves**2).sum(1), 1, atol=1e-5)
        between = seen(pixels + period / 255, n)[:, 1:]  # half a period on
        np.testing.assert_allclose(between, -waves, atol=2e-4)
