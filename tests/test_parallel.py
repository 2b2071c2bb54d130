"""Layouts: draws are equal on any devices, and parameters are equal up to rounding."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import layouts
import numpy as np
import pytest

from catalogue import slow
from diffjax.training import distributed, runners
from diffjax.training.distributed import Distributed


def on(monkeypatch, devices):
    """Use only this many devices, from the first."""
    some = jax.devices()[:devices]
    monkeypatch.setattr(runners, "_devices", lambda: some)
    monkeypatch.setattr(runners, "SMALL", 64)


@pytest.fixture(scope="module")
def alone():
    """Draws, samples and parameters on one device."""
    with pytest.MonkeyPatch.context() as patch:
        on(patch, 1)
        runner = runners.sharded()
        return layouts.draws(runner), layouts.images(runner), layouts.parameters(runner)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("name", "devices", "accumulate"),
    [
        *[("pmap", 4, 2), ("fsdp", 4, 2), ("two axes", 8, 1)],
        *slow(("pmap", 1, 1), ("pmap", 8, 1), ("sharded", 1, 4), ("sharded", 2, 1)),
    ],
)
def test_draws_are_bitwise_equal_on_every_layout(monkeypatch, alone, name, devices, accumulate):
    """Times, noise, dropout, dropped labels and flips of every example."""
    on(monkeypatch, devices)
    got = layouts.draws(layouts.LAYOUTS[name](), accumulate)
    assert got.dtype == np.uint32
    np.testing.assert_array_equal(got, alone[0])


@pytest.mark.parametrize("coupling", ["immiscible", *slow("ot")])
def test_examples_are_paired_over_the_whole_batch_on_every_layout(monkeypatch, coupling):
    losses = {}
    for name, devices in (("sharded", 1), ("pmap", 8), ("fsdp", 4)):
        on(monkeypatch, devices)
        losses[name] = layouts.coupled_losses(layouts.LAYOUTS[name](), coupling)
        np.testing.assert_allclose(losses[name], losses["sharded"], rtol=1e-5)
    alone = layouts.coupled_losses(layouts.LAYOUTS[name](), "independent")
    assert 0 < (alone != losses[name]).mean() <= 1


@pytest.mark.parametrize("identity", ["lagrangian", *slow("eulerian", "semigroup")])
def test_the_losses_of_a_flow_map_are_equal_on_every_layout(monkeypatch, identity):
    """Up to rounding, so both times, the noise and the dropout of every evaluation are equal."""
    losses = []
    for name, devices in (("sharded", 1), ("pmap", 8), ("fsdp", 4)):
        on(monkeypatch, devices)
        losses.append(layouts.map_losses(layouts.LAYOUTS[name](), identity))
        np.testing.assert_allclose(losses[-1], losses[0], rtol=1e-4)
    assert np.unique(losses[0]).size == len(losses[0])


def test_the_default_runner_suits_the_processes(monkeypatch):
    assert [runners.choose(*args).name for args in ((None,), (None, 2))] == ["pmap", "sharded"]
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert [runners.choose(name).name for name in (None, "pmap")] == ["sharded", "pmap"]


def test_draws_are_bitwise_equal_without_any_compilation(alone):
    eager = runners.Runner(
        name="eager",
        init=lambda f: jax.jit(f)(),
        step=lambda f: f,
        map=lambda f: f,
        slots=np.arange,
        put=lambda batch: jax.tree.map(jnp.asarray, batch),
        flops=lambda *_: 0.0,
    )
    np.testing.assert_array_equal(layouts.draws(eager), alone[0])


def test_draws_differ_between_examples(alone):
    x, noise, t, label, dropped = alone[0].T
    for each in (x, noise, t):
        assert len(set(each)) == layouts.BATCH
    assert 2 < len(set(label)) <= 11 and len(set(dropped)) > 8


@pytest.mark.faults
@pytest.mark.parametrize(
    ("name", "devices", "accumulate"),
    [("pmap", 8, 1), ("two axes", 4, 2)],
)
def test_layouts_agree(monkeypatch, alone, name, devices, accumulate):
    """The parameters after 20 steps; test_faults.py has all layouts, in two processes."""
    on(monkeypatch, devices)
    got = layouts.parameters(layouts.LAYOUTS[name](), accumulate=accumulate)
    layouts.assert_close(got, alone[2], f"{name} on {devices}")


@pytest.mark.parametrize("name", ["pmap", *slow("fsdp")])
def test_an_image_depends_on_its_index_alone(monkeypatch, alone, name):
    on(monkeypatch, 8)
    np.testing.assert_allclose(layouts.images(layouts.LAYOUTS[name]()), alone[1], atol=1e-5)


@pytest.mark.faults
def test_fsdp_splits_the_state_and_its_optimiser_and_keeps_them_split(monkeypatch):
    """Each device holds an eighth of what is large, before and after a step."""
    on(monkeypatch, 8)
    init, step = layouts.training()
    runner = runners.sharded(0)
    after, _ = runner.step(step)(runner.init(init), layouts.batch_of(runner, 0))
    born = runner.init(init)
    split = 0
    for x, y in zip(jax.tree.leaves(born), jax.tree.leaves(after), strict=True):
        assert x.sharding == y.sharding
        divisible = any(n % 8 == 0 for n in x.shape)
        if x.size >= 64 and divisible and not jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            assert x.addressable_shards[0].data.size == x.size // 8
            split += 1
    assert split > 40


def test_the_largest_divisible_axis_is_split():
    spec = lambda *shape: tuple(runners._split_largest(shape, "fsdp", 8))
    assert spec(3, 3, 64, 128) == (None, None, None, "fsdp")
    assert spec(3, 3, 128, 64) == (None, None, "fsdp")
    assert spec(64, 64) == ("fsdp",)
    assert spec(100, 99) == () and spec(8) == ()


@pytest.mark.parametrize("name", layouts.LAYOUTS)
def test_in_batches_takes_batches_of_any_length(name):
    runner = layouts.LAYOUTS[name]()
    double = runner.map(lambda params, batch: params * batch["x"])
    for n, size in ((1, 8), (8, 8), (13, 8), (13, 5)):
        batch = {"x": np.arange(n, dtype=np.float32), "index": np.arange(n)}
        got = runners.in_batches(runner, double, jnp.float32(2), batch, size)
        np.testing.assert_array_equal(got, 2 * np.arange(n))


@pytest.mark.faults
def test_a_step_on_split_state_is_compiled_once(monkeypatch):
    on(monkeypatch, 8)
    traced, runner = [], runners.sharded(0)
    init, step = layouts.training()
    mapped = runner.step(lambda *args: traced.append(None) or step(*args))
    state = runner.init(init)
    for k in range(3):
        state, _ = mapped(state, layouts.batch_of(runner, k))
    assert len(traced) == 1


def test_a_batch_that_the_devices_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="batch_size=12 must be a positive multiple of 8 devices"):
        distributed.check_batch(12)
    with pytest.raises(ValueError, match="2 accumulated parts = 16"):
        distributed.check_batch(24, accumulate=2)


@pytest.mark.parametrize(
    ("batch_size", "devices", "advice"),
    [
        (15, 1, "batch_size=15 splits over 1 of the 4 cores; 8 or 16 would use all of them"),
        (2, 1, "batch_size=2 splits over 1 of the 4 cores; 8 would use all of them"),
        (16, 4, None),
        (16, 1, None),  # the user has chosen one device
    ],
)
def test_cores_that_a_batch_leaves_idle_are_told(monkeypatch, batch_size, devices, advice):
    monkeypatch.setattr(distributed, "cores", lambda: 4)
    monkeypatch.setattr(jax, "local_device_count", lambda: devices)
    assert distributed.idle_cores(batch_size, 2) == advice


@pytest.mark.parametrize("platform", ["cuda", pytest.param("nonsense", marks=pytest.mark.faults)])
def test_a_platform_that_is_not_there_is_one_line(platform):
    code = (
        "from diffjax.experiment.command_line import error_exit\n"
        "from diffjax.training import distributed\n"
        "with error_exit(): distributed.setup(distributed.ALONE, 4)\n"
        "import jax; jax.devices()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"JAX_PLATFORMS": platform},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    if done.returncode == 0:
        pytest.skip("it is there")
    assert done.stderr.splitlines()[-1].startswith(f"error: JAX_PLATFORMS={platform}: JAX finds")
    assert "Traceback" not in done.stderr


KUBERNETES = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"SLURM_PROCID": "3"}, "SLURM_PROCID=3: this process is one of several"),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "TPU_WORKER_HOSTNAMES=a,b: this.*run alone"),
        ({"MEGASCALE_NUM_SLICES": "2"}, "MEGASCALE_NUM_SLICES=2"),
        (KUBERNETES | {"JOB_COMPLETION_INDEX": "0"}, r"JOB_COMPLETION_INDEX=0.*\[k8s\]"),
    ],
)
def test_a_process_of_a_cluster_never_runs_alone(monkeypatch, environment, message):
    """Here JAX has started, so that the process cannot join: without a cluster, as in a notebook,
    it runs alone.
    """
    distributed.setup(Distributed(), 16)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        distributed.setup(Distributed(), 16)
    distributed.setup(Distributed(processes=1), 16)


def test_what_a_cluster_also_sets_for_a_single_process_is_no_reason_to_refuse_it(monkeypatch):
    single = {"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "1"}
    for name, value in (single | KUBERNETES).items():
        monkeypatch.setenv(name, value)
    distributed.setup(Distributed(), 16)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (Distributed("host:1"), "give coordinator, processes and process together"),
        (Distributed(processes=2), "or processes=1 to be alone"),
        (Distributed(None, 2, 0), "give coordinator, processes and process together"),
        (Distributed("host:1", 2, 2), r"process must be in 0\.\.1"),
    ],
)
def test_impossible_numbers_of_processes_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        distributed.setup(given, 16)
