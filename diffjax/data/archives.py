"""Images in archives, to be converted to records: parquet, tar, and TFDS.

An archive acts as an array of images in memory does, and decodes those that it is asked for. It is
fast in order and slow at random, which is why nothing is trained from it.
"""

import dataclasses
import functools
import importlib
import json
import os
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple, Protocol, cast

import numpy as np

from ..extras import install
from . import images
from .examples import Source
from .images import SPLITS, UnreadableError

LABELS = (".cls", ".json")
"""Endings of the files of a WebDataset that hold the label of the image of the same name."""


class Blobs(Protocol):
    """The bytes of image files, by position. It can be pickled, and opens its files when asked."""

    @property
    def files(self) -> tuple[Path, ...]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, i: int, /) -> bytes: ...
    def where(self, i: int, /) -> str: ...


@dataclasses.dataclass(frozen=True)
class Archived:
    """Images in an archive as an array of bytes `[n, size, size, channels]`.

    Attributes:
      blobs: their files' bytes.
      chosen: the positions of these images among them, `[n]`.
      size: side of the squares to which they are scaled.
      channels: 1 (grey) or 3 (RGB).
      crop: a name in `images.CROPS`.
    """

    blobs: Blobs
    chosen: np.ndarray
    size: int
    channels: int
    crop: str
    dtype = np.dtype(np.uint8)

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.chosen), self.size, self.size, self.channels)

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: Any) -> np.ndarray:
        """The images at an index.

        Raises:
          UnreadableError: if one cannot be read; names it.
        """
        return np.stack([self._decoded(i) for i in self.chosen[index].tolist()])

    def _decoded(self, i):
        try:
            data = self.blobs[i]
        except (OSError, ValueError) as error:
            raise UnreadableError(f"{self.blobs.where(i)}: {error}") from error
        return images.decode(data, self.blobs.where(i), self.size, self.channels, self.crop)

    def fingerprint(self) -> dict[str, Any]:
        """Hashes of the names, sizes and times of change of the archive's files."""
        return images.fingerprint_of(self.blobs.files)


class Split(NamedTuple):
    """What an archive holds: bytes, labels or None, and which images are held out."""

    blobs: Blobs
    label: np.ndarray | None
    held_out: np.ndarray


def archive(
    opened: Callable[[Path], Split],
    path: Path | None,
    size: int | None = None,
    channels: int | None = None,
    crop: str = "square",
) -> tuple:
    """The images of an archive, to train on and held out.

    Args:
      opened: what reads the archive.
      path: the archive's file, or a folder of them.
      size: side of the squares to which images are scaled.
      channels: 1 (grey) or 3 (RGB); None is 3.
      crop: how an image is made a square, a name in `images.CROPS`.

    Raises:
      FileNotFoundError: if there is nothing at the path.
      ValueError: if the size is missing, a package is, or the archive holds no images.
    """
    if path is None or not path.exists():
        raise FileNotFoundError(f"--path={path}: there is no such archive")
    if size is None or size < 1:
        raise ValueError(f"--size={size}: images of an archive need a side of at least 1")
    if channels not in (None, 1, 3):
        raise ValueError(f"--channels={channels}: must be 1 (grey) or 3 (RGB)")
    if crop not in images.CROPS:
        raise ValueError(f"unknown crop {crop!r}: one of {', '.join(images.CROPS)}")
    blobs, label, held_out = opened(path)
    if not 0 < held_out.sum() < len(held_out):
        raise ValueError(
            f"{path}: {len(held_out)} images, {held_out.sum()} of them held out: need at least one "
            "to train on and one held out"
        )
    parts = []
    for chosen in (np.flatnonzero(~held_out), np.flatnonzero(held_out)):
        x = Archived(blobs, chosen, size, channels or 3, crop)
        parts.append((x, None if label is None else label[chosen]))
    return tuple(parts)


def _files(path: Path, endings: tuple[str, ...]) -> list[Path]:
    """The files of an archive, in the order of their names."""
    if path.is_file():
        return [path]
    found = sorted(p for p in path.rglob("*") if p.suffix.lower() in endings and p.is_file())
    if not found:
        raise ValueError(f"{path}: holds no file {' or '.join(endings)}")
    return found


def _held_out(files: Sequence[Path], names: Sequence[tuple[int, str]]) -> np.ndarray:
    """Which images are held out: those of other splits than `train`, or else one in ten.

    Args:
      files: the archive's.
      names: of each image, the position of its file, and its name in it.
    """
    splits = [next((s for s in SPLITS if f.stem.lower().startswith(s)), None) for f in files]
    if "train" in splits and any(split not in ("train", None) for split in splits):
        return np.array([splits[file] != "train" for file, _ in names], bool)
    return np.array([images.held_out(name) for _, name in names], bool)


@dataclasses.dataclass(frozen=True)
class Parquet:
    """The images of parquet files as Hugging Face's `datasets` writes them.

    Attributes:
      files: the files.
      column: of the images: bytes, or a struct with `bytes`.
      starts: the first position of each row group, and the number of all rows, `[groups + 1]`.
      groups: the file and the number in it of each row group.
    """

    files: tuple[Path, ...]
    column: str
    starts: np.ndarray
    groups: tuple[tuple[int, int], ...]

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, i: int) -> bytes:
        group, row = self._place(i)
        value = _row_group(self.files[self.groups[group][0]], self.groups[group][1], self.column)[
            row
        ].as_py()
        data = value["bytes"] if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            raise ValueError(f"column {self.column} holds {type(data).__name__}, not bytes")
        return data

    def where(self, i: int) -> str:
        group, row = self._place(i)
        file, number = self.groups[group]
        return f"{self.files[file]}, row group {number}, row {row}"

    def _place(self, i):
        group = int(np.searchsorted(self.starts, i, "right")) - 1
        return group, i - int(self.starts[group])


@functools.lru_cache(maxsize=2)  # an archive is read in order
def _row_group(file, number, column):
    from pyarrow import parquet

    return parquet.ParquetFile(file).read_row_group(number, [column])[column].combine_chunks()


def parquet(path: Path) -> Split:
    """Parquet files with a column `image` (or `img`, `jpg`, `png`), and perhaps `label`."""
    try:
        from pyarrow import parquet as reader
    except ImportError as error:
        raise ValueError(f"parquet needs PyArrow: {install('convert')}") from error
    files = _files(path, (".parquet",))
    starts, groups, labels, names = [0], [], [], []
    known: tuple[str, str | None] | None = None
    for k, file in enumerate(files):
        opened = reader.ParquetFile(file)
        columns = opened.schema_arrow.names
        image = next((c for c in ("image", "img", "jpg", "png") if c in columns), None)
        label = next((c for c in ("label", "labels", "cls", "fine_label") if c in columns), None)
        if image is None or (known or (image, label)) != (image, label):
            raise ValueError(f"{file}: columns {columns}: need image, and label in all or none")
        known = image, label
        for number in range(opened.num_row_groups):
            n = opened.metadata.row_group(number).num_rows
            groups.append((k, number))
            starts.append(starts[-1] + n)
            names += [(k, f"{file.name}/{number}/{i}") for i in range(n)]
        if label is not None:
            labels += opened.read([label])[label].to_pylist()
    assert known is not None
    blobs = Parquet(tuple(files), known[0], np.array(starts), tuple(groups))
    return Split(blobs, _labels(path, labels), _held_out(files, names))


@dataclasses.dataclass(frozen=True)
class Tar:
    """The images of tar files, by their places in them.

    Attributes:
      files: the files.
      members: of each image: the number of its file, its first byte in it, and its size, `[n, 3]`.
      names: their names, `[n]`.
    """

    files: tuple[Path, ...]
    members: np.ndarray
    names: np.ndarray

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, i: int) -> bytes:
        file, start, size = self.members[i].tolist()
        with self.files[file].open("rb") as opened:
            data = os.pread(opened.fileno(), size, start)
        if len(data) != size:
            raise ValueError("the archive is cut")
        return data

    def where(self, i: int) -> str:
        return f"{self.files[self.members[i, 0]]}, {self.names[i]}"


def tar(path: Path) -> Split:
    """Tar files: WebDatasets (`key.jpg` beside `key.cls` or `key.json`), or folders of classes."""
    files = _files(path, (".tar",))
    members, names, labels = [], [], {}
    for k, file in enumerate(files):
        try:
            with tarfile.open(file, "r:") as opened:
                for member in filter(tarfile.TarInfo.isreg, opened):
                    if member.name.lower().endswith(images.READ):
                        members.append((k, member.offset_data, member.size))
                        names.append((k, member.name))
                    elif member.name.endswith(LABELS) and member.size < 2**20:
                        content = cast(IO[bytes], opened.extractfile(member)).read()
                        labels[k, _stem(member.name)] = _label(file, member.name, content)
        except tarfile.TarError as error:
            raise ValueError(f"{file}: not a tar file without compression: {error}") from error
    if not members:
        raise ValueError(f"{path}: holds no image ({', '.join(images.READ)})")
    label = [labels.get((k, _stem(name))) for k, name in names] if labels else _folders(names)
    blobs = Tar(tuple(files), np.array(members), np.array([name for _, name in names], object))
    return Split(blobs, _labels(path, label), _held_out(files, names))


def _stem(name):
    """What the files of one example of a WebDataset have in common: the name to its first dot."""
    folder, _, base = name.rpartition("/")
    return folder, base.partition(".")[0]


def _folders(names):
    """The number of each image's top folder, in alphabetical order; None where one is in none."""
    tops = [str(PurePosixPath(name)).split("/")[:-1] for _, name in names]
    classes = {top: i for i, top in enumerate(sorted({top[0] for top in tops if top}))}
    return [classes[top[0]] if top else None for top in tops]


def _label(file, name, content):
    try:
        found = json.loads(content)  # a number, in a file .cls too
        if isinstance(found, dict):
            found = next((found[key] for key in ("label", "cls", "class") if key in found), None)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}, {name}: not a label: {error}") from error
    return found


def _labels(path, label):
    """An array of labels; None if there are none."""
    if all(each is None for each in label):
        return None
    if not all(type(each) is int and each >= 0 for each in label):
        raise ValueError(f"{path}: labels must be integers >= 0, one for each image")
    return np.array(label)


@dataclasses.dataclass(frozen=True)
class Tfds:
    """The images of a data set that TensorFlow Datasets prepared as ArrayRecord files.

    Attributes:
      path: its folder, with `dataset_info.json`.
      splits: names and sizes of its splits, in order.
    """

    path: Path
    splits: tuple[tuple[str, int], ...]

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(sorted(p for p in self.path.rglob("*") if p.is_file()))

    def __len__(self) -> int:
        return sum(n for _, n in self.splits)

    def __getitem__(self, i: int) -> bytes:
        split, row = self._place(i)
        return _tfds_source(self.path, split)[row]["image"]

    def where(self, i: int) -> str:
        return "{}, {} {}".format(self.path, *self._place(i))

    def _place(self, i):
        for name, n in self.splits:
            if i < n:
                return name, i
            i -= n
        raise IndexError(i)


@functools.lru_cache(maxsize=8)
def _tfds_source(path, split):
    tfds = importlib.import_module("tensorflow_datasets")
    builder = tfds.builder_from_directory(path)
    return builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})


def tfds(path: Path) -> Split:
    """A data set of TensorFlow Datasets, prepared with `file_format=array_record`."""
    try:
        reader = importlib.import_module("tensorflow_datasets")
    except ImportError as error:
        raise ValueError(f"tfds needs TensorFlow Datasets: {install('convert')}") from error
    builder = reader.builder_from_directory(path)
    if "image" not in (builder.info.features or {}):
        raise ValueError(f"{path}: features {list(builder.info.features or {})}: need image")
    splits = tuple((name, split.num_examples) for name, split in builder.info.splits.items())
    blobs, labels, names = Tfds(path, splits), [], []
    for k, (split, n) in enumerate(splits):
        names += [(k, f"{split}/{i}") for i in range(n)]
        if "label" in builder.info.features:
            source = _tfds_source(path, split)
            labels += [int(source[i]["label"]) for i in range(n)]
    files = [Path(name) for name, _ in splits]
    return Split(blobs, _labels(path, labels), _held_out(files, names))


ARCHIVES: dict[str, Source] = {
    opened.__name__: Source(functools.partial(archive, opened), dtype=np.uint8)
    for opened in (parquet, tar, tfds)
}
"""What `diffjax.data.convert` reads beside the data sets that are trained from, by name."""
