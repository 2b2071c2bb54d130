"""The cost that a run reports, compared with known costs."""

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

from diffjax import data
from diffjax.training import distributed, metrics, telemetry

ROOT = Path(__file__).parents[1]


def test_operations_are_those_of_a_product_of_matrices():
    f = jax.jit(lambda a, b: a @ b)
    a, b = jnp.ones((30, 40)), jnp.ones((40, 50))
    assert telemetry.flops(f, a, b) == 2 * 30 * 40 * 50
    assert telemetry.flops(lambda a, b: a @ b, a, b) == 0


def test_every_round_of_a_scan_counts():
    """XLA counts the first round only: here 3 rounds of 5 products and one more."""

    @jax.jit
    def scanned(x):
        product = lambda x, _: (x @ x, None)
        outer = lambda x, _: product(jax.lax.scan(product, x, length=5)[0], None)
        return jax.lax.scan(outer, x, length=3)[0]

    count = telemetry.flops(scanned, jnp.ones((30, 30)))
    np.testing.assert_allclose(count, 18 * 2 * 30**3, rtol=1e-4)


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
