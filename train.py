"""Train a diffusion model: one story, from a command to a picture. Fork it, change one thing.

    python train.py                                              # the handwritten digits
    python train.py --config=configs/fashion_mnist.py --workdir=runs/fashion
    python train.py --config.target=score --config.steps=4000    # any field of the config
    python train.py --help                                       # all of them

The run's directory gets config.json, metrics.jsonl, samples.png, loss.png and checkpoints/. The
same command continues a run that was stopped, exactly where it was.
"""

import contextlib
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax import checkpoint, data, evaluation, experiment, keys, metrics, parallel, plots
from diffjax.config import Config, parse
from diffjax.models import MODELS
from diffjax.training import Batch, ema_warmup, init_state, train_step


def make_loss(
    config: Config, network: Callable, times: experiment.Times, levels: int | None
) -> Callable[..., Any]:
    """The loss of each example, a pure function; this is the place to try an idea.

    Example i draws from `key` folded with its position in the global batch, so that nothing
    depends on how the batch is split over devices.
    """
    loss = experiment.make_objective(config, levels)  # diffjax.diffusion_loss, or hybrid_loss
    schedule = experiment.make_schedule(config)
    weighting = experiment.make_weighting(config)

    def loss_fn(key, params, batch, extra=(), train=True):
        key_times, key_noise, key_label, key_dropout = jax.random.split(key, 4)
        index = batch["index"]
        t, weight = times.draw(key_times, extra, index)

        cond = None
        if config.model.labels:
            cond = {"label": batch["label"]}
            if train and config.model.null_label:
                drop = jax.vmap(lambda k: jax.random.bernoulli(k, config.label_drop))(
                    keys.fold_in(key_label, index)
                )
                cond["label"] = jnp.where(drop, config.model.labels, batch["label"])

        net = functools.partial(network, params)
        if train and config.model.dropout:
            net = functools.partial(net, dropout=keys.fold_in(key_dropout, index))
        key_noise, given = keys.fold_in(key_noise, index), (batch["x"], cond, weighting, t)
        each = loss(key_noise, net, schedule, config.target, *given, steps=config.time_steps)
        return (weight * each, (t, each)) if train and times.remember else each

    return loss_fn


def train(config: Config, workdir: Path) -> None:
    """Train, or go on training, until `config.steps`."""
    began = time.perf_counter()

    # Whatever is wrong with the input is said now, before anything is compiled.
    with plainly():
        experiment.check(config)
        parallel.setup(config.batch_size, config.optimizer.accumulate)
        parallel.check_batch(config.batch_size, config.optimizer.accumulate)
        train_set, test_set = data.load(config.data.name, config.data.path)
        experiment.check_data(config, train_set, test_set)
        manager = checkpoint.open_run(workdir, config)

    # The network, its loss and its optimiser: pure functions.
    network = experiment.make_network(config)
    shape = train_set.x.shape[1:]
    times = experiment.make_times(config)
    loss_fn = make_loss(config, network, times, data.levels(config.data.name, train_set))
    learning_rate = jax.jit(experiment.make_learning_rate(config.optimizer))
    tx = experiment.make_optimizer(config.optimizer)

    streams = experiment.make_streams(config)

    def initial_state():
        x, cond = jnp.zeros((1, *shape)), {"label": jnp.zeros(1, jnp.int32)}
        module = MODELS[type(config.model)](config.model)
        params = module.init(streams.params, x, jnp.zeros(1), cond)["params"]
        return init_state(streams.train, params, tx, times.init())

    # The same functions on every device there is.
    runner = parallel.RUNNERS[config.parallel]()
    step_fn = runner.step(
        functools.partial(
            train_step,
            loss_fn=loss_fn,
            tx=tx,
            ema_decay=ema_warmup(config.ema),
            accumulate=config.optimizer.accumulate,
            remember=times.remember,
        )
    )
    held_out_fn = runner.map(
        lambda params, batch: loss_fn(streams.held_out, params, batch, times.init(), train=False)
    )
    generate_fn = runner.map(experiment.make_generate(config, network, shape))

    def in_batches(mapped: Callable, batch: Batch) -> np.ndarray:
        return parallel.in_batches(runner, mapped, state.ema_params, batch, config.batch_size)

    def generate(n: int) -> tuple[np.ndarray, np.ndarray | None]:
        index = np.arange(n, dtype=np.int32)
        label = index % config.model.labels if config.model.labels else None
        return in_batches(generate_fn, {"index": index, "label": label}), label

    def draw() -> None:
        classes = config.model.labels or config.sampling.columns
        x, _ = generate(classes * config.sampling.columns)
        plots.save_samples(x, config.model.labels, workdir / "samples.png")
        plots.save_loss_curve(metrics.read(workdir), workdir / "loss.png")

    state = runner.replicate(initial_state)
    state = checkpoint.restore(manager, state) or state
    start = int(state.step)
    held_out = data.take(test_set, np.arange(min(len(test_set.x), 1024)))
    held_out["index"] = np.arange(len(held_out["x"]), dtype=np.int32)
    slots = parallel.local_slots(config.batch_size)

    devices = f"{jax.device_count()} {jax.default_backend()} devices"
    with manager, metrics.Recorder(workdir, start, config.steps, f"{devices}  ") as recorder:
        count = sum(x.size for x in jax.tree.leaves(state.params))
        recorder.say(
            f"{workdir}: {config.data.name}, target {config.target}, {count:,} parameters, "
            f"{devices} by {config.parallel}"
        )
        if start:
            recorder.say(f"resumed from the checkpoint of step {start} of {config.steps}")
        window = []  # metrics still on the devices: nobody looks at them between log points

        for step in range(start, config.steps):
            batch = data.train_batch(
                train_set, config.seed, step, config.batch_size, slots, config.data.flip
            )
            state, step_metrics = step_fn(state, runner.put(batch))
            window.append(step_metrics)

            done = step + 1
            last = done == config.steps
            if done == start + 1:
                jax.block_until_ready(step_metrics)
                recorder.say(f"compiled, first step after {time.perf_counter() - began:.0f} s")
                recorder.start(done)
            if done % config.log_every == 0 or last:
                try:
                    row = metrics.summary(window, done, learning_rate)
                except FloatingPointError as error:
                    manager.wait_until_finished()
                    sys.exit(f"error: {error}; the last checkpoint: {manager.latest_step()}")
                window = []
                if done % config.eval_every == 0 or last:
                    row["eval_loss"] = float(in_batches(held_out_fn, held_out).mean())
                recorder.write(done, config.batch_size, **row)
            if done % config.save_every == 0 or last:
                checkpoint.save(manager, done, state)
            if done % config.sample_every == 0 and not last:
                draw()
                recorder.start(done)

        draw()
        if config.sampling.score:
            real = data.in_range(data.Dataset(train_set, test_set))
            scores = evaluation.score(*generate(config.sampling.score), *real)
            (workdir / "scores.json").write_text(json.dumps(scores) + "\n")
            recorder.say("  ".join(f"{name} {value:.3f}" for name, value in scores.items()))
        recorder.say(f"{time.perf_counter() - began:.0f} s in all; see {workdir}/samples.png")


@contextlib.contextmanager
def plainly() -> Iterator[None]:
    """Turn an error in what the user gave into one line instead of a traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    train(*parse(sys.argv[1:]))
