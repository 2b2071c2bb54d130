"""diffjax's side of a benchmark: `python benchmarks/ours.py WORKLOAD VARIANT FOLDER`.

Prints a line of JSON when it is ready; then for each line `train N`, `sample N`, `load N` (batches)
or `loop N` (steps of train.py) that it reads it does that, and prints the seconds it took; for
`peaks 1`, what the hardware can do. Writes parameters, and what the network says of some inputs,
into the folder for the peers to compare with.
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
from diffjax import data, training
from diffjax.experiment import resolve
from diffjax.training import distributed, metrics as metrics_lib, runners, telemetry
from diffjax.config import Config, Data, Optimizer, UNetConfig
from diffjax.published import diffusers
from diffjax.published.arrays import unet
from workloads import CLIP, DDIM_STEPS, EMA, IMAGES, LEARNING_RATE, WORKLOADS

VARIANTS = {
    "float32": {},
    "bfloat16": {"bfloat16": True},
}


def make_config(workload, variant: str) -> Config:
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
    """A workload, ready to run: what train.py makes of a config."""

    config: Config
    network: Callable
    state: training.TrainState
    step: Callable
    batch: training.Batch
    generate: Callable
    asked: training.Batch


def prepare(name: str, variant: str) -> Work:
    workload = WORKLOADS[name]
    config = make_config(workload, variant)
    distributed.setup(distributed.ALONE, config.batch_size)
    runner = runners.pmap()
    shape = (workload.size, workload.size, workload.channels)
    network, times = resolve.make_network(config), resolve.make_times(config)
    loss_fn = train.make_loss(config, network, times, None)
    tx = resolve.make_optimizer(config.optimizer)
    state = runner.init(resolve.make_initial_state(config, shape, tx, times))
    step = runner.step(resolve.make_step(config, loss_fn, tx, times))
    n = config.batch_size
    batch = {
        "x": np.random.default_rng(0).uniform(-1, 1, (n, *shape)).astype(np.float32),
        "label": np.arange(n, dtype=np.int32) % max(workload.labels, 1),
        "index": np.arange(n, dtype=np.int32),
    }
    schedule = resolve.make_schedule(config)
    streams = resolve.make_streams(config)

    def draw(params, batch):
        key = diffjax.keys.fold_in(streams.samples, batch["index"])
        cond = {"label": batch["label"]} if workload.labels else None
        net = functools.partial(network, params)
        denoise = functools.partial(resolve.make_denoiser(config, net), cond=cond)
        walk = diffjax.ddim(denoise, schedule)
        x_1 = diffjax.prior_sample(key, schedule, (len(batch["index"]), *shape))
        return diffjax.sample(key, walk, x_1, diffjax.uniform_times(DDIM_STEPS))[0]

    index = np.arange(IMAGES, dtype=np.int32)
    asked = runner.put({"index": index, "label": index % max(workload.labels, 1)})
    return Work(config, network, state, step, runner.put(batch), runner.map(draw), asked)


def main(name: str, variant: str, folder: str) -> None:
    config, network, state, step, batch, generate, asked = prepare(name, variant)
    workload, n = WORKLOADS[name], config.batch_size
    shape = (workload.size, workload.size, workload.channels)
    state, metrics = step(state, batch)
    jax.block_until_ready(metrics)
    first_step = time.perf_counter() - BEGAN
    per_step = telemetry.flops(step, state, batch)
    compiled = step.lower(state, batch).compile()
    moved = (compiled.cost_analysis() or {}).get("bytes accessed", 0.0)
    began = time.perf_counter()
    jax.block_until_ready(generate(state.ema_params, asked))
    first_image = time.perf_counter() - began
    dump(Path(folder), network, state.params, shape, workload)
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
        if what == "peaks":  # last: their memory would count
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
                metrics = generate(state.ema_params, asked)
            elif what == "load":
                data.train_batch(examples, 0, i, n, flip=True)
        jax.block_until_ready(metrics)
        taken = time.perf_counter() - began if what != "loop" else loop(config, count)
        print(json.dumps({"seconds": taken, "memory": telemetry.peak_memory()}), flush=True)


def loop(config: Config, steps: int) -> float:
    """Seconds that train.py takes for so many steps of the digits, logging and saving included.

    It logs every `steps` and saves at every third log; its first and last rows are left out.
    """
    often = dict(log_every=steps, save_every=3 * steps, eval_every=1000 * steps)
    sampling = dataclasses.replace(config.sampling, steps=1, columns=1)
    config = dataclasses.replace(
        config, steps=8 * steps, sample_every=10**9, sampling=sampling, **often
    )
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        train.train(config, Path(folder))
        rows = metrics_lib.read(Path(folder))[1:-1]
    return steps * config.batch_size * statistics.mean(1 / row["img_per_s"] for row in rows)


def product_speed(bfloat16: bool) -> float:
    """Operations a second of a product of two large matrices: what the hardware can do."""
    n = 2048 if jax.default_backend() == "cpu" else 16384
    x = jnp.ones((n, n), jnp.bfloat16 if bfloat16 else jnp.float32)
    return 2 * n**3 / fastest(jnp.matmul, x, x)


def copy_speed() -> float:
    """Bytes a second, read and written, of a large array's doubling."""
    x = jnp.ones(2**27 if jax.default_backend() == "cpu" else 2**30)
    return 2 * x.nbytes / fastest(lambda x: 2 * x, x)


def fastest(f: Callable, *args: jax.Array) -> float:
    """Seconds of the fastest of ten calls on one device, which on a CPU uses all cores."""
    f, seconds = jax.jit(f), []
    for _ in range(10):
        began = time.perf_counter()
        jax.block_until_ready(f(*args))
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def dump(folder, network, params, shape, workload):
    """Shaken parameters, so that every path matters, and the network's answer to some inputs."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    rng = np.random.default_rng(1)
    shaken = {
        "/".join(str(k.key) for k in path): np.asarray(x)
        + 0.05 * rng.standard_normal(x.shape).astype(np.float32)
        for path, x in leaves
    }
    params = jax.tree.unflatten(tree, list(shaken.values()))
    x = rng.standard_normal((4, *shape)).astype(np.float32)
    log_snr = np.linspace(-6, 6, 4, dtype=np.float32)
    label = np.arange(4, dtype=np.int32) % max(workload.labels, 1)
    out = jax.jit(network)(params, jnp.asarray(x), jnp.asarray(log_snr), {"label": label})
    inputs = {"x": x, "log_snr": log_snr, "label": label, "out": np.asarray(out)}
    np.savez(folder / "ours.npz", **inputs, **{f"params/{k}": v for k, v in shaken.items()})


if __name__ == "__main__":
    main(*sys.argv[1:])
