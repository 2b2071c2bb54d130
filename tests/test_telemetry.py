"""The cost that a run reports, compared with known costs."""

import dataclasses
import functools
import gzip
import importlib.util
import json
import os
import pwd
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import train
from catalogue import slow
from diffjax import data
from diffjax.experiment import Config, Optimizer, resolve
from diffjax.experiment.functions import initial_state
from diffjax.models import DiTConfig, UNetConfig, layers
from diffjax.training import distributed, metrics, runners, telemetry

ROOT = Path(__file__).parents[1]


def test_operations_are_those_of_a_product_of_matrices():
    a, b = jnp.ones((30, 40)), jnp.ones((40, 50))
    for f in (jnp.matmul, jax.jit(jnp.matmul), jax.checkpoint(jnp.matmul)):
        assert telemetry.flops(f, a, b) == 2 * 30 * 40 * 50
    each = jax.vmap(jnp.matmul, (None, 0))
    assert telemetry.flops(each, a, jnp.stack([b, b, b])) == 3 * 2 * 30 * 40 * 50


def test_every_round_of_a_scan_counts_and_one_branch_and_one_round_of_what_is_not_known():
    x = jnp.ones((30, 30))
    product = lambda x, _: (x @ x, None)
    outer = lambda x, _: product(jax.lax.scan(product, x, length=5)[0], None)
    branches = [lambda x: x, lambda x: x @ x @ x, lambda x: x @ x]
    for count, f in {
        18: lambda x: jax.lax.scan(outer, x, length=3)[0],
        2: lambda x: jax.lax.switch(0, branches, x),
        1: lambda x: jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ x, x),
    }.items():
        assert telemetry.flops(jax.jit(f), x) == count * 2 * 30**3


CONVOLUTIONS = [
    # size, taps, stride, padding, groups, dilation of the kernel -> multiplications along an axis
    (8, 3, 1, "SAME", 1, 1, 8 * 3),
    (8, 3, 2, "SAME", 1, 1, 4 * 3),
    (7, 3, 2, "SAME", 1, 1, 4 * 3),
    (9, 3, 3, "VALID", 1, 1, 3 * 3),
    (8, 3, 1, "VALID", 2, 1, 6 * 3),
    (8, 3, 1, "SAME", 6, 2, 8 * 3),
    (8, 3, 1, ((2, 2), (2, 2)), 1, 1, 8 * 3),  # each pixel meets each tap once
    (1, 3, 1, "SAME", 1, 1, 1),  # the other taps only ever see padding
]


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_a_convolution_and_its_gradients_count_what_they_multiply(case):
    size, taps, stride, padding, groups, dilation, expected = case
    image, kernel = jnp.ones((2, size, size, 6)), jnp.ones((taps, taps, 6 // groups, 12))

    def f(image, kernel):
        return jax.lax.conv_general_dilated(
            *(image, kernel, (stride, stride), padding),
            rhs_dilation=(dilation, dilation),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        ).sum()

    forward = telemetry.flops(f, image, kernel)
    assert forward == 2 * expected**2 * 2 * (6 // groups) * 12
    for argument in (0, 1):
        both = telemetry.flops(jax.value_and_grad(lambda *a: f(*a) ** 2, argument), image, kernel)
        assert both == 2 * forward


def test_a_transposed_convolution_and_its_gradients_count_the_pixels_that_there_are():
    image, kernel = jnp.ones((2, 5, 5, 3)), jnp.ones((4, 4, 3, 7))

    def f(image, kernel):
        return (jax.lax.conv_transpose(image, kernel, (2, 2), "SAME") ** 2).sum()

    assert telemetry.flops(f, image, kernel) == 2 * 2 * (5 * 4) ** 2 * 3 * 7
    assert telemetry.flops(jax.grad(f, (0, 1)), image, kernel) == 3 * telemetry.flops(
        f, image, kernel
    )


@pytest.mark.parametrize("policy", [None, jax.checkpoint_policies.dots_saveable])
def test_what_is_recomputed_does_not_count(policy):
    x, w = jnp.ones((4, 8)), jnp.ones((3, 8, 8))

    def loss(w, checkpoint):
        block = checkpoint(lambda x, w: jnp.sin(jax.jit(jnp.tanh)(x @ w) @ w))
        return jax.lax.scan(lambda x, w: (block(block(x, w), w), None), x, w)[0].sum()

    checkpoint = functools.partial(jax.checkpoint, policy=policy)
    plain, again = (
        telemetry.flops(jax.grad(functools.partial(loss, checkpoint=c)), w)
        for c in (lambda f: f, checkpoint)
    )
    assert plain == again == 3 * telemetry.flops(lambda w: loss(w, checkpoint), w)


def test_attention_counts_where_cudnn_computes_it(monkeypatch):
    cudnn = "jax._src.cudnn.fused_attention_stablehlo."
    monkeypatch.setattr(cudnn + "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn + "check_compute_capability", lambda _: True)
    qkv = [jax.ShapeDtypeStruct((2, 128, 3, 64), jnp.bfloat16)] * 3
    counts = []
    for backend in ("cpu", "gpu"):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        f = lambda *a: layers.attention(*a).sum()
        counts.append([telemetry.flops(g, *qkv) for g in (f, jax.grad(f, (0, 1, 2)))])
    assert counts[0] == counts[1] == [4 * 2 * 3 * 128**2 * 64 * n for n in (1, 3)]


def like(dtype, *shape):
    return jax.ShapeDtypeStruct(shape, dtype)


def forward(config, *shape):
    """Operations of the network for a batch of images of this shape."""
    e, n = resolve(config), config.batch_size
    params = jax.eval_shape(initial_state(e, shape)).params
    cond = {"label": like(jnp.int32, n)} if config.model.labels else None
    x, log_snr = like(jnp.float32, n, *shape), like(jnp.float32, n)
    return telemetry.flops(e.apply, params, x, log_snr, cond)


def step(config, *shape, split=None, runner=None):
    """Operations of one call of the training step for a batch whose leading axes are `split`."""
    e = resolve(config)
    split, axis = split or (config.batch_size,), runner.axis if runner else None
    f = train.make_step(e, train.make_loss(e, None, axis_name=axis))
    batch = {
        "x": like(jnp.float32, *split, *shape),
        "index": like(jnp.int32, *split),
        "label": like(jnp.int32, *split),
    }
    args = jax.eval_shape(initial_state(e, shape)), batch
    return runner.flops(runner.step(f), *args) if runner else telemetry.flops(f, *args)


DDPM = UNetConfig(128, (1, 2, 2, 2), 2, attention=(16,), groups=32)
ADM = UNetConfig(
    *(192, (1, 2, 3, 4), 3),
    attention=(32, 16, 8),
    head_width=64,
    scale_shift=True,
    resblock_updown=True,
    labels=1000,
)


@pytest.mark.parametrize(("model", "size", "published"), [(DDPM, 32, 6.1), *slow((ADM, 64, 110))])
def test_a_published_network_needs_what_others_counted(model, size, published):
    """Billions of multiplications, by Diff-Pruning (Fang et al. 2023) and by EDM2.

    Ours needs 0.44 billion fewer: where DDPM's enlarges and convolves, it has one convolution.
    """
    config = Config(model=model, batch_size=2)
    count = forward(config, size, size, 3)
    ours = count / 2 / 2e9 + (0.44 if model is DDPM else 0)
    np.testing.assert_allclose(ours, published, rtol=0.03)
    np.testing.assert_allclose(step(config, size, size, 3) / count, 3, rtol=1e-3)


@pytest.mark.parametrize("remat", ["none", *slow("full", "dots")])
def test_a_transformer_needs_what_its_paper_says(remat):
    """Peebles & Xie 2022, table 1: DiT-B/2 has 23.01 billion multiplications."""
    model = DiTConfig(768, 12, 12, patch=2, labels=1000, null_label=True, remat=remat)
    config = Config(model=model, batch_size=2)
    count = forward(config, 32, 32, 4)
    np.testing.assert_allclose(count / 2 / 2e9, 23.01, rtol=1e-3)
    np.testing.assert_allclose(step(config, 32, 32, 4) / count, 3, rtol=1e-3)


TINY = UNetConfig(8, (1,), 1, attention=(8,), groups=4, dropout=0.1)


def test_a_step_is_three_times_the_network_however_it_is_made():
    config = Config(model=TINY, batch_size=8)
    once = step(config, 8, 8, 3)
    np.testing.assert_allclose(once / forward(config, 8, 8, 3), 3, rtol=0.05)  # images: no gradient
    change = functools.partial(dataclasses.replace, config)
    assert step(change(optimizer=Optimizer(accumulate=4)), 8, 8, 3) == once
    assert step(change(model=dataclasses.replace(TINY, remat=True)), 8, 8, 3) == once
    assert step(change(steps_per_call=5), 8, 8, 3, split=(8, 5)) == 5 * once


def test_runners_agree_on_the_work_of_a_device(monkeypatch):
    monkeypatch.setattr(runners, "_devices", lambda: jax.devices()[:4])
    config = Config(model=TINY, batch_size=8)
    whole = step(config, 8, 8, 3)
    for runner, split in ((runners.pmap(), (4, 2)), (runners.sharded(2), (8,))):
        assert 4 * step(config, 8, 8, 3, split=split, runner=runner) == whole


def test_a_meter_measures_waiting_compiling_and_speed(monkeypatch):
    def slow():
        for _ in range(4):
            time.sleep(0.05)
            yield 0

    with telemetry.Meter() as meter:
        assert list(meter.waited(slow())) == [0] * 4
        jax.jit(lambda x: jnp.sin(x) * 3.25)(1.0)
        meter.flops = 5e12
        row = meter.read(10, 2.0)
        assert 0.1 <= row["data_stall"] < 0.2 and row["tflop_per_s"] == 25
        assert row["compile_s"] > 0 and "mfu" not in row  # the peak of a CPU is unknown
        assert 0.05 < row["memory_gb"] < 100
        monkeypatch.setattr(telemetry, "peak_flops", lambda kind: 100e12)
        row = meter.read(10, 2.0)
        assert row["data_stall"] == 0 and row["mfu"] == 0.25 and "compile_s" not in row
    jax.jit(lambda x: jnp.sin(x) * 4.25)(1.0)
    assert "compile_s" not in meter.read(1, 1.0)  # it no longer measures


def test_the_peak_is_that_of_the_device():
    peaks = [telemetry.peak_flops(kind) for kind in ("TPU v5 lite", "TPU v5p", "TPU v5", "cpu")]
    assert peaks == [197e12, 459e12, 459e12, None]


def test_advice_is_given_only_where_the_user_has_chosen_no_allocator(monkeypatch):
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    monkeypatch.delenv(telemetry.TUNABLES, raising=False)
    glibc = "glibc" in (os.confstr("CS_GNU_LIBC_VERSION") or "")
    assert (telemetry.advice() is not None) == glibc
    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/libjemalloc.so.2")
    assert telemetry.advice() is None
    monkeypatch.delenv("LD_PRELOAD")
    monkeypatch.setenv(telemetry.TUNABLES, "glibc.malloc.arena_max=2")
    assert telemetry.advice() is None


def test_the_page_and_the_makefile_give_the_advice(monkeypatch):
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    monkeypatch.delenv(telemetry.TUNABLES, raising=False)
    if advice := telemetry.advice():
        section, page = re.search(r'"(.*)" in (docs/\S+)', advice).groups()
        _, text = (ROOT / page).read_text().split(f"## {section}\n")
        assert len(advice) <= 90 and f"{telemetry.TUNABLES}={telemetry.ALLOCATOR}" in text
    assert f"export GLIBC_TUNABLES ?= {telemetry.ALLOCATOR}\n" in (ROOT / "Makefile").read_text()


def test_batches_are_made_ahead_but_not_too_far_and_errors_wait_for_their_turn():
    made, threads = [], set()

    def fetch(step):
        made.append(step)
        threads.add(threading.current_thread())
        if step == 5:
            raise OSError("no batch 5")
        return 10 * step

    batches = data.prefetch(fetch, range(3, 100), ahead=2)
    assert next(batches) == 30
    time.sleep(0.1)
    assert made == [3, 4, 5] and threading.current_thread() not in threads
    assert next(batches) == 40
    with pytest.raises(OSError, match="no batch 5"):
        next(batches)
    assert max(made) <= 7


def test_some_steps_are_traced_on_request(tmp_path):
    f = jax.jit(lambda x: jnp.sort(jnp.sin(x @ x.T)))
    with telemetry.traced(tmp_path / "once", range(1, 3)) as at:
        for taken in range(5):
            at(taken, f(jnp.ones((9, 9))))
    (trace,) = (tmp_path / "once").rglob("perfetto_trace.json.gz")
    with gzip.open(trace) as file:
        names = [str(event.get("name")) for event in json.load(file)["traceEvents"]]
    assert any("sort" in name for name in names)
    # A trace must end with its run: otherwise the next one could not start.
    with telemetry.traced(tmp_path / "again", range(1, 5)) as at:
        at(1, jnp.ones(()))
    with telemetry.traced(tmp_path / "again", range(1, 2)) as at:
        at(1, jnp.ones(()))
        at(2, jnp.ones(()))


def test_rows_hold_the_cost_of_the_run(finished):
    rows = metrics.read(finished)
    assert rows[0]["compile_s"] > 0 and "compile_s" not in rows[2]
    for row in rows:
        assert 0 <= row["data_stall"] < 1 and row["memory_gb"] > 0.05
        # The same operations in every step.
        per_image = row["tflop_per_s"] / row["img_per_s"]
        np.testing.assert_allclose(per_image, rows[0]["tflop_per_s"] / rows[0]["img_per_s"])


@pytest.mark.faults
def test_compiled_programs_are_kept_unless_the_user_has_chosen_a_folder(tmp_path):
    code = """
import jax, jax.monitoring, jax.numpy as jnp
from diffjax.training import distributed
distributed.setup(distributed.ALONE, 8)
seen = []
jax.monitoring.register_event_listener(lambda event, **_: seen.append(event))
def f(x):
    for _ in range(40):
        x = jnp.sort(jax.nn.softmax(jnp.sin(x @ x.T)))
    return x.sum()
jax.jit(jax.grad(f))(jnp.eye(20))
print(seen.count("/jax/compilation_cache/cache_hits"))
"""
    mine = {k: v for k, v in os.environ.items() if not k.startswith("JAX_COMPILATION")}
    mine["XDG_CACHE_HOME"] = str(tmp_path)

    def found(**chosen):
        command = [sys.executable, "-c", code]
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=ROOT, env=mine | chosen, check=True
        )
        return int(done.stdout), len(list((tmp_path / "diffjax").iterdir()))

    hits, kept = found()
    assert hits == 0 and kept >= 1  # on a busy machine the small ones take long enough as well
    assert found()[0] >= 1
    mine["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    before = len(list((tmp_path / "diffjax").iterdir()))
    hits, kept = found(JAX_COMPILATION_CACHE_DIR=str(tmp_path / "chosen"))
    assert hits == 0 and kept == before
    assert len(list((tmp_path / "chosen").iterdir())) > 1


def test_a_user_without_a_home_can_import_and_has_a_cache(monkeypatch):
    """As in a container under a number that the table of users lacks."""
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def nobody(uid):
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    spec = importlib.util.spec_from_file_location("diffjax.training.again", distributed.__file__)
    again = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, again)
    spec.loader.exec_module(again)
    assert again.cache() == Path(tempfile.gettempdir()) / "diffjax"
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert again.cache() == Path("/somewhere/diffjax")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/a")
    assert again.cache() == Path("/home/a/.cache/diffjax")
