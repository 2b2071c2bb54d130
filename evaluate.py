"""Evaluate a trained run: bits per dimension of held-out data, and the distance of samples to data.

    python evaluate.py --workdir=runs/digits
    python evaluate.py --workdir=runs/digits --flow=True     # bits by the probability flow too
    python evaluate.py --workdir=runs/fashion --features=fashion_classifier --n=10000
    python evaluate.py --workdir=runs/digits --samples=runs/digits/generated.npz
    python evaluate.py --workdir=runs/cifar --features=inception --weights=pt_inception.pth \\
        --reference=cifar10-32x32.npz --n=50000 --draws=3    # FID, as others report it
    python evaluate.py --compare runs/a runs/b               # a table, and a picture of it
    python evaluate.py --help

Prints every number, and writes all of them, with what they depend on, to DIR/evaluation.json, or to
the file of --result.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from rich.console import Console

from diffjax import checkpoint, data
from diffjax.evaluation import (
    comparison,
    distances,
    features,
    likelihoods,
    pixels,
    provenance,
    reference,
    sampling,
)
from diffjax.evaluation.command_line import parse_with_run
from diffjax.evaluation.sampling import Drawing
from diffjax.experiment import Experiment, resolve
from diffjax.experiment.command_line import error_exit
from diffjax.experiment.config import Eval, require, to_json
from diffjax.experiment.dataset import load_data, located
from diffjax.training import runners
from diffjax.training.distributed import Distributed, failing_fast, setup
from diffjax.training.files import digest, flatten, replacing, write_text

FEWEST = 20
"""The fewest samples, and examples, whose distance can be measured (see `kernel_distance`)."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to evaluate."""

    workdir: Path = Path("runs/digits")
    """A run's directory, an exported file, or the name of a network that comes with diffjax."""
    data_path: Path | None = None
    """The folder or file of the run's data; None: where the run says."""
    autoencoder: Path | None = None
    """The autoencoder that decodes latents; distances are then measured on the decoded images.
    None: that of the run."""
    held_out: int | None = None
    """Number of held-out examples whose bits are counted, from the first; None: all; 0: none."""
    bound_samples: int = 32
    """Times at which the bound evaluates each example."""
    flow: bool = False
    """Count bits by the probability flow too: 4 x flow_steps evaluations and derivatives."""
    flow_steps: int = 50
    """Steps of the probability flow."""
    features: str = "pca24"
    """The feature space of distances: pca24, fashion_classifier; inception (FID) or dinov2 (FDD),
    which need weights; or a function of yours, module:function, from images
    [n, height, width, channels] in [-1, 1] to [n, d]."""
    weights: Path | None = None
    """The file with the weights of inception or dinov2."""
    reference: str = "train"
    """What samples are compared with: the data's part train, or test, or a file of statistics of
    features, .npz (of EDM, ADM, pytorch-fid or write_reference) or .pkl (of EDM2)."""
    write_reference: Path | None = None
    """A file .npz, to which the statistics of the reference are written."""
    draws: int = 1
    """Number of independent draws of n samples; the best value and the mean are reported."""
    samples: Path | None = None
    """A file of sample.py whose samples are measured; None: draw `n` samples."""
    drawing: tyro.conf.OmitArgPrefixes[Drawing] = Drawing()  # noqa: RUF009, it is frozen
    """Which samples to draw, and how; n=0: none."""
    result: Path | None = None
    """Where the numbers are written, a file .json; None: DIR/evaluation.json."""
    compare: tuple[Path, ...] = ()
    """Evaluated runs, or their JSON files, to compare; nothing is evaluated."""
    picture: Path = Path("comparison.png")
    """Where the comparison is drawn."""
    distributed: Distributed = Distributed()  # noqa: RUF009, it is frozen
    """Where this process stands among several."""


def evaluate(args: Arguments) -> dict[str, Any]:
    """The numbers that `evaluation.json` gets, and what they depend on."""
    check(args)
    e = resolve(checkpoint.read_config(args.workdir))
    config = e.config
    if args.held_out != 0 and not args.flow:
        likelihoods.check_bound(config)
    given = None if args.samples is None else sampling.read(args.samples)
    if given is not None and len(given[0].x) < FEWEST:
        raise ValueError(f"{args.samples} holds {len(given[0].x)} samples: need {FEWEST} or more")
    drawn = sampling.drawn_by(config, args.drawing) if args.drawing.n and not given else e
    # A file of samples says which average of the parameters drew them.
    average = given[1].get("average") if given else args.drawing.average
    # Nothing would be saved, so SIGTERM may end the process at once.
    jax.config.update("jax_enable_preemption_service", False)
    setup(args.distributed)
    there = located(config, args.data_path, args.autoencoder)
    dataset = load_data(there, args.workdir if args.workdir.is_dir() else None)
    part = dataset.test if args.reference == "test" else dataset.train
    measures = bool(given or args.drawing.n or args.write_reference)
    require(
        (
            not measures or reference.is_file(args.reference) or len(part.x) >= FEWEST,
            f"reference={args.reference}: has {len(part.x)} examples: distances need {FEWEST} or "
            "more; n=0 measures none",
        ),
        (
            args.held_out == 0 or len(dataset.test.x) >= 2,
            "one example is held out: bits need 2 or more for their standard error; held_out=0 "
            "counts none",
        ),
    )
    runner = runners.choose(config.parallel)
    which = Eval(args.features, args.weights, args.reference)
    x = dataset.train.x
    form = pixels.form(there, runner, data.shape_of(x), x.dtype.type)
    real = None
    if measures:
        real = reference.load(which, form.dataset(dataset), config.data.name, runner)
    _, params, _ = checkpoint.load(args.workdir, average)
    sampling.check_parameters(params, args.workdir)
    made_by = {
        "parameters": sampling.parameters(config, params, average),
        "program": provenance.program(),
    }
    found = made_by | {"config": json.loads(to_json(config))} | form.about
    if given is not None and given[1]["parameters"] != found["parameters"]:
        raise ValueError(
            f"{args.samples} holds samples of other parameters than {args.workdir}'s newest"
        )
    if given is not None and given[1].get("space") != form.about.get("space"):
        raise ValueError(
            f"{args.samples} holds samples of another form, {given[1].get('space')}, not "
            f"{form.about.get('space')}; give the autoencoder that it was drawn with"
        )

    draws = bool(args.drawing.n) and given is None
    others = (
        sampling.load_others(drawn, data.shape_of(dataset.train.x)) if draws else sampling.Others()
    )
    if args.held_out != 0:
        found |= count_bits(args, e, runner, params, dataset.test)
    if real is None:
        return found
    if args.write_reference is not None and jax.process_index() == 0:
        about = found | {"features": real.features, "reference": real.about}
        reference.write(args.write_reference, real.summary, about)
        print(f"written: {args.write_reference}")
    if not (given or args.drawing.n):
        return found

    if given:
        samples, settings = given
        scores = distances.measure(
            real.summarise([np.asarray(samples.x)], len(samples.x)), real.summary
        )
    else:
        shape = data.shape_of(dataset.train.x)
        scores, settings = draw(drawn, args, runner, params, shape, form, real, others)
    # A file of samples has these too, or `found` has them.
    elsewhere = ("parameters", "config", "program", "shape", "dtype", "space", "sha256")
    recorded = {k: v for k, v in settings.items() if k not in elsewhere}
    return (
        found | scores | {"samples": recorded, "features": real.features, "reference": real.about}
    )


def check(args: Arguments) -> None:
    """Refuse what makes no sense, before anything is loaded or compiled."""
    features.check(args.features, args.weights)
    write = args.write_reference
    require(
        (args.bound_samples >= 2, f"bound_samples={args.bound_samples}: must be at least 2"),
        (args.flow_steps >= 1, f"flow_steps={args.flow_steps}: must be at least 1"),
        (
            args.held_out is None or args.held_out == 0 or args.held_out >= 2,
            f"held_out={args.held_out}: must be at least 2, or 0",
        ),
        (
            args.drawing.n == 0 or args.drawing.n >= FEWEST,
            f"n={args.drawing.n}: must be at least {FEWEST}, or 0",
        ),
        (
            args.reference in ("train", "test") or reference.is_file(args.reference),
            f"unknown reference {args.reference!r}: one of train, test, or a file .npz or .pkl",
        ),
        (args.draws >= 1, f"draws={args.draws}: must be at least 1"),
        (
            args.draws == 1 or args.samples is None,
            f"draws={args.draws}: a file of samples is one draw",
        ),
        (
            write is None or (write.suffix == ".npz" and write.parent.is_dir()),
            f"write_reference={write}: must be a file .npz in a folder that is there",
        ),
        (
            write is None or features.takes_weights(args.features),
            f"write_reference={write}: features={args.features} have no statistics to share",
        ),
        (
            args.result is None or (args.result.suffix == ".json" and args.result.parent.is_dir()),
            f"result={args.result}: must be a file .json in a folder that is there",
        ),
    )


def draw(
    e: Experiment,
    args: Arguments,
    runner: runners.Runner,
    params: Any,
    shape: tuple[int, ...],
    form: pixels.Form,
    real: reference.Reference,
    others: sampling.Others,
) -> tuple[dict[str, float], dict[str, Any]]:
    """The distances of samples that are drawn, and the settings that a file of them would have."""
    wanted, size = args.drawing, e.config.batch_size
    label, each = sampling.labels(e.config, wanted), []
    seeds = range(wanted.seed, wanted.seed + args.draws)
    for seed in seeds:
        drawing = dataclasses.replace(wanted, seed=seed)
        generate = sampling.make_generate(sampling.drawn_by(e.config, drawing), shape, others)
        parts = sampling.draw(
            runner, generate, others.join(params), label, range(wanted.n), size, form.store
        )
        shown = sampling.with_progress(parts, f"samples of seed {seed}", wanted.n)
        each.append(distances.measure(real.summarise(shown, wanted.n), real.summary))
    settings = sampling.settings(e, wanted, params) | others.settings
    if len(each) == 1:
        return each[0], settings
    return distances.best_of(each), settings | {"draws": args.draws, "seeds": list(seeds)}


def count_bits(
    args: Arguments,
    e: Experiment,
    runner: runners.Runner,
    params: Any,
    test_set: data.Examples,
) -> dict[str, Any]:
    """Bits per dimension of held-out examples, by the bound and, if asked for, by the flow."""
    config = e.config
    levels = data.levels(config.data.name, test_set)
    batch = data.first(test_set, args.held_out or len(test_set.x))
    shape = data.shape_of(test_set.x)
    n = len(batch["index"])
    measures = {}
    if config.coupling == "independent":
        measures["bound"] = likelihoods.variational_bound(e, levels, args.bound_samples)
    if args.flow:
        measures["flow"] = likelihoods.flow_bound(e, levels, args.flow_steps)
    found: dict[str, Any] = {}
    for name, measure in measures.items():
        mapped = runner.map(measure)
        what = f"{name} of held-out examples"
        mean, error = likelihoods.bits(
            runner, mapped, params, batch, config.batch_size, shape, what
        )
        found |= {f"{name}_bits_per_dim": mean, f"{name}_standard_error": error}
    return found | {
        "held_out": {
            "n": n,
            "seed": config.seed,
            "bound_samples": args.bound_samples,
            "flow_steps": args.flow_steps,
            "levels": levels,
            "time_steps": config.time_steps,
            "sha256": digest(batch["x"]),
        }
    }


def compare(args: Arguments) -> None:
    """Print a table of runs that were evaluated, and draw it."""
    results = comparison.read(args.compare)
    Console().print(comparison.table(results))
    kind = args.picture.suffix.removeprefix(".") or "png"
    with replacing(args.picture) as new:
        comparison.figure(results).savefig(new, dpi=120, format=kind)
    print(f"drawn: {args.picture}")


def run(args: Arguments) -> None:
    """Evaluate, print and write; or compare."""
    with error_exit(ValueError, OSError, ImportError, FloatingPointError):
        if args.compare:
            compare(args)
            return
        found = evaluate(args)
        if jax.process_index() == 0:
            print(*comparison.lines(flatten(found)), sep="\n")
            text = json.dumps(found, indent=1) + "\n"
            write_text(args.result or checkpoint.home(args.workdir) / comparison.RESULT, text)


def main(argv: Sequence[str]) -> None:
    """The command; refuses flags that would have no effect."""
    args = parse_with_run(Arguments, argv, __doc__)
    with error_exit():
        check_unused(args, parse_with_run(Arguments, [f"--workdir={args.workdir}"], __doc__))
    run(args)


def check_unused(args: Arguments, default: Arguments) -> None:
    """Refuse flags that have no effect beside the others, given the run's defaults."""
    plain = dataclasses.replace(args, compare=(), picture=default.picture)
    changed = lambda *names: [n for n in names if getattr(args, n) != getattr(default, n)]
    of_bits = changed("bound_samples", "flow") if args.held_out == 0 else []
    of_distances = changed("features", "weights", "reference", "draws")
    measures = args.samples or args.drawing.n or args.write_reference or args.compare
    require(
        (
            args.samples is None or args.drawing == default.drawing,
            f"samples={args.samples}: they are drawn already; give no n, sampler or the like",
        ),
        (
            not args.compare or (plain == default and args.workdir == Arguments.workdir),
            "compare: only reads and draws; give no other flag than picture",
        ),
        (not of_bits, f"{', '.join(of_bits)}: without effect, because held_out=0 counts no bits"),
        (
            args.flow or not changed("flow_steps"),
            f"flow_steps={args.flow_steps}: without effect unless flow=True",
        ),
        (
            bool(measures) or not of_distances,
            f"{', '.join(of_distances)}: without effect, because n=0 draws no samples",
        ),
    )


if __name__ == "__main__":
    with failing_fast():
        main(sys.argv[1:])
