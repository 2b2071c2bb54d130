"""A folder of images: what is read, what is refused, and that a batch is what it always was."""

import functools
import os
import resource

import numpy as np
import pytest
from PIL import Image
from test_readers import HELD_OUT, png_bytes

from diffjax import data
from diffjax.data import images


def draw_folder(path, shape=lambda i: (8, 8), classes=1, n=40):
    """Image i is flat, of grey level 5 i, in sub-folder i modulo their number."""
    for i in range(n):
        where = path / f"class{i % classes}" / "deep" if classes > 1 else path
        where.mkdir(exist_ok=True, parents=True)
        Image.fromarray(np.full(shape(i), 5 * i, np.uint8)).save(where / f"{i:02}.png")


def levels(examples):
    return examples.x[:][:, 3, 3, 0] // 5


@pytest.mark.parametrize("channels", [(), (3,)])
def test_a_folder_is_read_with_its_subfolders_for_labels(tmp_path, channels):
    draw_folder(tmp_path, lambda i: (8, 8, *channels), classes=2)
    train, test = data.load("folder", tmp_path)
    assert train.x.shape[1:] == (8, 8, *(channels or (1,))) and len(train.x) > 8 * len(test.x) > 0
    assert sorted([*levels(train), *levels(test)]) == list(range(40))
    assert (levels(train) % 2 == train.label).all() and (levels(test) % 2 == test.label).all()


def test_linked_class_folders_are_followed_once(tmp_path, capsys):
    draw_folder(tmp_path / "far", classes=3)
    near = tmp_path / "near"
    (near / "class0").mkdir(parents=True)
    for i in (1, 2):
        (near / f"class{i}").symlink_to(tmp_path / f"far/class{i}")
    for file in (tmp_path / "far/class0/deep").iterdir():
        (near / "class0" / file.name).symlink_to(file)
    (near / "class2/loop").symlink_to(near)
    train, test = data.load("folder", near)
    assert sorted([*levels(train), *levels(test)]) == list(range(40))
    assert (levels(train) % 3 == train.label).all()
    assert "class2/loop, a link to a folder that is read already" in capsys.readouterr().out


def test_a_folder_that_is_linked_twice_is_one_class(tmp_path, capsys):
    draw_folder(tmp_path, classes=2)
    (tmp_path / "again").symlink_to(tmp_path / "class1")
    train, test = data.load("folder", tmp_path)
    assert len(train.x) + len(test.x) == 40 and set(train.label) == {0, 1}
    assert "labels class0, class1" in capsys.readouterr().out


def test_what_programs_leave_behind_is_no_class(tmp_path, capsys):
    draw_folder(tmp_path, classes=2)
    whole = next((tmp_path / "class0/deep").iterdir()).read_bytes()
    for name in (".ipynb_checkpoints", "__MACOSX", ".hidden", "class0/.ipynb_checkpoints"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(whole)
    (tmp_path / "class0/._a.png").write_bytes(b"of a Mac")
    (tmp_path / ".DS_Store").write_bytes(b"of a Mac")
    train, test = data.load("folder", tmp_path)
    assert len(train.x) + len(test.x) == 40
    assert (levels(train) % 2 == train.label).all()
    assert "left out" not in capsys.readouterr().out


@pytest.mark.parametrize("held", ["test", "val", "Validation"])
def test_folders_of_splits_are_no_labels(tmp_path, held):
    draw_folder(tmp_path / "train", classes=3, n=12)
    draw_folder(tmp_path / held, classes=3, n=6)
    train, test = data.load("folder", tmp_path)
    assert sorted(levels(train)) == list(range(12)) and sorted(levels(test)) == list(range(6))
    assert (levels(train) % 3 == train.label).all() and (levels(test) % 3 == test.label).all()


def test_other_folders_beside_splits(tmp_path, capsys):
    for name in ("train", "val", "test"):
        draw_folder(tmp_path / name, n=7)
    train, test = data.load("folder", tmp_path)
    assert len(train.x) == len(test.x) == 7 and train.label is None
    assert all(name.startswith("test/") for name in test.x.names)
    assert "val/, as test/ is held out" in capsys.readouterr().out
    draw_folder(tmp_path / "cats", n=2)
    with pytest.raises(ValueError, match="train/, test/, val/ beside cats/: .* split or a class"):
        data.load("folder", tmp_path)


def test_a_folder_of_one_split_is_no_label(tmp_path):
    draw_folder(tmp_path / "train", classes=2)
    train, test = data.load("folder", tmp_path)
    assert (levels(train) % 2 == train.label).all() and len(train.x) > 8 * len(test.x) > 0


@pytest.mark.parametrize("ending", images.READ)
def test_every_ending_that_is_named_is_read(tmp_path, ending):
    x = np.full((8, 8, 3), 200, np.uint8)
    kind = {".apng": "png", ".pbm": "ppm", ".pgm": "ppm", ".pnm": "ppm"}.get(ending)
    x = x[..., 0] if ending in (".pgm", ".pbm") else x
    Image.fromarray(x).save(tmp_path / f"a{ending.upper()}", kind)
    seen = images.scan(tmp_path)
    assert seen.names == [f"a{ending.upper()}"]
    assert abs(images.read(tmp_path / seen.names[0]).astype(int) - 200).max() <= 2


def test_what_is_left_out_is_counted_by_ending(tmp_path, capsys):
    draw_folder(tmp_path)
    for name in ("a.txt", "b.TXT", "c.json", "d.ico", "README"):
        (tmp_path / name).write_text("no image")
    data.load("folder", tmp_path)
    left_out = "left out: 2 .txt, 1 without an ending, 1 .ico, 1 .json"
    assert left_out in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_pixels_of_an_unknown_range_are_not_read(tmp_path, dtype):
    """A float image in [0, 1] would become black."""
    Image.fromarray(np.full((8, 8), 2**20, dtype)).save(tmp_path / "a.tif")
    with pytest.raises(images.UnreadableError, match="32-bit"):
        images.read(tmp_path / "a.tif")


def test_images_of_many_sizes_are_cropped_and_scaled_on_request(tmp_path):
    draw_folder(tmp_path, lambda i: (8 + i, 30, 3) if i % 2 else (9, 8 + i))
    with pytest.raises(ValueError, match=r"images of 39 sizes, as .*00\.png.*: give data\.size"):
        data.load("folder", tmp_path)
    for channels, found in ((None, 3), (3, 3), (1, 1)):
        train, test = data.load("folder", tmp_path, 6, channels)
        assert train.x.shape[1:] == (6, 6, found) and train.label is None
        assert sorted([*levels(train), *levels(test)]) == list(range(40))


def test_the_middle_is_cropped_and_averaged(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (12, 20), np.uint8)
    Image.fromarray(x).save(tmp_path / "a.png")
    means = x[:, 4:16].reshape(4, 3, 4, 3).mean((1, 3))
    assert np.abs(images.read(tmp_path / "a.png", 4)[..., 0] - means).max() <= 1


def test_transparency_is_white_and_cameras_are_turned(tmp_path):
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "a.png")
    assert (images.read(tmp_path / "a.png") == 255).all()
    image = Image.fromarray(np.full((8, 16, 3), 7, np.uint8))
    exif = image.getexif()
    exif[0x0112] = 6  # lay on its side
    image.save(tmp_path / "b.jpg", exif=exif)
    assert images.read(tmp_path / "b.jpg").shape == (16, 8, 3)


def test_sixteen_bits_of_grey_become_eight(tmp_path):
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    np.testing.assert_array_equal(images.read(tmp_path / "a.png")[..., 0], ramp >> 8)


def test_what_is_held_out_depends_on_the_name_alone(tmp_path, monkeypatch):
    """Not on the order that the disk lists it in, nor on what else there is."""
    draw_folder(tmp_path, classes=2)
    held = data.load("folder", tmp_path).test
    walk = os.walk
    backwards = lambda path, **how: [(w, d, f[::-1]) for w, d, f in walk(path, **how)][::-1]
    monkeypatch.setattr(os, "walk", backwards)
    again = data.load("folder", tmp_path).test
    assert again.x.names.tolist() == held.x.names.tolist()
    draw_folder(tmp_path, classes=2, n=50)
    assert set(held.x.names) <= set(data.load("folder", tmp_path).test.x.names)


def test_a_batch_from_the_disk_is_the_batch_from_memory_in_any_parts(tmp_path):
    draw_folder(tmp_path, classes=2)
    train, _ = data.load("folder", tmp_path)
    memory = train._replace(x=np.asarray(train.x))
    for step in (0, 1, 9):
        whole = data.train_batch(train, 3, step, 8, flip=True)
        parts = [data.train_batch(train, 3, step, 8, s, True) for s in (slice(0, 5), slice(5, 8))]
        for name, there in data.train_batch(memory, 3, step, 8, flip=True).items():
            assert np.array_equal(whole[name], there)
            assert np.array_equal(np.concatenate([part[name] for part in parts]), there)


def test_only_the_images_of_a_batch_are_read(tmp_path, monkeypatch):
    draw_folder(tmp_path)
    train, _ = data.load("folder", tmp_path)
    seen, read = [], images.read
    monkeypatch.setattr(images, "read", lambda file, *a: seen.append(file.name) or read(file, *a))
    data.train_batch(train, 0, 0, 8, slice(2, 5))
    assert len(seen) == 3


def test_unreadable_files_are_named_and_refused_or_skipped(tmp_path, capsys):
    draw_folder(tmp_path)
    whole = png_bytes(np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8))
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) * 2 // 3])
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "phone.HEIC").write_bytes(b"anything")
    (tmp_path / "notes.txt").write_text("no image, and no business of ours")
    with pytest.raises(ValueError, match="3 of 43 images cannot be read: .*skip them") as error:
        data.load("folder", tmp_path)
    for what in ("cut.png: ", "empty.jpg: ", "phone.HEIC: .HEIC is not read: convert it to PNG"):
        assert what in str(error.value)
    train, test = data.load("folder", tmp_path, unreadable="skip")
    assert len(train.x) + len(test.x) == 40
    assert "skipped: " in capsys.readouterr().out


def test_a_file_that_is_gone_when_its_turn_comes_is_named(tmp_path):
    draw_folder(tmp_path)
    train, _ = data.load("folder", tmp_path)
    (tmp_path / train.x.names[0]).unlink()
    with pytest.raises(data.UnreadableError, match=train.x.names[0]):
        data.take(train, np.array([0]))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("folder", {"size": 0}, "data.size=0: must be at least 1"),
        ("folder", {"channels": 4}, r"data.channels=4: must be 1 \(grey\), 3"),
        ("folder", {"unreadable": "ignore"}, "'ignore': one of refuse, skip"),
        ("folder", {}, "0 images"),
        ("digits", {"size": 4}, "data.size=4: the data set digits has a size of its own"),
        ("digits", {"channels": 3}, "the data set digits takes no channels"),
        ("two_moons", {"size": 1}, "two_moons has a size of its own"),
    ],
)
def test_options_and_empty_folders_are_refused(tmp_path, name, options, message):
    with pytest.raises(ValueError, match=message):
        data.load(name, tmp_path if name == "folder" else None, **options)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere must be a folder"):
        data.load("folder", tmp_path / "nowhere")


def test_too_few_images_are_refused(tmp_path):
    draw_folder(tmp_path, n=1)
    with pytest.raises(ValueError, match="1 images .* need at least one of each"):
        data.load("folder", tmp_path)


def test_memory_does_not_grow_with_what_the_images_hold(tmp_path):
    """Nine images of 16 MB each, unpacked."""
    flat = png_bytes(np.zeros((4000, 4000), np.uint8))
    for name in (HELD_OUT, *"abcdefgh"):
        (tmp_path / name).with_suffix(".png").write_bytes(flat)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    data.load("folder", tmp_path, 8)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64_000  # kB


def test_other_images_are_averaged_down(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (6, 8, 8), np.uint8)
    np.savez(tmp_path / "a.npz", x_train=x[:4], x_test=x[4:])
    train, test = data.load("npz", tmp_path / "a.npz", 2)
    assert train.x.shape == (4, 2, 2, 1) and test.x.dtype == np.uint8
    assert np.abs(train.x[1, 0, 1, 0] - x[1, :4, 4:].mean()) <= 0.5
    for n in (3, 5, 8):  # pixels across an edge count in part
        parts = np.kron(x[0], np.ones((n, n))).reshape(n, 8, n, 8)  # each pixel as n x n of them
        ours = data.load("npz", tmp_path / "a.npz", n).train.x[0, ..., 0]
        assert np.abs(ours - parts.mean((1, 3))).max() <= 0.5 + 1e-4
    with pytest.raises(ValueError, match="data.size=9: .* averaged down"):
        data.load("npz", tmp_path / "a.npz", 9)


@pytest.mark.faults
def test_worker_processes_make_the_same_batches_in_the_same_order(tmp_path):
    draw_folder(tmp_path)
    alone, _ = data.load("folder", tmp_path)
    train, _ = data.load("folder", tmp_path, workers=2)
    make = functools.partial(data.train_batch, train, 3, batch_size=8, flip=True)
    made = list(data.in_order(make, range(2, 9), workers=2))
    for step, batch in zip(range(2, 9), made, strict=True):
        for name, there in data.train_batch(alone, 3, step, 8, flip=True).items():
            assert np.array_equal(batch[name], there)
    # Steps 2 and 3 are of one epoch: they share no image.
    (tmp_path / train.x.names[data.batch_indices(3, 3, len(train.x), 8)[0]]).unlink()
    made = data.in_order(make, range(2, 9), workers=2)
    next(made)
    with pytest.raises(data.UnreadableError):  # in its turn
        next(made)


def test_workers_must_be_possible(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="workers=-1"):
        data.load("folder", tmp_path, workers=-1)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"data.workers=2: needs Grain: pip install .*data"):
        data.load("folder", tmp_path, workers=2)
