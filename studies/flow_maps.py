"""Measure flow maps: each identity and velocity at 1, 2, 4 and 8 steps, over three seeds.

    python studies/flow_maps.py plane                       # five Gaussians, 6,000 steps each
    python studies/flow_maps.py plane --steps=200 --seeds 0 # in a minute, to see that it works
    python studies/flow_maps.py fashion --minutes=15        # Fashion-MNIST, by train.py

`plane` prints the energy distance to exact samples, times 1,000. `fashion` trains a denoiser, maps
that learn from it, and maps that learn from data alone, each for equally many minutes, draws from
all of them, and prints the Frechet distance beside those of samplers of the denoiser. Both keep
what they have measured in runs/flow_maps/, and a second call continues.
"""

import dataclasses
import functools
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
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
    """Maps of Fashion-MNIST, by train.py, sample.py and evaluate.py."""

    minutes: float = 15.0
    """Time to train each network, by the speed of its first steps."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds; the table has their mean and standard deviation."""
    n: int = 5000
    """Samples of which the distance is measured."""


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


def kept(name: str, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
    """What was measured under this name, now or before."""
    path = HOME / f"{name.replace(' ', '_').replace(',', '')}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(measure()))
    return json.loads(path.read_text())


def spread(values: list[float]) -> str:
    """The mean, and the standard deviation if there are several."""
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
        measure = functools.partial(in_plane, seed, args.steps, row)
        found.setdefault(row, []).append(kept(f"plane_{args.steps}/{row}_{seed}", measure))
        print(row, seed, found[row][-1], flush=True)
    print(report(found))


BASE = ["--config=fashion_mnist", "--config.target=v", "--config.model.embedding=angle"]
BASE += ["--config.weighting=unit", "--config.eval_every=1000000"]
MAPS = {
    f"{identity}, {how}": [
        *("--config.objective=flow_map", "--config.model.two_times=True"),
        *("--config.sampling.sampler=jump", "--config.sampling.steps=1"),
        *("--config.sampling.guidance", f"--config.flow_map.identity={identity}", *more),
    ]
    for identity in ("semigroup", "eulerian", "lagrangian")
    for how, more in {
        "from data": [],
        "distilled": [
            *("--config.flow_map.velocity=TEACHER", "--config.flow_map.start=TEACHER"),
            *("--config.flow_map.guidance", "1.5"),
        ],
    }.items()
}
"""Flags of train.py for the maps of Fashion-MNIST; TEACHER is the denoiser of the same seed."""
BESIDE = {"ddim": (1, 2, 4, 8, 20, 50), "dpm_solver_pp_2m": (1, 2, 4, 8, 20, 50)}


def run(script: str, *argv: str) -> None:
    """Run a script of the repository."""
    print("flow_maps: python", script, *argv, flush=True)
    subprocess.run([sys.executable, script, *argv], check=True)


def trained(name: str, flags: list[str], seed: int, minutes: float) -> Path:
    """The directory of a run of about so many minutes, which is trained unless it is there."""
    workdir = HOME / "fashion" / f"{name.replace(', ', '_').replace(' ', '_')}_{seed}"
    teacher = HOME / "fashion" / f"denoiser_{seed}"
    flags = [flag.replace("TEACHER", str(teacher)) for flag in flags]
    fixed = [*BASE, *flags, f"--config.seed={seed}", f"--workdir={workdir}"]
    if not (workdir / "samples.png").exists():
        run("train.py", *fixed, "--config.steps=100", "--config.save_every=50")
        rows = (workdir / "metrics.jsonl").read_text().splitlines()
        speed = json.loads(rows[-1])["img_per_s"]
        steps = max(200, int(60 * minutes * speed / 64) // 50 * 50)
        run("train.py", *fixed, f"--config.steps={steps}", "--config.save_every=50")
    return workdir


def distance(workdir: Path, sampler: str, steps: int, n: int) -> float:
    """The Frechet distance of samples in the features of a classifier."""
    out = workdir / f"{sampler}_{steps}.json"
    if not out.exists():
        guidance = [] if sampler == "jump" else ["1.5"]
        walk = [f"--sampler={sampler}", f"--steps={steps}", "--guidance", *guidance]
        common = [f"--workdir={workdir}", f"--n={n}", "--features=fashion_classifier"]
        run("evaluate.py", *common, *walk, "--held_out=0", f"--result={out}")
    return json.loads(out.read_text())["frechet"]


def fashion(args: Fashion) -> None:
    """Train and measure the denoiser and every map."""
    found: dict[str, list[dict[str, float]]] = {}
    for seed in args.seeds:
        denoiser = trained("denoiser", [], seed, args.minutes)
        for sampler, counts in BESIDE.items():
            measured = {str(n): distance(denoiser, sampler, n, args.n) for n in counts}
            found.setdefault(sampler, []).append(measured)
        for name, flags in MAPS.items():
            workdir = trained(name, flags, seed, args.minutes)
            measured = {str(n): distance(workdir, "jump", n, args.n) for n in STEPS[:3]}
            found.setdefault(name, []).append(measured)
    print(report({name: [{"s": 0.0, **m} for m in runs] for name, runs in found.items()}))


def main() -> None:
    """The command."""
    chosen = tyro.cli(
        Annotated[Plane, tyro.conf.subcommand("plane")]
        | Annotated[Fashion, tyro.conf.subcommand("fashion")],
        description=__doc__,
        use_underscores=True,
    )
    plane(chosen) if isinstance(chosen, Plane) else fashion(chosen)


if __name__ == "__main__":
    main()
