"""Measure flow maps: each identity and velocity at 1, 2, 4 and 8 steps, over three seeds.

    python studies/flow_maps.py plane                       # five Gaussians, 6,000 steps each
    python studies/flow_maps.py plane --steps=200 --seeds 0 # in a minute, to see that it works
    python studies/flow_maps.py fashion --seeds 0 --only "denoiser" "lagrangian, distilled"
    python studies/flow_maps.py page                        # the table of docs/howto/few_steps.md

`plane` prints the energy distance to exact samples, times 1,000. `fashion` trains a denoiser of
Fashion-MNIST, maps that learn from it, and maps that learn from data alone, and measures the
Frechet distance of their samples beside those of samplers of the denoiser. What is measured is kept
in studies/results/flow_maps.json, and a second call measures what is missing.
"""

import dataclasses
import functools
import itertools
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import diffjax
from diffjax import models, oracles
from diffjax.training import init_state, train_step
from markdown_table import table

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "studies" / "results" / "flow_maps.json"
PAGE = ROOT / "docs" / "howto" / "few_steps.md"
HOME = Path("runs/flow_maps")
STEPS = (1, 2, 4, 8)
ROWS: dict[str, dict[str, Any]] = {
    "Lagrangian, own": dict(identity="lagrangian"),
    "Eulerian, own": dict(identity="eulerian"),
    "Eulerian, pair (MeanFlow)": dict(identity="eulerian", velocity="pair"),
    "semigroup, own": dict(identity="semigroup"),
    "semigroup, own, halves (shortcut)": dict(identity="semigroup", first=0.5),
    "semigroup, pair (consistency)": dict(identity="semigroup", velocity="pair", first=0.02),
    "Lagrangian, teacher": dict(identity="lagrangian", velocity="teacher"),
    "Eulerian, teacher": dict(identity="eulerian", velocity="teacher"),
}
"""Options of `flow_map_loss`, by what they are called."""


@dataclasses.dataclass(frozen=True)
class Plane:
    """Maps of a mixture of five Gaussians, by an MLP on rectified flow."""

    steps: int = 6000
    """Training steps, of 512 examples."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds; the table has their mean and standard deviation."""


@dataclasses.dataclass(frozen=True)
class Fashion:
    """Maps of Fashion-MNIST, by train.py and evaluate.py."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds; the table has their mean and standard deviation."""
    only: tuple[str, ...] = ()
    """The networks to train, by their names in `NETWORKS`; none: all of them."""


@dataclasses.dataclass(frozen=True)
class Page:
    """Write the table of what is on record into docs/howto/few_steps.md."""


SCHEDULE = diffjax.rectified_flow()


def mixture() -> oracles.Oracle:
    """Five Gaussians on a circle."""
    turn = 2 * np.pi * np.arange(5) / 5
    means = 1.5 * np.stack([np.cos(turn), np.sin(turn)], axis=1)
    return oracles.gaussian_mixture(SCHEDULE, np.ones(5), means, np.full(5, 0.02))


def energy(x: jax.Array, y: jax.Array) -> jax.Array:
    """1,000 times the energy distance of two samples, `[n, 2]` each (Szekely & Rizzo 2013)."""
    apart = lambda a, b: jnp.linalg.norm(a[:, None] - b[None], axis=-1).mean()
    return 1000 * (2 * apart(x, y) - apart(x, x) - apart(y, y))


def learn(seed: int, steps: int, options: dict[str, Any]) -> tuple[diffjax.FlowMap, float]:
    """Train a map in the plane; the map, and the seconds that this took."""
    data = mixture()
    teacher = {"velocity": data} if options.get("velocity") == "teacher" else {}
    module = models.make_module(models.MLPConfig(embedding="angle", two_times=True))
    apply = functools.partial(models.apply, module)
    one = jnp.zeros(1)
    params = module.init(jax.random.key(seed), jnp.zeros((1, 2)), one, {"log_snr_s": one})["params"]
    tx = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(1e-3, steps))
    )

    def loss(key, params, batch):
        x_0 = data.sample(jax.random.fold_in(key, 1), 512)
        network = functools.partial(apply, params)
        return diffjax.flow_map_loss(key, network, SCHEDULE, "flow", x_0, **(options | teacher))

    step = functools.partial(train_step, loss_fn=loss, tx=tx, ema_decay=0.999)
    batch = {"index": jnp.arange(512)}

    @jax.jit
    def train(state):
        return jax.lax.scan(lambda s, _: (step(s, batch)[0], None), state, None, steps)[0]

    began = time.perf_counter()
    state = jax.block_until_ready(train(init_state(jax.random.key(seed + 1), params, tx)))
    trained = functools.partial(apply, state.ema_params)
    return diffjax.flow_map(trained, SCHEDULE, "flow"), time.perf_counter() - began


def in_plane(seed: int, steps: int, row: str) -> dict[str, float]:
    """The energy distances of a row by the number of steps, and its seconds."""
    mean, seconds = learn(seed, steps, ROWS[row])
    exact = mixture().sample(jax.random.key(100 + seed), 4000)
    x_1 = diffjax.prior_sample(jax.random.key(200 + seed), SCHEDULE, (4000, 2))
    jump = diffjax.jump(mean)
    draw = lambda n: diffjax.sample(jax.random.key(0), jump, x_1, diffjax.uniform_times(n))[0]
    return {str(n): float(energy(draw(n), exact)) for n in STEPS} | {"s": seconds}


def on_record() -> dict[str, Any]:
    """What was measured before, by name."""
    return json.loads(RECORD.read_text())


def keep(name: str, found: dict[str, Any]) -> None:
    """Put on record what was measured under a name."""
    record = dict(sorted((on_record() | {name: found}).items()))
    RECORD.write_text(json.dumps(record, indent=1) + "\n")


def spread(values: list[float]) -> str:
    """The mean, and the standard deviation if there are several; nothing of nothing."""
    if not values:
        return ""
    mean = f"{statistics.mean(values):.3g}"
    return mean + (f" ± {statistics.stdev(values):.1g}" if len(values) > 1 else "")


def report(found: dict[str, list[dict[str, float]]]) -> str:
    """A table with a row for each name and a column for each number."""
    columns = sorted(
        {k for runs in found.values() for run in runs for k in run if k != "s"}, key=int
    )
    cells = lambda runs, k: spread([run[k] for run in runs]) if k in runs[0] else ""
    rows = [[name, *(cells(runs, k) for k in (*columns, "s"))] for name, runs in found.items()]
    return table(["", *(f"{k} steps" for k in columns), "seconds"], rows)


def plane(args: Plane) -> None:
    """Train and measure every row."""
    exact = [
        float(energy(*(mixture().sample(jax.random.key(k + seed), 4000) for k in (100, 300))))
        for seed in args.seeds
    ]
    print(f"exact samples: {spread(exact)}", flush=True)
    found: dict[str, list[dict[str, float]]] = {}
    for row, seed in itertools.product(ROWS, args.seeds):
        name = f"plane_{args.steps}/{row}_{seed}"
        if name not in on_record():
            keep(name, in_plane(seed, args.steps, row))
        found.setdefault(row, []).append(on_record()[name])
        print(row, seed, found[row][-1], flush=True)
    print(report(found))


BASE = ["--config=fashion_mnist", "--config.target=v", "--config.model.embedding=angle"]
BASE += ["--config.weighting=unit", "--config.save_every=250"]
MAP = ["--config.objective=flow_map", "--config.model.two_times=True", "--config.steps=1500"]
MAP += ["--config.sampling.sampler=jump", "--config.sampling.steps=1", "--config.sampling.guidance"]
DISTILLED = ["--config.flow_map.velocity=TEACHER", "--config.flow_map.start=TEACHER"]
DISTILLED += ["--config.flow_map.guidance", "1.5"]
NETWORKS = {"denoiser": ["--config.steps=2500"]} | {
    f"{identity}, {how}": [*MAP, f"--config.flow_map.identity={identity}", *more]
    for identity in ("semigroup", "eulerian", "lagrangian")
    for how, more in (("from data", []), ("distilled", DISTILLED))
}
"""Flags of train.py by network; TEACHER is the denoiser of the same seed."""
DENOISER = {name: (1, 2, 4, 8, 20, 50) for name in ("ddim", "dpm_solver_pp_2m")}
WALKS = {name: DENOISER if name == "denoiser" else {"jump": (1, 2, 4)} for name in NETWORKS}
"""Samplers by network, with the numbers of their steps."""
SAMPLES = 5000


def run(script: str, *argv: str) -> float:
    """Run a script of the repository; the CPU-seconds that it takes."""
    print("flow_maps: python", script, *argv, flush=True)
    spent = lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    before = spent()
    subprocess.run([sys.executable, str(ROOT / script), *argv], check=True)
    return spent() - before


def in_images(name: str, seed: int) -> None:
    """Train a network, and record the distances of its samples that are not on record."""
    at = lambda network: HOME / f"{network.replace(', ', '_').replace(' ', '_')}_{seed}"
    workdir, key = at(name), f"fashion/{name}/{seed}"
    recorded = lambda: on_record().get(key, {})
    walks = [(sampler, n) for sampler, counts in WALKS[name].items() for n in counts]
    if all(str(n) in recorded().get(sampler, {}) for sampler, n in walks):
        return
    flags = [flag.replace("TEACHER", str(at("denoiser"))) for flag in NETWORKS[name]]
    new = not workdir.exists()
    cpu = run("train.py", *BASE, *flags, f"--config.seed={seed}", f"--workdir={workdir}")
    if new:  # what is on record is of another run, and otherwise this was not the whole training
        keep(key, {"date": time.strftime("%Y-%m-%d"), "cpu_s": round(cpu)})
    for sampler, n in walks:
        found = recorded()
        if str(n) in found.get(sampler, {}):
            continue
        out, guidance = workdir / f"{sampler}_{n}.json", [] if sampler == "jump" else ["1.5"]
        walk = [f"--sampler={sampler}", f"--steps={n}", "--guidance", *guidance]
        common = [f"--workdir={workdir}", f"--n={SAMPLES}", "--features=fashion_classifier"]
        run("evaluate.py", *common, *walk, "--held_out=0", f"--result={out}")
        frechet = json.loads(out.read_text())["frechet"]
        keep(key, found | {sampler: found.get(sampler, {}) | {str(n): frechet}})


def fashion(args: Fashion) -> None:
    """Train and measure the denoiser and every map."""
    for name in args.only:
        if name not in NETWORKS:
            sys.exit(f"error: unknown network {name!r}: one of {'; '.join(NETWORKS)}")
    for seed, name in itertools.product(args.seeds, args.only or NETWORKS):
        in_images(name, seed)
        print(name, seed, on_record()[f"fashion/{name}/{seed}"], flush=True)


def of_fashion(record: dict[str, Any]) -> str:
    """The table of what is on record of Fashion-MNIST."""
    rows = []
    for name, walks in WALKS.items():
        runs = [run for key, run in record.items() if key.startswith(f"fashion/{name}/")]
        for sampler in walks if runs else ():
            columns = [str(n) for n in DENOISER["ddim"]]
            found = [run.get(sampler, {}) for run in runs]
            cells = [spread([each[n] for each in found if n in each]) for n in columns]
            cpu = [run["cpu_s"] for run in runs if "cpu_s" in run]
            spent = f"{statistics.mean(cpu):,.0f}" if cpu else ""
            if any(cells):
                rows.append([name, sampler, *cells, spent, len(runs)])
    counts = [f"{n} steps" if n > 1 else "1 step" for n in DENOISER["ddim"]]
    return table(["network", "sampler", *counts, "CPU-seconds", "seeds"], rows)


MARKS = "<!-- flow_maps.py -->", "<!-- end -->"


def page(_: Page) -> None:
    """Write the table into the page, between the marks."""
    before, rest = PAGE.read_text().split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    found = of_fashion(on_record())
    PAGE.write_text(f"{before}{MARKS[0]}\n{found}\n{MARKS[1]}{after}")


def main() -> None:
    """The command."""
    commands = {Plane: plane, Fashion: fashion, Page: page}
    chosen = tyro.cli(
        Annotated[Plane, tyro.conf.subcommand("plane")]
        | Annotated[Fashion, tyro.conf.subcommand("fashion")]
        | Annotated[Page, tyro.conf.subcommand("page")],
        description=__doc__,
        use_underscores=True,
    )
    commands[type(chosen)](chosen)


if __name__ == "__main__":
    main()
