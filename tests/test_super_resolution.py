"""Super-resolution: what is shrunk and enlarged, and that the network looks at what it is given."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_train import assert_bitwise_equal, interrupted, newest, rows_of, run

import diffjax
from diffjax import checkpoint, data
from diffjax.evaluation.sampling import make_cascade
from diffjax.experiment import dataset, resolve, rules
from diffjax.experiment.command_line import from_file
from diffjax.super_resolution import beside, enlarge, psnr, shrink, small_image

SCHEDULE = diffjax.cosine(-10.0, 10.0)
SMALL = jax.random.uniform(jax.random.key(0), (64, 4, 4, 1), minval=-1.0)


def test_pixels_that_are_made_larger_shrink_to_what_they_were():
    coarse = SMALL.repeat(2, 1).repeat(2, 2)
    np.testing.assert_allclose(shrink(coarse, 4), SMALL, rtol=1e-6)
    with pytest.raises(ValueError, match="side=3: must divide"):
        shrink(coarse, 3)


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


def test_a_cascade_enlarges_what_the_first_run_draws():
    """The first draws images of one grey level, its parameter; the second copies what it sees."""
    smoke = from_file("configs/fashion_sr.py:smoke")
    large = dataclasses.replace(smoke, low_resolution=4, target="x_0")
    sampling = dataclasses.replace(large.sampling, cond_noise=0.0)
    large = dataclasses.replace(large, sampling=sampling)
    small = dataclasses.replace(from_file("configs/fashion_mnist.py:small"), target="x_0")
    model = dataclasses.replace(smoke.model, image_cond=False)
    small = dataclasses.replace(small, model=model, sampling=sampling)
    draw = lambda level, x_t, log_snr, cond: jnp.full_like(x_t, level)
    copy = lambda _, x_t, log_snr, cond: enlarge(cond["image"], x_t.shape[1])
    first, second = resolve(small)._replace(apply=draw), resolve(large)._replace(apply=copy)
    cascade = make_cascade(first, second, (8, 8, 1))
    for level in (-0.5, 0.5):
        x = cascade((level, None), {"index": jnp.arange(3)})
        assert x.shape == (3, 8, 8, 1)
        np.testing.assert_allclose(x, level, atol=0.05)
    with pytest.raises(ValueError, match="low_resolution=None"):
        make_cascade(first, first, (8, 8, 1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"low_resolution": 3}, "low_resolution=3: must divide the side of square images"),
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
    config = dataclasses.replace(from_file("configs/fashion_sr.py:smoke"), **changes)
    if config.low_resolution is None:
        sampling = dataclasses.replace(config.sampling, cond_noise=0.0)
        config = dataclasses.replace(config, sampling=sampling)
    part = data.Examples(np.zeros((64, 28, 28, 1), np.uint8))
    check = lambda: (rules.check(config), dataset.check_data(config, part, part))
    with pytest.raises(ValueError, match=message):
        check()
