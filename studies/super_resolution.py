"""Measure a run of super-resolution at several levels of noise on the small images.

    python train.py --config=configs/fashion_sr.py --workdir=runs/fashion_sr
    python studies/super_resolution.py runs/fashion_sr
    python studies/super_resolution.py runs/fashion_sr --levels 0.1 --picture=enlarged.png

Held-out images are made small and enlarged again, several times each. The table has the Frechet
distance of one sample of each to training images, in principal components, and the peak
signal-to-noise ratio of one sample and of the mean of all, which is an estimate of the posterior's
mean: no other image has a higher expected ratio. The picture has rows of small images, bicubic
enlargements, samples, means and true images.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro

from diffjax import checkpoint, data, plots, super_resolution
from diffjax.evaluation import distances, sampling
from diffjax.experiment import Config, dataset, resolve
from diffjax.experiment.command_line import error_exit
from diffjax.experiment.config import require
from diffjax.training import distributed, runners
from diffjax.training.files import write_text
from markdown_table import table

PICTURED = 20
"""Columns of the picture."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to enlarge, and how often."""

    workdir: Annotated[Path, tyro.conf.Positional]
    """Directory of a run of super-resolution."""
    levels: tuple[float, ...] = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4)
    """Values of sampling.cond_noise; the picture is of the first."""
    n: int = 1000
    """Number of held-out images."""
    draws: int = 16
    """Samples of each image, of which the mean is taken."""
    picture: Path | None = None
    """Where the picture is drawn; None: enlarged.png in the run's directory."""
    table: Path | None = None
    """A file that the table is written to; None: it is only printed."""


def enlarged(args: Arguments, config: Config, params: Any, batch: dict, shape: Any) -> np.ndarray:
    """Samples, `[draws, n, *shape]`; what is drawn depends on the index alone."""
    runner, n = runners.choose(config.parallel), len(batch["index"])
    generate = runner.map(sampling.make_generate(resolve(config), shape))
    again = [batch | {"index": batch["index"] + draw * n} for draw in range(args.draws)]
    return np.stack([runners.in_batches(runner, generate, params, b, 200) for b in again])


def main(args: Arguments) -> None:
    """Enlarge, measure, print and draw."""
    distributed.setup(distributed.ALONE, 200)
    _, params, config = checkpoint.load(args.workdir)
    require((config.given_height is not None, f"{args.workdir}: not a run of super-resolution"))
    loaded = dataset.load_data(config, args.workdir)
    batch = sampling.request(config, loaded.test, args.n)
    truth, shape = batch["x"], batch["x"].shape[1:]
    images = data.first(loaded.train, 20_000)["x"]
    real, others = images[::2], images[1::2][: args.n]
    small = super_resolution.shrink(truth, config.given_height)
    bicubic = np.asarray(super_resolution.enlarge(small, shape[0]))
    ratio = lambda x: f"{float(super_resolution.psnr(x, truth).mean()):.2f}"
    distance = lambda x: f"{distances.from_halves(x, None, real, None)['frechet_pca24']:.2f}"
    rows = [
        ["other training images", distance(others), "", ""],
        ["bicubic", distance(bicubic), ratio(bicubic), ""],
    ]
    for level in args.levels:
        walk = dataclasses.replace(config.sampling, cond_noise=level)
        at = dataclasses.replace(config, sampling=walk)
        x = enlarged(args, at, params, batch, shape)
        mean = x.mean(0)
        rows.append([f"noise {level:g}", distance(x[0]), ratio(x[0]), ratio(mean)])
        print(*rows[-1], flush=True)
        if level == args.levels[0]:
            flat = np.asarray(jax.image.resize(small, truth.shape, "nearest"))
            pictures = np.stack([each[:PICTURED] for each in (flat, bicubic, x[0], mean, truth)])
            path = args.picture or args.workdir / "enlarged.png"
            plots.image_grid(pictures.reshape(-1, *shape), PICTURED).save(path)
    head = ["", "Frechet distance", "PSNR of a sample, dB", f"of the mean of {args.draws}, dB"]
    print(table(head, rows))
    if args.table is not None:
        write_text(args.table, table(head, rows))


if __name__ == "__main__":
    with error_exit():
        main(tyro.cli(Arguments, description=__doc__, use_underscores=True))
