"""Measure seconds and quality of samplers against their number of steps, on a trained model.

    python studies/speed_sampling.py --workdir=runs/fashion
    python studies/speed_page.py

Writes studies/results/sampling.json, which the second command puts into docs/performance.md.
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
from diffjax.experiment import dataset
from diffjax.experiment.command_line import walk_defaults
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
    """Draw with each sampler, on the grid that suits it best, and write its cost and quality."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, default=Path("runs/fashion"))
    parser.add_argument("--n", type=int, default=1000, help="images of each kind")
    args = parser.parse_args()
    size = args.n // 2
    distributed.setup(distributed.ALONE, size)
    _, params, config = checkpoint.load(args.workdir)
    examples = dataset.load_data(config)
    shape = examples.train.x.shape[1:]
    real, label = data.all_examples(examples)
    some = np.random.default_rng(0).permutation(len(real))[:10_000]  # 5,000 in each half at most
    runner = runners.pmap()
    index = np.arange(args.n, dtype=np.int32)
    batch = {"index": index, "label": index % config.model.labels}
    rows = []
    for sampler in SAMPLERS:
        walk = dataclasses.replace(walk_defaults(config.sampling, sampler), steps=1)
        drawing = sampling.Drawing(seed=config.seed, walk=walk)
        each_step = sampling.function_evaluations(sampling.drawn_by(config, drawing))
        for evaluations in EVALUATIONS:
            walk = dataclasses.replace(walk, steps=evaluations // each_step)
            e = sampling.drawn_by(config, dataclasses.replace(drawing, walk=walk))
            draw = runner.map(sampling.make_generate(e, shape))
            first = {k: v[:1] for k, v in batch.items()}
            runners.in_batches(runner, draw, params, first, size)  # compiles the program
            began = time.perf_counter()
            x = runners.in_batches(runner, draw, params, batch, size)
            seconds = time.perf_counter() - began
            scores = distances.from_halves(x, batch["label"], real[some], label[some])
            row = {
                "sampler": sampler,
                "times": walk.grid,
                "steps": walk.steps,
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
        "guidance": " ".join(config.sampling.guidance) or "none",
        "training steps": config.steps,
        "rows": rows,
    }
    (HERE / "results" / "sampling.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
