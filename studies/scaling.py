"""Measure what grows with devices and with the state, and work out what a pod would do.

    PYTHONPATH=. python studies/scaling.py     # writes docs/scaling.md

It takes ten minutes, 12 GB of memory and 5 GB of disk.

Step times, bytes and seconds are measured here. What a pod would do is arithmetic on counts of
operations and on published hardware figures, as the page says.
"""

import dataclasses
import datetime
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import train
from diffjax import data
from diffjax.experiment import command_line, resolve, run_directory
from diffjax.experiment.functions import initial_state
from diffjax.models import UNet, UNetConfig, apply
from diffjax.training import checkpoints as checkpoints_lib, distributed, runners, telemetry
from markdown_table import table

ROOT = Path(__file__).parents[1]
BATCH = 128
DIGITS = command_line.from_file(str(ROOT / "configs" / "digits.py"))
CONFIG = dataclasses.replace(DIGITS, batch_size=BATCH)
LAYOUTS = {"pmap": ("pmap", 1), "sharded": ("sharded", 1), "sharded, fsdp=0": ("sharded", 0)}
DEVICES = (1, 2, 4, 8)


def program(kind: str, fsdp: int):
    """A runner, the state of the digits' network, its step, and a batch on the devices."""
    runner = runners.RUNNERS[kind](fsdp)
    train_set, _ = data.load("digits")
    e = resolve(CONFIG)
    step = train.make_step(e, train.make_loss(e, levels=None))
    state = runner.init(initial_state(e, (8, 8, 1)))
    batch = runner.put(data.train_batch(train_set, 0, 0, BATCH, runner.slots(BATCH)))
    return state, runner.step(step), batch


WIDTHS = {"f32": 4, "bf16": 2, "u32": 4, "s32": 4, "pred": 1}


def communicated(step, state, batch) -> dict[str, int]:
    """Bytes that the collectives of a compiled step return, by kind."""
    text = step.lower(state, batch).compile().as_text()
    found = {}
    for line in text.splitlines():
        match = re.search(r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all)\(", line)
        if match:
            shapes = re.findall(r"(\w+)\[([\d,]*)\]", match[1])
            size = sum(
                WIDTHS[t] * int(np.prod([int(n) for n in s.split(",") if n])) for t, s in shapes
            )
            found[match[2]] = found.get(match[2], 0) + size
    return found


def measure(out: str) -> None:
    """Write what each layout costs on the devices of this process, which was started for it."""
    found = {}
    for name, (kind, fsdp) in LAYOUTS.items():
        state, step, batch = program(kind, fsdp)
        held = [
            x for x in jax.tree.leaves(state) if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        ]
        row = {
            "communicated": communicated(step, state, batch),
            "state": sum(x.nbytes for x in held),
            "state on a device": sum(x.addressable_shards[0].data.nbytes for x in held),
        }
        for _ in range(3):
            state, metrics = step(state, batch)
        jax.block_until_ready(metrics)
        steps, calls = [], []
        for _ in range(15):
            began = time.perf_counter()
            state, metrics = step(state, batch)
            calls.append(time.perf_counter() - began)
            jax.block_until_ready(metrics)
            steps.append(time.perf_counter() - began)
        found[name] = row | {"step": statistics.median(steps), "call": statistics.median(calls)}
    if jax.process_index() == 0:
        Path(out).write_text(json.dumps(found))


def measured(devices: int, processes: int = 1) -> dict:
    """What `measure` finds in fresh processes."""
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/out.json"
        command = ["studies/scaling.py", out]
        if processes > 1:
            share = f"--devices={devices // processes}"
            launcher = ["-m", "diffjax.launch", f"--processes={processes}", share, "--restarts=0"]
            command = [*launcher, "--", *command]
        environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, *command], check=True, cwd=ROOT, env=environment)
        return json.loads(Path(out).read_text())


def step_rows():
    """Rows of layout, devices, step time relative to one device, and bytes."""
    rounds = [{n: measured(n) for n in DEVICES} | {"2 x 4": measured(8, 2)} for _ in range(3)]
    middle = lambda n, name, what: statistics.median(r[n][name][what] for r in rounds)
    alone = middle(1, "sharded", "step")
    for name in LAYOUTS:
        for n in (*DEVICES, "2 x 4"):
            row = rounds[0][n][name]
            sent = ", ".join(f"{kind} {size:,}" for kind, size in row["communicated"].items())
            step, call = middle(n, name, "step"), middle(n, name, "call")
            times = f"{step / alone:.2f}", f"{call * 1e3:.1f} ms"
            yield [name, str(n), *times, sent or "none", f"{row['state on a device']:,}"]
    yield [
        "(one device)",
        "1",
        f"1 = {alone * 1e3:.0f} ms",
        "",
        "",
        f"{rounds[0][1]['pmap']['state']:,}",
    ]


def saving_rows():
    """Rows of state size, and seconds to hand over, to write, to verify and to read."""
    for megabytes in (16, 64, 256, 1024, 4096):
        n = megabytes * 2**20 // 4 // 16
        state = {str(i): jax.random.normal(jax.random.key(i), (n,)) for i in range(16)}
        jax.block_until_ready(state)
        with tempfile.TemporaryDirectory() as folder:
            workdir, times = Path(folder), [time.perf_counter()]
            lap = lambda times=times: times.append(time.perf_counter())
            with run_directory.open_run(workdir, CONFIG) as checkpoints:
                lap()
                checkpoints.save(1, state)
                lap()
                checkpoints.wait()
                lap()
            (path,) = run_directory.list_checkpoints(workdir)
            lap()
            assert checkpoints_lib.damage_of(path) is None
            lap()
            with run_directory.open_run(workdir, CONFIG) as checkpoints:
                began = time.perf_counter()
                jax.block_until_ready(checkpoints.restore(state))
                read = time.perf_counter() - began
        taken = times[2] - times[1], times[3] - times[2], times[5] - times[4], read
        yield [f"{megabytes:,} MiB", *(f"{seconds:.2f}" for seconds in taken)]


def start_rows():
    """Rows of the time from the start of `make train` to the end of its first step."""
    with tempfile.TemporaryDirectory() as folder:
        for cache in ("empty", "full"):
            command = ["train.py", "--config=configs/digits.py", f"--workdir={folder}/{cache}"]
            environment = os.environ | {
                "JAX_COMPILATION_CACHE_DIR": f"{folder}/compiled",
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            }
            steps = ["--config.steps=1", "--config.sampling.steps=1"]
            steps += ["--config.sampling.eval_samples=0"]
            done = subprocess.run(
                [sys.executable, *command, *steps],
                check=True,
                cwd=ROOT,
                env=environment,
                capture_output=True,
                text=True,
            )
            yield [cache, re.search(r"first step after (\d+) s", done.stdout)[1] + " s"]


@dataclasses.dataclass(frozen=True)
class Pod:
    """Published figures of a machine, per chip."""

    name: str
    chips: int
    flops: float  # operations per second
    within: float  # bytes per second to the other chips of a node, or of the torus
    between: float  # bytes per second to other nodes; inf if all chips are in one torus
    node: int  # chips in a node
    memory: float  # bytes


PODS = (
    Pod("TPU v5e-256", 256, 197e12, 200e9, float("inf"), 256, 16e9),
    Pod("64 x H100 SXM", 64, 989e12, 450e9, 50e9, 8, 80e9),
)
NETWORKS = {
    "DDPM, CIFAR-10": (
        UNetConfig(width=128, mults=(1, 2, 2, 2), blocks=2, attention=(16,), groups=32),
        (32, 32, 3),
    ),
    "ADM, ImageNet 64": (
        UNetConfig(
            width=192,
            mults=(1, 2, 3, 4),
            blocks=3,
            attention=(32, 16, 8),
            head_width=64,
            scale_shift=True,
            resblock_updown=True,
            labels=1000,
            out_channels=6,
        ),
        (64, 64, 3),
    ),
}
EFFICIENCY = 0.35


def work(model: UNetConfig, shape: tuple[int, ...]) -> tuple[float, int]:
    """Operations to train on one image, and the number of parameters."""
    module, x = UNet(model), jnp.zeros((1, *shape))
    cond = {"label": jnp.zeros(1, jnp.int32)}
    init = lambda: module.init(jax.random.key(0), x, jnp.zeros(1), cond)["params"]
    params = jax.eval_shape(init)

    def loss(params, x):
        return jnp.sum(apply(module, params, x, jnp.zeros(1), cond))

    count = sum(int(np.prod(p.shape)) for p in jax.tree.leaves(params))
    return telemetry.flops(jax.grad(loss), params, x), count


def all_reduce(pod: Pod, size: float) -> float:
    """Seconds to sum `size` bytes over all chips: in each node, between nodes, in each node."""
    share = lambda n: (n - 1) / n
    nodes = pod.chips // pod.node
    inside = 2 * share(pod.node) * size / pod.within
    return inside + 2 * share(nodes) * size / pod.node / pod.between


def pod_rows():
    """Rows of machine, network, and what one step would take."""
    for pod in PODS:
        for name, (model, shape) in NETWORKS.items():
            flops, count = work(model, shape)
            image = flops / (pod.flops * EFFICIENCY)
            reduce = all_reduce(pod, 4 * count)
            # An all-reduce is a scatter and a gather. FSDP gathers the parameters for the forward
            # and again for the backward pass, and scatters the gradients: 3 halves of that.
            sharded = 1.5 * reduce
            each = 8
            together = max(each * image, reduce)
            yield [
                pod.name,
                name,
                f"{flops / 1e9:.0f} G",
                f"{image * 1e6:.0f} us",
                f"{reduce * 1e3:.2f} ms",
                f"{reduce / image:.1f}",
                f"{sharded / image:.1f}",
                f"{pod.chips * each / together:,.0f}",
                f"{16 * count / 1e9:.1f} of {pod.memory / 1e9:.0f} GB",
            ]


PAGE = """\
# Cost as the work grows

Written by `PYTHONPATH=. python studies/scaling.py` on {date}: JAX {jax}, CPU, {cores} cores.

## Layouts, on virtual devices

The work is one training step of the digits' network (0.29 million parameters, batch {batch} in
all). Times are medians of three interleaved rounds of 15 steps, relative to one device in one
process. All devices share the same {cores} cores, so the table shows what a layout costs, not what
it gains: more than {cores} devices cannot be faster, and two processes exchange data through
sockets. "Call" is how long the host is busy with one call; on a CPU that includes part of the
computation. "Bytes communicated" are what the collectives of the compiled program return. "State"
is what one device holds of parameters, average and optimiser.

{steps}
`pmap` and `sharded` compile to the same all-reduce of gradients. With FSDP on eight devices each
holds less than a quarter of the state (arrays of fewer than 4,096 numbers are not split), at the
cost of gathers.

## Checkpoints against the size of the state

All times are in seconds, for one process and a local disk. "Hand over" is how long training waits.
Writing goes on in the background, and includes a SHA-256 of every file. A restart waits for
"verify" and "read".

{saving}
## Start-up

The time from the start of `train.py --config=configs/digits.py` to the end of its first step
depends on whether JAX's persistent compilation cache (`JAX_COMPILATION_CACHE_DIR`) already holds
its programs.

{start}
## What a pod would do: arithmetic, not measurement

Nothing here was run. The number of operations for one image, forward and backward, is that of
convolutions and matrix products (`telemetry.flops`). The assumptions are {efficiency:.0%} of the
peak in bfloat16 (one H100 measured 20% for DDPM's network, whose rows are optimistic by 1.8 times,
and 34% for ADM's), and gradients in float32 that are summed by rings and not overlapped with
computation. The hardware figures are the makers': 197 TFLOP/s, 16 GB and 1,600 Gbit/s to its
neighbours for a v5e chip; 989 TFLOP/s, 80 GB, 450 GB/s each way to seven others by NVLink and 400
Gbit/s to other nodes for an H100. Gradients are summed within each node first, so that every chip
sends an eighth of them over its own link. The state is 16 bytes per parameter: the parameter, its
average, and Adam's two moments.

{pods}
"Even batch" is the number of images per chip at which computing takes as long as summing. Below it
communication dominates; above it overlap can hide communication. "Images/s" assumes 8 images per
chip and full overlap. It follows that:

- Either network fits on a chip with its whole state. Data parallelism is enough, and `fsdp` is for
  larger networks: on 64 H100s FSDP moves half as much data again, and needs a larger batch to hide
  it.
- DDPM's batch of 128 is less than one image per chip on 256 chips. A pod helps only with a larger
  batch (and its learning rate), or for several runs side by side.
- ADM's published batch of 2,048 is 8 images per chip on a v5e-256 and 32 on 64 H100s.
"""


def main() -> None:
    """Write docs/scaling.md."""
    head = ["layout", "devices", "step", "call", "bytes communicated", "state on a device"]
    pod_head = ["machine", "network", "FLOP an image", "time an image", "sum of gradients"]
    pod_head += ["even batch", "even batch, FSDP", "images/s, all chips", "state"]
    page = PAGE.format(
        date=datetime.date.today(),
        jax=jax.__version__,
        cores=len(os.sched_getaffinity(0)),
        batch=BATCH,
        efficiency=EFFICIENCY,
        steps=table(head, step_rows()),
        saving=table(["state", "hand over", "write", "verify", "read"], saving_rows()),
        start=table(["cache", "first step after"], start_rows()),
        pods=table(pod_head, pod_rows()),
    )
    (ROOT / "docs" / "scaling.md").write_text(page)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        out, *words = sys.argv[1:]
        given = dict(word.removeprefix("--distributed.").split("=") for word in words)
        numbers = {k: v if k == "coordinator" else int(v) for k, v in given.items()}
        which = distributed.Distributed(**numbers) if given else distributed.ALONE
        distributed.setup(which, BATCH)
        measure(out)
