"""Convert a data set to sealed shards of records, which any number of processes read at random.

    python -m diffjax.data.convert fashion_mnist records/fashion
    python -m diffjax.data.convert folder records/photos --path=photos --size=64 --workers=8
    python -m diffjax.data.convert folder records/imagenet --path=imagenet --preset=imagenet256
    python -m diffjax.data.convert tar records/web --path=shards --size=64 --unreadable=skip
    python -m diffjax.data.convert --help

The same command goes on after it was stopped: shards that are finished are not written again. A run
then trains with `--config.data.name=records --config.data.path=records/photos`.
"""

import collections
import dataclasses
import functools
import hashlib
import importlib
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tyro

from . import (
    DATASETS,
    Dataset,
    Examples,
    UnreadableError,
    check_workers,
    fingerprint,
    in_order,
    load,
)
from .archives import ARCHIVES
from .images import UNREADABLE
from .records import ENCODINGS, MANIFEST, PARTS, VERSION, Seal, check_installed

SOURCES = {name: row for name, row in DATASETS.items() if not row.levels and name != "records"}
SOURCES |= ARCHIVES
"""What is converted, by name: data sets of bytes or continuous arrays, and archives."""

UNFINISHED = "converting.json"
"""What is being converted, and how, while the manifest is not there yet."""


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
    encoding: str = "raw"
    """How an example is stored: raw, png (smaller, lossless) or jpeg (smallest, quality 95)."""
    shard: int = 10_000
    """Examples of a shard."""
    workers: int = 0
    """Processes that read and write (extra `data`); 0: this one."""


def convert(
    dataset: Dataset,
    dest: Path,
    encoding: str = "raw",
    shard: int = 10_000,
    workers: int = 0,
    unreadable: str = "refuse",
) -> dict[str, Any]:
    """Write both parts of a data set as shards and their manifest; go on where it was stopped.

    Args:
      dataset: what `load` returned.
      dest: the folder to write.
      encoding: a name in `ENCODINGS`.
      shard: number of examples of each shard.
      workers: number of processes.
      unreadable: whether to "refuse" an example that cannot be read, or to "skip" it.

    Returns:
      The manifest.

    Raises:
      ValueError: if an option is impossible, the folder holds something else, or an example cannot
        be read.
    """
    check_installed()
    check_workers(workers)
    x = dataset.train.x
    if encoding not in ENCODINGS:
        raise ValueError(f"unknown encoding {encoding!r}: one of {', '.join(ENCODINGS)}")
    if encoding != "raw" and not (x.dtype == np.uint8 and x.shape[1:][2:] in ((1,), (3,))):
        raise ValueError(
            f"encoding={encoding}: needs images of bytes with 1 or 3 channels, not {x.dtype} of "
            f"shape {x.shape[1:]}; raw takes any"
        )
    if unreadable not in UNREADABLE:
        raise ValueError(f"unknown unreadable {unreadable!r}: one of {', '.join(UNREADABLE)}")
    if shard < 1:
        raise ValueError(f"shard={shard}: must be at least 1")
    about = {
        "version": VERSION,
        "shape": list(x.shape[1:]),
        "dtype": str(x.dtype),
        "encoding": encoding,
        "shard": shard,
        "source": {name: fingerprint(part) for name, part in zip(PARTS, dataset, strict=True)},
    }
    if _begin(dest, about):
        return json.loads((dest / MANIFEST).read_bytes())
    parts = {
        name: _write_part(part, dest, name, encoding, shard, workers, unreadable)
        for name, part in zip(PARTS, dataset, strict=True)
    }
    manifest = about | {"parts": parts}
    _replace(dest / MANIFEST, json.dumps(manifest, indent=1).encode())
    for file in (dest / UNFINISHED, *dest.glob("*.seal.json")):
        file.unlink()
    return manifest


def _begin(dest, about):
    """Make the folder, or go on in it; return whether it is finished already."""
    dest.mkdir(parents=True, exist_ok=True)
    for name in (MANIFEST, UNFINISHED):
        if (dest / name).is_file():
            found = json.loads((dest / name).read_bytes())
            differs = [key for key in about if found.get(key) != about[key]]
            if differs:
                raise ValueError(
                    f"{dest} holds another conversion, of other {', '.join(differs)}: choose "
                    "another folder, or delete this one"
                )
            return name == MANIFEST
    if any(dest.iterdir()):
        raise ValueError(f"{dest} is not empty, and holds no conversion that was stopped")
    _replace(dest / UNFINISHED, json.dumps(about).encode())
    return False


class Shard(NamedTuple):
    """What is known of a shard that was written: its seal, and the examples that it lacks."""

    seal: Seal
    skipped: list[tuple[int, str]]


def _write_part(part, dest, name, encoding, shard, workers, unreadable):
    """Write the shards and the labels of one part; return what the manifest says of them."""
    n = len(part.x)
    count = -(-n // shard)
    file = lambda i: f"{name}-{i:05}-of-{count:05}.array_record"
    tasks = [(file(i), i * shard, min(n, (i + 1) * shard)) for i in range(count)]
    write = functools.partial(_write_shard, part, dest, encoding, unreadable)
    shards, began = [], time.monotonic()
    for (_, _, done), written in zip(tasks, in_order(write, tasks, workers), strict=True):
        shards.append(written)
        speed = done / max(time.monotonic() - began, 1e-9)
        skipped = sum(len(each.skipped) for each in shards)
        what = f", {skipped:,} skipped" if skipped else ""
        print(f"{name}: {done:,} of {n:,} examples{what}, {speed:,.0f} per second", flush=True)
    skipped = [each for written in shards for each in written.skipped]
    for _, why in skipped[:10]:
        print(f"skipped: {why}", flush=True)
    n -= len(skipped)
    if n == 0:
        raise ValueError(f"{name}: none of its examples can be read: {skipped[0][1]}")
    labels, classes = None, None
    if part.label is not None:
        label = np.delete(part.label, [i for i, _ in skipped]).astype(np.int32)
        path = dest / f"{name}-labels.npy"
        np.save(path, label)
        sha256 = hashlib.sha256(label.tobytes()).hexdigest()
        labels = Seal(path.name, n, path.stat().st_size, sha256)
        classes = {str(k): v for k, v in sorted(collections.Counter(label.tolist()).items())}
    seals = [each.seal for each in shards if each.seal.n]
    about = {"n": n, "shards": seals, "labels": labels, "examples_of_label": classes}
    return about | {"skipped": [why for _, why in skipped]}


def _write_shard(
    part: Examples, dest: Path, encoding: str, unreadable: str, task: tuple[str, int, int]
) -> Shard:
    """Write one shard and its seal, unless they are there; a pure function that a worker runs."""
    array_record_module = importlib.import_module("array_record.python.array_record_module")

    name, start, stop = task
    path, sealed = dest / name, dest / f"{name}.seal.json"
    if sealed.is_file() and path.is_file():
        seal, skipped = json.loads(sealed.read_bytes())
        if path.stat().st_size == Seal(*seal).size:
            return Shard(Seal(*seal), [(i, why) for i, why in skipped])
    temporary = dest / f"{name}.tmp"
    # One record in a group, so that a record can be read without its neighbours.
    writer = array_record_module.ArrayRecordWriter(str(temporary), "group_size:1,uncompressed")
    digest, n, skipped = hashlib.sha256(), 0, []
    for i in range(start, stop):
        try:
            (x,) = part.x[np.array([i])]
        except UnreadableError as error:
            if unreadable == "refuse":
                raise
            skipped.append((i, str(error)))
            continue
        data = ENCODINGS[encoding].pack(x)
        digest.update(data)
        writer.write(data)
        n += 1
    writer.close()
    _sync(temporary)
    temporary.replace(path)
    seal = Seal(name, n, path.stat().st_size, digest.hexdigest())
    _replace(sealed, json.dumps(Shard(seal, skipped)).encode())
    return Shard(seal, skipped)


def _replace(path, data):
    """Write a file that is complete or not there."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_bytes(data)
    _sync(temporary)
    temporary.replace(path)


def _sync(path):
    with path.open("rb") as file:
        os.fsync(file.fileno())


def main(argv: Sequence[str]) -> None:
    """Convert by the command line."""
    a = tyro.cli(Arguments, args=argv, description=__doc__, use_underscores=True)
    try:
        if a.name not in SOURCES:
            raise ValueError(f"unknown data set {a.name!r}: one of {', '.join(SOURCES)}")
        a = _by_preset(a)
        check_workers(a.workers)
        check_installed()
        # An archive finds out what it cannot read while it is converted.
        early = a.unreadable if a.name not in ARCHIVES else "refuse"
        dataset = load(
            a.name, a.path, a.size, a.channels, early, a.workers, crop=a.crop, table=SOURCES
        )
        manifest = convert(dataset, a.dest, a.encoding, a.shard, a.workers, a.unreadable)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    n = {name: part["n"] for name, part in manifest["parts"].items()}
    print(
        f"{a.dest}: {n['train']:,} examples and {n['test']:,} held out, shape {manifest['shape']}"
    )


def _by_preset(a):
    if a.preset is None:
        return a
    if a.preset not in PRESETS:
        raise ValueError(f"unknown preset {a.preset!r}: one of {', '.join(PRESETS)}")
    preset, default = PRESETS[a.preset]._asdict(), Arguments(a.name, a.dest)
    given = [k for k in preset if getattr(a, k) not in (getattr(default, k), preset[k])]
    if given:
        raise ValueError(f"--preset={a.preset} says what {', '.join(given)} is: leave it out")
    return dataclasses.replace(a, **preset)


if __name__ == "__main__":
    main(sys.argv[1:])
