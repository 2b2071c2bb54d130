"""A folder of images as a data set that stays on the disk: a batch reads the files it needs.

`Images` is an array as far as batches are concerned: it has a shape and a dtype, and an array of
indices gives an array of pixels. Nothing that is read is kept, so memory does not grow with the
folder but for its names. Every file is decoded once before training starts: what cannot be read is
known then, by name, and how many are left.
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

from .examples import Source
from .workers import in_order

READ = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
NOT_READ = (".avif", ".gif", ".heic", ".heif", ".jp2", ".jxl", ".psd", ".svg", ".tif", ".tiff")
LARGEST = 2**26  # pixels of an image
UNREADABLE = ("refuse", "skip")
CHUNK = 64  # files that are looked at together


class UnreadableError(ValueError):
    """A file that is no image, or no longer one; names it."""


@dataclasses.dataclass(frozen=True)
class Images:
    """Image files as an array of bytes `[n, height, width, channels]`, read when it is indexed.

    Attributes:
      root: the folder.
      names: the files' paths in it, an array of str `[n]`.
      side: what they are scaled to; None if they are left as they are.
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
        return self[:]  # all of them, in memory


class Scan(NamedTuple):
    """What a folder holds: the files that can be read, and those that cannot, with the reason."""

    names: list[str]
    unreadable: dict[str, str]
    shapes: dict[tuple[int, ...], str]
    """Each shape there is, with an image that has it."""


def folder(
    path: Path | None,
    size: int | None = None,
    channels: int | None = None,
    unreadable: str = "refuse",
    workers: int = 0,
) -> tuple:
    """A folder of images, read batch by batch; about a tenth is held out.

    An image is held out if the SHA-256 of its path in the folder says so (`held_out`): always the
    same, whatever is added, and however the folder is listed. If all lie in sub-folders, these, in
    alphabetical order, are the labels, however deep the files lie in them.

    Args:
      path: the folder.
      size: crop each to a square about its centre and scale that to `size` x `size`; None: they
        must all be of one size.
      channels: 1, grey, or 3, RGB; None: grey if all of them are.
      unreadable: what to do if a file cannot be read: "refuse" the folder, or "skip" the file.
      workers: processes to look at the files with.

    Raises:
      FileNotFoundError: if there is no such folder.
      ValueError: if an option or a file is bad, or too few images are left; names it.
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
            f"{len(parts[1])} held out, about every tenth: need at least one of each"
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
        raise UnreadableError(f"{what}. Repair them, or skip them by data.unreadable=skip")
    print(f"skipped: {what}", flush=True)


def held_out(name: str) -> bool:
    """Whether an image is held out, one in ten: by its path in the folder and nothing else."""
    return int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8]) % 10 == 0


def scan(path: Path, size: int | None = None, workers: int = 0) -> Scan:
    """Decode every image of a folder once, saying how far it is, and keep none.

    Args:
      path: the folder.
      size: as for `folder`.
      workers: processes to do it with.
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
            print(f"{path}: looked at {done:,} of {len(found):,} images{bad}", flush=True)
    return result


def _look(path, found, size, start):
    """(name, shape or None, why it is None) of a chunk of the files found."""
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
      file: a file of one of the kinds `READ`.
      side: crop it to a square about its centre and scale that to so many pixels a side.
      channels: 1, grey, or 3, RGB; None: what it has.

    Raises:
      UnreadableError: if it is not an image, or one of absurd size.
    """
    try:
        if file.suffix.lower() in NOT_READ:
            raise ValueError(f"{file.suffix} is not read: convert it to PNG, JPEG, WebP or BMP")
        with Image.open(file, formats=("PNG", "JPEG", "WEBP", "BMP")) as image:
            if image.width * image.height > LARGEST:
                raise ValueError(f"{image.width} x {image.height} pixels, more than {LARGEST}")
            return _pixels(image, side, channels)
    except Exception as error:  # untrusted input may raise anything
        raise UnreadableError(f"{file}: not a readable image ({error})") from error


def _pixels(image, side, channels):
    if side is not None:
        image.draft(None, (2 * side, 2 * side))  # of a JPEG of 12 million pixels decode a few
    ImageOps.exif_transpose(image, in_place=True)  # cameras do not turn an image, but say how
    if image.mode.startswith("I"):  # 16 bits of grey
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


FOLDERS = {"folder": Source(folder)}
