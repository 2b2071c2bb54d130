"""train.py as users run it: every config, resumption, and the input that it refuses."""

import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image
from test_images import draw_folder

import evaluate
import sample
import train
from catalogue import each, slow
from diffjax import TARGETS, checkpoint, data, plots, published
from diffjax.data import conversion
from diffjax.evaluation import distances, features, sampling
from diffjax.evaluation.sampling import Drawing
from diffjax.experiment import (
    command_line,
    config as config_lib,
    dataset,
    inspect as inspect_run,
    resolve,
    run_directory,
)
from diffjax.experiment.dataset import load_data
from diffjax.models import MODELS, MLPConfig, SongUNetConfig
from diffjax.published import export
from diffjax.training import averaging, checkpoints, metrics, runners
from diffjax.training.distributed import Distributed
from diffjax.training.files import digest
from test_data import write_cifar, write_mnist

ROOT = Path(__file__).parents[1]
COSTS = {"img_per_s", "data_stall", "memory_gb", "tflop_per_s", "compile_s"}
TINY = ["--config=configs/digits.py:smoke"]
MONOTONE = ["--config.schedule=monotone", "--config.weighting=elbo"]


def run(workdir, *argv):
    """Train as train.py does, on two devices, which is faster than on eight virtual ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runners, "_devices", lambda: jax.devices()[:2])
        train.train(*command_line.parse([*argv, f"--workdir={workdir}"]))


def rows_of(workdir):
    """The rows without the numbers that depend on the clock and on the machine."""
    return [{k: v for k, v in row.items() if k not in COSTS} for row in metrics.read(workdir)]


def newest(workdir):
    """The newest checkpoint's step and arrays."""
    path = run_directory.list_checkpoints(workdir)[-1]
    assert checkpoints.damage_of(path) is None
    return int(path.name), checkpoints.read(path)


def assert_bitwise_equal(a, b):
    raw = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(raw(x), raw(y)), a, b)


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "copied")


def interrupted(finished, workdir):
    """A copy of the run, as if it had been killed after it saved step 20."""
    shutil.copytree(finished, workdir)
    shutil.rmtree(workdir / "checkpoints" / "40")
    (workdir / "samples.png").unlink()
    return workdir


CONFIGS = {p.stem: p.stem for p in sorted((ROOT / "configs").glob("*.py"))}


@pytest.mark.parametrize("name", each(CONFIGS, "two_moons"))
def test_every_config_runs_its_smoke_variant(name, tmp_path, capsys):
    argv = [f"--config=configs/{name}.py:smoke"]
    if "fashion" in name:
        write_mnist(tmp_path)
        argv.append(f"--config.data.path={tmp_path}")
    if "cifar10" in name:
        write_cifar(tmp_path)
        argv.append(f"--config.data.path={tmp_path}")
    if name in ("folder", "edm2_imagenet64", "jit_imagenet256"):
        draw_folder(tmp_path, classes=1 if name == "folder" else 2)
        argv.append(f"--config.data.path={tmp_path}")
    if name == "dit_imagenet256":
        x, label = np.full((40, 4, 4, 8), 0.5, np.float16), np.arange(40) % 10
        part = data.Examples(x, label)
        conversion.convert(data.Dataset(part, part), tmp_path / "records")
        argv.append(f"--config.data.path={tmp_path}/records")
    if name != "digits":  # other tests run its programs as well
        argv.append("--config.batch_size=8")
    run(tmp_path / "run", *argv, "--config.steps=20")
    out = capsys.readouterr().out
    assert "step 20/20" in out and "img_per_s" in out
    rows = metrics.read(tmp_path / "run")
    assert [row["step"] for row in rows] == [10, 20]
    assert all(np.isfinite(row["loss"]) and row["img_per_s"] > 0 for row in rows)
    assert all({"grad_norm", "learning_rate"} <= set(row) for row in rows)
    assert "eval_loss" in rows[1]
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir()) == ["20"]
    for picture in ("samples.png", "loss.png"):
        assert np.asarray(Image.open(tmp_path / "run" / picture)).std() > 1


@pytest.mark.parametrize(
    ("name", "shape", "parameters", "images"),
    [
        ("edm_cifar10", (32, 32, 3), 55_734_147 + 9 * 128, 200e6),  # with those of the augmentation
        # The table counts one more channel of the first and of the last convolution.
        ("edm2_imagenet64", (64, 64, 3), 280_212_709 - 2 * 9 * 192, 2**30),
        ("dit_imagenet256", (32, 32, 4), 674_834_720, 7e6 * 256),
        ("jit_imagenet256", (256, 256, 3), 131_123_712, 600 * 1_281_167),
        *slow(
            ("edm2_imagenet64:XL", (64, 64, 3), 1_119_283_621 - 2 * 9 * 384, 640 * 2**20),
            ("jit_imagenet256:L", (256, 256, 3), 458_877_664, 600 * 1_281_167),
        ),
    ],
)
def test_the_configs_of_papers_are_theirs(name, shape, parameters, images):
    name, _, variant = name.partition(":")
    config = command_line.from_file(f"configs/{name}.py:{variant}")
    e = resolve(config)
    e.times.check()
    params = jax.eval_shape(lambda key: e.init(key, shape), jax.random.key(0))
    for fixed in ("frequencies", "phases", "uncertainty"):  # which the papers do not count
        params.pop(fixed, None)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == parameters
    assert config.steps * config.batch_size == pytest.approx(images, rel=1e-5)
    dtype = np.float16 if config.data.latents else np.uint8
    whole = (*shape[:2], shape[2] * (2 if config.data.latents else 1))
    part = data.Examples(np.broadcast_to(dtype(0), (4096, *whole)), np.zeros(4096, int))
    dataset.check_data(config, part, part)


def test_the_published_dit_is_that_of_its_config():
    config = command_line.from_file("configs/dit_imagenet256.py")
    options = dict(width=1152, blocks=28, heads=16, patch=2, labels=1000, null_label=True)
    theirs = published.dit.described("DiT", options, (32, 32, 4), learned=True)
    assert dataclasses.replace(theirs.model, remat="dots") == config.model
    assert theirs.sampling.steps == config.sampling.steps
    for name in ("target", "schedule", "schedule_options", "time_steps", "time_input"):
        assert getattr(theirs, name) == getattr(config, name)
    assert theirs.data.latents == config.data.latents == "sd"


def test_the_average_of_edm_has_its_half_life():
    config = command_line.from_file("configs/edm_cifar10.py")
    assert config.ema ** (500_000 / config.batch_size) == pytest.approx(0.5)


@pytest.mark.faults
def test_a_flow_map_starts_from_a_denoiser_learns_from_it_and_draws_in_one_step(
    finished, tmp_path, capsys
):
    """The whole way: distilled with guidance, drawn and measured by the scripts."""
    workdir, denoiser = tmp_path / "map", tmp_path / "denoiser"
    run(denoiser, *TINY, "--config.steps=20", "--config.target=v", "--config.model.embedding=angle")
    options = [f"--config.flow_map.velocity={finished}", f"--config.flow_map.start={denoiser}"]
    options += ["--config.flow_map.guidance", "2"]
    walk = ["--config.sampling.sampler=jump", "--config.sampling.guidance"]
    run(workdir, *TINY, "--config.steps=20", *MAP, *options, *walk, "--config.sampling.steps=1")
    assert all(np.isfinite(row["loss"]) for row in metrics.read(workdir))
    for steps in (1, 2):
        out = tmp_path / f"{steps}.npz"
        sample.main([f"--workdir={workdir}", "--n=10", f"--steps={steps}", f"--out={out}"])
        settings = sampling.read(out)[1]
        assert settings["function_evaluations"] == steps
    capsys.readouterr()
    evaluate.main([f"--workdir={workdir}", "--n=20", "--held_out=4", "--bound_samples=2"])
    assert "frechet" in capsys.readouterr().out.lower()


def test_a_resumed_run_is_the_uninterrupted_run_bit_for_bit(finished, tmp_path, capsys):
    """It resumes from the checkpoint of step 20, which was written during training."""
    parts = interrupted(finished, tmp_path / "parts")
    # The run drops rows after the restored step, and a line that a kill cut short.
    with (parts / "metrics.jsonl").open("a") as file:
        file.write('{"step": 50, "lo')
    run(parts, *TINY, "--config.steps=40")
    assert "resumed from the checkpoint of step 20 of 40" in capsys.readouterr().out
    assert rows_of(parts) == rows_of(finished)
    (step_a, a), (step_b, b) = newest(finished), newest(parts)
    assert step_a == step_b == 40
    assert_bitwise_equal(a, b)
    assert (parts / "samples.png").read_bytes() == (finished / "samples.png").read_bytes()


@pytest.mark.faults
def test_averages_are_tracked_resumed_and_made_after_training(tmp_path, monkeypatch, capsys):
    """The averages and snapshots of a run that was killed are those of one that was not."""
    save, argv = checkpoints.Checkpoints.save, [*TINY, "--config.snapshot_every=10"]
    argv += ["--config.averages", "0.05", "0.1"]

    def save_after_its_snapshots(self, step, *args):
        assert (self.directory.parent / "snapshots" / averaging.name(step, 0.05)).exists()
        assert (self.directory.parent / "snapshots" / averaging.name(step, 0.1)).exists()
        return save(self, step, *args)

    monkeypatch.setattr(checkpoints.Checkpoints, "save", save_after_its_snapshots)
    run(tmp_path / "whole", *argv, "--config.steps=40")
    run(tmp_path / "parts", *argv, "--config.steps=20")
    run(tmp_path / "parts", *argv, "--config.steps=40")
    assert_bitwise_equal(newest(tmp_path / "parts")[1], newest(tmp_path / "whole")[1])
    whole, parts = (
        {path.name: averaging.read_snapshot(path) for path in (tmp_path / name).iterdir()}
        for name in ("whole/snapshots", "parts/snapshots")
    )
    assert len(whole) == 8 and {s.time for s in whole.values()} == {10, 20, 30, 40}
    jax.tree.map(np.testing.assert_array_equal, whole, parts)
    # A tracked width is what the checkpoint holds.
    _, params, _ = checkpoint.load(tmp_path / "parts", 0.1)
    tracked = newest(tmp_path / "parts")[1]["opt_state"]["averages"][1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), params, tracked)
    evaluate.main([f"--workdir={tmp_path / 'parts'}", "--average=0.1", "--n=0", "--held_out=16"])
    result = json.loads((tmp_path / "parts/evaluation.json").read_text())
    assert result["parameters"] == {"average": 0.1, "sha256": digest(params)}


@pytest.mark.faults
def test_a_learned_schedule_is_resumed_averaged_drawn_evaluated_and_inspected(tmp_path, capsys):
    argv = ["--config=configs/two_moons.py:smoke", *MONOTONE, "--config.averages", "0.1"]
    argv += ["--config.snapshot_every=20", "--config.optimizer.schedule_factor=3"]
    run(tmp_path / "whole", *argv, "--config.steps=40")
    run(tmp_path / "parts", *argv, "--config.steps=20")
    run(tmp_path / "parts", *argv, "--config.steps=40")
    assert_bitwise_equal(newest(tmp_path / "parts")[1], newest(tmp_path / "whole")[1])
    ends = []
    for average in (None, 0.1):
        own = checkpoint.load(tmp_path / "whole", average)[1]["schedule"]
        ends.append(float(own["log_snr_max"]))
        workdir = [f"--workdir={tmp_path / 'whole'}", f"--average={average}"]
        sample.main([*workdir, "--n=8", f"--out={tmp_path / f'{average}.npz'}"])
        evaluate.main([*workdir, "--n=0", "--held_out=16"])
    assert ends[0] != ends[1] and 10 not in ends
    capsys.readouterr()
    with pytest.raises(SystemExit, match="0"):
        inspect_run.main([str(tmp_path / "whole")])
    assert f"learned schedule: log-SNR from {ends[0]:.4g} to" in capsys.readouterr().out


def test_a_density_changes_how_the_loss_varies_and_not_its_mean_unless_it_is_asked_to():
    """By a loss that is known at each time: with weights, its mean is that of uniform times."""
    n, config = 4000, command_line.from_file("configs/digits.py:smoke")
    known = lambda e, t: jnp.exp(-((e.schedule.log_snr(t) - 1.0) ** 2) / 8)

    def mean(**changes):
        e = resolve(dataclasses.replace(config, batch_size=n, **changes))
        t, weight = jax.jit(e.times.draw)(jax.random.key(0), (), jnp.arange(n))
        return float((weight * known(e, t)).mean())

    normal = dict(density="normal", density_options={"mean": 1.0, "std": 2.0})
    np.testing.assert_allclose(mean(**normal), mean(), rtol=1e-2)
    # E exp(-z^2 / 2) of z ~ N(0, 1), but for the ends that the schedule cuts off.
    free = mean(**normal, density_weights=False)
    np.testing.assert_allclose(free, 1 / math.sqrt(2), rtol=1e-2)
    assert free > 1.1 * mean()


LEARNED = [
    *("--config.bound_weight=0.001", "--config.time_steps=10", "--config.model.out_channels=2"),
    *("--config.loss_aware_times=True", "--config.sampling.sampler=ancestral"),
    *("--config.sampling.options", "variance=learned"),
]


@pytest.mark.faults
def test_learned_variance_and_loss_aware_times_are_trained_resumed_and_evaluated(tmp_path, capsys):
    """The history of losses is in the checkpoint: a resumed run draws the same times."""
    argv = [*TINY, "--config.steps=40", *LEARNED]
    run(tmp_path / "whole", *argv)
    run(interrupted(tmp_path / "whole", tmp_path / "halves"), *argv)
    whole, halves = newest(tmp_path / "whole"), newest(tmp_path / "halves")
    assert_bitwise_equal(whole[1], halves[1])
    history = jax.tree.leaves(whole[1]["extra"])
    assert sorted(a.shape for a in history) == [(10,), (10, 10)]
    assert min(float(jnp.abs(a).max()) for a in history) > 0

    evaluate.run(
        evaluate.Arguments(tmp_path / "whole", held_out=32, bound_samples=4, drawing=Drawing(n=0))
    )
    assert "bits/dim" in capsys.readouterr().out


@pytest.mark.faults
def test_a_resumed_run_may_change_how_steps_are_run(finished, tmp_path):
    parts = interrupted(finished, tmp_path / "parts")
    changes = "--config.parallel=sharded", "--config.steps_per_call=5", "--config.model.remat=True"
    run(parts, *TINY, "--config.steps=40", *changes)
    rows = metrics.read(parts), metrics.read(finished)
    assert [row["step"] for row in rows[0]] == [10, 20, 30, 40]
    for name in ("loss", "grad_norm", "eval_loss", "learning_rate"):
        found = [[row[name] for row in each if name in row] for each in rows]
        np.testing.assert_allclose(*found, rtol=1e-5)
    counts = [[row["count_by_log_snr"] for row in each] for each in rows]
    assert counts[0] == counts[1]
    work = [[row["tflop_per_s"] / row["img_per_s"] for row in each] for each in rows]
    np.testing.assert_allclose(*work, rtol=0.05)
    run(parts, *TINY, "--config.steps=45", "--config.steps_per_call=5")
    assert run_directory.read_config(parts).parallel == "sharded"


def test_a_resumed_run_keeps_its_runner_until_another_is_asked_for(copied, monkeypatch):
    file = copied / "config.json"
    file.write_text(file.read_text().replace('"parallel": null', '"parallel": "sharded"'))
    chosen = []

    def choose(*args):
        chosen.append(args)
        raise ValueError("enough")

    monkeypatch.setattr(train, "choose", choose)
    for words in ([], ["--config.parallel=pmap"]):
        with pytest.raises(SystemExit, match="enough"):
            run(copied, *TINY, "--config.steps=40", *words)
    assert chosen == [("sharded", 1), ("pmap", 1)]


@pytest.mark.faults
def test_a_run_is_read_back_in_two_lines(copied):
    network, params, config = checkpoint.load(copied)
    assert config.steps == 40 and config.batch_size == 16
    out = network(params, jnp.ones((2, 8, 8, 1)), jnp.zeros(2), {"label": jnp.zeros(2, int)})
    assert out.shape == (2, 8, 8, 1) and np.isfinite(out).all()
    assert_bitwise_equal(params, newest(copied)[1]["ema_params"])
    with pytest.raises(FileNotFoundError, match="not the directory of a run"):
        checkpoint.load(copied / "elsewhere")


def test_reading_a_run_leaves_it_alone(copied):
    """The run may still be writing: reading keeps an unfinished checkpoint."""
    in_flight = copied / "checkpoints" / "60.orbax-checkpoint-tmp"
    in_flight.mkdir()
    checkpoint.load(copied)
    assert in_flight.exists()


@pytest.mark.faults
def test_a_finished_run_draws_again_when_sampling_changes(copied):
    before = (copied / "samples.png").read_bytes()
    run(copied, *TINY, "--config.steps=40", "--config.sampling.steps=7")
    assert (copied / "samples.png").read_bytes() != before


@pytest.mark.parametrize("unit_output", [None, True])
def test_unit_output_scales_the_network_that_is_trained_sampled_and_read_back(copied, unit_output):
    """The output of a score network is divided by sigma, in `load` too, unless it is raw."""
    config = config_lib.from_json((copied / "config.json").read_text())
    scaled = dataclasses.replace(config, target="score", unit_output=unit_output)
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 1))
    cond = {"label": jnp.zeros(2, jnp.int32)}
    _, params, _ = checkpoint.load(copied)
    log_snr = jnp.array([-3.0, 5.0])
    plain = resolve(config).apply(params, x, log_snr, cond)
    out = resolve(scaled).apply(params, x, log_snr, cond)
    sigma = jnp.sqrt(jax.nn.sigmoid(-log_snr))[:, None, None, None]
    np.testing.assert_allclose(out * sigma, plain, rtol=1e-4, atol=1e-5)
    raw = dataclasses.replace(scaled, unit_output=False)
    np.testing.assert_array_equal(resolve(raw).apply(params, x, log_snr, cond), plain)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"model": {"kind": "ViT"}}'])
def test_a_damaged_config_is_named(copied, text):
    """If no checkpoint has a copy, as none of version 0.1 has."""
    for path in run_directory.list_checkpoints(copied):
        checkpoints.write_seal(path, checkpoints.read_seal(path)._replace(about={}))
    (copied / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json is not a config of this diffjax"):
        checkpoint.load(copied)
    with pytest.raises(SystemExit, match=r"config\.json is not a config of this diffjax"):
        run(copied, *TINY)


def test_empty_and_foreign_numeric_folders_are_ignored(copied):
    (copied / "checkpoints" / "99").mkdir()
    (copied / "checkpoints" / "98" / "default").mkdir(parents=True)
    assert newest(copied)[0] == 40


def test_another_experiment_in_the_same_directory_is_refused(copied):
    for change, line in (
        ("--config.target=x_0", "target: the run has 'eps', asked for 'x_0'"),
        ("--config.model.width=16", "model.width: the run has 8, asked for 16"),
        ("--config.batch_size=32", "batch_size: the run has 16, asked for 32"),
        ("--config.optimizer.learning_rate=0.1", "optimizer.learning_rate: the run has 0.002"),
    ):
        with pytest.raises(SystemExit, match=re.escape(line)):
            run(copied, *TINY, "--config.steps=40", change)


@pytest.mark.faults
def test_a_nan_stops_the_run_with_the_step_and_keeps_the_last_checkpoint(
    tmp_path, monkeypatch, capsys
):
    make_loss = train.make_loss

    def breaks(*args, **options):
        loss_fn = make_loss(*args, **options)

        def broken(key, params, batch, extra):
            losses = loss_fn(key, params, batch, extra)
            # When Adam has moved the bias far enough, the gradient is NaN and the loss is finite.
            bias = jnp.abs(params["conv_out"]["bias"]).max()
            nothing = 0 * jnp.sqrt(jnp.where(bias > 0.006, 0 * bias, 1.0))
            return jax.tree.map(lambda x: x + nothing, losses)

        return broken

    monkeypatch.setattr(train, "make_loss", breaks)
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, *TINY, "--config.steps=200")
    found = re.fullmatch(
        r"error: grad_norm is nan at step (\d+); learning rate (\S+), examples (\[.*\])",
        str(stop.value),
    )
    assert found, stop.value
    at, rate, examples = int(found[1]), float(found[2]), json.loads(found[3])
    kept = int(re.search(r"the newest checkpoint: step (\d+)", capsys.readouterr().out)[1])
    config = command_line.from_file("configs/digits.py:smoke")
    schedule = resolve(config).learning_rate
    np.testing.assert_allclose(rate, schedule(at - 1), rtol=1e-2)
    assert examples == data.batch_indices(0, at - 1, 1497, 16).tolist()
    step, arrays = newest(tmp_path)
    assert step == kept == (at - 1) // 20 * 20 > 0
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(arrays["params"]))


@pytest.mark.faults
def test_the_loop_compiles_the_step_once_and_fetches_nothing_between_log_points(
    tmp_path, monkeypatch
):
    """Every conversion of a device array to numbers on the host goes through `_value`."""
    array = type(jnp.zeros(()))
    fetched, at_step, compiled, losses, under_way = [], [], [], [], []
    value = array._value
    counted = property(lambda self: fetched.append(None) or value.fget(self))
    monkeypatch.setattr(array, "_value", counted)
    pmap = runners.pmap

    def watched(fsdp):
        runner = pmap(fsdp)

        def step(f):
            g = runner.step(lambda *args, **kw: compiled.append(None) or f(*args, **kw))

            def guarded(state, batch):
                at_step.append(len(fetched))
                under_way.append(sum(not loss.is_ready() for loss in losses))
                with jax.transfer_guard("disallow"):  # its arguments are on the devices already
                    state, metrics = g(state, batch)
                losses.append(metrics["loss"])
                return state, metrics

            return guarded

        return runner._replace(step=step, flops=lambda *_: 0.0)  # which would trace `guarded`

    monkeypatch.setitem(runners.RUNNERS, "pmap", watched)
    monkeypatch.setattr(train, "AHEAD", 3)
    run(tmp_path, *TINY, "--config.steps=30", "--profile=2")
    assert len(compiled) == 1
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    fetches = np.diff(at_step)  # after steps 1, 2, ... 29
    assert fetches[9] > 0 and fetches[19] > 0  # the counter works: log points
    assert not np.delete(fetches, [9, 19]).any()
    assert 0 < max(under_way) <= 3  # the host is ahead of the devices, but not far


@pytest.mark.faults
def test_the_cores_of_a_cpu_become_devices_unless_the_user_chose_a_number(monkeypatch):
    code = (
        "import jax; from diffjax.training.distributed import *; "
        "setup(ALONE, %s); print(jax.device_count())"
    )

    def devices(batch, **environment):
        env = {k: v for k, v in os.environ.items() if k not in ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS")}
        done = subprocess.run(
            [sys.executable, "-c", code % batch],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=env | environment,
        )
        return int(done.stdout)

    cores = len(os.sched_getaffinity(0))
    assert devices(cores * 6) == cores
    assert devices(1) == 1
    assert devices(cores * 6, JAX_NUM_CPU_DEVICES="3") == 3
    assert devices(4, XLA_FLAGS="--xla_force_host_platform_device_count=4") == 4


MAP = [
    *("--config.objective=flow_map", "--config.target=v"),
    *("--config.model.embedding=angle", "--config.model.two_times=True"),
]
"""The flags of a flow map."""

BAD = {
    "objective": (
        ["--config.objective=gan"],
        "unknown objective 'gan': one of denoising, flow_map",
    ),
    "map's options": (["--config.flow_map.diagonal=0.5"], "flow_map need objective=flow_map"),
    "map by a denoiser": (
        ["--config.objective=flow_map", "--config.target=v"],
        "model.two_times=False and objective=flow_map: a flow map needs a network with",
    ),
    "map by another network": (
        [*MAP[:2], "--config.model=song_unet"],
        "embedding=angle and model.two_times=True (unet, dit or mlp)",
    ),
    "denoiser of two times": (MAP[2:], "model.two_times=True and objective=denoising"),
    "map's target": ([*MAP, "--config.target=eps"], "target=eps: at an end of the schedule the"),
    "map's schedule": (
        [*MAP, "--config.schedule=log_uniform", "--config.schedule_options"],
        "identity=lagrangian with schedule=log_uniform: training diverges",
    ),
    "identity": (
        [*MAP, "--config.flow_map.identity=euler"],
        "unknown identity='euler': one of semigroup, eulerian, lagrangian",
    ),
    "map with a coupling": (
        [*MAP, "--config.coupling=immiscible"],
        "objective=flow_map: coupling=immiscible and schedule=cosine are of denoisers",
    ),
    "map guided by a step": (
        [*MAP, "--config.flow_map.velocity=digits", "--config.flow_map.guidance", "cfg_plus_plus"],
        "cfg_plus_plus needs a step, or a weaker network; guide a teacher by others",
    ),
    "pair": ([*MAP, "--config.flow_map.velocity=pair"], "use own, a teacher, or identity=eulerian"),
    "normalised pair": (
        [
            *(*MAP, "--config.flow_map.velocity=pair", "--config.flow_map.identity=eulerian"),
            "--config.flow_map.normalise=1",
        ],
        "normalise=1.0 with velocity='pair': a factor that depends on the noise",
    ),
    "teacher": (
        [*MAP, "--config.flow_map.velocity=runs/none"],
        "runs/none holds no config.json: it is not the directory of a run",
    ),
    "teacher's schedule": (
        [
            *(*MAP, "--config.flow_map.velocity=digits"),
            *("--config.schedule=linear", "--config.schedule_options"),
        ],
        "flow_map.velocity=digits: the denoiser has another schedule than the one given",
    ),
    "teacher's labels": (
        [
            *(*MAP, "--config.flow_map.velocity=digits", "--config.sampling.guidance"),
            *("--config.model.labels=0", "--config.model.null_label=False"),
        ],
        "flow_map.velocity=digits: it has model.labels=10, the map model.labels=0",
    ),
    "teacher's shape": (
        [*MAP, "--config.flow_map.velocity=fashion_mnist"],
        "flow_map.velocity=fashion_mnist: its data are of shape (28, 28, 1), these of (8, 8, 1)",
    ),
    "start": (
        [*MAP, "--config.flow_map.start=digits", "--config.target=flow"],
        "flow_map.start=digits: its network was trained with target=",
    ),
    "guidance without a teacher": (
        [*MAP, "--config.flow_map.guidance", "2"],
        "flow_map.guidance=classifier_free:weight=2: needs a teacher",
    ),
    "jump": (["--config.sampling.sampler=jump"], "sampling.sampler=jump: needs a flow map"),
    "corrections": (
        [
            "--config.sampling.sampler=predictor_corrector",
            *("--config.sampling.options", "corrections=1.5"),
        ],
        "sampler predictor_corrector: corrections=1.5: must be a whole number",
    ),
    "guided channels": (
        ["--config.sampling.guidance", "classifier_free:weight=2,channels=3"],
        "guides 3 channels, and the data have 1",
    ),
    "guidance without labels that are dropped": (
        ["--config.label_drop=0", "--config.sampling.guidance", "2"],
        "needs model.null_label=True and label_drop above 0",
    ),
    "options of no augmentation": (
        ["--config.augmentation_options", "p=0.5"],
        "augmentation_options={'p': 0.5}: need an augmentation, one of edm, crop, window",
    ),
    "paired by what no two share": (
        [
            *("--config.coupling=ot", "--config.augmentation=crop"),
            "--config.model.augment_dim=2",
        ],
        "coupling=ot: with low_resolution=None or model.augment_dim=2 no two examples have",
    ),
    "time for log-SNR": (
        [
            *("--config.time_steps=100", "--config.time_input=True"),
            "--config.model.embedding=angle",
        ],
        "time_input=True: model.flow_time=True and model.embedding=angle embed log-SNR",
    ),
    "guided jump": (
        [*MAP, "--config.sampling.sampler=jump", "--config.sampling.guidance", "2"],
        "a map cannot be guided after training; guide its teacher",
    ),
    "weight without a network": (
        [*MAP, "--config.flow_map.guidance_to=4", "--config.flow_map.velocity=digits"],
        "model.guidance_weight=False and flow_map.guidance_to=4.0: give both, or neither",
    ),
    "weight without a teacher": (
        [*MAP, "--config.flow_map.guidance_to=4", "--config.model.guidance_weight=True"],
        "flow_map.guidance_to=4.0: must be above 1, with a teacher",
    ),
    "weight not learned": (
        [
            *(*MAP, "--config.flow_map.guidance_to=4", "--config.flow_map.velocity=digits"),
            *("--config.model.guidance_weight=True", "--config.sampling.guidance", "5"),
        ],
        "need one weight of classifier_free from 1 to flow_map.guidance_to=4.0",
    ),
    "variance of a map": (
        [
            *(*MAP, "--config.model.out_channels=2"),
            *("--config.bound_weight=0.1", "--config.time_steps=10"),
        ],
        "objective=flow_map: bound_weight=0.1 and time_input=False are of denoisers",
    ),
    "target": (["--config.target=epsilon"], "unknown target 'epsilon': one of x_0, eps"),
    "schedule": (["--config.schedule=cosin"], "unknown schedule 'cosin': one of cosine, linear"),
    "schedule option": (
        ["--config.schedule_options", "beta=1.0"],
        "schedule cosine has no option beta; it has log_snr_min, log_snr_max",
    ),
    "sampler": (["--config.sampling.sampler=dim"], "unknown sampler 'dim': one of ancestral, ddim"),
    "sampler option": (
        ["--config.sampling.options", "eta=2.0"],
        "eta=2.0: must be in [0, 1]",
    ),
    "weighting": (["--config.weighting=snr"], "unknown weighting 'snr': one of unit"),
    "data": (["--config.data.name=cifar"], "unknown data set 'cifar': one of digits"),
    "runner": (["--config.parallel=ddp"], "unknown runner 'ddp': one of pmap, sharded"),
    "image size": (
        ["--config.model.mults", *"11111"],
        "height and width divisible by 16",
    ),
    "batch": (["--config.batch_size=12"], "batch_size=12 must be a positive multiple of 8 devices"),
    "large batch": (["--config.batch_size=2048"], "batch_size=2048 exceeds the 1497 examples"),
    "path": (
        ["--config.data.name=mnist", "--config.data.path=/nowhere"],
        "/nowhere/train-images-idx3-ubyte.gz is not there",
    ),
    "shape": (["--config.data.shape", *"883"], "data.shape=(8, 8, 3): the examples are of"),
    "continuous time": (["--config.time_input=True"], "need discrete time, time_steps=T"),
    "labels": (["--config.model.labels=5"], "the data has labels up to 9"),
    "guidance": (["--config.model.null_label=False"], "needs model.null_label=True"),
    "unknown guidance": (
        ["--config.sampling.guidance", "classifier:weight=2"],
        "unknown guidance 'classifier': one of classifier_free",
    ),
    "guidance option": (
        ["--config.sampling.guidance", "classifier_free:scale=2"],
        "guidance classifier_free has no option scale; it has weight",
    ),
    "conditioning noise": (
        ["--config.max_cond_noise=0.1"],
        "max_cond_noise=0.1, sampling.cond_noise=0.0: need low_resolution",
    ),
    "saving": (["--config.save_every=15"], "must be multiples of log_every=10"),
    "ema": (["--config.ema=1.0"], "ema=1.0: must be in [0, 1)"),
    "decay": (["--config.optimizer.decay_steps=5"], "must exceed warmup=100"),
    "two decays": (
        ["--config.optimizer.decay_steps=500", "--config.optimizer.inverse_sqrt_from=5"],
        "decay_steps=500 and inverse_sqrt_from=5: the learning rate decays in one way",
    ),
    "coupling": (["--config.coupling=best"], "unknown coupling 'best': one of independent, ot"),
    "coupling option": (
        ["--config.coupling=immiscible", "--config.coupling_options", "k=0"],
        "k=0: must be a whole number, at least 1",
    ),
    "coupling and the bound": (
        ["--config.coupling=ot", "--config.weighting=elbo"],
        "coupling=ot: weighting=elbo, bound_weight=None train on the bound",
    ),
    "coupling of parts": (
        ["--config.coupling=ot", "--config.optimizer.accumulate=2"],
        "it pairs the whole batch, and optimizer.accumulate=2 would split that",
    ),
    "coupling and a stochastic sampler": (
        ["--config.coupling=ot", "--config.sampling.sampler=ancestral"],
        "sampler ancestral: with coupling=ot the network has learned no score",
    ),
    "points": (["--config.data.name=two_moons"], "examples of shape (2,)"),
    "flip": (
        ["--config=configs/two_moons.py:smoke", "--config.data.flip=True"],
        "data.flip=True needs images",
    ),
    "option": (["--config.schedule_options", "log_snr_min=nan"], "must be a finite number"),
    "option text": (["--config.schedule_options", "log_snr_min=low"], "must be a finite number"),
    "no labels": (["--config.model.labels=0", "--config.model.null_label=False"], "null_label"),
    "seed": (["--config.seed=-1"], "seed=-1: must be in [0, 2**32)"),
    "attention": (["--config.model.attention", "16"], "attention=(16,): the heights are [8]"),
    "two Ts": (
        [
            "--config=configs/cifar10.py:smoke",
            "--config.time_steps=500",
        ],
        "time_steps=500: the table of linear_betas has 1000 steps",
    ),
    "outputs": (
        ["--config.model.out_channels=2"],
        "no learned variance (bound_weight=None) need 1",
    ),
    "no variance": (
        ["--config.bound_weight=0.001", "--config.time_steps=100"],
        "model.out_channels=None: data of 1 channels and a learned variance (bound_weight=0.001) "
        "need 2",
    ),
    "continuous variance": (["--config.bound_weight=0.001"], "need discrete time, time_steps=T"),
    "negative bound": (
        ["--config.bound_weight=-1", "--config.time_steps=100"],
        "bound_weight=-1.0: must be at least 0",
    ),
    "learned schedule": (
        ["--config.schedule=monotone"],
        "weighting=min_snr: schedule=monotone is learned, from the bound, which is weighting=elbo",
    ),
    "learned in discrete time": (
        [*MONOTONE, "--config.time_steps=100"],
        "time_steps=100: schedule=monotone is learned, in continuous time",
    ),
    "learned with loss-aware times": (
        [*MONOTONE, "--config.time_steps=100", "--config.loss_aware_times=True"],
        "time_steps=100: schedule=monotone is learned, in continuous time",
    ),
    "learned with a density": (
        [*MONOTONE, "--config.density=normal"],
        "density=normal: schedule=monotone is learned, and is itself the density of noise levels",
    ),
    "learned with an uncertainty": (
        [*MONOTONE, "--config.learned_uncertainty=True"],
        "learned_uncertainty=True: schedule=monotone is learned, from the bound",
    ),
    "learned and shifted": (
        [*MONOTONE, "--config.schedule_shift=1"],
        "schedule_shift=1.0: schedule=monotone is learned, with its ends",
    ),
    "learned for enlarging": (
        [*MONOTONE, "--config.low_resolution=4", "--config.model.image_cond=True"],
        "low_resolution=4: schedule=monotone is learned, and the low-resolution image",
    ),
    "learned option": (
        [*MONOTONE, "--config.schedule_options", "sigmoids=3"],
        "schedule monotone has no option sigmoids; it has width, log_snr_min, log_snr_max",
    ),
    "learned ends": (
        [*MONOTONE, "--config.schedule_options", "log_snr_min=20"],
        "log_snr_min=20 must be below log_snr_max=10.0",
    ),
    "learned width": (
        [*MONOTONE, "--config.schedule_options", "width=0"],
        "width=0: must be a whole number of at least 1",
    ),
    "factor of a fixed schedule": (
        ["--config.optimizer.schedule_factor=3"],
        "optimizer.schedule_factor=3.0: needs a schedule that is learned, schedule=monotone",
    ),
    "factor": (
        [*MONOTONE, "--config.optimizer.schedule_factor=0"],
        "optimizer.schedule_factor=0.0: must be positive and finite",
    ),
    "features of a network": (
        ["--config.fourier_features", "7", "8"],
        "fourier_features=(7, 8): the network's input has more channels than the data, so that it "
        "needs model.out_channels=1, not None",
    ),
    "features twice": (
        ["--config.fourier_features", "7", "7", "--config.model.out_channels=1"],
        "fourier_features=(7, 7): must be different, and from -12 to 12",
    ),
    "features scaled": (
        ["--config.fourier_features", "7", "--config.unit_input=True"],
        "fourier_features=(7,): their periods are those of the data's grid",
    ),
    "residual": (
        ["--config.model.residual=True", "--config.model.out_channels=2"],
        "residual=True: x_t has 1 channels, fewer than the output, out_channels=2",
    ),
    "density": (["--config.density=gumbel"], "unknown density 'gumbel': one of uniform, normal"),
    "density's option": (
        ["--config.density=normal", "--config.density_options", "scale=1"],
        "density normal has no option scale; it has mean, std",
    ),
    "density elsewhere": (
        ["--config.density=normal", "--config.density_options", "mean=40"],
        "the schedule has log-SNR from -8 to 7, where a normal density with mean=40, std=2.4 has",
    ),
    "two densities": (
        ["--config.density=normal", "--config.loss_aware_times=True", "--config.time_steps=10"],
        "loss_aware_times=True has a density and weights of its own",
    ),
    "continuous aware": (["--config.loss_aware_times=True"], "need discrete time, time_steps=T"),
    "variance not learned": (
        ["--config.sampling.sampler=ancestral", "--config.sampling.options", "variance=learned"],
        "the run must learn one, by its bound_weight",
    ),
    "fsdp under pmap": (
        ["--config.parallel=pmap", "--config.fsdp=8"],
        "parallel=pmap copies the state to each device",
    ),
    "fsdp": (
        ["--config.fsdp=3"],
        "fsdp=3: must be 0, for all, or divide the 2 devices",
    ),
    "best": (["--config.keep_best=1", "--config.eval_every=40"], "a multiple of eval_every=40"),
    "best distance": (["--config.keep_best_by=eval_frechet"], "eval_frechet: needs eval.features"),
    "best of few": (
        [
            *("--config.eval.features=pca24", "--config.eval.every=40", "--config.keep_best=1"),
            "--config.keep_best_by=eval_frechet",
        ],
        "save_every=20 must be a multiple of eval.every=40",
    ),
    "eval every": (
        ["--config.eval.features=pca24", "--config.eval.every=15"],
        "eval.every=15: must be a multiple of log_every=10",
    ),
    "eval n": (["--config.eval.n=19"], "eval.n=19: must be at least 20"),
    "eval reference": (["--config.eval.reference=all"], "eval.reference='all': one of train, test"),
    "eval features": (
        ["--config.eval.features=fid", "--config.eval.every=20"],
        "unknown features 'fid': one of pca24",
    ),
    "eval weights": (
        ["--config.eval.features=inception", "--config.eval.every=20"],
        "features=inception, weights=None: it needs a file of weights",
    ),
    "skip": (["--config.skip_nonfinite=-1"], "skip_nonfinite=-1: must be at least 0"),
    "average": (["--config.averages", "0.1", "0.3"], "relative width 0.3: must be above 0, and"),
    "averages": (
        ["--config.averages", "0.1", "--config.snapshot_every=None"],
        "averages=(0.1,), snapshot_every=None: give both, or neither",
    ),
    "snapshots": (["--config.snapshot_every=10"], "snapshot_every=10: give both, or neither"),
    "their type": (["--config.snapshot_dtype=float16"], "float16: there are no snapshots without"),
    "density twice": (
        [
            *("--config.weighting=edm", "--config.density_weights=False"),
            *("--config.density=normal", "--config.density_options", "mean=0", "std=2"),
        ],
        "has the density of EDM's noise levels in it, which would count twice",
    ),
    "two widths": (
        ["--config.snapshot_every=10", "--config.averages", "0.1", "0.1"],
        "averages=(0.1, 0.1): a width is there twice",
    ),
    "snapshot": (
        ["--config.snapshot_every=15", "--config.averages", "0.1"],
        "snapshot_every=15: must be a multiple of log_every=10",
    ),
    "snapshot_dtype": (
        ["--config.snapshot_dtype=int8"],
        "unknown snapshot_dtype 'int8': one of float32, float16",
    ),
    "log_every": (["--config.log_every=0"], "log_every=0: must be at least 1"),
    "order": (
        ["--config.sampling.sampler=unipc", "--config.sampling.options", "order=5"],
        "unipc of order 5: there are orders 1 to 3",
    ),
    "steps per call": (["--config.steps_per_call=3"], "steps_per_call=3: must be at least 1, and"),
    "half a call": (
        ["--config.steps_per_call=10", "--config.steps=65"],
        "steps_per_call=10: must be at least 1, and divide steps=65",
    ),
    "profile": (["--profile=-1"], "profile=-1: must be at least 0"),
}


@pytest.mark.parametrize(("argv", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_clear_line_before_anything_is_compiled(
    tmp_path, monkeypatch, argv, message
):
    monkeypatch.setattr(runners, "_compile_once", lambda *_, **__: pytest.fail("went on"))
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "run", *TINY, *argv)
    assert message in str(stop.value) and str(stop.value).startswith("error: ")
    assert not (tmp_path / "run").exists()


@pytest.mark.faults
@pytest.mark.parametrize("parallel", [*runners.RUNNERS])
def test_a_run_measures_its_samples_and_keeps_the_best(tmp_path, monkeypatch, parallel):
    """By a cheap network in Inception's place; the last distance is found again from the files."""
    outputs = lambda matrix, x: {
        "features": jnp.matmul(
            x.reshape(len(x), -1)[:, :64].astype(jnp.float32) / 64, matrix, precision="highest"
        )
    }
    matrix = np.random.default_rng(0).standard_normal((64, 3)).astype(np.float32)
    (tmp_path / "weights.safetensors").write_bytes(safetensors.numpy.save({"matrix": matrix}))
    make = features.of_network("inception", (), lambda _, arrays: arrays["matrix"], outputs)
    monkeypatch.setitem(features.FEATURES, "inception", make)
    argv = [f"--config.parallel={parallel}", "--config.keep=1", "--config.keep_best=1"]
    argv += [
        "--config.eval.features=inception",
        f"--config.eval.weights={tmp_path}/weights.safetensors",
    ]
    argv += ["--config.eval.reference=test", "--config.eval.every=20", "--config.eval.n=20"]
    run(tmp_path / "run", *TINY, *argv, "--config.keep_best_by=eval_frechet")
    found = {
        r["step"]: r["eval_frechet"] for r in metrics.read(tmp_path / "run") if "eval_frechet" in r
    }
    assert [*found] == [20, 40, 60] and (tmp_path / "run" / "distances.png").is_file()
    kept = {int(path.name) for path in run_directory.list_checkpoints(tmp_path / "run")}
    assert kept == {60, min(found, key=lambda step: found[step])}
    _, params, config = checkpoint.load(tmp_path / "run")
    e = resolve(config)
    index = np.arange(20, dtype=np.int32)
    batch = {"index": index, "label": index % 10}
    x = data.to_bytes(np.asarray(sampling.make_generate(e, (8, 8, 1))(params, batch)))
    test = load_data(config).test.x
    exact = distances.frechet_distance(
        outputs(matrix, x)["features"], outputs(matrix, test)["features"]
    )
    assert found[60] == pytest.approx(exact, rel=1e-3)


@pytest.mark.faults
def test_samples_that_are_no_images_are_measured_as_they_are(tmp_path, monkeypatch):
    """Rounded to bytes, they would be multiples of 2 / 255, less 1."""
    (tmp_path / "recording.py").write_text(
        "seen = []\ndef points(x):\n    seen.append(x)\n    return x\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    argv = ["--config.eval.features=recording:points", "--config.eval.every=20"]
    argv += ["--config.eval.n=20", "--config.steps=20"]
    run(tmp_path / "run", "--config=configs/two_moons.py:smoke", *argv)
    drawn = sys.modules["recording"].seen[-1]
    levels = (drawn + 1) * 127.5
    assert drawn.shape == (20, 2) and np.abs(levels - np.round(levels)).max() > 0.1


def test_held_out_data_is_checked_too(tmp_path):
    x = np.zeros((32, 8, 8), np.uint8)
    y = np.arange(32) % 10
    for held_out, message in (
        ({"x_test": x}, "the data has no labels"),
        ({"x_test": x, "y_test": y + 5}, "labels up to 14"),
        ({"x_test": x[:, :4], "y_test": y}, "held-out examples of shape (4, 8, 1)"),
    ):
        np.savez(tmp_path / "a.npz", x_train=x, y_train=y, **held_out)
        with pytest.raises(SystemExit, match=re.escape(message)):
            run(tmp_path, *TINY, "--config.data.name=npz", f"--config.data.path={tmp_path}/a.npz")


@pytest.mark.parametrize("shape", [(8, 8, 2), (8, 8, 4), (1,), (3,)])
def test_data_that_a_network_takes_is_trained_and_drawn(shape):
    model = resolve(config_lib.Config()).config.model if len(shape) == 3 else MLPConfig()
    model = dataclasses.replace(model, attention=()) if len(shape) == 3 else model
    part = data.Examples(np.zeros((128, *shape), np.float32))
    dataset.check_data(config_lib.Config(model=model), part, part)
    x = np.linspace(-1, 1, 6 * math.prod(shape), dtype=np.float32).reshape(6, *shape)
    assert np.asarray(plots.samples(x)).std() > 1


@pytest.mark.parametrize("shape", [(8, 8, 8, 1), (64, 2)])
def test_data_that_no_network_takes_is_refused(shape):
    part = data.Examples(np.zeros((128, *shape), np.float32))
    for row in MODELS.values():
        with pytest.raises(ValueError, match=f"examples of shape {re.escape(str(shape))}"):
            dataset.check_data(config_lib.Config(model=row.config()), part, part)


@pytest.mark.faults
@pytest.mark.parametrize("shape", [(8, 8, 2), (8, 8, 4), (1,)])
def test_arrays_of_other_channels_are_trained_sampled_and_evaluated(shape, tmp_path):
    x = np.random.default_rng(0).uniform(-1, 1, (64, *shape)).astype(np.float32)
    np.savez(tmp_path / "a.npz", x_train=x, x_test=x[:32])
    name = "folder" if len(shape) == 3 else "two_moons"
    argv = ["--config.data.name=npz", f"--config.data.path={tmp_path}/a.npz"]
    argv += ["--config.data.size=None", "--config.data.channels=None"] * (len(shape) == 3)
    run(tmp_path / "run", f"--config=configs/{name}.py:smoke", *argv, "--config.steps=20")
    sample.main([f"--workdir={tmp_path}/run", "--n=20", "--steps=2"])
    assert np.load(tmp_path / "run/generated.npz")["x"].shape == (20, *shape)
    evaluate.main([f"--workdir={tmp_path}/run", "--n=20", "--steps=2", "--held_out=4"])


def test_a_directory_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SystemExit, match="error: .*file"):
        run(tmp_path / "file" / "run", *TINY)


def test_a_run_records_where_its_data_is_and_its_shape(finished, tmp_path, monkeypatch):
    assert run_directory.read_config(finished).data.shape == (8, 8, 1)
    monkeypatch.chdir(tmp_path)
    part = data.Examples(np.zeros((4, 8, 8, 2), np.float32))
    config = config_lib.Config(data=config_lib.Data("npz", path=Path("here/a.npz")))
    recorded = dataset.recorded(config, part)
    assert recorded.data == config_lib.Data("npz", tmp_path / "here/a.npz", shape=(8, 8, 2))
    assert not config_lib.differences(config, recorded)  # earlier runs are resumed


def test_checkpoints_without_a_config_are_refused(tmp_path):
    (tmp_path / "checkpoints" / "7").mkdir(parents=True)
    with pytest.raises(SystemExit, match=r"holds no config\.json"):
        run(tmp_path, *TINY)


@pytest.mark.parametrize(
    ("flag", "meant"),
    [
        ("--config.tagret=eps", "--config.target"),
        ("--workdr=x", "--workdir"),
        ("--config.learning-rate=3", "--config.optimizer.learning_rate"),
        ("--learning_rate", "--config.optimizer.learning_rate"),
        ("--config.sampling.samplr=ddim", "--config.sampling.sampler"),
        ("--config.schedul", "--config.schedule"),
    ],
)
def test_an_unknown_flag_gets_a_suggestion(flag, meant):
    with pytest.raises(SystemExit) as stop:
        command_line.parse(
            ["--config.steps=3", flag, "--config.schedule_options", "log_snr_min=-8"]
        )
    word = flag.partition("=")[0]
    assert str(stop.value).startswith(f"error: unknown {word}: did you mean {meant}?")
    assert "--help" in str(stop.value)


def test_every_command_suggests_and_takes_local_urls(tmp_path):
    for main, word, meant in (
        (sample.main, "--samplr=ddim", "--sampler"),
        (sample.main, "--sampling.steps=3", "--steps"),
        (evaluate.main, "--bound-sample=3", "--bound_samples"),
    ):
        with pytest.raises(SystemExit, match=f"error: unknown .*did you mean {meant}"):
            main([word])
    with pytest.raises(SystemExit, match="error: unknown --nothing_like_it: --help lists all"):
        command_line.parse(["--nothing_like_it"])
    assert command_line.parse([f"--workdir=file://{tmp_path}/a%20b"]).workdir == tmp_path / "a b"


@pytest.mark.parametrize("url", ["s3://bucket/run", "hf://a/b"])
def test_paths_of_other_machines_are_refused_before_anything_starts(url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    commands = (
        lambda: command_line.parse([f"--workdir={url}"], ROOT / "configs"),
        lambda: command_line.parse([f"--config.data.path={url}"], ROOT / "configs"),
        lambda: sample.main([f"--workdir={url}"]),
        lambda: sample.main(["--workdir=digits", f"--out={url}"]),
        lambda: evaluate.main([f"--workdir={url}"]),
        lambda: evaluate.main(["--compare", url]),
        lambda: export.main([url, "a.safetensors"]),
        lambda: export.main(["digits", f"{url}.safetensors"]),
        lambda: inspect_run.main([url]),
    )
    for command in commands:
        with pytest.raises(SystemExit, match=f"error: {url[:2]}:/.* is not on this machine"):
            command()
    for read in (checkpoint.load, checkpoint.read_config, checkpoint.home):
        with pytest.raises(ValueError, match="is not on this machine"):
            read(url)
    assert not list(tmp_path.iterdir())


def test_a_config_is_found_by_its_name_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    configs = ROOT / "configs"
    assert command_line.parse([], configs).config.data.name == "digits"
    for word in ("two_moons", "two_moons:smoke", "configs/two_moons.py", "two_moons.py"):
        command = command_line.parse([f"--config={word}"], configs)
        assert command.config.data.name == "two_moons" and command.workdir == Path("runs/two_moons")
    with pytest.raises(
        SystemExit, match=f"no config digit; {configs} has .*digits, .*fashion_mnist"
    ):
        command_line.parse(["--config=digit"], configs)


def test_an_unknown_config_or_variant_gets_the_choices():
    with pytest.raises(SystemExit, match=r"no config configs/digit\.py; configs has .*digits, "):
        command_line.parse(["--config=configs/digit.py"])
    with pytest.raises(SystemExit, match="no variant 'smok': one of smoke"):
        command_line.parse(["--config=configs/digits.py:smok"])


def test_help_lists_every_field_with_its_choices():
    done = subprocess.run(
        [sys.executable, "train.py", "--help"], capture_output=True, text=True, cwd=ROOT
    )
    text = re.sub(r"[\s│]+", " ", done.stdout)
    names = set()

    def collect(cls, prefix):
        for field in dataclasses.fields(cls):
            value = getattr(cls, field.name)
            if dataclasses.is_dataclass(value):
                collect(value, f"{prefix}.{field.name}")
            else:
                names.add(f"{prefix}.{field.name}")

    collect(command_line.from_file("configs/digits.py"), "--config")
    assert not [name for name in names if name not in text]
    assert "--workdir" in text and "{" + ",".join(TARGETS) + "}" in text


def test_the_command_line_switches_the_network_and_keeps_common_options():
    common = dict(width=32, blocks=1, dropout=0.0, labels=10, null_label=True)
    levels = dict(mults=(1, 1), attention=(4,))
    for argv, model in (
        (["--config.model=song_unet"], SongUNetConfig(**common, **levels)),
        (["--config.model", "mlp"], MLPConfig(**common)),
        (
            ["--config.model.taps", *"1331", "--config.model=song_unet"],
            SongUNetConfig(**common, **levels, taps=(1, 3, 3, 1)),
        ),
    ):
        config = command_line.parse(argv).config
        assert config.model == model
        assert config == dataclasses.replace(command_line.parse([]).config, model=model)
        assert config_lib.from_json(config_lib.to_json(config)) == config
    e = resolve(config)
    params = jax.eval_shape(lambda key: e.init(key, (8, 8, 1)), jax.random.key(0))
    x, label = jnp.zeros((2, 8, 8, 1)), jnp.zeros(2, jnp.int32)
    assert jax.eval_shape(e.apply, params, x, jnp.zeros(2), {"label": label}).shape == x.shape


def test_an_unknown_network_gets_the_choices():
    with pytest.raises(SystemExit) as stop:
        command_line.parse(["--config.model=nope"])
    assert str(stop.value) == f"error: unknown model 'nope': one of {', '.join(MODELS)}"


def test_help_shows_the_options_of_the_chosen_network(capsys):
    own = {"unet": "--config.model.patch", "song_unet": "--config.model.residual_input"}
    for name in own:
        with pytest.raises(SystemExit) as stop:
            command_line.parse([f"--config.model={name}", "--help"])
        assert not stop.value.code
        out = capsys.readouterr().out
        assert [flag in out for flag in own.values()] == [name == chosen for chosen in own]
        assert "--config.model.width" in out and "--config.target" in out


def test_the_config_survives_json():
    for path in sorted((ROOT / "configs").glob("*.py")):
        for variant in ("", ":smoke"):
            config = command_line.from_file(f"{path}{variant}")
            assert config_lib.from_json(config_lib.to_json(config)) == config


def test_the_json_of_version_0_1_is_read():
    for name in ("digits", "fashion_sr"):
        config = command_line.from_file(f"configs/{name}.py")
        tree = json.loads(config_lib.to_json(config))
        model, sampling = tree["model"], tree["sampling"]
        tree["low"], tree["augment"] = tree.pop("low_resolution"), tree.pop("max_cond_noise")
        sampling["level"] = sampling.pop("cond_noise")
        sampling["score"] = sampling.pop("eval_samples")
        sampling["guidance"] = 1.2 if sampling["guidance"] else 1.0
        model["kind"] = "UNetConfig"
        for new, old in (
            ("log_snr_scale", "level_scale"),
            ("embedding_period", "level_period"),
            ("embed_image_log_snr", "image_level"),
        ):
            model[old] = model.pop(new)
        assert config_lib.from_json(json.dumps(tree)) == config


def test_the_default_run_directory_is_named_after_the_config():
    config, workdir, distributed, profile = command_line.parse([])
    assert profile == 0 and workdir == Path("runs/digits") and config.data.name == "digits"
    assert distributed == Distributed()
    _, workdir, *_ = command_line.parse(["--config=configs/two_moons.py:smoke"])
    assert workdir == Path("runs/two_moons")


def test_the_learning_rate_is_constant_unless_decay_steps_is_set():
    rate_of = lambda o: resolve(config_lib.Config(optimizer=o)).learning_rate
    o = config_lib.Optimizer(learning_rate=0.5, warmup=10)
    rate = rate_of(o)
    np.testing.assert_allclose([rate(0), rate(5), rate(10), rate(10**6)], [0, 0.25, 0.5, 0.5])
    rate = rate_of(dataclasses.replace(o, decay_steps=110))
    np.testing.assert_allclose([rate(10), rate(60), rate(110)], [0.5, 0.25, 0], atol=1e-6)
    for decay in (None, 110):
        rate = rate_of(dataclasses.replace(o, warmup=0, decay_steps=decay))
        assert rate(0) == 0.5  # without warm-up, from the first step


def test_the_learning_rate_falls_as_the_inverse_square_root_after_a_linear_ramp():
    """EDM2's: reference / sqrt(max(t / t_ref, 1)), times min(t / warmup, 1)."""
    o = config_lib.Optimizer(learning_rate=0.5, warmup=10, inverse_sqrt_from=100)
    rate = resolve(config_lib.Config(optimizer=o)).learning_rate
    expected = {0: 0.0, 5: 0.25, 10: 0.5, 100: 0.5, 400: 0.25, 2500: 0.1}
    assert {t: float(rate(t)) for t in expected} == pytest.approx(expected)
    longer = dataclasses.replace(o, warmup=200)
    rate = resolve(config_lib.Config(optimizer=longer)).learning_rate
    assert float(rate(121)) == pytest.approx(0.5 * 121 / 200 / 1.1)
