"""Train a diffusion model: one story, from a command to a picture. Fork it, change one thing.

    python train.py                                              # the handwritten digits
    python train.py --config=configs/fashion_mnist.py --workdir=runs/fashion
    python train.py --config.target=score --config.steps=4000    # any field of the config
    python train.py --help                                       # all of them

The run's directory gets config.json, metrics.jsonl, samples.png, loss.png and checkpoints/. The
same command continues a run that was stopped, exactly where it was, and trains on a pod as well.
"""

import functools
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from diffjax import (
    checkpoint,
    data,
    experiment,
    keys,
    metrics,
    parallel,
    plots,
    preemption,
    super_resolution,
    telemetry,
)
from diffjax.config import Config, parse, plainly
from diffjax.parallel import ALONE, Distributed
from diffjax.training import Batch

AHEAD = 16
"""Steps that the host may ask for ahead of the devices: with 32 under way, XLA's CPU devices can
wait for each other for ever."""


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
    condition = experiment.make_condition(config)

    def loss_fn(key, params, batch, extra=(), train=True):
        key_times, key_noise, key_cond, key_dropout = jax.random.split(key, 4)
        index = batch["index"]
        t, weight = times.draw(key_times, extra, index)
        cond = condition(keys.fold_in(key_cond, index), batch, train)

        net = functools.partial(network, params)
        if train and config.model.dropout:
            net = functools.partial(net, dropout=keys.fold_in(key_dropout, index))
        key_noise, given = keys.fold_in(key_noise, index), (batch["x"], cond, weighting, t)
        each = loss(key_noise, net, schedule, config.target, *given, steps=config.time_steps)
        return (weight * each, (t, each)) if train else each

    return loss_fn


def train(
    config: Config, workdir: Path, distributed: Distributed = ALONE, profile: int = 0
) -> None:
    """Train, or go on, to `config.steps`, in each process of a pod alike; trace `profile` steps."""
    began = time.perf_counter()

    # Whatever is wrong with the input is said now, before anything is compiled.
    with plainly():
        experiment.check(config)
        parallel.setup(distributed, config.batch_size, config.optimizer.accumulate)
        parallel.check_batch(config.batch_size, config.optimizer.accumulate)
        runner = parallel.RUNNERS[config.parallel](config.fsdp)
        train_set, test_set = experiment.load_data(config)
        experiment.check_data(config, train_set, test_set)
        checkpoints = checkpoint.open_run(workdir, config)

    # The network, its loss and its optimiser: pure functions.
    network = experiment.make_network(config)
    shape = train_set.x.shape[1:]
    times = experiment.make_times(config)
    loss_fn = make_loss(config, network, times, data.levels(config.data.name, train_set))
    learning_rate = jax.jit(experiment.make_learning_rate(config.optimizer))
    tx = experiment.make_optimizer(config.optimizer)
    initial_state = experiment.make_initial_state(config, shape, tx, times)
    streams = experiment.make_streams(config)

    # The same functions on every device there is.
    step_fn = runner.step(experiment.make_step(config, loss_fn, tx, times))
    held_out_fn = runner.map(
        lambda params, batch: loss_fn(streams.held_out, params, batch, times.init(), train=False)
    )
    generate_fn = runner.map(experiment.make_generate(config, network, shape))

    def in_batches(mapped: Callable, batch: Batch) -> np.ndarray:
        return parallel.in_batches(runner, mapped, state.ema_params, batch, config.batch_size)

    def generate(n: int) -> tuple[np.ndarray, Batch]:
        asked = experiment.ask(config, test_set, n)
        return in_batches(generate_fn, asked), asked

    def draw(step: int) -> None:
        rows = 1 if config.low is not None else config.model.labels or config.sampling.columns
        x, asked = generate(rows * config.sampling.columns)
        if config.low is not None:
            x, rows = super_resolution.beside(x, asked["x"], config.low), 4
        recorder.picture(step, "samples", plots.samples, x, rows)
        recorder.picture(step, "loss", plots.progress, metrics.read(workdir))

    devices = f"{jax.process_count()} x {jax.local_device_count()} {jax.default_backend()} devices"
    state = runner.init(initial_state)
    with plainly():
        state = checkpoints.restore(state) or state
        start = int(state.step)
        steps = experiment.make_steps(config, start)
        recorder = metrics.Recorder(workdir, start, config.steps, f"{devices}  ", config.writers)
    held_out = data.first(test_set, 1024)
    make = experiment.make_batch(config, train_set, runner.slots(config.batch_size))
    made = data.in_order(make, steps, config.data.workers)
    batches = data.prefetch(lambda _: runner.put(next(made)), steps)
    describe = functools.partial(experiment.describe_step, config, len(train_set.x))
    window = metrics.kept(workdir, start)  # nobody looks at metrics between log points

    told = plainly(FloatingPointError, checkpoint.UnwrittenError, data.UnreadableError)
    traced = telemetry.traced(workdir / "profile", range(start + 10, start + 10 + profile))
    with told, checkpoints, recorder, traced as trace, preemption.watch() as asked_to_stop:
        count = sum(x.size for x in jax.tree.leaves(state.params))
        what = f"{config.data.name}, target {config.target}, {count:,} parameters"
        recorder.say(f"{workdir}: {what}, {devices} by {config.parallel}")
        if start:
            recorder.say(f"resumed from the checkpoint of step {start} of {config.steps}")
        if advice := telemetry.advice():
            recorder.say(advice)

        for step, batch in zip(steps, recorder.meter.waited(batches), strict=True):
            if asked_to_stop(step // steps.step):
                recorder.check(window, step, config.skip_nonfinite, describe)
                recorder.keep(step, window)
                checkpoints.save(step, state)
                checkpoints.require()
                recorder.say(f"asked to stop: saved step {step}; the same command goes on")
                sys.exit(preemption.RESUME)
            state, step_metrics = step_fn(state, batch)
            window.append(step_metrics)
            if len(window) > AHEAD:
                jax.block_until_ready(window[-AHEAD])

            done = step + steps.step
            last = done == config.steps
            row = {}
            trace(done, step_metrics)
            if step == start:
                jax.block_until_ready(step_metrics)
                recorder.say(f"compiled, first step after {time.perf_counter() - began:.0f} s")
                recorder.meter.flops = runner.flops(step_fn, state, batch)
                recorder.start(done)
            if done % config.log_every == 0 or last:
                recorder.check(window, done, config.skip_nonfinite, describe)
                row = metrics.summary(window, done, learning_rate)
                window = []
                if done % config.eval_every == 0 or last:
                    row["eval_loss"] = float(in_batches(held_out_fn, held_out).mean())
                recorder.write(done, config.batch_size, **row)
            if done % config.save_every == 0 or last:
                checkpoints.save(done, state, row.get("eval_loss", math.inf))
            if done % config.sample_every == 0 and not last:
                draw(done)
                recorder.start(done)

        draw(config.steps)
        if config.sampling.score:
            x, asked = generate(config.sampling.score)
            scores = experiment.score(config, data.Dataset(train_set, test_set), asked, x)
            recorder.aside((workdir / "scores.json").write_text, json.dumps(scores) + "\n")
            recorder.say("  ".join(f"{name} {value:.3f}" for name, value in scores.items()))
        recorder.say(f"{time.perf_counter() - began:.0f} s in all; see {workdir}/samples.png")


if __name__ == "__main__":
    with parallel.failing_fast():
        train(*parse(sys.argv[1:]))
