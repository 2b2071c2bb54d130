"""Compare the averages of a run's parameters, of any relative width, after training.

    python -m diffjax.averages runs/digits --std 0.05 0.1 0.15
    python -m diffjax.averages runs/fashion --features=fashion_classifier --n=5000

The run must have tracked averages (`--config.averages 0.05 0.1 --config.snapshot_every=200`).
Prints the bound on the bits per dimension of held-out data for each width and for the moving
average of constant decay, and with --features the distance of samples to the training data too.
Writes all numbers to DIR/averages.json, and the curve to DIR/averages.png.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import tyro

from .. import data, plots
from ..experiment import resolve, run_directory
from ..experiment.command_line import error_exit, read_flags
from ..experiment.config import require
from ..experiment.dataset import load_data
from ..training.distributed import ALONE, setup
from ..training.files import replacing, write_text
from ..training.runners import choose
from . import distances, features, likelihoods, pixels, provenance, sampling
from .sampling import Drawing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULT = "averages.json"
TITLES = {"bound_bits_per_dim": "bound, bits/dim", "frechet": "Frechet distance"}
"""What is printed and drawn, of what is written."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Which averages to compare, and how."""

    workdir: tyro.conf.Positional[Path]
    """A run's directory."""
    std: tuple[float, ...] = (0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25)
    """Relative widths."""
    held_out: int = 1000
    """Number of held-out examples whose bits are counted, from the first."""
    bound_samples: int = 32
    """Times at which the bound evaluates each example."""
    features: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """The feature space of the distance of samples to the training data, as in evaluate.py; None:
    draw no samples."""
    n: int = 1000
    """Number of samples."""


def check(args: Arguments) -> None:
    """Refuse what makes no sense, before anything is loaded or compiled."""
    require(
        (len(args.std) > 0, "std: give at least one relative width"),
        (args.held_out >= 2, f"held_out={args.held_out}: must be at least 2"),
        (args.bound_samples >= 2, f"bound_samples={args.bound_samples}: must be at least 2"),
        (args.n >= 20, f"n={args.n}: must be at least 20"),
    )
    config = run_directory.read_config(args.workdir)
    if args.features is None:
        likelihoods.check_bound(config, "--features=NAME measures distances of samples")
    for std in args.std:
        run_directory.check_average(config, std)
    run_directory.list_snapshots(args.workdir, config)
    if args.features is not None:
        features.check(args.features)


def compare(args: Arguments) -> list[dict[str, Any]]:
    """Measure the average of each width, and before them that of constant decay.

    Returns:
      A row for each: its relative width `average`, or the decay `ema`; `profile_error` (see
      `averages.solve`); and its measures, as in evaluation.json.

    Raises:
      ValueError, FileNotFoundError: if the run has no such average, or an argument makes no sense.
    """
    check(args)
    e = resolve(run_directory.read_config(args.workdir))
    config = e.config
    drawn = e if args.features is None else sampling.drawn_by(config, _drawing(args, e))
    setup(ALONE)
    dataset, runner = load_data(config, args.workdir), choose(config.parallel)
    levels = data.levels(config.data.name, dataset.test)
    held_out = data.first(dataset.test, args.held_out)
    bound = None
    if config.coupling == "independent":
        bound = runner.map(likelihoods.variational_bound(e, levels, args.bound_samples))
    shape = data.shape_of(dataset.train.x)
    form = pixels.form(config, runner, shape, dataset.train.x.dtype.type)
    all_of = lambda examples: data.take(examples, np.arange(len(examples.x)))["x"]
    real, space = np.zeros(0), None
    if args.features is not None:  # which need all training examples, decoded if they are latents
        real = all_of(form.examples(dataset.train))
        space = features.named(args.features, real)
    others = sampling.Others() if space is None else sampling.load_others(drawn, shape)
    generate = None if space is None else sampling.make_generate(drawn, shape, others)

    def measure(params):
        row = {}
        if bound is not None:
            found = likelihoods.bits(
                runner, bound, params, held_out, config.batch_size, shape, "held-out examples"
            )
            row = dict(zip(("bound_bits_per_dim", "bound_standard_error"), found, strict=True))
        if space is None or generate is None:
            return row
        label, indices = sampling.labels(config, _drawing(args, e)), range(args.n)
        parts = sampling.draw(
            runner, generate, others.join(params), label, indices, config.batch_size, form.store
        )
        x = all_of(data.Examples(np.concatenate(list(parts))))
        return row | distances.measure(space.features(x), space.features(real))

    rows = [{"ema": config.ema} | measure(run_directory.read_params(args.workdir))]
    print(line(rows[0]), flush=True)
    for std in sorted(set(args.std)):
        params, error = run_directory.read_average(args.workdir, std)
        rows.append({"average": std, "profile_error": error} | measure(params))
        print(line(rows[-1]), flush=True)
    return rows


def line(row: dict[str, Any]) -> str:
    """A row in words.

    >>> line({"average": 0.1, "profile_error": 0.0, "bound_bits_per_dim": 3.2109})
    'average 0.1, profile to 0 %: bound, bits/dim 3.211'
    """
    what = f"constant decay {row['ema']}" if "ema" in row else f"average {row['average']:g}"
    if "profile_error" in row:
        what += f", profile to {100 * row['profile_error']:.2g} %"
    found = (f"{title} {row[name]:.4g}" for name, title in TITLES.items() if name in row)
    return f"{what}: {', '.join(found)}"


def figure(rows: Sequence[dict[str, Any]]) -> "Figure":
    """Draw each measure over the relative width, with that of the constant decay as a line.

    Raises:
      ModuleNotFoundError: if Matplotlib is not installed.
    """
    names = [name for name in TITLES if name in rows[0]]
    made, axes = plots.panels(1, len(names), width=3.6, height=2.6)
    constant, *others = rows
    for ax, name in zip(axes, names, strict=True):
        ax.axhline(constant[name], color=plots.COLOURS[1], label=f"constant {constant['ema']}")
        ax.plot(
            [row["average"] for row in others],
            [row[name] for row in others],
            "o-",
            color=plots.COLOURS[0],
            label="power function",
        )
        ax.set_xlabel("relative width")
        ax.set_ylabel(TITLES[name])
        ax.legend()
    return made


def _drawing(args, e):
    return Drawing(args.n, walk=e.config.sampling)


def main(argv: Sequence[str]) -> None:
    """The command."""
    args = read_flags(Arguments, argv, __doc__)
    with error_exit(ValueError, OSError, ImportError):
        rows = compare(args)
        asked = {k: v for k, v in dataclasses.asdict(args).items() if k not in ("workdir", "std")}
        found = {"rows": rows, "measured": asked, "program": provenance.program()}
        write_text(args.workdir / RESULT, json.dumps(found, indent=1) + "\n")
        picture = args.workdir / "averages.png"
        with replacing(picture) as new:
            figure(rows).savefig(new, dpi=120, format="png")
        print(f"written: {args.workdir / RESULT}, {picture.name}")
