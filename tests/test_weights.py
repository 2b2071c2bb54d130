"""Networks as files: whole, ours, and the same bits again, or refused."""

import dataclasses
import functools
import json
import resource
import shutil
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import unflatten_dict

from diffjax import checkpoint, data
from diffjax.evaluation import classifier, sampling
from diffjax.experiment import command_line, config as config_lib, dataset, resolve
from diffjax.published import PRETRAINED, export, weights

CONFIG = command_line.from_file("configs/digits.py:smoke")


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    needs = weights.expected(CONFIG)
    flat = {name: rng.standard_normal(x.shape).astype(x.dtype) for name, x in needs.items()}
    flat["embed_0/kernel"] = np.asfortranarray(flat["embed_0/kernel"])
    flat["conv_in/bias"][:3] = -0.0, 1e-42, np.nan  # which only bits tell from others
    return unflatten_dict(flat, sep="/")


@pytest.fixture
def file(tmp_path, params):
    weights.save(tmp_path / "net.safetensors", params, CONFIG)
    return tmp_path / "net.safetensors"


def assert_same_bits(a, b):
    bits = lambda x: np.ascontiguousarray(x).view(np.uint32)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(bits(x), bits(y)), a, b)


def rewrite(path, change=dict, metadata=dict):
    """Write the file anew, with its arrays and metadata changed."""
    with safetensors.safe_open(path, "numpy") as opened:
        was = opened.metadata()
    arrays = safetensors.numpy.load_file(path)
    safetensors.numpy.save_file(change(arrays), path, metadata(was))


def test_what_is_written_is_read_back_bit_for_bit(file, params):
    got, config = weights.read(file)
    assert_same_bits(got, params)
    data = dataclasses.replace(CONFIG.data, shape=(8, 8, 1))
    assert config == dataclasses.replace(CONFIG, data=data)
    assert [path.name for path in file.parent.iterdir()] == ["net.safetensors"]


def test_an_exported_run_is_loaded_as_the_run_is(finished, tmp_path, monkeypatch, capsys):
    file = tmp_path / "run.safetensors"
    monkeypatch.setattr(sys, "argv", ["export", str(finished), str(file)])
    monkeypatch.setattr(dataset, "load_data", lambda *_: pytest.fail("read the data"))
    export.main()
    assert "digits, target eps" in capsys.readouterr().out
    (network, params, config), (again, same, whence) = map(checkpoint.load, (file, finished))
    assert_same_bits(params, same)
    assert config == whence and config.data.shape == (8, 8, 1)
    inputs = jnp.ones((2, 8, 8, 1)), jnp.zeros(2), {"label": jnp.zeros(2, int)}
    assert jnp.array_equal(jax.jit(network)(params, *inputs), jax.jit(again)(same, *inputs))


def test_whatever_load_takes_is_exported(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for source in ("digits", str(file)):
        export.main([source, "again.safetensors"])
        (_, params, config), (_, same, whence) = map(checkpoint.load, (source, "again.safetensors"))
        assert_same_bits(params, same)
        assert config == whence
    with pytest.raises(SystemExit, match="error: there is no nowhere"):
        export.main(["nowhere", "again.safetensors"])


@pytest.mark.parametrize("place", ["header", "array"])
def test_one_flipped_bit_is_found(file, place):
    data = bytearray(file.read_bytes())
    data[20 if place == "header" else -1000] ^= 1
    file.write_bytes(data)
    with pytest.raises(
        ValueError, match=r"net\.safetensors .*(is damaged|not a readable|has no|of another)"
    ):
        weights.read(file)


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04", b"\xff" * 100, b'{"config": 1}'])
def test_what_is_no_such_file_is_refused(file, data):
    file.write_bytes(data)
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        checkpoint.load(file)


def test_a_truncated_file_is_refused(file):
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        weights.read(file)


def with_config(change):
    """A change of a file's metadata: that of its config, as JSON."""

    def changed(metadata):
        tree = json.loads(metadata[weights.CONFIG])
        change(tree)
        return metadata | {weights.CONFIG: json.dumps(tree)}

    return changed


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (lambda _: {}, "holds no config: diffjax has not written it"),
        (lambda m: m | {weights.CONFIG: "{"}, "no config of this diffjax"),
        (with_config(lambda c: c["model"].update(kind="ViT")), "no config of this diffjax.*ViT"),
        (with_config(lambda c: c.update(schedule="steep")), "unknown schedule 'steep'"),
        (
            with_config(lambda c: c["model"].update(width=16)),
            r"conv_in/kernel: it has float32\[3, 3",
        ),
        (with_config(lambda c: c["data"].update(shape=[8, 8, 3])), r"makes float32\[3, 3, 3, 8\]"),
        (lambda m: {weights.CONFIG: m[weights.CONFIG]}, "is damaged"),
    ],
)
def test_a_config_that_is_missing_or_of_another_network_is_refused(file, metadata, message):
    rewrite(file, metadata=metadata)
    with pytest.raises(ValueError, match=message):
        weights.read(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda a: {"more": a["conv_in/bias"]} | a,
            r"more: it has float32\[8\], the config makes None",
        ),
        (lambda a: {k: a[k] for k in a if k != "conv_in/bias"}, "conv_in/bias: it has None"),
        (lambda a: a | {"conv_in/bias": np.zeros(9, "f4")}, r"conv_in/bias: it has float32\[9\]"),
        (lambda a: a | {"conv_in/bias": a["conv_in/bias"].astype("f2")}, r"it has float16\[8\]"),
    ],
)
def test_arrays_of_another_network_are_refused(file, change, message):
    rewrite(file, change)
    with pytest.raises(ValueError, match=message):
        weights.read(file)
    with pytest.raises(ValueError, match="of another network"):
        weights.save(file, safetensors.numpy.load_file(file), CONFIG)


def test_a_full_disk_leaves_the_old_file(file, params):
    before, limits = file.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
    try:
        with pytest.raises(OSError, match="could not be written"):
            weights.save(file, params, CONFIG)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_a_name_that_is_nothing_is_refused_with_the_choices():
    with pytest.raises(
        FileNotFoundError, match="come with diffjax, digits, fashion_mnist, fashion_map"
    ):
        checkpoint.load("digit")


def seen_in_noise(name):
    """What a model that comes with diffjax sees of each class where there is little but noise."""
    network, params, config = checkpoint.load(name)
    e = resolve(config)
    denoise = e.clip(e.denoiser(functools.partial(network, params)))
    noise = jax.random.normal(jax.random.key(0), (10, *dataset.example_shape(config)))
    return np.asarray(jax.jit(denoise)(noise, 0.9, {"label": jnp.arange(10)}).x_0)


def test_the_digits_that_come_with_diffjax_look_like_digits():
    x, label = data.all_examples(data.load("digits"))
    means = np.stack([x[label == i].mean(0).ravel() for i in range(10)])
    alike = np.corrcoef(means, seen_in_noise("digits").reshape(10, -1))[:10, 10:]
    assert (alike.argmax(0) == np.arange(10)).sum() >= 8


def test_the_clothes_that_come_with_diffjax_look_like_clothes():
    x = seen_in_noise("fashion_mnist")
    sandals, shirts = (x[label].mean() + 1 for label in (5, 6))
    assert sandals < 0.6 * shirts
    assert x[:, :, 0].mean() < -0.8  # an empty edge


def test_the_flow_map_that_comes_with_diffjax_draws_clothes_in_one_evaluation():
    _, params, config = checkpoint.load("fashion_map")
    assert (config.sampling.sampler, config.sampling.steps) == ("jump", 1)
    index = np.arange(100, dtype=np.int32)
    generate = sampling.make_generate(resolve(config), dataset.example_shape(config))
    x = jax.jit(generate)(params, {"index": index, "label": index % 10})
    drawn = data.Examples(np.asarray(x), index % 10)
    assert classifier.accuracy(classifier.load(), drawn) > 0.8
    # In one step a denoiser draws much the same image of a class each time: 0.07.
    assert drawn.x.reshape(10, 10, -1).std(0).mean() > 0.14


def test_a_path_that_is_there_comes_before_a_name(monkeypatch, tmp_path, file):
    monkeypatch.chdir(tmp_path)
    assert checkpoint.load("digits")[2] == weights.read(PRETRAINED["digits"])[1]
    shutil.copy(file, "digits")
    assert checkpoint.load("digits")[2] == weights.read(file)[1] != CONFIG


ABSURD = {
    "blocks": (lambda c: c["model"].update(blocks=10**6), "model.blocks=1000000: there are only"),
    "blocks of 10^30": (lambda c: c["model"].update(blocks=10**30), "more than 64 bits"),
    "levels": (lambda c: c["model"].update(mults=[1] * 10**5), "model.mults is .*at most 64"),
    "width": (lambda c: c["model"].update(width=2**40), "net.safetensors"),
    "table": (
        lambda c: c.update(schedule="linear_betas", schedule_options={"steps": 2 * 10**8}),
        "must be at least 1 and at most 1048576",
    ),
    "time steps": (lambda c: c.update(time_steps=2 * 10**8), "time_steps=200000000: must be at"),
    "grid": (lambda c: c["sampling"].update(steps=10**12), "sampling.steps=.*must be at most"),
    "shape": (lambda c: c["data"].update(shape=[2**20, 2**20, 1]), "data.shape=.*at most"),
    "no shape": (lambda c: c["data"].update(shape=None), "data.shape is missing"),
    "type": (lambda c: c["optimizer"].update(clip="x"), "optimizer.clip is 'x', need float"),
}


@pytest.mark.parametrize(("change", "message"), ABSURD.values(), ids=ABSURD)
def test_absurd_numbers_are_refused_at_once(file, change, message):
    rewrite(file, metadata=with_config(change))
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(ValueError, match=message):
        weights.read(file)
    assert time.monotonic() < began + 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 300 * 2**10


def test_a_run_that_measures_its_samples_is_written_without_its_files(tmp_path, params):
    measured = config_lib.Eval(features="inception", weights=tmp_path / "w.pth")
    config = dataclasses.replace(CONFIG, eval=measured, keep_best_by="eval_frechet")
    weights.save(tmp_path / "net.safetensors", params, config)
    assert weights.read(tmp_path / "net.safetensors")[1].eval == config_lib.Eval()
    assert b"w.pth" not in (tmp_path / "net.safetensors").read_bytes()


def test_what_a_file_says_about_a_machine_is_not_used(file, tmp_path):
    """Its path of data may be anything, and processes are started by the user alone."""

    def of_another_machine(config):
        config["data"].update(path=str(tmp_path / "pipe"), workers=64, name="folder")
        config.update(parallel="sharded", fsdp=8, steps_per_call=2, writers=["wandb"])
        config["eval"].update(features="inception", weights=str(tmp_path / "pipe"))
        config.update(keep_best_by="eval_frechet")

    rewrite(file, metadata=with_config(of_another_machine))
    config, default = weights.read(file)[1], config_lib.Config()
    assert (config.data.path, config.data.workers) == (None, 0)
    for name in weights.MACHINE:
        assert getattr(config, name) == getattr(default, name)
