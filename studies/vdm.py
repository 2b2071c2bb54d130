"""Compare a schedule that is learned with fixed ones, at equal steps, for docs/results.md.

    PYTHONPATH=. python studies/vdm.py                  # nine runs: an hour and a half on two cores
    PYTHONPATH=. python studies/vdm.py --steps=20 --seeds 0 --held_out=16 --dry    # a try

A run is `train.py` with a variant of configs/vdm_fashion.py, then `evaluate.py`, in runs/vdm. Its
numbers go to `vdm.json` beside the record of results.py when it ends. A run that is finished or on
record is not made again, so that the same command continues a study that was stopped, here or on
another machine. The curves go to docs/images/vdm.png, and `studies/results.py --only` writes the
page.
"""

import argparse
import datetime
import itertools
import json
import math
import multiprocessing
import statistics
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

import diffjax
from diffjax import checkpoint, data, keys, plots
from diffjax.experiment import resolve, with_parameters
from diffjax.experiment.dataset import load_data
from diffjax.schedules import rate_at, time_at
from diffjax.training import metrics
from markdown_table import table

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "studies" / "results" / "vdm.json"
PICTURE = ROOT / "docs" / "images" / "vdm.png"
CONFIG = "configs/vdm_fashion.py"
VARIANTS = {"learned": "", "cosine": ":cosine", "linear": ":linear"}
PARTS = 32
"""Equal parts of the log-SNR range, over which the errors of a network are averaged."""


def commands(variant: str, seed: int, args: argparse.Namespace) -> list[list[str]]:
    """The commands that make a run."""
    workdir = f"--workdir={args.runs / variant}_{seed}"
    changes = [f"--config.{name}={args.steps}" for name in ("steps", "sample_every") if args.steps]
    config = f"--config={CONFIG}{VARIANTS[variant]}"
    return [
        ["train.py", config, workdir, f"--config.seed={seed}", *changes],
        ["evaluate.py", workdir, "--n=0", f"--held_out={args.held_out}"],
    ]


def make(variant: str, seed: int, args: argparse.Namespace) -> None:
    """Train and evaluate a run, if that has not been done."""
    if not (args.runs / f"{variant}_{seed}" / "evaluation.json").exists():
        for command in commands(variant, seed, args):
            print("vdm: python", *command, flush=True)
            subprocess.run([sys.executable, *command], check=True)


def numbers(variant: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """The numbers of a run."""
    workdir = args.runs / f"{variant}_{seed}"
    found = json.loads((workdir / "evaluation.json").read_text())
    rows = metrics.read(workdir)
    speed = statistics.median(row["img_per_s"] for row in rows if "img_per_s" in row)
    return {
        "bits": found["bound_bits_per_dim"],
        "standard_error": found["bound_standard_error"],
        "step_ms": 1e3 * found["config"]["batch_size"] / speed,
        "program": found["program"],
        "steps": found["config"]["steps"],
        "date": datetime.date.today().isoformat(),
        **measured(workdir, 16 * args.held_out),
    }


def measured(workdir: Path, n: int) -> dict[str, Any]:
    """The curve of a run's schedule, and the spread of one loss on it and on others.

    With e the squared error of eps per dimension at a log-SNR l, uniform between the ends, and r(l)
    the rate of a schedule at l, a loss is r e / 2 with density 1 / r: its mean is the same for
    every schedule, and its mean square is the integral of r E[e^2] / 4. The least is that of the
    rate proportional to E[e^2]^(-1/2).
    """
    apply, params, config = checkpoint.load(workdir)
    schedule = with_parameters(resolve(config), params).schedule
    high, low = float(schedule.log_snr(0.0)), float(schedule.log_snr(1.0))
    log_snr = low + (high - low) * (np.arange(n, dtype=np.float32) + 0.5) / n
    test = data.first(load_data(config).test, 10_000)["x"]
    x = test[np.random.default_rng(0).integers(len(test), size=n)]

    @jax.jit
    def error(key, x_0, log_snr):
        alpha, sigma = (s[:, None, None, None] for s in schedule.scales(log_snr))
        eps = keys.normal(keys.per_example(key, len(x_0)), x_0.shape, x_0.dtype)
        out = apply(params, alpha * x_0 + sigma * eps, log_snr, None)
        return jnp.mean((out - eps) ** 2, (1, 2, 3))

    size = 64
    each = [
        np.asarray(error(jax.random.key(i), x[i : i + size], log_snr[i : i + size]))
        for i in range(0, n - n % size, size)
    ]
    e = np.concatenate(each).astype(np.float64)
    log_snr, span = log_snr[: len(e)], high - low
    mean = span * e.mean() / 2
    std = lambda square: float(np.sqrt(square - mean**2))

    def on(schedule):
        return std(
            span * np.mean(np.asarray(rate_at(schedule, time_at(schedule, log_snr))) * e**2) / 4
        )

    roots = np.sqrt([part.mean() for part in np.array_split(e**2, PARTS)])
    spread = {
        "its own": on(schedule),
        "a straight line": on(diffjax.log_uniform(math.exp(-high / 2), math.exp(-low / 2))),
        "cosine": on(diffjax.cosine(low, high)),
        "the best": std((span * roots.mean() / 2) ** 2),
    }
    t = np.linspace(0, 1, 101, dtype=np.float32)
    best = np.concatenate([[0], np.cumsum(roots)]) / roots.sum()  # 1 - t, at the parts' edges
    return {
        "ends": [low, high],
        "std": spread,
        "curve": [round(float(v), 4) for v in schedule.log_snr(t)],
        "best": [round(float(v), 4) for v in 1 - best],
    }


def figure(runs: dict[str, dict[str, dict[str, Any]]]) -> Figure:
    """The learned schedule of each seed, beside the fixed ones and the best for its network."""
    figure, axes = plots.panels(1, 1, width=5.0, height=3.6)
    ax, t = np.ravel(axes)[0], np.linspace(0, 1, 101)
    for i, (variant, seeds) in enumerate(runs.items()):
        for k, run in enumerate(seeds.values()):
            label = variant if k == 0 else None
            ax.plot(t, run["curve"], "-", color=plots.COLOURS[i], label=label)
    for k, run in enumerate(runs["learned"].values()):
        edges = np.linspace(*run["ends"], PARTS + 1)
        label = "the least variance" if k == 0 else None
        ax.plot(run["best"], edges, ":", color=plots.INK, label=label)
    ax.set(xlabel="t", ylabel="log-SNR")
    ax.legend(fontsize=8, frameon=False)
    return figure


def spread(values: list[float]) -> str:
    """The mean and the standard deviation of the values, or the only one."""
    mean = statistics.mean(values)
    return f"{mean:.3f} ± {statistics.stdev(values):.3f}" if len(values) > 1 else f"{mean:.3f}"


SECTION = """\
## A learned schedule

The network is that of `configs/vdm_fashion.py`, trained by the bound for {steps} steps on {date}
({program}).
The rows differ in the schedule, of which only the first is learned ([A learned
schedule](howto/learned_schedule.md)). The numbers are {seeds}:
bits/dim of held-out examples, and the standard deviation of one loss, in nats per dimension, of the
trained network on its own schedule, on others between the same ends, and on the one with the least
variance.

{table}
![The schedules](images/vdm.png)

```bash
{command}
```

"""


def section(path: Path = RECORD) -> str:
    """The section of docs/results.md, from the record; empty before the study has been run."""
    return written(json.loads(path.read_text())) if path.exists() else ""


def written(record: dict[str, Any]) -> str:
    """The section from a record."""
    runs = record["runs"]
    seeds, some = list(runs["learned"]), next(iter(runs["learned"].values()))
    of = lambda seeds, f: spread([f(run) for run in seeds.values()])
    rows = [
        [
            variant,
            of(seeds, lambda run: run["bits"]),
            *(of(seeds, lambda run, k=k: run["std"][k]) for k in some["std"]),
            of(seeds, lambda run: run["ends"][0]),
            of(seeds, lambda run: run["ends"][1]),
            f"{statistics.mean(run['step_ms'] for run in seeds.values()):.0f}",
        ]
        for variant, seeds in runs.items()
    ]
    stds = [f"std on {name}" for name in some["std"]]
    head = ["", "bits/dim", *stds, "log-SNR at t = 1", "at t = 0", "ms a step"]
    programs = [run["program"] for of in runs.values() for run in of.values()]
    on = {f"{p['devices']} x {p['device']}, jax {p['jax']}" for p in programs}
    return SECTION.format(
        steps=f"{some['steps']:,}",
        date=" and ".join(sorted({run["date"] for of in runs.values() for run in of.values()})),
        program="; ".join(sorted(on)),
        seeds=f"means over seeds {', '.join(seeds)}, ± the standard deviation"
        if len(seeds) > 1
        else "of one run each",
        table=table(head, rows),
        command=record["command"],
    )


def main() -> None:
    """Make the runs, and write the record, the picture and the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, help="of each run, for a try")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--held_out", type=int, default=1000, help="examples whose bits are counted"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/vdm"))
    parser.add_argument("--dry", action="store_true", help="print the section, write nothing")
    args = parser.parse_args()
    if args.steps and not args.dry:
        parser.error("--steps needs --dry: the record is of runs with the steps of the config")
    record: dict[str, Any] = {"command": "PYTHONPATH=. python studies/vdm.py", "runs": {}}
    if RECORD.exists() and not args.dry:
        record = json.loads(RECORD.read_text())
    for seed, variant in itertools.product(args.seeds, VARIANTS):
        seeds = record["runs"].setdefault(variant, {})
        if str(seed) not in seeds:
            make(variant, seed, args)
            # JAX, which holds a GPU's memory, runs in a process that ends before the next run.
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                seeds[str(seed)] = pool.submit(numbers, variant, seed, args).result()
            if not args.dry:
                RECORD.write_text(json.dumps(record, indent=1) + "\n")
    if args.dry:
        print(written(record))
        return
    figure(record["runs"]).savefig(PICTURE)
    subprocess.run([sys.executable, "studies/results.py", "--only"], check=True, cwd=ROOT)


if __name__ == "__main__":
    main()
