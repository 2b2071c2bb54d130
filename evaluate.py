"""Evaluate a trained run on held-out data: bits per dimension, with their standard error.

    python evaluate.py --workdir=runs/digits
    python evaluate.py --workdir=runs/digits --flow=True     # by the probability flow too
    python evaluate.py --help

Prints a line for each number and writes them all, with what they depend on, to
DIR/evaluation.json.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from diffjax import checkpoint, data, experiment, likelihood, parallel
from diffjax.config import plainly


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to evaluate."""

    workdir: Path = Path("runs/digits")
    """A run's directory."""
    n: int | None = None
    """Held-out examples to look at, the first so many; None: all."""
    samples: int = 32
    """Times at which the bound looks at each example."""
    flow: bool = False
    """Whether to follow the probability flow too: 4 x flow_steps evaluations and derivatives."""
    flow_steps: int = 50
    """Its steps."""
    distributed: parallel.Distributed = parallel.Distributed()  # noqa: RUF009, it is frozen


def evaluate(args: Arguments) -> dict[str, Any]:
    """The numbers that `evaluation.json` gets."""
    if args.samples < 2 or args.flow_steps < 1 or (args.n is not None and args.n < 2):
        raise ValueError(
            f"samples={args.samples}, flow_steps={args.flow_steps}, n={args.n}: need at least 2 "
            "samples, 1 step and 2 examples"
        )
    config = checkpoint.read_config(args.workdir)
    # Nothing would be saved: a signal shall end it, not wait for a step to ask.
    jax.config.update("jax_enable_preemption_service", False)
    parallel.setup(args.distributed, config.batch_size)
    parallel.check_batch(config.batch_size)
    network, params, _ = checkpoint.load(args.workdir)
    _, test_set = experiment.load_data(config)
    levels = data.levels(config.data.name, test_set)
    batch = data.first(test_set, args.n or len(test_set.x))
    n = len(batch["index"])
    shape = batch["x"].shape[1:]

    measures = {"bound": experiment.make_bound(config, network, levels, args.samples)}
    if args.flow:
        measures["flow"] = experiment.make_flow_bound(config, network, levels, args.flow_steps)
    runner = parallel.RUNNERS[config.parallel](1)
    found: dict[str, Any] = {}
    for name, measure in measures.items():
        nats = parallel.in_batches(runner, runner.map(measure), params, batch, config.batch_size)
        bits = np.asarray(likelihood.bits_per_dim(nats, shape), np.float64)
        found[f"{name}_bits_per_dim"] = float(bits.mean())
        found[f"{name}_standard_error"] = float(bits.std(ddof=1) / math.sqrt(n))
    return found | {
        "n": n,
        "seed": config.seed,
        "samples": args.samples,
        "flow_steps": args.flow_steps,
        "levels": levels,
        "time_steps": config.time_steps,
        "target": config.target,
    }


def main(args: Arguments) -> None:
    """Evaluate, print and write."""
    with plainly():
        found = evaluate(args)
    if jax.process_index():
        return
    for name in ("bound", "flow"):
        if f"{name}_bits_per_dim" in found:
            value, error = found[f"{name}_bits_per_dim"], found[f"{name}_standard_error"]
            print(f"{name}: {value:.3f} +- {error:.3f} bits per dimension, n={found['n']}")
    with plainly():
        (args.workdir / "evaluation.json").write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    with parallel.failing_fast():
        main(tyro.cli(Arguments, description=__doc__, config=(tyro.conf.FlagConversionOff,)))
