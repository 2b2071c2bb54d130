"""Measure how a training step's time, memory and compilation grow, one parameter at a time.

    PYTHONPATH=. python studies/speed_curves.py
    python studies/speed_page.py

Writes studies/results/curves.json, which the second command puts into docs/performance.md.
`scaling.py` measures how the cost grows with the number of devices.
"""

import datetime
import json
import os
import time
from pathlib import Path

import jax
import numpy as np

import train
from diffjax.experiment import Config, Optimizer, resolve
from diffjax.experiment.functions import initial_state
from diffjax.models import UNetConfig
from diffjax.training import distributed, runners, telemetry

HERE = Path(__file__).parent
BASE = dict(size=16, batch=64, width=32, blocks=1, remat=False)
CURVES = {
    "batch": (16, 32, 64, 128, 256),
    "size": (8, 16, 32, 64),
    "width": (16, 32, 64, 128),
    "blocks": (1, 2, 4, 8),
}
STEPS = 5


def point(size: int, batch: int, width: int, blocks: int, remat: bool) -> dict[str, float]:
    """Measure one training step of a U-Net of two levels with attention at 8x8."""
    model = UNetConfig(width, (1, 2), blocks, attention=(8,), groups=8, dropout=0.0, remat=remat)
    e = resolve(Config(model=model, optimizer=Optimizer(), batch_size=batch))
    runner, shape = runners.pmap(), (size, size, 3)
    state = runner.init(initial_state(e, shape))
    step = runner.step(train.make_step(e, train.make_loss(e, levels=None)))
    x = np.random.default_rng(0).uniform(-1, 1, (batch, *shape)).astype(np.float32)
    data = runner.put({"x": x, "index": np.arange(batch, dtype=np.int32)})
    lowered = step.lower(state, data)
    began = time.perf_counter()
    compiled = lowered.compile()
    compiling = time.perf_counter() - began
    taken = []
    for _ in range(STEPS + 1):
        began = time.perf_counter()
        state, metrics = step(state, data)
        jax.block_until_ready(metrics)
        taken.append(time.perf_counter() - began)
    return {
        "step": min(taken[1:]),
        "compile": compiling,
        "temporary": compiled.memory_analysis().temp_size_in_bytes,
        "gflop": telemetry.flops(step, state, data) * jax.device_count() / 1e9,
    }


def main() -> None:
    """Measure all curves, and write them."""
    jax.config.update("jax_enable_compilation_cache", False)
    distributed.setup(distributed.ALONE, 16)
    found = {
        "date": datetime.date.today().isoformat(),
        "cores": len(os.sched_getaffinity(0)),
        "base": BASE,
        "curves": {},
    }
    curves = {name: [BASE | {name: v} for v in values] for name, values in CURVES.items()}
    curves["remat"] = [BASE | {"blocks": 4, "remat": remat} for remat in (False, True)]
    for name, points in curves.items():
        found["curves"][name] = [{"at": p[name]} | point(**p) for p in points]
        print(name, *found["curves"][name], sep="\n  ", flush=True)
    (HERE / "results" / "curves.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
