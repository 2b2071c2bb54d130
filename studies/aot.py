"""Compile training steps for accelerators that are not there, and say what the programs would do.

    make aot                                    # in an environment with XLA's compilers for them
    make aot ARGS="--only ddpm --again"         # one program, though it is on record

XLA compiles ahead of time for a device that is described to it. The result is the program that the
device would run: its kernels, the memory that they read and write, what is kept, and what devices
send each other. Each program is compiled in a process of its own, and recorded in
studies/results/aot.json when it ends; docs/accelerators.md is written from the record. Times are
those of a model, which the page states; `gpu_run.py` measures them where there is such a GPU, and
the page has both.
"""

import argparse
import contextlib
import dataclasses
import datetime
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import hlo
import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import train
from diffjax import models
from diffjax.evaluation import sampling
from diffjax.experiment import Config, Experiment, Optimizer, Sampling, resolve
from diffjax.experiment.functions import initial_state
from diffjax.models import dit_config
from diffjax.training import runners, telemetry
from markdown_table import table
from speed_ours import make_config
from speed_workloads import DDIM_STEPS, EMA, LEARNING_RATE, WORKLOADS

HERE = Path(__file__).parent
RECORD = HERE / "results" / "aot.json"
PAGE = HERE.parent / "docs" / "accelerators.md"
KEPT = HERE.parent / "build" / "aot"
"""Where the texts of the programs are kept, for whoever wants to read one."""


class Network(NamedTuple):
    """What is trained: its name in a table, its config and the shape of an example."""

    name: str
    config: Config
    shape: tuple[int, int, int]


def _unet(name: str, workload: str) -> Network:
    w = WORKLOADS[workload]
    return Network(name, make_config(w, "bfloat16"), (w.size, w.size, w.channels))


def _dit(remat: str) -> Network:
    model = dit_config("B", labels=1000, null_label=True, bfloat16=True, remat=remat)
    optimizer = Optimizer(learning_rate=LEARNING_RATE, warmup=0)
    config = Config(model=model, optimizer=optimizer, ema=EMA, label_drop=0.1)
    return Network(f"DiT-B/2, latents, remat={remat}", config, (32, 32, 4))


NETWORKS = {
    "ddpm": _unet("DDPM, CIFAR-10", "ddpm-128"),
    "adm": _unet("ADM, ImageNet 64", "adm-64"),
    "dit": _dit("none"),
    "dit-dots": _dit("dots"),
}


class Program(NamedTuple):
    """A program to compile: a training step, or (`walk`) the drawing of a batch of samples.

    Attributes:
      network: a key of `NETWORKS`.
      batch: examples, over all devices.
      device: a key of `DEVICES`.
      count: how many of these devices.
      layout: a runner and its `fsdp`.
      walk: whether it draws.
      cast_ahead: whether it casts its parameters before it begins to draw, as it does.
    """

    network: str
    batch: int
    device: str = "h100"
    count: int = 1
    layout: tuple[str, int] = ("sharded", 1)
    walk: bool = False
    cast_ahead: bool = True


PROGRAMS = {
    "ddpm": Program("ddpm", 128),
    "ddpm-1024": Program("ddpm", 1024),
    "adm": Program("adm", 64),
    "dit": Program("dit", 256),
    "dit-dots": Program("dit-dots", 256),
    "walk": Program("ddpm", 64, walk=True),
    "walk-cast-each": Program("ddpm", 64, walk=True, cast_ahead=False),
    "pmap-8": Program("ddpm", 1024, count=8, layout=("pmap", 1)),
    "fsdp-8": Program("ddpm", 1024, count=8, layout=("sharded", 0)),
    "ddpm-v5e": Program("ddpm", 128, device="v5e"),
}

H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 registers_per_core_limit: 65536 registers_per_block_limit: 65536
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 device_memory_size: 84929347584 l2_cache_size: 52428800
  cuda_compute_capability { major: 9 }
}
runtime_version { major: 12 minor: 9 }
dnn_version_info { major: 9 minor: 10 }
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
"""
"""What XLA asks of a device, as an H100 answers, with the CUDA and the cuDNN of jax[cuda12]."""


def h100(count: int) -> Any:
    """That many H100s of one machine."""
    options = {"target_config": H100, "topology": f"1x1x{count}"}
    return topologies.get_topology_desc("h100", platform="cuda", **options)


def v5e(count: int) -> Any:
    """A tray of four TPU v5e chips, of which the first ones are used."""
    alone = {"TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost"}
    os.environ.update(alone | {"TPU_SKIP_MDS_QUERY": "1"})  # there is no such machine to ask
    return topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")


class Device(NamedTuple):
    """A kind of device: JAX's backend for it, the package that has its compiler, and a topology."""

    name: str
    backend: str
    package: str
    describe: Callable[[int], Any]


DEVICES = {
    "h100": Device("H100", "gpu", "jax-cuda12-plugin", h100),
    "v5e": Device("TPU v5e", "tpu", "libtpu", v5e),
}


def casting(program: Program) -> Any:
    """A context in which parameters are cast before a walk, or at each of its steps."""
    unchanged = lambda network, params, *inputs: params
    cast_ahead = models.cast_ahead if program.cast_ahead else unchanged
    return mock.patch.object(models, "cast_ahead", cast_ahead)


@contextlib.contextmanager
def pretended(program: Program) -> Iterator[list[Any]]:
    """The devices of a program, which are there for whoever asks."""
    device = DEVICES[program.device]
    devices = list(device.describe(program.count).devices)[: program.count]
    cudnn = "jax._src.cudnn.fused_attention_stablehlo."
    with (
        casting(program),
        mock.patch.object(runners, "_devices", return_value=devices),
        mock.patch.object(jax, "default_backend", return_value=device.backend),
        mock.patch(cudnn + "check_cudnn_version", return_value=91000),
        mock.patch(cudnn + "check_compute_capability", return_value=True),
    ):
        yield devices


class Work(NamedTuple):
    """What a program does: the function, its abstract arguments, and the experiment and runner."""

    experiment: Experiment
    runner: runners.Runner
    function: Callable
    arguments: tuple[Any, ...]


def work(program: Program, devices: list[Any]) -> Work:
    """What a program does on these devices."""
    network, (layout, fsdp) = NETWORKS[program.network], program.layout
    sampled = Sampling("ddim", steps=DDIM_STEPS)
    e = resolve(dataclasses.replace(network.config, batch_size=program.batch, sampling=sampled))
    runner = runners.RUNNERS[layout](fsdp)
    shape, of_array, of_batch = (program.batch,), lambda x: None, None
    if layout == "pmap":
        shape = (program.count, program.batch // program.count)
    else:
        share = fsdp or program.count
        axes = (program.count // share, share), ("copy", "fsdp")
        mesh = jax.make_mesh(*axes, axis_types=(AxisType.Auto,) * 2, devices=devices)
        of_array = lambda x: NamedSharding(mesh, runners._split_largest(x.shape, "fsdp", share))
        of_batch = NamedSharding(mesh, PartitionSpec(("copy", "fsdp")))
    state = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=of_array(x)),
        jax.eval_shape(initial_state(e, network.shape)),
    )
    like = lambda dtype, *more: jax.ShapeDtypeStruct((*shape, *more), dtype, sharding=of_batch)
    batch = {"index": like(jnp.int32), "label": like(jnp.int32)}
    if program.walk:
        f = runner.map(sampling.make_generate(e, network.shape))
        return Work(e, runner, f, (state.ema_params, batch))
    f = runner.step(train.make_step(e, train.make_loss(e, levels=None, axis_name=runner.axis)))
    return Work(e, runner, f, (state, batch | {"x": like(jnp.float32, *network.shape)}))


MEMORY = 2.8e12
"""Bytes per second of an H100's memory that a kernel reaches, of 3.35e12 that the maker states."""

LAUNCH = 2.5e-6
"""Seconds that the smallest kernel takes."""

EFFICIENCY = {"low": 0.45, "middle": 0.6, "high": 0.75}
"""The share of the peak that convolutions and products reach."""


def seconds(kernel: hlo.Kernel, efficiency: float) -> float:
    """Modelled time of a kernel: of its memory, of its operations or of a launch, the longest."""
    work = kernel.flops / (telemetry.PEAK_FLOPS["NVIDIA H100"] * efficiency)
    return max((kernel.read + kernel.written) / MEMORY, work, LAUNCH)


CONVOLUTION, UNNAMED = "convolutions", "without a name"
OTHER = "optimiser, average, loss, the rest"
PARTS = (
    (CONVOLUTION, r"^__cudnn\$conv|^convolution"),
    ("random bits", r"threefry|_bernoulli|_uniform|random_bits"),
    (OTHER, r"opt_state|ema_params|global_norm"),
    (UNNAMED, r"^(copy|fusion) $"),
    ("attention", r"fmha|attention/|bqc|bqk|softmax"),
    ("products", r"^\S+ product"),
    (
        "norms and activations, backward",
        r"transpose\(jvp.*(norm_|silu|gelu|modulation)",
    ),
    ("norms and activations, forward", r"norm_|silu|gelu|modulation"),
    ("rest of the network", r"UNet|DiT"),
)
"""Parts of a program, each with a pattern of a kernel's operation and paths: the first counts."""


def part(kernel: hlo.Kernel) -> str:
    """The part of a program that a kernel belongs to."""
    text = f"{kernel.op} {'product ' if kernel.flops else ''}{kernel.paths}"
    return next((name for name, pattern in PARTS if re.search(pattern, text)), OTHER)


SMALL = 3e6
"""Bytes below which a kernel takes no longer than its launch."""


def described(program: Program, text: str) -> dict[str, Any]:
    """What the text of an optimised program says."""
    kernels = [k for k in hlo.kernels(text) if not k.op.startswith(hlo.COLLECTIVES)]
    if program.walk:  # one step of the walk, not what comes before and after the loop
        kernels = [k._replace(times=1) for k in kernels if k.times == DDIM_STEPS]
    parts: dict[str, dict[str, float]] = {}
    for k in kernels:
        row = parts.setdefault(part(k), {"kernels": 0, "bytes": 0, "flops": 0, "seconds": 0.0})
        row["kernels"] += k.times
        row["bytes"] += k.times * (k.read + k.written)
        row["flops"] += k.times * k.flops
        row["seconds"] += k.times * seconds(k, EFFICIENCY["middle"])
    by_name = {k.line.name: k for k in kernels}
    sent = [
        {
            "op": c.op,
            "bytes": c.size,
            "meanwhile": sum(
                seconds(by_name[n], EFFICIENCY["middle"]) for n in c.meanwhile if n in by_name
            ),
            "kernels": len(c.meanwhile),
        }
        for c in hlo.collectives(text)
    ]
    return {
        "kernels": sum(k.times for k in kernels),
        "small": sum(k.times for k in kernels if k.read + k.written < SMALL),
        "seconds": {
            name: sum(k.times * seconds(k, efficiency) for k in kernels)
            for name, efficiency in EFFICIENCY.items()
        },
        "parts": parts,
        "collectives": sent,
    }


def compiled(name: str) -> dict[str, Any]:
    """Compile a program, and return what it says."""
    program = PROGRAMS[name]
    with pretended(program) as devices:
        w = work(program, devices)
        flops = w.runner.flops(w.function, *w.arguments)
        after = w.function.lower(*w.arguments).compile()
    text, memory = after.as_text(), after.memory_analysis()
    KEPT.mkdir(parents=True, exist_ok=True)
    (KEPT / f"{name}.hlo").write_text(text)
    packages = "jax", DEVICES[program.device].package
    return {
        "date": datetime.date.today().isoformat(),
        "versions": {package: version(package) for package in packages},
        "flops": flops / (DDIM_STEPS if program.walk else 1),
        "temporary": memory.temp_size_in_bytes,
        "arguments": memory.argument_size_in_bytes,
        **described(program, text),
    }


def on_record() -> dict[str, Any]:
    """What was compiled before, by the name of the program."""
    return json.loads(RECORD.read_text()) if RECORD.exists() else {}


def program_rows(found: dict[str, Any]) -> Iterator[list[Any]]:
    """Rows of what each program on record does."""
    for name, row in found.items():
        program, parts = PROGRAMS[name], row["parts"].values()
        moved = sum(part["bytes"] for part in parts)
        outside = moved - row["parts"].get(CONVOLUTION, {"bytes": 0})["bytes"]
        yield [
            title(program),
            f"{row['kernels']:,} ({row['small']:,})",
            f"{moved / 1e9:.1f}",
            f"{outside / 1e9:.1f}",
            f"{row['temporary'] / 1e9:.2f}",
            f"{row['arguments'] / 1e9:.2f}",
        ]


def time_rows(found: dict[str, Any]) -> Iterator[list[Any]]:
    """Rows of the modelled time of each program for H100s."""
    peak = telemetry.PEAK_FLOPS["NVIDIA H100"]
    for name, row in found.items():
        program = PROGRAMS[name]
        if program.device == "h100":
            slow, middle, fast = (row["seconds"][efficiency] for efficiency in EFFICIENCY)
            mfu = lambda taken, flops=row["flops"]: f"{flops / taken / peak:.0%}"
            took = row.get("measured", {}).get("seconds", ())
            yield [
                title(program),
                f"{row['flops'] / program.batch * program.count / 1e9:.1f}",
                f"{row['flops'] / 1e12:.2f}",
                f"{middle * 1e3:.1f} ({fast * 1e3:.1f} to {slow * 1e3:.1f})",
                f"{mfu(middle)} ({mfu(slow)} to {mfu(fast)})",
                f"{statistics.median(took) * 1e3:.1f}" if took else "",
                mfu(statistics.median(took)) if took else "",
            ]


def part_rows(row: dict[str, Any]) -> Iterator[list[Any]]:
    """Rows of the parts of a program, the longest first."""
    ran = row.get("measured", {}).get("parts", {})
    for name, part in sorted(row["parts"].items(), key=lambda item: -item[1]["seconds"]):
        yield [
            name,
            f"{part['kernels']:,}",
            f"{part['bytes'] / 1e9:.2f}",
            f"{part['flops'] / 1e12:.2f}",
            f"{part['seconds'] * 1e3:.2f}",
            f"{ran[name]['kernels']:,.0f}" if name in ran else "",
            f"{ran[name]['seconds'] * 1e3:.2f}" if name in ran else "",
        ]
    if ran:
        total = lambda parts, k: sum(part[k] for part in parts.values())
        yield [
            "all",
            f"{row['kernels']:,}",
            f"{total(row['parts'], 'bytes') / 1e9:.2f}",
            f"{total(row['parts'], 'flops') / 1e12:.2f}",
            f"{row['seconds']['middle'] * 1e3:.2f}",
            f"{total(ran, 'kernels'):,.0f}",
            f"{total(ran, 'seconds') * 1e3:.2f}",
        ]


def sent_rows(found: dict[str, Any]) -> Iterator[list[Any]]:
    """Rows of the communications of the programs for several devices."""
    for name, row in found.items():
        for op in sorted({each["op"] for each in row["collectives"]}):
            each = [c for c in row["collectives"] if c["op"] == op]
            hidden = [c for c in each if c["kernels"]]
            yield [
                title(PROGRAMS[name]),
                op,
                len(each),
                f"{sum(c['bytes'] for c in each) / 1e6:.1f}",
                f"{max(c['bytes'] for c in each) / 1e6:.1f}",
                len(hidden),
                f"{sum(c['meanwhile'] for c in hidden) * 1e3:.2f}",
            ]


def title(program: Program) -> str:
    """What a program is, in a table."""
    runner, fsdp = program.layout
    many = f"{program.count} {DEVICES[program.device].name}"
    layout = f", {runner}{', fsdp=0' if fsdp == 0 else ''}" if program.count > 1 else ""
    what = "a step of drawing " if program.walk else ""
    how = "" if program.cast_ahead else ", casting parameters at each step"
    return f"{what}{NETWORKS[program.network].name}, batch {program.batch:,}, {many}{layout}{how}"


PAGE_TEXT = """\
# Programs for accelerators

Written by `make aot`, which runs `studies/aot.py`, on {date}, with {versions}.

XLA compiled these programs ahead of time, on a CPU, for devices that were only described to it.
Kernels, bytes, memory and communication are read from the optimised programs; times follow from a
model, stated below. XLA chose algorithms without trying them (autotuning), so that a program on a
real device can differ.
{real}
## What the programs do

Each is the whole training step in bfloat16: noise, network, gradients, clipping, Adam and the
moving average. The step of drawing is one of the {steps} of a walk by `ddim`.

{programs}
All numbers are those of one device. A kernel is one launch; the number in brackets counts those
that move less than {small:.0f} MB. Bytes are those that kernels read and write in main memory, each
operand and each result once, and of a slice only the slice. Temporaries are the memory beside the
arguments, which are the state and the batch.

## The time that a model gives

A kernel takes the longest of three: its bytes at {memory:.1f} TB/s, its operations at {middle:.0%}
of the peak ({high:.0%} and {low:.0%} in brackets), and {launch:.1f} us. No kernel finds its
operands in the cache, none run at the same time, nothing waits for the host, and communication is
not counted. Operations are those of convolutions and matrix products (`telemetry.flops`), without
recomputation. MFU is their number per second as a fraction of {peak:.0f} TFLOP/s, the dense
bfloat16 peak that the manufacturer states, as in the metrics of a run.

{times}
## Where the time goes

A kernel belongs to a part by the names of the lines of the model that it computes; if it computes
several, to the first of these: {order}.
Those without a name copy and transpose the state, and fill with zeros what a loop saves into.

{parts}
## What follows

- On an H100 the training steps took 0.99 (DiT), 1.11 (ADM) and 1.18 (DDPM) times what the model
  says. The parts of the U-Nets are near it, except random bits, which take more than twice as long:
  they are operations of integers, which the model does not count, and 3% of a step with dropout. In
  DiT errors cancel: products are faster, at 78% of the peak, and attention and the backward pass of
  norms take twice as long.
- A U-Net moves most of its bytes outside of convolutions, for norms and activations first of all.
- A transformer whose blocks are scanned saves, for each block, all that its backward pass reads:
  around GELU alone these are six arrays of four times the width. `remat=dots` saves what products
  return and computes the rest again, which moves fewer bytes and needs a fraction of the memory;
  `configs/dit_imagenet256.py` sets it.
- The largest kernels on the H100 show what is left. In DiT the backward pass of GELU and of the
  bias before it takes 10.8 ms in 12 launches, and reads or writes five arrays of four times the
  width, where three would do. In DDPM's step the updates of convolutions' parameters run at
  0.8 TB/s, because XLA transposes gradients inside them (0.8 ms).
- XLA does not move the casts of parameters to bfloat16 out of the loop of a walk, so that sampling
  casts them before it begins. On a CPU the samples are the same bit for bit.

## What devices send each other

{sent}
"Hidden" are the communications during which other kernels run, and "behind them" the modelled time
of these kernels. Sizes are those of the results on one device.
{left}"""


REAL = """
Some were run, too, by `studies/gpu_run.py`, on {date}, with {version}, on one
{device}, whose XLA compiled them again and tried algorithms. Their times are in the columns
"measured": that of a program is the median of seven rounds of five calls, and those of its parts
are sums of the durations of kernels in a trace, between which the device can be idle.
"""


def page(found: dict[str, Any]) -> str:
    """The text of docs/accelerators.md."""
    found = {name: found[name] for name in PROGRAMS if name in found}
    versions = {f"{p} {v}" for row in found.values() for p, v in row["versions"].items()}
    head = ["program", "kernels (small)", "GB", "GB outside convolutions"]
    head += ["temporary, GB", "arguments, GB"]
    of_parts = ["part", "kernels", "GB", "TFLOP", "modelled, ms", "kernels run", "measured, ms"]
    ran = [row["measured"] for row in found.values() if "measured" in row]
    left = [title(p) for name, p in PROGRAMS.items() if name not in found]
    return PAGE_TEXT.format(
        versions=", ".join(sorted(versions)),
        real=REAL.format(
            date=", ".join(sorted({each["date"] for each in ran})),
            device=", ".join(sorted({each["device"] for each in ran})),
            version=", ".join(sorted({each["version"] for each in ran})),
        )
        if ran
        else "Nothing here was run on an accelerator.\n",
        date=", ".join(sorted({row["date"] for row in found.values()})),
        steps=DDIM_STEPS,
        programs=table(head, program_rows(found)),
        small=SMALL / 1e6,
        memory=MEMORY / 1e12,
        launch=LAUNCH * 1e6,
        peak=telemetry.PEAK_FLOPS["NVIDIA H100"] / 1e12,
        **EFFICIENCY,
        times=table(
            ["program", "GFLOP an example", "TFLOP", "modelled, ms", "MFU", "measured, ms", "MFU"],
            time_rows(found),
        ),
        order="; ".join(dict.fromkeys([name for name, _ in PARTS] + [OTHER])),
        parts="\n".join(
            f"{title(PROGRAMS[name])}:\n\n{table(of_parts, part_rows(row))}"
            for name, row in found.items()
            if PROGRAMS[name].device == "h100" and PROGRAMS[name].count == 1
        ),
        sent=table(
            ["program", "operation", "number", "MB", "largest, MB", "hidden", "behind them, ms"],
            sent_rows(found),
        ),
        left="\nNot compiled: " + "; ".join(left) + ".\n" if left else "",
    )


def main() -> None:
    """Compile what is not on record, and write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=PROGRAMS, default=list(PROGRAMS))
    parser.add_argument("--again", action="store_true", help="also compile what is on record")
    parser.add_argument("--compile", choices=PROGRAMS, help="this one, in this process")
    args = parser.parse_args()
    if args.compile:
        args.only, found = [], compiled(args.compile)
        RECORD.write_text(json.dumps(on_record() | {args.compile: found}, indent=1) + "\n")
    for name in args.only:
        if args.again or name not in on_record():
            print(f"compiling {name} ...", flush=True)
            command = [sys.executable, __file__, "--compile", name]
            subprocess.run(command, check=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    PAGE.write_text(page(on_record()))


if __name__ == "__main__":
    main()
