"""Convert a data set to sealed shards of records, which any number of processes read at random.

    python -m diffjax.data.convert fashion_mnist records/fashion
    python -m diffjax.data.convert folder records/photos --path=photos --size=64 --workers=8
    python -m diffjax.data.convert folder records/imagenet --path=imagenet --preset=imagenet256
    python -m diffjax.data.convert tar records/web --path=shards --size=64 --unreadable=skip
    python -m diffjax.data.convert folder records/latents --path=imagenet --preset=imagenet256 \\
        --encode=sd-vae-ft-mse --mirror=True
    python -m diffjax.data.convert --help

The same command goes on after it was stopped: shards that are finished are not written again. A run
then trains with `--config.data.name=records --config.data.path=records/photos`.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import tyro

from ..evaluation import pixels
from ..experiment.config import require
from ..latents import LATENTS
from ..published import autoencoder_kl
from ..training.store import local
from . import DATASETS, Dataset, check_workers, load
from .archives import ARCHIVES
from .conversion import convert, mirrored
from .records import check_installed

SOURCES = {name: row for name, row in DATASETS.items() if not row.levels and name != "records"}
SOURCES |= ARCHIVES
"""What is converted, by name: data sets of bytes or continuous arrays, and archives."""


class Preset(NamedTuple):
    """The settings of a conversion that papers share: size, crop and encoding."""

    size: int
    crop: str
    encoding: str


PRESETS = {
    "imagenet64": Preset(64, "area", "raw"),
    "imagenet256": Preset(256, "adm", "png"),
    "imagenet512": Preset(512, "adm", "png"),
}
"""Presets by name: area downsampling to 64 pixels; ADM's centre crop, which DiT and EDM2 use."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to convert, to where, and how."""

    name: tyro.conf.Positional[str]
    """The data set, a name as in `--config.data.name`, or parquet, tar or tfds."""
    dest: tyro.conf.Positional[Path]
    """The folder to write."""
    path: Path | None = None
    """The data set's folder or file; None: its default place."""
    preset: str | None = None
    """imagenet64, imagenet256 or imagenet512: size, crop and encoding of papers; None: as given."""
    size: int | None = None
    """Side of the squares to which images are cropped and scaled; None: leave them as they are."""
    crop: str = "square"
    """How an image is made a square: square, area or adm."""
    channels: int | None = None
    """Channels of the images: 1, grey, or 3, RGB; None: 1 if all of a folder are grey, else 3."""
    unreadable: str = "refuse"
    """Whether to refuse an image that cannot be read, or to skip it."""
    mirror: bool = False
    """Also store the mirror image of each image to train on."""
    encode: Path | None = None
    """The folder or file of Stable Diffusion's autoencoder: store latents in place of images, as
    moments in float16."""
    latents: str = "sd"
    """The convention of the latents: sd (DiT, SiT), or edm2."""
    encoding: str = "raw"
    """How an example is stored: raw, png (smaller, lossless) or jpeg (smallest, quality 95)."""
    shard: int = 10_000
    """Examples of a shard."""
    workers: int = 0
    """Processes that read and write (extra `data`); 0: this one."""


def main(argv: Sequence[str]) -> None:
    """Convert by the command line."""
    a = tyro.cli(
        Arguments,
        prog="python -m diffjax.data.convert",
        args=argv,
        description=__doc__,
        use_underscores=True,
        config=(tyro.conf.FlagConversionOff,),
    )
    try:
        if a.name not in SOURCES:
            raise ValueError(f"unknown data set {a.name!r}: one of {', '.join(SOURCES)}")
        a = _by_preset(a)
        # A bucket is copied from and to by a tool that verifies, resumes and runs in parallel.
        upload = "convert to a disk, then `gcloud storage cp -r FOLDER URL`"
        download = "copy it to a disk first, by `gcloud storage cp -r URL FOLDER`"
        a = dataclasses.replace(
            a, dest=local(a.dest, upload), path=a.path and local(a.path, download)
        )
        check_workers(a.workers)
        check_installed()
        require(
            (a.latents in LATENTS, f"unknown latents {a.latents!r}: one of {', '.join(LATENTS)}"),
            (
                a.encode is None or (a.workers == 0 and a.encoding == "raw"),
                f"--encode with --workers={a.workers} --encoding={a.encoding}: latents are encoded "
                "on the devices, by this process, and stored raw",
            ),
        )
        # An archive finds out what it cannot read while it is converted.
        early = a.unreadable if a.name not in ARCHIVES else "refuse"
        dataset = load(
            a.name, a.path, a.size, a.channels, early, a.workers, crop=a.crop, table=SOURCES
        )
        if a.mirror:
            dataset = dataset._replace(train=mirrored(dataset.train))
        if a.encode is not None:
            dataset = _encoded(dataset, a)
        manifest = convert(dataset, a.dest, a.encoding, a.shard, a.workers, a.unreadable)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    n = {name: part["n"] for name, part in manifest["parts"].items()}
    print(
        f"{a.dest}: {n['train']:,} examples and {n['test']:,} held out, shape {manifest['shape']}"
    )


def _encoded(dataset, a):
    autoencoder = autoencoder_kl.load(a.encode)
    parts = [pixels.encoded(part, autoencoder, a.latents) for part in dataset]
    return Dataset(*parts)


def _by_preset(a):
    if a.preset is None:
        return a
    if a.preset not in PRESETS:
        raise ValueError(f"unknown preset {a.preset!r}: one of {', '.join(PRESETS)}")
    preset, default = PRESETS[a.preset]._asdict(), Arguments(a.name, a.dest)
    if a.encode is not None:
        preset["encoding"] = "raw"
    given = [k for k in preset if getattr(a, k) not in (getattr(default, k), preset[k])]
    if given:
        raise ValueError(f"--preset={a.preset} says what {', '.join(given)} is: leave it out")
    return dataclasses.replace(a, **preset)


if __name__ == "__main__":
    main(sys.argv[1:])
