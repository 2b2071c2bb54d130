"""Records: what is converted is what is read, after any stop, and damage is named."""

import dataclasses
import functools
import io
import json
import subprocess
import sys
import tarfile
import time
import tracemalloc
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from diffjax import data
from diffjax.data import batches, conversion, convert, images, records
from diffjax.experiment import Config, dataset
from diffjax.experiment.config import Data, from_json, to_json

ROOT = Path(__file__).parents[1]


def arrays(dtype, n=(23, 5), labels=True):
    rng = np.random.default_rng(0)
    part = lambda n: data.Examples(
        rng.integers(0, 256, (n, 6, 4, 3)).astype(dtype) / np.array(255).astype(dtype)
        if dtype != np.uint8
        else rng.integers(0, 256, (n, 6, 4, 3), np.uint8),
        rng.integers(0, 3, n) if labels else None,
    )
    return data.Dataset(*map(part, n))


def read(path, **options):
    return data.load("records", path, **options)


@pytest.mark.parametrize(
    ("dtype", "encoding"),
    [(np.uint8, "raw"), (np.uint8, "png"), (np.float32, "raw")],
)
def test_records_hold_what_was_converted(tmp_path, dtype, encoding):
    for labels in (True, False):
        given = arrays(dtype, labels=labels)
        dest = tmp_path / f"{labels}"
        manifest = conversion.convert(given, dest, encoding, shard=10)
        assert [seal.n for seal in manifest["parts"]["train"]["shards"]] == [10, 10, 3]
        for found, part in zip(read(dest), given, strict=True):
            np.testing.assert_array_equal(found.x[:], part.x)
            index = np.array([4, 0, 4, len(part.x) - 1])
            np.testing.assert_array_equal(found.x[index], part.x[index])
            assert (found.label is None) == (not labels)
            np.testing.assert_array_equal(found.label, part.label)
            batch = functools.partial(data.train_batch, seed=3, step=7, batch_size=4)
            jax.tree.map(np.testing.assert_array_equal, batch(found), batch(part))


def test_jpeg_is_near_what_was_converted(tmp_path):
    ramp = np.broadcast_to(np.linspace(0, 255, 32).astype(np.uint8)[:, None, None], (32, 32, 3))
    part = data.Examples(np.stack([ramp] * 2))
    conversion.convert(data.Dataset(part, part), tmp_path / "r", "jpeg")
    assert abs(read(tmp_path / "r").train.x[:].astype(int) - part.x).max() < 5


def test_a_conversion_that_was_stopped_goes_on(tmp_path, monkeypatch):
    given = arrays(np.uint8)
    conversion.convert(given, tmp_path / "whole", shard=4)
    write, count = conversion._write_shard, iter(range(100))

    def two_shards(*args):
        if next(count) == 2:
            raise KeyboardInterrupt
        return write(*args)

    monkeypatch.setattr(conversion, "_write_shard", two_shards)
    with pytest.raises(KeyboardInterrupt):
        conversion.convert(given, tmp_path / "stopped", shard=4)
    with pytest.raises(FileNotFoundError, match=r"manifest\.json"):
        read(tmp_path / "stopped")
    first = tmp_path / "stopped/train-00000-of-00006.array_record"
    before = first.stat().st_mtime_ns
    monkeypatch.setattr(conversion, "_write_shard", write)
    with pytest.raises(ValueError, match="another conversion, of other encoding"):
        conversion.convert(given, tmp_path / "stopped", "png", shard=4)
    conversion.convert(given, tmp_path / "stopped", shard=4)
    assert first.stat().st_mtime_ns == before
    files = lambda folder: {p.name: p.read_bytes() for p in (tmp_path / folder).iterdir()}
    assert files("stopped") == files("whole")


def test_damage_is_named(tmp_path):
    given = arrays(np.uint8)
    manifest = conversion.convert(given, tmp_path, shard=10)
    shard = tmp_path / manifest["parts"]["train"]["shards"][1].file
    whole = shard.read_bytes()
    at = whole.index(given.train.x[12].tobytes())
    shard.write_bytes(whole[: at + 9] + bytes([whole[at + 9] ^ 1]) + whole[at + 10 :])
    records._open.cache_clear()
    found = read(tmp_path).train.x
    np.testing.assert_array_equal(found[np.arange(10)], given.train.x[:10])
    with pytest.raises(data.UnreadableError, match="a damaged record"):
        found[np.array([12])]
    shard.write_bytes(whole[:-1])
    with pytest.raises(FileNotFoundError, match=rf"{shard.name} is missing, or not of"):
        read(tmp_path)
    shard.write_bytes(whole)
    label = tmp_path / "train-labels.npy"
    np.save(label, np.roll(np.load(label), 1))
    with pytest.raises(ValueError, match="train-labels.npy has other content"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 2, need 1"),
        ({"encoding": "zip"}, "encoding 'zip'"),
        ({"dtype": "object"}, "encoding 'raw' of object"),
        ({"shape": [2**20, 2**20]}, r"an example of shape \(1048576, 1048576\)"),
        ({"shape": [6, 4, 1]}, "damaged record"),
        ({"parts": {}}, "not a manifest of records"),
        ({"parts": {"train": {"shards": [["../x", 1, 1, ""]]}}}, "not a manifest|is missing"),
    ],
)
def test_a_manifest_of_something_else_is_refused(tmp_path, change, message):
    conversion.convert(arrays(np.uint8), tmp_path)
    path = tmp_path / records.MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read(tmp_path).train.x[np.array([0])]


def test_impossible_conversions_are_refused(tmp_path, monkeypatch):
    run = lambda *argv: convert.main([*argv[:1], str(tmp_path / "out"), *argv[1:]])
    for argv, message in (
        (["nothing"], r"unknown data set 'nothing': one of .*folder.*parquet, tar, tfds"),
        (["digits"], "unknown data set 'digits'"),  # 17 levels, which records do not say
        (["folder", "--path=x", "--preset=imagenet"], "unknown preset 'imagenet'"),
        (["folder", "--path=x", "--preset=imagenet64", "--size=32"], "says what size is"),
        (["folder", f"--path={tmp_path}", "--crop=adm"], "crop=adm: needs a size"),
        (["folder", f"--path={tmp_path}", "--size=8", "--crop=oval"], "unknown crop 'oval'"),
        (["tar", "--size=8"], "there is no such archive"),
        (["tar", f"--path={tmp_path}"], "need a side"),
        (["tar", f"--path={tmp_path}", "--size=8"], r"holds no file \.tar"),
        (["two_moons", "--encoding=png"], "needs images of bytes"),
        (["two_moons", "--encoding=gif"], "unknown encoding 'gif': one of raw, png, jpeg"),
        (["two_moons", "--shard=0"], "shard=0: must be at least 1"),
        (["two_moons", "--workers=-1"], "workers=-1: must be at least 0"),
        (["tar", "--path=gs://b/x"], "gs://b/x is not on this machine: copy it to a disk first"),
        (["tar", "--path=s3://b/x"], "s3://b/x is not on this machine: give a path"),
    ):
        with pytest.raises(SystemExit, match=message):
            run(*argv)
    monkeypatch.chdir(tmp_path)
    upload = "gs://b/x is not on this machine: convert to a disk, then `gcloud storage cp -r"
    with pytest.raises(SystemExit, match=upload):
        convert.main(["two_moons", "gs://b/x"])
    assert not list(tmp_path.iterdir())
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").touch()
    with pytest.raises(SystemExit, match="is not empty"):
        run("two_moons")
    monkeypatch.setattr(records.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(SystemExit, match=r"records need ArrayRecord: pip install '\.\[data\]'"):
        run("two_moons")


def test_mirror_images_follow_the_images(tmp_path):
    given = arrays(np.uint8)
    conversion.convert(given._replace(train=conversion.mirrored(given.train)), tmp_path / "r")
    found = read(tmp_path / "r").train
    np.testing.assert_array_equal(found.x[:23], given.train.x)
    np.testing.assert_array_equal(found.x[23:], given.train.x[:, :, ::-1])
    np.testing.assert_array_equal(found.label, np.tile(given.train.label, 2))
    with pytest.raises(ValueError, match="are no images"):
        conversion.mirrored(data.Examples(np.zeros((3, 2), np.float32)))


# Archives.


def picture(i, size=(12, 10)):
    return Image.fromarray(np.random.default_rng(i).integers(0, 256, (*size, 3), np.uint8))


def encoded(i):
    file = io.BytesIO()
    picture(i).save(file, format="PNG")
    return file.getvalue()


N = 20


def write_tar(path, names, contents):
    with tarfile.open(path, "w") as file:
        for name, content in zip(names, contents, strict=True):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))


def web(path):
    for k, split in enumerate(("train", "val")):
        names, contents = [], []
        for i in range(k * N // 2, (k + 1) * N // 2):
            names += [f"{i:05}.png", f"{i:05}.cls", f"{i:05}.txt"]
            contents += [encoded(i), b"%d" % (i % 3), b"a caption"]
        write_tar(path / f"{split}-0.tar", names, contents)


def tar_of_folders(path):
    names = [f"./class{i % 3}/{i}.png" for i in range(N)]
    write_tar(path / "all.tar", names, map(encoded, range(N)))


def parquet(path):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    for k, split in enumerate(("train", "test")):
        numbers = range(k * N // 2, (k + 1) * N // 2)
        column = [{"bytes": encoded(i), "path": f"{i}.png"} for i in numbers]
        table = arrow.table({"image": column, "label": [i % 3 for i in numbers]})
        parquet.write_table(table, path / f"{split}-00000.parquet", row_group_size=3)


@pytest.mark.parametrize(
    ("kind", "write"), [("tar", web), ("tar", tar_of_folders), ("parquet", parquet)]
)
def test_archives_are_converted(tmp_path, kind, write, capsys):
    source = tmp_path / "source"
    source.mkdir()
    write(source)
    convert.main([kind, str(tmp_path / "out"), f"--path={source}", "--size=4", "--shard=6"])
    found = read(tmp_path / "out")
    expected = np.stack([images.decode(encoded(i), "", 4, 3) for i in range(N)])
    held_out = np.arange(N) >= N // 2
    if write is tar_of_folders:
        held_out = np.array([images.held_out(f"./class{i % 3}/{i}.png") for i in range(N)])
    for part, chosen in zip(found, (~held_out, held_out), strict=True):
        np.testing.assert_array_equal(part.x[:], expected[chosen])
        np.testing.assert_array_equal(part.label, np.arange(N)[chosen] % 3)


def test_what_an_archive_cannot_give_is_named_or_skipped(tmp_path, capsys):
    contents = [encoded(i) if i != 3 else encoded(i)[:50] for i in range(N)]
    names = [f"{i:05}.png" for i in range(N)]
    for split, part in (("train", slice(0, 10)), ("test", slice(10, N))):
        write_tar(tmp_path / f"{split}.tar", names[part], contents[part])
    argv = ["tar", str(tmp_path / "out"), f"--path={tmp_path}", "--size=4"]
    with pytest.raises(SystemExit, match=r"train\.tar, 00003\.png: not a readable image"):
        convert.main(argv)
    convert.main([*argv, "--unreadable=skip"])
    assert "10 of 10 examples, 1 skipped" in capsys.readouterr().out
    x = read(tmp_path / "out").train.x
    kept = [i for i in range(10) if i != 3]
    expected = [images.decode(contents[i], "", 4, 3) for i in kept]
    np.testing.assert_array_equal(x[:], np.stack(expected))


# Crops.


def test_area_is_the_mean_of_pixels_and_adm_keeps_the_centre():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (12, 20, 3), np.uint8)
    image = Image.fromarray(pixels)
    mean = pixels[:, 4:16].reshape(3, 4, 3, 4, 3).mean((1, 3))
    np.testing.assert_allclose(images.CROPS["area"](image, 3), mean, atol=1)
    # A power of two is halved only, so that ADM's crop is the mean as well.
    mean = pixels[:, 4:16].reshape(6, 2, 6, 2, 3).mean((1, 3))
    np.testing.assert_allclose(images.CROPS["adm"](image, 6), mean, atol=1)
    # What is symmetric stays so, at any scale.
    both = Image.fromarray(np.concatenate([pixels, pixels[:, ::-1]], 1))
    found = np.asarray(images.CROPS["adm"](both, 6), int)
    np.testing.assert_allclose(found, found[:, ::-1], atol=1)
    assert images.CROPS["adm"](picture(0, (37, 91)), 16).size == (16, 16)


def test_a_folder_is_decoded_once(tmp_path, monkeypatch):
    folder, scanned = tmp_path / "folder", tmp_path / "run" / dataset.SCANNED
    folder.mkdir()
    for i in range(40):
        picture(i).save(folder / f"{i}.png")
    load = lambda size=4: data.load("folder", folder, size, scanned=scanned)
    first = load()
    decoded = []
    real = images.read
    monkeypatch.setattr(images, "read", lambda *args: decoded.append(args[0]) or real(*args))
    again = load()
    assert not decoded
    assert data.fingerprint(again.train) == data.fingerprint(first.train)
    load(size=5)  # a crop of another size may fail
    assert len(decoded) == 40
    load()
    decoded.clear()
    picture(0).save(folder / "0.png", optimize=True)
    assert len(load().train.x) == len(first.train.x) and len(decoded) == 40
    scanned.write_text(scanned.read_text()[:-5])
    decoded.clear()
    load()
    assert len(decoded) == 40


# The order of many examples.


@pytest.mark.parametrize("n", [1, 2, 3, 10, 1000, 65_537])
def test_a_computed_order_has_every_example_once(n):
    orders = [
        batches.feistel(seed, epoch, n, np.arange(n)) for seed, epoch in ((0, 0), (0, 1), (1, 0))
    ]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(n))
    if n >= 1000:  # fixed points, and equal places of two orders: about one, as of random ones
        for a, b in ((np.arange(n), orders[0]), (orders[0], orders[1]), (orders[0], orders[2])):
            assert (a == b).sum() < 8
        # Neighbours are not near each other: the mean distance of two random numbers is n / 3.
        np.testing.assert_allclose(abs(np.diff(orders[0])).mean(), n / 3, rtol=0.1)


def test_a_hundred_million_examples_take_no_memory():
    n, order = 100_000_000, batches.order_of(100_000_000)
    assert order == "feistel"
    tracemalloc.start()
    index = data.batch_indices(0, 1_000_000, n, 256)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 200_000
    np.testing.assert_array_equal(index, data.batch_indices(0, 1_000_000, n, 256, "feistel"))
    assert len(set(index)) == 256 and index.min() >= 0 and index.max() < n


def test_a_run_records_an_order_that_depends_on_its_size():
    few, many = (
        data.Examples(np.broadcast_to(np.uint8(0), (n, 8, 8, 1))) for n in (2**22, 2**22 + 1)
    )
    recorded = lambda examples, **d: dataset.recorded(Config(data=Data(**d)), examples).data.order
    assert recorded(few) is None  # as in runs of earlier versions
    assert recorded(many) == "feistel" and recorded(many, order="shuffle") == "shuffle"
    config = dataset.recorded(Config(), many)
    assert from_json(to_json(config)) == config
    with pytest.raises(ValueError, match="unknown order 'x': one of shuffle, feistel"):
        dataclasses.replace(Data(), order="x").check()


@pytest.mark.faults
def test_a_conversion_that_is_killed_goes_on(tmp_path):
    """A thousand classes of images of mixed sizes, some damaged, with two workers."""
    source = tmp_path / "source"
    for i in range(3000):
        folder = source / f"n{i % 1000:08}"
        folder.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(i)
        picture(i, tuple(rng.integers(20, 90, 2))).save(folder / f"{i}.JPEG")
    for i in (5, 77, 1234):
        path = source / f"n{i % 1000:08}" / f"{i}.JPEG"
        path.write_bytes(path.read_bytes()[:100])
    argv = ["-m", "diffjax.data.convert", "folder", "OUT", f"--path={source}", "--size=16"]
    argv += ["--crop=adm", "--unreadable=skip", "--shard=200", "--workers=2"]
    command = lambda out: [sys.executable, *(out if a == "OUT" else a for a in argv)]
    subprocess.run(command(str(tmp_path / "whole")), cwd=ROOT, check=True, capture_output=True)
    out = tmp_path / "killed"
    process = subprocess.Popen(command(str(out)), cwd=ROOT, stdout=subprocess.DEVNULL)
    while process.poll() is None and len(list(out.glob("*.seal.json"))) < 4:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (out / records.MANIFEST).exists()
    subprocess.run(command(str(out)), cwd=ROOT, check=True, capture_output=True)
    files = lambda folder: {p.name: p.read_bytes() for p in (tmp_path / folder).iterdir()}
    assert files("killed") == files("whole")
    found = read(out)
    assert len(found.train.x) + len(found.test.x) == 2997
    assert set(found.train.label) | set(found.test.label) == set(range(1000))
