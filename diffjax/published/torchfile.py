"""A reader of PyTorch's files that needs no PyTorch and runs no code from the files.

A pickle is a program: it names functions and calls them. This reader replaces every name by a
`Record`, which stores the arguments of the call, except for the few in `KNOWN`, which rebuild
tensors. Three formats are read: the zip files of `torch.save`, its older streams (before PyTorch
1.6), and plain pickles that contain such streams, as EDM's do.
"""

import io
import math
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np

MAGIC = 0x1950A86A20F9469CFC6C
"""The number at the start of an older stream."""
DTYPES = {
    "DoubleStorage": "<f8",
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    "BFloat16Storage": jnp.bfloat16,
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "?",
}
"""NumPy dtypes of PyTorch's storages."""


class Record:
    """A placeholder for an object that is not created.

    Attributes:
      path: the name of the class or function, such as `torch.nn.modules.conv.Conv2d`.
      args: the arguments of the call.
      state: the state that the pickle then sets, or None.
    """

    path = ""
    args: tuple
    state: Any

    def __new__(cls, *args: Any) -> Any:
        if cls.path in KNOWN:
            return KNOWN[cls.path](*args)
        self = super().__new__(cls)
        self.args, self.state = args, None
        return self

    def __setstate__(self, state: Any) -> None:
        self.state = state


class Dict(dict):
    """A dictionary that can have attributes, as PyTorch's state dicts have."""


def read(path: Path | str) -> Any:
    """Read a file as dicts, lists, numbers, NumPy arrays, and a `Record` for any other object.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is damaged or not in one of the formats; the message names it.
    """
    path = Path(path)
    with path.open("rb") as file:
        try:
            is_zip = zipfile.is_zipfile(file)
            file.seek(0)
            return _zip(file) if is_zip else _stream(file)
        except Exception as error:  # untrusted input may raise anything
            raise ValueError(f"{path}: not a readable file of PyTorch ({error!r})") from error


class _Unpickler(pickle.Unpickler):
    def __init__(self, file, storage: Callable[[Any, str, int], np.ndarray] | None = None) -> None:
        super().__init__(file)
        self.storage = storage

    def find_class(self, module, name):
        return type(name, (Record,), {"path": f"{module}.{name}"})

    def persistent_load(self, pid):
        what, kind, key, _, size, *_ = pid
        if what != "storage" or self.storage is None:
            raise pickle.UnpicklingError(f"{what!r} is not a storage of this file")
        return self.storage(np.dtype(DTYPES[kind.__name__]), key, size)


def _zip(file: BinaryIO) -> Any:
    with zipfile.ZipFile(file) as archive:
        members = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        if any(info.compress_type != zipfile.ZIP_STORED for info in members.values()):
            raise ValueError("it is compressed, which files of torch.save never are")
        if "byteorder" in members and archive.read(members["byteorder"]) != b"little":
            raise ValueError("it is big endian")
        storages: dict[str, np.ndarray] = {}

        def storage(dtype, key, size):
            if key not in storages:
                storages[key] = np.frombuffer(archive.read(members[f"data/{key}"]), dtype)
            if len(storages[key]) != size or storages[key].dtype != dtype:
                raise ValueError(f"storage {key} is not {size} x {dtype}")
            return storages[key]

        return _Unpickler(io.BytesIO(archive.read(members["data.pkl"])), storage).load()


def _stream(file: BinaryIO) -> Any:
    first = _Unpickler(file).load()
    if not isinstance(first, int) or first != MAGIC:
        return first  # a plain pickle
    version, system = _Unpickler(file).load(), _Unpickler(file).load()
    if version != 1001 or not system["little_endian"]:
        raise ValueError(f"version {version} of {system}")
    storages: dict[str, np.ndarray] = {}
    here = file.tell()
    left = file.seek(0, io.SEEK_END) - here
    file.seek(here)

    def storage(dtype, key, size):
        nonlocal left
        if key not in storages:
            left -= size * dtype.itemsize
            if size < 0 or left < 0:
                raise ValueError(f"storage {key} claims to be {size} x {dtype}")
            storages[key] = np.empty(size, dtype)  # its numbers come after the pickle
        return storages[key]

    found = _Unpickler(file, storage).load()
    for key in _Unpickler(file).load():
        array = storages[key]
        if int.from_bytes(file.read(8), "little") != len(array):
            raise ValueError(f"storage {key} is not of {len(array)} numbers")
        array[:] = np.frombuffer(file.read(array.nbytes), array.dtype)
    return found


def _tensor(storage, offset, size, strides, *_):
    """A view of a storage, which must contain all of the view."""
    if not isinstance(storage, np.ndarray):
        raise ValueError(f"a tensor of {type(storage).__name__}")
    if min((offset, *size, *strides), default=0) < 0 or len(size) != len(strides):
        raise ValueError(f"a tensor {size} with strides {strides} from {offset}")
    count = math.prod(size)
    last = offset + sum((n - 1) * s for n, s in zip(size, strides, strict=True))
    if count and (last >= len(storage) or count > len(storage)):
        raise ValueError(f"a tensor {size} of a storage of {len(storage)} numbers")
    if not count:
        return np.empty(size, storage.dtype)
    steps = [s * storage.dtype.itemsize for s in strides]
    return np.lib.stride_tricks.as_strided(storage[offset:], size, steps)


KNOWN: dict[str, Callable] = {
    "collections.OrderedDict": Dict,
    "dnnlib.util.EasyDict": Dict,
    "torch.Size": tuple,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch.storage._load_from_bytes": lambda data: _stream(io.BytesIO(data)),
}
"""All the functions that a file can call."""
