"""Files from anywhere: any bytes give images or a clear error, in little memory and time."""

import gzip
import io
import resource
import struct
import time
import zipfile
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings, strategies as st
from PIL import Image

from diffjax import data
from diffjax.data import images, limits, readers
from diffjax.evaluation import sampling
from test_data import idx_bytes, write_cifar, write_mnist

HELD_OUT = next(f"{i}.png" for i in range(99) if images.held_out(f"{i}.png"))
IMAGES = np.random.default_rng(0).integers(0, 256, (6, 4, 4), np.uint8)
fuzz = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def npz_bytes(**arrays):
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def png_bytes(x=IMAGES[0]):
    file = io.BytesIO()
    Image.fromarray(x).save(file, "PNG")
    return file.getvalue()


def read_npz(path, raw):
    (path / "a.npz").write_bytes(raw)
    return data.load("npz", path / "a.npz")


def read_idx(path, raw):
    (path / "a").write_bytes(raw)
    return readers.read_idx(path / "a")


def read_idx_gz(path, raw):
    (path / "a.gz").write_bytes(raw)
    return readers.read_idx(path / "a.gz")


def read_cifar(path, raw):
    if not (path / "data_batch_1.bin").exists():
        write_cifar(path)
    (path / "data_batch_1.bin").write_bytes(raw)
    return data.load("cifar10", path)


def read_folder(path, raw):
    for name, content in (("a.png", raw), ("b.png", png_bytes()), (HELD_OUT, png_bytes())):
        (path / name).write_bytes(content)
    train, test = data.load("folder", path)
    assert len(test.x) == 1  # and it can be read
    return data.Dataset(train._replace(x=train.x[:]), test)


READERS = {
    "idx": (read_idx, idx_bytes(IMAGES)),
    "idx.gz": (read_idx_gz, gzip.compress(idx_bytes(IMAGES), mtime=0)),
    "npz": (read_npz, npz_bytes(x_train=IMAGES[:4], x_test=IMAGES[4:], y_train=np.arange(4))),
    "cifar": (read_cifar, bytes([3] * 3073)),
    "folder": (read_folder, png_bytes()),
}
each = pytest.mark.parametrize(("read", "valid"), READERS.values(), ids=READERS)


def npy_bytes(x):
    file = io.BytesIO()
    np.save(file, x)
    return file.getvalue()


def read_samples(path, raw):
    (path / "generated.npz").write_bytes(raw)
    return sampling.read(path / "generated.npz")[0].x


def read_npy(path, raw):
    (path / "part.npy").write_bytes(raw)
    return limits.read_npy(path / "part.npy")


def tried(read, path, raw):
    """What a reader makes of bytes: an array, or None for the one error that it may raise."""
    try:
        found = read(path, raw)
    except ValueError as error:
        said = str(error)
    else:
        return found if isinstance(found, np.ndarray) else found.train.x
    assert str(path) in said or "train" in said, said
    return None


@each
def test_valid_files_are_read(tmp_path, read, valid):
    assert tried(read, tmp_path, valid) is not None


@each
@fuzz
@given(raw=st.binary(max_size=400))
@example(raw=b"")
@example(raw=b"\0\0\x08\x03" + b"\xff" * 12)
def test_any_bytes_are_an_array_or_a_clear_error(tmp_path, read, valid, raw):
    tried(read, tmp_path, raw)


@each
@fuzz
@given(changes=st.lists(st.tuples(st.integers(0), st.integers(0, 255)), max_size=4), cut=st.data())
def test_valid_files_that_are_changed_or_cut(tmp_path, read, valid, changes, cut):
    raw = bytearray(valid)
    for at, value in changes:
        raw[at % len(raw)] = value
    end = cut.draw(st.integers(0, len(raw)))
    found = tried(read, tmp_path, bytes(raw[: end or None]))
    assert found is None or found.nbytes < 2**20


def claiming(shape, dtype="|u1", content=b"\0" * 64):
    """An npy file whose header claims more than there is."""
    header = repr({"descr": dtype, "fortran_order": False, "shape": shape}).encode()
    header += b" " * (117 - len(header)) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + content


def zipped(**members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def lying_npz():
    """An archive whose directory says that its bomb takes as many bytes packed as unpacked."""
    raw = zipped(**{"x_train.npy": claiming((10**8,), "|u1", bytes(10**8)), "x_test.npy": b""})
    end = raw.rindex(b"PK\x01\x02", 0, raw.rindex(b"PK\x01\x02"))  # of the first member
    return raw[: end + 20] + struct.pack("<I", 10**8) + raw[end + 24 :]


def wide_png(side):
    """A PNG whose header, of a correct checksum, claims side x side pixels."""
    raw = bytearray(png_bytes())
    raw[16:24] = struct.pack(">II", side, side)
    raw[29:33] = struct.pack(">I", zlib.crc32(raw[12:29]))
    return bytes(raw)


def black_png(side):
    """A PNG of side x side transparent pixels, of which each row shrinks to almost nothing."""
    chunk = lambda kind, data: (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    )
    head, packer = struct.pack(">IIBBBBB", side, side, 8, 6, 0, 0, 0), zlib.compressobj(9)
    rows = b"".join([*(packer.compress(bytes(4 * side + 1)) for _ in range(side)), packer.flush()])
    parts = chunk(b"IHDR", head), chunk(b"IDAT", rows), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def black_samples(count, x=None):
    """A file of samples that shrink to almost nothing."""
    x = x or claiming((count // 64, 8, 8), content=bytes(count // 64 * 64))
    index, settings = npy_bytes(np.arange(4)), npy_bytes(np.array("{}"))
    return zipped(**{"x.npy": x, "index.npy": index, "settings.npy": settings})


BOMBS = {
    "idx": (
        read_idx,
        lambda: b"\0\0\x08\x03" + struct.pack(">3I", 2**31, 2**20, 2**20) + b"\0" * 99,
    ),
    "idx.gz": (
        read_idx_gz,
        lambda: gzip.compress(
            b"\0\0\x08\x03" + struct.pack(">3I", 300, 1000, 1000) + bytes(300 * 10**6)
        ),
    ),
    "npz header": (
        read_npz,
        lambda: zipped(**{"x_train.npy": claiming((2**20, 2**20)), "x_test.npy": claiming((8, 8))}),
    ),
    "npz member": (
        read_npz,
        lambda: zipped(
            **{"x_train.npy": claiming((3 * 10**8,), content=bytes(3 * 10**8)), "x_test.npy": b""}
        ),
    ),
    "npz that lies": (read_npz, lying_npz),
    "png": (read_folder, lambda: wide_png(60_000)),
    "png of large transparent pixels": (read_folder, lambda: black_png(8000)),
    "samples": (read_samples, lambda: black_samples(3 * 10**8)),
    "samples header": (read_samples, lambda: black_samples(0, claiming((2**50,)))),
    "npy header": (read_npy, lambda: claiming((2**50,))),
}


@pytest.mark.parametrize(("read", "make"), BOMBS.values(), ids=BOMBS)
def test_files_that_claim_absurd_sizes_cost_neither_memory_nor_time(tmp_path, read, make):
    raw = make()
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    assert tried(read, tmp_path, raw) is None
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB
    assert time.monotonic() - began < 5


class Code:
    """What a pickle would run."""

    def __reduce__(self):
        return print, ("this was executed",)


def test_nothing_in_a_file_is_executed(tmp_path, capsys):
    raw = npz_bytes(x_train=np.array([Code()], object), x_test=IMAGES)
    with pytest.raises(ValueError, match="Python objects, which are never read"):
        read_npz(tmp_path, raw)
    assert "executed" not in capsys.readouterr().out


def test_names_that_lead_out_of_an_archive_are_of_no_use(tmp_path):
    raw = zipped(**{"../../x_train.npy": b"", "/x_test.npy": b""})
    with pytest.raises(ValueError, match="lacks"):
        read_npz(tmp_path, raw)


def test_files_that_shrink_well_are_no_bombs(tmp_path):
    """Mostly black images, 4 MB of them: MNIST's own shrink to a fifth, these to a fiftieth."""
    write_mnist(tmp_path)
    images = np.zeros((5000, 28, 28), np.uint8)
    images[:, 14, 10:18] = np.random.default_rng(0).integers(0, 256, (5000, 8))
    packed = gzip.compress(idx_bytes(images))
    assert len(packed) * 20 < images.nbytes
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(packed)
    labels = gzip.compress(idx_bytes(np.arange(5000) % 10))
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(labels)
    assert data.load("mnist", tmp_path).train.x.shape == (5000, 28, 28, 1)


def test_examples_of_no_pixels_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"examples of shape \(4, 0, 8, 1\)"):
        read_npz(tmp_path, npz_bytes(x_train=np.zeros((4, 0, 8), np.uint8), x_test=IMAGES))
