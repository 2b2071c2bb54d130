"""Files of strangers: read without running them, or refused. Parity itself is in test_peers.py."""

import contextlib
import io
import json
import os
import pickle
import random
import resource
import sys
import time
import types
import zipfile

import numpy as np
import pytest

from diffjax import published
from diffjax.denoisers import time_input
from diffjax.experiment import config as config_lib, resolve, rules
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
