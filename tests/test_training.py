import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, PartitionSpec

import train
from catalogue import slow
from diffjax import averages, data, keys, models
from diffjax.averages import Snapshot
from diffjax.evaluation.likelihoods import variational_bound
from diffjax.evaluation.sampling import make_generate
from diffjax.experiment import Config, Optimizer, command_line, resolve
from diffjax.experiment.functions import initial_state
from diffjax.training import (
    Losses,
    averaging,
    ema_warmup,
    init_state,
    runners,
    train_step,
)
from diffjax.training.step import projected, several_steps


def quadratic(key, params, batch):
    """Squared distances of params to x plus a little noise per example; their gradient is known."""
    noise = jax.vmap(lambda k: jax.random.normal(k, (2,)))(keys.fold_in(key, batch["index"]))
    return jnp.sum((params[None] - batch["x"] - 0.1 * noise) ** 2, axis=-1)


def batch_of(n, seed=0):
    x = np.random.default_rng(seed).standard_normal((n, 2)).astype(np.float32)
    return {"x": x, "index": np.arange(n, dtype=np.int32)}


def test_a_step_is_gradient_descent_on_the_mean_and_follows_it_with_an_average():
    tx = optax.sgd(0.1)
    state = init_state(jax.random.key(0), jnp.array([3.0, -1.0]), tx)
    still = lambda key, params, batch: jnp.sum((params[None] - batch["x"]) ** 2, -1)
    batch = batch_of(8)
    new, metrics = train_step(state, batch, loss_fn=still, tx=tx, ema_decay=0.75)
    gradient = 2 * (np.array([3.0, -1.0]) - batch["x"].mean(0))
    np.testing.assert_allclose(new.params, [3.0, -1.0] - 0.1 * gradient, rtol=1e-6)
    np.testing.assert_allclose(
        new.ema_params, 0.75 * np.array([3.0, -1.0]) + 0.25 * np.asarray(new.params), rtol=1e-6
    )
    np.testing.assert_allclose(metrics["grad_norm"], np.linalg.norm(gradient), rtol=1e-6)
    assert int(new.step) == 1


@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_optimiser_that_needs_the_loss_gets_its_mean(accumulate):
    """A loss that stays at 2 is a plateau: the learning rate falls tenfold with each step."""
    plateau = optax.contrib.reduce_on_plateau(factor=0.1, patience=1)
    tx = optax.chain(optax.sgd(1.0), plateau)
    loss_fn = lambda key, params, batch: jnp.array([1.0, 3.0])[batch["index"] % 2] + 0 * params
    state = init_state(jax.random.key(0), jnp.zeros(()), tx)
    batch = {"index": jnp.arange(4)}
    options = dict(loss_fn=loss_fn, tx=tx, ema_decay=0.9, accumulate=accumulate)
    for _ in range(4):
        state, _ = train_step(state, batch, **options)
    (found,) = [
        leaf
        for leaf in jax.tree.leaves(state.opt_state, is_leaf=lambda x: hasattr(x, "best_value"))
        if hasattr(leaf, "best_value")
    ]
    assert float(found.best_value) == 2.0
    np.testing.assert_allclose(found.scale, 1e-3, rtol=1e-5)


@pytest.mark.parametrize("density", ["uniform", "normal"])
def test_the_held_out_loss_is_the_mean_over_uniform_times_under_every_density(density):
    """An untrained network predicts eps as 0, so that the loss is its weight in expectation."""
    model, n = models.MLPConfig(width=8), 4096
    e = resolve(Config(model=model, target="eps", weighting="min_snr", density=density))
    batch = {"index": jnp.arange(n), "x": jnp.zeros((n, 2))}
    params = e.init(jax.random.key(0), (2,))
    seen = train.make_loss(e, None, n)(jax.random.key(1), params, batch, e.times.init()).seen
    log_snr = e.schedule.log_snr((jnp.arange(n) + 0.5) / n)
    expected = e.weighting(log_snr, None).mean()
    assert float(seen["corrected"].mean()) == pytest.approx(float(expected), rel=0.05)


def test_random_features_that_are_not_trained_do_not_decay():
    model = models.EDM2UNetConfig(width=8, mults=(1,), blocks=1, attention=(), head_width=8)
    optimizer = Optimizer(learning_rate=0.01, warmup=0, weight_decay=0.1)
    e = resolve(Config(model=model, optimizer=optimizer))
    params = e.init(jax.random.key(0), (8, 8, 1)) | {"other": jnp.ones(3)}
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(e.optimizer.update)(zero, e.optimizer.init(params), params)
    for name in ("frequencies", "phases"):
        assert not updates[name].any() and params[name].any()
    assert (updates["other"] < 0).all()


def test_a_projected_optimiser_gets_the_loss():
    tx = optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(patience=1))
    tx = projected(tx, lambda params: params)
    state = init_state(jax.random.key(0), jnp.ones(2), tx)
    state, _ = train_step(state, batch_of(4), loss_fn=quadratic, tx=tx, ema_decay=0.9)
    assert int(state.step) == 1


@pytest.mark.parametrize("time_steps", [None, 4])
def test_no_dtype_is_promoted_by_chance(time_steps):
    """With `JAX_NUMPY_DTYPE_PROMOTION=strict`."""
    model = models.MLPConfig(width=8, blocks=1)
    e = resolve(Config(model=model, batch_size=8, time_steps=time_steps))
    batch = {"index": jnp.arange(8), "x": jnp.zeros((8, 2))}
    with jax.numpy_dtype_promotion("strict"):
        state = jax.eval_shape(initial_state(e, (2,)))
        jax.eval_shape(train.make_step(e, train.make_loss(e, None)), state, batch)
        jax.eval_shape(variational_bound(e, 17, 4), state.params, batch)
        jax.eval_shape(make_generate(e, (2,)), state.params, batch)


def test_the_average_converges_to_constant_parameters_without_bias():
    tx = optax.sgd(0.0)
    state = init_state(jax.random.key(0), jnp.ones(2), tx)
    for _ in range(5):
        state, _ = train_step(
            state, batch_of(4), loss_fn=quadratic, tx=tx, ema_decay=ema_warmup(0.9999)
        )
    np.testing.assert_allclose(state.ema_params, 1, rtol=1e-6)


def test_ema_warmup_starts_short_and_ends_at_its_decay():
    decay = ema_warmup(0.99)
    np.testing.assert_allclose([decay(0), decay(10), decay(10**6)], [0.1, 11 / 20, 0.99], rtol=1e-6)
    with pytest.raises(ValueError, match="must be in"):
        ema_warmup(1.0)


@pytest.mark.parametrize("warmup", [True, False])
def test_the_weights_of_a_moving_average_with_and_without_warm_up(warmup):
    """Parameters that are another unit vector after each step show the weight of each in it."""
    n = 20
    e = resolve(Config(ema=0.995, ema_warmup=warmup))
    # The gradient of the loss is the last parameters minus the next.
    loss_fn = lambda key, params, batch: (params @ (params / 2 - batch["x"][0]))[None]
    state = init_state(jax.random.key(0), jnp.eye(n + 1)[0], optax.sgd(1.0))
    step = jax.jit(
        functools.partial(train_step, loss_fn=loss_fn, tx=optax.sgd(1.0), ema_decay=e.ema_decay)
    )
    for i in range(1, n + 1):
        state, _ = step(state, {"x": jnp.eye(n + 1)[i][None], "index": jnp.arange(1)})
    decays = [min(0.995, (1 + k) / (10 + k)) if warmup else 0.995 for k in range(n)]
    later = [np.prod(decays[i:]) for i in range(n + 1)]  # what is left of an entry made at i
    made = [1.0, *(1 - np.array(decays))]
    np.testing.assert_allclose(state.ema_params, np.multiply(made, later), rtol=1e-4, atol=1e-6)
    assert (state.ema_params[0] > 0.9) == (not warmup)


def test_power_function_averages_count_the_updates_that_were_made():
    """Weights are powers of i / t, where a batch that is skipped, as every third is, counts not."""
    stds, sound = (0.1, 0.05), [k % 3 != 1 for k in range(30)]
    tx = averaging.averaging(optax.sgd(0.1), stds)
    state = init_state(jax.random.key(0), jnp.array([3.0, -1.0]), tx)
    step = functools.partial(train_step, loss_fn=quadratic, tx=tx, ema_decay=0.9)
    step = jax.jit(functools.partial(step, skip_nonfinite=True))
    plain = init_state(jax.random.key(0), jnp.array([3.0, -1.0]), optax.sgd(0.1))
    thetas = []
    for k, good in enumerate(sound):
        batch = batch_of(4, k)
        state, _ = step(state, batch if good else batch | {"x": batch["x"] * np.nan})
        thetas += [np.asarray(state.params)] if good else []
    assert int(state.step) == 30 and int(state.opt_state.updates) == len(thetas) == 20
    i = np.arange(21) / 20
    for std, average in zip(sorted(stds), state.opt_state.averages, strict=True):
        weights = np.diff(i ** (averages.gamma_of(std) + 1))
        np.testing.assert_allclose(average, weights @ np.array(thetas), rtol=1e-5)
    assert jax.tree.structure(plain.opt_state) == jax.tree.structure(state.opt_state.inner)


@pytest.mark.parametrize("make", [runners.pmap, lambda: runners.sharded(0)], ids=["pmap", "fsdp"])
def test_averages_are_where_the_parameters_are_and_the_same(make, monkeypatch):
    """Under fsdp each device has its part of them, and a snapshot on the host is whole."""
    monkeypatch.setattr(runners, "SMALL", 16)
    tx = averaging.averaging(optax.sgd(0.1), (0.1,))
    step = functools.partial(train_step, tx=tx, ema_decay=0.9)
    step = functools.partial(
        step, loss_fn=lambda key, p, batch: jnp.mean((p["w"][None] - batch["x"]) ** 2, -1)
    )
    init = lambda: init_state(jax.random.key(0), {"w": jnp.arange(16.0)}, tx)
    runner = make()
    state, alone, mapped = runner.init(init), init(), runner.step(step)
    for k in range(3):
        x = np.random.default_rng(k).standard_normal((8, 16)).astype(np.float32)
        batch = {"x": x, "index": np.arange(8, dtype=np.int32)}
        state, alone = mapped(state, runner.put(batch))[0], step(alone, batch)[0]
    (average,) = state.opt_state.averages
    assert average["w"].sharding.is_equivalent_to(state.params["w"].sharding, 1)
    (snapshot,) = averaging.snapshots_of(state.opt_state, (0.1,), "float32")
    assert snapshot.time == 3
    np.testing.assert_allclose(snapshot.params["w"], alone.opt_state.averages[0]["w"], rtol=1e-6)


def test_a_snapshot_is_read_back_or_refused(tmp_path):
    snapshot = Snapshot(7, 0.1, {"a": {"b": np.arange(3, dtype=np.float32)}, "c": np.float16([2])})
    averaging.write_snapshot(tmp_path, 9, snapshot)
    path = tmp_path / averaging.name(9, 0.1)
    assert [p.name for p in tmp_path.iterdir()] == ["00000009-0.1.safetensors"]
    again = averaging.read_snapshot(path)
    assert again[:2] == (7, 0.1) == (averaging.read_time(path), 0.1)
    jax.tree.map(np.testing.assert_array_equal, again.params, snapshot.params)
    path.rename(tmp_path / averaging.name(8, 0.1))
    with pytest.raises(ValueError, match="is damaged"):
        averaging.read_snapshot(tmp_path / averaging.name(8, 0.1))
    whole = (tmp_path / averaging.name(8, 0.1)).read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))  # a bit of the last number
    with pytest.raises(ValueError, match="is damaged"):
        averaging.read_snapshot(path)
    for text in (b"", b"{", whole[:100]):
        path.write_bytes(text)
        with pytest.raises(ValueError, match="is not a snapshot"):
            averaging.read_snapshot(path)


def test_float16_that_overflows_is_not_stored(tmp_path):
    state = averaging.Averaging((), jnp.int32(3), ({"w": jnp.array([1.0, 7e4])},))
    (snapshot,) = averaging.snapshots_of(state, (0.1,), "float16")
    with pytest.raises(OSError, match="w has numbers that float16 does not hold"):
        averaging.write_snapshot(tmp_path, 3, snapshot)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_changes_nothing(parts):
    tx = optax.adam(0.1)
    state = init_state(jax.random.key(0), jnp.ones(2), tx)
    run = functools.partial(train_step, loss_fn=quadratic, tx=tx, ema_decay=0.9)
    whole, metrics = run(state, batch_of(8))
    split, split_metrics = run(state, batch_of(8), accumulate=parts)
    np.testing.assert_allclose(whole.params, split.params, rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"], split_metrics["loss"], rtol=1e-6)
    with pytest.raises(ValueError, match="a batch of 8 per device does not split into 3"):
        run(state, batch_of(8), accumulate=3)


@pytest.mark.parametrize("layout", ["parts", "pmap", "shuffled"])
def test_what_a_method_remembers_is_the_same_on_every_layout(layout):
    """Losses reach `remember` whole and in the order of the global batch."""
    tx = optax.sgd(0.1)
    state = init_state(jax.random.key(0), jnp.ones(2), tx, extra=jnp.zeros(16))

    def loss_fn(key, params, batch, extra):
        losses = quadratic(key, params, batch)
        return Losses(losses + 0 * extra[0], {"loss": losses, "index": batch["index"]})

    remember = lambda extra, seen: 0.5 * extra + seen["loss"] * (1 + seen["index"])
    run = functools.partial(train_step, loss_fn=loss_fn, tx=tx, ema_decay=0.9, remember=remember)
    batch = batch_of(16)
    expected, _ = run(state, batch)
    assert jnp.abs(expected.extra).min() > 0
    if layout == "parts":
        got, _ = run(state, batch, accumulate=4)
    elif layout == "shuffled":
        got, _ = run(state, {k: v[::-1] for k, v in batch.items()})
    else:
        step = jax.pmap(
            functools.partial(run, axis_name="batch"), "batch", in_axes=(None, 0), out_axes=None
        )
        got, _ = step(state, {k: v.reshape(8, 2, *v.shape[1:]) for k, v in batch.items()})
    np.testing.assert_allclose(got.extra, expected.extra, rtol=1e-6)


def test_an_option_of_a_plain_loss_keeps_its_default():
    """Only arguments without a default are the step's to give."""

    def loss(key, params, batch, scale=1.0):
        return scale * quadratic(key, params, batch)

    tx = optax.sgd(0.1)
    state = init_state(jax.random.key(0), jnp.zeros(2), tx, extra=7.0)
    step = functools.partial(train_step, state, batch_of(8), tx=tx, ema_decay=0.9)
    plain, with_option = (step(loss_fn=f)[1] for f in (quadratic, loss))
    assert plain["loss"] == with_option["loss"]


@pytest.mark.parametrize("parts", [1, 2])
def test_a_plain_loss_and_the_same_one_as_losses_give_the_same_step(parts):
    tx = optax.adam(0.1)
    state = init_state(jax.random.key(0), jnp.ones(2), tx, extra=jnp.arange(3.0))
    as_losses = lambda key, params, batch, extra: Losses(quadratic(key, params, batch))
    run = functools.partial(train_step, tx=tx, ema_decay=0.9, accumulate=parts)
    plain, plain_metrics = run(state, batch_of(8), loss_fn=quadratic)
    named, named_metrics = run(state, batch_of(8), loss_fn=as_losses)
    raw = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    same = lambda a, b: np.testing.assert_array_equal(raw(a), raw(b))
    jax.tree.map(same, (plain, plain_metrics), (named, named_metrics))
    assert not np.array_equal(plain.params, state.params)


def test_every_step_draws_anew():
    tx = optax.sgd(0.0)
    state = init_state(jax.random.key(0), jnp.ones(2), tx)
    losses = []
    for _ in range(3):
        state, metrics = train_step(state, batch_of(4), loss_fn=quadratic, tx=tx, ema_decay=0.9)
        losses.append(float(metrics["loss"]))
    assert len(set(losses)) == 3


@pytest.mark.faults
def test_a_score_network_is_trained_as_the_eps_network_unless_it_is_raw():
    """Divided by sigma, its output is that of eps with the other sign, and so is each update."""
    base = command_line.from_file("configs/two_moons.py")
    train_set, _ = data.load("two_moons")

    def losses(**changes):
        model = models.MLPConfig(width=16, blocks=1)
        e = resolve(dataclasses.replace(base, batch_size=64, model=model, **changes))
        e = e._replace(optimizer=optax.adam(2e-3))
        state, found = initial_state(e, (2,))(), []
        step = jax.jit(train.make_step(e, train.make_loss(e, None)))
        for k in range(20):
            state, metrics = step(state, data.train_batch(train_set, 0, k, 64))
            found.append(float(metrics["loss"]))
        return np.array(found)

    of_eps = losses(target="eps")
    np.testing.assert_allclose(losses(target="score"), of_eps, rtol=1e-4)
    assert abs(losses(target="score", unit_output=False) / of_eps - 1).max() > 0.01


@pytest.mark.parametrize("target", ["eps", *slow("x_0", "score")])
def test_training_learns_the_data(target):
    """300 steps on two moons: the loss falls, and samples lie near the data, with every target."""
    config = dataclasses.replace(
        command_line.from_file("configs/two_moons.py"),
        target=target,
        batch_size=256,
        model=models.MLPConfig(width=64, blocks=2),
    )
    e = resolve(config)._replace(optimizer=optax.adam(2e-3))
    state = init_state(jax.random.key(1), e.init(jax.random.key(0), (2,)), e.optimizer)
    step = jax.jit(train.make_step(e, train.make_loss(e, None)))
    train_set, _ = data.load("two_moons")
    losses = []
    for k in range(300):
        state, metrics = step(state, data.train_batch(train_set, 0, k, 256))
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-50:]) < 0.75 * losses[0]
    generate = jax.jit(make_generate(e, (2,)))
    x = np.asarray(generate(state.params, {"index": np.arange(1000), "label": None}))
    real = train_set.x[:4000]
    nearest = np.sqrt(((x[:, None] - real[None]) ** 2).sum(-1).min(1))
    noise = np.sqrt(
        ((np.random.default_rng(0).uniform(-1, 1, (1000, 2))[:, None] - real) ** 2).sum(-1).min(1)
    )
    assert np.mean(nearest) < 0.35 * np.mean(noise)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_the_average_of_half_precision_parameters_moves_and_keeps_its_dtype(dtype):
    """1 - 0.999^n in closed form; in half precision each step would round to nothing."""
    tx = optax.sgd(0.0)
    state = init_state(jax.random.key(0), jnp.ones(2, dtype), tx)
    state = state.replace(ema_params=jnp.zeros_like(state.ema_params))
    step = functools.partial(
        train_step,
        loss_fn=lambda key, params, batch: jnp.zeros(len(batch["x"])) * params.sum(),
        tx=tx,
        ema_decay=lambda step: jnp.minimum(0.999, 1.0 - 0.0 * step),
    )
    steps = jax.jit(several_steps(step))
    batches = jax.tree.map(lambda x: np.repeat(x[:, None], 2000, 1), batch_of(2))
    new, _ = steps(state, batches)
    assert (new.ema_params.dtype, new.params.dtype) == (jnp.float32, dtype)
    np.testing.assert_allclose(new.ema_params, 1 - 0.999**2000, rtol=1e-4)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("remember", [None, lambda extra, seen: seen["loss"]])
@pytest.mark.parametrize("check_vma", [True, False])
def test_a_step_under_shard_map_is_that_of_one_device(check_vma, accumulate, remember):
    mesh = Mesh(np.array(jax.devices()[:4]), "i")
    tx = optax.sgd(0.1)

    def loss_fn(key, params, batch, extra):
        loss = quadratic(key, params, batch)
        return Losses(loss, {"loss": loss})

    step = functools.partial(
        train_step,
        loss_fn=loss_fn,
        tx=tx,
        ema_decay=0.9,
        accumulate=accumulate,
        remember=remember,
        measure=lambda seen: {"sum": seen["loss"].sum()},
    )
    state = init_state(jax.random.key(0), jnp.array([3.0, -1.0]), tx, jnp.zeros(8))
    over, whole = PartitionSpec("i"), PartitionSpec()
    mapped = jax.shard_map(
        functools.partial(step, axis_name="i"),
        mesh=mesh,
        in_specs=(whole, over),
        out_specs=whole,
        check_vma=check_vma,
    )
    expected, got = step(state, batch_of(8)), jax.jit(mapped)(state, batch_of(8))
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(got), strict=True):
        if not jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            np.testing.assert_allclose(a, b, rtol=1e-5)


@pytest.mark.faults
def test_the_held_out_times_are_spread_over_all_examples_held_out():
    """Whatever the size of a batch, they cover the interval: one time in each n-th of it."""
    e = resolve(Config(batch_size=32))
    e = e._replace(objective=lambda *_: lambda *args, t, **_: t)
    for n in (8, 18, 32, 40, 96):
        loss = train.make_loss(e, None, n)
        index = np.arange(n)
        batch = {"x": np.zeros((n, 8, 8, 1)), "index": index, "label": index}
        t = loss(e.keys().held_out, {}, batch, ()).loss  # the objective here is the time itself
        assert sorted(np.ceil(np.asarray(t) * n).tolist()) == list(range(1, n + 1))
