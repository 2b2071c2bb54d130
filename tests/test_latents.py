"""Latents: their draws and scales, the autoencoder's files, and samples in pixels."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from test_published import arrays_of_dit, write_diffusers as write_dit
from test_train import run

import evaluate
import sample
import train
from diffjax import checkpoint, data, keys, published
from diffjax.data import Examples, convert
from diffjax.evaluation import pixels
from diffjax.experiment import Config, Data, config as config_lib, dataset, resolve
from diffjax.latents import LATENTS, draw, scaled
from diffjax.models import DiTConfig, UNetConfig, autoencoder_kl as models
from diffjax.published import autoencoder_kl, weights
from diffjax.training.runners import RUNNERS

SMALL = models.AutoencoderKLConfig(widths=(4, 8), blocks=1, groups=2, channels=1)
FULL = models.AutoencoderKLConfig()


def arrays_of(config, names, seed=0):
    """Random arrays of an autoencoder by the names, and with the axes, of a published file."""
    rng, state = np.random.default_rng(seed), {}
    for path, like in autoencoder_kl.expected(config).items():
        module, _, leaf = path.rpartition("/")
        block, _, layer = module.rpartition("/")
        theirs = names.modules.get(module) or f"{names.modules[block]}.{names.layers[layer]}"
        x = rng.standard_normal(like.shape).astype(np.float32) / 3 + (leaf == "scale")
        x = np.moveaxis(x, (-1, -2), (0, 1)) if leaf == "kernel" else x
        state[theirs + (".bias" if leaf == "bias" else ".weight")] = np.ascontiguousarray(x)
    return state


def write_diffusers(folder, config=SMALL, **changes):
    """A folder of diffusers. Changes are entries of its config, or, with a point, arrays."""
    folder.mkdir(exist_ok=True)
    state = arrays_of(config, autoencoder_kl.names_of_diffusers(config))
    for name in [name for name in state if ".to_qkv." in name]:
        for q, rows in zip("qkv", np.split(state.pop(name), 3), strict=True):
            state[name.replace("to_qkv", f"to_{q}")] = rows
    state |= {name: x for name, x in changes.items() if "." in name}
    about = {"_class_name": "AutoencoderKL", "norm_num_groups": config.groups}
    about |= {name: x for name, x in changes.items() if "." not in name}
    (folder / "config.json").write_text(json.dumps(about))
    state = {name: x for name, x in state.items() if x is not None}
    safetensors.numpy.save_file(state, folder / "diffusion_pytorch_model.safetensors")
    return folder


def moments(n=32, shape=(4, 4, 4), seed=0):
    """Means of deviation 5, and standard deviations, in float16."""
    rng = np.random.default_rng(seed)
    mean, std = 5 * rng.standard_normal((n, *shape)), rng.uniform(0, 2, (n, *shape))
    return np.concatenate([mean, std], axis=-1).astype(np.float16)


def latent_config(**options):
    model = DiTConfig(width=16, blocks=1, heads=2)
    found = Data("npz", shape=(4, 4, 4), latents="sd", **options)
    return Config(data=found, model=model, batch_size=16)


def test_a_latent_is_drawn_anew_from_its_moments():
    x = jnp.asarray([[[[3.0, -1.0, 0.5, 2.0]]]])
    each = jax.random.split(jax.random.key(0), 4000)
    drawn = draw(each, jnp.broadcast_to(x, (4000, *x.shape[1:])), LATENTS["sd"])[:, None]
    np.testing.assert_allclose(drawn.mean(0)[0, 0, 0], [3 * 0.18215, -0.18215], atol=0.03)
    np.testing.assert_allclose(drawn.std(0)[0, 0, 0], [0.5 * 0.18215, 2 * 0.18215], rtol=0.05)


def test_a_draw_depends_on_its_own_key_alone():
    x, each = jnp.asarray(moments(6), jnp.float32), keys.per_example(jax.random.key(1), 6)
    whole = draw(each, x, LATENTS["edm2"])
    np.testing.assert_array_equal(draw(each[2:4], x[2:4], LATENTS["edm2"]), whole[2:4])


@pytest.mark.parametrize(("kind", "std"), [("sd", 1.0), ("edm2", 0.5)])
def test_latents_of_the_expected_moments_have_the_expected_deviation(kind, std):
    row = LATENTS[kind]
    z = np.random.default_rng(0).standard_normal((200, 8, 8, 4)) * row.spread + row.mean
    found = np.asarray(scaled(jnp.asarray(z, jnp.float32), row))
    np.testing.assert_allclose(found.mean((0, 1, 2)), 0, atol=0.02)
    np.testing.assert_allclose(found.std((0, 1, 2)), std, rtol=0.02)


def test_only_images_are_clipped():
    large = lambda x_t, log_snr, cond: 0 * x_t + 3
    config = dataclasses.replace(latent_config(), target="x_0")
    x_t = jnp.ones((2, 4, 4, 4))
    e = resolve(config)
    assert float(e.clip(e.denoiser(large))(x_t, 0.5).x_0.max()) > 2.99
    images = dataclasses.replace(config, data=Data("npz", shape=(4, 4, 4)))
    e = resolve(images)
    assert float(e.clip(e.denoiser(large))(x_t, 0.5).x_0.max()) == 1


def test_training_sees_draws_of_latents():
    """A network that says 0 has the loss E x_0^2 = (mean^2 + std^2) 0.18215^2."""
    config = dataclasses.replace(latent_config(), target="x_0", batch_size=512)
    e = resolve(config)._replace(apply=lambda params, x_t, log_snr, cond, **_: 0 * x_t)
    x = moments(512)
    batch = {"x": np.float32(x), "index": np.arange(512, dtype=np.int32)}
    loss = train.make_loss(e, None)
    seen = [loss(jax.random.key(i), None, batch, ()).seen["loss"] for i in range(2)]
    mean, std = np.split(np.float64(x), 2, axis=-1)
    assert np.mean(seen) == pytest.approx(0.18215**2 * (mean**2 + std**2).mean(), rel=0.02)
    assert not np.allclose(*seen, rtol=1e-3)


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (FULL, 83_653_863),
        (dataclasses.replace(FULL, latent_channels=16, quant=False), 83_819_683),
    ],
)
def test_the_autoencoder_has_the_published_number_of_parameters(config, parameters):
    expected = autoencoder_kl.expected(config).values()
    assert sum(int(np.prod(x.shape)) for x in expected) == parameters
    state = arrays_of_shapes(config)
    assert autoencoder_kl.make_config(None, state, 32) == config


def arrays_of_shapes(config):
    """What `make_config` looks at, of a published file, without its numbers."""
    zeros = lambda *shape: np.broadcast_to(np.float32(0), shape)
    c = config
    state = {
        "encoder.conv_in.weight": zeros(c.widths[0], c.channels, 3, 3),
        "decoder.conv_in.weight": zeros(c.widths[-1], c.latent_channels, 3, 3),
    }
    state |= {"quant_conv.weight": zeros(8, 8, 1, 1)} if c.quant else {}
    for level, width in enumerate(c.widths):
        for i in range(c.blocks):
            state[f"encoder.down_blocks.{level}.resnets.{i}.conv1.weight"] = zeros(width, 1, 3, 3)
    return state


def test_the_files_of_compvis_and_of_diffusers_are_the_same_autoencoder(tmp_path):
    """Alone, or in a whole Stable Diffusion; there in half precision, and with other networks."""
    folder = write_diffusers(tmp_path / "vae")
    same = autoencoder_kl.load(folder)
    assert autoencoder_kl.load(tmp_path).sha256() == same.sha256()  # the folder of a pipeline
    state = arrays_of(SMALL, autoencoder_kl.names_of_compvis(SMALL))
    for name in [name for name in state if ".to_qkv." in name]:
        for q, rows in zip("qkv", np.split(state.pop(name), 3), strict=True):
            # 1x1 convolutions.
            new = rows[..., None, None] if rows.ndim == 2 else rows
            state[name.replace("to_qkv", q)] = np.ascontiguousarray(new)
    for prefix, others in (("", "loss."), ("first_stage_model.", "model.diffusion_model.")):
        named = {prefix + name: x for name, x in state.items()}
        named[f"{others}weight"] = np.zeros(3, np.float32)
        safetensors.numpy.save_file(named, tmp_path / "all.safetensors")
        params = autoencoder_kl._state(tmp_path, named)
        assert params.keys() == state.keys()
        found = autoencoder_kl.matched(
            tmp_path,
            autoencoder_kl._joined(params),
            autoencoder_kl.expected(SMALL),
            autoencoder_kl.names_of_compvis(SMALL),
        )
        jax.tree.map(np.testing.assert_array_equal, found, same.params)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"act_fn": "relu"}, "act_fn.*relu"),
        ({"_class_name": "VQModel"}, "_class_name=VQModel, need AutoencoderKL"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"]}, "AttnDownEncoderBlock2D"),
        ({"encoder.conv_in.weight": None}, "no encoder.conv_in.weight"),
        ({"decoder.conv_out.bias": None}, "decoder.conv_out.bias is missing"),
        ({"decoder.extra.weight": np.ones(2, np.float32)}, "decoder.extra.weight is not an array"),
    ],
    ids=str,
)
def test_what_is_no_such_autoencoder_is_refused(tmp_path, change, message):
    write_diffusers(tmp_path, **change)
    with pytest.raises(ValueError, match=message):
        autoencoder_kl.load(tmp_path)


def test_files_that_are_not_there_are_named(tmp_path):
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(FileNotFoundError, match=re.escape(str(path))):
            autoencoder_kl.load(path)


def test_images_that_do_not_halve_are_refused(tmp_path):
    found = autoencoder_kl.load(write_diffusers(tmp_path))
    with pytest.raises(ValueError, match="7 x 8 pixels"):
        found.encode(jnp.zeros((1, 7, 8, 1)), LATENTS["sd"])
    with pytest.raises(ValueError, match=r"\(8, 8, 3\): the autoencoder takes"):
        pixels.encoded(Examples(np.zeros((2, 8, 8, 3), np.uint8)), found, "sd")


@pytest.mark.faults
def test_edm2_gives_its_autoencoder_images_in_zero_to_one(tmp_path):
    found = autoencoder_kl.load(write_diffusers(tmp_path))
    x = np.random.default_rng(0).uniform(-1, 1, (2, 8, 8, 1)).astype(np.float32)
    as_edm2 = found.encode(x, LATENTS["edm2"])
    np.testing.assert_allclose(as_edm2, found.encode((x + 1) / 2, LATENTS["sd"]), atol=1e-5)
    z = np.split(np.asarray(as_edm2), 2, -1)[0]
    half = [found.decode(scaled(z, LATENTS[kind]), LATENTS[kind]) for kind in LATENTS]
    np.testing.assert_allclose(half[0], (half[1] + 1) / 2, rtol=1e-3, atol=1e-4)


@pytest.fixture
def autoencoder(tmp_path):
    """The folder of an autoencoder of grey images."""
    return write_diffusers(tmp_path / "vae")


@pytest.mark.faults
@pytest.mark.parametrize("parallel", [*RUNNERS])
def test_samples_of_latents_are_images_where_the_autoencoder_is(autoencoder, parallel):
    config = latent_config(autoencoder=autoencoder)
    form = pixels.form(config, RUNNERS[parallel](1), (4, 4, 4), np.float16)
    assert (form.shape, form.dtype, form.about["space"]["samples"]) == (
        *((8, 8, 1), np.uint8),
        "decoded images",
    )
    x = np.random.default_rng(0).standard_normal((19, 4, 4, 4)).astype(np.float32)
    found = autoencoder_kl.load(autoencoder)
    alone = models.decode(SMALL, found.params, x[7:8] / 0.18215)
    np.testing.assert_allclose(form.decode(x)[7:8], alone, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(form.store(x), data.to_bytes(form.decode(x)))
    # Examples, beside which they are measured, are decoded from their means.
    given = moments(6)
    shown = form.examples(Examples(given)).x
    assert (shown.shape, shown.dtype) == ((6, 8, 8, 1), np.uint8)
    mean = np.float32(given[2:3, ..., :4]) * 0.18215
    np.testing.assert_array_equal(shown[2:3], form.store(mean))


def test_samples_of_latents_stay_latents_without_an_autoencoder():
    form = pixels.form(latent_config(), RUNNERS["pmap"](1), (4, 4, 4), np.float16)
    x = 3 * np.random.default_rng(0).standard_normal((5, 4, 4, 4)).astype(np.float32)
    assert form.dtype == np.float32 and form.about["space"]["samples"] == "latents"
    np.testing.assert_array_equal(form.store(x), x)
    shown = form.examples(Examples(moments(5))).x[1:3]
    np.testing.assert_allclose(shown, np.float32(moments(5)[1:3, ..., :4]) * 0.18215, rtol=1e-6)


def test_an_autoencoder_of_other_latents_is_refused(tmp_path):
    folder = write_diffusers(tmp_path, dataclasses.replace(SMALL, latent_channels=6))
    with pytest.raises(ValueError, match=r"have 6 channels.*\(4, 4, 4\)"):
        pixels.read(folder, (4, 4, 4))


@pytest.mark.faults
def test_encoding_is_of_what_is_indexed(autoencoder):
    found, train_set = autoencoder_kl.load(autoencoder), data.load("digits").train
    encoded = pixels.encoded(train_set, found, "sd")
    assert (encoded.x.shape, encoded.x.dtype) == ((1497, 4, 4, 8), np.float16)
    x = data.take(train_set, np.array([7]))["x"]
    expected = np.asarray(found.encode(x, LATENTS["sd"]))
    np.testing.assert_allclose(encoded.x[np.array([7])], expected, rtol=2e-3, atol=1e-6)
    assert encoded.label is train_set.label
    whole = pixels.encoded(Examples(train_set.x[:70]), found, "sd").x
    np.testing.assert_array_equal(whole[:], np.concatenate([whole[:5], whole[5:70]]))
    each = (pixels.encoded(train_set, found, kind).x for kind in LATENTS)
    prints = [data.fingerprint(Examples(x)) for x in each]
    assert prints[0] != prints[1] and json.loads(json.dumps(prints)) == prints
    data.checked(encoded.x[:9], encoded.label[:9])


@pytest.mark.faults
def test_latents_are_converted_to_records(autoencoder, tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (70, 8, 8, 1), np.uint8)
    np.savez(tmp_path / "x.npz", x_train=x, x_test=x[:3])
    argv = ["npz", str(tmp_path / "out"), f"--path={tmp_path / 'x.npz'}"]
    for more, message in (
        (["--workers=2"], "encoded on the devices, by this process, and stored raw"),
        (["--latents=sdxl"], "unknown latents 'sdxl': one of sd, edm2"),
    ):
        with pytest.raises(SystemExit, match=message):
            convert.main([*argv, f"--encode={autoencoder}", *more])
    convert.main([*argv, f"--encode={autoencoder}", "--mirror=True"])
    stored = data.load("records", tmp_path / "out").train
    both = np.concatenate([x, x[:, :, ::-1]]).astype(np.float32) / 127.5 - 1
    expected = autoencoder_kl.load(autoencoder).encode(both, LATENTS["sd"])
    np.testing.assert_allclose(np.asarray(stored.x[:], np.float32), expected, rtol=2e-3, atol=1e-4)
    batch = data.train_batch(stored, seed=0, step=0, batch_size=8)
    drawn = resolve(latent_config()).example(jax.random.key(0), batch["x"])
    assert drawn.shape == (8, 4, 4, 4) and drawn.dtype == jnp.float32


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (moments()[..., :7], "latents are .*2 channels"),
        (moments()[..., 0], "latents are .*2 channels"),
        (-moments(), "standard deviation that is not finite and at least 0"),
        (np.where(moments() > 5, np.float16(np.inf), moments()), "mean that is not finite"),
    ],
)
def test_moments_that_are_none_are_refused(arrays, message):
    with pytest.raises(ValueError, match=message):
        data.checked(arrays)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(latents="vq"), "unknown latents 'vq': one of sd, edm2"),
        (dict(latents="sd", flip=True), "mirrored latent"),
        (dict(latents="sd", size=4), "data.size=4: latents are not averaged"),
        (dict(autoencoder="vae"), "data.autoencoder=vae: needs data.latents, one of sd"),
    ],
)
def test_impossible_latents_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        resolve(Config(data=Data("npz", **options)))


def test_data_and_config_must_agree_that_they_are_latents():
    config, x = latent_config(), moments()
    dataset.check_data(config, Examples(x), Examples(x))
    images = np.zeros((32, 4, 4, 4), np.float32)
    for data_of, part in ((Data("npz"), x), (config.data, images)):
        other = dataclasses.replace(config, data=data_of)
        with pytest.raises(ValueError, match="data.latents=.*float16, need one of sd, edm2"):
            dataset.check_data(other, Examples(part), Examples(part))
    small = dataclasses.replace(
        config, low_resolution=2, model=UNetConfig(image_cond=True, mults=(1,), attention=())
    )
    with pytest.raises(ValueError, match="super-resolution is of images"):
        resolve(small)


def test_a_file_of_a_network_names_no_autoencoder(tmp_path):
    config = latent_config(autoencoder="vae")
    made = jax.eval_shape(lambda: resolve(config).init(jax.random.key(0), (4, 4, 4)))
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), made)
    weights.save(tmp_path / "a.safetensors", params, config)
    read = checkpoint.read_config(tmp_path / "a.safetensors")
    assert read.data == Data("npz", shape=(4, 4, 4), latents="sd")
    assert config_lib.differences(config, read) == []


@pytest.mark.faults
def test_a_published_dit_is_sampled_in_pixels_or_in_latents(tmp_path):
    """Of random weights; the latents leave [-1, 1], to which images are clipped."""
    (tmp_path / "dit").mkdir()
    write_dit(tmp_path / "dit", arrays_of_dit())
    params, config = published.load(tmp_path / "dit")
    weights.save(tmp_path / "dit.safetensors", params, config)
    argv = [f"--workdir={tmp_path}/dit.safetensors", "--n=4", "--steps=2"]
    sample.main([*argv, f"--out={tmp_path}/latents.npz"])
    vae = write_diffusers(tmp_path / "vae", dataclasses.replace(SMALL, channels=3))
    sample.main([*argv, f"--out={tmp_path}/images.npz", f"--autoencoder={vae}"])
    latents, images = (np.load(tmp_path / f"{name}.npz")["x"] for name in ("latents", "images"))
    side = config.data.shape[0]
    assert (latents.shape, latents.dtype) == ((4, side, side, 4), np.float32)
    assert (images.shape, images.dtype) == ((4, 2 * side, 2 * side, 3), np.uint8)
    assert np.abs(latents).max() > 1.5
    decoded = autoencoder_kl.load(vae).decode(latents, LATENTS["sd"])
    assert np.abs(data.to_bytes(np.asarray(decoded)).astype(int) - images).max() <= 1
    with pytest.raises(SystemExit, match="settings; choose another --out.*"):
        sample.main([*argv, f"--out={tmp_path}/images.npz"])


@pytest.mark.faults
def test_latents_are_trained_drawn_and_evaluated_in_pixels(autoencoder, tmp_path):
    found = autoencoder_kl.load(autoencoder)
    parts = [pixels.encoded(part, found, "sd") for part in data.load("digits")]
    arrays = {}
    for name, part in zip(("train", "test"), parts, strict=True):
        arrays |= {f"x_{name}": part.x[:64], f"y_{name}": part.label[:64]}
    np.savez(tmp_path / "a.npz", **arrays)
    argv = ["--config=configs/digits.py:smoke", "--config.steps=20", "--config.model.attention"]
    argv += ["--config.data.name=npz", f"--config.data.path={tmp_path}/a.npz"]
    argv += ["--config.data.latents=sd", f"--config.data.autoencoder={autoencoder}"]
    argv += ["--config.eval.features=pca24", "--config.eval.every=20", "--config.eval.n=20"]
    run(tmp_path / "run", *argv, "--config.sampling.eval_samples=20")
    sample.main([f"--workdir={tmp_path}/run", "--n=20", "--steps=2"])
    with np.load(tmp_path / "run/generated.npz") as made:
        assert (made["x"].shape, made["x"].dtype) == ((20, 8, 8, 1), np.uint8)
        assert json.loads(str(made["settings"]))["space"]["samples"] == "decoded images"
    evaluate.main(
        [f"--workdir={tmp_path}/run", f"--samples={tmp_path}/run/generated.npz", "--held_out=4"]
    )
    result = json.loads((tmp_path / "run/evaluation.json").read_text())
    assert result["space"]["latents"] == "sd" and result["held_out"]["levels"] is None
