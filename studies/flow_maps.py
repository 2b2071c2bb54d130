"""Measure flow maps: each identity and velocity at 1, 2, 4 and 8 steps, over three seeds.

    python studies/flow_maps.py plane                       # five Gaussians, 6,000 steps each
    python studies/flow_maps.py plane --steps=200 --seeds 0 # in minutes, to see that it works
    python studies/flow_maps.py fashion --seeds 0 --only "denoiser" "lagrangian, distilled"
    python studies/flow_maps.py page                        # the tables of docs/howto/few_steps.md
    python studies/flow_maps.py picture                     # its picture

`plane` measures the energy distance to exact samples, times 1,000, of maps by two targets.
`fashion` trains a denoiser of Fashion-MNIST, maps that learn from it, and maps that learn from data
alone, and measures the Frechet distance of their samples beside those of samplers of the denoiser.
What is measured is kept in studies/results/flow_maps.json, and a second call measures what is
missing.
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
from diffjax import checkpoint, models, oracles, plots
from diffjax.evaluation.sampling import make_generate
from diffjax.experiment import resolve
from diffjax.training import init_state, train_step
from markdown_table import table

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "studies" / "results" / "flow_maps.json"
PAGE = ROOT / "docs" / "howto" / "few_steps.md"
PICTURE = ROOT / "docs" / "images" / "fashion_map.png"
HOME = Path("runs/flow_maps")
STEPS = (1, 2, 4, 8)
ROWS: dict[str, dict[str, Any]] = {
    "Lagrangian, own": dict(identity="lagrangian"),
    "Eulerian, own": dict(identity="eulerian"),
    "Eulerian, pair (MeanFlow)": dict(identity="eulerian", velocity="pair"),
    "semigroup, own": dict(identity="semigroup"),
    "semigroup, own, halves (shortcut)": dict(identity="semigroup", first=0.5),
    "semigroup, pair (consistency)": dict(identity="semigroup", velocity="pair", first=0.02),
    "Lagrangian, teacher": dict(identity="lagrangian", velocity="teacher", diagonal=0.25),
    "Eulerian, teacher": dict(identity="eulerian", velocity="teacher", diagonal=0.25),
    "nothing but the diagonal (DDIM)": dict(diagonal=1.0),
}
"""Options of `flow_map_loss`, by what they are called. Those without a teacher take half of the
batch to learn to denoise."""
BATCH = 1024
"""Examples of a step in the plane."""


@dataclasses.dataclass(frozen=True)
class Plane:
    """Maps of a mixture of five Gaussians, by an MLP on rectified flow."""

    steps: int = 6000
    """Training steps, of 1,024 examples."""
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


@dataclasses.dataclass(frozen=True)
class Picture:
    """Draw the picture of docs/howto/few_steps.md by the networks that `fashion` has trained."""

    seed: int = 0
    """Seed of the networks."""


SCHEDULE = diffjax.rectified_flow()
TARGETS = ("flow", "v")
"""Targets of the maps in the plane."""


def mixture() -> oracles.Oracle:
    """Five Gaussians on a circle."""
    turn = 2 * np.pi * np.arange(5) / 5
    means = 1.5 * np.stack([np.cos(turn), np.sin(turn)], axis=1)
    return oracles.gaussian_mixture(SCHEDULE, np.ones(5), means, np.full(5, 0.02))


def energy(x: jax.Array, y: jax.Array) -> jax.Array:
    """1,000 times the energy distance of two samples, `[n, 2]` each (Szekely & Rizzo 2013)."""
    apart = lambda a, b: jnp.linalg.norm(a[:, None] - b[None], axis=-1).mean()
    return 1000 * (2 * apart(x, y) - apart(x, x) - apart(y, y))


def learn(
    seed: int, steps: int, target: str, options: dict[str, Any]
) -> tuple[diffjax.FlowMap, float]:
    """Train a map in the plane; the map, and the seconds that this took."""
    data = mixture()
    denoise = lambda x_t, t, cond=None: data(x_t, t)  # without s, for which it would solve an ODE
    teacher = {"velocity": denoise} if options.get("velocity") == "teacher" else {}
    module = models.make_module(models.MLPConfig(embedding="angle", two_times=True))
    apply = functools.partial(models.apply, module)
    one = jnp.zeros(1)
    params = module.init(jax.random.key(seed), jnp.zeros((1, 2)), one, {"log_snr_s": one})["params"]
    tx = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(1e-3, steps))
    )

    def loss(key, params, batch):
        x_0 = data.sample(jax.random.fold_in(key, 1), BATCH)
        network = functools.partial(apply, params)
        given = {"diagonal": 0.5} | options | teacher
        return diffjax.flow_map_loss(key, network, SCHEDULE, target, x_0, **given)

    step = functools.partial(train_step, loss_fn=loss, tx=tx, ema_decay=0.999)
    batch = {"index": jnp.arange(BATCH)}

    @jax.jit
    def train(state):
        return jax.lax.scan(lambda s, _: (step(s, batch)[0], None), state, None, steps)[0]

    began = time.perf_counter()
    state = jax.block_until_ready(train(init_state(jax.random.key(seed + 1), params, tx)))
    trained = functools.partial(apply, state.ema_params)
    return diffjax.flow_map(trained, SCHEDULE, target), time.perf_counter() - began


def in_plane(seed: int, steps: int, target: str, row: str) -> dict[str, float]:
    """The energy distances of a row by the number of steps, and its seconds."""
    mean, seconds = learn(seed, steps, target, ROWS[row])
    exact = mixture().sample(jax.random.key(100 + seed), 4000)
    x_1 = diffjax.prior_sample(jax.random.key(200 + seed), SCHEDULE, (4000, 2))
    jump = diffjax.jump(mean)
    draw = lambda n: diffjax.sample(jax.random.key(0), jump, x_1, diffjax.uniform_times(n))[0]
    return {str(n): float(energy(draw(n), exact)) for n in STEPS} | {"s": round(seconds)}


def on_record() -> dict[str, Any]:
    """What was measured before, by name."""
    return json.loads(RECORD.read_text())


def keep(name: str, found: dict[str, Any]) -> None:
    """Put on record what was measured under a name."""
    record = dict(sorted((on_record() | {name: found}).items()))
    RECORD.write_text(json.dumps(record, indent=1) + "\n")


def in_steps(n: int) -> str:
    """The heading of a column."""
    return f"{n} steps" if n > 1 else "1 step"


def spread(values: list[float]) -> str:
    """The mean, and the standard deviation if there are several; nothing of nothing."""
    if not values:
        return ""
    mean = f"{statistics.mean(values):.3g}"
    return mean + (f" ± {statistics.stdev(values):.1g}" if len(values) > 1 else "")


def of_plane(record: dict[str, Any], steps: int) -> str:
    """The table of what is on record of the plane, after so many training steps."""
    draws = [mixture().sample(jax.random.key(k), 4000) for k in range(100, 106)]
    exact = spread([float(energy(draws[i], draws[i + 1])) for i in (0, 2, 4)])
    rows: list[list[Any]] = [["exact samples", "", exact, *[""] * 5]]
    for target, row in itertools.product(TARGETS, ROWS):
        start = f"plane_{steps}x{BATCH}/{target}/{row}/"
        if runs := [found for key, found in record.items() if key.startswith(start)]:
            cells = [spread([run[str(n)] for run in runs]) for n in STEPS]
            seconds = f"{statistics.mean(run['s'] for run in runs):.0f}"
            rows.append([row, target, *cells, seconds, len(runs)])
    return table(["learned by", "target", *map(in_steps, STEPS), "seconds", "seeds"], rows)


def plane(args: Plane) -> None:
    """Train and measure every row."""
    for target, seed, row in itertools.product(TARGETS, args.seeds, ROWS):
        name = f"plane_{args.steps}x{BATCH}/{target}/{row}/{seed}"
        if name not in on_record():
            keep(name, in_plane(seed, args.steps, target, row))
            print(name, on_record()[name], flush=True)
    print(of_plane(on_record(), args.steps))


BASE = ["--config=fashion_mnist", "--config.target=v", "--config.model.embedding=angle"]
BASE += ["--config.weighting=unit", "--config.save_every=250"]
GUIDANCE = ["classifier_free:weight=2.5", "within:low=-2,high=4"]
"""Of the denoiser, when it draws samples and when it teaches."""
MAP = ["--config.objective=flow_map", "--config.model.two_times=True", "--config.batch_size=32"]
MAP += ["--config.steps=5250", "--config.optimizer.decay_steps=5250"]
MAP += ["--config.optimizer.learning_rate=4e-3", "--config.sample_every=5250"]
MAP += ["--config.sampling.sampler=jump", "--config.sampling.steps=1", "--config.sampling.guidance"]
DISTILLED = ["--config.flow_map.velocity=TEACHER", "--config.flow_map.start=TEACHER"]
DISTILLED += ["--config.flow_map.diagonal=0.25", "--config.flow_map.guidance", *GUIDANCE]
NETWORKS = {"denoiser": ["--config.steps=2500"]} | {
    f"{identity}, {how}": [*MAP, f"--config.flow_map.identity={identity}", *more]
    for identity in ("semigroup", "eulerian", "lagrangian")
    for how, more in (("from data", []), ("distilled", DISTILLED))
}
"""Flags of train.py by network; TEACHER is the denoiser of the same seed."""
DENOISER = {
    "ddim": ["--sampler=ddim", "--guidance", *GUIDANCE],
    "dpm_solver_pp_2m": ["--sampler=dpm_solver_pp_2m", "--guidance", *GUIDANCE],
    "ddim, unguided": ["--sampler=ddim", "--guidance"],
}
JUMP = {"jump": ["--sampler=jump", "--guidance"]}
"""Flags of evaluate.py by what the walk is called."""
WALKS = {
    name: (DENOISER, (1, 2, 4, 8, 20, 50)) if name == "denoiser" else (JUMP, (1, 2, 4))
    for name in NETWORKS
}
"""Walks by network, and the numbers of their steps."""
SAMPLES = 5000


def run(script: str, *argv: str) -> float:
    """Run a script of the repository; the CPU-seconds that it takes."""
    print("flow_maps: python", script, *argv, flush=True)
    spent = lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    before = spent()
    subprocess.run([sys.executable, str(ROOT / script), *argv], check=True)
    return spent() - before


def settings(name: str) -> list[str]:
    """What the numbers of a network depend on: the flags of its training, and its guidance."""
    return [*BASE, *NETWORKS[name], *(GUIDANCE if name == "denoiser" else [])]


def run_of(name: str, seed: int) -> Path:
    """The directory of the run of a network."""
    return HOME / f"{name.replace(', ', '_').replace(' ', '_')}_{seed}"


def in_images(name: str, seed: int) -> None:
    """Train a network, and record the distances of its samples that are not on record."""
    workdir, key = run_of(name, seed), f"fashion/{name}/{seed}"

    def recorded() -> dict[str, Any]:
        found = on_record().get(key, {})
        return found if found.get("settings") == settings(name) else {"settings": settings(name)}

    walks = list(itertools.product(*WALKS[name]))
    if all(str(n) in recorded().get(walk, {}) for walk, n in walks):
        return
    flags = [flag.replace("TEACHER", str(run_of("denoiser", seed))) for flag in NETWORKS[name]]
    new = not workdir.exists()
    cpu = run("train.py", *BASE, *flags, f"--config.seed={seed}", f"--workdir={workdir}")
    if new:  # what is on record is of another run, and otherwise this was not the whole training
        about = {"date": time.strftime("%Y-%m-%d"), "cpu_s": round(cpu)}
        keep(key, about | {"settings": settings(name)})
    for walk, n in walks:
        found = recorded()
        if str(n) in found.get(walk, {}):
            continue
        out = workdir / f"{walk.replace(', ', '_')}_{n}.json"
        common = [f"--workdir={workdir}", f"--n={SAMPLES}", "--features=fashion_classifier"]
        common += ["--held_out=0", f"--steps={n}", f"--result={out}"]
        run("evaluate.py", *common, *WALKS[name][0][walk])
        frechet = json.loads(out.read_text())["frechet"]
        keep(key, found | {walk: found.get(walk, {}) | {str(n): frechet}})


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
    rows, columns = [], WALKS["denoiser"][1]
    for name, (walks, _) in WALKS.items():
        runs = [run for key, run in record.items() if key.startswith(f"fashion/{name}/")]
        runs = [run for run in runs if run["settings"] == settings(name)]
        for walk in walks:
            found = [run.get(walk, {}) for run in runs]
            cells = [spread([each[str(n)] for each in found if str(n) in each]) for n in columns]
            cpu = [run["cpu_s"] for run in runs if "cpu_s" in run]
            spent = f"{statistics.mean(cpu):,.0f}" if cpu else ""
            if any(cells):
                rows.append([name, walk, *cells, spent, len(runs)])
    head = ["network", "sampler", *map(in_steps, columns), "CPU-seconds", "seeds"]
    return table(head, rows)


def page(_: Page) -> None:
    """Write the tables into the page, each between its marks."""
    text, record = PAGE.read_text(), on_record()
    for name, found in (("plane", of_plane(record, Plane.steps)), ("fashion", of_fashion(record))):
        begin, end = f"<!-- flow_maps.py {name} -->", "<!-- end -->"
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{found}\n{end}{rest.split(end, 1)[1]}"
    PAGE.write_text(text)


def picture(args: Picture) -> None:
    """Draw rows of a map's samples above those of its teacher, all from the same noise."""
    index = np.arange(16, dtype=np.int32)
    request = {"index": index, "label": index % 10}

    def row(name: str, **walk: Any) -> jax.Array:
        _, params, config = checkpoint.load(run_of(name, args.seed))
        sampling = dataclasses.replace(config.sampling, times=None, **walk)
        e = resolve(dataclasses.replace(config, sampling=sampling))
        return make_generate(e, (28, 28, 1))(params, request)

    guided = {"sampler": "ddim", "guidance": tuple(GUIDANCE)}
    rows = [row("lagrangian, distilled", steps=n) for n in (1, 2, 4)]
    rows += [row("denoiser", steps=n, **guided) for n in (4, 50)]
    plots.image_grid(jnp.concatenate(rows), columns=len(index)).save(PICTURE)


def main() -> None:
    """The command."""
    commands = {Plane: plane, Fashion: fashion, Page: page, Picture: picture}
    chosen = tyro.cli(
        Annotated[Plane, tyro.conf.subcommand("plane")]
        | Annotated[Fashion, tyro.conf.subcommand("fashion")]
        | Annotated[Page, tyro.conf.subcommand("page")]
        | Annotated[Picture, tyro.conf.subcommand("picture")],
        description=__doc__,
        use_underscores=True,
    )
    commands[type(chosen)](chosen)


if __name__ == "__main__":
    main()
