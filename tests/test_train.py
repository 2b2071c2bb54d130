"""The scripts as their users run them: every config, resumption, and refusals."""

import dataclasses
import json
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
from PIL import Image
from test_images import draw_folder

import evaluate
import train
from diffjax import checkpoint, data
from diffjax.experiment import command_line, config as config_lib, resolve, run_directory
from diffjax.training import checkpoints, distributed, metrics, runners
from diffjax.drawing import Drawing
from test_data import write_cifar, write_mnist

ROOT = Path(__file__).parents[1]
COSTS = {"img_per_s", "data_stall", "memory_gb", "tflop_per_s", "compile_s"}
TINY = ["--config=configs/digits.py:smoke"]


def run(workdir, *argv):
    """Train as train.py does, on two devices: eight virtual ones would only take longer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runners, "_devices", lambda: jax.devices()[:2])
        train.train(*command_line.parse([*argv, f"--workdir={workdir}"]))


def rows_of(workdir):
    """The metrics without what depends on the clock and on the machine."""
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
    """A copy of the run as it was when it had just saved step 20."""
    shutil.copytree(finished, workdir)
    shutil.rmtree(workdir / "checkpoints" / "40")
    (workdir / "samples.png").unlink()
    return workdir


@pytest.mark.parametrize("name", sorted(p.stem for p in (ROOT / "configs").glob("*.py")))
def test_every_config_runs_its_smoke_variant(name, tmp_path, capsys):
    argv = [f"--config=configs/{name}.py:smoke"]
    if name.startswith("fashion"):
        write_mnist(tmp_path)
        argv.append(f"--config.data.path={tmp_path}")
    if name == "cifar10":
        write_cifar(tmp_path)
        argv.append(f"--config.data.path={tmp_path}")
    if name == "folder":
        draw_folder(tmp_path)
        argv.append(f"--config.data.path={tmp_path}")
    if name != "digits":  # whose programs other tests run as well
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


def test_a_resumed_run_is_the_uninterrupted_run_bit_for_bit(finished, tmp_path, capsys):
    """From the checkpoint of step 20, which was written while training went on."""
    parts = interrupted(finished, tmp_path / "parts")
    # Rows after the restored step are dropped, and so is a line that a kill cut short.
    with (parts / "metrics.jsonl").open("a") as file:
        file.write('{"step": 50, "lo')
    run(parts, *TINY, "--config.steps=40")
    assert "resumed from the checkpoint of step 20 of 40" in capsys.readouterr().out
    assert rows_of(parts) == rows_of(finished)
    (step_a, a), (step_b, b) = newest(finished), newest(parts)
    assert step_a == step_b == 40
    assert_bitwise_equal(a, b)
    assert (parts / "samples.png").read_bytes() == (finished / "samples.png").read_bytes()


LEARNED = [
    *("--config.bound-weight=0.001", "--config.time-steps=10", "--config.model.out-channels=2"),
    *("--config.loss-aware-times=True", "--config.sampling.sampler=ancestral"),
    *("--config.sampling.options", "variance=learned"),
]


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

    evaluate.main(
        evaluate.Arguments(tmp_path / "whole", held_out=32, looks=4, drawing=Drawing(n=0))
    )
    assert "bits/dim" in capsys.readouterr().out


def test_how_steps_are_run_may_change_at_resumption(finished, tmp_path):
    parts = interrupted(finished, tmp_path / "parts")
    changes = "--config.parallel=sharded", "--config.steps-per-call=5"
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


def test_a_run_is_read_back_in_two_lines(copied):
    network, params, config = checkpoint.load(copied)
    assert config.steps == 40 and config.batch_size == 16
    out = network(params, jnp.ones((2, 8, 8, 1)), jnp.zeros(2), {"label": jnp.zeros(2, int)})
    assert out.shape == (2, 8, 8, 1) and np.isfinite(out).all()
    assert_bitwise_equal(params, newest(copied)[1]["ema_params"])
    with pytest.raises(FileNotFoundError, match="not the directory of a run"):
        checkpoint.load(copied / "elsewhere")


def test_reading_a_run_leaves_it_alone(copied):
    """It may still be writing: what is in flight is not cleaned up."""
    in_flight = copied / "checkpoints" / "60.orbax-checkpoint-tmp"
    in_flight.mkdir()
    checkpoint.load(copied)
    assert in_flight.exists()


def test_a_finished_run_draws_again_when_sampling_changes(copied):
    before = (copied / "samples.png").read_bytes()
    run(copied, *TINY, "--config.steps=40", "--config.sampling.steps=7")
    assert (copied / "samples.png").read_bytes() != before


def test_the_scaled_network_is_what_is_trained_drawn_and_read_back(copied):
    """With unit_output the fresh score network's output is scaled; `load` knows."""
    config = config_lib.from_json((copied / "config.json").read_text())
    scaled = dataclasses.replace(config, target="score", unit_output=True)
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 1))
    cond = {"label": jnp.zeros(2, jnp.int32)}
    _, params, _ = checkpoint.load(copied)
    log_snr = jnp.array([-3.0, 5.0])
    plain = resolve.make_network(config)(params, x, log_snr, cond)
    out = resolve.make_network(scaled)(params, x, log_snr, cond)
    sigma = jnp.sqrt(jax.nn.sigmoid(-log_snr))[:, None, None, None]
    np.testing.assert_allclose(out * sigma, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"model": {"kind": "ViT"}}'])
def test_a_damaged_config_is_named(copied, text):
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
        ("--config.optimizer.learning-rate=0.1", "optimizer.learning_rate: the run has 0.002"),
    ):
        with pytest.raises(SystemExit, match=re.escape(line)):
            run(copied, *TINY, "--config.steps=40", change)


def test_a_nan_stops_the_run_says_where_and_keeps_the_last_checkpoint(
    tmp_path, monkeypatch, capsys
):
    make_loss = train.make_loss

    def breaks(*args):
        loss_fn = make_loss(*args)

        def broken(key, params, batch, *rest, **options):
            losses = loss_fn(key, params, batch, *rest, **options)
            # At some step, when Adam has moved far enough: the loss is fine, its gradient not.
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
    schedule = resolve.make_learning_rate(config.optimizer)
    np.testing.assert_allclose(rate, schedule(at - 1), rtol=1e-2)
    assert examples == data.batch_indices(0, at - 1, 1497, 16).tolist()
    step, arrays = newest(tmp_path)
    assert step == kept == (at - 1) // 20 * 20 > 0
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(arrays["params"]))


def test_the_loop_compiles_the_step_once_and_fetches_nothing_between_log_points(
    tmp_path, monkeypatch
):
    """Whatever turns a device array into numbers on the host goes through `_value`."""
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
                with jax.transfer_guard("disallow"):  # what it needs is on the devices already
                    state, metrics = g(state, batch)
                losses.append(metrics["loss"])
                return state, metrics

            return guarded

        return runner._replace(step=step)

    monkeypatch.setitem(runners.RUNNERS, "pmap", watched)
    monkeypatch.setattr(train, "AHEAD", 3)
    run(tmp_path, *TINY, "--config.steps=30", "--profile=2")
    assert len(compiled) == 1
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    fetches = np.diff(at_step)  # after steps 1, 2, ... 29
    assert fetches[9] > 0 and fetches[19] > 0  # the counter works: log points
    assert not np.delete(fetches, [9, 19]).any()
    assert 0 < max(under_way) <= 3  # the host is ahead of the devices, but not far


def test_a_cpus_cores_become_its_devices_unless_the_user_chose(monkeypatch):
    code = "import jax; from diffjax.parallel import *; setup(ALONE, %s); print(jax.device_count())"

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


BAD = {
    "target": (["--config.target=epsilon"], "unknown target 'epsilon': one of x_0, eps"),
    "schedule": (["--config.schedule=cosin"], "unknown schedule 'cosin': one of cosine, linear"),
    "schedule option": (
        ["--config.schedule-options", "beta=1.0"],
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
    "continuous time": (["--config.time-input=True"], "need discrete time, time_steps=T"),
    "labels": (["--config.model.labels=5"], "the data has labels up to 9"),
    "guidance": (["--config.model.null-label=False"], "needs model.null_label=True"),
    "saving": (["--config.save-every=15"], "must be multiples of log_every=10"),
    "ema": (["--config.ema=1.0"], "ema=1.0: must be in [0, 1)"),
    "decay": (["--config.optimizer.decay-steps=5"], "must exceed warmup=100"),
    "points": (["--config.data.name=two_moons"], "examples of shape (2,)"),
    "flip": (
        ["--config=configs/two_moons.py:smoke", "--config.data.flip=True"],
        "data.flip=True needs images",
    ),
    "option": (["--config.schedule-options", "log_snr_min=nan"], "must be a finite number"),
    "option text": (["--config.schedule-options", "log_snr_min=low"], "must be a finite number"),
    "no labels": (["--config.model.labels=0", "--config.model.null-label=False"], "null_label"),
    "seed": (["--config.seed=-1"], "seed=-1: must be at least 0"),
    "attention": (["--config.model.attention", "16"], "model.attention=(16,): the heights are"),
    "two Ts": (
        [
            "--config=configs/cifar10.py:smoke",
            "--config.time-steps=500",
        ],
        "time_steps=500: the table of linear_betas has 1000 steps",
    ),
    "outputs": (
        ["--config.model.out-channels=2"],
        "no learned variance (bound_weight=None) need 1",
    ),
    "no variance": (
        ["--config.bound-weight=0.001", "--config.time-steps=100"],
        "model.out_channels=None: data of 1 channels and a learned variance (bound_weight=0.001) "
        "need 2",
    ),
    "continuous variance": (["--config.bound-weight=0.001"], "need discrete time, time_steps=T"),
    "negative bound": (
        ["--config.bound-weight=-1", "--config.time-steps=100"],
        "bound_weight=-1.0: must be at least 0",
    ),
    "continuous aware": (["--config.loss-aware-times=True"], "need discrete time, time_steps=T"),
    "variance not learned": (
        ["--config.sampling.sampler=ancestral", "--config.sampling.options", "variance=learned"],
        "the run must learn one, by its bound_weight",
    ),
    "fsdp under pmap": (["--config.fsdp=8"], "parallel=pmap copies the state to each device"),
    "fsdp": (
        ["--config.parallel=sharded", "--config.fsdp=3"],
        "fsdp=3: must be 0, for all, or divide the 2 devices",
    ),
    "best": (["--config.keep-best=1", "--config.eval-every=40"], "a multiple of eval_every=40"),
    "skip": (["--config.skip-nonfinite=-1"], "skip_nonfinite=-1: must be at least 0"),
    "log_every": (["--config.log-every=0"], "log_every=0: must be at least 1"),
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


def test_a_directory_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SystemExit, match="error: .*file"):
        run(tmp_path / "file" / "run", *TINY)


def test_checkpoints_without_a_config_are_refused(tmp_path):
    (tmp_path / "checkpoints" / "7").mkdir(parents=True)
    with pytest.raises(SystemExit, match=r"holds checkpoints but no config\.json"):
        run(tmp_path, *TINY)


def test_an_unknown_key_is_answered_with_a_guess(capsys):
    with pytest.raises(SystemExit):
        command_line.parse(["--config.tagret=eps"])
    out = capsys.readouterr()
    text = re.sub(r"\s+", " ", out.out + out.err)
    assert "--config.target" in text and "erhaps you meant" in text


def test_an_unknown_config_or_variant_is_answered_with_the_choices():
    with pytest.raises(SystemExit, match=r"no config configs/digit\.py; .*configs/digits\.py"):
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
    missing = [n for n in names if n not in text and n.replace("_", "-") not in text]
    assert not missing
    assert "--workdir" in text and "{x_0,eps,score,v,flow,F}" in text


def test_the_config_survives_json():
    for path in sorted((ROOT / "configs").glob("*.py")):
        for variant in ("", ":smoke"):
            config = command_line.from_file(f"{path}{variant}")
            assert config_lib.from_json(config_lib.to_json(config)) == config


def test_the_default_run_directory_is_named_after_the_config():
    config, workdir, distributed, profile = command_line.parse([])
    assert profile == 0 and workdir == Path("runs/digits") and config.data.name == "digits"
    assert distributed == distributed.Distributed()
    _, workdir, *_ = command_line.parse(["--config=configs/two_moons.py:smoke"])
    assert workdir == Path("runs/two_moons")


def test_the_learning_rate_is_constant_unless_a_decay_says_when_it_ends():
    o = config_lib.Optimizer(learning_rate=0.5, warmup=10)
    rate = resolve.make_learning_rate(o)
    np.testing.assert_allclose([rate(0), rate(5), rate(10), rate(10**6)], [0, 0.25, 0.5, 0.5])
    rate = resolve.make_learning_rate(dataclasses.replace(o, decay_steps=110))
    np.testing.assert_allclose([rate(10), rate(60), rate(110)], [0.5, 0.25, 0], atol=1e-6)
    for decay in (None, 110):
        rate = resolve.make_learning_rate(dataclasses.replace(o, warmup=0, decay_steps=decay))
        assert rate(0) == 0.5  # no warm-up: at once
