"""Measure where the milliseconds of a training step and of a sampling step go, by XLA's own trace.

    PYTHONPATH=. python studies/speed_breakdown.py
    python studies/speed_page.py

Writes studies/results/breakdown.json, which the second command puts into docs/performance.md.
"""

import collections
import datetime
import glob
import gzip
import json
import math
import os
import re
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from speed_ours import prepare, product_speed
from speed_workloads import CPU, DDIM_STEPS

HERE = Path(__file__).parent
STEPS = 5
KINDS = (
    ("convolution, gradient of the kernel", r"^conv (?!1x1|2x2|3x3)"),
    ("convolution, gradient of the input", r"^conv .*transpose\(jvp"),
    ("convolution", r"^conv "),
    ("attention's and dense layers' products", r"^dot "),
    ("sums over devices, with waiting", r"^all-"),
    ("copies, transposes", r"^(copy|transpose|concatenate|slice|pad)"),
    ("normalisation, activations, softmax, sums", r"UNet"),
)
"""Kinds of work, each with a pattern of an operation's description; the first that matches counts.

The gradient of a kernel is a convolution whose window is the image."""
OTHER = "optimiser, average, noise, the rest"

INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?([\w.\-]+) = \w+\[([\d,]*)\]\S* ([\w\-]+)\((.*)")


def described(hlo: str) -> dict[str, tuple[str, float]]:
    """A description of each instruction of a program, and the operations of its convolutions.

    A fusion is described by what it contains: its convolution, its product, or a line of the model.
    """
    bodies, found, sizes = collections.defaultdict(list), {}, {}
    computation = ""
    for line in hlo.splitlines():
        if line.endswith("{") and (head := re.match(r"(?:ENTRY )?%?([\w.\-]+) ", line)):
            computation = head[1]
        if not (match := INSTRUCTION.match(line)):
            continue
        name, shape, op, rest = match.groups()
        sizes[computation, name] = shape = [int(n) for n in shape.split(",") if n]
        path = re.search(r'op_name="([^"]*)"', rest)
        text, work = f"{op} {path[1] if path else ''}", 0.0
        if op == "convolution":
            labels = re.search(r"dim_labels=(\w+)", rest)
            window = re.search(r"window={size=([\dx]+)", rest)
            assert labels is not None
            assert window is not None
            left = sizes[computation, rest.split(",")[0].split()[-1].strip("%)")]
            taps = math.prod(int(n) for n in window[1].split("x"))
            work = 2.0 * math.prod(shape) * taps * left[labels[1].index("f")]
            text = f"conv {window[1]} {text}"
        elif op == "fusion" and (calls := re.search(r"calls=%?([\w.\-]+)", rest)):
            inside = bodies[calls[1]]
            text = max([text, *(each[0] for each in inside)], key=telling)
            text = text if telling(text) > 1 else f"{name} {text}"
            work = sum(each[1] for each in inside)
        bodies[computation].append((text, work))
        found[name] = text, work
    return found


def telling(text: str) -> int:
    """How much a description says about the kind of work; the highest of a fusion's is kept."""
    return 3 * text.startswith("conv ") or 2 * text.startswith("dot ") or "UNet" in text


def kind_of(text: str) -> str:
    """The kind of work that a description stands for."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, text)), OTHER)


def traced(run) -> dict[str, float]:
    """Milliseconds spent in each instruction during a run, added up over threads."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        (file,) = glob.glob(f"{folder}/**/*.trace.json.gz", recursive=True)
        with gzip.open(file) as text:
            events = json.load(text)["traceEvents"]
    found = collections.Counter()
    for event in events:
        name = event.get("args", {}).get("hlo_op")
        if name and not name.startswith(("while", "call")):
            found[name] += event["dur"] / 1e3
    return found


def profile(name: str) -> dict[str, dict]:
    """Milliseconds of a device by kind of work, for a training step and for a sampling step."""
    work = prepare(name, "float32")
    state = work.state
    params = jax.tree.map(jnp.copy, state.ema_params)  # the step donates its state
    programs = {
        "train": work.step.lower(state, work.batch),
        "sample": work.generate.lower(params, work.requested),
    }

    def train():
        nonlocal state
        for _ in range(STEPS):
            state, metrics = work.step(state, work.batch)
        jax.block_until_ready(metrics)

    def sample():
        work.generate(params, work.requested).block_until_ready()

    runs = {"train": train, "sample": sample}
    result = {}
    for what, run in runs.items():
        texts = described(programs[what].compile().as_text())
        run()
        began = time.perf_counter()
        run()
        steps = STEPS if what == "train" else DDIM_STEPS
        wall = (time.perf_counter() - began) * 1e3 / steps
        kinds, rates = collections.Counter(), collections.Counter()
        for op, spent in traced(run).items():
            text, operations = texts.get(op, (op, 0.0))
            kind = kind_of(text)
            kinds[kind] += spent / steps / jax.device_count()
            rates[kind] += operations * jax.device_count()
        speeds = {kind: rates[kind] / kinds[kind] / 1e6 for kind in kinds if rates[kind]}
        result[what] = {"wall": wall, "kinds": dict(kinds), "gflop_per_s": speeds}
        print(name, what, json.dumps(result[what], indent=1), flush=True)
    return result


def main() -> None:
    """Measure the workloads of a CPU, and write the result."""
    found = {
        "date": datetime.date.today().isoformat(),
        "cores": len(os.sched_getaffinity(0)),
        "workloads": {name: profile(name) for name in CPU},
        "product_gflop_per_s": product_speed(bfloat16=False) / 1e9,
    }
    (HERE / "results" / "breakdown.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
