"""A reader of PyTorch's files that needs no PyTorch and runs no code from the files.

A pickle is a program: it names functions and calls them. This reader replaces every name by a
`Record`, which stores the arguments of the call, except for the few in `KNOWN`, which rebuild
tensors. Four formats are read: the zip files of `torch.save`, and those of TorchScript, whose code
is left alone; the older streams of `torch.save` (before PyTorch 1.6); and plain pickles that
contain such streams, as EDM's do. `arrays` then finds the arrays of a module by their names, and
`numpy_array` makes those that NumPy itself pickled.

A short pickle can also describe objects that take much memory or time. Each operation of a file,
and each copy that it causes, is therefore charged to a `Budget`, which grows with the file's size.
"""

import io
import math
import pickle
import reprlib
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
OBJECT = 200
"""What an operation or an object is charged, in bytes."""


class Budget:
    """The memory that reading a file may take, in bytes, as an estimate.

    Args:
      size: the size of the file.
    """

    def __init__(self, size: int) -> None:
        self.left = 2**27 + 4 * size

    def spend(self, count: int) -> None:
        """Charge a number of bytes.

        Raises:
          ValueError: if more are charged than there are.
        """
        self.left -= count
        if self.left < 0:
            raise ValueError("it describes far more objects than a file of its size should")


class Record:
    """A placeholder for an object that is not created.

    Attributes:
      path: the name of the class or function, such as `torch.nn.modules.conv.Conv2d`.
      args: the arguments of the call.
      state: the state that the pickle then sets, or None.
    """

    path = ""
    budget: Budget
    args: tuple
    state: Any

    def __new__(cls, *args: Any) -> Any:
        cls.budget.spend(OBJECT + 8 * len(args))
        if cls.path in KNOWN:
            return KNOWN[cls.path](cls.budget, *args)
        self = super().__new__(cls)
        self.args, self.state = args, None
        return self

    def __setstate__(self, state: Any) -> None:
        self.state = state


PLAIN = (str, bytes, int, float, type(None), type, Record)
"""The types of the keys of dicts, or of the parts of such a key."""


class Dict(dict):
    """A dictionary that can have a state, as PyTorch's state dicts have."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state  # the default would copy it


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
            budget = Budget(file.seek(0, io.SEEK_END))
            file.seek(0)
            return _zip(file, budget) if is_zip else _stream(file, budget)
        except Exception as error:  # untrusted input may raise anything
            why = f"{error!r}"[:200]
            raise ValueError(f"{path}: not a readable file of PyTorch ({why})") from error


def arrays(found: Any) -> dict[str, np.ndarray]:
    """The arrays of what was read, by the names that a state dict gives them.

    Args:
      found: a state dict, or a module: of TorchScript, of PyTorch's own pickles, or of NVIDIA's,
        which contain the source of their classes.

    An object that is found a second time is left out: a file in which each of many modules contains
    the next one twice would never end.
    """
    arrays, seen, left = {}, set(), [("", found)]
    while left:
        name, thing = left.pop()
        if isinstance(thing, np.ndarray):
            arrays[name.removesuffix(".")] = thing
        elif isinstance(thing, dict | Record) and id(thing) not in seen:
            seen.add(id(thing))
            inside = [
                # These are dicts of a module, which are no part of a name.
                (name if key in ("_parameters", "_buffers", "_modules") else f"{name}{key}.", part)
                for key, part in attributes(thing).items()
                if isinstance(key, str)
            ]
            left += reversed(inside)
    return arrays


def attributes(thing: dict | Record) -> dict:
    """The entries of a dict, or the attributes of an object, if the file has them."""
    if isinstance(thing, dict):
        return thing
    # NVIDIA's pickles have them in the first argument of the call that makes the object.
    meta = thing.args[0] if thing.args and isinstance(thing.args[0], dict) else {}
    state = thing.state or meta.get("state")
    return state if isinstance(state, dict) else {}


def class_name(thing: Any) -> str:
    """The name of the class of a module of NVIDIA's pickles, or of the type of any other object."""
    meta = thing.args[0] if isinstance(thing, Record) and thing.args else {}
    name = meta.get("class_name") if isinstance(meta, dict) else None
    return name if isinstance(name, str) else type(thing).__name__


def modules(thing: Any) -> dict:
    """The modules inside a module, by name; none of any other object."""
    found = attributes(thing).get("_modules") if isinstance(thing, dict | Record) else None
    return found if isinstance(found, dict) else {}


def numpy_array(found: Any) -> np.ndarray:
    """The array of numbers that NumPy pickled.

    Raises:
      ValueError: if it is none, or not as large as it claims.
    """
    try:
        data: Any
        _, shape, dtype, fortran, data = found.state
        kind, order = dtype.args[0], dtype.state[1]
        if not found.path.endswith(".multiarray._reconstruct") or kind not in ("f4", "f8"):
            raise ValueError(f"{found.path} of {reprlib.repr(kind)}")
        if getattr(data, "path", None) == "_codecs.encode":  # of protocol 2
            data = data.args[0].encode("latin1")
        flat = np.frombuffer(data, np.dtype(kind).newbyteorder(order))
        return flat.reshape(shape, order="F" if fortran else "C").astype(kind)
    except Exception as error:  # untrusted input may raise anything
        raise ValueError(f"not an array that NumPy pickled ({error!r:.200})") from error


class _Operations(dict):
    """The operations of a pickle, by their codes; each use of one is charged."""

    def __init__(self, budget: Budget) -> None:
        super().__init__(pickle._Unpickler.dispatch)
        self.budget = budget
        del self[pickle.BYTEARRAY8[0]]  # it allocates what it claims, and PyTorch does not write it
        for codes in (pickle.SETITEM, pickle.SETITEMS, pickle.ADDITEMS, pickle.FROZENSET):
            self[codes[0]] = _with_checked_keys(self[codes[0]], codes)

    def __getitem__(self, code):
        self.budget.spend(OBJECT)
        return super().__getitem__(code)


def _with_checked_keys(operation, codes):
    """The operation, after a check of the keys that it hashes.

    The hash of a tuple that contains one tuple twice, and so on, would take for ever.
    """

    def checked(unpickler):
        stack = unpickler.stack
        if codes == pickle.SETITEM:
            keys = stack[-2:-1]
        else:
            keys = stack[::2] if codes == pickle.SETITEMS else stack
        _check_keys(unpickler.budget, keys)
        operation(unpickler)

    return checked


def _check_keys(budget, keys):
    for key in keys:
        parts = key if type(key) is tuple else (key,)
        budget.spend(8 * len(parts))
        if not all(isinstance(part, PLAIN) for part in parts):
            raise ValueError(f"a key is of the type {type(key).__name__}")


class _Whole:
    """A file that is asked for no more bytes than it has; else they would be allocated first."""

    def __init__(self, file: BinaryIO) -> None:
        here = file.tell()
        size = file.seek(0, io.SEEK_END)
        file.seek(here)
        self._read, self.size, self.readline = file.read, size, file.readline

    def read(self, count: int) -> bytes:
        """Read as many bytes, or fewer at the end of the file."""
        if count > self.size:
            raise EOFError(f"{count} bytes are more than there are")
        return self._read(count)


# The unpickler that is written in Python can count its operations, and its memo is a dict; that of
# the one in C is an array, as long as the largest index in the file.
class _Unpickler(pickle._Unpickler):
    def __init__(
        self,
        file: BinaryIO,
        budget: Budget,
        storage: Callable[[Any, str, int], np.ndarray] | None = None,
    ) -> None:
        super().__init__(_Whole(file))
        self.storage, self.budget = storage, budget
        self.dispatch = _Operations(budget)  # pyright: ignore[reportAttributeAccessIssue]
        self.classes: dict[str, type] = {}

    def find_class(self, module, name):
        path = f"{module}.{name}"
        if path not in self.classes:
            self.budget.spend(2000 + len(path))
            self.classes[path] = type(name, (Record,), {"path": path, "budget": self.budget})
        return self.classes[path]

    def persistent_load(self, pid):
        what, kind, key, _, size, *_ = pid
        if what != "storage" or self.storage is None or not isinstance(key, str):
            raise pickle.UnpicklingError(f"{reprlib.repr(what)} is not a storage of this file")
        return self.storage(np.dtype(DTYPES[kind.__name__]), key, size)


def _zip(file: BinaryIO, budget: Budget) -> Any:
    with zipfile.ZipFile(file) as archive:
        members = {info.filename.partition("/")[2]: info for info in archive.infolist()}

        def member(name):
            # The code in a file of TorchScript is compressed. It is never read.
            if members[name].compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{name} is compressed, which PyTorch never does")
            return archive.read(members[name])

        if "byteorder" in members and member("byteorder") != b"little":
            raise ValueError("it is big endian")
        storages: dict[str, np.ndarray] = {}

        def storage(dtype, key, size):
            if key not in storages:
                budget.spend(members[f"data/{key}"].file_size)
                storages[key] = np.frombuffer(member(f"data/{key}"), dtype)
            if len(storages[key]) != size or storages[key].dtype != dtype:
                raise ValueError(f"storage {key} is not {size} x {dtype}")
            return storages[key]

        pickled = io.BytesIO(member("data.pkl"))
        return _Unpickler(pickled, budget, storage).load()


def _stream(file: BinaryIO, budget: Budget) -> Any:
    first = _Unpickler(file, budget).load()
    if not isinstance(first, int) or first != MAGIC:
        return first  # a plain pickle
    version, system = (_Unpickler(file, budget).load() for _ in range(2))
    if version != 1001 or not system["little_endian"]:
        raise ValueError(f"version {reprlib.repr(version)} of {reprlib.repr(system)}")
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
            budget.spend(size * dtype.itemsize)
            storages[key] = np.empty(size, dtype)  # its numbers come after the pickle
        return storages[key]

    found = _Unpickler(file, budget, storage).load()
    for key in _Unpickler(file, budget).load():
        array = storages[key]
        if int.from_bytes(file.read(8), "little") != len(array):
            raise ValueError(f"storage {key} is not of {len(array)} numbers")
        array[:] = np.frombuffer(file.read(array.nbytes), array.dtype)
    return found


def _tensor(_, storage, offset, size, strides, *__):
    """A view of a storage, which must contain all of the view."""
    if not isinstance(storage, np.ndarray):
        raise ValueError(f"a tensor of {type(storage).__name__}")
    if len(size) > 32 or not all(type(n) is int and n < 2**62 for n in (offset, *size, *strides)):
        raise ValueError("a tensor of more than 32 axes, or whose axes are no lengths")
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


def _copied(kind):
    """A maker of a dict or tuple, which charges for what it copies."""

    def copied(budget, items=()):
        if not isinstance(items, list | tuple | dict):
            raise ValueError(f"a {kind.__name__} of {type(items).__name__}")
        budget.spend(OBJECT * len(items))
        if kind is Dict and not isinstance(items, dict):  # Python 2 wrote lists of pairs
            _check_keys(budget, [key for key, _ in items])
        return kind(items)

    return copied


KNOWN: dict[str, Callable] = {
    "collections.OrderedDict": _copied(Dict),
    "dnnlib.util.EasyDict": _copied(Dict),
    "torch.Size": _copied(tuple),
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": lambda _, data, *__: data,
    "torch.storage._load_from_bytes": lambda budget, data: _stream(io.BytesIO(data), budget),
}
"""All the functions that a file can call."""
