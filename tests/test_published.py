"""Files of strangers: read without running them, or refused. Parity itself is in test_peers.py."""

import contextlib
import dataclasses
import functools
import io
import json
import os
import pickle
import random
import re
import resource
import sys
import time
import types
import zipfile

import jax
import numpy as np
import pytest
import safetensors.numpy
from test_edm2_unet import drawn

from catalogue import each
from diffjax import published
from diffjax.denoisers import time_input
from diffjax.experiment import config as config_lib, resolve, rules
from diffjax.models import EDM2UNetConfig, apply, make_module, sizes
from diffjax.published import torchfile, weights


class Storage:
    """What the fake PyTorch below pickles its tensors' numbers as."""

    def __init__(self, key, numbers):
        self.key, self.numbers = key, numbers


@pytest.fixture
def torch(monkeypatch):
    """As much of PyTorch's modules as its pickles name."""
    modules = {name: types.ModuleType(name) for name in ("torch", "torch._utils")}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)

    def _rebuild_tensor_v2(*_):
        raise AssertionError("never called")

    class FloatStorage:
        pass

    for thing, module in ((_rebuild_tensor_v2, "torch._utils"), (FloatStorage, "torch")):
        thing.__module__, thing.__qualname__ = module, thing.__name__
        setattr(modules[module], thing.__name__, thing)
    return modules


class Tensor:
    """A tensor of the fake PyTorch: a view of a storage."""

    def __init__(self, storage, offset, size, stride):
        self.view = storage, offset, size, stride, False, {}

    def __reduce__(self):
        return sys.modules["torch._utils"]._rebuild_tensor_v2, self.view


def pickled(thing, **changes):
    """The pickle, and the storages that it names."""
    out, storages = io.BytesIO(), {}

    class Pickler(pickle.Pickler):
        def persistent_id(self, thing):
            if not isinstance(thing, Storage):
                return None
            storages[thing.key] = thing.numbers
            size = changes.get("size", len(thing.numbers))
            return "storage", sys.modules["torch"].FloatStorage, thing.key, "cpu", size

    Pickler(out, 2).dump(thing)
    return out.getvalue(), storages


def as_zip(path, thing, compression=zipfile.ZIP_STORED, **changes):
    data, storages = pickled(thing, **changes)
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("net/data.pkl", data)
        archive.writestr("net/byteorder", changes.get("byteorder", "little"))
        for key, numbers in storages.items():
            archive.writestr(f"net/data/{key}", numbers.tobytes())


def as_stream(path, thing, **changes):
    data, storages = pickled(thing, **changes)
    head = torchfile.MAGIC, 1001, {"little_endian": True}
    parts = [*(pickle.dumps(x, 2) for x in head), data, pickle.dumps(list(storages), 2)]
    for numbers in storages.values():
        parts += [len(numbers).to_bytes(8, "little"), numbers.tobytes()]
    path.write_bytes(b"".join(parts))


FORMATS = [as_zip, as_stream]
NUMBERS = np.arange(12, dtype=np.float32)


@pytest.mark.parametrize("write", FORMATS)
def test_views_of_one_storage_are_read_as_they_are(torch, tmp_path, write):
    shared = Storage("0", NUMBERS)
    state = {
        "whole": Tensor(shared, 0, (3, 4), (4, 1)),
        "transposed": Tensor(shared, 0, (4, 3), (1, 4)),
        "column": Tensor(shared, 2, (3,), (4,)),
        "none": Tensor(shared, 0, (0, 5), (5, 1)),
    }
    write(tmp_path / "net.pt", state)
    got, whole = torchfile.read(tmp_path / "net.pt"), NUMBERS.reshape(3, 4)
    expected = {"whole": whole, "transposed": whole.T, "column": whole[:, 2]}
    expected["none"] = np.empty((0, 5), np.float32)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(got[name], value)


@pytest.mark.parametrize("write", FORMATS)
@pytest.mark.parametrize(
    "view",
    [
        (0, (13,), (1,)),
        (1, (12,), (1,)),
        (0, (3, 4), (5, 1)),
        (-1, (3,), (1,)),
        (11, (12,), (-1,)),
        (0, (2**40,), (0,)),
        (0, (3, 4), (1,)),
    ],
)
def test_a_tensor_that_reaches_outside_its_storage_is_refused(torch, tmp_path, write, view):
    write(tmp_path / "net.pt", {"x": Tensor(Storage("0", NUMBERS), *view)})
    with pytest.raises(ValueError, match=r"net\.pt: not a readable file of PyTorch .*a tensor"):
        torchfile.read(tmp_path / "net.pt")


@pytest.mark.parametrize("write", FORMATS)
@pytest.mark.parametrize("size", [11, 13, -1, 2**60])
def test_a_storage_that_lies_about_its_size_is_refused(torch, tmp_path, write, size):
    tensor = Tensor(Storage("0", NUMBERS), 0, (1,), (1,))
    write(tmp_path / "net.pt", {"x": tensor}, size=size)
    with pytest.raises(ValueError, match="storage 0"):
        torchfile.read(tmp_path / "net.pt")


def test_compressed_and_big_endian_files_are_refused(torch, tmp_path):
    as_zip(tmp_path / "net.pt", {}, zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="compressed"):
        torchfile.read(tmp_path / "net.pt")
    as_zip(tmp_path / "net.pt", {}, byteorder="big")
    with pytest.raises(ValueError, match="big endian"):
        torchfile.read(tmp_path / "net.pt")


class Command:
    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


class Stateful:
    def __reduce__(self):
        return types.SimpleNamespace, (), {"path": "torch._utils._rebuild_tensor_v2"}


@pytest.mark.parametrize("write", [*FORMATS, lambda p, thing: p.write_bytes(pickle.dumps(thing))])
def test_nothing_in_a_file_is_executed(torch, tmp_path, write):
    command = Command()
    command.path = tmp_path / "executed"
    write(tmp_path / "net.pt", {"a": command, "b": [Stateful()], "c": np.float64(0.5)})
    got = torchfile.read(tmp_path / "net.pt")
    assert not command.path.exists()
    assert got["a"].path in ("posix.system", "nt.system") and str(command.path) in got["a"].args[0]
    assert got["b"][0].path == "types.SimpleNamespace" and got["b"][0].state["path"]
    assert all(isinstance(x, torchfile.Record) for x in (got["a"], got["b"][0], got["c"]))


@pytest.mark.parametrize("write", FORMATS)
def test_damage_is_a_plain_refusal(torch, tmp_path, write):
    """Cut anywhere, or with a byte changed anywhere: read or refused, and never anything else."""
    path, rng = tmp_path / "net.pt", random.Random(0)
    write(path, {"x": Tensor(Storage("0", NUMBERS), 0, (3, 4), (4, 1))})
    whole = path.read_bytes()
    refused = []
    for _ in range(300):
        data = bytearray(whole)
        if rng.random() < 0.3:
            del data[rng.randrange(len(data)) :]
        else:
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data)
        try:
            torchfile.read(path)
        except ValueError as error:
            refused.append(str(error))
    assert len(refused) > 100
    assert all("net.pt: not a readable file of PyTorch" in error for error in refused)


LIST = b"\x80\x02(" + 100_000 * b"N" + b"lq\x00"
BOMBS = {
    "a large index of the memo": b"\x80\x02Nr\xff\xff\xff\x0f.",
    "copies of a list": LIST + 4000 * b"ctorch\nSize\nh\x00\x85R" + b".",
    "copies of arguments": LIST + b"ca\nb\nq\x01(" + 99_999 * b"N" + b"tq\x02"
    b"" + 4000 * b"h\x01h\x02R" + b".",
    "many classes": b"\x80\x02" + b"".join(b"ca\nc%d\n0" % i for i in range(10**5)) + b"N.",
    "many sets": b"\x80\x04" + 10**6 * b"\x8f" + b".",
    "a key that contains one tuple 2^60 times": b"\x80\x02}q\x00)" + 60 * b"2\x86" + b"Ns.",
    "an array of bytes that is not there": b"\x80\x05\x96" + (2**33).to_bytes(8, "little") + b".",
    "a frame that is not there": b"\x80\x04\x95" + (2**50).to_bytes(8, "little") + b".",
    "bytes that are not there": b"\x80\x04\x8e" + (2**50).to_bytes(8, "little") + b".",
}


def files_in_files(depth):
    """A pickle that reads itself, as bytes, a hundred times at each of some levels."""
    inner = pickle.dumps(0, 2)
    for _ in range(depth):
        data = b"\x80\x03B" + len(inner).to_bytes(4, "little") + inner + b"q\x00"
        calls = 100 * b"ctorch.storage\n_load_from_bytes\nh\x00\x85R0"
        inner = data + calls + b"."
    return inner


BOMBS["files in files"] = files_in_files(6)


@pytest.mark.parametrize("data", BOMBS.values(), ids=BOMBS)
def test_a_small_file_costs_neither_memory_nor_time(tmp_path, data):
    (tmp_path / "net.pt").write_bytes(data)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with contextlib.suppress(ValueError):
        torchfile.read(tmp_path / "net.pt")
    assert time.monotonic() < began + 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 300 * 2**10


def test_objects_that_contain_one_another_twice_are_visited_once(tmp_path):
    """2^100 modules, and as many tuples in an attribute that a message repeats."""
    pairs: tuple = ()
    for _ in range(100):
        pairs = pairs, pairs
    for net in (chain(100), chain(1, sigma_data=pairs), chain(1, name=pairs)):
        (tmp_path / "edm.pkl").write_bytes(pickle.dumps({"ema": net}, 4))
        with pytest.raises(ValueError, match=r"edm\.pkl"):
            published.load(tmp_path / "edm.pkl")


class Scripted:
    """A module as TorchScript has it: an object whose attributes are tensors, numbers, modules."""

    def __init__(self, **attributes):
        self.__dict__ |= attributes


def test_the_arrays_of_torchscript_are_read_without_its_code(torch, tmp_path):
    kernel = Tensor(Storage("0", NUMBERS), 0, (3, 4), (4, 1))
    conv = Scripted(weight=kernel, stride=2)
    layers = Scripted(conv=conv, training=False, again=conv)
    as_zip(tmp_path / "net.pt", Scripted(layers=layers, is_optimized=None))
    with zipfile.ZipFile(tmp_path / "net.pt", "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("net/code/__torch__.py", "import os; os.abort()\n" * 9)
    found = torchfile.arrays(torchfile.read(tmp_path / "net.pt"))
    assert list(found) == ["layers.conv.weight"]
    np.testing.assert_array_equal(found["layers.conv.weight"], NUMBERS.reshape(3, 4))


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("dtype", ["<f4", ">f8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_that_numpy_pickled_are_rebuilt_from_their_numbers(tmp_path, protocol, dtype, order):
    x = np.asarray(np.random.default_rng(0).standard_normal((3, 4)), dtype, order=order)
    (tmp_path / "stats.pkl").write_bytes(pickle.dumps({"mu": x, "n": 3}, protocol))
    found = torchfile.read(tmp_path / "stats.pkl")
    got = torchfile.numpy_array(found["mu"])
    assert got.dtype == x.dtype.newbyteorder("=") and found["n"] == 3
    np.testing.assert_array_equal(got, x)
    for bad in (np.array([print]), np.arange(3), "mu"):
        (tmp_path / "bad.pkl").write_bytes(pickle.dumps(bad, protocol))
        with pytest.raises(ValueError, match="not an array that NumPy pickled"):
            torchfile.numpy_array(torchfile.read(tmp_path / "bad.pkl"))


class Pickled:
    """An object that is pickled as EDM's are: as a call with the metadata of its class."""

    def __init__(self, **meta):
        self.meta = meta

    def __reduce__(self):
        return types.SimpleNamespace, (self.meta,)


def chain(depth, name="SongUNet", **state):
    """A network in which each module has the next one as both of its parts."""
    module = Pickled(class_name=name, state={})
    for _ in range(depth):
        parts = {"model": module, "b": module}
        module = Pickled(class_name="SongUNet", state={"_modules": parts})
    return Pickled(class_name="EDMPrecond", state={"_modules": {"model": module}} | state)


def test_what_is_no_published_network_is_refused(torch, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no"):
        published.load(tmp_path / "64x64_diffusion.pt")
    (tmp_path / "net.onnx").touch()
    with pytest.raises(ValueError, match=r"can read a folder of diffusers, a \.pt"):
        published.load(tmp_path / "net.onnx")
    as_zip(tmp_path / "mine.pt", {})
    with pytest.raises(ValueError, match="its name is none of cifar10_uncond_50M_500K"):
        published.load(tmp_path / "mine.pt")
    bias = Tensor(Storage("0", NUMBERS), 0, (12,), (1,))
    as_zip(tmp_path / "cifar10_uncond_50M_500K.pt", {"out.2.bias": bias, "extra": bias})
    with pytest.raises(ValueError, match="taken for:\n  time_embed|taken for:\n  input_blocks"):
        published.load(tmp_path / "cifar10_uncond_50M_500K.pt")
    (tmp_path / "edm.pkl").write_bytes(pickle.dumps({"ema": os}.keys().__class__.__name__))
    with pytest.raises(ValueError, match="need EDMPrecond of DhariwalUNet"):
        published.load(tmp_path / "edm.pkl")


def test_an_upsampler_of_openai_sees_the_image_but_not_its_noise():
    arrays = weights.expected(published.openai.PUBLISHED["upsample_cond_500K"].config)
    assert arrays["conv_in/kernel"].shape == (3, 3, 6, 192)
    assert arrays["embed_0/kernel"].shape == (192, 768)


def shapes_of_edm(**more):
    """Some of the arrays of EDM's DDPM++ for CIFAR-10, which say the rest; and more."""
    sizes = [(size, i) for size in (32, 16, 8) for i in range(4)]
    blocks = {f"enc.{size}x{size}_block{i}.conv1.weight": (256, 256, 3, 3) for size, i in sizes}
    attention = {f"enc.16x16_block{i}.qkv.weight": (768, 256, 1, 1) for i in range(4)}
    shapes = {"enc.32x32_conv.weight": (128, 3, 3, 3)} | blocks | attention | more
    return {name: np.ones(shape, np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("outer", published.edm.PRECONDITIONINGS)
@pytest.mark.parametrize("ncsnpp", [False, True], ids=["ddpm++", "ncsn++"])
def test_edms_arrays_say_what_the_network_is(outer, ncsnpp):
    state = shapes_of_edm()
    if ncsnpp:
        state = shapes_of_edm(**{"map_noise.freqs": (128,), "map_label.weight": (256, 10)})
        state["enc.16x16_aux_residual.weight"] = np.zeros((256, 3, 3, 3))
        taps = np.outer([1, 3, 3, 1], [1, 3, 3, 1]) / 64
        state["enc.16x16_down.conv0.resample_filter"] = taps[None, None].astype(np.float32)
    config = published.edm.make_config(None, state, outer, "SongUNet")
    c = config.model
    assert (c.width, c.mults, c.blocks, c.attention) == (128, (2, 2, 2), 4, (16,))
    assert (c.fourier, c.residual_input, c.labels) == (ncsnpp, ncsnpp, 10 * ncsnpp)
    assert c.taps == ((0.125, 0.375, 0.375, 0.125) if ncsnpp else (1.0, 1.0))
    rules.check(config)
    assert config_lib.from_json(config_lib.to_json(config)) == config


C_NOISE = {
    "EDMPrecond": lambda s: np.log(s) / 4,
    "VPPrecond": lambda s: 999 * (np.sqrt(0.1**2 + 2 * 19.9 * np.log1p(s**2)) - 0.1) / 19.9,
    "VEPrecond": lambda s: np.log(s / 2),
}
"""Karras et al. 2022, table 1; for VP with their equation for t of sigma."""


@pytest.mark.parametrize("outer", C_NOISE)
def test_edms_networks_see_c_noise(outer):
    config = published.edm.make_config(None, shapes_of_edm(), outer, "SongUNet")
    schedule = resolve(config).schedule
    log_snr = schedule.log_snr(np.array([0.1, 0.5, 0.9, 1.0], np.float32))
    sees = lambda x_t, level, cond: config.model.log_snr_scale * level + config.model.log_snr_shift
    sees = time_input(sees, schedule, config.time_steps) if config.time_input else sees
    expected = C_NOISE[outer](np.exp(-np.asarray(log_snr, float) / 2))
    np.testing.assert_allclose(sees(None, log_snr, None), expected, rtol=1e-6, atol=1e-5)


class Module:
    """A module as EDM's pickles have it: a call with its class and its state."""

    def __init__(self, name, **state):
        self.meta = {"type": "class", "class_name": name, "state": state}

    def __reduce__(self):
        return types.SimpleNamespace, (self.meta,)


class Embedded:
    """A storage as it is in EDM's pickles: the bytes of a stream of its own."""

    def __init__(self, numbers):
        self.numbers = numbers

    def __reduce__(self):
        parts = []
        as_stream(types.SimpleNamespace(write_bytes=parts.append), Storage("0", self.numbers))
        return sys.modules["torch.storage"]._load_from_bytes, (b"".join(parts),)


@pytest.fixture
def with_storage(torch, monkeypatch):
    """The function of PyTorch that reads such a stream."""

    def _load_from_bytes(_):
        raise AssertionError("never called")

    module = types.ModuleType("torch.storage")
    _load_from_bytes.__module__, _load_from_bytes.__qualname__ = module.__name__, "_load_from_bytes"
    module._load_from_bytes = _load_from_bytes
    monkeypatch.setitem(sys.modules, module.__name__, module)


EDM2_LAYERS = {"conv_res0": 3, "conv_res1": 3, "conv_skip": 1, "attn_qkv": 1, "attn_proj": 1}
"""Sides of the kernels of EDM2's blocks."""
EDM2_BLOCKS = {  # channels: in, out; whether there is attention; where the skip is
    "enc.8x8_block0": (64, 64, False),
    "enc.4x4_down": (64, 64, False),
    "enc.4x4_block0": (64, 128, True),
    "dec.4x4_in0": (128, 128, True),
    "dec.4x4_in1": (128, 128, False),
    "dec.4x4_block0": (256, 128, True),
    "dec.4x4_block1": (192, 128, True),
    "dec.8x8_up": (128, 128, False),
    "dec.8x8_block0": (192, 64, False),
    "dec.8x8_block1": (128, 64, False),
}


def shapes_of_edm2():
    """The shapes of a small network of EDM2's, by their names."""
    shapes = {
        "unet.emb_fourier.freqs": (64,),
        "unet.emb_fourier.phases": (64,),
        "unet.emb_noise.weight": (128, 64),
        "unet.emb_label.weight": (128, 5),
        "unet.enc.8x8_conv.weight": (64, 4, 3, 3),
        "unet.out_conv.weight": (3, 64, 3, 3),
        "unet.out_gain": (),
        "logvar_fourier.freqs": (128,),
        "logvar_fourier.phases": (128,),
        "logvar_linear.weight": (1, 128),
    }
    for block, (n, m, attends) in EDM2_BLOCKS.items():
        # On the way down, the skip's convolution comes before the branch.
        first = m if block.startswith("enc") else n
        layers = {"conv_res0": (m, first), "conv_res1": (m, m)}
        layers |= {"conv_skip": (m, n)} if n != m else {}
        layers |= {"attn_qkv": (3 * m, m), "attn_proj": (m, m)} if attends else {}
        for layer, shape in layers.items():
            side = EDM2_LAYERS[layer]
            shapes[f"unet.{block}.{layer}.weight"] = (*shape, side, side)
        shapes[f"unet.{block}.emb_linear.weight"] = (m, 128)
        shapes[f"unet.{block}.emb_gain"] = ()
    return shapes


def edm2_pickle(path, encoder=None, **changes):
    """A pickle in the form of EDM2's, whose arrays are drawn by their names."""
    net = Module("Precond", sigma_data=changes.pop("sigma_data", 0.5), _modules={})
    for name, shape in (shapes_of_edm2() | changes).items():
        if shape is None:
            continue
        x = np.float32(0.5 if name.endswith("emb_gain") else 1)
        x = np.asarray(drawn(name, shape) if shape else x, np.float32)
        strides = tuple(n // 4 for n in x.strides)
        tensor = Tensor(Embedded(x.ravel()), 0, x.shape, strides)
        *modules, leaf = name.split(".")
        inside = net
        for module in modules:
            kind = Module("UNet" if module == "unet" else "Part")
            inside = inside.meta["state"].setdefault("_modules", {}).setdefault(module, kind)
        inside.meta["state"].setdefault("_parameters", {})[leaf] = tensor
    found = {"ema": net, "dataset_kwargs": {}, "loss_fn": None}
    found |= {} if encoder is None else {"encoder": Module(encoder)}
    path.write_bytes(pickle.dumps(found, 4))
    return path


@pytest.mark.faults
def test_a_pickle_of_edm2_is_the_network_that_it_was(with_storage, tmp_path):
    """Six digits of its output, from the original, before the preconditioning."""
    counted = {n: x for n, x in shapes_of_edm2().items() if not n.endswith(("freqs", "phases"))}
    assert sum(int(np.prod(x)) for x in counted.values()) == 2_888_395
    params, config = published.load(edm2_pickle(tmp_path / "edm2.pkl"))
    assert config.model == EDM2UNetConfig(64, (1, 2), 1, (4,), labels=5)
    assert (config.data.shape, config.data.latents) == ((8, 8, 3), None)
    assert config.density_options == {"mean": 1.6, "std": 3.2}
    assert config_lib.from_json(config_lib.to_json(config)) == config
    x = np.random.default_rng(1).standard_normal((3, 3, 8, 8)).astype(np.float32)
    x = x[:2].transpose(0, 2, 3, 1)
    log_snr = -2 * np.log(np.array([0.01, 0.5], np.float32))
    network = functools.partial(apply, make_module(config.model), params)
    out = np.moveaxis(jax.jit(network)(x, log_snr, {"label": np.array([0, 3])}), -1, 1)
    expected = [[0.204468, 0.709266, -0.176070], [0.099590, 0.762674, -0.374659]]
    np.testing.assert_allclose([[f.mean(), f.std(), f[0, 0, 0]] for f in out], expected, atol=3e-6)


@pytest.mark.parametrize(
    ("encoder", "channels", "kind"),
    [
        ("StandardRGBEncoder", 3, None),
        ("StabilityVAEEncoder", 4, "edm2"),
        (None, 4, "edm2"),
        ("OtherEncoder", 3, ValueError),
    ],
)
def test_the_encoder_of_an_edm2_says_what_it_makes(with_storage, tmp_path, encoder, channels, kind):
    ends = {
        "unet.enc.8x8_conv.weight": (64, channels + 1, 3, 3),
        "unet.out_conv.weight": (channels, 64, 3, 3),
    }
    path = edm2_pickle(tmp_path / "edm2.pkl", encoder, **ends)
    if kind is ValueError:
        with pytest.raises(ValueError, match="encoder is OtherEncoder, need one of StandardRGB"):
            published.load(path)
        return
    config = published.load(path)[1]
    assert (config.data.shape, config.data.latents) == ((8, 8, channels), kind)
    mean, std = (1.6, 3.2) if kind is None else (0.8, 2.0)
    assert config.density_options == {"mean": mean, "std": std}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sigma_data": 1.0}, r"sigma_data=1\.0, need 0\.5"),
        ({"unet.emb_noise.weight": None}, "need EDM2's UNet, of which unet.emb_noise.weight is"),
        ({"unet.out_gain": None}, "unet.out_gain is missing"),
        ({"unet.dec.8x8_up.emb_gain": None}, r"unet\.dec\.8x8_up\.emb_gain is missing"),
        ({"unet.more.weight": (2, 2)}, r"unet\.more\.weight is not an array of this network"),
    ],
    ids=str,
)
def test_another_network_than_edm2_is_refused(with_storage, tmp_path, change, message):
    path = edm2_pickle(tmp_path / "edm2.pkl", **change)
    with pytest.raises(ValueError, match=rf"edm2\.pkl(.|\n)*{message}"):
        published.load(path)


@pytest.mark.parametrize(
    ("outer", "inner", "message"),
    [
        (Module("VPPrecond"), "DhariwalUNet", "VPPrecond of DhariwalUNet, need EDMPrecond of"),
        (Module("iDDPMPrecond"), "SongUNet", "iDDPMPrecond of SongUNet, need"),
        (Module("VPPrecond", beta_d=20.0), "SongUNet", r"beta_d=20\.0, need 19\.9"),
        (Module("EDMPrecond", sigma_data=1.0), "SongUNet", r"sigma_data=1\.0, need 0\.5"),
        (Module("EDMPrecond"), "SongUNet", "need a SongUNet, or a DhariwalUNet of at least 128"),
    ],
    ids=lambda x: x.meta["class_name"] if isinstance(x, Module) else None,
)
def test_a_network_of_edm_that_ours_cannot_be_is_refused(tmp_path, outer, inner, message):
    outer.meta["state"]["_modules"] = {"model": Module(inner)}
    (tmp_path / "edm.pkl").write_bytes(pickle.dumps({"ema": outer}))
    with pytest.raises(ValueError, match=message):
        published.load(tmp_path / "edm.pkl")


CIFAR = {
    "_class_name": "UNet2DModel",
    "sample_size": 32,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [128, 256, 256, 256],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 2,
    "downsample_padding": 0,
    "norm_eps": 1e-6,
    "attention_head_dim": None,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
}
"""As google/ddpm-cifar10-32 has it."""


def test_a_published_config_says_what_the_network_is(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CIFAR))
    config = published.diffusers.make_config(tmp_path, tmp_path)
    c = config.model
    assert (c.width, c.mults, c.blocks, c.attention, c.heads) == (128, (1, 2, 2, 2), 2, (16,), 1)
    assert config.target == "eps" and config.time_steps == 1000 and not c.pad_both
    # DDPM's last frequency is 1/10000 itself.
    assert c.embedding_period ** -(63 / 64) == pytest.approx(1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "UNet2DConditionModel"}, "need UNet2DModel"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type=fourier"),
        ({"center_input_sample": True}, "center_input_sample=True"),
        ({"mid_block_scale_factor": 2}, "mid_block_scale_factor=2"),
        ({"up_block_types": ["AttnUpBlock2D"] + ["UpBlock2D"] * 3}, "alike on the way down and up"),
        ({"down_block_types": ["SkipDownBlock2D"] * 4}, "SkipDownBlock2D"),
        ({"downsample_type": "resnet"}, "ResnetDownsampleBlock2D"),
        ({"block_out_channels": [128, 192, 256, 256]}, "need multiples"),
        ({"sample_size": [32, 64]}, "one number"),
        ({"layers_per_block": 0}, "at least 1"),
        ({"sample_size": "32"}, "one number"),
        ({"block_out_channels": None}, "not the network it is taken for: TypeError"),
    ],
)
def test_a_config_that_ours_cannot_be_is_refused(tmp_path, change, message):
    (tmp_path / "config.json").write_text(json.dumps(CIFAR | change))
    with pytest.raises(ValueError, match=message):
        published.load(tmp_path)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        ({"beta_schedule": "sigmoid"}, "'sigmoid' is not one of linear"),
        ({"prediction_type": "flow"}, "'flow' is not one of epsilon"),
        ({"variance_type": "learned"}, "'learned' is not one of fixed_small"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
    ],
)
def test_a_schedule_that_ours_cannot_be_is_refused(tmp_path, scheduler, message):
    (tmp_path / "config.json").write_text(json.dumps(CIFAR))
    (tmp_path / "scheduler_config.json").write_text(json.dumps(scheduler))
    with pytest.raises(ValueError, match=message):
        published.load(tmp_path)


WIDTH, BLOCKS, HEADS, PATCH, CLASSES, SIDE = 16, 2, 2, 2, 3, 8
"""Of the small transformers below, on latents of four channels."""


def sincos(n, width):
    """`[n n, width]`: the first half of the channels encodes the column, the second the row."""
    row, column = np.divmod(np.arange(n * n), n)
    waves = 10000.0 ** (-np.arange(width // 4) / (width // 4))
    halves = [at[:, None] * waves for at in (column, row)]
    return np.concatenate([f(half) for half in halves for f in (np.sin, np.cos)], axis=1)


def arrays_of_dit(outputs=8):
    """A DiT with random weights, in its own names."""
    d, hidden = WIDTH, 4 * WIDTH
    layers = {
        "x_embedder.proj": (d, 4, PATCH, PATCH),
        "t_embedder.mlp.0": (d, 256),
        "t_embedder.mlp.2": (d, d),
        "final_layer.linear": (PATCH**2 * outputs, d),
        "final_layer.adaLN_modulation.1": (2 * d, d),
    }
    for i in range(BLOCKS):
        inside = {"attn.qkv": (3 * d, d), "attn.proj": (d, d), "adaLN_modulation.1": (6 * d, d)}
        inside |= {"mlp.fc1": (hidden, d), "mlp.fc2": (d, hidden)}
        layers |= {f"blocks.{i}.{name}": shape for name, shape in inside.items()}
    shapes = {f"{name}.weight": shape for name, shape in layers.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in layers.items()}
    shapes["y_embedder.embedding_table.weight"] = CLASSES + 1, d
    rng = np.random.default_rng(0)
    state = {name: 0.2 * rng.standard_normal(shape, "f4") for name, shape in shapes.items()}
    return state | {"pos_embed": sincos(SIDE // PATCH, d)[None].astype("f4")}


def dit_in_numpy(w, x, t, label):
    """The output of the paper's DiT, in float64, for x `[batch, channel, row, column]`."""
    w = {name: value.astype(float) for name, value in w.items()}
    linear = lambda name, h: h @ w[f"{name}.weight"].T + w[f"{name}.bias"]
    silu = lambda h: h / (1 + np.exp(-h))
    gelu = lambda h: h / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
    normal = lambda h: (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-6)
    angles = t[:, None] * 10000.0 ** (-np.arange(128) / 128)
    c = linear("t_embedder.mlp.0", np.concatenate([np.cos(angles), np.sin(angles)], 1))
    c = linear("t_embedder.mlp.2", silu(c)) + w["y_embedder.embedding_table.weight"][label]
    chunks = lambda name, n: np.split(linear(name, silu(c))[:, None], n, -1)
    n, b = SIDE // PATCH, len(x)
    patches = x.reshape(b, 4, n, PATCH, n, PATCH)
    kernel = w["x_embedder.proj.weight"]
    h = np.einsum("bcipjq,dcpq->bijd", patches, kernel) + w["x_embedder.proj.bias"]
    h = h.reshape(b, n * n, WIDTH) + w["pos_embed"]
    for i in range(BLOCKS):
        name = f"blocks.{i}."
        shift, scale, gate, shift_m, scale_m, gate_m = chunks(name + "adaLN_modulation.1", 6)
        qkv = linear(name + "attn.qkv", normal(h) * (1 + scale) + shift)
        q, k, v = np.moveaxis(qkv.reshape(b, n * n, 3, HEADS, -1), (2, 3), (0, 2))
        weight = np.exp(q @ k.swapaxes(-1, -2) / np.sqrt(WIDTH // HEADS))
        weight /= weight.sum(-1, keepdims=True)
        h = h + gate * linear(name + "attn.proj", (weight @ v).swapaxes(1, 2).reshape(h.shape))
        inner = gelu(linear(name + "mlp.fc1", normal(h) * (1 + scale_m) + shift_m))
        h = h + gate_m * linear(name + "mlp.fc2", inner)
    shift, scale = chunks("final_layer.adaLN_modulation.1", 2)
    out = linear("final_layer.linear", normal(h) * (1 + scale) + shift)
    out = out.reshape(b, n, n, PATCH, PATCH, -1)
    return np.einsum("bijpqc->bcipjq", out).reshape(b, -1, SIDE, SIDE)


def as_tensors(state, prefix=""):
    """Arrays as the tensors that a fake PyTorch pickles."""
    strides = lambda x: tuple(s // x.itemsize for s in x.strides)
    return {
        name: Tensor(Storage(f"{prefix}{i}", x.ravel()), 0, x.shape, strides(x))
        for i, (name, x) in enumerate(state.items())
    }


def said_of_latents(loaded, log_snr):
    """What our network says of three latents with a label each, and those latents as theirs."""
    x, label = np.random.default_rng(1).standard_normal((3, 4, SIDE, SIDE), "f4"), np.arange(1, 4)
    params, config = loaded
    ours = resolve(config).apply(params, np.moveaxis(x, 1, -1), log_snr, {"label": label})
    return np.moveaxis(np.asarray(ours), -1, 1), x, label


def close(ours, theirs):
    assert theirs.std() > 0.1
    np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.faults
def test_a_published_dit_is_given_its_times_and_gives_a_variance(torch, tmp_path):
    state, path = arrays_of_dit(), tmp_path / "DiT-small.pt"
    as_zip(path, as_tensors(state))
    loaded = published.dit.load(path, heads=HEADS)
    _, config = loaded
    steps = np.array([0, 500, 999])
    log_snr = resolve(config).schedule.log_snr((steps + 1) / np.float32(1000))
    ours, x, label = said_of_latents(loaded, log_snr)
    # The whole numbers are found by bisection of the log-SNR, to 1e-4 of a step.
    np.testing.assert_allclose(ours, dit_in_numpy(state, x, steps, label), atol=1e-4)
    assert (config.target, config.bound_weight, config.model.out_channels) == ("eps", 0.001, 8)
    assert (config.model.labels, config.data.shape) == (CLASSES, (SIDE, SIDE, 4))
    assert config.data.latents == "sd"
    assert config_lib.from_json(config_lib.to_json(config)) == config


@pytest.mark.parametrize("outputs", [8, 4])
def test_a_published_sit_says_the_velocity_of_our_flow_at_its_own_times(torch, tmp_path, outputs):
    """Their time is the share of the data, and their velocity points to it."""
    state, path = arrays_of_dit(outputs), tmp_path / "SiT-small.pt"
    as_zip(path, as_tensors(state))
    loaded = published.dit.load(path, heads=HEADS)
    t = np.array([0.1, 0.5, 0.97])
    schedule = resolve(loaded[1]).schedule
    log_snr = (2 * np.log(t / (1 - t))).astype("f4")
    alpha, sigma = np.asarray(schedule(np.float32(0.3)))
    np.testing.assert_allclose(alpha + sigma, 1, rtol=1e-6)
    ours, x, label = said_of_latents(loaded, log_snr)
    close(-ours, dit_in_numpy(state, x, t, label)[:, :4])
    assert (loaded[1].target, loaded[1].model.out_channels) == ("flow", None)


def test_a_checkpoint_of_training_gives_its_moving_average(torch, tmp_path):
    state, path = arrays_of_dit(), tmp_path / "SiT-small.pt"
    newest = {name: 2 * x for name, x in state.items()}
    found = {"model": as_tensors(newest, "a"), "ema": as_tensors(state, "b"), "args": Stateful()}
    as_zip(path, found)
    params, _ = published.dit.load(path, heads=HEADS)
    label = state["y_embedder.embedding_table.weight"]
    np.testing.assert_array_equal(params["label"]["embedding"], label)


DIFFUSERS = {
    "x_embedder.": "pos_embed.",
    "blocks.": "transformer_blocks.",
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "final_layer.linear": "proj_out_2",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    ".adaLN_modulation.1": ".norm1.linear",
}
CONFIG = {
    "_class_name": "DiTTransformer2DModel",
    "num_attention_heads": HEADS,
    "attention_head_dim": WIDTH // HEADS,
    "num_layers": BLOCKS,
    "patch_size": PATCH,
    "sample_size": SIDE,
    "in_channels": 4,
    "out_channels": 8,
    "num_embeds_ada_norm": CLASSES,
}


def write_diffusers(folder, state, **changes):
    """A DiT as diffusers has it: with a copy of the embeddings in each block.

    Changes are entries of its config, or, by names with a point, arrays.
    """
    theirs = {}
    for name, x in state.items():
        for ours, new in DIFFUSERS.items():
            name = name.replace(ours, new)
        if name.startswith(("t_", "y_")):
            name = name.replace("t_embedder.mlp.0", "timestep_embedder.linear_1")
            name = name.replace("t_embedder.mlp.2", "timestep_embedder.linear_2")
            name = name.replace("y_embedder", "class_embedder")
            theirs |= {f"transformer_blocks.{i}.norm1.emb.{name}": x for i in range(BLOCKS)}
        elif ".attn.qkv." in name:
            for q, rows in zip("qkv", np.split(x, 3), strict=True):
                theirs[name.replace("attn.qkv", f"attn1.to_{q}")] = rows
        elif name != "pos_embed":
            theirs[name] = x
    theirs |= {name: x for name, x in changes.items() if "." in name}
    config = CONFIG | {name: x for name, x in changes.items() if "." not in name}
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(theirs, folder / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("old", [False, True])
def test_a_folder_of_diffusers_is_the_same_dit(torch, tmp_path, old):
    state, path = arrays_of_dit(), tmp_path / "DiT-small.pt"
    as_zip(path, as_tensors(state))
    (tmp_path / "transformer").mkdir()
    older = {"_class_name": "Transformer2DModel"} | published.diffusers.ONLY_OF_DIT
    write_diffusers(tmp_path / "transformer", state, **(older if old else {}))
    params, config = published.dit.load(path, heads=HEADS)
    got, same = published.load(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, got, params)
    sampling = dataclasses.replace(config.sampling, steps=1000)  # as its scheduler trains
    ends = {"start": 1e-4, "end": 0.02}
    options = config.schedule_options | ends
    expected = dataclasses.replace(config, sampling=sampling, schedule_options=options)
    assert same == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm_type": "ada_norm_single"}, "norm_type=ada_norm_single, need ada_norm_zero"),
        ({"activation_fn": "geglu"}, "activation_fn=geglu"),
        ({"_class_name": "Transformer2DModel"}, "norm_type=None, need ada_norm_zero"),
        ({"sample_size": [32, 64]}, "sample_size=.*one number"),
        ({"num_embeds_ada_norm": None}, "num_embeds_ada_norm=None, need one number"),
        ({"norm_eps": 1e-3}, r"norm_eps=0\.001, need 1e-5 or 1e-6"),
        ({"out_channels": 6}, "out_channels=6, need 4, or twice it"),
        ({"num_layers": 3}, r"transformer_blocks\.2\.\S+ is missing"),
        ({"num_layers": 1}, r"transformer_blocks\.1\.\S+ is not an array of this network"),
        (
            {f"{published.dit.EMBEDDING.format(1)}timestep_embedder.linear_2.bias": np.ones(WIDTH)},
            r"blocks\.1\.norm1\.emb\.timestep_embedder\.linear_2\.bias is not equal to that of",
        ),
    ],
    ids=lambda x: None if isinstance(x, str) else next(iter(x)),
)
def test_a_folder_of_another_transformer_is_refused(tmp_path, change, message):
    write_diffusers(tmp_path, arrays_of_dit(), **change)
    with pytest.raises(ValueError, match=message):
        published.load(tmp_path)


NEEDED = {name: name for name in arrays_of_dit() if not re.search("bias|s.0.", name)}


@pytest.mark.parametrize("name", each(NEEDED, *list(NEEDED)[:3]))
def test_each_array_of_a_dit_is_needed_and_none_is_left_over(torch, tmp_path, name):
    state, path = arrays_of_dit(), tmp_path / "DiT-small.pt"
    state[f"{name}_ema"] = state.pop(name)
    as_zip(path, as_tensors(state))
    with pytest.raises(ValueError, match=rf"DiT-small\.pt(.|\n)* {re.escape(name)} is missing"):
        published.dit.load(path, heads=HEADS)
    state[name] = state[f"{name}_ema"]
    as_zip(path, as_tensors(state))
    with pytest.raises(ValueError, match=rf"{re.escape(name)}_ema is not an array of this network"):
        published.dit.load(path, heads=HEADS)
    del state[f"{name}_ema"]
    state[name] = np.repeat(state[name], 2, axis=-1)
    as_zip(path, as_tensors(state))
    with pytest.raises(ValueError, match=rf"DiT-small\.pt(.|\n)* {re.escape(name)} is "):
        published.dit.load(path, heads=HEADS)


def test_what_a_file_of_a_transformer_does_not_say_must_be_passed(torch, tmp_path):
    state = arrays_of_dit()
    as_zip(tmp_path / "DiT-small.pt", as_tensors(state))
    with pytest.raises(ValueError, match="no published DiT is 16 wide.*pass `heads`"):
        published.load(tmp_path / "DiT-small.pt")
    as_zip(tmp_path / "mine.pth", as_tensors(state))
    with pytest.raises(ValueError, match="whether it is a DiT or a SiT.*pass `kind`"):
        published.load(tmp_path / "mine.pth")
    assert published.dit.load(tmp_path / "mine.pth", "SiT", HEADS)[1].target == "flow"
    moved = state | {"pos_embed": state["pos_embed"][:, ::-1].copy()}
    as_zip(tmp_path / "DiT-small.pt", as_tensors(moved))
    with pytest.raises(ValueError, match="pos_embed is not the fixed sines"):
        published.dit.load(tmp_path / "DiT-small.pt", heads=HEADS)


@pytest.mark.parametrize(
    ("kind", "size", "patch", "side", "parameters"),
    [
        ("DiT", "XL", 2, 32, 674_834_720),
        ("DiT", "XL", 2, 64, 674_834_720),
        ("SiT", "XL", 2, 32, 674_816_272),
        ("JiT", "B", 16, 256, 131_123_712),
        ("JiT", "H", 16, 256, 952_514_368),
    ],
)
def test_the_arrays_of_a_published_transformer_say_which_it_is(kind, size, patch, side, parameters):
    """From the shapes of its arrays alone, the network has as many parameters as it should."""
    width, blocks, heads = (
        (sizes.DIT | sizes.JIT)[size][name] for name in ("width", "blocks", "heads")
    )
    jit = kind == "JiT"
    channels, bottleneck = (3, 256 if size == "H" else 128) if jit else (4, width)
    outputs = channels if jit else 2 * channels
    shapes = {
        "x_embedder.proj1.weight" if jit else "x_embedder.proj.weight": (
            *(bottleneck, channels, patch, patch),
        ),
        "t_embedder.mlp.2.weight": (width, width),
        "y_embedder.embedding_table.weight": (1001, width),
        "pos_embed": (1, (side // patch) ** 2, width),
        "final_layer.linear.weight": (patch**2 * outputs, width),
        "blocks.0.attn.q_norm.weight": (width // heads,),
        "in_context_posemb": (1, 32, width),
        f"blocks.{blocks - 1}.attn.qkv.weight": (3 * width, width),
    }
    state = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
    config = published.dit.make_config(None, state, kind)
    expected = weights.expected(config).values()
    assert sum(int(np.prod(x.shape)) for x in expected) == parameters
    assert config.model.heads == heads
    if jit:
        assert config.model == sizes.jit_config(size, patch, labels=1000, null_label=True)
        twice = state | {"pos_embed": np.zeros((1, 4 * (side // patch) ** 2, width))}
        with pytest.raises(ValueError, match="noise of twice the size"):
            published.dit.make_config(None, twice, kind)
