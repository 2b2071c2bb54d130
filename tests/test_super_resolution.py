"""Super-resolution: what is shrunk and enlarged, and that the network looks at what it is given."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from test_train import assert_bitwise_equal, interrupted, newest, rows_of, run

import diffjax
import evaluate
import sample
import train
from diffjax import checkpoint, data
from diffjax.evaluation import sampling
from diffjax.evaluation.sampling import make_generate
from diffjax.experiment import dataset, resolve, rules
from diffjax.experiment.command_line import from_file
from diffjax.inverse import downsampling
from diffjax.published import weights
from diffjax.super_resolution import beside, enlarge, psnr, shrink, small_image
from diffjax.types import expand

SCHEDULE = diffjax.cosine(-10.0, 10.0)
SMALL = jax.random.uniform(jax.random.key(0), (64, 4, 4, 1), minval=-1.0)


def test_pixels_that_are_made_larger_shrink_to_what_they_were():
    coarse = SMALL.repeat(2, 1).repeat(2, 2)
    np.testing.assert_allclose(shrink(coarse, 4), SMALL, rtol=1e-6)


@pytest.mark.parametrize(("height", "width", "low"), [(28, 28, 10), (12, 18, 8), (9, 15, 6)])
def test_a_factor_that_is_no_whole_number_counts_pixels_in_part(height, width, low):
    """The oracle makes each pixel `low` pixels, of which the means then have whole factors."""
    x = jax.random.normal(jax.random.key(4), (2, height, width, 3))
    fine = x.repeat(low, 1).repeat(low, 2)
    small = shrink(x, low)
    assert small.shape == (2, low, width * low // height, 3)
    np.testing.assert_allclose(small, downsampling(height)(fine), atol=2e-6)
    np.testing.assert_allclose(small.mean((1, 2)), x.mean((1, 2)), atol=1e-6)
    assert enlarge(small, height).shape == x.shape


def test_sizes_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="height=3: images of 4 x 6 then have a width of 4.5"):
        shrink(jnp.zeros((1, 4, 6, 1)), 3)
    with pytest.raises(ValueError, match="height=5: must be at most that of the images, 4"):
        shrink(SMALL, 5)
    with pytest.raises(ValueError, match="height=0: "):
        shrink(SMALL, 0)


def test_bytes_are_averaged_as_numbers():
    assert shrink(jnp.full((1, 4, 4, 1), 200, jnp.uint8), 2)[0, 0, 0, 0] == 200


def test_a_ramp_stays_one_in_place():
    """Bicubic interpolation is exact on straight lines, where it does not see the edge."""
    ramp = lambda n: jnp.broadcast_to(
        ((jnp.arange(n) + 0.5) / n)[None, :, None, None], (1, n, n, 1)
    )
    np.testing.assert_allclose(enlarge(ramp(8), 16)[:, 4:12], ramp(16)[:, 4:12], atol=1e-6)
    np.testing.assert_allclose(shrink(ramp(16), 8), ramp(8), atol=1e-6)


def test_psnr_is_20_decibels_for_each_tenth_of_the_error():
    x = jnp.zeros((2, 4, 4, 3))
    error = jnp.array([0.02, 0.2])[:, None, None, None]
    np.testing.assert_allclose(psnr(x + error, x), [40, 20], rtol=1e-5)


def test_noise_on_the_small_image_grows_from_none():
    key = jax.random.key(1)
    none = small_image(key, SCHEDULE, SMALL, 0.0)
    assert jnp.abs(none["image"] - SMALL).max() < 0.03  # four grey levels
    assert none["image_log_snr"].shape == (64,)
    np.testing.assert_allclose(none["image_log_snr"], 10.0, rtol=1e-5)
    all_noise = small_image(key, SCHEDULE, SMALL, 1.0)["image"]
    assert 0.9 < all_noise.std() < 1.1
    assert abs(np.corrcoef(all_noise.ravel(), SMALL.ravel())[0, 1]) < 0.1
    # Each at its own level, and from its own key.
    t = jnp.linspace(0.0, 1.0, 64)
    mixed = small_image(key, SCHEDULE, SMALL, t)["image"]
    np.testing.assert_allclose(mixed[-1], all_noise[-1], rtol=1e-5)


def test_a_picture_has_the_four_in_rows():
    truth = jax.random.uniform(jax.random.key(2), (3, 8, 8, 1))
    rows = beside(0 * truth, truth, 4).reshape(3, 4, 8, 8, 1)
    np.testing.assert_allclose(shrink(rows[:, 0], 4), shrink(truth, 4), rtol=1e-6)
    np.testing.assert_array_equal(rows[:, 1], enlarge(shrink(truth, 4), 8))
    assert not rows[:, 2].any()
    np.testing.assert_array_equal(rows[:, 3], truth)


ARGV = ["--config=configs/fashion_sr.py:smoke", "--config.data.name=digits"]
ARGV += ["--config.low_resolution=4"]
ARGV += ["--config.model.patch=1", "--config.optimizer.warmup=10", "--config.ema=0.9"]


@pytest.mark.faults
def test_a_run_looks_at_the_small_image_and_resumes_bit_for_bit(tmp_path, capsys):
    argv = [*ARGV, "--config.steps=40", "--config.sampling.eval_samples=64"]
    run(tmp_path / "whole", *argv)
    run(interrupted(tmp_path / "whole", tmp_path / "parts"), *argv)
    assert_bitwise_equal(newest(tmp_path / "parts")[1], newest(tmp_path / "whole")[1])
    assert rows_of(tmp_path / "parts") == rows_of(tmp_path / "whole")
    assert "psnr_bicubic" in capsys.readouterr().out

    network, params, config = checkpoint.load(tmp_path / "whole")
    _, test = dataset.load_data(config)
    batch = data.first(test, 256)
    keys = jax.random.split(jax.random.key(3), 256)
    condition = resolve(config).condition

    @jax.jit
    def loss(given):
        net = functools.partial(network, params)
        cond = condition(keys, given, cond_noise=0.0)
        t = jnp.linspace(0.3, 0.9, 256)
        return diffjax.diffusion_loss(
            keys, net, SCHEDULE, config.target, batch["x"], cond, t=t
        ).mean()

    others = batch | {"x": batch["x"][::-1]}
    assert loss(others) > 1.1 * loss(batch)


SMOKE = from_file("configs/fashion_sr.py:smoke")


def changed(config, sampling=None, model=None, **changes):
    """The config with other fields, some of them of its sampling and its model."""
    sampling = dataclasses.replace(config.sampling, **(sampling or {}))
    model = dataclasses.replace(config.model, **(model or {}))
    return dataclasses.replace(config, sampling=sampling, model=model, **changes)


DROPS = changed(SMOKE, model={"labels": 10, "null_label": True}, low_resolution=4)


@pytest.mark.parametrize(("label", "image"), [(0.3, 0.1), (0.1, 0.3), (0.2, 0.2)])
def test_the_label_and_the_image_are_dropped_by_one_number(label, image):
    e = resolve(dataclasses.replace(DROPS, label_drop=label, low_resolution_drop=image))
    n = 4000
    batch = {"label": jnp.arange(n) % 10, "small": jnp.zeros((n, 4, 4, 1))}
    condition = jax.jit(functools.partial(e.condition, drop=True))
    cond = condition(jax.random.split(jax.random.key(0), n), batch)
    no_label, no_image = cond["label"] == 10, cond["image_log_snr"] < -9.9
    error = 4 * (0.25 / n) ** 0.5
    assert abs(no_label.mean() - label) < error and abs(no_image.mean() - image) < error
    assert (no_label & no_image).sum() == min(no_label.sum(), no_image.sum())
    others = cond["image_log_snr"][~no_image]
    assert others.min() >= e.schedule.log_snr(DROPS.max_cond_noise) - 1e-3
    kept = e.condition(jax.random.split(jax.random.key(0), n), batch)
    assert (kept["label"] == batch["label"]).all() and kept["image_log_snr"].min() > -9


@pytest.mark.parametrize(
    ("without", "reads_label", "reads_image"),
    [("label", False, True), ("image", True, False), ("both", False, False)],
)
@pytest.mark.parametrize("name", ["classifier_free", "cfg_plus_plus"])
def test_guidance_of_weight_zero_does_not_see_what_it_compares_without(
    name, without, reads_label, reads_image
):
    """The network's output is its label, and the mean of its image where this is not noise."""
    chain = (f"{name}:weight=0,without={without}",)
    drops = {"label": (0.2, 0.1), "image": (0.1, 0.2), "both": (0.1, 0.1)}[without]
    config = changed(
        DROPS,
        sampling={"guidance": chain, "cond_noise": 0.0, "steps": 1, "options": {}},
        target="x_0",
        label_drop=drops[0],
        low_resolution_drop=drops[1],
    )

    def apply(_, x_t, log_snr, cond):
        image = jnp.where(cond["image_log_snr"] > 0, cond["image"].mean((1, 2, 3)), 0)
        label = jnp.where(cond["label"] < 10, cond["label"], 0)
        return jnp.broadcast_to((0.3 * image + label)[:, None, None, None], x_t.shape)

    e = resolve(config)._replace(apply=apply)
    e = e._replace(clip=lambda denoise: denoise)
    batch = {"index": np.arange(3), "label": np.array([1, 2, 3])}
    small = jnp.broadcast_to(jnp.array([-1.0, 0.5, 1.0])[:, None, None, None], (3, 4, 4, 1))
    x = make_generate(e, (8, 8, 1))(None, batch | {"small": small}).mean((1, 2, 3))
    seen = reads_label * batch["label"] + reads_image * 0.3 * small[:, 0, 0, 0]
    if name == "cfg_plus_plus":  # whose one step ends in noise of its own
        x, seen = jnp.diff(x), jnp.diff(seen)
        np.testing.assert_allclose(x, seen, atol=0.1)
    else:
        np.testing.assert_allclose(x, seen, atol=0.02)


WINDOWS = changed(
    SMOKE,
    {"overlap": 2, "cond_noise": 0.0},
    data=dataclasses.replace(SMOKE.data, name="digits", shape=(8, 8, 1), size=None),
    low_resolution=4,
    max_cond_noise=0.0,
    target="x_0",
    augmentation="window",
    augmentation_options={"side": 4},
)


def test_training_on_windows_gives_each_window_its_part_of_the_small_image():
    """At little noise the small image is the mean of each square of x_t, and of no other window."""
    batch = data.train_batch(data.load("digits").train, 0, 0, 64)
    seen = []

    def apply(params, x_t, log_snr, cond, **_):
        seen.append((x_t / expand(jnp.sqrt(jax.nn.sigmoid(log_snr)), x_t), log_snr, cond["image"]))
        return 0 * x_t

    e = resolve(WINDOWS)._replace(apply=apply)
    for held_out in (None, 64):
        train.make_loss(e, None, held_out)(jax.random.key(0), {}, batch, e.times.init())
    for x, log_snr, image in seen:
        assert x.shape == (64, 4, 4, 1) and image.shape == (64, 2, 2, 1)
        clear = log_snr > 3
        own, others = (jnp.abs(shrink(x, 2) - i)[clear].mean() for i in (image, image[::-1]))
        assert clear.sum() > 5 and 4 * own < others


def test_a_network_of_windows_enlarges_a_whole_image():
    """It makes each pixel of the small image four, wherever the window is."""
    copy = lambda _, x_t, log_snr, cond: cond["image"].repeat(2, 1).repeat(2, 2)
    e = resolve(WINDOWS)._replace(apply=copy)
    small = jax.random.uniform(jax.random.key(0), (3, 4, 4, 1), minval=-0.9, maxval=0.9)
    drawn = make_generate(e, (8, 8, 1))(None, {"index": jnp.arange(3), "small": small})
    np.testing.assert_allclose(drawn, small.repeat(2, 1).repeat(2, 2), atol=0.05)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": SMOKE.data}, "low_resolution=4 with augmentation=window: needs the size of the"),
        (
            {"sampling": dataclasses.replace(WINDOWS.sampling, overlap=3)},
            "low_resolution=4 of images of 8 x 8: the small images of windows of side=4, with "
            "sampling.overlap=3, are no whole pixels",
        ),
        ({"augmentation_options": {"side": 3}}, "windows of side=3, with sampling.overlap=2, are"),
    ],
)
def test_windows_without_a_small_image_of_whole_pixels_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        resolve(dataclasses.replace(WINDOWS, **changes))


GUIDED = {"guidance": ("classifier_free:weight=2",)}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            changed(SMOKE, GUIDED),
            r"sampling.guidance=classifier_free:weight=2: needs model.null_label=True and "
            "label_drop above 0, or "
            "low_resolution_drop above 0",
        ),
        (
            changed(SMOKE, {"guidance": ("apg:weight=2,without=text",)}, low_resolution_drop=0.1),
            "unknown without 'text': one of label, image, both",
        ),
        (
            changed(SMOKE, {"guidance": ("apg:weight=2,without=both",)}, low_resolution_drop=0.1),
            "apg:weight=2,without=both: the run is never trained without its label",
        ),
        (
            changed(DROPS, {"guidance": ("apg:weight=2,without=image",)}, label_drop=0.2),
            "never trained without its image",
        ),
        (
            changed(
                DROPS,
                {"guidance": ("apg:weight=2,without=image",)},
                label_drop=0.1,
                low_resolution_drop=0.1,
            ),
            "label_drop=0.1 and low_resolution_drop=0.1 the image is dropped only together with "
            "the label; drop it more often",
        ),
        (changed(SMOKE, low_resolution_drop=1.0), r"low_resolution_drop=1.0: must be in \[0, 1\)"),
        (
            changed(
                SMOKE,
                {"cond_noise": 0.0},
                {"image_cond": False},
                low_resolution=None,
                max_cond_noise=0.0,
                low_resolution_drop=0.1,
            ),
            "low_resolution_drop=0.1: needs low_resolution",
        ),
        (
            changed(from_file("configs/digits.py"), {"cascade": ("digits",)}),
            "sampling.cascade=digits: its samples are small images; a run that enlarges",
        ),
    ],
)
def test_guidance_that_the_run_was_not_trained_for_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        resolve(config)


def stage(low, side, level=None):
    """A stage that draws images of one grey level, its parameter, or copies what it is given."""
    config = changed(
        SMOKE,
        {"cond_noise": 0.0},
        {"image_cond": low is not None},
        target="x_0",
        low_resolution=low,
        max_cond_noise=0.0,
        data=data_section(side),
    )
    draw = lambda level, x_t, log_snr, cond: jnp.full_like(x_t, level)
    copy = lambda _, x_t, log_snr, cond: enlarge(cond["image"], x_t.shape[1])
    e = resolve(config)._replace(apply=draw if low is None else copy)
    return sampling.Stage(e, (side, side, 1))


def data_section(side):
    return dataclasses.replace(SMOKE.data, shape=(side, side, 1))


def test_a_cascade_of_three_stages_enlarges_what_the_first_draws():
    cascade = sampling.make_cascade([stage(None, 6), stage(6, 9), stage(9, 12)])
    for level in (-0.5, 0.5):
        x = cascade((level, None, None), {"index": jnp.arange(3)})
        assert x.shape == (3, 12, 12, 1)
        np.testing.assert_allclose(x, level, atol=0.05)


@pytest.mark.faults
def test_the_stages_draw_different_noise():
    """A denoiser that returns x_t / alpha_t shows the noise that a stage starts from."""
    shown = []

    def apply(_, x_t, log_snr, cond):
        shown.append(x_t)
        return 0 * x_t

    stages = [stage(None, 8), stage(8, 8)]
    stages = [s._replace(experiment=s.experiment._replace(apply=apply)) for s in stages]
    with jax.disable_jit():
        sampling.make_cascade(stages)((None, None), {"index": jnp.arange(4)})
    first, second = (x.ravel() for x in (shown[0], shown[len(shown) // 2]))
    assert 0.8 < first.std() < 1.2 and abs(np.corrcoef(first, second)[0, 1]) < 0.25


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([(4, 8), (8, 16)], "stage 1 of the cascade: low_resolution=4: it enlarges images, and ca"),
        ([(None, 4), (None, 8)], "stage 2 of the cascade: low_resolution=None: it draws images"),
        (
            [(None, 4), (4, 8), (6, 12)],
            r"stage 3 of the cascade: it enlarges images of shape \(6, 6, 1\), and the stage "
            r"before it draws \(8, 8, 1\)",
        ),
    ],
)
def test_stages_that_do_not_follow_one_another_are_refused(stages, message):
    with pytest.raises(ValueError, match=message):
        sampling.make_cascade([stage(*each) for each in stages])


@pytest.fixture(scope="module")
def enlarger(tmp_path_factory):
    """A network that enlarges 8 x 8 images to 12 x 12, as a file. It is not trained."""
    config = changed(SMOKE, {"steps": 2}, {"patch": 1}, low_resolution=8, data=data_section(12))
    params = resolve(config).init(jax.random.key(0), (12, 12, 1))
    file = tmp_path_factory.mktemp("enlarger") / "large.safetensors"
    weights.save(file, params, config)
    return file


@pytest.mark.faults
def test_sample_draws_a_cascade_of_runs_with_the_classes_of_its_first(enlarger, tmp_path):
    """The digits that come with diffjax have classes, and the run that enlarges them has none."""
    argv = [f"--workdir={enlarger}", "--cascade=digits", "--n=12", f"--out={tmp_path}/a.npz"]
    sample.main(argv)
    found, settings = sampling.read(tmp_path / "a.npz")
    assert found.x.shape == (12, 12, 12, 1) and (tmp_path / "a.png").is_file()
    np.testing.assert_array_equal(found.label, np.arange(12) % 10)
    (first,) = settings["stages"]
    assert first["parameters"]["sha256"] != settings["parameters"]["sha256"]
    assert first["config"]["data"]["name"] == "digits" and settings["cascade"] == ["digits"]


@pytest.mark.faults
def test_a_cascade_of_three_runs_trains_and_is_sampled_and_evaluated(tmp_path):
    """Of 4, 8 and 16 pixels; the pictures of the last run's training are of the cascade too."""
    draws = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), np.uint8)
    (tmp_path / "data").mkdir()
    for i, pixels in enumerate(draws):
        Image.fromarray(pixels).save(tmp_path / "data" / f"{i}.png")
    common = ["--config=folder:smoke", f"--config.data.path={tmp_path}/data", "--config.steps=2"]
    common += ["--config.sampling.guidance", "--config.sampling.steps=2"]
    runs = [tmp_path / side for side in ("4", "8", "16")]
    image = "--config.model.image_cond=True"
    words = {
        "4": [],
        "8": ["--config.low_resolution=4", image],
        "16": [
            "--config.low_resolution=8",
            image,
            "--config.sampling.cascade",
            *map(str, runs[:2]),
        ],
    }
    for workdir in runs:
        run(workdir, *common, f"--config.data.size={workdir.name}", *words[workdir.name])
    assert (runs[2] / "samples.png").is_file()
    sample.main([f"--workdir={runs[2]}", "--n=20", f"--out={tmp_path}/a.npz"])
    assert sampling.read(tmp_path / "a.npz")[0].x.shape == (20, 16, 16, 3)
    evaluate.main([f"--workdir={runs[2]}", "--n=20", "--held_out=0"])
    found = json.loads((runs[2] / "evaluation.json").read_text())
    assert found["frechet"] > 0 and len(found["samples"]["stages"]) == 2


def test_a_cascade_of_a_config_is_found_from_any_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("small").mkdir()
    config = changed(SMOKE, {"cascade": ("digits", "small")})
    found = dataset.recorded(config, data.load("digits").train).sampling.cascade
    assert found == ("digits", str(tmp_path / "small"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "low_resolution=8: the run enlarges images, and cannot draw samples by itself; give"),
        (["--cascade=runs/none"], "sampling.cascade=runs/none: "),
        (["--cascade", "digits", "digits"], "stage 2 of the cascade: low_resolution=None"),
        (["--cascade=fashion_mnist"], r"enlarges images of shape \(8, 8, 1\), and the stage"),
        (["--cascade=digits", "--label=10"], "label=10: the run has classes 0 to 9"),
        (
            ["--cascade=digits", "--shape", "16", "16", "1"],
            r"shape \(16, 16, 1\): the network enlarges images to \(12, 12, 1\)",
        ),
    ],
)
def test_a_cascade_that_cannot_be_is_refused_before_anything_is_compiled(
    enlarger, tmp_path, monkeypatch, words, message
):
    monkeypatch.setattr(sampling, "make_generate", lambda *_: pytest.fail("went on"))
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        sample.main([f"--workdir={enlarger}", f"--out={tmp_path}/a.npz", *words])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"low_resolution": 3}, "low_resolution: height=3: images of 28 x 42 then have a width of"),
        ({"low_resolution": 30}, "low_resolution=30: must be at most the height of images"),
        (
            {"low_resolution": None, "max_cond_noise": 0.0},
            "model.image_cond=True and low_resolution=None",
        ),
        (
            {"max_cond_noise": 0.05},
            "sampling.cond_noise=0.1, max_cond_noise=0.05: need 0 <= cond_noise <= max_cond_noise",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(changes, message):
    noise = 0.0 if changes.get("low_resolution", 14) is None else 0.1
    config = changed(SMOKE, {"cond_noise": noise}, **changes)
    part = data.Examples(np.zeros((64, 28, 42, 1), np.uint8))
    check = lambda: (rules.check(config), dataset.check_data(config, part, part))
    with pytest.raises(ValueError, match=message):
        check()
