"""Train and evaluate the networks of docs/results.md, and write that page.

    python studies/results.py                          # all studies: 2 h 30 min on two cores
    python studies/results.py --only digits guidance   # some of them
    python studies/results.py --only                   # none: write only the page, from the record
    python studies/results.py --only digits --again    # also make the runs that are on record
    python studies/results.py --check                  # or: make reproduce; five minutes

A run is `train.py`, then `evaluate.py`, in runs/results. Its numbers go to
studies/results/record.json when it ends. A run that is finished or on record is not made again, so
that the same command continues a study that was stopped, here or on another machine. `--check`
trains the digits once for each target, in runs/reproduce, and prints for each number whether it
lies in the recorded band.
"""

import argparse
import datetime
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import scipy.stats
import vdm
from matplotlib.figure import Figure
from PIL import Image

from diffjax import plots
from diffjax.training import metrics
from markdown_table import table

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
RECORD = ROOT / "studies" / "results" / "record.json"
RUNS = Path("runs/results")
SEEDS = (0, 1, 2)


class Study(NamedTuple):
    """Runs that differ in one thing; each variant is a row of a table.

    Attributes:
      config: the config file of the runs; "{}" stands for the name of the variant.
      variants: the options of train.py in which they differ, by name.
      options: options of train.py that all runs have.
      evaluation: options of evaluate.py that all runs have.
    """

    config: str
    variants: dict[str, list[str]]
    options: Sequence[str] = ()
    evaluation: Sequence[str] = ()

    def commands(self, name: str, variant: str, seed: int, home: Path) -> list[list[str]]:
        """The commands that make a run."""
        workdir = f"--workdir={self.result(name, variant, seed, home).parent}"
        changes = [*self.options, *self.variants[variant], f"--config.seed={seed}"]
        return [
            ["train.py", f"--config={self.config.format(variant)}", workdir, *changes],
            ["evaluate.py", workdir, *self.evaluation],
        ]

    def result(self, name: str, variant: str, seed: int, home: Path) -> Path:
        """The file of a run's evaluation, in the run's directory."""
        return home / name / f"{variant}_{seed}" / "evaluation.json"


class Walks(NamedTuple):
    """Ways to draw from the runs of a variant of a study; each way is a row of a table.

    Attributes:
      study: the name of the study.
      variant: the name of the variant.
      variants: the options of evaluate.py in which the ways differ, by name.
    """

    study: str
    variant: str
    variants: dict[str, list[str]]

    def commands(self, name: str, variant: str, seed: int, home: Path) -> list[list[str]]:
        """The command that evaluates a run."""
        result = self.result(name, variant, seed, home)
        options = ["--held_out=0", *self.variants[variant], f"--result={result}"]
        return [["evaluate.py", f"--workdir={result.parent}", *options]]

    def result(self, name: str, variant: str, seed: int, home: Path) -> Path:
        """The file of an evaluation, in the run's directory."""
        return home / self.study / f"{self.variant}_{seed}" / f"{name}_{variant}.json"


def _one_of(option: str, *values: Any) -> dict[str, list[str]]:
    return {str(value): [f"--{option}={value}"] for value in values}


def _schedule(name: str, *options: str) -> list[str]:
    return [f"--config.schedule={name}", "--config.schedule_options", *options]


DIGITS = "configs/digits.py"
TARGETS = _one_of("config.target", "x_0", "eps", "score", "v") | {
    "raw_score": ["--config.target=score", "--config.unit_output=False"]
}
CONSTANT = {
    f"{decay}_constant": [f"--config.ema={decay}", "--config.ema_warmup=False"]
    for decay in (0.9, 0.98, 0.99, 0.995, 0.999)
}
PROPOSED = ("mean=0.8", "std=2.0")
"""The density that `python -m diffjax.inspect` proposes for a run of configs/fashion_mnist.py."""
SHIFTED = {"unshifted": [], "base_32": ["--config.schedule_base=32"]}
EMOJI = ["--config.data.path=runs/emoji", "--config.data.size=64", "--config.model.attention=16"]
EMOJI += ["--config.batch_size=32", "--config.steps=400", "--config.eval_every=400"]
ENDS = ("log_snr_min=-8.0", "log_snr_max=7.0")
EVALUATIONS = (6, 10, 20, 50)
SAMPLERS = {
    "ancestral": 1,
    "ddim": 1,
    "heun": 2,
    "dpm_solver_pp_2m": 1,
    "dpm_solver_pp_2m_sde": 1,
    "dpm_solver_pp_3m": 1,
    "unipc": 1,
}
"""How often a step of each evaluates the denoiser. It is written down, because counting would start
JAX, which then holds a GPU's memory while the runs need it."""
STUDIES = {
    "digits": Study(DIGITS, TARGETS),
    "fashion": Study(
        "configs/fashion_mnist.py",
        TARGETS,
        ["--config.steps=1000"],
        ["--features=fashion_classifier", "--held_out=500", "--guidance=1"],
    ),
    "weighting": Study(
        DIGITS, _one_of("config.weighting", "constant", "elbo", "p2", "edm", "sigmoid")
    ),
    "schedule": Study(
        DIGITS,
        {
            "linear": _schedule("linear", "log_snr_max=7.0"),
            "sigmoid": _schedule("sigmoid", *ENDS),
            "rectified_flow": _schedule("rectified_flow", *ENDS),
            "log_uniform": [
                *_schedule("log_uniform", "sigma_min=0.03", "sigma_max=55"),
                "--config.unit_input=True",
            ],
        },
    ),
    "networks": Study(
        "configs/{}.py",
        {"fashion_mnist": [], "fashion_dit": [], "fashion_edm2": []},
        evaluation=["--features=fashion_classifier", "--held_out=500"],
    ),
    "density": Study(
        "configs/fashion_mnist.py",
        {"proposed": ["--config.density=normal", "--config.density_options", *PROPOSED]},
        evaluation=["--features=fashion_classifier", "--held_out=500"],
    ),
    "fashion_14": Study("configs/fashion_mnist.py:small", SHIFTED, evaluation=["--held_out=0"]),
    "fashion_28": Study(
        "configs/fashion_mnist.py",
        SHIFTED,
        ["--config.data.size=28", "--config.steps=700"],
        ["--held_out=0"],
    ),
    "emoji_64": Study("configs/folder.py", SHIFTED, EMOJI, ["--held_out=0"]),
    "ema": Study(DIGITS, _one_of("config.ema", 0.0, 0.9, 0.98) | CONSTANT),
    "guidance": Walks("digits", "eps", _one_of("guidance", 0.0, 1.0, 1.5, 2.0, 4.0)),
    "sampler": Walks(
        "digits",
        "eps",
        {
            f"{name}_{n}": [f"--sampler={name}", f"--steps={n // calls}", "--guidance=1"]
            for (name, calls), n in itertools.product(SAMPLERS.items(), EVALUATIONS)
        },
    ),
}
PICTURES = ("digits", "fashion")
COLUMNS = {
    "bound_bits_per_dim": "bits/dim",
    "frechet": "Frechet",
    "kernel": "kernel",
    "precision": "precision",
    "recall": "recall",
    "accuracy": "labels right",
    "eval_loss": "held-out loss",
    "step_ms": "ms a step",
}
"""The numbers of a run, and their headings in tables."""
CHECKED = ("bound_bits_per_dim", "frechet", "precision", "recall", "accuracy", "eval_loss")
"""The numbers that `--check` compares; they do not depend on the hardware."""
MISSED = 1e-3
"""The part of correct numbers that lie outside of the interval of `--check`."""


def made(name: str, variant: str, seed: int, home: Path) -> dict[str, Any]:
    """The numbers of a run, which is trained and evaluated first if it has not been."""
    study = STUDIES[name]
    result = study.result(name, variant, seed, home)
    if not result.exists():
        for command in study.commands(name, variant, seed, home):
            print("results: python", *command, flush=True)
            subprocess.run([sys.executable, *command], check=True)
    found = json.loads(result.read_text())
    numbers = {key: found[key] for key in COLUMNS if key in found}
    if isinstance(study, Walks):
        return numbers
    if (scores := result.parent / "scores.json").exists():
        numbers["accuracy"] = json.loads(scores.read_text())["accuracy"]
    rows = metrics.read(result.parent)
    speed = statistics.median(row["img_per_s"] for row in rows if "img_per_s" in row)
    return numbers | {
        "eval_loss": rows[-1]["eval_loss"],
        "step_ms": 1e3 * found["config"]["batch_size"] / speed,
        "curve": [[row["step"], float(f"{row['loss']:.4g}")] for row in rows],
        "program": found["program"],
    }


def spread(values: Sequence[float]) -> str:
    """The mean and the standard deviation, with two digits of the latter; of one value, itself."""
    if len(values) == 1:
        return f"{values[0]:.4g} (one run)"
    mean, deviation = statistics.mean(values), statistics.stdev(values)
    digits = max(0, 1 - math.floor(math.log10(deviation))) if deviation else 3
    return f"{mean:.{digits}f} ± {deviation:.{digits}f}"


def over_seeds(runs: dict[str, dict[str, Any]], key: str) -> list[float]:
    """One of the numbers, of all of a variant's runs that have it."""
    return [run[key] for run in runs.values() if key in run]


def bands(variants: dict[str, dict[str, dict[str, Any]]], key: str) -> dict[str, tuple]:
    """The interval in which one more run of each variant should lie, from the runs on record.

    This is the prediction interval of normal numbers whose variance is the same in each variant of
    three runs: the mean, plus or minus t s sqrt(1 + 1/3).
    """
    values = {name: over_seeds(runs, key) for name, runs in variants.items()}
    pooled = math.sqrt(statistics.mean(statistics.variance(each) for each in values.values()))
    quantile = scipy.stats.t.isf(MISSED / 2, len(values) * (len(SEEDS) - 1))
    reach = quantile * pooled * math.sqrt(1 + 1 / len(SEEDS))
    means = {name: statistics.mean(each) for name, each in values.items()}
    return {name: (mean - reach, mean + reach) for name, mean in means.items()}


def check(record: dict[str, Any]) -> bool:
    """Train the digits with each target, print each number and its band; return whether all fit."""
    on_record = record["digits"]["runs"]
    runs = {target: made("digits", target, 0, Path("runs/reproduce")) for target in on_record}
    within = []
    for (target, run), key in itertools.product(runs.items(), CHECKED):
        low, high = bands(on_record, key)[target]
        within.append(low <= run[key] <= high)
        where = "within" if within[-1] else "OUTSIDE"
        print(f"{target:10}{COLUMNS[key]:14}{run[key]:8.4f}  {where} {low:.4f} to {high:.4f}")
    print(f"{sum(within)} of {len(within)} numbers lie in the recorded band")
    return all(within)


def study(name: str, record: dict[str, Any], again: bool = False) -> None:
    """Make the runs of a study that are not on record, and record each when it ends.

    Args:
      name: of the study.
      record: the numbers of all runs, which this changes and writes.
      again: whether to make the runs that are on record, too.
    """
    runs = record.setdefault(name, {"runs": {}})["runs"]
    for seed, variant in itertools.product(SEEDS, STUDIES[name].variants):
        if again or str(seed) not in runs.get(variant, {}):
            date = {"date": datetime.date.today().isoformat()}
            run = made(name, variant, seed, RUNS) | date
            runs.setdefault(variant, {})[str(seed)] = run
            RECORD.write_text(json.dumps(record, indent=1) + "\n")
    grids = {variant: RUNS / name / f"{variant}_0" / "samples.png" for variant in runs}
    if name in PICTURES and all(grid.exists() for grid in grids.values()):
        side_by_side(grids).savefig(DOCS / "images" / f"results_{name}.png")


def side_by_side(grids: dict[str, Path]) -> Figure:
    """The first four of the ten columns of each picture of samples."""
    figure, axes = plots.panels(1, len(grids), width=2.0, height=4.9)
    for ax, (title, path) in zip(axes, grids.items(), strict=True):
        with Image.open(path) as grid:
            ax.imshow(grid.crop((0, 0, grid.width * 4 // 10, grid.height)), cmap="gray")
        ax.set(title=title)
        ax.axis("off")
    return figure


def curves(record: dict[str, Any]) -> Figure:
    """The training loss of each target, of all seeds."""
    figure, axes = plots.panels(1, len(PICTURES), width=4.5)
    for ax, name in zip(axes, PICTURES, strict=True):
        for i, (variant, runs) in enumerate(record[name]["runs"].items()):
            for seed, run in runs.items():
                label = variant if seed == "0" else None
                ax.plot(*zip(*run["curve"], strict=True), "-", color=plots.COLOURS[i], label=label)
        ax.set(title=name, xlabel="step", ylabel="loss", yscale="log")
        ax.legend(fontsize=8, frameon=False)
    return figure


def command(name: str) -> str:
    """The commands that made a study's first run, as a block of Markdown."""
    study = STUDIES[name]
    lines = study.commands(name, next(iter(study.variants)), SEEDS[0], RUNS)
    return "```bash\n" + "".join(f"python {' '.join(line)}\n" for line in lines) + "```\n"


def study_table(
    record: dict[str, Any],
    name: str,
    base: str | None = None,
    of: tuple[str, str] = ("digits", "eps"),
    without: Sequence[str] = (),
) -> str:
    """A study's numbers over its seeds.

    Args:
      record: the numbers of all runs.
      name: of the study.
      base: the label of a first row; None: no such row.
      of: the study and the variant whose numbers the first row has.
      without: columns to leave out.
    """
    runs = record[name]["runs"]
    variants = {variant: runs[variant] for variant in STUDIES[name].variants if variant in runs}
    if base is not None:
        variants = {base: record[of[0]]["runs"][of[1]]} | variants
    some = next(iter(runs.values()))
    keys = [key for key in COLUMNS if over_seeds(some, key) and key not in without]
    cells = lambda seeds: (spread(over_seeds(seeds, key)) for key in keys)
    rows = [[variant, *cells(seeds)] for variant, seeds in variants.items()]
    return table(["", *(COLUMNS[key] for key in keys)], rows)


def grid(record: dict[str, Any], key: str = "frechet") -> str:
    """One of the samplers' numbers, for each number of evaluations."""
    runs = record["sampler"]["runs"]
    cells = lambda name: (spread(over_seeds(runs[f"{name}_{n}"], key)) for n in EVALUATIONS)
    rows = [[name, *cells(name)] for name in SAMPLERS]
    return table(["", *(f"{n} evaluations" for n in EVALUATIONS)], rows)


NETWORKS = """\
## Networks

The U-Net, the transformer and EDM2's network of `configs/fashion_mnist.py`, `fashion_dit.py` and
`fashion_edm2.py`, trained for about as many CPU-seconds each, one process on one core. Each config
has the batch, learning rate, target and loss that suit its network, so that losses cannot be
compared; all draw samples by the same sampler.

{command}
{table}
The U-Net processes 109,000 images in this budget, the transformer 50,000 and EDM2's network 24,000.
The last two have fewer bits, and their samples are much further from the data: with a budget of
minutes on a CPU, a U-Net that folds pixels is the network to take.

"""
DENSITY = """\
## Density of noise levels

`python -m diffjax.inspect` prints, for the first of the U-Nets above, the normal density of log-SNR
with which its losses would vary least ([densities](howto/densities.md)). The last row is trained
with it, and its losses are divided by it, so that the objective is the same.

{table}
It does not help here: the samples are further from the data. With 0.8 % of its examples it visits
log-SNR below -4, where uniform times have 8.6 %. The loss there is small, but samples start there.
Take a fitted density where losses vary by orders of magnitude, as those of the bound do.

"""
RESOLUTION = """\
## The schedule's shift by resolution

`--config.schedule_base=32` takes the schedule for one of 32 x 32 pixels, and shifts its log-SNR by
2 log(32 / side), so that an image that is averaged to 32 pixels has the same signal-to-noise ratio
([large images](howto/large_images.md)). At 32 pixels the shift is 0, and both rows would be one
run. The networks are `configs/fashion_mnist.py:small` (14 pixels) and `configs/fashion_mnist.py`
(28), after 700 steps, and `configs/folder.py` on 1,446 emoji of 64 pixels (`studies/emoji.py`),
after 400 steps of 32. The distances are in 24 principal components.

{table}
At 64 pixels the shift helps: the samples are nearer to the data, and recall is higher; precision is
equal within the spread over seeds. At 14 and 28 pixels the distances are equal within the spread;
at 14 precision falls and recall rises.

"""
PAGE = """\
# Results

This page shows what a small U-Net reaches in a minute (digits) or four (Fashion-MNIST) on two cores
with each target, and what other common choices change. The networks and the data are small: the
numbers show which differences are large, not which are universal. Written by
`python studies/results.py` from `studies/results/record.json`, which has every run's numbers.

Unless its section says otherwise, every row is of three runs, with seeds {seeds}: the mean ± the
standard deviation over them. The rows of a table differ only in what their first column says. The
runs were made on {dates}, on cores of
{program}.
Other work ran on the machine's other cores, so that times are rough.

- bits/dim: the variational bound of held-out examples, in continuous time.
- Frechet, kernel: distances of 1,000 samples from the training set, in its 24 principal components
  (digits) or in the classifier's features (Fashion-MNIST). Precision and recall are measured in the
  same features; `diffjax.evaluation.distances` defines all four. None of them is FID.
- labels right: the fraction of 800 samples whose nearest neighbour among real digits has the
  requested label; it is 98.8 % for real digits.
- held-out loss: the min-SNR-weighted loss that all of a table's runs were trained on.

## Targets

{digits_command}
{digits}
![Samples of the digits by target](images/results_digits.png)

{fashion_command}
{fashion}
![Samples of Fashion-MNIST by target](images/results_fashion.png)

![Training losses](images/results_loss.png)

All are trained on the same loss, and end within 8 % of one another in it, as equivalent losses
should. They differ in the noise levels at which a network's error is amplified:

- A squared error of x_0 counts exp(log-SNR) times as much as one of eps. At little noise the
  min-SNR weight cancels this, and the bound does not, so that x_0 has the most bits. Its samples
  are the nearest to the data on both sets.
- By default the output of a score network is divided by sigma. It is then the eps network with the
  other sign, in training too: three ways, one result.
- A raw score (`--config.unit_output=False`) is of size 1 / sigma, which the network must produce by
  itself. On Fashion-MNIST its loss between log-SNR 2 and 4 is still a quarter to a half above that
  of eps (seed 0), and noise remains in its samples.
- v is like x_0 at much noise and like eps at little. It has the fewest bits on both sets.

## Weighting

The weight is that of the squared error of eps.

{weighting}
Weights that keep little noise (`constant`, `edm`, `elbo`) give fewer bits; those that leave it out
(`min_snr`, `p2`, `sigmoid`) give more typical samples. `elbo`, the weight of the bound itself, lies
mostly on the least noise: after 700 steps even its bound is not the best.

## Schedule

All schedules run from log-SNR 7 to -8, except `linear`, which ends at -10. `log_uniform` is
variance-exploding, with the network's input scaled to variance one; the others are
variance-preserving, except `rectified_flow`.

{schedule}
Samples are drawn by 20 steps of DDIM, uniform in t, so that the schedule also determines the grid
of noise levels.

{resolution}{networks}{density}{vdm}## Moving average

The first column is the decay of the average; 0 is no average. A constant decay has no warm-up.

{ema}
Without the average the samples are four times as far from the data, while the bound is only a
twentieth worse. Unless it is constant (`--config.ema_warmup=False`), the decay warms up as
(1 + n) / (10 + n), which is 0.987 after 700 steps, so that every decay from 0.987 on gives the same
run here. A constant decay averages from the initial parameters on. For 700 steps 0.98 and 0.99
suit; with 0.995 precision falls, and with 0.999 half of the average is the untrained network,
because 0.999^700 = 0.5.

## Guidance

The samples are drawn from the runs of target eps, with other weights of classifier-free guidance. A
weight of 0 ignores the label, and 1 is the conditional model without guidance.

{guidance}
With weights above 1 the samples are more typical and less varied: precision rises up to a weight of
2, and recall falls throughout. The Frechet distance is lowest at a weight of 1.

## Sampler and evaluations

The number is the Frechet distance of samples from the runs of target eps, without guidance, each
sampler on the grid of times that suits it best. The samplers' times are in
[performance](performance.md), and their errors on exact denoisers in [samplers](samplers.md).

{sampler}
UniPC and DPM-Solver++ 2M with 6 evaluations are nearer to the data than DDIM with 50. The
deterministic samplers converge to one distance, 0.144 to 0.149, that of the network's probability
flow. The stochastic ones converge to another, which is larger here, and [smaller on
Fashion-MNIST](performance.md).

## Reproduce these results

```bash
make reproduce
```

This trains the digits once with each target, in about five minutes on two cores. It prints whether
each number ({checked}) lies in the prediction interval of the runs above, which one number in a
thousand of a correct run misses.
"""


def resolution(record: dict[str, Any]) -> str:
    """The section on the schedule's shift, of what is on record."""
    keys = ("frechet", "precision", "recall")
    rows = [
        [str(side), f"{2 * math.log(32 / side) if variant == 'base_32' else 0:+.2f}"]
        + [spread(over_seeds(seeds, key)) for key in keys]
        for name, side in {"fashion_14": 14, "fashion_28": 28, "emoji_64": 64}.items()
        for variant, seeds in record.get(name, {"runs": {}})["runs"].items()
        if len(seeds) == len(SEEDS)
    ]
    head = ["pixels per side", "shift", *(COLUMNS[key] for key in keys)]
    return RESOLUTION.format(table=table(head, rows)) if rows else ""


def every_run(record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The numbers of each run on record."""
    for part in record.values():
        for seeds in part["runs"].values():
            yield from seeds.values()


def page(record: dict[str, Any]) -> str:
    """The text of docs/results.md."""
    made_by = [run["program"] for run in every_run(record) if "program" in run]
    programs = {f"{p['devices']} x {p['device']}, jax {p['jax']}" for p in made_by}
    not_shared = ("eval_loss", "step_ms")  # which cannot be compared, or do not differ
    ablations = {"weighting": "min_snr", "schedule": "cosine", "ema": "0.995", "guidance": "1.2"}
    return PAGE.format(
        seeds=", ".join(map(str, SEEDS)),
        dates=", ".join(sorted({run["date"] for run in every_run(record)})),
        program="; ".join(sorted(programs)),
        digits_command=command("digits"),
        digits=study_table(record, "digits"),
        fashion_command=command("fashion"),
        fashion=study_table(record, "fashion"),
        **{
            name: study_table(record, name, base, without=not_shared)
            for name, base in ablations.items()
        },
        sampler=grid(record),
        resolution=resolution(record),
        networks=NETWORKS.format(command=command("networks"), table=study_table(record, "networks"))
        if "networks" in record
        else "",
        density=DENSITY.format(
            table=study_table(
                record,
                *("density", "uniform in t", ("networks", "fashion_mnist")),
                without=["eval_loss"],  # that of the last row is of the density, not of uniform t
            )
        )
        if {"density", "networks"} <= record.keys()
        else "",
        vdm=vdm.section(),
        checked=", ".join(COLUMNS[key] for key in CHECKED),
    )


def main() -> None:
    """Make the studies and write the page, or check."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=STUDIES, default=list(STUDIES))
    parser.add_argument("--again", action="store_true", help="also make the runs on record")
    parser.add_argument("--check", action="store_true", help="train the digits and compare")
    args = parser.parse_args()
    os.chdir(ROOT)
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    if args.check:
        sys.exit(not check(record))
    for name in args.only:
        study(name, record, args.again)
    curves(record).savefig(DOCS / "images" / "results_loss.png")
    (DOCS / "results.md").write_text(page(record))


if __name__ == "__main__":
    main()
