"""Measure a cascade: a run's small samples, enlarged by a run of super-resolution.

    python train.py --config=configs/fashion_mnist.py:small --workdir=runs/fashion_small
    python train.py --config=configs/fashion_sr.py
    python studies/cascade.py runs/fashion_small runs/fashion_sr --beside=runs/fashion_mnist

Prints the Frechet distance to training images of the cascade's samples, of another run's samples
and of held-out images. Draws LARGE/cascade.png, which has a row of small samples above each row of
their enlargements.
"""

import dataclasses
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import tyro

from diffjax import checkpoint, data, plots
from diffjax.evaluation import distances, sampling
from diffjax.experiment import dataset, resolve
from diffjax.experiment.command_line import error_exit
from diffjax.training import distributed, runners


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The runs of a cascade."""

    small: Annotated[Path, tyro.conf.Positional]
    """Directory of the run that draws small images."""
    large: Annotated[Path, tyro.conf.Positional]
    """Directory of the run that enlarges them."""
    beside: Path | None = None
    """Directory of a run that draws large images at once, for comparison."""
    cond_noise: float | None = None
    """Noise on the small samples; None: the run's own sampling.cond_noise."""
    n: int = 500
    """Number of samples to measure."""


def main(args: Arguments) -> None:
    """Sample, measure, draw."""
    distributed.setup(distributed.ALONE, 100)
    _, small_params, small = checkpoint.load(args.small)
    _, params, large = checkpoint.load(args.large)
    if args.cond_noise is not None:
        walk = dataclasses.replace(large.sampling, cond_noise=args.cond_noise)
        large = dataclasses.replace(large, sampling=walk)
    train_set, test_set = dataset.load_data(large)
    shape = train_set.x.shape[1:]
    real = data.first(train_set, 10_000)["x"]
    runner = runners.pmap()

    def sample(generate, params, config, n=args.n):
        batch = sampling.request(config, test_set, n)
        return runners.in_batches(runner, runner.map(generate), params, batch, 100)

    low = large.low_resolution
    e_small, e_large = resolve(small), resolve(large)
    cascade = sampling.make_cascade(e_small, e_large, shape)
    draw_small = sampling.make_generate(e_small, (low, low, shape[-1]))
    found = {"cascade": sample(cascade, (small_params, params), small)}
    if args.beside is not None:
        _, whole_params, whole = checkpoint.load(args.beside)
        draw_whole = sampling.make_generate(resolve(whole), shape)
        found[str(args.beside)] = sample(draw_whole, whole_params, whole)
    found["held-out images"] = data.first(test_set, args.n)["x"]
    for name, x in found.items():
        distance = distances.from_halves(x, None, real, None)["frechet_pca24"]
        print(f"{name}: frechet_pca24 {distance:.3f}, n={len(x)}", flush=True)

    few = 40
    coarse = sample(draw_small, small_params, small, few)
    coarse = np.asarray(jax.image.resize(coarse, (few, *shape), "nearest"))
    rows = [part.reshape(-1, 20, *shape) for part in (coarse, found["cascade"][:few])]
    plots.image_grid(np.stack(rows, 1).reshape(-1, *shape), 20).save(args.large / "cascade.png")


if __name__ == "__main__":
    with error_exit():
        main(tyro.cli(Arguments, description=__doc__, use_underscores=True))
