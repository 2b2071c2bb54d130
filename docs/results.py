"""Train and measure what docs/results.md reports, and write it.

    python docs/results.py                          # all studies: four hours on two cores
    python docs/results.py --only digits guidance   # some of them
    python docs/results.py --page                   # none: the page again from docs/results.json
    python docs/results.py --check                  # make reproduce: ten minutes

A run is `train.py`, then `evaluate.py`, in runs/results. What has been made is not made again: stop
this when you like, and start it again. `--check` trains the digits once for each target, in
runs/reproduce, and says of each number whether it lies in the recorded band.
"""

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "docs" / "results.json"
SEEDS = (0, 1, 2)


class Study(NamedTuple):
    """Runs that differ in one thing.

    Attributes:
      title: what is studied.
      config: their config file.
      variants: what differs: by name, the options of train.py.
      options: the options of train.py that all have.
      evaluation: the options of evaluate.py.
    """

    title: str
    config: str
    variants: dict[str, list[str]]
    options: Sequence[str] = ()
    evaluation: Sequence[str] = ()


class Walks(NamedTuple):
    """Ways to draw from the runs of a variant.

    Attributes:
      title: what is studied.
      study: of which study the runs are.
      variant: which of its variants.
      variants: what differs: by name, the options of evaluate.py.
      options: the options of evaluate.py that all have.
    """

    title: str
    study: str
    variant: str
    variants: dict[str, list[str]]
    options: Sequence[str] = ("--held_out=0",)


def one_of(option: str, values: Sequence[Any]) -> dict[str, list[str]]:
    """Variants that give an option one value each."""
    return {str(value): [f"--{option}={value}"] for value in values}


def _schedule(name: str, *options: str) -> list[str]:
    return [f"--config.schedule={name}", "--config.schedule_options", *options]


ENDS = ("log_snr_min=-8", "log_snr_max=7")
DIGITS, FASHION = "configs/digits.py", "configs/fashion_mnist.py"
TARGETS = one_of("config.target", ("x_0", "eps", "score", "v"))
WEIGHTINGS = ("unit", "constant", "elbo", "p2", "edm", "sigmoid")
SAMPLERS = (
    "ancestral",
    "ddim",
    "heun",
    "dpm_solver_pp_2m",
    "dpm_solver_pp_2m_sde",
    "dpm_solver_pp_3m",
    "unipc",
)
FASHION_STEPS = 1000
STUDIES: dict[str, Study | Walks] = {
    "digits": Study("The targets, on the digits", DIGITS, TARGETS),
    "fashion": Study(
        "The targets, on Fashion-MNIST",
        FASHION,
        TARGETS,
        [f"--config.steps={FASHION_STEPS}"],
        ["--features=fashion_classifier", "--held_out=500", "--guidance=1"],
    ),
    "weighting": Study("Weighting", DIGITS, one_of("config.weighting", WEIGHTINGS)),
    "schedule": Study(
        "Schedule",
        DIGITS,
        {
            "linear": _schedule("linear", "log_snr_max=7"),
            "sigmoid": _schedule("sigmoid", *ENDS),
            "rectified_flow": _schedule("rectified_flow", *ENDS),
            "log_uniform": [
                *_schedule("log_uniform", "sigma_min=0.03", "sigma_max=55"),
                "--config.unit_input=True",
            ],
        },
    ),
    "ema": Study("Moving average", DIGITS, one_of("config.ema", (0.0, 0.98, 0.999))),
    "guidance": Walks(
        "Guidance weight", "digits", "eps", one_of("guidance", (0.0, 1.0, 1.5, 2.0, 4.0))
    ),
    "sampler": Walks(
        "Sampler and evaluations",
        "digits",
        "eps",
        {
            f"{name}, {n} steps": [f"--sampler={name}", f"--steps={n}", "--guidance=1"]
            for name, n in itertools.product(SAMPLERS, (5, 10, 20, 50))
        },
    ),
}


def commands(
    name: str, variant: str, seed: int, home: Path
) -> tuple[list[list[str]], Path, Path]:
    """The commands of a run; its directory; and the evaluation's file."""
    study = STUDIES[name]
    if isinstance(study, Walks):
        workdir = home / study.study / f"{study.variant}_{seed}"
        result = workdir / f"{name}_{variant.replace(', ', '_').replace(' ', '_')}.json"
        options = [*study.options, *study.variants[variant], f"--result={result}"]
        return [["evaluate.py", f"--workdir={workdir}", *options]], workdir, result
    workdir = home / name / f"{variant}_{seed}"
    options = [*study.options, *study.variants[variant], f"--config.seed={seed}"]
    train = ["train.py", f"--config={study.config}", f"--workdir={workdir}", *options]
    evaluate = ["evaluate.py", f"--workdir={workdir}", *study.evaluation]
    return [train, evaluate], workdir, workdir / "evaluation.json"


def run(name: str, variant: str, seed: int, home: Path) -> None:
    """Train and evaluate, unless it is done."""
    todo, _, result = commands(name, variant, seed, home)
    if not result.exists():
        for command in todo:
            print("results: python", *command, flush=True)
            subprocess.run([sys.executable, *command], cwd=ROOT, check=True)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        for seed in SEEDS:
            for variant in STUDIES[name].variants:
                run(name, variant, seed, Path("runs/results"))
