"""Evaluate a trained run: bits per dimension of held-out data, and the distance of samples to data.

    python evaluate.py --workdir=runs/digits
    python evaluate.py --workdir=runs/digits --flow=True     # bits by the probability flow too
    python evaluate.py --workdir=runs/fashion --features=fashion_classifier --n=10000
    python evaluate.py --workdir=runs/digits --samples=runs/digits/generated.npz
    python evaluate.py --compare runs/a runs/b               # a table, and a picture of it
    python evaluate.py --help

Prints every number and writes them all, with what they depend on, to DIR/evaluation.json, or to the
file of --result.
"""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from rich.console import Console

from diffjax import (
    checkpoint,
    comparison,
    data,
    drawing,
    evaluation,
    experiment,
    features,
    files,
    likelihood,
    parallel,
    provenance,
)
from diffjax.config import Config, flatten, plainly, to_json
from diffjax.drawing import Drawing


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to evaluate."""

    workdir: Path = Path("runs/digits")
    """A run's directory."""
    held_out: int | None = None
    """Held-out examples whose bits to count, the first so many; None: all; 0: none."""
    looks: int = 32
    """Times at which the bound looks at each example."""
    flow: bool = False
    """Whether to follow the probability flow too: 4 x flow_steps evaluations and derivatives."""
    flow_steps: int = 50
    """Its steps."""
    features: str = "pca24"
    """The feature space of distances: pca24, fashion_classifier, or a function of yours,
    module:function, from images [n, height, width, channels] in [-1, 1] to [n, d]."""
    reference: str = "train"
    """What samples are compared with: the data's part train, or test."""
    samples: Path | None = None
    """A file of sample.py's to measure; None: draw `n` now."""
    drawing: tyro.conf.OmitArgPrefixes[Drawing] = Drawing()  # noqa: RUF009, it is frozen
    """Which samples to draw, by which walk; n=0: measure none."""
    result: Path | None = None
    """Where the numbers go, a file .json; None: DIR/evaluation.json."""
    compare: tuple[Path, ...] = ()
    """Runs that were evaluated, or their JSON files: nothing is evaluated, they are compared."""
    picture: Path = Path("comparison.png")
    """Where the comparison is drawn."""
    distributed: parallel.Distributed = parallel.Distributed()  # noqa: RUF009, it is frozen
    """Which of how many processes this is."""


def evaluate(args: Arguments) -> dict[str, Any]:
    """The numbers that `evaluation.json` gets, and what they depend on."""
    check(args)
    config = checkpoint.read_config(args.workdir)
    given = None if args.samples is None else drawing.read(args.samples)
    drawn = drawing.configured(config, args.drawing) if args.drawing.n else config
    # Nothing would be saved: a signal shall end it, not wait for a step to ask.
    jax.config.update("jax_enable_preemption_service", False)
    parallel.setup(args.distributed, config.batch_size)
    parallel.check_batch(config.batch_size)
    dataset = experiment.load_data(config)
    part = dataset.train if args.reference == "train" else dataset.test
    reference = data.take(part, np.arange(len(part.x)))["x"]
    space = features.named(args.features, reference) if given or args.drawing.n else None
    network, params, _ = checkpoint.load(args.workdir)
    made_by = {"parameters": drawing.parameters(config, params), "program": provenance.program()}
    found = made_by | {"config": json.loads(to_json(config))}

    if args.held_out != 0:
        found |= count_bits(args, config, network, params, dataset.test)
    if space is None:
        return found

    samples, settings = given or draw(drawn, args.drawing, network, params, reference.shape[1:])
    if settings["parameters"] != found["parameters"]:
        raise ValueError(f"{args.samples} is of other parameters than {args.workdir}'s newest")
    x = data.take(samples, np.arange(len(samples.x)))["x"]
    distances = evaluation.distances(space.features(x), space.features(reference))
    of = ("n", "label", "seed", "sampler", "options", "times", "steps", "guidance")
    return (
        found
        | distances
        | {
            "samples": {name: settings[name] for name in (*of, "function_evaluations")},
            "features": {"name": space.name, "sha256": space.sha256},
            "reference": {
                "data": config.data.name,
                "part": args.reference,
                "n": len(reference),
                "sha256": provenance.digest(part.x),
            },
        }
    )


def check(args: Arguments) -> None:
    """Refuse what makes no sense, before anything is loaded or compiled."""
    features.check(args.features)
    for holds, what in (
        (args.looks >= 2, f"looks={args.looks}: must be at least 2"),
        (args.flow_steps >= 1, f"flow_steps={args.flow_steps}: must be at least 1"),
        (
            args.held_out is None or args.held_out == 0 or args.held_out >= 2,
            f"held_out={args.held_out}: must be at least 2, or 0",
        ),
        (
            args.drawing.n == 0 or args.drawing.n >= 20,
            f"n={args.drawing.n}: must be at least 20, or 0",
        ),
        (
            args.reference in ("train", "test"),
            f"unknown reference {args.reference!r}: one of train, test",
        ),
        (
            args.result is None or (args.result.suffix == ".json" and args.result.parent.is_dir()),
            f"result={args.result}: must be a file .json in a folder that is there",
        ),
        (
            args.samples is None or args.drawing == Drawing(),
            f"samples={args.samples}: they are drawn already; give no n, sampler or the like",
        ),
    ):
        if not holds:
            raise ValueError(what)


def draw(
    config: Config,
    wanted: Drawing,
    network: Callable[..., Any],
    params: Any,
    shape: tuple[int, ...],
) -> tuple[data.Examples, dict[str, Any]]:
    """Samples of a shape, and their settings, as `drawing.read` has those of a file."""
    generate, n = experiment.make_generate(config, network, shape), wanted.n
    label = drawing.labels(config, wanted)
    parts = drawing.draw(generate, params, label, range(n), config.batch_size)
    samples = data.Examples(np.concatenate(list(drawing.watched(parts, "samples", n))))
    return samples, drawing.settings(config, wanted, params)


def count_bits(
    args: Arguments,
    config: Config,
    network: Callable[..., Any],
    params: Any,
    test_set: data.Examples,
) -> dict[str, Any]:
    """Bits per dimension of held-out examples, by the bound and, if asked for, by the flow."""
    levels = data.levels(config.data.name, test_set)
    batch = data.first(test_set, args.held_out or len(test_set.x))
    n = len(batch["index"])
    measures = {"bound": experiment.make_bound(config, network, levels, args.looks)}
    if args.flow:
        measures["flow"] = experiment.make_flow_bound(config, network, levels, args.flow_steps)
    runner = parallel.RUNNERS[config.parallel](1)
    found: dict[str, Any] = {}
    for name, measure in measures.items():
        nats = parallel.in_batches(runner, runner.map(measure), params, batch, config.batch_size)
        bits = np.asarray(likelihood.bits_per_dim(nats, batch["x"].shape[1:]), np.float64)
        found[f"{name}_bits_per_dim"] = float(bits.mean())
        found[f"{name}_standard_error"] = float(bits.std(ddof=1) / math.sqrt(n))
    return found | {
        "held_out": {
            "n": n,
            "seed": config.seed,
            "looks": args.looks,
            "flow_steps": args.flow_steps,
            "levels": levels,
            "time_steps": config.time_steps,
            "sha256": provenance.digest(batch["x"]),
        }
    }


def main(args: Arguments) -> None:
    """Evaluate, print and write; or compare."""
    with plainly(ValueError, OSError, ImportError):
        if args.compare:
            if dataclasses.replace(args, compare=(), picture=Arguments.picture) != Arguments():
                raise ValueError("compare: only reads and draws; give nothing but picture beside")
            results = comparison.read(args.compare)
            Console().print(comparison.table(results))
            comparison.figure(results).savefig(args.picture, dpi=120)
            print(f"drawn: {args.picture}")
            return
        found = evaluate(args)
        if jax.process_index() == 0:
            print(*comparison.lines(flatten(found)), sep="\n")
            home = args.workdir if args.workdir.is_dir() else args.workdir.parent
            text = json.dumps(found, indent=1) + "\n"
            files.write_text(args.result or home / comparison.RESULT, text)


if __name__ == "__main__":
    with parallel.failing_fast():
        main(tyro.cli(Arguments, description=__doc__, config=(tyro.conf.FlagConversionOff,)))
