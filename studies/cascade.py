"""A cascade: a run's small samples, enlarged by a run of super-resolution; and how near they come.

    python train.py --config=configs/fashion_mnist.py:small --workdir=runs/fashion_small
    python train.py --config=configs/fashion_sr.py
    python docs/cascade.py runs/fashion_small runs/fashion_sr --beside=runs/fashion_mnist

Prints the Frechet distance of the samples to training images, beside those of another run's samples
and of held-out images, and draws DIR/cascade.png: a row of small samples above each row of large.
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
from diffjax.training import distributed, runners
from diffjax.config import plainly


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The runs of a cascade."""

    small: Annotated[Path, tyro.conf.Positional]
    """Directory of the run that draws small images."""
    large: Annotated[Path, tyro.conf.Positional]
    """Directory of the run that enlarges them."""
    beside: Path | None = None
    """Directory of a run that draws large images at once, to compare with."""
    level: float | None = None
    """Noise on the small samples; None: the run's sampling.level."""
    n: int = 500
    """Samples to measure."""


def main(args: Arguments) -> None:
    """Sample, measure, draw."""
    distributed.setup(distributed.ALONE, 100)
    small_network, small_params, small = checkpoint.load(args.small)
    network, params, large = checkpoint.load(args.large)
    if args.level is not None:
        sampling = dataclasses.replace(large.sampling, level=args.level)
        large = dataclasses.replace(large, sampling=sampling)
    train_set, test_set = dataset.load_data(large)
    shape = train_set.x.shape[1:]
    real = data.first(train_set, 10_000)["x"]

    def sample(make, params, asked_of, n=args.n):
        asked = sampling.request(asked_of, test_set, n)
        runner = runners.pmap(1)
        return runners.in_batches(runner, runner.map(make), params, asked, 100)

    cascade = resolve.make_cascade(small, small_network, large, network, shape)
    draw_small = resolve.make_generate(small, small_network, (large.low, large.low, shape[-1]))
    found = {"cascade": sample(cascade, (small_params, params), small)}
    if args.beside is not None:
        whole_network, whole_params, whole = checkpoint.load(args.beside)
        make = resolve.make_generate(whole, whole_network, shape)
        found[str(args.beside)] = sample(make, whole_params, whole)
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
    with plainly():
        main(tyro.cli(Arguments, description=__doc__))
