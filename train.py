"""Train a diffusion model. To try an idea, copy this file and change one function.

    python train.py                                              # the handwritten digits
    python train.py --config=fashion_mnist --workdir=runs/fashion   # configs/fashion_mnist.py
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

import jax
import numpy as np

from diffjax import data, keys, losses, plots, super_resolution
from diffjax.evaluation import distances, pixels, reference, sampling
from diffjax.experiment import Config, Experiment, dataset, resolve, with_parameters
from diffjax.experiment.command_line import error_exit, parse
from diffjax.experiment.functions import initial_state
from diffjax.experiment.run_directory import SNAPSHOTS, open_run, with_runner
from diffjax.published import trained
from diffjax.training import (
    Batch,
    Losses,
    LossFn,
    averaging,
    metrics,
    preemption,
    store,
    telemetry,
    train_step,
)
from diffjax.training.checkpoints import UnwrittenError
from diffjax.training.distributed import (
    ALONE,
    Distributed,
    check_batch,
    failing_fast,
    idle_cores,
    setup,
)
from diffjax.training.files import write_text
from diffjax.training.lease import TakenOverError
from diffjax.training.recorder import Recorder
from diffjax.training.runners import choose, in_batches
from diffjax.training.step import several_steps

AHEAD = 16
"""Steps that the host may start before the devices have finished them: with 32, XLA's CPU devices
can deadlock."""


def make_loss(
    e: Experiment,
    levels: int | None,
    held_out: int | None = None,
    axis_name: str | None = None,
) -> LossFn:
    """The loss of each example, a pure function; this is the place to try an idea.

    It is the loss of training, or, with the number of examples held out, the loss of those:
    without dropout and with every label, its times spread evenly over all of them.

    Example i draws from `key` folded with its position in the global batch, so that nothing
    depends on how the batch is split over devices, which may be along a mapped axis.
    """
    loss = e.objective(levels, axis_name)  # diffjax.diffusion_loss, or another
    config = e.config
    train = held_out is None

    def loss_fn(key, params, batch, extra):
        key_times, key_noise, key_cond, key_dropout, *keys_x = jax.random.split(key, 6)
        index = batch["index"]
        t, correction = e.times.draw(key_times, extra, index, held_out or config.batch_size)
        key_draw, key_augment = (keys.fold_in(key_x, index) for key_x in keys_x)
        x, told = e.augment(key_augment, e.example(key_draw, batch["x"]), train)
        cond = e.condition(keys.fold_in(key_cond, index), batch | {"x": x}, drop=train, told=told)

        schedule = with_parameters(e, params).schedule  # e.schedule, unless it is learned
        network = functools.partial(e.apply, params)
        if train and config.model.dropout:
            network = functools.partial(network, dropout=keys.fold_in(key_dropout, index))
        each = loss(
            keys.fold_in(key_noise, index),
            network,
            schedule,
            config.target,
            x,
            cond=cond,
            weight=e.weighting,
            t=t,
            steps=config.time_steps,
        )
        log_snr = schedule.log_snr(t)
        balanced = e.balance(params, log_snr, each)
        seen = {"t": t, "log_snr": log_snr, "loss": each, "corrected": correction * each}
        return Losses(correction * balanced, seen)

    return loss_fn


def make_step(e: Experiment, loss_fn: LossFn) -> Callable:
    """The training step, (state, batch, axis_name) -> (state, metrics), for a runner to map."""

    def measure(seen):
        return {"by_log_snr": losses.by_log_snr(seen["log_snr"], seen["loss"])}

    step = functools.partial(
        train_step,
        loss_fn=loss_fn,
        tx=e.optimizer,
        ema_decay=e.ema_decay,
        accumulate=e.config.optimizer.accumulate,
        remember=e.times.remember,
        measure=measure,
        skip_nonfinite=e.config.skip_nonfinite > 0,
    )
    return step if e.config.steps_per_call == 1 else several_steps(step)


def train(
    config: Config, workdir: Path, distributed: Distributed = ALONE, profile: int = 0
) -> None:
    """Train to `config.steps`, or resume, in each process of a pod alike; trace `profile` steps."""
    began = time.perf_counter()

    # Everything that is wrong with the input is reported before anything is compiled.
    with error_exit():
        store.reach(workdir)
        config = with_runner(workdir, config)
        e = resolve(config)
        accumulate = config.optimizer.accumulate
        setup(distributed, config.batch_size, accumulate)
        check_batch(config.batch_size, accumulate)
        runner = choose(config.parallel, config.fsdp)
        train_set, test_set = dataset.load_data(config, workdir)
        dataset.check_data(config, train_set, test_set)
        e.grid()
        e.times.check()
        config = dataset.recorded(config, train_set)
        shape = dataset.example_shape(config)
        form = pixels.form(config, runner, shape, train_set.x.dtype.type)
        others = sampling.load_others(e, shape)
        both = form.dataset(data.Dataset(train_set, test_set))
        real = None
        if config.eval.features is not None:
            real = reference.load(config.eval, both, config.data.name, runner)
        e = trained.inherit(e, dataset.example_shape(config))
        checkpoints = open_run(workdir, config, dataset.fingerprint(train_set, test_set))

    # Pure functions: the loss, the step, and a sample.
    levels = data.levels(config.data.name, train_set)
    step = make_step(e, make_loss(e, levels, axis_name=runner.axis))
    held_out = data.first(test_set, 1024)
    held_out_loss = make_loss(e, levels, len(held_out["index"]), runner.axis)
    generate = sampling.make_generate(e, shape, others)
    learning_rate = jax.jit(e.learning_rate)

    def measure_held_out(params, batch):
        return held_out_loss(e.keys().held_out, params, batch, e.times.init()).seen["corrected"]

    # The same functions on every device there is.
    step_fn, held_out_fn, generate_fn = (
        runner.step(step),
        runner.map(measure_held_out),
        runner.map(generate),
    )

    def loss_of(batch: Batch) -> np.ndarray:
        return in_batches(runner, held_out_fn, state.ema_params, batch, config.batch_size)

    def generated(batch: Batch) -> np.ndarray:
        params = others.join(state.ema_params)
        return in_batches(runner, generate_fn, params, batch, config.batch_size)

    def draw(step: int) -> None:
        rows = sampling.picture_rows(config)
        batch = sampling.request(config, test_set, rows * config.sampling.columns)
        x = form.decode(generated(batch))
        if config.given_height is not None:
            x, rows = super_resolution.beside(x, batch["x"], config.given_height), 4
        recorder.picture(step, "samples", plots.samples, x, rows)
        recorder.picture(step, "loss", plots.progress, metrics.read(recorder.folder))
        if real is not None:
            recorder.picture(step, "distances", plots.distances, metrics.read(recorder.folder))

    def measure(real: reference.Reference) -> dict[str, float]:
        """The distances of samples of the moving average to the reference, by name."""
        wanted = sampling.request(config, test_set, config.eval.n)
        rows = sampling.parts_of(wanted["index"], size=config.batch_size)
        parts = (form.store(generated({name: x[i] for name, x in wanted.items()})) for i in rows)
        found = distances.measure(real.summarise(parts, config.eval.n), real.summary)
        return {f"eval_{name}": value for name, value in found.items()}

    devices = f"{jax.process_count()} x {jax.local_device_count()} {jax.default_backend()} devices"
    state = runner.init(initial_state(e, shape))
    with error_exit():
        state = checkpoints.restore(state) or state
        start = int(state.step)
        steps = dataset.make_steps(config, start)
        recorder = Recorder(
            workdir, start, config.steps, config.writers, (SNAPSHOTS,), checkpoints.hold
        )
        checkpoints.before_seal = recorder.mirror.settle
    make_batch = dataset.make_batch(config, train_set, runner.slots(config.batch_size))
    made = data.in_order(make_batch, steps, config.data.workers)
    batches = data.prefetch(lambda _: runner.put(next(made)), steps)
    describe = functools.partial(dataset.describe_step, e, len(train_set.x))
    window = metrics.load_window(workdir, start)  # metrics stay on the devices between log points

    errors = error_exit(FloatingPointError, UnwrittenError, TakenOverError, data.UnreadableError)
    traced = telemetry.traced(recorder.folder / "profile", range(start + 10, start + 10 + profile))
    with errors, checkpoints, recorder, traced as trace, preemption.watch() as should_stop:
        count = sum(x.size for x in jax.tree.leaves(state.params))
        what = f"{config.data.name}, target {config.target}, {count:,} parameters"
        recorder.say(f"{what}, {devices} by {runner.name}")
        recorder.say(f"the run is in {workdir}")
        if start:
            recorder.say(f"resumed from the checkpoint of step {start} of {config.steps}")
        advice = telemetry.advice(), idle_cores(config.batch_size, accumulate)
        for line in (*filter(None, advice), *dataset.cautions(config, e.schedule, train_set)):
            recorder.say(line)
        if start < config.steps:
            recorder.say("compiling ...")

        for taken, batch in zip(steps, recorder.meter.waited(batches), strict=True):
            checkpoints.check_lock()
            if should_stop(taken // steps.step):
                recorder.check_finite(window, taken, config.skip_nonfinite, describe)
                recorder.attempt(metrics.save_window, recorder.folder, taken, window)
                checkpoints.save(taken, state)
                checkpoints.require()
                recorder.say(f"asked to stop: saved step {taken}; the same command resumes the run")
                sys.exit(preemption.RESUME)
            state, step_metrics = step_fn(state, batch)
            window.append(step_metrics)
            if len(window) > AHEAD:
                jax.block_until_ready(window[-AHEAD])

            done = taken + steps.step
            recorder.show(done)
            last = done == config.steps
            row = {}
            trace(done, step_metrics)
            if taken == start:
                jax.block_until_ready(step_metrics)
                recorder.say(f"compiled, first step after {time.perf_counter() - began:.0f} s")
                recorder.meter.flops = runner.flops(step_fn, state, batch) / steps.step
                recorder.start(done)
            if done % config.log_every == 0 or last:
                recorder.check_finite(window, done, config.skip_nonfinite, describe)
                row = metrics.summary(window, done, learning_rate)
                window = []
                if done % config.eval_every == 0 or last:
                    row["eval_loss"] = float(loss_of(held_out).mean())
                if real is not None and (done % config.eval.every == 0 or last):
                    row |= measure(real)
                recorder.write(done, config.batch_size, **row)
            if config.snapshot_every and (done % config.snapshot_every == 0 or last):
                # Before the checkpoint: a run that is resumed from it will not write them again.
                for snapshot in averaging.snapshots_of(
                    state.opt_state, config.averages, config.snapshot_dtype
                ):
                    recorder.attempt(
                        averaging.write_snapshot, recorder.folder / SNAPSHOTS, done, snapshot
                    )
            if done % config.save_every == 0 or last:
                checkpoints.save(done, state, row.get(config.keep_best_by, math.inf))
            if done % config.sample_every == 0 and not last:
                draw(done)
                recorder.start(done)

        checkpoints.wait()
        with preemption.ending_at_once():
            draw(config.steps)
            if config.sampling.eval_samples:
                batch = sampling.request(config, test_set, config.sampling.eval_samples)
                x = form.decode(generated(batch))
                scores = sampling.evaluate(config, both, batch, x)
                recorder.attempt(
                    write_text, recorder.folder / "scores.json", json.dumps(scores) + "\n"
                )
                recorder.say("  ".join(f"{name} {value:.3f}" for name, value in scores.items()))
        recorder.say(f"{time.perf_counter() - began:.0f} s in all; see {workdir}/samples.png")


if __name__ == "__main__":
    with failing_fast():
        train(*parse(sys.argv[1:], Path(__file__).with_name("configs")))
