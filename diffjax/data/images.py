"""A folder of images as a data set on the disk: a batch reads the files that it needs.

`Images` acts as an array in batches: it has a shape and a dtype, and an array of indices gives an
array of pixels. Pixels are not cached, so memory grows only with the names of the files. Every file
is decoded once before a run starts, which finds and names the files that cannot be read; what was
found is kept beside the run, and holds as long as the files' names, sizes and times do.
"""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from . import limits
from .examples import FLAG, Source
from .transient import is_transient
from .workers import in_order

FORMATS = {
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "JPEG": (".jfif", ".jpe", ".jpeg", ".jpg"),
    "PNG": (".apng", ".png"),
    "PPM": (".pbm", ".pgm", ".pnm", ".ppm"),
    "TGA": (".tga",),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
}
"""Pillow's formats that are read, in every build of it, and the endings of their files."""
READ = tuple(sorted(ending for endings in FORMATS.values() for ending in endings))
NOT_READ = (".avif", ".heic", ".heif", ".jp2", ".jxl", ".psd", ".svg")
"""Endings of images that are not read, which count as unreadable."""
UNREADABLE = ("refuse", "skip")
SPLITS = ("train", "test", "val", "valid", "validation")
"""Names of top-level folders that are splits of the data; the first that is there beside `train` is
held out."""
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
      crop: a name in `CROPS`.
      shape: `(n, height, width, channels)`.
    """

    root: Path
    names: np.ndarray
    side: int | None
    crop: str
    shape: tuple[int, ...]
    dtype = np.dtype(np.uint8)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: Any) -> np.ndarray:
        files = [self.root / name for name in self.names[index]]
        return np.stack([read(file, self.side, self.shape[-1], self.crop) for file in files])

    def fingerprint(self) -> dict[str, str]:
        """Hashes of the files' names, sizes and times of change."""
        return fingerprint_of([self.root / name for name in self.names], list(self.names))

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        return self[:]  # reads all images into memory


class Scan(NamedTuple):
    """The files of a folder that can be read, and those that cannot, with the reason."""

    names: list[str]
    unreadable: dict[str, str]
    shapes: dict[tuple[int, ...], str]
    """The shapes that occur, each with the name of an image that has it."""
    left_out: list[str]
    """What else is in the folder: numbers of files by ending, and folders with the reason."""


def folder(
    path: Path | None,
    size: int | None = None,
    channels: int | None = None,
    unreadable: str = "refuse",
    workers: int = 0,
    crop: str = "square",
    scanned: Path | None = None,
) -> tuple:
    """A folder of images, read batch by batch; about a tenth is held out.

    The SHA-256 of an image's path in the folder decides whether it is held out (`held_out`), so
    this does not change when other images are added. If all images are in sub-folders, their labels
    are the top-level sub-folders, in alphabetical order. Folders named as in `SPLITS` are no
    labels: `train` is trained on, `test` or `val` is held out, and the labels are the folders in
    them.

    Folders that are linked are followed. Hidden files and folders, and `__MACOSX`, are passed over;
    what else is left out is printed.

    Args:
      path: the folder.
      size: crop each image to a centred square, and scale it to `size` x `size`; None requires that
        all images have one size.
      channels: 1 (grey) or 3 (RGB); None is grey if all images are grey.
      unreadable: what to do if a file cannot be read: "refuse" the folder, or "skip" the file.
      workers: number of processes that decode the files.
      crop: how an image is made a square of `size`, a name in `CROPS`.
      scanned: the file that keeps what decoding every image has found, so that it is done once.

    Raises:
      FileNotFoundError: if there is no such folder.
      ValueError: if an option or a file is invalid, or too few images are left; the message says
        which.
    """
    if path is None or not path.is_dir():
        raise FileNotFoundError(f"folder: data.path={path} must be a folder of images ({FLAG})")
    if size is not None and size < 1:
        raise ValueError(f"data.size={size}: must be at least 1")
    if channels not in (None, 1, 3):
        raise ValueError(f"data.channels={channels}: must be 1 (grey), 3 (RGB) or None")
    if unreadable not in UNREADABLE:
        raise ValueError(f"unknown data.unreadable {unreadable!r}: one of {', '.join(UNREADABLE)}")
    if crop not in CROPS:
        raise ValueError(f"unknown crop {crop!r}: one of {', '.join(CROPS)}")
    if size is None and crop != "square":
        raise ValueError(f"crop={crop}: needs a size")
    names, bad, shapes, left_out = scan(path, size, workers, crop, scanned)
    _refuse_or_tell(path, len(names), bad, unreadable)
    sides = {shape[:2]: name for shape, name in shapes.items()}
    if len(sides) > 1:
        some = ", ".join(f"{w} x {h} ({name})" for (h, w), name in list(sides.items())[:3])
        raise ValueError(f"{path}: images of {len(sides)} sizes, as {some}: give data.size")

    splits = _splits(path, [*names, *bad])
    is_held = held_out if len(splits) < 2 else lambda name: name.startswith(f"{splits[1]}/")
    parts = [[n for n in names if is_held(n) == held] for held in (False, True)]
    if not all(parts):
        raise ValueError(
            f"{path}: {len(names)} images ({', '.join(READ)}), {len(parts[0])} to train on and "
            f"{len(parts[1])} held out, about one in ten: need at least one of each"
        )
    depth = len(splits) > 0  # of the class in a path
    class_of = lambda name: name.split("/")[depth]
    loose = [name for name in (*names, *bad) if name.count("/") <= depth]
    classes = {c: i for i, c in enumerate(sorted({class_of(name) for name in (*names, *bad)}))}
    ((height, width),) = sides
    channels = channels or max(shape[2] for shape in shapes)
    what = f"labels {', '.join(list(classes)[:20])}{' ...' * (len(classes) > 20)}"
    if loose:
        what = f"no labels, as {loose[0]} is in no folder of a class"
    print(f"{path}: {len(names):,} images, {len(parts[1]):,} held out  {what}", flush=True)
    if left_out:
        print(f"{path}: left out: {', '.join(left_out)}", flush=True)

    def part(names):
        shape = (len(names), height, width, channels)
        images = Images(path, np.array(names, object), size, crop, shape)
        return images, None if loose else np.array([classes[class_of(n)] for n in names])

    return part(parts[0]), part(parts[1])


def _refuse_or_tell(path, readable, bad, unreadable):
    if not bad:
        return
    some = "; ".join(f"{name}: {why}" for name, why in list(bad.items())[:10])
    what = f"{path}: {len(bad)} of {len(bad) + readable} images cannot be read: {some}"
    what += f"; and {len(bad) - 10} more" if len(bad) > 10 else ""
    if unreadable == "refuse":
        raise UnreadableError(f"{what}. Repair them, or skip them with unreadable=skip")
    print(f"skipped: {what}", flush=True)


def held_out(name: str) -> bool:
    """Whether an image is held out, as one in ten is: a function of its path in the folder."""
    return int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8]) % 10 == 0


def scan(
    path: Path,
    size: int | None = None,
    workers: int = 0,
    crop: str = "square",
    scanned: Path | None = None,
) -> Scan:
    """Decode every image of a folder once, and print the progress.

    Args:
      path: the folder.
      size: as for `folder`.
      workers: number of processes that decode the files.
      crop: as for `folder`.
      scanned: the file that keeps the result. If it is that of files of these names, sizes and
        times, nothing is decoded.
    """
    found, left_out = _listed(path)
    of = {"size": size, "crop": crop} | fingerprint_of([path / name for name in found], found)
    known = _known(scanned, of, left_out)
    if known is not None:
        return known
    result, reported = Scan([], {}, {}, left_out), time.monotonic()
    look = functools.partial(_look, path, found, size, crop)
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
    _keep(scanned, of, result)
    return result


def _known(scanned, of, left_out):
    """What an earlier scan of the same files found; None if there is none, or it is damaged."""
    if scanned is None:
        return None
    try:
        kept: Any = json.loads(scanned.read_bytes())
        if kept["of"] != of:
            return None
        shapes = {tuple(map(int, shape)): str(name) for shape, name in kept["shapes"]}
        return Scan(list(map(str, kept["names"])), dict(kept["unreadable"]), shapes, left_out)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _keep(scanned, of, result):
    if scanned is None:
        return
    kept = {"of": of, "names": result.names, "unreadable": result.unreadable}
    kept["shapes"] = list(result.shapes.items())
    scanned.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=scanned.parent, delete=False) as file:
        json.dump(kept, file)
    Path(file.name).replace(scanned)


def fingerprint_of(files: Sequence[Path], names: list[str] | None = None) -> dict[str, str]:
    """Hashes of the names, sizes and times of change of files; None: of their own names."""
    found = [file.stat() for file in files]
    parts = {
        "names": names or [file.name for file in files],
        "sizes": [file.st_size for file in found],
        "times": [file.st_mtime_ns for file in found],
    }
    return {k: hashlib.sha256(repr(v).encode()).hexdigest() for k, v in parts.items()}


def _listed(path):
    """The images' names, sorted, and what else there is, as in `Scan`."""
    names, linked = _walk(path)
    left_out = [f"{name}, a link to a folder that is read already" for name in linked]
    endings = collections.Counter(os.path.splitext(name)[1].lower() for name in names)
    others = sorted(endings.keys() - {*READ, *NOT_READ}, key=lambda e: (-endings[e], e))
    left_out += [f"{endings[ending]:,} {ending or 'without an ending'}" for ending in others]
    names = sorted(name for name in names if name.lower().endswith(READ + NOT_READ))
    used = _splits(path, names)
    for split in used[2:]:
        left_out.append(f"{split}/, as {used[1]}/ is held out")
        names = [name for name in names if not name.startswith(f"{split}/")]
    return names, left_out


def _walk(path):
    """The files in a folder and in those below it, by name, and the links that were not followed.

    Links to folders are followed after all folders that are no links, and no folder is read twice.
    """
    names, linked, seen, later = [], [], set(), [path]
    name_of = lambda *parts: os.path.relpath(os.path.join(*parts), path).replace(os.sep, "/")
    while later:
        top = later.pop(0)
        if _identity(top) in seen:
            linked.append(name_of(top))
            continue
        for where, folders, files in os.walk(top, onerror=_refuse):
            seen.add(_identity(where))
            shown = sorted(name for name in folders if name[0] != "." and name != "__MACOSX")
            inside = [os.path.join(where, name) for name in shown]
            later += filter(os.path.islink, inside)
            folders[:] = [
                os.path.basename(place) for place in inside if _identity(place) not in seen
            ]
            names += [name_of(where, name) for name in files if name[0] != "."]
    return names, linked


def _refuse(error):
    raise error  # a folder that may not be listed


def _identity(folder):
    found = os.stat(folder)
    return found.st_dev, found.st_ino


def _splits(path: Path, names: list[str]) -> tuple[str, ...]:
    """The top-level folders that are splits: to train on, held out, then others; () if none are.

    Raises:
      ValueError: if these may be splits or classes.
    """
    tops = sorted({name.split("/")[0] + "/" * ("/" in name) for name in names})
    found = {top[:-1].lower(): top[:-1] for top in tops if top[:-1].lower() in SPLITS}
    others = [top for top in tops if top[:-1] not in found.values()]
    if not found or (others and (len(found) == 1 or "train" not in found)):
        return ()
    ordered = [found[name] for name in SPLITS if name in found]
    if others or "train" not in found:
        there = f"beside {', '.join(others[:3])}" if others else "without train/"
        raise ValueError(
            f"{path}: {', '.join(f'{name}/' for name in ordered)} {there}: is this a split or a "
            "class? Rename the folders, or move some elsewhere"
        )
    return tuple(ordered)


def _look(path, found, size, crop, start):
    """(name, shape or None, reason if None) of each file in a chunk."""
    seen = []
    for name in found[start : start + CHUNK]:
        try:
            seen.append((name, read(path / name, size, None, crop).shape, ""))
        except UnreadableError as error:
            seen.append((name, None, str(error.__cause__)))
    return seen


def read(
    file: Path, side: int | None = None, channels: int | None = None, crop: str = "square"
) -> np.ndarray:
    """The pixels of an image file, uint8 `[height, width, channels]`, on white where transparent.

    Of an animation, or of several pages, it is the first.

    Args:
      file: a file with a suffix in `READ`.
      side: crop the image to a centred square, and scale it to this many pixels per side.
      channels: 1 (grey) or 3 (RGB); None is grey if the image is grey.
      crop: how it is made a square, a name in `CROPS`.

    Raises:
      UnreadableError: if the file is not an image, or decoding it takes more bytes than
        `limits.IMAGE`.
      OSError: if the disk or the network fails, which says nothing about the file.
    """
    with _unreadable(file):
        if file.suffix.lower() in NOT_READ:
            raise ValueError(f"{file.suffix} is not read: convert it to PNG, JPEG or WebP")
        if not file.is_file():  # opening a pipe would wait for ever
            raise ValueError("not a regular file")
        return _decoded(file, side, channels, crop)


def decode(
    data: bytes,
    where: str,
    side: int | None = None,
    channels: int | None = None,
    crop: str = "square",
) -> np.ndarray:
    """The pixels of an image's bytes, as `read` gives those of a file.

    Raises:
      UnreadableError: as `read` does, with `where` in place of the file's path.
    """
    with _unreadable(where):
        return _decoded(io.BytesIO(data), side, channels, crop)


@contextlib.contextmanager
def _unreadable(where):
    try:
        yield
    except Exception as error:  # untrusted input may raise anything
        if is_transient(error):
            raise
        raise UnreadableError(f"{where}: not a readable image ({error})") from error


def _decoded(file: Path | BinaryIO, side, channels, crop):
    with Image.open(file, formats=tuple(FORMATS)) as image:
        # Four copies of an image with transparency, of 4 bytes per pixel, and two of others.
        most = limits.IMAGE // (16 if image.has_transparency_data else 8)
        if image.width * image.height > most:
            raise ValueError(f"{image.width} x {image.height} pixels, more than {most}")
        return _pixels(image, side, channels, crop)


def _pixels(image, side, channels, crop):
    if side is not None and crop == "square":
        image.draft(None, (2 * side, 2 * side))  # decodes a large JPEG at a reduced size
    ImageOps.exif_transpose(image, in_place=True)  # cameras store the orientation in metadata
    if image.mode == "F":
        raise ValueError("pixels of 32-bit floats, whose range is not known")
    if image.mode.startswith("I"):  # 16-bit grey
        pixels = np.asarray(image)
        if pixels.min() < 0 or pixels.max() >= 2**16:
            raise ValueError("pixels of 32-bit integers, whose range is not known")
        image = Image.fromarray((pixels >> 8).astype(np.uint8))
    grey = channels == 1 or (channels is None and image.mode in ("1", "L", "LA"))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("L" if grey else "RGB")
    if side is not None:
        image = CROPS[crop](image, side)
    return np.atleast_3d(np.asarray(image))


def _square(image: Image.Image, side: int) -> Image.Image:
    least = min(image.size)
    left, top = (image.width - least) // 2, (image.height - least) // 2
    how = Image.Resampling.BOX if least > side else Image.Resampling.BICUBIC
    return image.resize((side, side), how, (left, top, left + least, top + least))


def _adm(image: Image.Image, side: int) -> Image.Image:
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = side / min(image.size)
    size = round(image.width * scale), round(image.height * scale)
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


CROPS: dict[str, Callable[[Image.Image, int], Image.Image]] = {
    "square": _square,
    "area": _square,
    "adm": _adm,
}
"""The ways to make an image a square of a side, by name.

`square` averages the pixels of the centred square, bicubic where it enlarges; a large JPEG is
decoded at a reduced size, which is faster. `area` is the same from all pixels. `adm` halves the
image by averages while it is twice as large as needed, scales its short side by bicubic
interpolation, and takes the centre: the crop of ADM (Dhariwal and Nichol, 2021), which DiT, EDM2
and others use for ImageNet-256 and 512.
"""


FOLDERS: dict[str, Source] = {"folder": Source(folder, dtype=np.uint8)}
"""The data sets that are folders of images, by name."""
