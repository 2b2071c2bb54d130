"""Seconds and quality of each sampler against its number of steps, on a trained model.

    PYTHONPATH=. python benchmarks/sampling.py --workdir=runs/fashion

Writes benchmarks/results/sampling.json.
"""

import argparse
import dataclasses
import datetime
import json
import os
import time
from pathlib import Path

import jax
import numpy as np

from diffjax import checkpoint, data
from diffjax.evaluation import distances, sampling
from diffjax.experiment import resolve
from diffjax.training import distributed, runners

HERE = Path(__file__).parent
SAMPLERS = (
    "ancestral",
    "ddim",
    "heun",
    "dpm_solver_pp_2m",
    "dpm_solver_pp_3m",
    "dpm_solver_pp_2m_sde",
    "unipc",
)
EVALUATIONS = (6, 10, 20, 50)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, default=Path("runs/fashion"))
    parser.add_argument("--n", type=int, default=1000, help="images of each kind")
    args = parser.parse_args()
    size = args.n // 2
    distributed.setup(distributed.ALONE, size)
    network, params, config = checkpoint.load(args.workdir)
    dataset = data.load(config.data.name, config.data.path, config.data.size)
    real, label = data.all_examples(dataset)
    some = np.random.default_rng(0).permutation(len(real))[:10_000]  # 5,000 in each half at most
    runner = runners.pmap()
    index = np.arange(args.n, dtype=np.int32)
    batch = {"index": index, "label": index % config.model.labels}
    rows = []
    for sampler in SAMPLERS:
        drawn = sampling.Drawing(sampler=sampler, steps=1, seed=config.seed)
        each_step = sampling.function_evaluations(sampling.drawn_by(config, drawn))
        for evaluations in EVALUATIONS:
            drawn = dataclasses.replace(drawn, steps=evaluations // each_step)
            changed = sampling.drawn_by(config, drawn)
            shape = dataset.train.x.shape[1:]
            draw = runner.map(resolve.make_generate(changed, network, shape))
            runners.in_batches(runner, draw, params, {k: v[:1] for k, v in batch.items()}, size)
            began = time.perf_counter()  # it is compiled now
            x = runners.in_batches(runner, draw, params, batch, size)
            seconds = time.perf_counter() - began
            scores = distances.from_halves(x, batch["label"], real[some], label[some])
            row = {
                "sampler": sampler,
                "times": changed.sampling.times,
                "steps": changed.sampling.steps,
                "evaluations": evaluations,
                "seconds per 1000": seconds * 1000 / args.n,
            }
            rows.append(row | scores)
            print(rows[-1], flush=True)
    found = {
        "date": datetime.date.today().isoformat(),
        "devices": [str(device.device_kind) for device in jax.devices()],
        "cores": len(os.sched_getaffinity(0)),
        "n": args.n,
        "data": config.data.name,
        "guidance": config.sampling.guidance,
        "training steps": config.steps,
        "rows": rows,
    }
    (HERE / "results" / "sampling.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
