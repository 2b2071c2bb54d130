"""Race diffjax against PyTorch's packages: how near samples come in the seconds of one core.

    make race                                                     # every entrant: many hours
    python studies/race.py run --only "diffjax, U-Net" --budgets 60 --seeds 0
    python studies/race.py run --core=1                           # beside another, on another core
    python studies/race.py page                                   # docs/race.md and its picture

An entrant trains on Fashion-MNIST from nothing until a budget of CPU-seconds is spent, on one core,
imports and compilation included, and then draws 5,000 samples. What is measured is kept in
studies/results/race.json, and a second call measures what is missing. The entrants of other
packages are functions of race_peers.py, and run in the environment of `make bench`.
"""

import dataclasses
import functools
import itertools
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from matplotlib.figure import Figure

from diffjax import plots
from diffjax.data import readers
from diffjax.evaluation import distances, features, provenance
from diffjax.training.telemetry import ALLOCATOR, TUNABLES
from markdown_table import table
from race_settings import EVALUATIONS, GUIDANCE, GUIDED, Recipe

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "studies" / "results" / "race.json"
PAGE = ROOT / "docs" / "race.md"
PICTURE = ROOT / "docs" / "images" / "race.png"
HOME = ROOT / "runs" / "race"
PEERS = ROOT / ".venv-peers" / "bin" / "python"
BUDGETS = (60, 300, 900)
SAMPLES = 5000
PROBES = (20, 60)
"""Steps of two short runs, from which the steps of a budget are computed."""
SPACES = {"C": "fashion_classifier", "P": "pca24"}
"""Feature spaces of the Frechet distances, by the headings of their columns."""


def recipe(r: Recipe) -> list[str]:
    """Flags of train.py for a recipe."""
    decay = ["--config.optimizer.decay_steps=STEPS"] if r.decays else []
    return [
        "--config=fashion_mnist",
        f"--config.target={r.target}",
        f"--config.optimizer.learning_rate={r.rate}",
        f"--config.batch_size={r.batch}",
        f"--config.ema={r.ema}",
        *decay,
    ]


def call(*command: str | Path, **options: Any) -> str:
    """Run a command, which must succeed; what it prints, if `options` capture it."""
    print("race:", *command, flush=True)
    return subprocess.run(list(map(str, command)), check=True, **options).stdout


def spent_by(*command: str | Path) -> float:
    """The CPU-seconds of a command that finds nothing compiled, and of the processes it starts."""
    spent = lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    before = spent()
    with tempfile.TemporaryDirectory() as empty:
        call(*command, env=os.environ | {"JAX_COMPILATION_CACHE_DIR": empty})
    return spent() - before


def train(flags: Sequence[str], steps: int, workdir: Path) -> float:
    """The CPU-seconds of a run of train.py from nothing."""
    shutil.rmtree(workdir, ignore_errors=True)
    rest = [f"--config.steps={steps}", f"--config.sample_every={steps}"]
    rest += ["--config.save_every=1000000"]  # a run saves its last step in any case
    rest += [f"--config.optimizer.warmup={max(1, steps // 20)}"]
    flags = [flag.replace("STEPS", str(steps)) for flag in flags]
    return spent_by(sys.executable, ROOT / "train.py", *flags, *rest, f"--workdir={workdir}")


def ours(name: str, flags: Sequence[str], budget: int, seed: int, workdir: Path) -> dict[str, Any]:
    """Train a network of ours within a budget, and draw samples."""
    if (key := f"{name}/cost") not in on_record():
        few, more = (train([*flags, "--config.seed=0"], n, workdir) for n in PROBES)
        step = (more - few) / (PROBES[1] - PROBES[0])
        keep(key, {"start": few - PROBES[0] * step, "step": step})
    cost = on_record()[key]
    steps = max(1, int((budget - cost["start"]) / cost["step"]))
    cpu = train([*flags, f"--config.seed={seed}"], steps, workdir)
    low, high = GUIDED
    chain = [f"classifier_free:weight={GUIDANCE}", f"within:low={low},high={high}"]
    walk = [f"--n={SAMPLES}", f"--steps={EVALUATIONS}", "--guidance", *chain]
    call(sys.executable, ROOT / "sample.py", f"--workdir={workdir}", *walk)
    return {"cpu_s": cpu, "steps": steps}


def peer(name: str, budget: int, seed: int, workdir: Path) -> dict[str, Any]:
    """Train a network of another package within a budget, and draw samples."""
    if not PEERS.exists():
        sys.exit(f"error: {PEERS} is missing: make VENV=.venv-peers .venv-peers/lucidrains.stamp")
    data, out = HOME / "fashion_mnist.npz", workdir / "generated.npz"
    workdir.mkdir(parents=True, exist_ok=True)
    if not data.exists():
        x, label = readers.fashion_mnist(None)[0]
        np.savez(data, x=x, label=label)
    arguments = map(str, (budget, seed, SAMPLES, data, out))
    script = ROOT / "studies" / "race_peers.py"
    said = call(PEERS, script, name, *arguments, stdout=subprocess.PIPE, text=True)
    return json.loads(said.splitlines()[-1])


ENTRANTS: dict[str, Callable[..., dict[str, Any]]] = {
    name: functools.partial(ours, name, flags)
    for name, flags in {
        "diffjax, U-Net": recipe(Recipe()),
        "diffjax, DiT": ["--config=fashion_dit", "--config.optimizer.decay_steps=STEPS"],
        "diffjax, EDM2": ["--config=fashion_edm2"],
    }.items()
} | {
    name: functools.partial(peer, name)
    for name in ("diffusers", "diffusers, our recipe", "lucidrains", "lucidrains, tuned", "azula")
}
"""(budget, seed, directory) -> the CPU-seconds and steps of training, by the entrant's name."""


def scaled(x: np.ndarray) -> np.ndarray:
    """Bytes as numbers in [-1, 1]."""
    return x.astype(np.float32) / 127.5 - 1


@functools.cache
def real() -> dict[str, tuple[features.Space, distances.Summary]]:
    """Each space, and the 60,000 training images in it."""
    x = scaled(readers.fashion_mnist(None)[0][0])
    spaces = {heading: features.named(name, x) for heading, name in SPACES.items()}
    found = {heading: (space, space.features(x)) for heading, space in spaces.items()}
    return {
        heading: (space, distances.Summary(each, distances.moments(each)))
        for heading, (space, each) in found.items()
    }


def measured(samples: Path) -> dict[str, float]:
    """The Frechet distance in each space, and precision and recall in that of C."""
    x, found = scaled(np.load(samples)["x"]), {}
    for heading, (space, reference) in real().items():
        each = distances.measure(space.features(x), reference)
        found[heading] = each["frechet"]
        if heading == "C":
            found |= {name: each[name] for name in ("precision", "recall")}
    return found


def on_record() -> dict[str, Any]:
    """What was measured before, by entrant, budget and seed."""
    return json.loads(RECORD.read_text()) if RECORD.exists() else {}


def keep(key: str, found: dict[str, Any]) -> None:
    """Put on record what was measured. Another process may have written meanwhile."""
    record = dict(sorted((on_record() | {key: found}).items()))
    RECORD.write_text(json.dumps(record, indent=1) + "\n")


@dataclasses.dataclass(frozen=True)
class Run:
    """Train and measure what is not on record."""

    only: tuple[str, ...] = ()
    """Names of entrants; none: all of them."""
    budgets: tuple[int, ...] = BUDGETS
    """CPU-seconds of training."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of training."""
    core: int = 0
    """The core on which everything runs."""


def run(args: Run) -> None:
    """Run the race."""
    for name in args.only:
        if name not in ENTRANTS:
            sys.exit(f"error: unknown entrant {name!r}: one of {'; '.join(ENTRANTS)}")
    os.sched_setaffinity(0, {args.core})
    os.environ.setdefault(TUNABLES, ALLOCATOR)
    for seed, budget in itertools.product(args.seeds, args.budgets):
        for name in args.only or ENTRANTS:
            if (key := f"{name}/{budget}/{seed}") in on_record():
                continue
            workdir = HOME / f"{name.replace(', ', '_').replace(' ', '_')}_{budget}_{seed}"
            found = ENTRANTS[name](budget, seed, workdir)
            found |= measured(workdir / "generated.npz")
            keep(key, found | {"date": time.strftime("%Y-%m-%d"), "on": provenance.processor()})
            print(key, found, flush=True)


def runs_of(record: dict[str, Any], name: str, budget: int) -> list[dict[str, Any]]:
    """What is on record of an entrant and a budget, over the seeds."""
    return [found for key, found in record.items() if key.rsplit("/", 1)[0] == f"{name}/{budget}"]


def spread(values: Sequence[float]) -> str:
    """The mean, and the standard deviation if there are several."""
    mean = f"{statistics.mean(values):.3g}"
    return mean + (f" ± {statistics.stdev(values):.1g}" if len(values) > 1 else "")


def figure(record: dict[str, Any]) -> Figure:
    """The distance C against CPU-seconds, the mean and the range of the seeds."""
    figure, (ax,) = plots.panels(1, 1, width=5.5, height=3.6)
    for name in ENTRANTS:
        found = [each for budget in BUDGETS if (each := runs_of(record, name, budget))]
        if not found:
            continue
        x = [statistics.mean(run["cpu_s"] for run in runs) for runs in found]
        y = [[run["C"] for run in runs] for runs in found]
        (line,) = ax.loglog(x, [statistics.mean(each) for each in y], marker="o", label=name)
        ax.fill_between(
            x, [min(e) for e in y], [max(e) for e in y], color=line.get_color(), alpha=0.2
        )
    ax.set(xlabel="CPU-seconds of training", ylabel="Frechet distance C")
    ax.set_xticks(BUDGETS, list(map(str, BUDGETS)))
    ax.legend(fontsize=8, frameon=False)
    return figure


TEXT = """\
# Time to quality

How near samples come to Fashion-MNIST for the CPU-seconds of training, from nothing, on one core.
Imports, compilation and held-out losses count. C is the Frechet distance of 5,000 samples from the
60,000 training images in the features of `fashion_classifier`, P that in 24 principal components of
pixels; precision and recall are in the features of C. Of 5,000 held-out images C is 0.36. Every
sampler takes {evaluations} steps; networks with labels are guided with weight {guidance} where
log-SNR is between {guided}, and are evaluated twice there. Measured by `make race` on {date}: {on};
means over the seeds, ± their standard deviation.

![Distance against CPU-seconds](images/race.png)

{table}
- diffjax: `configs/fashion_mnist.py` (with target v, batches of 16, and a learning rate of 3e-3
  that decays to 0), `fashion_dit.py` and `fashion_edm2.py`. The rate rises for 5 % of the steps.
- diffusers: UNet2DModel as its tutorial has it, of 28x28 pixels: DDPMScheduler, AdamW, an average,
  DDIM.
- diffusers, our recipe: UNet2DModel with the parameters of our U-Net, and everything else as for
  ours, in a loop of our own: what remains is what the software contributes.
- lucidrains: denoising-diffusion-pytorch's Unet with 1.50 M parameters, and what its Trainer does
  with its defaults, or with a learning rate of 1e-3.
- azula: its UNet of 28x28 pixels in its KarrasDenoiser, and DDIM.
"""


@dataclasses.dataclass(frozen=True)
class Page:
    """Write docs/race.md and its picture from the record."""


def page(_: Page) -> None:
    """Write the page and the picture."""
    record, rows = on_record(), []
    for name, budget in itertools.product(ENTRANTS, BUDGETS):
        if found := runs_of(record, name, budget):
            over = lambda key, found=found: [run[key] for run in found]
            numbers = (spread(over(key)) for key in ("C", "P", "precision", "recall"))
            cost = (f"{statistics.mean(over(key)):,.0f}" for key in ("steps", "cpu_s"))
            rows.append([name, budget, *numbers, *cost, len(found)])
    head = ["entrant", "budget", "C", "P", "precision", "recall"]
    head += ["steps", "CPU-seconds", "seeds"]
    every = [found for found in record.values() if "C" in found]
    text = TEXT.format(
        evaluations=EVALUATIONS,
        guidance=GUIDANCE,
        guided=" and ".join(f"{end:g}" for end in GUIDED),
        date=" and ".join(sorted({found["date"] for found in every})),
        on="; ".join(sorted({found["on"] for found in every})),
        table=table(head, rows),
    )
    PAGE.write_text(text)
    figure(record).savefig(PICTURE)


def main() -> None:
    """The command."""
    commands = {Run: run, Page: page}
    chosen = tyro.cli(
        Annotated[Run, tyro.conf.subcommand("run")] | Annotated[Page, tyro.conf.subcommand("page")],
        description=__doc__,
        use_underscores=True,
    )
    commands[type(chosen)](chosen)


if __name__ == "__main__":
    main()
