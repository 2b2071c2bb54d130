"""Readers of files of arrays: each returns ((x, label), (x, label)), for training and held out.

Files are untrusted input: no code in them is run (no pickles), the sizes in their headers are
checked against the file's size before memory is allocated (`limits`), and every defect raises a
ValueError that names the file.
"""

import gzip
import math
from importlib import resources
from pathlib import Path

import numpy as np

from . import limits
from .examples import FLAG, Source

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""The folder in which the Debian package `dataset-fashion-mnist` installs Fashion-MNIST."""


def digits() -> tuple:
    """The UCI handwritten digits that come with diffjax: 1,797 images, 8x8x1, 17 grey levels.

    Every sixth image is held out (300); the rest (1,497) are for training. See `digits.LICENSE`.
    """
    with resources.files("diffjax.data").joinpath("digits.npz").open("rb") as file:
        arrays = np.load(file)
        x = np.round(arrays["x"] * (255 / 16)).astype(np.uint8)[..., None]
        label = arrays["label"]
    held_out = np.arange(len(x)) % 6 == 0
    return (x[~held_out], label[~held_out]), (x[held_out], label[held_out])


def fashion_mnist(path: Path | None) -> tuple:
    """Fashion-MNIST (Xiao et al. 2017), 60,000 + 10,000 images 28x28x1, from its four IDX files."""
    if path is None and not FASHION_MNIST.exists():
        raise FileNotFoundError(
            f"Fashion-MNIST is not at {FASHION_MNIST}: install the Debian package "
            f"dataset-fashion-mnist (apt-get install dataset-fashion-mnist), or give "
            f"data.path, the folder with its files {', '.join(_IDX_FILES)} ({FLAG})"
        )
    return _idx_folder(path or FASHION_MNIST)


def mnist(path: Path | None) -> tuple:
    """MNIST (LeCun et al. 1998), 60,000 + 10,000 images 28x28x1, from its four IDX files."""
    if path is None:
        raise FileNotFoundError(
            f"MNIST: give data.path, the folder with its files {', '.join(_IDX_FILES)} ({FLAG})"
        )
    return _idx_folder(path)


def cifar10(path: Path | None) -> tuple:
    """CIFAR-10 (Krizhevsky 2009), 50,000 + 10,000 images 32x32x3, from its binary files."""
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    if path is None or not all((path / name).is_file() for name in names):
        raise FileNotFoundError(
            f"CIFAR-10: give data.path ({FLAG}), the folder cifar-10-batches-bin with its files "
            f"{', '.join(names)}" + (f"; they are not all in {path}" if path else "")
        )
    parts = [_cifar(path / name) for name in names]
    x, label = (np.concatenate(arrays) for arrays in zip(*parts[:-1], strict=True))
    return (x, label), parts[-1]


def npz(path: Path | None, shape: tuple[int, ...] | None = None) -> tuple:
    """A NumPy archive with arrays x_train and x_test, and y_train and y_test if it has labels.

    Args:
      path: the archive.
      shape: of an example. Without it, arrays of three axes are read as grey images,
        `[n, height, width]`.
    """
    if path is None or not path.is_file():
        raise FileNotFoundError(f"npz: data.path={path} must be the archive's path ({FLAG})")
    try:
        arrays = limits.read_npz(path, ("x_train", "x_test"), ("y_train", "y_test"))
    except Exception as error:  # untrusted input may raise anything
        raise ValueError(f"{path}: not a readable npz archive ({error})") from error
    x = arrays["x_train"]
    as_it_is = x.shape[1:] == shape
    if x.ndim == 3 and x.dtype != np.uint8 and shape is None:
        height, width = x.shape[1:]
        print(
            f"{path}: read as grey images of {height} x {width} pixels; data.shape={height} "
            f"{width} leaves the examples as they are",
            flush=True,
        )
    given = lambda x: x if as_it_is else _channels(x)
    return tuple((given(arrays[f"x_{p}"]), arrays.get(f"y_{p}")) for p in ("train", "test"))


_IDX_FILES = [
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
]


def _idx_folder(path):
    arrays = []
    for name in _IDX_FILES:
        # Uncompressed files are accepted too.
        file = next((f for f in (path / name, (path / name).with_suffix("")) if f.is_file()), None)
        if file is None:
            raise FileNotFoundError(
                f"{path / name} is not there; the folder must hold {', '.join(_IDX_FILES)} "
                "(or the same without .gz)"
            )
        arrays.append(read_idx(file))
    x_train, y_train, x_test, y_test = arrays
    return (_channels(x_train), y_train), (_channels(x_test), y_test)


def read_idx(path: Path) -> np.ndarray:
    """A uint8 array from an IDX file, gzipped or not.

    The format: two zero bytes, the type (8: uint8), the number of axes, each axis' length as a
    big-endian 32-bit integer, and the data.

    Raises:
      ValueError: if the file is not IDX, not uint8, or its length does not match its header.
    """
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            magic = file.read(4)
            if magic[:3] != b"\0\0\x08" or len(magic) < 4:
                raise ValueError(f"not an IDX file of unsigned bytes (starts with {magic!r})")
            shape = np.frombuffer(file.read(4 * magic[3]), ">u4").tolist()
            size = math.prod(shape)
            limits.refuse_bomb("its header", size, path.stat().st_size)
            data = file.read(size + 1)
            if len(shape) != magic[3] or len(data) != size:
                raise ValueError(f"{len(data)} bytes or more, not the {shape} it declares")
    except Exception as error:  # untrusted input may raise anything
        raise ValueError(f"{path}: corrupt or truncated ({error})") from error
    return np.frombuffer(data, np.uint8).reshape(shape)


def _cifar(path):
    """Records of one label byte and 3 x 32 x 32 pixel bytes."""
    raw = np.fromfile(path, np.uint8)  # allocates the size of the file, 30 MB
    if raw.size == 0 or raw.size % 3073:
        raise ValueError(f"{path}: {raw.size} bytes, not a multiple of 3073: corrupt or truncated")
    records = raw.reshape(-1, 3073)
    if records[:, 0].max() > 9:
        raise ValueError(f"{path}: a label of {records[:, 0].max()}, must be 0..9: corrupt")
    return records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), records[:, 0]


def _channels(x):
    return x[..., None] if x.ndim == 3 else x


READERS: dict[str, Source] = {
    "digits": Source(digits, levels=17, dtype=np.uint8),
    "fashion_mnist": Source(fashion_mnist, dtype=np.uint8),
    "mnist": Source(mnist, dtype=np.uint8),
    "cifar10": Source(cifar10, dtype=np.uint8),
    "npz": Source(npz),
}
"""The data sets that are files of arrays, by name."""
