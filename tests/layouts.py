"""The same training on any layout of devices, for tests with many devices or many processes.

As a script it is one process of many: `python layouts.py OUT.npz --distributed.coordinator=...`.
"""

import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

import train
from diffjax import data, keys, models
from diffjax.evaluation.sampling import make_generate
from diffjax.experiment import Data, FlowMap, command_line, resolve
from diffjax.experiment.functions import initial_state
from diffjax.training import Losses, distributed, init_state, runners, train_step

BATCH = 16
CONFIG = dataclasses.replace(
    command_line.from_file("configs/digits.py:smoke"),
    batch_size=BATCH,
    data=Data("digits", flip=True),
    label_drop=0.5,
    model=models.UNetConfig(
        width=8,
        mults=(1,),
        blocks=1,
        attention=(8,),
        groups=4,
        dropout=0.2,
        labels=10,
        null_label=True,
    ),
)
E = resolve(CONFIG)
LAYOUTS = {
    "pmap": lambda: runners.pmap(),
    "sharded": lambda: runners.sharded(),
    "fsdp": lambda: runners.sharded(0),
    "two axes": lambda: runners.sharded(2),
}


def batch_of(runner, step):
    """This process' part of the batch of a step, on its devices."""
    train_set, _ = data.load("digits")
    slots = runner.slots(BATCH)
    return runner.put(data.train_batch(train_set, 0, step, BATCH, slots, CONFIG.data.flip))


def make_step(loss_fn, remember, accumulate=1):
    """A training step of `E`'s optimiser."""
    return functools.partial(
        train_step,
        loss_fn=loss_fn,
        tx=E.optimizer,
        ema_decay=0.9,
        accumulate=accumulate,
        remember=remember,
        measure=lambda seen: {},
    )


def training(accumulate=1):
    """The initial state of `CONFIG`, and a training step with the loss of train.py."""
    step = make_step(train.make_loss(E, None), E.times.remember, accumulate)
    return initial_state(E, (8, 8, 1)), step


def whole(x):
    """An array on the host, gathered from the processes if it is split over them."""
    split = not (x.is_fully_addressable or x.is_fully_replicated)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True) if split else x)


def draws(runner, accumulate=1):
    """A digest `[batch]` of all that each example draws in a training step.

    The loss function is that of train.py, with an objective and a network that only record their
    arguments.
    """

    def bits(x):
        words = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
        weight = 2 * jnp.arange(words[0].size, dtype=jnp.uint32) + 1
        return (words.reshape(len(x), -1) * weight[None]).sum(1, dtype=jnp.uint32)

    def network(params, x_t, log_snr, cond, dropout):
        return jax.vmap(lambda k: jax.random.bernoulli(k, 0.5, (8,)))(dropout)

    digests = []

    def record(key, net, schedule, target, x, cond, weight, t, steps):
        dropped = net(x, None, cond)
        noise = keys.normal(key, x.shape)
        digests.append(jnp.stack([bits(d) for d in (x, noise, t, cond["label"], dropped)], 1))
        return jnp.zeros(len(x))

    recording = E._replace(objective=lambda *_: record, apply=network)
    make_losses = train.make_loss(recording, None)

    def loss_fn(key, params, batch, extra):
        losses = make_losses(key, params, batch, extra)
        return Losses(losses.loss, {"digest": digests.pop()})

    step = make_step(loss_fn, lambda extra, seen: seen["digest"], accumulate)
    nothing, extra = jnp.zeros(()), jnp.zeros((BATCH, 5), jnp.uint32)
    init = lambda: init_state(E.keys().train, nothing, E.optimizer, extra)
    state, _ = runner.step(step)(runner.init(init), batch_of(runner, 3))
    return whole(state.extra)


def coupled_losses(runner, coupling):
    """The loss `[batch]` of each example, by index, of a network that says 0."""
    config = dataclasses.replace(CONFIG, coupling=coupling)
    return losses_of(runner, config, lambda params, x_t, log_snr, cond, dropout: 0 * x_t)


def map_losses(runner, identity):
    """The loss `[batch]` of each example, by index, of a flow map with dropout."""
    config = dataclasses.replace(
        CONFIG,
        objective="flow_map",
        target="v",
        flow_map=FlowMap(identity=identity, diagonal=0.25),
        model=dataclasses.replace(CONFIG.model, embedding="angle", two_times=True),
        sampling=dataclasses.replace(CONFIG.sampling, sampler="jump", guidance=()),
    )

    def network(params, x_t, log_snr, cond, dropout):  # of each pixel alone
        kept = jax.vmap(lambda k: jax.random.bernoulli(k, 0.5, x_t.shape[1:]))(dropout)
        level = jnp.tanh(log_snr - cond["log_snr_s"] / 2) + cond["label"]
        return kept * jnp.sin(x_t + level[:, None, None, None])

    return losses_of(runner, config, network)


def losses_of(runner, config, network):
    """The loss `[batch]` of each example, by index, in a training step with another network."""
    e = resolve(config)._replace(apply=network)
    loss_fn = train.make_loss(e, None, axis_name=runner.axis)
    step = make_step(loss_fn, lambda extra, seen: seen["loss"])
    init = lambda: init_state(E.keys().train, jnp.zeros(()), E.optimizer, jnp.zeros(BATCH))
    state, _ = runner.step(step)(runner.init(init), batch_of(runner, 3))
    return whole(state.extra)


def parameters(runner, steps=20, accumulate=1):
    """The parameters after some steps, by name, and the losses on the way."""
    init, step = training(accumulate)
    state, mapped = runner.init(init), runner.step(step)
    losses = []
    for k in range(steps):
        state, metrics = mapped(state, batch_of(runner, k))
        losses.append(np.asarray(metrics["loss"]))
    leaves = jax.tree_util.tree_leaves_with_path(state.params)
    named = {jax.tree_util.keystr(path): whole(x) for path, x in leaves}
    return named | {"losses": np.array(losses)}


def images(runner):
    """Sixteen samples of the network with its initial parameters."""
    init, generate = initial_state(E, (8, 8, 1)), runner.map(make_generate(E, (8, 8, 1)))
    index = np.arange(BATCH, dtype=np.int32)
    batch = {"index": index, "label": index % 10}
    return runners.in_batches(runner, generate, runner.init(init).params, batch, BATCH)


def assert_close(got, expected, where):
    """Every array is within 1e-6, except the bias of the keys of attention."""
    for name, value in expected.items():
        a, b = got[name], value
        if "qkv" in name and "bias" in name:
            # It has no gradient (softmax is shift invariant): Adam amplifies rounding.
            a, b = (np.delete(x.reshape(3, -1), 1, axis=0) for x in (a, b))
        np.testing.assert_allclose(a, b, atol=1e-6, err_msg=f"{where}: {name}")


def main(out, *words):
    """Compute what each layout draws and learns; the first process writes it."""
    which = dict(word.removeprefix("--distributed.").split("=") for word in words)
    count, process = int(which["processes"]), int(which["process"])
    distributed.setup(distributed.Distributed(which["coordinator"], count, process), BATCH)
    runners.SMALL = 64
    found = {}
    for name, make in LAYOUTS.items():
        runner = make()
        found[f"{name}/draws"] = draws(runner)
        found[f"{name}/images"] = images(runner)
        found[f"{name}/coupled"] = coupled_losses(runner, "immiscible")
        found[f"{name}/map"] = map_losses(runner, "eulerian")
        found |= {f"{name}/{k}": v for k, v in parameters(runner).items()}
    if jax.process_index() == 0:
        np.savez(out, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
