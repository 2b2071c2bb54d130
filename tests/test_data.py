import gzip
import struct

import numpy as np
import pytest

from diffjax import data
from diffjax.data import readers, toy

NAMES = ["train-images-idx3-ubyte", "train-labels-idx1-ubyte"]
NAMES += ["t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"]


def idx_bytes(array):
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


def write_mnist(path, n_train=40, n_test=20, zipped=True):
    """A small data set in MNIST's own format."""
    rng = np.random.default_rng(0)
    arrays = []
    for n in (n_train, n_test):
        arrays += [rng.integers(0, 256, (n, 28, 28)), np.arange(n) % 10]
    for name, array in zip(NAMES, arrays, strict=True):
        raw = idx_bytes(array)
        (path / (name + ".gz" * zipped)).write_bytes(gzip.compress(raw) if zipped else raw)
    return arrays


def write_cifar(path, n=21):
    """A small data set in CIFAR-10's own format."""
    rng = np.random.default_rng(0)
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    records = []
    for name in names:
        label = rng.integers(0, 10, (n, 1), np.uint8)
        pixels = rng.integers(0, 256, (n, 3, 32, 32), np.uint8)
        (path / name).write_bytes(np.concatenate([label, pixels.reshape(n, -1)], 1).tobytes())
        records.append((pixels, label[:, 0]))
    return records


def test_digits_are_the_published_ones():
    train, test = data.load("digits")
    assert len(train.x) + len(test.x) == 1797
    assert train.x.shape[1:] == (8, 8, 1) and train.x.dtype == np.uint8
    assert train.x.min() == 0 and train.x.max() == 255
    # UCI's class counts.
    counts = np.bincount(np.concatenate([train.label, test.label]))
    assert counts.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert (np.bincount(test.label) > 20).all()  # every class is held out too


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_idx_files_are_read(tmp_path, name, zipped):
    x_train, y_train, x_test, y_test = write_mnist(tmp_path, zipped=zipped)
    train, test = data.load(name, tmp_path)
    assert np.array_equal(train.x[..., 0], x_train) and np.array_equal(train.label, y_train)
    assert np.array_equal(test.x[..., 0], x_test) and np.array_equal(test.label, y_test)


def test_cifar_files_are_read_channels_last(tmp_path):
    records = write_cifar(tmp_path)
    train, test = data.load("cifar10", tmp_path)
    assert train.x.shape == (105, 32, 32, 3) and test.x.shape == (21, 32, 32, 3)
    pixels, label = records[1]  # the second file follows the first
    assert np.array_equal(train.x[21:42, ..., 2], pixels[:, 2])
    assert np.array_equal(train.label[21:42], label)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_npz_archives_are_read(tmp_path, dtype):
    x = (np.arange(2 * 6 * 4 * 4).reshape(12, 4, 4) % 256).astype(np.uint8)
    x = x if dtype == np.uint8 else x.astype(dtype) / 127.5 - 1
    np.savez(tmp_path / "a.npz", x_train=x[:8], x_test=x[8:], y_train=np.arange(8))
    train, test = data.load("npz", tmp_path / "a.npz")
    assert np.array_equal(train.x[..., 0], x[:8]) and test.label is None
    assert train.label.tolist() == list(range(8))


def test_signals_are_no_images_if_their_shape_is_given(tmp_path, capsys):
    x = np.random.default_rng(0).uniform(-1, 1, (12, 16, 4)).astype(np.float32)
    np.savez(tmp_path / "a.npz", x_train=x[:8], x_test=x[8:])
    train, _ = data.load("npz", tmp_path / "a.npz", shape=(16, 4))
    assert np.array_equal(train.x, x[:8])
    assert not capsys.readouterr().out
    train, _ = data.load("npz", tmp_path / "a.npz")
    assert train.x.shape == (8, 16, 4, 1)
    assert "read as grey images of 16 x 4 pixels; data.shape" in capsys.readouterr().out


@pytest.mark.parametrize("name", toy.TOYS)
def test_toy_sets_are_planar_bounded_and_always_the_same(name):
    train, test = data.load(name)
    again, _ = data.load(name)
    assert train.x.shape[1:] == (2,) and len(test.x) > 1000
    assert np.abs(train.x).max() <= 1 and train.x.std(0).min() > 0.2
    assert np.array_equal(train.x, again.x)
    assert not np.array_equal(train.x[:100], test.x[:100])
    assert name in dir(toy)


def test_pixels_become_floats_in_minus_one_to_one():
    x = np.array([0, 51, 255], np.uint8).reshape(3, 1, 1, 1)
    batch = data.take(data.Examples(x), np.array([2, 1, 0]))
    assert batch["x"].dtype == np.float32
    np.testing.assert_allclose(batch["x"].ravel(), [1, -0.6, -1], rtol=1e-6)


def test_an_epoch_sees_every_example_once_and_the_next_in_another_order():
    first = np.concatenate([data.batch_indices(7, k, 12, 4) for k in range(3)])
    second = np.concatenate([data.batch_indices(7, k, 12, 4) for k in range(3, 6)])
    assert sorted(first) == sorted(second) == list(range(12))
    assert first.tolist() != second.tolist()
    other_seed = np.concatenate([data.batch_indices(8, k, 12, 4) for k in range(3)])
    assert first.tolist() != other_seed.tolist()


def test_a_batch_is_a_function_of_seed_and_step_and_splits_by_slots():
    train, _ = data.load("digits")
    whole = data.train_batch(train, 3, 11, 16, flip=True)
    again = data.train_batch(train, 3, 11, 16, flip=True)
    parts = [data.train_batch(train, 3, 11, 16, s, True) for s in (slice(0, 4), slice(4, 16))]
    for name in whole:
        assert np.array_equal(whole[name], again[name])
        assert np.array_equal(whole[name], np.concatenate([p[name] for p in parts]))
    assert whole["index"].tolist() == list(range(16))


def test_flips_mirror_about_half_of_the_images_left_to_right():
    x = np.zeros((64, 2, 2, 1), np.uint8)
    x[:, :, 0] = 255
    batch = data.train_batch(data.Examples(x), 0, 0, 64, flip=True)["x"]
    left = (batch[:, 0, 0, 0] == 1).sum()
    assert 16 < left < 48
    assert (batch[:, 0, 0, 0] == -batch[:, 0, 1, 0]).all()


def corrupt(path, how):
    raw = path.read_bytes()
    path.write_bytes({"truncated": raw[: len(raw) // 2], "empty": b"", "noise": b"x" * 500}[how])


@pytest.mark.parametrize("how", ["truncated", "empty", "noise"])
@pytest.mark.parametrize("zipped", [True, False])
def test_corrupt_idx_files_are_named(tmp_path, how, zipped):
    write_mnist(tmp_path, zipped=zipped)
    name = NAMES[2] + ".gz" * zipped
    corrupt(tmp_path / name, how)
    with pytest.raises(ValueError, match=name):
        data.load("mnist", tmp_path)


def test_a_flipped_byte_in_a_gzipped_file_is_noticed(tmp_path):
    write_mnist(tmp_path)
    path = tmp_path / (NAMES[0] + ".gz")
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 0xFF
    path.write_bytes(bytes(raw))
    with pytest.raises(ValueError, match=f"{NAMES[0]}.gz: corrupt or truncated"):
        data.load("mnist", tmp_path)


@pytest.mark.parametrize("how", ["truncated", "empty", "noise"])
def test_corrupt_cifar_and_npz_files_are_named(tmp_path, how):
    write_cifar(tmp_path)
    corrupt(tmp_path / "data_batch_3.bin", how)
    with pytest.raises(ValueError, match=r"data_batch_3\.bin: .*corrupt or truncated"):
        data.load("cifar10", tmp_path)
    np.savez_compressed(tmp_path / "a.npz", x_train=np.zeros((4, 8, 8), np.uint8))
    corrupt(tmp_path / "a.npz", how)
    with pytest.raises(ValueError, match=r"a\.npz: not a readable npz"):
        data.load("npz", tmp_path / "a.npz")


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10", "npz"])
def test_a_path_that_does_not_exist_says_what_should_be_there(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=r"idx3-ubyte|data_batch_1\.bin|archive"):
        data.load(name, tmp_path / "nowhere")


def test_fashion_mnist_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setattr(readers, "FASHION_MNIST", tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"apt-get install dataset-fashion-mnist.*idx3"):
        data.load("fashion_mnist")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"x_train": np.full((4, 2), 1.5, np.float32)},
            r"values from 1\.5 to 1\.5, need \[-1, 1\]",
        ),
        ({"x_train": np.full((4, 2), np.nan, np.float32)}, "values from nan"),
        ({"x_train": np.zeros((4, 2))}, "dtype float64, need uint8 or float32"),
        ({"x_train": np.zeros((0, 2), np.float32)}, "of at least 1 each"),
        ({"x_train": np.zeros((4, 2), np.float32), "y_train": np.zeros(3, int)}, "labels int64"),
        ({"x_train": np.zeros((4, 2), np.float32), "y_train": np.zeros(4)}, "labels float64"),
        ({"x_train": np.zeros((4, 2), np.float32), "y_train": np.full(4, -1)}, "integer >= 0"),
        ({"other": np.zeros(3)}, r"has arrays \['other', 'x_test'\], lacks \['x_train'\]"),
    ],
)
def test_arrays_that_break_the_rules_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", x_test=np.zeros((4, 2), np.float32), **arrays)
    with pytest.raises(ValueError, match=message):
        data.load("npz", tmp_path / "a.npz")


def test_unknown_sets_and_needless_paths_are_refused(tmp_path):
    with pytest.raises(ValueError, match="unknown data set 'cifar100': one of digits"):
        data.load("cifar100")
    with pytest.raises(ValueError, match="the data set digits takes no path"):
        data.load("digits", tmp_path)
