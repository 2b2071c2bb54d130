"""Large data sets as sealed shards of ArrayRecord files, read at random without unpacking them.

A folder of records has

    manifest.json                           shape, encoding, and the size and hash of each file
    train-00000-of-00008.array_record ...   one record for each example
    train-labels.npy                        integers, if the examples have labels
    test-00000-of-00001.array_record ...    the held-out examples

`python -m diffjax.data.convert` writes one from any data set that diffjax reads. An example is a
raw array, or an image as PNG or JPEG. Nothing in such a folder is code.
"""

import dataclasses
import functools
import hashlib
import importlib.util
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ..extras import install
from . import limits
from .examples import Source
from .images import UnreadableError
from .transient import is_transient

MANIFEST = "manifest.json"
VERSION = 1
PARTS = ("train", "test")
CHUNK = 1024
"""Records that are read at once to verify a shard."""
DTYPES = ("uint8", "float32", "float16")


class Encoding(NamedTuple):
    """How an example is stored.

    Attributes:
      pack: an array -> bytes.
      unpack: (bytes, shape, dtype) -> the array; the bytes are untrusted.
    """

    pack: Callable[[np.ndarray], bytes]
    unpack: Callable[[bytes, tuple[int, ...], np.dtype], np.ndarray]


def _raw(data, shape, dtype):
    return np.frombuffer(data, dtype).reshape(shape)


def _pack_image(x, **options):
    file = io.BytesIO()
    Image.fromarray(x[..., 0] if x.shape[-1] == 1 else x).save(file, **options)
    return file.getvalue()


def _unpack_image(data, shape, dtype):
    with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
        if (image.height, image.width) != shape[:2]:  # before it is decoded
            raise ValueError(f"an image of {image.width} x {image.height} pixels, not {shape}")
        return np.asarray(image, dtype).reshape(shape)


ENCODINGS = {
    "raw": Encoding(lambda x: np.ascontiguousarray(x).tobytes(), _raw),
    "png": Encoding(functools.partial(_pack_image, format="PNG"), _unpack_image),
    "jpeg": Encoding(
        functools.partial(_pack_image, format="JPEG", quality=95, subsampling=0), _unpack_image
    ),
}
"""The ways to store an example. All but jpeg give it back to the last bit; images are uint8."""


@dataclasses.dataclass(frozen=True)
class Records:
    """Examples in ArrayRecord files, as an array that is read when it is indexed.

    Attributes:
      files: the shards, in order.
      shape: `(n, ...)`.
      dtype: uint8, float32 in [-1, 1], or float16, the moments of latents.
      encoding: a name in `ENCODINGS`.
      sha256: the hash of the shards' hashes, their fingerprint.
    """

    files: tuple[Path, ...]
    shape: tuple[int, ...]
    dtype: np.dtype
    encoding: str
    sha256: str

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> np.ndarray:
        """The examples at an index as of NumPy.

        Raises:
          UnreadableError: if a record is damaged; names the folder.
        """
        chosen = np.arange(len(self))[index]
        unpack = ENCODINGS[self.encoding].unpack
        try:
            found = _open(self.files).__getitems__(chosen.reshape(-1).tolist())
            each = [unpack(data, self.shape[1:], self.dtype) for data in found]
        except Exception as error:  # untrusted input may raise anything
            if is_transient(error):
                raise
            raise UnreadableError(f"{self.files[0].parent}: a damaged record ({error})") from error
        return np.reshape(each, (*chosen.shape, *self.shape[1:])).astype(self.dtype, copy=False)

    def fingerprint(self) -> dict[str, str]:
        """The hash of what the shards hold, wherever they are."""
        return {"records": self.sha256}

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        return self[:]  # reads all examples into memory


@functools.lru_cache(maxsize=4)
def _open(files):
    """The reader of these files, opened once in each process."""
    from array_record.python import array_record_data_source

    return array_record_data_source.ArrayRecordDataSource([str(file) for file in files])


def records(path: Path | None, size: int | None = None) -> tuple:
    """A folder of records that `python -m diffjax.data.convert` wrote.

    Args:
      path: the folder.
      size: None, or the side of the images that it holds.

    Raises:
      FileNotFoundError: if there is no manifest, or a file that it names is missing.
      ValueError: if ArrayRecord is not installed, the manifest is not one, or a file has another
        size than the manifest says; names the file.
    """
    if path is None or not (path / MANIFEST).is_file():
        raise FileNotFoundError(
            f"records: --config.data.path={path} must be a folder with a {MANIFEST}, as "
            "`python -m diffjax.data.convert` writes it"
        )
    check_installed()
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        parts = [_part(path, manifest, name) for name in PARTS]
    except (OSError, ValueError) as error:
        if is_transient(error):
            raise
        raise type(error)(
            f"{path / MANIFEST}: not the manifest of these records: {error}"
        ) from error
    except Exception as error:  # untrusted input may raise anything
        raise ValueError(f"{path / MANIFEST}: not a manifest of records ({error!r})") from error
    shape = parts[0][0].shape[1:]
    if size is not None and shape[:2] != (size, size):
        raise ValueError(f"data.size={size}: {path} holds records of shape {shape}")
    return tuple(parts)


def _part(path, manifest, name):
    """The records and labels of one part, after everything that the manifest says is checked."""
    if manifest["version"] != VERSION:
        raise ValueError(f"version {manifest['version']!r}, need {VERSION}")
    shape, encoding = tuple(map(int, manifest["shape"])), manifest["encoding"]
    dtype, seals = np.dtype(manifest["dtype"]), manifest["parts"][name]
    if encoding not in ENCODINGS or dtype not in DTYPES:
        raise ValueError(f"encoding {encoding!r} of {dtype}: need one of {', '.join(ENCODINGS)}")
    if not shape or min(shape) < 1 or math.prod(shape) * dtype.itemsize > limits.IMAGE:
        raise ValueError(f"an example of shape {shape}")
    shards = [Seal(*seal) for seal in seals["shards"]]
    labels = seals["labels"] and Seal(*seals["labels"])
    for seal in (*shards, *filter(None, [labels])):
        file = path / seal.file
        if file.parent != path or not file.is_file() or file.stat().st_size != seal.size:
            raise FileNotFoundError(f"{file} is missing, or not of {seal.size:,} bytes")
    sha256 = hashlib.sha256("".join(seal.sha256 for seal in shards).encode()).hexdigest()
    n = sum(seal.n for seal in shards)
    files = tuple(path / seal.file for seal in shards)
    found = Records(files, (n, *shape), dtype, encoding, sha256)
    if len(_open(files)) != n:
        raise ValueError(f"{len(_open(files))} records in {name}, not {n}")
    label = None
    if labels:
        label = np.load(path / labels.file, allow_pickle=False)
        if hashlib.sha256(label.tobytes()).hexdigest() != labels.sha256:
            raise ValueError(f"{path / labels.file} has other content")
    return found, label


def seals_of(manifest: bytes) -> list["Seal"]:
    """What a manifest says of each file beside it.

    Raises:
      ValueError: if it is no manifest, or names a file that is elsewhere.
    """
    try:
        parts = [json.loads(manifest)["parts"][name] for name in PARTS]
        found = [
            Seal(*seal) for part in parts for seal in (*part["shards"], part["labels"]) if seal
        ]
        if any(Path(seal.file).name != seal.file for seal in found):
            raise ValueError("it names a file that is elsewhere")
        return found
    except Exception as error:  # untrusted input may raise anything
        raise ValueError(f"not a manifest of records ({error!r:.200})") from error


def damage_of(path: Path, seal: "Seal") -> str | None:
    """What tells a file from the one that was sealed, or None; all of it is read."""
    found = hashlib.sha256()
    try:
        if path.stat().st_size != seal.size:
            return f"it has {path.stat().st_size:,} bytes, not {seal.size:,}"
        if seal.file.endswith(".npy"):
            found.update(np.load(path, allow_pickle=False).tobytes())
        else:
            for start in range(0, seal.n, CHUNK):
                for data in _open((path,)).__getitems__(range(start, min(seal.n, start + CHUNK))):
                    found.update(data)
    except Exception as error:  # untrusted input may raise anything
        if is_transient(error):
            raise
        return f"it cannot be read ({error!r:.200})"
    return None if found.hexdigest() == seal.sha256 else "its content has changed"


class Seal(NamedTuple):
    """What the manifest says of a file: its name, examples, size in bytes and hash."""

    file: str
    n: int
    size: int
    sha256: str


def check_installed() -> None:
    """Raise a ValueError unless ArrayRecord can be imported."""
    if importlib.util.find_spec("array_record") is None:
        raise ValueError(f"records need ArrayRecord: {install('data')}")


RECORDS: dict[str, Source] = {"records": Source(records)}
"""The data sets that are folders of records, by name."""
