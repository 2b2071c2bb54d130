"""sample.py and evaluate.py as their users run them, on a run of two devices."""

import contextlib
import dataclasses
import functools
import itertools
import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

import evaluate
import sample
from catalogue import each, slow
from diffjax import GUIDANCES, checkpoint, data, models, plots, samplers
from diffjax.averages import Snapshot
from diffjax.evaluation import comparison, distances, features, sampling, widths
from diffjax.evaluation.sampling import Drawing
from diffjax.experiment import Config, Sampling, Walk, command_line, dataset, resolve, run_directory
from diffjax.experiment.config import to_json
from diffjax.experiment.dataset import load_data
from diffjax.experiment.functions import initial_state
from diffjax.models import DiTConfig, UNetConfig
from diffjax.published import export
from diffjax.training import averaging, runners
from diffjax.training.files import digest, file_digest

CONFIG = command_line.from_file("configs/digits.py:smoke")


def drawing(n=20, label=None, seed=0, config=CONFIG, sampler=None, **walk):
    """A drawing by the walk of a config, of which some fields are replaced."""
    default = command_line.walk_defaults(config.sampling, sampler)
    return Drawing(n, label, seed, dataclasses.replace(default, **walk))


FEW = drawing(steps=3)


@contextlib.contextmanager
def on_devices(count):
    """The scripts see so many devices, and draw few samples at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runners, "_devices", lambda: jax.devices()[:count])
        patch.setattr(jax, "device_count", lambda: count)
        patch.setitem(sampling.TILES, "cpu", 4)
        yield


def draw(workdir, out, devices=2, wanted=FEW, **options):
    """What sample.py writes, on so many devices."""
    with on_devices(devices):
        sample.sample(sample.Arguments(workdir, wanted, out=out, **options))
    return sampling.read(out)


def draw_by(workdir, out, *argv):
    """What sample.py writes with these words, on one device."""
    with on_devices(1):
        sample.main([f"--workdir={workdir}", f"--out={out}", *argv])
    return sampling.read(out)


@pytest.fixture(scope="module")
def drawn(finished, tmp_path_factory):
    """Twenty samples by two devices, at once."""
    out = tmp_path_factory.mktemp("drawn") / "twenty.npz"
    return out, draw(finished, out, batch_size=24)


def test_a_sample_depends_on_its_index_alone_bit_for_bit(finished, monkeypatch):
    """On any number of devices, in any batch; before it is rounded, which would hide a last bit."""
    monkeypatch.setattr(sampling.data, "to_bytes", lambda x: x)
    monkeypatch.setitem(sampling.TILES, "cpu", 4)
    _, params, config = checkpoint.load(finished)
    e = sampling.drawn_by(config, FEW)
    generate = sampling.make_generate(e, (8, 8, 1))
    label = sampling.labels(e.config, FEW)
    found, sizes = [], set()

    def tile(params, batch):
        sizes.add(len(batch["index"]))
        return generate(params, batch)

    for devices, size, some in ((1, 20, range(20)), (2, 8, range(5, 20)), (2, 24, range(20))):
        monkeypatch.setattr(runners, "_devices", lambda n=devices: jax.devices()[:n])
        monkeypatch.setattr(jax, "device_count", lambda n=devices: n)
        parts = sampling.draw(runners.pmap(), tile, params, label, some, size)
        found.append(np.concatenate([*parts]))
    assert found[0].dtype == np.float32 and len({x.tobytes() for x in found[0]}) == 20
    np.testing.assert_array_equal(found[1], found[0][5:])
    np.testing.assert_array_equal(found[2], found[0])
    assert sizes == {4}  # a larger network's rounding depends on it


@pytest.mark.faults
def test_a_drawing_that_was_stopped_goes_on(finished, drawn, tmp_path, monkeypatch, capsys):
    out = tmp_path / "a.npz"
    draw_all = sampling.draw

    def stopped(*args):
        parts = draw_all(*args)
        yield next(parts)
        raise KeyboardInterrupt

    monkeypatch.setattr(sampling, "draw", stopped)
    with pytest.raises(KeyboardInterrupt):
        draw(finished, out, batch_size=8)
    assert not out.exists()
    seen = []
    monkeypatch.setattr(sampling, "draw", lambda *args: seen.append(args[4]) or draw_all(*args))
    (out.with_suffix(".parts") / "000000016.npy.tmp").write_text("cut off")
    # With other settings it is refused, by name, whether in parts or whole.
    for _ in range(2):
        with pytest.raises(SystemExit, match=r"seed: it has 0, asked for 1\n  steps: it has 3, as"):
            draw(finished, out, wanted=drawing(steps=4, seed=1))
        again = draw(finished, out, batch_size=24)
    assert seen == [range(8, 20), range(20, 20)]
    np.testing.assert_array_equal(again[0].x, drawn[1][0].x)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npz", "a.png"]
    assert "20 samples" in capsys.readouterr().out


def test_what_was_drawn_says_how(finished, drawn, tmp_path):
    out, (examples, settings) = drawn
    assert examples.x.dtype == np.uint8 and examples.x.shape == (20, 8, 8, 1)
    assert examples.label.tolist() == [*range(10)] * 2
    assert settings["n"] == 20 and settings["function_evaluations"] == 3
    assert settings["sampler"] == "ddim" and settings["times"] == "uniform"
    assert settings["config"]["model"]["width"] == 8 and len(settings["parameters"]["sha256"]) == 64
    assert settings["program"]["jax"] == jax.__version__
    with Image.open(out.with_suffix(".png")) as picture:
        assert picture.size == (2 * 58, 10 * 58)  # a row for each class
    chain = ("classifier_free:weight=2",)
    wanted = drawing(3, label=7, sampler="unipc", steps=2, guidance=chain)
    examples, settings = draw(finished, tmp_path / "seven_w2.0.npz", 1, wanted)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["seven_w2.0.npz", "seven_w2.0.png"]
    assert examples.label.tolist() == [7, 7, 7]
    assert settings["times"] == "log_snr" and settings["guidance"] == [*chain]
    assert not np.array_equal(examples.x, drawn[1][0].x[:3])


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_function_evaluations_are_counted(name):
    """Against what the samplers' docstrings say."""
    config = Config()
    if samplers.SAMPLERS[name].two_times:
        model = dataclasses.replace(config.model, embedding="angle", two_times=True)
        config = Config(objective="flow_map", target="v", model=model)
    e = sampling.drawn_by(config, drawing(config=config, sampler=name, steps=5))
    text = " ".join(samplers.SAMPLERS[name].make.__doc__.split())
    twice = re.search(r"[Tt]wo evaluations (a|per) step|1 \+ `corrections` evaluations", text)
    with jax.checking_leaks(), jax.numpy_dtype_promotion("strict"):
        assert sampling.function_evaluations(e) == (10 if twice else 5)
    # The default grid is the one that the docstring recommends.
    assert e.config.sampling.grid == re.search(r"Use `(\w+)_times`", text)[1]


SUPER_RESOLUTION = dataclasses.replace(
    command_line.from_file("configs/fashion_sr.py:smoke"), low_resolution=4
)
WINDOWS = dataclasses.replace(CONFIG, augmentation="window", augmentation_options={"side": 4})
WALK = Walk(times="uniform", steps=3)
OTHER = {
    "sampler": "dpm_solver_pp_2m_sde",
    "options": {"eta": 1.0},
    "times": "log_snr",
    "steps": 4,
    "guidance": ("classifier_free:weight=2",),
    "cond_noise": 0.4,
    "overlap": 3,
    "cascade": ("digits",),
}
"""Another value of each field of `WALK`."""


def walked(config, walk, side=8):
    """The settings of three samples, and the samples, of a network that is not trained."""
    wanted = Drawing(3, walk=walk)
    if config.low_resolution is None:
        e = sampling.drawn_by(config, wanted)
    else:  # whose samples train.py draws
        chosen = dataclasses.replace(config.sampling, **vars(walk))
        e = resolve(dataclasses.replace(config, sampling=chosen))
    rng = np.random.default_rng(0)
    shake = lambda x: x + 0.1 * rng.standard_normal(x.shape, np.float32)
    params = jax.tree.map(shake, e.init(jax.random.key(1), (side, side, 1)))
    batch = {"index": np.arange(3), "label": np.arange(3)}
    batch["x"] = rng.uniform(-1, 1, (3, side, side, 1)).astype(np.float32)
    others = sampling.load_others(e, (side, side, 1))
    x = jax.jit(sampling.make_generate(e, (side, side, 1), others))(others.join(params), batch)
    return sampling.settings(e, wanted, params), np.asarray(x)


PLAIN = (CONFIG, 8)
OF_FIELD = {
    "cond_noise": (SUPER_RESOLUTION, 8),
    "cascade": (dataclasses.replace(SUPER_RESOLUTION, low_resolution=8), 16),
    "overlap": (WINDOWS, 8),
}
"""Configs and sides of samples, by the field of a walk that needs them."""


@functools.cache
def before_a_change(name):
    """What `walked` gives for `WALK`; several fields are compared with it."""
    config, side = OF_FIELD.get(name, PLAIN)
    return walked(config, WALK, side)


FIELDS = {field.name: field.name for field in dataclasses.fields(Walk)}
SLOW = {"cascade", "cond_noise"}  # of super-resolution


@pytest.mark.parametrize("name", each(FIELDS, *FIELDS.keys() - SLOW))
def test_every_field_of_a_walk_is_in_the_settings_and_changes_the_samples(name):
    """A new field of `Walk` fails this test until `OTHER` has a value of it."""
    config, side = OF_FIELD.get(name, PLAIN)
    before, x = before_a_change(name if name in OF_FIELD else None)
    after, other = walked(config, dataclasses.replace(WALK, **{name: OTHER[name]}), side)
    follow = {"config", "function_evaluations"}
    assert {key for key in before if before[key] != after[key]} - follow == {name}
    assert after[name] == json.loads(json.dumps(OTHER[name]))
    assert after["config"]["sampling"][name] == after[name]
    assert np.abs(x - other).max() > 0.01


@pytest.mark.parametrize(
    ("argv", "chain"),
    [
        (
            ["--guidance", "classifier_free:weight=3", "within:low=-2,high=4"],
            ["classifier_free:weight=3", "within:low=-2,high=4"],
        ),
        *slow(
            (["--guidance=2"], ["classifier_free:weight=2"]),
            (["--guidance=1"], []),
            ([], ["classifier_free:weight=1.2"]),
        ),
    ],
    ids=["chain", "number", "one", "default"],
)
def test_guidance_on_the_command_line_is_a_chain_or_a_number(finished, tmp_path, argv, chain):
    _, settings = draw_by(finished, tmp_path / "a.npz", "--n=4", *argv)
    assert settings["guidance"] == settings["config"]["sampling"]["guidance"] == chain


@pytest.mark.faults
def test_a_chain_of_the_command_line_is_what_samples_are_drawn_with(finished, tmp_path):
    chain = "classifier_free:weight=3", "within:low=-2,high=4"
    examples, _ = draw_by(finished, tmp_path / "a.npz", "--n=4", "--guidance", *chain)
    same, _ = draw(finished, tmp_path / "b.npz", 1, drawing(4, guidance=chain))
    np.testing.assert_array_equal(same.x, examples.x)
    others, _ = draw(finished, tmp_path / "c.npz", 1, drawing(4, guidance=chain[:1]))
    assert (others.x != examples.x).any()


@pytest.mark.parametrize(
    ("chain", "message"),
    [
        (
            ["classifier:weight=3"],
            f"unknown guidance 'classifier': one of {', '.join(GUIDANCES)}",
        ),
        (
            ["classifier_free"],
            "guidance classifier_free needs weight=NUMBER",
        ),
        (["classifier_free:weight=3", "within:low=2"], "guidance within needs high=NUMBER"),
        (
            ["classifier_free:strength=3"],
            "guidance classifier_free has no option strength; it has weight",
        ),
        (["classifier_free:weight=much"], "weight=much: must be a finite number"),
        (["classifier_free:weight=3", "within:low=4,high=-2"], "low=4 must be below high=-2"),
        (
            ["classifier_free:weight=3", "within:low=100,high=200"],
            "low=100, high=200: the schedule has log-SNR from -8 to 7, and none between them",
        ),
        (["classifier_free:weight=3,weight=4"], "'weight=4': weight is there twice"),
        (["cfg_plus_plus:weight=8"], "weight=8: that of cfg_plus_plus is from 0 to 1"),
        (["classifier_free:3"], "'3' is not NAME=VALUE"),
        (
            ["classifier_free:weight=3", "dynamic_threshold", "dynamic_threshold:limit=2"],
            "dynamic_threshold is there twice",
        ),
        (
            ["classifier_free:weight=3", "cfg_zero:weight=2"],
            "classifier_free and cfg_zero both amplify the condition; choose one of them",
        ),
        (["within:low=-2,high=4"], "within changes the guidance before it; there is none"),
        (
            ["dynamic_threshold", "cfg_plus_plus:weight=0.6"],
            "cfg_plus_plus guides a whole step, and must be the first of the chain",
        ),
        (["cfg_plus_plus"], "guidance cfg_plus_plus needs weight=NUMBER"),
        (["apg_momentum:weight=2,momentum=-2"], "momentum=-2: must be in (-1, 1)"),
        (
            ["apg_momentum:weight=2", "within:low=-2,high=4"],
            "the momentum needs every step, which within leaves out; use apg",
        ),
        (["autoguidance:weight=2"], "guidance autoguidance needs weaker=RUN"),
        (["autoguidance:weaker=digits"], "guidance autoguidance needs weight=NUMBER"),
        (["autoguidance:weight=2,weaker=/nowhere"], "/nowhere holds no config.json"),
        (
            ["autoguidance:weight=2,weaker=digits,average=wide"],
            "average=wide: must be a number",
        ),
    ],
)
def test_a_bad_chain_of_guidances_is_one_clear_line(finished, tmp_path, chain, message):
    with pytest.raises(SystemExit) as stop:
        draw_by(finished, tmp_path / "a.npz", "--n=4", "--guidance", *chain)
    line = str(stop.value)
    assert line.startswith("error: ") and message in line and "\n" not in line
    assert not list(tmp_path.iterdir())


@pytest.mark.faults
def test_autoguidance_by_a_network_without_labels_that_is_told_of_augmentations():
    model = UNetConfig(width=8, mults=(1,), blocks=1, groups=4, attention=(), augment_dim=9)
    guided = Sampling(guidance=("autoguidance:weight=2,weaker=RUN",), steps=2)
    config = Config(model=model, augmentation="edm", sampling=guided)
    e, weaker = resolve(config), resolve(dataclasses.replace(config, sampling=Sampling()))
    others = sampling.Others(weaker=weaker)
    generate = sampling.make_generate(e, (8, 8, 1), others)
    params = jax.eval_shape(lambda: e.init(jax.random.key(0), (8, 8, 1)))
    drawn = jax.eval_shape(generate, (params, params), {"index": jnp.arange(2)})
    assert drawn.shape == (2, 8, 8, 1)


def test_autoguidance_of_weight_zero_draws_from_the_weaker_network(finished, tmp_path):
    argv = ["--n=4", "--steps=2", "--sampler=ddim", "--guidance"]
    weaker, _ = draw_by("digits", tmp_path / "a.npz", *argv)
    word = "autoguidance:weight=0,weaker=digits"
    examples, settings = draw_by(finished, tmp_path / "b.npz", *argv, word)
    np.testing.assert_array_equal(examples.x, weaker.x)
    assert settings["guidance"] == [word]
    _, params, _ = checkpoint.load("digits")
    assert settings["weaker"]["sha256"] == digest(params) != settings["parameters"]["sha256"]


@pytest.mark.faults
def test_a_guidance_of_the_step_is_drawn_with_the_rest_of_the_chain():
    """CFG++ of weight 0 is unconditional, as classifier-free guidance of weight 0 is."""

    def drawn_with(*chain):
        e = sampling.drawn_by(CONFIG, drawing(guidance=chain, steps=3))
        of_label = lambda params, x_t, log_snr, cond: x_t + cond["label"][:, None, None, None]
        generate = sampling.make_generate(e._replace(apply=of_label), (2, 2, 1))
        batch = {"index": np.arange(4), "label": np.arange(4)}
        return jax.jit(generate)((), batch), sampling.function_evaluations(e)

    none, threshold = "classifier_free:weight=0", "dynamic_threshold:limit=0.5"
    rest = ("within:low=-2,high=99", threshold)
    x, evaluations = drawn_with("cfg_plus_plus:weight=0", *rest)
    np.testing.assert_allclose(x, drawn_with(none, *rest)[0], atol=1e-6)
    assert evaluations == 3
    assert not np.allclose(x, drawn_with("cfg_plus_plus:weight=1", *rest)[0], atol=1e-2)
    # Outside of the interval there is the condition, without guidance.
    x, _ = drawn_with("cfg_plus_plus:weight=0", "within:low=6.9,high=99")
    np.testing.assert_array_equal(x, drawn_with()[0])


@pytest.mark.parametrize(
    "model",
    [
        DiTConfig(width=16, blocks=2, heads=2, labels=3, bfloat16=True),
        *slow(UNetConfig(8, (1, 2), 1, attention=(4,), groups=4, labels=3, bfloat16=True)),
    ],
)
def test_a_walk_in_bfloat16_casts_its_parameters_before_it_begins(model, monkeypatch):
    shape, batch = (8, 8, 3), {"index": np.arange(4), "label": np.arange(4) % 3}
    e = resolve(Config(model=model, sampling=Sampling("ddim", steps=3)))
    rng = np.random.default_rng(0)
    normal = lambda x: rng.standard_normal(x.shape).astype(np.float32) / 4
    params = jax.tree.map(normal, jax.eval_shape(initial_state(e, shape)).params)
    drawn_by = lambda: jax.jit(sampling.make_generate(e, shape))(params, batch)

    seen = []
    cast_ahead = models.cast_ahead
    monkeypatch.setattr(
        models, "cast_ahead", lambda *args: seen.append(cast_ahead(*args)) or seen[0]
    )
    x = drawn_by()
    for path, leaf in jax.tree_util.tree_leaves_with_path(seen[0]):
        exact = re.search(r"norm|double'\]\['kernel", jax.tree_util.keystr(path))
        assert leaf.dtype == (jnp.float32 if exact else jnp.bfloat16), path
    monkeypatch.setattr(models, "cast_ahead", lambda network, params, *_: params)
    np.testing.assert_array_equal(x, drawn_by())
    assert np.ptp(x) > 0.1


def test_samples_are_drawn_by_the_runner_of_the_run(finished, drawn, tmp_path, monkeypatch):
    workdir = shutil.copytree(finished, tmp_path / "run")
    config = workdir / "config.json"
    config.write_text(config.read_text().replace('"parallel": null', '"parallel": "sharded"'))
    sharded, used = runners.RUNNERS["sharded"], []
    monkeypatch.setitem(runners.RUNNERS, "pmap", lambda _: pytest.fail("not the run's runner"))
    monkeypatch.setitem(runners.RUNNERS, "sharded", lambda fsdp: used.append(fsdp) or sharded(fsdp))
    examples, settings = draw(workdir, tmp_path / "a.npz")
    assert used == [1] and settings["config"]["parallel"] == "sharded"
    np.testing.assert_array_equal(examples.x, drawn[1][0].x)


@pytest.mark.parametrize("name", runners.RUNNERS)
def test_each_device_draws_its_own_tiles_one_after_another(name):
    """24 samples in tiles of 4 on two devices are three tiles on each, by either runner."""
    generate = lambda scale, batch: scale * batch["index"][:, None]
    programs = []

    def watched(f):
        show = lambda *args: programs.append(str(jax.make_jaxpr(f)(*args))) or f(*args)
        return runner.map(show)

    with on_devices(2):
        runner = runners.RUNNERS[name](1)
        parts = sampling.draw(runner._replace(map=watched), generate, 2, None, range(24), 24)
        np.testing.assert_array_equal(np.concatenate([*parts])[:, 0], 2 * np.arange(24))
    assert " length=3" in programs[0]


BAD = {
    "sampler": (drawing(sampler="dim"), "unknown sampler 'dim': one of ancestral, ddim"),
    "times": (drawing(times="even"), "unknown times 'even': one of uniform, log_snr, karras"),
    "option": (drawing(options={"eta": 2.0}), "eta=2.0: must be in [0, 1]"),
    "options": (drawing(sampler="heun", options={"eta": 1}), "sampler heun has no option eta"),
    "steps": (drawing(steps=0), "steps=0: must be at least 1"),
    "n": (drawing(n=0), "n=0: must be at least 1"),
    "label": (drawing(label=10), "label=10: the run has classes 0 to 9"),
    "seed": (drawing(seed=-1), "seed=-1: must be in [0, 2**32)"),
    "cond_noise": (drawing(cond_noise=0.1), "sampling.cond_noise=0.1: need low_resolution"),
    "guidance": (
        drawing(guidance=("classifier_free:weight=nan",)),
        "guidance classifier_free: weight=nan: must be a finite number",
    ),
}


@pytest.mark.parametrize(("wanted", "message"), BAD.values(), ids=BAD)
def test_what_makes_no_sense_is_refused_before_anything_is_loaded(
    finished, tmp_path, monkeypatch, wanted, message
):
    monkeypatch.setattr(checkpoint, "load", lambda *_: pytest.fail("went on"))
    with pytest.raises(SystemExit, match=f"error: .*{re.escape(message)}"):
        draw(finished, tmp_path / "out" / "a.npz", wanted=wanted)
    assert not (tmp_path / "out").exists()


def test_other_refusals_of_sample(finished, tmp_path):
    out = tmp_path / "a.npz"
    for options, message in (
        ({"picture": 0}, "picture=0, batch_size=16: must be at least 1"),
        ({"shape": (8, 8, 3)}, r"shape \(8, 8, 3\) are not what the network was trained on"),
        ({"shape": (8,)}, r"examples of shape \(8,\): a U-Net"),
    ):
        with pytest.raises(SystemExit, match=message):
            draw(finished, out, **options)
    with pytest.raises(SystemExit, match="not the directory of a run"):
        draw(tmp_path, out)
    out.write_text("not samples")
    with pytest.raises(SystemExit, match=r"a\.npz is not a file of sample\.py"):
        draw(finished, out)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x.png", "must end with .npz, as .*/x.png.npz"),
        ("gen_w1.0", "must end with .npz, as .*/gen_w1.0.npz"),
        ("folder.npz", "folder.npz is a directory"),
        ("picture.npz", "picture.png is a directory"),
    ],
)
def test_a_name_for_samples_that_cannot_be_is_refused_before_drawing(
    finished, tmp_path, monkeypatch, name, message
):
    (tmp_path / "folder.npz").mkdir()
    (tmp_path / "picture.png").mkdir()
    monkeypatch.setattr(checkpoint, "load", lambda *_: pytest.fail("went on"))
    with pytest.raises(SystemExit, match=f"error: out=.*{message}"):
        draw(finished, tmp_path / name)
    assert len([*tmp_path.rglob("*")]) == 2


def test_parameters_that_are_not_finite_draw_nothing(finished, tmp_path, monkeypatch):
    step, params, config = checkpoint.load(finished)
    params["conv_out"]["bias"] = params["conv_out"]["bias"] * np.nan
    monkeypatch.setattr(checkpoint, "load", lambda *_: (step, params, config))
    message = r"error: .*run: 1 of \d+ arrays of parameters are not finite, such as conv_out/bias"
    with pytest.raises(SystemExit, match=message):
        draw(finished, tmp_path / "a.npz")
    assert not [*tmp_path.iterdir()]
    with pytest.raises(SystemExit, match=message):
        evaluate_run(finished, held_out=0, drawing=FEW)


def test_samples_that_are_not_finite_are_neither_stored_nor_measured(drawn, tmp_path):
    generate = lambda nan_from, batch: (
        jnp.where(batch["index"] < nan_from, 1.0, jnp.nan)[:, None] * jnp.ones((1, 2))
    )
    with on_devices(1):
        parts = sampling.draw(runners.pmap(), generate, 6, None, range(12), 4)
        assert next(parts).tolist() == [[1, 1]] * 4
        with pytest.raises(FloatingPointError, match="2 of 4 samples are not finite, .* number 6"):
            next(parts)
    _, settings = drawn[1]
    x = np.ones((20, 2), np.float32)
    x[3, 1] = np.nan
    arrays = {"x": x, "index": np.arange(20)}
    np.savez(tmp_path / "b.npz", **arrays, settings=json.dumps(settings | {"sha256": digest(x)}))
    with pytest.raises(ValueError, match=r"b\.npz: 1 of 20 samples are not finite.* number 3"):
        sampling.read(tmp_path / "b.npz")
    with pytest.raises(FloatingPointError, match="1 of 20 samples"):
        sampling.evaluate(CONFIG, None, {}, x)


def write_npz(path, dtype):
    x = np.zeros((4, 8, 8, 1), dtype)
    np.savez(path, x_train=x, x_test=x)
    return path


def test_samples_are_stored_as_the_data_is(finished, tmp_path, monkeypatch):
    config = lambda **data: Config(data=dataclasses.replace(Config().data, **data))
    for made, expected in (
        (config(name="digits"), np.uint8),
        (config(name="cifar10"), np.uint8),  # which is not there
        (config(name="two_moons"), np.float32),
        (config(name="npz", path=write_npz(tmp_path / "a.npz", np.uint8)), np.uint8),
        (config(name="npz", path=write_npz(tmp_path / "b.npz", np.float32)), np.float32),
        (config(name="npz", path=tmp_path / "c.npz", shape=(8, 8, 1)), np.float32),
    ):
        assert dataset.example_dtype(made) == expected
    out = tmp_path / "out.npz"
    monkeypatch.setattr(sample, "example_dtype", lambda _: np.float32)
    examples, settings = draw(finished, out, 1, drawing(3, steps=3))
    assert examples.x.dtype == np.float32 and settings["dtype"] == "float32"
    assert len(np.unique(examples.x)) > 100
    monkeypatch.undo()
    with pytest.raises(SystemExit, match="dtype: it has 'float32', asked for 'uint8'"):
        draw(finished, out, 1, drawing(3, steps=3))
    # A file of version 0.1, which does not say it, holds bytes.
    old = {k: v for k, v in settings.items() if k != "dtype"}
    assert sampling.upgraded(old)["dtype"] == "uint8"


def test_samples_that_no_picture_shows_are_stored_anyway(finished, tmp_path, monkeypatch, capsys):
    draw_all = plots.samples
    monkeypatch.setattr(plots, "samples", lambda x, classes: draw_all(x[..., 0], classes))
    draw(finished, tmp_path / "a.npz", 1, drawing(3, steps=3))
    assert "no picture (samples of shape (3, 8, 8): need images" in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]


@pytest.mark.parametrize(("labels", "rows"), [(0, 7), (3, 3), (20, 20), (1000, 7)])
def test_a_picture_has_a_row_for_each_of_few_classes(labels, rows):
    """A thousand rows of ten samples would take hours, and nobody could look at them."""
    config = Config(model=UNetConfig(labels=labels))
    config = dataclasses.replace(config, sampling=Sampling(columns=7))
    assert sampling.picture_rows(config) == rows
    batch = sampling.request(config, data.Examples(np.zeros((1, 2), np.float32)), 7 * rows)
    assert len(set(batch.get("label", []))) == min(labels, 7 * rows)


def test_it_says_how_far_it_is_in_a_pipe_too(monkeypatch, capsys):
    parts = [np.zeros(20), np.zeros(10)]
    assert [*sampling.with_progress(parts, "samples", 1030, 1000)] == parts
    assert capsys.readouterr().out == "samples: 1,000 of 1,030\n"  # the others come too soon
    monkeypatch.setattr(sampling, "PATIENCE", -1.0)
    [*sampling.with_progress(parts, "samples", 1030, 1000)]
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"samples: {n} of 1,030" for n in ("1,000", "1,020", "1,030")]


@pytest.fixture
def of_version_0_1(finished, tmp_path):
    """The run as version 0.1 wrote it, with a relative path and no shape; and its data, moved."""
    train, test = data.load("digits")
    arrays = {"x_train": train.x, "x_test": test.x, "y_train": train.label, "y_test": test.label}
    np.savez(tmp_path / "moved.npz", **arrays)
    workdir = shutil.copytree(finished, tmp_path / "run")
    tree = json.loads((workdir / "config.json").read_text())
    tree["data"] |= {"name": "npz", "path": "nowhere/a.npz", "shape": None}
    (workdir / "config.json").write_text(json.dumps(tree))
    return workdir, tmp_path / "moved.npz"


@pytest.mark.faults
def test_the_path_of_the_data_is_a_flag_of_every_command(of_version_0_1, tmp_path):
    workdir, moved = of_version_0_1
    moved = f"--data_path={moved}"
    out, result = f"--out={tmp_path}/out.npz", f"--result={tmp_path}/result.json"
    file = str(tmp_path / "net.safetensors")
    for main, argv in (
        (sample.main, [f"--workdir={workdir}", out, "--n=4", "--steps=2"]),
        (evaluate.main, [f"--workdir={workdir}", result, "--n=0", "--held_out=4"]),
        (export.main, [str(workdir), file]),
    ):
        with pytest.raises(SystemExit, match=r"error: npz: .*nowhere/a\.npz.*--data_path"):
            main(argv)
        with on_devices(2):
            main([*argv, moved])
    assert json.loads(Path(tmp_path / "result.json").read_text())["held_out"]["n"] == 4
    assert checkpoint.read_config(file).data.shape == (8, 8, 1)


def test_nothing_but_evaluate_reads_the_data_again(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "load", lambda *_: pytest.fail("read the data"))
    monkeypatch.setattr(dataset, "load", lambda *_: pytest.fail("read the data"))
    _, settings = draw(finished, tmp_path / "a.npz", wanted=drawing(n=4, steps=2))
    assert settings["shape"] == [8, 8, 1]


@pytest.mark.faults
@pytest.mark.parametrize("source", ["digits", "FILE"])
def test_samples_of_what_is_no_run(source, finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if source == "FILE":
        source = str(tmp_path / "net.safetensors")
        export.main([str(finished), source])
    argv = [f"--workdir={source}", "--n=20", "--steps=2"]
    with on_devices(2):
        sample.main(argv)
        evaluate.main([*argv, "--held_out=0"])
    home = checkpoint.home(source)
    assert len(sampling.read(home / "generated.npz")[0].x) == 20
    assert (home / "evaluation.json").is_file()


@pytest.mark.faults
def test_any_number_of_devices_evaluates_any_batch(finished, tmp_path):
    """Of 12 in a batch of 16, as bits do not depend on who counts them; padding changes none."""
    results = []
    for devices in (1, 3):
        with on_devices(devices):
            argv = [f"--workdir={finished}", "--n=0", "--held_out=17", "--bound_samples=4"]
            evaluate.main([*argv, f"--result={tmp_path}/{devices}.json"])
        results.append(json.loads((tmp_path / f"{devices}.json").read_text()))
    a, b = (result["bound_bits_per_dim"] for result in results)
    assert abs(a - b) < 1e-5 * abs(a)


@pytest.fixture
def tracked(finished, tmp_path):
    """A copy of the run, as if it had tracked averages: those of step k are k times its own."""
    workdir = shutil.copytree(finished, tmp_path / "tracked")
    config = dataclasses.replace(
        run_directory.read_config(workdir), averages=(0.05, 0.1), snapshot_every=10
    )
    (workdir / "config.json").write_text(to_json(config))
    params = jax.device_get(run_directory.read_params(workdir))
    for step, std in itertools.product((10, 20, 30, 40), (0.05, 0.1)):
        scaled = jax.tree.map(lambda x, step=step: x * np.float32(step / 40), params)
        averaging.write_snapshot(workdir / "snapshots", step, Snapshot(step, std, scaled))
    return workdir


@pytest.mark.faults
def test_samples_are_drawn_with_an_average_made_after_training(tracked, finished, drawn, tmp_path):
    """With the newest average where a width was tracked; the settings say which it was."""
    _, plain = drawn[1]
    examples, settings = draw_by(tracked, tmp_path / "a.npz", "--n=4", "--steps=3", "--average=0.1")
    _, params, _ = checkpoint.load(tracked, 0.1)
    _, newest, _ = checkpoint.load(finished)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), params, newest)
    assert settings["average"] == 0.1 and plain["average"] is None
    assert settings["parameters"] == {"average": 0.1, "sha256": digest(params)}
    assert plain["parameters"]["ema"] == CONFIG.ema
    others, _ = draw_by(tracked, tmp_path / "b.npz", "--n=4", "--steps=3", "--average=0.2")
    assert (others.x != examples.x).any()
    with pytest.raises(SystemExit, match=r"average: it has 0\.1, asked for 0\.05"):
        draw_by(tracked, tmp_path / "a.npz", "--n=4", "--steps=3", "--average=0.05")


def test_samples_of_an_average_are_evaluated_with_it(tracked, tmp_path):
    words = ["--n=20", "--steps=1", "--sampler=ddim", "--average=0.1"]
    draw_by(tracked, tmp_path / "a.npz", *words)
    result = evaluate_run(tracked, samples=tmp_path / "a.npz", held_out=0)
    assert result["parameters"]["average"] == result["samples"]["average"] == 0.1


@pytest.mark.parametrize(
    "names",
    [
        ("bound_bits_per_dim",),
        pytest.param(("bound_bits_per_dim", "frechet"), marks=pytest.mark.faults),
    ],
)
@pytest.mark.faults
def test_widths_are_compared(tracked, capsys, names):
    """Where a width was tracked, here, its average is that of the constant decay."""
    words = ["--features=pca24", "--n=20"] if "frechet" in names else []
    with on_devices(2):
        widths.main(
            [str(tracked), "--std", "0.2", "0.1", "--held_out=16", "--bound_samples=2", *words]
        )
    constant, narrow, wide = json.loads((tracked / widths.RESULT).read_text())["rows"]
    assert constant["ema"] == CONFIG.ema and (narrow["average"], wide["average"]) == (0.1, 0.2)
    for name in names:
        np.testing.assert_allclose(narrow[name], constant[name], rtol=1e-3)
        assert abs(wide[name] / constant[name] - 1) > 1e-3
    assert narrow["profile_error"] < 1e-6 < wide["profile_error"]
    assert "average 0.1, profile to" in capsys.readouterr().out
    with Image.open(tracked / "averages.png") as drawn:
        assert np.asarray(drawn).std() > 1


@pytest.mark.faults
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--std", "0.1", "0.3"], "relative width 0.3: must be above 0"),
        (["--n=19"], "n=19: must be at least 20"),
        (["--held_out=1"], "held_out=1: must be at least 2"),
        (["--bound_samples=1"], "bound_samples=1: must be at least 2"),
        (["--features=fid"], "unknown features 'fid': one of"),
    ],
)
def test_a_bad_comparison_of_widths_is_one_clear_line(tracked, monkeypatch, words, message):
    monkeypatch.setattr(widths, "load_data", lambda *_: pytest.fail("went on"))
    with pytest.raises(SystemExit, match=f"error: .*{re.escape(message)}"):
        widths.main([str(tracked), *words])


def test_averages_that_cannot_be_made_are_refused(tracked, finished, tmp_path, monkeypatch):
    monkeypatch.setattr(sampling, "make_generate", lambda *_: pytest.fail("went on"))
    folder, out = tracked / "snapshots", tmp_path / "a.npz"
    for workdir, std, message in (
        (finished, 0.1, "average=0.1: the run has tracked no averages"),
        (tracked, 0.3, "relative width 0.3: must be above 0, and at most"),
        (tracked, 0.0, "relative width 0.0: must be above 0"),
        (tracked, float("nan"), "relative width nan: must be above 0"),
    ):
        with pytest.raises(SystemExit, match=f"error: .*{re.escape(message)}"):
            draw_by(workdir, out, "--n=4", f"--average={std}")
    weights = tmp_path / "a.safetensors"
    export.export(finished, weights)
    with pytest.raises(ValueError, match="is a file, not the directory of a run"):
        checkpoint.load(weights, 0.1)
    # The newest may be written while this reads; the others, and those before a checkpoint, not.
    (folder / averaging.name(50, 0.05)).write_text("")
    checkpoint.load(tracked, 0.1)
    path = folder / averaging.name(20, 0.05)
    path.write_bytes(path.read_bytes()[:-4] + b"\x00\x01\x02\x03")
    with pytest.raises(SystemExit, match=r"00000020-0\.05\.safetensors is damaged"):
        draw_by(tracked, out, "--n=4", "--average=0.1")
    path.unlink()
    (folder / averaging.name(40, 0.1)).unlink()
    for workdir, message in ((tracked, "lacks 2 snapshots"), (finished, "tracked no averages")):
        with pytest.raises(SystemExit, match=message):
            widths.main([str(workdir), "--std", "0.1"])
    with pytest.raises(SystemExit, match=r"lacks 2 snapshots, those of step 20, 40: an average"):
        draw_by(tracked, out, "--n=4", "--average=0.1")


@pytest.fixture(scope="module")
def evaluated(finished, tmp_path_factory):
    """A copy of the run, evaluated by its bound and its samples."""
    workdir = shutil.copytree(finished, tmp_path_factory.mktemp("evaluated") / "run")
    evaluate_run(workdir, drawing=FEW, held_out=32, bound_samples=4)
    return workdir


def evaluate_run(workdir, **options):
    """What evaluate.py writes, on two devices."""
    with on_devices(2):
        evaluate.run(evaluate.Arguments(workdir, **options))
    return found(workdir)


def found(workdir):
    return json.loads((workdir / comparison.RESULT).read_text())


@pytest.mark.faults
def test_every_number_comes_with_what_it_depends_on(finished, tmp_path):
    """An untrained network is no good, so the bound is loose; but it is one, and it is finite."""
    workdir = shutil.copytree(finished, tmp_path / "run")
    result = evaluate_run(
        workdir, drawing=FEW, held_out=32, bound_samples=4, flow=True, flow_steps=4
    )
    for name in ("bound", "flow"):
        assert 0.5 < result[f"{name}_bits_per_dim"] < 20
        assert 0 < result[f"{name}_standard_error"] < 2
    assert result["held_out"]["n"] == 32 and result["held_out"]["levels"] == 17
    assert result["frechet"] > 1 and result["kernel"] > result["kernel_standard_error"] > 0
    assert 0 <= result["precision"] <= 1 and 0 <= result["recall"] <= 1
    assert result["features"]["dimension"] == 24
    assert result["samples"]["n"] == 20 and result["samples"]["function_evaluations"] == 3
    assert result["features"]["name"] == "pca24" and result["reference"]["n"] == 1497
    hashes = [result[part]["sha256"] for part in ("held_out", "features", "reference")]
    assert {len(h) for h in [*hashes, result["parameters"]["sha256"]]} == {64}
    assert result["config"]["target"] == "eps" and result["program"]["diffjax"]


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """A file of weights of a network in Inception's place that is cheap, and its features."""
    matrix = np.random.default_rng(0).standard_normal((64, 3)).astype(np.float32)
    safetensors.numpy.save_file({"matrix": matrix}, tmp_path / "weights.safetensors")

    def outputs(params, x):
        x = jnp.broadcast_to(x, (*x.shape[:3], 3))[:, :8, :8, 0].reshape(len(x), -1)
        x = jnp.matmul(x.astype(jnp.float32) / 64, params, precision="highest")
        return {"features": x, "spatial": x[:, :2], "logits": x}

    known = (file_digest(tmp_path / "weights.safetensors"),)
    make = features.of_network("inception", known, lambda _, arrays: arrays["matrix"], outputs)
    monkeypatch.setitem(features.FEATURES, "inception", make)
    return tmp_path / "weights.safetensors", lambda x: np.asarray(outputs(matrix, x)["features"])


@pytest.mark.faults
def test_fid_by_a_reference_of_ones_own(finished, drawn, weights, tmp_path, capsys):
    """Statistics are written, read back, and compared with several draws in parts."""
    run, stats = shutil.copytree(finished, tmp_path / "run"), tmp_path / "stats.npz"
    file, features_of = weights
    options = dict(features="inception", weights=file, held_out=0)
    none = dataclasses.replace(FEW, n=0)
    evaluate_run(run, **options, drawing=none, reference="test", write_reference=stats)
    assert "frechet" not in found(run)
    test = load_data(checkpoint.read_config(run)).test
    samples, _ = drawn[1]
    exact = distances.frechet_distance(features_of(samples.x), features_of(test.x))
    result = evaluate_run(run, **options, drawing=FEW, reference=str(stats), draws=2)
    assert result["samples"]["seeds"] == [0, 1] and result["reference"]["file"] == "stats.npz"
    assert result["frechet"] <= result["frechet_mean"] and result["class_score"] >= 1
    assert "precision" not in result and "precision_of_all" not in result
    shown = capsys.readouterr().out
    assert re.search(r"^FID: .*, mean .* of 2 draws \(n=20, draws=2", shown, re.M)
    assert "sFID: " in shown and "Inception Score: " in shown
    # The draw of seed 0 is that of the file: by its parts, and by all of its features at once.
    result = evaluate_run(run, **options, samples=drawn[0], reference="test")
    assert result["frechet"] == pytest.approx(exact, rel=1e-5)
    assert 0 <= result["precision_of_all"] <= 1 and "KID: " in capsys.readouterr().out
    # Any other weights, and it is no FID.
    matrix = safetensors.numpy.load_file(file)["matrix"]
    safetensors.numpy.save_file({"matrix": 2 * matrix}, file)
    result = evaluate_run(run, **options, samples=drawn[0], reference="test")
    assert result["frechet"] == pytest.approx(4 * exact, rel=1e-5)
    shown = capsys.readouterr().out
    assert "FID" not in shown and "features=inception of unknown weights" in shown
    with pytest.raises(SystemExit, match="it was made with other weights"):
        evaluate_run(run, **options, samples=drawn[0], reference=str(stats))


@pytest.mark.faults
def test_samples_that_were_drawn_are_measured_alike(evaluated, drawn, tmp_path):
    again = shutil.copytree(evaluated, tmp_path / "run")
    result = evaluate_run(again, samples=drawn[0], held_out=0)
    assert {k: v for k, v in found(evaluated).items() if k in result} == result
    assert "bound_bits_per_dim" not in result
    _, settings = drawn[1]
    with np.load(drawn[0]) as file:
        other = settings | {"parameters": {"ema": 0.5, "sha256": "0"}}
        np.savez(tmp_path / "b.npz", **{**file, "settings": json.dumps(other)})
    with pytest.raises(SystemExit, match=r"b\.npz holds samples of other parameters"):
        evaluate_run(again, samples=tmp_path / "b.npz", held_out=0)


def test_the_other_runner_says_the_same(evaluated, tmp_path):
    again = shutil.copytree(evaluated, tmp_path / "run")
    config = (again / "config.json").read_text()
    (again / "config.json").write_text(config.replace('"parallel": null', '"parallel": "sharded"'))
    result = evaluate_run(
        again, drawing=dataclasses.replace(FEW, n=0), held_out=32, bound_samples=4
    )
    bits = "bound_bits_per_dim"
    np.testing.assert_allclose(result[bits], found(evaluated)[bits], rtol=1e-4)
    assert "frechet" not in result


def test_runs_are_compared(evaluated, tmp_path, capsys):
    other = shutil.copytree(evaluated, tmp_path / "other")
    result = found(other) | {"frechet": 0.01}
    (other / comparison.RESULT).write_text(json.dumps(result))
    picture = tmp_path / "c.png"
    evaluate.main(["--compare", str(evaluated), str(other), f"--picture={picture}"])
    assert "0.01 *" in capsys.readouterr().out
    with Image.open(picture) as drawn:
        assert np.asarray(drawn).std() > 1


def test_refusals_of_evaluate(finished, drawn, tmp_path, monkeypatch):
    for options, message in (
        ({"bound_samples": 1}, "bound_samples=1: must be at least 2"),
        ({"flow_steps": 0}, "flow_steps=0: must be at least 1"),
        ({"held_out": 1}, "held_out=1: must be at least 2, or 0"),
        ({"drawing": drawing(n=19)}, "n=19: must be at least 20, or 0"),
        (
            {"result": Path("no/where.json")},
            "result=no/where.json: must be a file .json in a folder",
        ),
        ({"reference": "all"}, "unknown reference 'all': one of train, test, or a file .npz"),
        ({"features": "fid"}, "unknown features 'fid': one of pca24, fashion_classifier, incep"),
        ({"features": "inception"}, "features=inception, weights=None: it needs a file of w"),
        ({"features": "inception", "weights": Path("no")}, "weights=no: there is no such file"),
        ({"weights": Path("no")}, "features=pca24, weights=no: it takes none"),
        ({"reference": "no.npz"}, "reference=no.npz: there is no such file"),
        ({"draws": 0}, "draws=0: must be at least 1"),
        ({"draws": 2, "samples": drawn[0]}, "draws=2: a file of samples is one draw"),
        ({"write_reference": Path("a.npz")}, "write_reference=a.npz: features=pca24 have no"),
        ({"write_reference": Path("a.pkl")}, "write_reference=a.pkl: must be a file .npz in"),
    ):
        with pytest.raises(SystemExit, match=f"error: .*{re.escape(message)}"):
            evaluate.run(evaluate.Arguments(finished, **options))
    monkeypatch.setattr(checkpoint, "load", lambda *_: pytest.fail("went on"))
    x = np.ones((9, 8, 8, 1), np.uint8)
    settings = json.dumps(drawn[1][1] | {"n": 9, "sha256": digest(x)})
    np.savez(tmp_path / "nine.npz", x=x, index=np.arange(9), settings=settings)
    train, test = data.load("digits")
    few = lambda k: monkeypatch.setattr(
        evaluate, "load_data", lambda *_: data.Dataset(train, data.checked(test.x[:k]))
    )
    for k, options, message in (
        (300, {"samples": tmp_path / "nine.npz"}, "nine.npz holds 9 samples: need 20 or more"),
        (1, {}, "one example is held out: bits need 2 or more"),
        (19, {"reference": "test"}, "reference=test: has 19 examples: distances need 20 or more"),
    ):
        few(k)
        with pytest.raises(SystemExit, match=f"error: .*{re.escape(message)}"):
            evaluate.run(evaluate.Arguments(finished, **options))
    monkeypatch.undo()
    workdir, compare = f"--workdir={finished}", ["--compare", str(finished)]
    for argv, message in (
        ([workdir, f"--samples={drawn[0]}", "--n=20"], "they are drawn already; give no n"),
        ([workdir, f"--samples={drawn[0]}", "--steps=3"], "they are drawn already; give no n"),
        ([*compare, "--bound_samples=3"], "compare: only reads and draws"),
        ([workdir, "--held_out=0", "--bound_samples=3"], "bound_samples: without effect, because"),
        ([workdir, "--flow_steps=3"], "flow_steps=3: without effect unless flow=True"),
        ([workdir, "--n=0", "--draws=3"], "draws: without effect, because n=0 draws no samples"),
        ([*compare, workdir], "compare: only reads and draws"),
    ):
        with pytest.raises(SystemExit, match=f"error: .*{re.escape(message)}"):
            evaluate.main(argv)
