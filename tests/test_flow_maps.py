"""Flow maps: exact maps, the named methods' own formulas, and faults that the tests must see."""

import dataclasses
import functools
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax
from catalogue import SCHEDULES, TARGETS, each, slow
from diffjax import flow_maps, models, ode, oracles, weightings
from diffjax.experiment import FlowMap, resolve
from diffjax.flow_maps import IDENTITIES, flow_map, flow_map_loss
from diffjax.published import trained
from diffjax.schedules import Schedule, time_at

MEAN, COV = [1.0, -0.5], [[1.0, 0.3], [0.3, 0.2]]
T = np.array([0.9, 0.8, 0.7, 0.5, 0.3, 1.0])
S = np.array([0.1, 0.7, 0.2, 0.49, 0.0, 0.0])
R = S + (T - S) * np.array([0.5, 0.3, 0.2, 0.7, 0.1, 0.9])
SCALES = {"vp": diffjax.vp, "ve": diffjax.ve, "flow": diffjax.flow}
identities = pytest.mark.parametrize("identity", IDENTITIES)


def suited(identity, teacher):
    """The velocity with which an identity is tested: the map's own, unless it needs a teacher."""
    return {"velocity": teacher} if identity == "progressive" else {}


def even(scales=diffjax.vp):
    """The log-SNR falls linearly, from 10 to -10; its inverse is (10 - log_snr) / 20."""
    return Schedule(lambda t: 10 - 20 * jnp.asarray(t), scales)


def points(oracle, n=len(T)):
    """x_t of an oracle at the times `T`."""
    key_x, key_eps = jax.random.split(jax.random.key(1))
    eps = jax.random.normal(key_eps, (n, 2))
    return diffjax.q_sample(oracle.schedule, oracle.sample(key_x, n), T[:n], eps)


def residual(oracle, identity, u=None, t=T, s=S, r=R):
    """R of a map, by default the oracle's own, with the oracle's velocity."""
    schedule, x_t = oracle.schedule, points(oracle)
    y = x_t / ode.radius(schedule, t, x_t)
    exact = flow_maps.velocity_of(oracle, schedule)
    t, s, r = map(jnp.asarray, (t, s, r))
    by_map = identity == "semigroup" and u is not None
    v = u if by_map else exact
    return IDENTITIES[identity](schedule, u or exact, v, y, t, s, r)[1]


def written_as(target, schedule, predict):
    """A network of two times that outputs `predict(x_t, log_snr, log_snr_s)` as a target."""

    def network(x_t, log_snr, cond):
        alpha, sigma = (scale[:, None] for scale in schedule.scales(log_snr))
        x_0, eps = predict(x_t, log_snr, cond["log_snr_s"])
        return diffjax.encode(target, x_0, eps, alpha, sigma)

    return network


@pytest.mark.parametrize("schedule", each(SCHEDULES, "cosine", "rectified_flow", "log_uniform"))
def test_every_residual_of_an_exact_map_is_zero(x64, schedule):
    oracle = oracles.gaussian(schedule, MEAN, COV)
    for identity in IDENTITIES:
        assert abs(residual(oracle, identity)).max() < 1e-12, identity


@pytest.mark.faults
def test_every_residual_of_the_exact_map_of_a_mixture_is_zero(x64):
    """Its map has no closed form: it is solved by 1,000 steps of Runge-Kutta."""
    oracle = oracles.gaussian_mixture(
        even(diffjax.flow), [0.3, 0.7], [[-1.0, 0.0], [1.0, 1.0]], [0.1, 0.2]
    )
    assert max(jax.jit(lambda: [abs(residual(oracle, i)).max() for i in IDENTITIES])()) < 1e-8


@identities
@pytest.mark.parametrize("target", ["v", *slow(*(t for t in TARGETS if t != "v"))])
def test_the_loss_of_the_exact_map_is_zero_as_every_target(x64, identity, target):
    """By way of a network and its decoding, for each convention of scales."""
    for scales in SCALES.values():
        schedule = even(scales)
        oracle = oracles.gaussian(schedule, MEAN, COV)
        exact = lambda x_t, log_snr, log_snr_s, of=oracle: of(
            x_t, (10 - log_snr) / 20, s=(10 - log_snr_s) / 20
        )
        loss = flow_map_loss(
            jax.random.key(0),
            written_as(target, schedule, exact),
            schedule,
            target,
            oracle.sample(jax.random.key(1), 6),
            identity=identity,
            t=jnp.asarray(T),
            s=jnp.asarray(S),
            **suited(identity, oracle),
        )
        assert loss.max() < 1e-16


def wrong(schedule, theta=0.0):
    """(x_t, log_snr, log_snr_s) -> the prediction of a smooth map that obeys no identity."""

    def predict(x_t, log_snr, log_snr_s):
        alpha, sigma = (scale[:, None] for scale in schedule.scales(log_snr))
        y = x_t / jnp.hypot(alpha, sigma)
        angle, end = (jnp.atan(jnp.exp(-a / 2))[:, None] for a in (log_snr, log_snr_s))
        v = jnp.tanh(y + angle) + theta * jnp.sin(y * end) - angle * end
        # On the circle, v and y are (x_0, eps) turned by the angle.
        return jnp.cos(angle) * y - jnp.sin(angle) * v, jnp.sin(angle) * y + jnp.cos(angle) * v

    return predict


@identities
def test_one_map_has_one_loss_and_one_gradient_as_every_target_and_on_all_scales(x64, identity):
    """The theorem once more: the residual knows the map alone, neither its target nor its scales.

    `y` and the log-SNR are the same for all scales, so the map is the same function of both.
    """

    def loss(theta, scales, target):
        schedule = even(scales)
        losses = flow_map_loss(
            jax.random.key(0),
            written_as(target, schedule, wrong(schedule, theta)),
            schedule,
            target,
            jax.random.normal(jax.random.key(1), (6, 2)),
            identity=identity,
            t=jnp.asarray(T),
            s=jnp.asarray(S),
            **suited(identity, flow_map(written_as("v", schedule, wrong(schedule)), schedule, "v")),
        )
        return losses.sum()

    both = [(diffjax.vp, target) for target in TARGETS]
    both += [(scales, "v") for scales in (diffjax.ve, diffjax.flow)]
    found = [jax.value_and_grad(loss)(0.3, *args) for args in both]
    assert found[0][0] > 0.01 and abs(found[0][1]) > 0.01
    np.testing.assert_allclose(np.ptp(np.array(found), axis=0), 0, atol=1e-9)


def limit(identity, r):
    """The size of sin(delta) / h times the semigroup's residual, minus the identity's.

    h is the angle of the short step, and both are of a map that obeys neither.
    """
    schedule = even()
    mean = flow_map(written_as("v", schedule, wrong(schedule)), schedule, "v")
    u = flow_maps.velocity_of(mean, schedule)
    y, (t, s, r) = jax.random.normal(jax.random.key(0), (6, 2)), map(jnp.asarray, (T, S, r))
    angle = lambda t: ode.angle(schedule, t)[:, None]
    short = angle(t) - angle(r) if identity == "eulerian" else angle(r) - angle(s)
    of_semigroup = IDENTITIES["semigroup"](schedule, u, u, y, t, s, r)[1]
    other = IDENTITIES[identity](schedule, u, u, y, t, s, r)[1]
    assert abs(other).max() > 0.1
    return abs(of_semigroup * jnp.sin(angle(t) - angle(s)) / short - other).max()


@pytest.mark.parametrize("identity", ["eulerian", "lagrangian"])
def test_the_semigroup_becomes_the_others_as_one_of_its_steps_shrinks(x64, identity):
    start, to = (T, S) if identity == "eulerian" else (S, T)
    errors = [limit(identity, start + h * (to - start)) for h in (1e-3, 1e-4)]
    assert errors[1] < 1e-3
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.05)


N = 4000


def gradients(identity, velocity, oracle=None, apart=None, **options):
    """Each example's gradient of the loss at the exact map, in three directions, `[N, 3]`."""
    schedule = even()
    oracle = oracle or oracles.gaussian(schedule, [0.5], 0.3)
    at = lambda log_snr: (10 - log_snr) / 20

    def loss(theta):
        def predict(x_t, log_snr, log_snr_s):
            x_0, eps = oracle(x_t, at(log_snr), s=None if apart else at(log_snr_s))
            alpha, sigma = (scale[:, None] for scale in schedule.scales(log_snr))
            end = jnp.tanh(log_snr_s)[:, None]
            off = theta[0] * jnp.sin(x_t) + theta[1] * x_t * end + theta[2] * (1 + end)
            return x_0 - sigma * off, eps + alpha * off  # v plus `off`

        key_x, key_t = jax.random.split(jax.random.key(2))
        ends = jnp.sort(jax.random.uniform(key_t, (2, N), minval=0.2, maxval=0.8), axis=0)
        return flow_map_loss(
            jax.random.key(3),
            written_as("v", schedule, predict),
            schedule,
            "v",
            oracle.sample(key_x, N),
            identity=identity,
            velocity=velocity(oracle) if callable(velocity) else velocity,
            t=ends[1],
            s=ends[1] - apart if apart else ends[0],
            **options,
        )

    return jax.jit(jax.jacfwd(loss))(jnp.zeros(3))


def bias(gradient):
    """The largest mean over examples, in its standard errors."""
    return (abs(gradient.mean(0)) / (gradient.std(0) / math.sqrt(len(gradient)) + 1e-12)).max()


TEACHER = lambda oracle: oracle


@pytest.mark.parametrize(
    ("identity", "velocity"),
    [
        ("lagrangian", "own"),
        ("progressive", TEACHER),
        *slow(("semigroup", "own"), ("eulerian", "own"), ("lagrangian", TEACHER)),
    ],
)
def test_at_the_exact_map_nothing_moves(x64, identity, velocity):
    assert abs(gradients(identity, velocity)).max() < 1e-9


def test_the_velocity_of_the_pair_is_noisy_and_right_on_average(x64):
    gradient = gradients("eulerian", "pair")
    assert gradient.std(0).min() > 0.1
    assert bias(gradient) < 3


def test_a_gradient_through_the_residual_of_the_pair_is_seen(x64, monkeypatch):
    monkeypatch.setattr(flow_maps.jax.lax, "stop_gradient", lambda x: x)
    assert bias(gradients("eulerian", "pair")) > 10


@pytest.mark.faults
def test_a_normaliser_with_the_velocity_of_the_pair_is_seen(x64, monkeypatch):
    """Its noise is skewed, as that of data that are no Gaussian is.

    The steps are short, so that the exact map is the denoiser.
    """
    monkeypatch.setattr(flow_maps, "check", lambda *_: None)
    skewed = oracles.gaussian_mixture(even(), [0.2, 0.8], [[-2.0], [0.5]], [0.01, 0.01])
    of_pair = lambda p: bias(gradients("eulerian", "pair", skewed, 1e-6, normalise=p))
    assert of_pair(0.0) < 3 and of_pair(1.0) > 6


@pytest.mark.parametrize("scales", ["ve", "flow"])
def test_a_radius_that_is_not_differentiated_is_seen(x64, monkeypatch, scales):
    oracle = oracles.gaussian(even(SCALES[scales]), MEAN, COV)
    radius = ode.radius
    monkeypatch.setattr(ode, "radius", lambda *args: jax.lax.stop_gradient(radius(*args)))
    assert abs(residual(oracle, "eulerian")).max() > 0.1


@pytest.mark.parametrize("identity", ["eulerian", "lagrangian"])
def test_a_derivative_in_the_wrong_direction_is_seen(x64, monkeypatch, identity):
    per_angle = flow_maps._per_angle
    monkeypatch.setattr(flow_maps, "_per_angle", lambda *args: -per_angle(*args))
    assert abs(residual(oracles.gaussian(even(), MEAN, COV), identity)).max() > 0.1


def through_u(identity):
    """The gradient of the loss of a wrong map, and 2 R du/dtheta, its part through u alone."""
    schedule = even()
    exact = oracles.gaussian(schedule, MEAN, COV)
    t, s, r = map(jnp.asarray, (T, S, S + 0.5 * (T - S)))
    x_0, eps = (jax.random.normal(jax.random.key(i), (6, 2)) for i in (0, 1))

    def mean(theta):
        return flow_map(written_as("v", schedule, wrong(schedule, theta)), schedule, "v")

    def loss(theta):
        network = written_as("v", schedule, wrong(schedule, theta))
        return flow_map_loss(
            jax.random.key(3), network, schedule, "v", x_0, identity=identity, t=t, s=s,
            first=0.5 if identity in ("semigroup", "progressive") else None,
            **suited(identity, exact),
        )  # fmt: skip

    eps = diffjax.losses.draw(jax.random.key(3), x_0, t)[1]
    y = diffjax.q_sample(schedule, x_0, t, eps)
    u = lambda theta: flow_maps.velocity_of(mean(theta), schedule)
    v = flow_maps.velocity_of(exact, schedule) if identity == "progressive" else u(0.3)
    rest = IDENTITIES[identity](schedule, u(0.3), v, y, t, s, r)[1]
    slope = jax.jacfwd(lambda theta: u(theta)(y, t, s))(0.3)
    return jax.jacfwd(loss)(0.3), (2 * rest * slope).mean(-1)


@identities
def test_the_gradient_passes_through_the_step_alone(x64, monkeypatch, identity):
    np.testing.assert_allclose(*through_u(identity), atol=1e-12)
    if identity != "progressive":  # in which nothing but the step depends on the map
        monkeypatch.setattr(flow_maps.jax.lax, "stop_gradient", lambda x: x)
        loss, alone = through_u(identity)
        assert abs(loss - alone).max() > 0.01


# The named methods, each by the formula of its paper.


def pairs(schedule):
    """x_0, eps and x_t at the times `T`."""
    x_0, eps = (jax.random.normal(jax.random.key(i), (6, 2)) for i in (0, 1))
    return x_0, eps, diffjax.q_sample(schedule, x_0, T, eps)


def test_meanflow_is_the_eulerian_row_with_the_velocity_of_the_pair(x64):
    """Geng et al. 2025: u_tgt = v - (t - r)(v du/dz + du/dt), z = (1 - t) x + t e, v = e - x.

    The last step has no length, so that its aim is v.
    """
    schedule, key = even(diffjax.flow), jax.random.key(2)
    average = lambda z, r, t: jnp.sin(z) * r[:, None] - jnp.tanh(z * t[:, None]) + t[:, None] ** 2
    clock = lambda log_snr: jax.nn.sigmoid(-log_snr / 2)  # sigma, their t
    network = lambda z, log_snr, cond: average(z, clock(cond["log_snr_s"]), clock(log_snr))

    x = pairs(schedule)[0]
    start, end = jnp.asarray(T), jnp.asarray(S).at[-1].set(T[-1])
    e = diffjax.losses.draw(key, x, start)[1]
    z, v = diffjax.q_sample(schedule, x, start, e), e - x
    t, r = (clock(schedule.log_snr(time)) for time in (start, end))
    u, du = jax.jvp(average, (z, r, t), (v, jnp.zeros_like(r), jnp.ones_like(t)))
    theirs = u - (v - (t - r)[:, None] * du)
    length = lambda t: jnp.hypot(t, 1 - t)
    ours = flow_map_loss(
        key, network, schedule, "flow", x, identity="eulerian", velocity="pair", t=start, s=end
    )
    weight = length(t) ** 2 / length(r)  # of a velocity on the circle
    np.testing.assert_allclose(ours, weight**2 * (theirs**2).mean(1), rtol=1e-9)


def test_scm_is_the_eulerian_row_to_data_with_v(x64):
    """Lu & Song 2024: f = cos t x - sin t F, df/dt = -cos t (F - dx/dt) - sin t (x + dF/dt)."""
    schedule = Schedule(lambda t: 60 - 70 * jnp.asarray(t), diffjax.vp)  # the angle at 0 is 1e-13
    predicted = lambda x, angle: jnp.sin(x) - jnp.tanh(x * angle[:, None])
    clock = lambda log_snr: jnp.atan(jnp.exp(-log_snr / 2))
    network = lambda x, log_snr, cond: predicted(x, clock(log_snr))

    x_0, eps, x_t = pairs(schedule)
    angle = clock(schedule.log_snr(T))
    cos, sin = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]
    slope = cos * eps - sin * x_0
    f, df = jax.jvp(predicted, (x_t, angle), (slope, jnp.ones_like(angle)))
    theirs = -cos * (f - slope) - sin * (x_t + df)
    u = flow_maps.velocity_of(flow_map(network, schedule, "v"), schedule)
    t, s = jnp.asarray(T), jnp.zeros(6)
    ours = IDENTITIES["eulerian"](schedule, u, lambda *_: slope, x_t, t, s, s)[1]
    np.testing.assert_allclose(ours, -theirs, atol=1e-11)


@pytest.mark.parametrize("as_map", [True, False])
def test_progressive_distillation_learns_two_steps_of_the_teacher(x64, as_map):
    """Salimans & Ho 2022, Algorithm 2: the loss is zero where one step ends where two of it do.

    The two steps are DDIM's of a denoiser, and those of `jump` of a map.
    """
    schedule = even()
    predict = wrong(schedule)
    teacher = flow_map(written_as("v", schedule, predict), schedule, "v")
    sampler = diffjax.jump(teacher)
    if not as_map:
        of_two_times, teacher = teacher, lambda x_t, t, cond=None: of_two_times(x_t, t)
        sampler = diffjax.ddim(teacher, schedule)

    def learned(x_t, log_snr, log_snr_s):
        """The prediction with which one step from t to s ends where two of the teacher do."""
        t, s = (10 - log_snr) / 20, (10 - log_snr_s) / 20
        x_s = x_t
        for start, end in ((t, (t + s) / 2), ((t + s) / 2, s)):
            x_s = sampler.step(jax.random.key(0), sampler.init(x_s), start, end).x
        (a, b), (c, d) = (diffjax.scales_at(schedule, time, x_t) for time in (t, s))
        return (b * x_s - d * x_t) / (b * c - a * d), (c * x_t - a * x_s) / (b * c - a * d)

    loss = flow_map_loss(
        jax.random.key(0),
        written_as("v", schedule, learned),
        schedule,
        "v",
        jax.random.normal(jax.random.key(1), (6, 2)),
        identity="progressive",
        velocity=teacher,
        first=0.5,
        t=jnp.asarray(T),
        s=jnp.asarray(S),
    )
    assert loss.max() < 1e-16


def test_a_jump_is_ctms_step(x64):
    """Kim et al. 2024: G(x_t, t, s) = s/t x_t + (1 - s/t) g(x_t, t, s), whose time is sigma."""
    schedule = even(diffjax.ve)
    g = lambda x, t, s: jnp.tanh(x) + s[:, None] * t[:, None]
    clock = lambda log_snr: jnp.exp(-log_snr / 2)
    network = lambda x, log_snr, cond: g(x, clock(log_snr), clock(cond["log_snr_s"]))
    x_t = pairs(schedule)[2]
    t, s = (clock(schedule.log_snr(u)) for u in (T, S))
    ratio = (s / t)[:, None]
    jump = diffjax.jump(flow_map(network, schedule, "x_0"))
    ours = jump.step(jax.random.key(0), jump.init(x_t), jnp.asarray(T), jnp.asarray(S)).x
    np.testing.assert_allclose(ours, ratio * x_t + (1 - ratio) * g(x_t, t, s), atol=1e-12)


# The sampler.


def test_a_jump_with_the_exact_map_is_exact_in_any_number_of_steps_and_both_ways(x64):
    schedule = diffjax.cosine()
    oracle = oracles.gaussian(schedule, MEAN, COV)
    x_1 = diffjax.prior_sample(jax.random.key(0), schedule, (4, 2))
    walk = lambda x, ts: diffjax.sample(jax.random.key(1), diffjax.jump(oracle), x, ts)[0]
    x_0 = oracle.flow_map(x_1, 1.0, 0.0)
    for n in (1, 4):
        ts = diffjax.uniform_times(n)
        np.testing.assert_allclose(walk(x_1, ts), x_0, atol=1e-9)
        np.testing.assert_allclose(walk(x_0, ts[::-1]), x_1, atol=1e-8)


def test_a_step_of_no_length_stays_where_it_is_whatever_the_network():
    schedule = diffjax.cosine()
    network = lambda x_t, log_snr, cond: jnp.sin(3 * x_t) + cond["log_snr_s"][:, None]
    x = jnp.ones((2, 3))
    for mean in (flow_map(network, schedule, "v"), oracles.gaussian(schedule, jnp.zeros(3), 1.0)):
        jump = diffjax.jump(mean)
        step = jump.step(jax.random.key(0), jump.init(x), 0.5, 0.5)
        np.testing.assert_allclose(step.x, x, rtol=1e-6)
        # There, and without s, the map is a denoiser.
        np.testing.assert_array_equal(mean(x, 0.5).eps, mean(x, 0.5, s=0.5).eps)


@pytest.mark.parametrize("renoise", [0.5, 1.0])
def test_noise_that_is_added_again_leaves_the_distribution(renoise):
    schedule = diffjax.cosine()
    oracle = oracles.gaussian(schedule, [1.0], 0.25)
    x_1 = diffjax.prior_sample(jax.random.key(0), schedule, (4000, 1))
    jump = diffjax.jump(oracle, renoise=renoise)
    x_0 = diffjax.sample(jax.random.key(1), jump, x_1, jnp.array([1.0, 0.6, 0.3, 0.0]))[0]
    assert x_0.mean() == pytest.approx(1.0, abs=0.04) and x_0.std() == pytest.approx(0.5, abs=0.02)
    # And it is drawn anew: the exact end of the same start is another point.
    assert jnp.corrcoef(x_0[:, 0], oracle.flow_map(x_1, 1.0, 0.0)[:, 0])[0, 1] < 0.95


# What the loss is on the diagonal, and whose draws it uses.


def test_on_the_diagonal_the_loss_is_that_of_the_denoiser():
    schedule = diffjax.cosine()
    network = lambda x_t, log_snr, cond: jnp.sin(x_t)
    x_0, key = jax.random.normal(jax.random.key(0), (8, 2)), jax.random.key(1)
    for target, weight in (("v", None), ("eps", weightings.elbo())):
        args = key, network, schedule, target, x_0, None, weight
        ours, denoising = flow_map_loss(*args, diagonal=1.0), diffjax.diffusion_loss(*args)
        np.testing.assert_allclose(ours, denoising, rtol=2e-5)


@pytest.mark.parametrize(
    ("identity", "taught"),
    [
        ("lagrangian", False),
        ("progressive", True),
        *slow(("lagrangian", True), ("eulerian", False), ("semigroup", False)),
    ],
)
def test_losses_are_normalised_where_their_aim_is_not_the_noisy_pair(identity, taught):
    schedule = even()
    oracle = oracles.gaussian(schedule, MEAN, COV)
    network = lambda x_t, log_snr, cond: jnp.sin(x_t) * cond["log_snr_s"][:, None] / 10
    x_0, t = jax.random.normal(jax.random.key(0), (6, 2)), jnp.asarray(T)
    velocity = {"velocity": oracle} if taught else suited(identity, oracle)
    loss = functools.partial(
        flow_map_loss, jax.random.key(1), network, schedule, "v", x_0, t=t,
        s=jnp.asarray(S).at[:3].set(t[:3]), identity=identity, **velocity,
    )  # fmt: skip
    plain, normalised = loss(), loss(normalise=0.5)
    expected = plain / jnp.sqrt(plain + 1e-3)
    if not velocity:
        expected = jnp.where(jnp.arange(6) < 3, plain, expected)
    np.testing.assert_allclose(normalised, expected, rtol=1e-6)


@identities
def test_a_teachers_velocity_is_the_aim_on_the_diagonal_too(identity):
    schedule = even()
    oracle = oracles.gaussian(schedule, MEAN, COV)
    exact = lambda x_t, log_snr, log_snr_s: oracle(x_t, (10 - log_snr) / 20)
    network = written_as("v", schedule, exact)
    x_0 = jax.random.normal(jax.random.key(0), (8, 2))
    loss = functools.partial(flow_map_loss, jax.random.key(1), network, schedule, "v", x_0)
    taught = loss(velocity=oracle, diagonal=1.0, identity=identity)
    assert taught.max() < 1e-8 < 1e-3 < loss(diagonal=1.0).max()


@identities
def test_an_examples_loss_does_not_depend_on_the_others(identity):
    """Bit for bit, so it is the same on any layout of devices; its times and noise are its own."""
    schedule = diffjax.cosine()
    network = lambda x_t, log_snr, cond: jnp.sin(x_t) * cond["log_snr_s"][:, None] / 10
    x_0 = jax.random.normal(jax.random.key(0), (8, 2))
    own_keys = jax.random.split(jax.random.key(1), 8)
    options = dict(identity=identity, diagonal=0.3, to_data=0.3)
    options |= suited(identity, flow_map(network, schedule, "v"))

    @functools.partial(jax.jit, static_argnums=2)
    def loss(keys, x_0, n):
        return flow_map_loss(keys, network, schedule, "v", x_0, **options)

    halves = [loss(own_keys[i : i + 4], x_0[i : i + 4], 4) for i in (0, 4)]
    np.testing.assert_array_equal(loss(own_keys, x_0, 8), np.concatenate(halves))


def test_times_are_drawn_where_they_should_be():
    """Seen by a network that writes down the two log-SNRs that it is given."""
    schedule, seen = diffjax.rectified_flow(), []

    def network(x_t, log_snr, cond):
        seen.append((log_snr, cond["log_snr_s"]))
        return 0 * x_t

    x_0 = jnp.zeros((4000, 1))
    flow_map_loss(
        jax.random.key(0), network, schedule, "v", x_0, identity="semigroup", velocity="pair",
        diagonal=0.25, to_data=0.25, steps=10,
    )  # fmt: skip
    t, s = (10 * time_at(schedule, log_snr) for log_snr in seen[0])
    assert abs(t - t.round()).max() < 1e-3 and abs(s - s.round()).max() < 1e-3
    assert (s <= t + 1e-3).all()
    # Of t = 1/10 and others, s is t or 0; else it is uniform below t.
    assert jnp.mean(s > t - 0.5) == pytest.approx(0.25, abs=0.03)
    assert jnp.mean(s[t > 9.5] < 0.5) == pytest.approx(0.25 + 0.5 / 10, abs=0.06)


# Networks that see two times.

TINY = {
    "mlp": (models.MLPConfig(width=8, blocks=1, embedding="angle", dropout=0.5), (3,)),
    "unet": (
        models.UNetConfig(
            width=4, mults=(1,), blocks=1, groups=2, attention=(4,), embedding="angle", dropout=0.5
        ),
        (4, 4, 1),
    ),
    "dit": (
        models.DiTConfig(width=8, blocks=1, heads=2, embedding="angle", dropout=0.5), (4, 4, 1)
    ),
}  # fmt: skip
"""Every network of two times, before it has the second; and the shape of its data."""


def shapes_of(module, x):
    """The shapes of a network's parameters."""
    cond = {"log_snr_s": jnp.zeros(2), "guidance": jnp.ones(2)}
    return jax.eval_shape(module.init, jax.random.key(0), x, jnp.zeros(2), cond)["params"]


def random_params(module, x):
    """Parameters none of which is zero, as some of a new network are."""
    leaves, tree = jax.tree.flatten(shapes_of(module, x))
    draw = np.random.default_rng(0)
    return tree.unflatten([jnp.asarray(draw.normal(0, 0.5, p.shape), x.dtype) for p in leaves])


def test_every_network_that_can_have_two_times_is_tested():
    can = {name for name, row in models.MODELS.items() if hasattr(row.config(), "embedding")}
    assert can == set(TINY)


@pytest.mark.parametrize("name", ["dit", *slow("mlp", "unet")])
def test_a_denoisers_parameters_are_a_map_that_does_not_see_the_second_time(name):
    config, shape = TINY[name]
    module = models.make_module(config)
    wider = models.make_module(dataclasses.replace(config, two_times=True, guidance_weight=True))
    x = jax.random.normal(jax.random.key(1), (2, *shape))
    log_snr = jnp.array([-3.0, 2.0])
    params = random_params(module, x)
    # What a new network has there: only its own layers are used.
    fresh = jax.tree_util.tree_map_with_path(
        lambda path, p: jnp.full(p.shape, 0.0 if path[0].key in models.OF_MAPS else 9.0),
        shapes_of(wider, x),
    )
    started = models.start_from(fresh, params)

    @jax.jit
    def two(params, end, weight=1.0):
        cond = {"log_snr_s": end, "guidance": jnp.full(2, weight)}
        return models.apply(wider, params, x, log_snr, cond)

    out = jax.jit(lambda params: models.apply(module, params, x, log_snr))(params)
    for end, weight in ((log_snr, 1.0), (log_snr + 5, 3.0)):
        np.testing.assert_allclose(out, two(started, end, weight), rtol=1e-5, atol=1e-6)
    # But it can learn to.
    both = jax.tree.map(lambda p: p + 0.1, started)
    for other in (two(both, log_snr + 5), two(both, log_snr, 3.0)):
        assert abs(two(both, log_snr) - other).max() > 1e-3


def test_the_layers_of_a_map_start_at_zero_in_every_network():
    for config, shape in TINY.values():
        config = dataclasses.replace(config, two_times=True, guidance_weight=True)
        x, cond = jnp.ones((2, *shape)), {"log_snr_s": jnp.ones(2), "guidance": jnp.ones(2)}
        init = functools.partial(models.make_module(config).init, jax.random.key(0))
        params = jax.jit(init)(x, jnp.ones(2), cond)["params"]
        own = [params[name]["kernel"] for name in models.OF_MAPS]
        assert not any(kernel.any() for kernel in own)


@pytest.mark.parametrize("name", TINY)
def test_a_network_is_differentiated_in_both_times_with_dropout(x64, name):
    """Against differences, with the same masks in every evaluation."""
    config, shape = TINY[name]
    module = models.make_module(dataclasses.replace(config, two_times=True))
    x = jax.random.normal(jax.random.key(1), (2, *shape))
    params = random_params(module, x)
    keys = jax.random.split(jax.random.key(3), 2)

    @jax.jit
    def moved(h):
        """The output at a point that moves by h, and its derivative by h."""

        def out(h):
            log_snr, log_snr_s = jnp.array([-3.0, 0.5]) + h, jnp.array([4.0, 1.0]) - 2 * h
            at = x + h * jnp.cos(x), log_snr, {"log_snr_s": log_snr_s}
            return models.apply(module, params, *at, dropout=keys)

        return jax.jvp(out, (h,), (jnp.ones_like(h),))

    (low, _), (_, slope), (high, _) = (moved(jnp.asarray(h)) for h in (-1e-5, 0.0, 1e-5))
    np.testing.assert_allclose(slope, (high - low) / 2e-5, rtol=1e-5, atol=1e-5)
    assert abs(slope).max() > 0.01


# Runs of flow maps.


def map_of(run, of_model=None, changes=None, **options):
    """The experiment of a flow map with the model of a finished run, and changes of its config."""
    config = trained.read_config(run)
    of_model = {"embedding": "angle", "two_times": True} | (of_model or {})
    model = dataclasses.replace(config.model, **of_model)
    sampling = dataclasses.replace(config.sampling, sampler="jump", guidance=(), times=None)
    options = {"objective": "flow_map", "target": "v", "flow_map": FlowMap(**options)}
    options |= {"model": model, "sampling": sampling} | (changes or {})
    return resolve(dataclasses.replace(config, **options))


@pytest.mark.faults
def test_a_teacher_is_the_guided_denoiser_of_its_run(finished):
    e = map_of(finished, velocity=str(finished), guidance=("classifier_free:weight=2",))
    with pytest.raises(ValueError, match="unknown velocity"):
        e.objective(None)(jax.random.key(0), NETWORK, e.schedule, "v", X)
    teacher = trained.inherit(e, (8, 8, 1)).objective(None).keywords["velocity"]

    apply, params, config = trained.load(finished)
    network = functools.partial(apply, params)
    denoise = diffjax.denoiser(network, e.schedule, config.target)
    guided = diffjax.classifier_free(denoise, 2.0, {"label": np.int32(10)})
    x_t, cond = jax.random.normal(jax.random.key(0), (2, 8, 8, 1)), {"label": jnp.arange(2)}
    both = (jax.jit(f)(x_t, 0.5, cond).eps for f in (teacher, guided))
    np.testing.assert_allclose(*both, rtol=1e-5, atol=1e-5)


@pytest.mark.faults
def test_a_map_that_is_given_the_weight_learns_from_the_teacher_at_that_weight(finished):
    e = map_of(finished, {"guidance_weight": True}, velocity=str(finished), guidance_to=4.0)
    batch = {"x": jnp.zeros((500, 8, 8, 1)), "label": jnp.zeros(500, jnp.int32)}
    own_keys = jax.random.split(jax.random.key(0), 500)
    drawn = e.condition(own_keys, batch, drop=True)["guidance"]
    assert 1 <= drawn.min() < 1.1 and 3.9 < drawn.max() <= 4
    assert (e.condition(own_keys, batch)["guidance"] == 1).all()
    chosen = dataclasses.replace(e.config.sampling, guidance=("classifier_free:weight=3",))
    at_three = resolve(dataclasses.replace(e.config, sampling=chosen))
    assert (at_three.condition(own_keys, batch)["guidance"] == 3).all()
    assert at_three.guide(NETWORK) is NETWORK  # it is the network that is guided

    teacher = trained.inherit(e, (8, 8, 1)).objective(None).keywords["velocity"]
    apply, params, config = trained.load(finished)
    denoise = diffjax.denoiser(functools.partial(apply, params), e.schedule, config.target)
    weight = jnp.array([1.0, 3.0])
    guided = diffjax.classifier_free(denoise, weight, {"label": np.int32(10)})
    x_t, label = jax.random.normal(jax.random.key(0), (2, 8, 8, 1)), {"label": jnp.arange(2)}
    ours = jax.jit(teacher)(x_t, 0.5, {**label, "guidance": weight})
    np.testing.assert_allclose(ours.eps, jax.jit(guided)(x_t, 0.5, label).eps, atol=1e-5)


def test_a_network_that_a_map_learns_from_must_suit_it():
    of_map = functools.partial(map_of, "fashion_map", start="fashion_map")
    trained.inherit(of_map(changes={"unit_output": False}), (28, 28, 1))  # the same for v
    with pytest.raises(ValueError, match="trained with attention=.*the map's has attention="):
        trained.inherit(of_map({"attention": ()}), (28, 28, 1))
    told = map_of("digits", {"augment_dim": 9}, {"augmentation": "edm"}, velocity="digits")
    with pytest.raises(ValueError, match="it has model.augment_dim=0, the map model.augment_dim=9"):
        trained.inherit(told, (8, 8, 1))


@pytest.mark.parametrize(
    ("changes", "of_model", "message"),
    [
        (
            {"augmentation": "window", "augmentation_options": {"side": 8}},
            {},
            "it was trained on windows",
        ),
        (
            {},
            {"guidance_weight": True, "embedding": "angle"},
            "is given the weight of its guidance",
        ),
    ],
)
def test_a_network_that_cannot_teach_is_refused(monkeypatch, changes, of_model, message):
    apply, params, config = trained.load("digits")
    model = dataclasses.replace(config.model, **of_model)
    config = dataclasses.replace(config, model=model, **changes)
    e = map_of("digits", velocity="digits")
    monkeypatch.setattr(trained, "load", lambda source: (apply, params, config))
    with pytest.raises(ValueError, match=message):
        trained.inherit(e, (8, 8, 1))


def test_a_teacher_may_have_a_chain_of_guidances():
    """An estimate that a threshold changes is still that of a denoiser, not of a map."""
    chain = ("classifier_free:weight=2", "dynamic_threshold")
    e = trained.inherit(map_of("digits", velocity="digits", guidance=chain), (8, 8, 1))
    inputs = jnp.zeros((2, 8, 8, 1)), {"label": jnp.arange(2)}

    def loss(x_0, cond):
        network = lambda x_t, log_snr, cond: 0 * x_t
        return e.objective(None)(jax.random.key(0), network, e.schedule, "v", x_0, cond=cond)

    assert jax.eval_shape(loss, *inputs).shape == (2,)


@pytest.mark.parametrize("identity", ["lagrangian", "semigroup"])
def test_a_teacher_may_be_clipped_or_tiled(identity):
    """Where neither changes anything the loss is that of the plain denoiser."""
    schedule = diffjax.cosine()
    plain = diffjax.denoiser(lambda x_t, log_snr, cond: jnp.tanh(x_t), schedule, "v")
    x_0 = jax.random.normal(jax.random.key(0), (4, 8, 8, 1))
    loss = lambda teacher: flow_map_loss(
        *(jax.random.key(1), NETWORK, schedule, "v", x_0), identity=identity, velocity=teacher
    )
    for same in (diffjax.clip_x_0(plain, low=-1e3, high=1e3), diffjax.tiled(plain, 8, 4)):
        np.testing.assert_allclose(loss(same), loss(plain), rtol=1e-5)


def test_a_map_starts_with_the_parameters_of_a_run(finished, tmp_path):
    with pytest.raises(ValueError, match="trained with target=eps, the map's has target=v"):
        trained.inherit(map_of(finished, start=str(finished)), (8, 8, 1))
    run = shutil.copytree(finished, tmp_path / "run")
    config = run / "config.json"
    config.write_text(config.read_text().replace('"target": "eps"', '"target": "v"'))
    e = trained.inherit(map_of(run, start=str(run)), (8, 8, 1))
    params = dict(jax.jit(lambda: e.init(jax.random.key(0), (8, 8, 1)))())
    assert not any(kernel.any() for kernel in jax.tree.leaves(params.pop("embed_s")))
    jax.tree.map(np.testing.assert_array_equal, params, dict(trained.load(finished)[1]))


@pytest.mark.faults
def test_images_of_a_jump_stay_in_range_through_the_clip():
    """The best prediction of two times is a mean of those along the path, so it has their range."""
    e = map_of("digits")
    far = e.clip(e.denoiser(lambda x_t, log_snr, cond: 9 * x_t))
    jump = e.sampler(far, lambda guided: guided)
    x = jump.step(jax.random.key(0), jump.init(jnp.ones((1, 8, 8, 1))), 1.0, 0.0).x
    assert abs(x).max() < 1.01
    # And a clip that is not needed changes nothing.
    oracle = oracles.dataset(e.schedule, jnp.array([[0.5], [-0.5]]))
    x_t = jnp.array([[0.3], [-1.0]])
    free, clipped = (f(x_t, 0.9, s=0.2) for f in (oracle, diffjax.clip_x_0(oracle)))
    np.testing.assert_allclose(free.eps, clipped.eps, atol=1e-4)


# What is refused.

X = np.zeros((2, 3), np.float32)
NETWORK = lambda x_t, log_snr, cond: 0 * x_t


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(identity="euler"), ValueError, "unknown identity='euler': one of semigroup, eul"),
        (dict(velocity="mine"), ValueError, "unknown velocity='mine': own, pair, or a teacher"),
        (dict(identity="progressive"), ValueError, "takes both steps by a teacher.*velocity='own'"),
        (dict(velocity="pair"), ValueError, "velocity where the step ends.*use own, a teacher"),
        (
            dict(velocity="pair", identity="eulerian", normalise=1.0),
            ValueError,
            "normalise=1.0 with velocity='pair'.*mean gradient wrong",
        ),
        (dict(normalise=-1.0), ValueError, "normalise=-1.0: must be at least 0"),
        (dict(first=1.0), ValueError, "first=1.0: must be between 0 and 1"),
        (dict(first=0.5), ValueError, "first=0.5: identity='lagrangian' takes no two"),
        (dict(normalise=math.nan), ValueError, "normalise=nan: must be at least 0"),
        (dict(diagonal=0.7, to_data=0.6), ValueError, "diagonal=0.7, to_data=0.6.*at most 1"),
        (dict(s=2.0), ValueError, r"times from 2.0 to 2.0: must lie in \[0, 1\]"),
        (dict(cond=jnp.zeros(2)), TypeError, "cond is a .*a flow map needs a dict"),
        (dict(target="w"), ValueError, "unknown target 'w'"),
        (
            dict(velocity=oracles.gaussian(diffjax.linear(), [0.0] * 3, 1.0)),
            ValueError,
            "another schedule",
        ),
        (
            dict(velocity=lambda x_t, t, cond=None: diffjax.Prediction(x_t[:, :1], x_t[:, :1])),
            ValueError,
            r"shape \(2, 3\), and the denoiser predicts x_0 and eps of shapes \(2, 1\) and",
        ),
    ],
)
def test_bad_input_is_named(options, error, message):
    options = {"target": "v"} | options
    with pytest.raises(error, match=message):
        flow_map_loss(jax.random.key(0), NETWORK, diffjax.cosine(), x_0=X, **options)


@pytest.mark.parametrize("field", ["first", "diagonal", "to_data", "normalise"])
def test_whole_numbers_of_a_config_are_numbers(field):
    with pytest.raises(ValueError, match=f"{field}=-1000000000000"):
        FlowMap(**{field: -(10**12)}).check()


@pytest.mark.parametrize("name", TINY)
def test_networks_that_cannot_be_of_two_times_are_refused(name):
    config = TINY[name][0]
    with pytest.raises(ValueError, match="two_times=True needs embedding=angle"):
        dataclasses.replace(config, two_times=True, embedding="log_snr")
    with pytest.raises(ValueError, match="embedding='time': one of log_snr, angle"):
        dataclasses.replace(config, embedding="time")


@pytest.mark.parametrize("name", models.MODELS)
def test_a_network_of_one_time_is_no_map(name):
    network = functools.partial(models.apply, models.make_module(models.MODELS[name].config()), {})
    schedule = diffjax.cosine()
    jump = diffjax.jump(flow_map(network, schedule, "v"))
    for use in (
        lambda: flow_map_loss(jax.random.key(0), network, schedule, "v", X),
        lambda: diffjax.sample(jax.random.key(0), jump, X, np.array([1.0, 0.0])),
    ):
        with pytest.raises(ValueError, match=f"{name} is given two times.*set two_times=True"):
            use()


def test_a_jump_needs_a_map():
    denoise = diffjax.denoiser(NETWORK, diffjax.cosine(), "v")
    ts = diffjax.uniform_times(2)
    for wrapped in (denoise, diffjax.classifier_free(denoise, 2.0, None)):
        with pytest.raises(TypeError, match="need a flow map.*without the time s.*flow_map"):
            diffjax.sample(jax.random.key(0), diffjax.jump(wrapped), X, ts)
    with pytest.raises(ValueError, match="at least two times"):
        diffjax.sample(jax.random.key(0), diffjax.jump(denoise), X, np.array([1.0]))
    with pytest.raises(ValueError, match="renoise=2"):
        diffjax.jump(denoise, renoise=2.0)
