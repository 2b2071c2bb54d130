"""A folder of images as a data set on the disk: a batch reads the files that it needs.

`Images` acts as an array in batches: it has a shape and a dtype, and an array of indices gives an
array of pixels. Pixels are not cached, so memory grows only with the names of the files. Every file
is decoded once before training starts, which finds and names the files that cannot be read.
"""

import dataclasses
import functools
import hashlib
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from . import limits
from .examples import Source
from .transient import is_transient
from .workers import in_order

READ = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
NOT_READ = (".avif", ".gif", ".heic", ".heif", ".jp2", ".jxl", ".psd", ".svg", ".tif", ".tiff")
UNREADABLE = ("refuse", "skip")
CHUNK = 64  # files that one task decodes


class UnreadableError(ValueError):
    """A file cannot be read as an image; the message names it."""


@dataclasses.dataclass(frozen=True)
class Images:
    """Image files as an array of bytes `[n, height, width, channels]`, read when it is indexed.

    Attributes:
      root: the folder.
      names: the files' paths in the folder, an array of str `[n]`.
      side: side of the squares to which they are scaled; None if they are not scaled.
      shape: `(n, height, width, channels)`.
    """

    root: Path
    names: np.ndarray
    side: int | None
    shape: tuple[int, ...]
    dtype = np.dtype(np.uint8)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: Any) -> np.ndarray:
        files = [self.root / name for name in self.names[index]]
        return np.stack([read(file, self.side, self.shape[-1]) for file in files])

    def fingerprint(self) -> dict[str, str]:
        """Hashes of the files' names, sizes and times of change."""
        found = [(self.root / name).stat() for name in self.names]
        parts = {
            "names": list(self.names),
            "sizes": [file.st_size for file in found],
            "times": [file.st_mtime_ns for file in found],
        }
        return {k: hashlib.sha256(repr(v).encode()).hexdigest() for k, v in parts.items()}

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        return self[:]  # reads all images into memory


class Scan(NamedTuple):
    """The files of a folder that can be read, and those that cannot, with the reason."""

    names: list[str]
    unreadable: dict[str, str]
    shapes: dict[tuple[int, ...], str]
    """The shapes that occur, each with the name of an image that has it."""


def folder(
    path: Path | None,
    size: int | None = None,
    channels: int | None = None,
    unreadable: str = "refuse",
    workers: int = 0,
) -> tuple:
    """A folder of images, read batch by batch; about a tenth is held out.

    The SHA-256 of an image's path in the folder decides whether it is held out (`held_out`), so
    this does not change when other images are added. If all images are in sub-folders, their labels
    are the top-level sub-folders, in alphabetical order.

    Args:
      path: the folder.
      size: crop each image to a centred square, and scale it to `size` x `size`; None requires that
        all images have one size.
      channels: 1 (grey) or 3 (RGB); None is grey if all images are grey.
      unreadable: what to do if a file cannot be read: "refuse" the folder, or "skip" the file.
      workers: number of processes that decode the files.

    Raises:
      FileNotFoundError: if there is no such folder.
      ValueError: if an option or a file is invalid, or too few images are left; the message says
        which.
    """
    if path is None or not path.is_dir():
        raise FileNotFoundError(f"folder: --config.data.path={path} must be a folder of images")
    if size is not None and size < 1:
        raise ValueError(f"data.size={size}: must be at least 1")
    if channels not in (None, 1, 3):
        raise ValueError(f"data.channels={channels}: must be 1 (grey), 3 (RGB) or None")
    if unreadable not in UNREADABLE:
        raise ValueError(f"unknown data.unreadable {unreadable!r}: one of {', '.join(UNREADABLE)}")
    names, bad, shapes = scan(path, size, workers)
    _refuse_or_tell(path, len(names), bad, unreadable)
    sides = {shape[:2]: name for shape, name in shapes.items()}
    if len(sides) > 1:
        some = ", ".join(f"{w} x {h} ({name})" for (h, w), name in list(sides.items())[:3])
        raise ValueError(f"{path}: images of {len(sides)} sizes, as {some}: give data.size")

    parts = [[n for n in names if held_out(n) == held] for held in (False, True)]
    if not all(parts):
        raise ValueError(
            f"{path}: {len(names)} images ({', '.join(READ)}), {len(parts[0])} to train on and "
            f"{len(parts[1])} held out, about one in ten: need at least one of each"
        )
    class_of = lambda name: name.partition("/")[0]
    classes = {c: i for i, c in enumerate(sorted({class_of(name) for name in (*names, *bad)}))}
    labelled = all("/" in name for name in (*names, *bad))
    ((height, width),) = sides
    channels = channels or max(shape[2] for shape in shapes)
    what = (
        f"labels {', '.join(list(classes)[:20])}{' ...' * (len(classes) > 20)}" if labelled else ""
    )
    print(f"{path}: {len(names):,} images, {len(parts[1]):,} held out  {what}".strip(), flush=True)

    def part(names):
        images = Images(path, np.array(names, object), size, (len(names), height, width, channels))
        return images, np.array([classes[class_of(n)] for n in names]) if labelled else None

    return part(parts[0]), part(parts[1])


def _refuse_or_tell(path, readable, bad, unreadable):
    if not bad:
        return
    some = "; ".join(f"{name}: {why}" for name, why in list(bad.items())[:10])
    what = f"{path}: {len(bad)} of {len(bad) + readable} images cannot be read: {some}"
    what += f"; and {len(bad) - 10} more" if len(bad) > 10 else ""
    if unreadable == "refuse":
        raise UnreadableError(f"{what}. Repair them, or skip them with data.unreadable=skip")
    print(f"skipped: {what}", flush=True)


def held_out(name: str) -> bool:
    """Whether an image is held out, as one in ten is: a function of its path in the folder."""
    return int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8]) % 10 == 0


def scan(path: Path, size: int | None = None, workers: int = 0) -> Scan:
    """Decode every image of a folder once, and print the progress.

    Args:
      path: the folder.
      size: as for `folder`.
      workers: number of processes that decode the files.
    """
    found = [
        os.path.relpath(os.path.join(where, file), path)
        for where, _, files in os.walk(path)
        for file in files
        if file.lower().endswith(READ + NOT_READ)
    ]
    found = sorted(name.replace(os.sep, "/") for name in found)
    result, reported = Scan([], {}, {}), time.monotonic()
    look = functools.partial(_look, path, found, size)
    for seen in in_order(look, range(0, len(found), CHUNK), workers):
        for name, shape, why in seen:
            if shape is None:
                result.unreadable[name] = why
            else:
                result.names.append(name)
                result.shapes.setdefault(shape, name)
        if time.monotonic() > reported + 2:
            done, reported = len(result.names) + len(result.unreadable), time.monotonic()
            bad = f", {len(result.unreadable):,} unreadable" if result.unreadable else ""
            print(f"{path}: checked {done:,} of {len(found):,} images{bad}", flush=True)
    return result


def _look(path, found, size, start):
    """(name, shape or None, reason if None) of each file in a chunk."""
    seen = []
    for name in found[start : start + CHUNK]:
        try:
            seen.append((name, read(path / name, size).shape, ""))
        except UnreadableError as error:
            seen.append((name, None, str(error.__cause__)))
    return seen


def read(file: Path, side: int | None = None, channels: int | None = None) -> np.ndarray:
    """The pixels of an image file, uint8 `[height, width, channels]`, on white where transparent.

    Args:
      file: a file with a suffix in `READ`.
      side: crop the image to a centred square, and scale it to this many pixels per side.
      channels: 1 (grey) or 3 (RGB); None is grey if the image is grey.

    Raises:
      UnreadableError: if the file is not an image, or decoding it takes more bytes than
        `limits.IMAGE`.
      OSError: if the disk or the network fails, which says nothing about the file.
    """
    try:
        if file.suffix.lower() in NOT_READ:
            raise ValueError(f"{file.suffix} is not read: convert it to PNG, JPEG, WebP or BMP")
        if not file.is_file():  # opening a pipe would wait for ever
            raise ValueError("not a regular file")
        with Image.open(file, formats=("PNG", "JPEG", "WEBP", "BMP")) as image:
            # Four copies of an image with transparency, of 4 bytes per pixel, and two of others.
            most = limits.IMAGE // (16 if image.has_transparency_data else 8)
            if image.width * image.height > most:
                raise ValueError(f"{image.width} x {image.height} pixels, more than {most}")
            return _pixels(image, side, channels)
    except Exception as error:  # untrusted input may raise anything
        if is_transient(error):
            raise
        raise UnreadableError(f"{file}: not a readable image ({error})") from error


def _pixels(image, side, channels):
    if side is not None:
        image.draft(None, (2 * side, 2 * side))  # decodes a large JPEG at a reduced size
    ImageOps.exif_transpose(image, in_place=True)  # cameras store the orientation in metadata
    if image.mode.startswith("I"):  # 16-bit grey
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    grey = channels == 1 or (channels is None and image.mode in ("1", "L", "LA"))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("L" if grey else "RGB")
    if side is not None:
        least = min(image.size)
        left, top = (image.width - least) // 2, (image.height - least) // 2
        how = Image.Resampling.BOX if least > side else Image.Resampling.BICUBIC
        image = image.resize((side, side), how, (left, top, left + least, top + least))
    return np.atleast_3d(np.asarray(image))


FOLDERS: dict[str, Source] = {"folder": Source(folder, dtype=np.uint8)}
"""The data sets that are folders of images, by name."""
