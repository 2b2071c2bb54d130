"""A schedule that is learned beside the network, against closed forms of Gaussian data."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax
import train
from catalogue import slow
from diffjax import checkpoint, data, keys, weightings
from diffjax.evaluation.likelihoods import variational_bound
from diffjax.evaluation.sampling import make_generate
from diffjax.experiment import Walk, command_line, dataset, resolve, with_parameters
from diffjax.experiment.functions import initial_state
from diffjax.models import MLPConfig
from diffjax.published import weights
from diffjax.schedules import MonotoneParams, split
from diffjax.training import averaging, runners

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


@pytest.mark.faults
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
        diffusion = diffjax.diffusion_loss(key, network, schedule, "eps", x_0, weight=weight, t=t)
        eps = keys.normal(
            keys.fold_in(keys.fold_in(keys.per_example(key, 64), 2), 0), x_0.shape, x_0.dtype
        )
        denoise = diffjax.denoiser(network, schedule, "eps")
        rest = diffjax.prior_term(schedule, x_0) + diffjax.reconstruction_term(
            denoise, schedule, x_0, eps, levels=None
        )
        return diffusion, diffusion + rest / x_0.shape[1]

    at = jnp.float64(0.7), bent(), tuple(map(jnp.float64, ENDS))
    value, got = jax.jit(jax.value_and_grad(lambda *a: learned(*a).mean(), (0, 1, 2)))(*at)

    @jax.jit
    def wanted(*at):
        bound, of_bound = jax.value_and_grad(lambda *a: naive(*a)[1].mean(), (0, 2))(*at)
        of_square = jax.grad(lambda *a: (naive(*a)[0] ** 2).mean(), 1)(*at)
        return bound, (of_bound[0], of_square, of_bound[1])

    bound, wanted = wanted(*at)
    np.testing.assert_allclose(value, bound, rtol=1e-12)
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
    bound = lambda w, h: (
        0.5
        * (
            STD**2 * jnp.exp(w)
            + math.log(2 * math.pi)
            - h
            + 1
            + jax.nn.softplus(h + B)
            - jax.nn.softplus(w + B)
        )
    )
    exactly = bound(low, high), *jax.grad(bound, (0, 1))(low, high)
    for got, wanted in zip(jax.tree.leaves((found, inside)), (*exactly, 0, 0, 0, 0), strict=True):
        error = got.std(0, ddof=1) / len(keys) ** 0.5
        assert (np.abs(got.mean(0) - wanted) < 4.5 * error + 1e-12).all()
        assert (error < 0.02).all()


@pytest.mark.faults
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
        return jax.lax.scan(step, (params, start, start), jnp.arange(400))[0][0]

    soft = lambda l: jax.nn.softplus(l + B)

    def best(t):  # softplus(l + B) falls in a straight line
        high, low = soft(ends[1]), soft(ends[0])
        y = high - t * (high - low)
        return y + jnp.log(-jnp.expm1(-y)) - B

    params = diffjax.monotone_params()
    straight = std(diffjax.monotone(params, *ends))
    least = std(diffjax.Schedule(best, diffjax.vp))
    learned = std(diffjax.monotone(learn(params), *ends))
    assert straight > 3 * least
    assert learned < 1.25 * least


def test_a_schedule_of_another_kind_is_refused():
    x_0, _ = draws(4)
    with pytest.raises(TypeError, match="monotone"):
        diffjax.continuous_bound_loss(jax.random.key(0), exact, diffjax.cosine(), "eps", x_0)
    assert isinstance(split(diffjax.monotone(bent()))[0].log_snr.args[0], MonotoneParams)


def moons(**changes):
    """A run on points, whose network is small and whose schedule is learned."""
    config = command_line.from_file("configs/two_moons.py:smoke")
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, shape=(2,)),
        model=MLPConfig(width=8, blocks=1, out_channels=2),
        optimizer=dataclasses.replace(config.optimizer, warmup=0, learning_rate=1e-2),
        schedule="monotone",
        schedule_options={"width": 4},
        weighting="elbo",
        fourier_features=(0,),
    )
    return dataclasses.replace(config, **changes)


def trained(config, runner, steps=4):
    """The parameters after some steps."""
    e = resolve(config)
    state = runner.init(initial_state(e, (2,)))
    step = runner.step(train.make_step(e, train.make_loss(e, None)))
    train_set, _ = data.load("two_moons")
    batch = dataset.make_batch(config, train_set, runner.slots(config.batch_size))
    for k in range(0, steps, config.steps_per_call):
        state, _ = step(state, runner.put(batch(k)))
    return jax.tree.map(np.asarray, state.params)


@pytest.fixture(scope="module")
def learned():
    """A config of a learned schedule, and its parameters after a few steps on one device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runners, "_devices", lambda: jax.devices()[:1])
        config = moons()
        return config, trained(config, runners.sharded())


@pytest.mark.faults
@pytest.mark.parametrize(
    ("runner", "devices", "accumulate", "together"),
    [(runners.pmap, 4, 2, 2), *slow((runners.sharded, 4, 1, 1))],
)
def test_training_is_equal_on_every_layout(
    monkeypatch, learned, runner, devices, accumulate, together
):
    """The gradient is of squares, example by example, so that the parts do not enter."""
    monkeypatch.setattr(runners, "_devices", lambda: jax.devices()[:devices])
    config, expected = learned
    start = resolve(config).init(jax.random.key(0), (2,))["schedule"]
    assert all((expected["schedule"][name] != x).all() for name, x in start.items())
    optimizer = dataclasses.replace(config.optimizer, accumulate=accumulate)
    same = dataclasses.replace(config, optimizer=optimizer, steps_per_call=together)
    got = trained(same, runner())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, expected)


def by_hand(config, params):
    """The schedule among the parameters."""
    own = params["schedule"]
    inside = MonotoneParams(*(own[name] for name in MonotoneParams._fields))
    return diffjax.monotone(inside, own["log_snr_min"], own["log_snr_max"])


@pytest.mark.faults
def test_what_is_drawn_and_evaluated_is_on_the_schedule_of_the_parameters(learned):
    config, params = learned
    params = params | {"schedule": params["schedule"] | {"log_snr_max": np.float32(5.0)}}
    e, schedule = resolve(config), by_hand(config, params)
    index = jnp.arange(8)
    x = jax.jit(make_generate(e, (2,)))(params, {"index": index})
    prior, walk, _ = jax.random.split(e.keys().samples, 3)
    denoise = diffjax.denoiser(functools.partial(e.apply, params), schedule, config.target)

    @jax.jit
    def draw():
        x_1 = diffjax.prior_sample(keys.fold_in(prior, index), schedule, (8, 2))
        ts = diffjax.samplers.TIMES[config.sampling.grid](schedule, config.sampling.steps)
        walker = diffjax.ddim(denoise, schedule)
        return diffjax.sample(keys.fold_in(walk, index), walker, x_1, ts)[0]

    drawn = draw()
    np.testing.assert_allclose(x, drawn, rtol=1e-4, atol=1e-4)

    points = jax.random.normal(jax.random.key(0), (8, 2))
    bound = jax.jit(variational_bound(e, None, 4))(params, {"index": index, "x": points})
    key = jax.random.split(e.keys().held_out, 3)[0]
    elbo = functools.partial(diffjax.elbo, levels=None, samples=4)
    expected = jax.jit(lambda: elbo(keys.fold_in(key, index), denoise, schedule, points).nats)()
    np.testing.assert_allclose(bound, expected, rtol=1e-3)


def test_every_sampler_grid_and_guidance_takes_a_schedule_that_is_traced(learned):
    config, params = learned
    walks = [
        *(Walk(name) for name, row in diffjax.SAMPLERS.items() if not row.two_times),
        *(Walk(times=times) for times in diffjax.samplers.TIMES),
        Walk(guidance=("dynamic_threshold", "within:low=-1,high=1")),
    ]
    for walk in walks:
        sampling = dataclasses.replace(config.sampling, **(vars(walk) | {"steps": 2}))
        generate = make_generate(resolve(dataclasses.replace(config, sampling=sampling)), (2,))
        out = jax.eval_shape(generate, params, {"index": jax.ShapeDtypeStruct((8,), jnp.int32)})
        assert out.shape == (8, 2), walk


def test_a_learned_schedule_is_kept_and_a_denoiser_needs_it(learned, tmp_path):
    config, params = learned
    e = resolve(dataclasses.replace(config, averages=(0.1,), snapshot_every=20))
    (snapshot,) = averaging.snapshots_of(e.optimizer.init(params), (0.1,), "float32")
    averaging.write_snapshot(tmp_path, 0, snapshot)
    kept = averaging.read_snapshot(tmp_path / averaging.name(0, 0.1)).params
    assert jax.tree.map(np.shape, kept) == jax.tree.map(np.shape, params)
    weights.save(tmp_path / "moons.safetensors", params, config)
    apply, read, config = checkpoint.load(tmp_path / "moons.safetensors")
    jax.tree.map(np.testing.assert_array_equal, read, params)
    network = functools.partial(apply, read)
    with pytest.raises(ValueError, match="needs its parameters; take with_parameters"):
        resolve(config).denoiser(network)
    denoise = with_parameters(resolve(config), read).denoiser(network)
    assert denoise.schedule.log_snr(0.0) == params["schedule"]["log_snr_max"]


def test_a_fixed_schedule_has_no_parameters_and_is_the_same_object():
    e = resolve(moons(schedule="cosine", schedule_options={}))
    params = e.init(jax.random.key(0), (2,))
    assert "schedule" not in params and with_parameters(e, params) is e
    alone = resolve(moons(schedule="cosine", schedule_options={}, weighting="unit"))
    assert jax.tree.structure(e.optimizer.init(params)) == jax.tree.structure(
        alone.optimizer.init(params)
    )


def test_the_schedule_neither_decays_nor_is_clipped_with_the_network(learned):
    """With gradients of zero, decay alone moves the network, and nothing the schedule; a large
    gradient of the schedule does not make the step of the network smaller."""
    optimizer = dataclasses.replace(
        moons().optimizer, weight_decay=0.1, clip=1.0, schedule_factor=3.0
    )
    e, params = resolve(moons(optimizer=optimizer)), learned[1]
    zero = jax.tree.map(np.zeros_like, params)
    step = jax.jit(lambda grads: e.optimizer.update(grads, e.optimizer.init(params), params)[0])
    still = step(zero)
    assert not any(jnp.any(x) for x in jax.tree.leaves(still.pop("schedule")))
    assert any(jnp.any(x) for x in jax.tree.leaves(still))
    large = zero | {"schedule": jax.tree.map(lambda x: np.full_like(x, 1e9), params["schedule"])}
    moved = step(large)
    for x in jax.tree.leaves(moved.pop("schedule")):
        np.testing.assert_allclose(x, -3e-2, rtol=1e-3)  # the first step of Adam
    jax.tree.map(np.testing.assert_array_equal, moved, still)
