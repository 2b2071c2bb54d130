"""Write a data set as sealed shards of records; `diffjax.data.convert` is the command.

An interrupted conversion goes on where it stopped: a shard counts once its own seal is written, and
the folder once its manifest is.
"""

import collections
import dataclasses
import functools
import hashlib
import importlib
import json
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from . import (
    Dataset,
    Examples,
    Rows,
    UnreadableError,
    check_workers,
    fingerprint,
    in_order,
)
from .images import UNREADABLE
from .records import ENCODINGS, MANIFEST, PARTS, VERSION, Seal, check_installed

CHUNK = 64
"""Examples that are read at once."""
UNFINISHED = "converting.json"
"""What is being converted, and how, while the manifest is not there yet."""


@dataclasses.dataclass(frozen=True)
class Mirrored:
    """Images, and after them their mirror images, left to right.

    Attributes:
      source: `[n, height, width, channels]`.
    """

    source: Rows

    @property
    def shape(self) -> tuple[int, ...]:
        return (2 * len(self.source), *self.source.shape[1:])

    @property
    def dtype(self) -> np.dtype:
        return self.source.dtype

    def __len__(self) -> int:
        return 2 * len(self.source)

    def __getitem__(self, index: Any) -> np.ndarray:
        chosen = np.arange(len(self))[index]
        x = self.source[chosen % len(self.source)]
        return np.where((chosen >= len(self.source))[:, None, None, None], x[:, :, ::-1], x)

    def fingerprint(self) -> dict[str, Any]:
        """That of the images."""
        return {"mirrored": fingerprint(Examples(self.source))}


def mirrored(examples: Examples) -> Examples:
    """The examples, and after them their mirror images with the same labels.

    Raises:
      ValueError: unless they are images `[n, height, width, channels]`.
    """
    if len(examples.x.shape) != 4:
        raise ValueError(f"mirror: examples of shape {examples.x.shape[1:]} are no images")
    label = None if examples.label is None else np.tile(examples.label, 2)
    return Examples(Mirrored(examples.x), label)


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
    for low in range(start, stop, CHUNK):
        rows, lost = _readable(part.x, np.arange(low, min(stop, low + CHUNK)), unreadable)
        skipped += lost
        for x in rows:
            data = ENCODINGS[encoding].pack(x)
            digest.update(data)
            writer.write(data)
        n += len(rows)
    writer.close()
    _sync(temporary)
    temporary.replace(path)
    seal = Seal(name, n, path.stat().st_size, digest.hexdigest())
    _replace(sealed, json.dumps(Shard(seal, skipped)).encode())
    return Shard(seal, skipped)


def _readable(x, index, unreadable):
    """The rows at an index that can be read, and the numbers of the others, with the reason."""
    try:
        return x[index], []
    except UnreadableError:
        if unreadable == "refuse":
            raise
    rows, lost = [], []
    for i in index:
        try:
            rows += list(x[np.array([i])])
        except UnreadableError as error:
            lost.append((int(i), str(error)))
    return rows, lost


def _replace(path, data):
    """Write a file that is complete or not there."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_bytes(data)
    _sync(temporary)
    temporary.replace(path)


def _sync(path):
    with path.open("rb") as file:
        os.fsync(file.fileno())
