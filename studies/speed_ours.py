"""diffjax's side of the comparison, a process that `speed.py` starts and gives work.

    PYTHONPATH=. python studies/speed_ours.py WORKLOAD VARIANT FOLDER

It prints a line of JSON when it is ready. Then it reads lines `train N`, `sample N`, `load N`
(batches) or `loop N` (steps of train.py), does what each asks for, and prints the seconds that it
took; for `peaks 1` it prints what the hardware can do. Into the folder it writes the parameters and
the network's outputs in float32 for some inputs, which `speed_peers.py` compares with its own.
"""

import time

BEGAN = time.perf_counter()

import contextlib
import dataclasses
import functools
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import diffjax
import train
from diffjax import data, keys, training
from diffjax.experiment import Config, Data, Experiment, Optimizer, resolve
from diffjax.experiment.functions import initial_state
from diffjax.models import UNetConfig
from diffjax.published import diffusers
from diffjax.published.arrays import unet
from diffjax.training import distributed, metrics as metrics_lib, runners, telemetry
from speed_workloads import CLIP, DDIM_STEPS, EMA, IMAGES, LEARNING_RATE, WORKLOADS, Workload

VARIANTS = {
    "float32": {},
    "bfloat16": {"bfloat16": True},
}


def make_config(workload: Workload, variant: str) -> Config:
    """The config that trains a workload's network as PyTorch's side does."""
    fields = workload._asdict()
    for name in ("size", "channels", "batch"):
        del fields[name]
    return Config(
        data=Data("digits"),
        model=UNetConfig(**fields, null_label=workload.labels > 0, **VARIANTS[variant]),
        optimizer=Optimizer(learning_rate=LEARNING_RATE, warmup=0, clip=CLIP),
        ema=EMA,
        batch_size=workload.batch,
        label_drop=0.1,
    )


class Work(NamedTuple):
    """A workload, ready to run.

    Attributes:
      experiment: what its config means.
      state: the state before the first step.
      step: the training step, compiled over the devices at its first call.
      batch: to train on.
      generate: a function (parameters, request) -> samples, compiled likewise.
      requested: the samples to draw.
    """

    experiment: Experiment
    state: training.TrainState
    step: Callable
    batch: training.Batch
    generate: Callable
    requested: training.Batch


def prepare(name: str, variant: str) -> Work:
    """Set the devices up, and make a workload's functions and data."""
    workload = WORKLOADS[name]
    config = make_config(workload, variant)
    distributed.setup(distributed.ALONE, config.batch_size)
    e = resolve(config)
    runner = runners.pmap()
    shape = (workload.size, workload.size, workload.channels)
    state = runner.init(initial_state(e, shape))
    step = runner.step(train.make_step(e, train.make_loss(e, levels=None)))
    n = config.batch_size
    batch = {
        "x": np.random.default_rng(0).uniform(-1, 1, (n, *shape)).astype(np.float32),
        "label": np.arange(n, dtype=np.int32) % max(workload.labels, 1),
        "index": np.arange(n, dtype=np.int32),
    }

    def draw(params, batch):
        key = keys.fold_in(e.keys().samples, batch["index"])
        cond = {"label": batch["label"]} if workload.labels else None
        denoise = e.clip(e.denoiser(functools.partial(e.apply, params)))
        walk = diffjax.ddim(functools.partial(denoise, cond=cond), e.schedule)
        x_1 = diffjax.prior_sample(key, e.schedule, (len(batch["index"]), *shape))
        return diffjax.sample(key, walk, x_1, diffjax.uniform_times(DDIM_STEPS))[0]

    index = np.arange(IMAGES, dtype=np.int32)
    requested = runner.put({"index": index, "label": index % max(workload.labels, 1)})
    return Work(e, state, step, runner.put(batch), runner.map(draw), requested)


def main(name: str, variant: str, folder: str) -> None:
    """Get ready, and do what the lines of the standard input ask for."""
    e, state, step, batch, generate, requested = prepare(name, variant)
    config, workload = e.config, WORKLOADS[name]
    n = config.batch_size
    shape = (workload.size, workload.size, workload.channels)
    state, metrics = step(state, batch)
    jax.block_until_ready(metrics)
    first_step = time.perf_counter() - BEGAN
    per_step = telemetry.flops(step, state, batch)
    compiled = step.lower(state, batch).compile()
    moved = (compiled.cost_analysis() or {}).get("bytes accessed", 0.0)
    began = time.perf_counter()
    jax.block_until_ready(generate(state.ema_params, requested))
    first_image = time.perf_counter() - began
    exact = resolve(make_config(workload, "float32")).apply
    dump(Path(folder), exact, state.params, shape, workload)
    names = {"modules": diffusers.modules(unet(config)), "layers": diffusers.LAYERS}
    (Path(folder) / "names.json").write_text(json.dumps(names))
    ready = {
        "first_step": first_step,
        "first_image": first_image,
        "parameters": sum(x.size for x in jax.tree.leaves(state.params)),
        "gflop_per_image": per_step * jax.device_count() / n / 1e9,
        "gbyte_per_step": moved * jax.device_count() / 1e9,
        "devices": [device.device_kind for device in jax.devices()],
        "version": f"jax {jax.__version__}",
    }
    print(json.dumps(ready), flush=True)
    pixels = np.random.default_rng(0).integers(0, 256, (20_000, *shape), np.uint8)
    examples = data.Examples(pixels)
    for line in sys.stdin:
        what, count = line.split()[0], int(line.split()[1])
        if what == "peaks":  # comes last, because its arrays would count as memory
            product, copy = product_speed(config.model.bfloat16), copy_speed()
            peaks = {"product_tflop_per_s": product / 1e12, "copy_gb_per_s": copy / 1e9}
            print(json.dumps(peaks), flush=True)
            continue
        window = []
        began = time.perf_counter()
        for i in range(count if what != "loop" else 0):
            if what == "train":
                state, metrics = step(state, batch)
                window.append(metrics)
                if len(window) > train.AHEAD:
                    jax.block_until_ready(window[-train.AHEAD])
            elif what == "sample":
                metrics = generate(state.ema_params, requested)
            elif what == "load":
                data.train_batch(examples, 0, i, n, flip=True)
        jax.block_until_ready(metrics)
        taken = time.perf_counter() - began if what != "loop" else loop(config, count)
        print(json.dumps({"seconds": taken, "memory": telemetry.peak_memory()}), flush=True)


def loop(config: Config, steps: int) -> float:
    """Seconds that train.py takes for so many steps of the digits, logging and saving included.

    It logs every `steps` and saves at every third log; its first and last rows are left out.
    """
    intervals = dict(log_every=steps, save_every=3 * steps, eval_every=1000 * steps)
    sampling = dataclasses.replace(config.sampling, steps=1, columns=1)
    config = dataclasses.replace(
        config, steps=8 * steps, sample_every=10**9, sampling=sampling, **intervals
    )
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        train.train(config, Path(folder))
        rows = metrics_lib.read(Path(folder))[1:-1]
    return steps * config.batch_size * statistics.mean(1 / row["img_per_s"] for row in rows)


def product_speed(bfloat16: bool) -> float:
    """Operations per second of a product of two large matrices: what the hardware can do."""
    n = 2048 if jax.default_backend() == "cpu" else 16384
    # Random numbers: a GPU multiplies equal ones faster, with less power.
    x = jax.random.normal(jax.random.key(0), (n, n), jnp.bfloat16 if bfloat16 else jnp.float32)
    return 2 * n**3 / fastest(jnp.matmul, x, x)


def copy_speed() -> float:
    """Bytes per second, read and written, when a large array is multiplied by 2."""
    x = jnp.ones(2**27 if jax.default_backend() == "cpu" else 2**30)
    return 2 * x.nbytes / fastest(lambda x: 2 * x, x)


def fastest(f: Callable, *args: jax.Array) -> float:
    """Seconds of the fastest of ten calls on one device; on a CPU it uses all cores."""
    f, seconds = jax.jit(f), []
    for _ in range(10):
        began = time.perf_counter()
        jax.block_until_ready(f(*args))
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def dump(folder, network, params, shape, workload):
    """Write parameters, perturbed so that each matters, and the network's outputs with them."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    rng = np.random.default_rng(1)
    perturbed = {
        "/".join(str(k.key) for k in path): np.asarray(x)
        + 0.05 * rng.standard_normal(x.shape).astype(np.float32)
        for path, x in leaves
    }
    params = jax.tree.unflatten(tree, list(perturbed.values()))
    x = rng.standard_normal((4, *shape)).astype(np.float32)
    log_snr = np.linspace(-6, 6, 4, dtype=np.float32)
    label = np.arange(4, dtype=np.int32) % max(workload.labels, 1)
    with jax.default_matmul_precision("highest"):
        out = jax.jit(network)(params, jnp.asarray(x), jnp.asarray(log_snr), {"label": label})
    inputs = {"x": x, "log_snr": log_snr, "label": label, "out": np.asarray(out)}
    np.savez(folder / "ours.npz", **inputs, **{f"params/{k}": v for k, v in perturbed.items()})


if __name__ == "__main__":
    main(*sys.argv[1:])
