"""Run the programs of aot.py on the GPU of this machine, and record what they take.

    PYTHONPATH=. python studies/gpu_run.py ddpm walk

The program must be on record in studies/results/aot.json, where its times go; `aot.py --only`
writes docs/accelerators.md from the record.
"""

import argparse
import datetime
import functools
import json
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aot
import hlo
import jax
import numpy as np
from jax.profiler import ProfileData

from diffjax.experiment.functions import initial_state
from diffjax.training import telemetry
from speed_workloads import DDIM_STEPS

LIBRARIES = (
    ("attention", r"fmha|sdpa|flash|dot_do_o|convert_dq"),
    (aot.CONVOLUTION, r"fprop|dgrad|wgrad|conv|cudnn"),
    ("products", r"gemm|nvjet|cutlass"),
)
"""Parts of a program whose kernels are of libraries, each with a pattern of a kernel's name."""


def measured(name: str) -> dict[str, Any]:
    """Run a program for one device on the first of this machine, and return what it takes."""
    program = aot.PROGRAMS[name]
    network, device = aot.NETWORKS[program.network], jax.devices()[0]
    with aot.casting(program):
        w = aot.work(program, [device])
        run = w.function.lower(*w.arguments).compile()
    state = w.runner.init(initial_state(w.experiment, network.shape))
    draws = np.random.default_rng(0)
    batch = {
        k: draws.uniform(-1, 1, x.shape) if k == "x" else np.arange(program.batch)
        for k, x in w.arguments[1].items()
    }
    batch = w.runner.put({k: v.astype(w.arguments[1][k].dtype) for k, v in batch.items()})
    call = functools.partial(run, state.ema_params, batch)
    if not program.walk:

        def call():
            nonlocal state
            state, metrics = run(state, batch)
            return metrics

    steps = DDIM_STEPS if program.walk else 1
    found = {
        "date": datetime.date.today().isoformat(),
        "device": device.device_kind,
        "version": f"jax {jax.__version__}",
        "seconds": [each / steps for each in timed(call)],
        "memory": telemetry.peak_memory(),
    }
    with tempfile.TemporaryDirectory() as folder:
        calls = 1 if program.walk else 3
        with jax.profiler.trace(folder):
            for _ in range(calls):
                jax.block_until_ready(call())
        (trace,) = Path(folder).rglob("*.xplane.pb")
        return found | {"parts": ran(trace, run.as_text(), calls * steps)}


def ran(trace: Path, text: str, times: int) -> dict[str, dict[str, float]]:
    """Kernels and seconds of each part of a program, by a trace of so many runs of it.

    XLA names its own kernels as the instructions of the program's text, and libraries do not.
    """
    named = {re.sub(r"\W", "_", k.line.name): aot.part(k) for k in hlo.kernels(text)}
    found: dict[str, dict[str, float]] = {}
    for plane in ProfileData.from_file(str(trace)).planes:
        lines = plane.lines if plane.name.startswith("/device:GPU") else ()
        for event in (event for line in lines if "Stream" in line.name for event in line.events):
            library = (name for name, pattern in LIBRARIES if re.search(pattern, event.name))
            name = named.get(re.sub(r"\W", "_", event.name)) or next(library, aot.UNNAMED)
            row = found.setdefault(name, {"kernels": 0, "seconds": 0.0})
            row["kernels"] += 1 / times
            row["seconds"] += event.duration_ns / 1e9 / times
    return found


def timed(call: Callable, rounds: int = 7, calls: int = 5) -> list[float]:
    """Seconds of a call in each round, of several calls that follow each other."""
    found = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        for _ in range(calls):
            out = call()
        jax.block_until_ready(out)
        found.append((time.perf_counter() - began) / calls)
    return found[1:]  # the first round warms up


def main() -> None:
    """Run programs that are on record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("programs", nargs="+", choices=aot.on_record())
    for name in parser.parse_args().programs:
        found = measured(name)
        print(name, *(f"{1e3 * each:.2f} ms" for each in found["seconds"]), flush=True)
        record = aot.on_record()
        record[name]["measured"] = found
        aot.RECORD.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
