"""Strictness: shapes are checked, rank promotion raises, warnings are errors (pyproject)."""

import importlib.metadata
import importlib.util
import os

# Before anything starts JAX. Eight devices, so that layouts can be compared on any machine.
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ["JAX_PLATFORMS"] = "cpu"
# Programs here run briefly: compiling them is most of the time.
QUICK = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if importlib.metadata.version("jaxlib").startswith("0.10."):  # later ones do not know the flag
    QUICK += " --xla_cpu_use_fusion_emitters=false"  # which halve the compiler's speed
os.environ.setdefault("XLA_FLAGS", QUICK)

import tempfile

import jax
import jaxtyping

# Most tests compile small programs, many of them the same ones; the workers share a cache of them.
CACHE = os.environ.setdefault("DIFFJAX_TEST_CACHE", tempfile.mkdtemp(prefix="diffjax-test-"))
os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE  # of processes that tests start
jax.config.update("jax_compilation_cache_dir", CACHE)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
jax.config.update("jax_numpy_rank_promotion", "raise")
# Not `training`: while JAX maps a pytree, its fields may hold anything.
CORE = [
    "augmentations",
    "averages",
    "couplings",
    "denoisers",
    "densities",
    "flow_maps",
    "guidance",
    "inverse",
    "keys",
    "learned_schedule",
    "learned_variance",
    "likelihood",
    "loss_aware",
    "losses",
    "ode",
    "oracles",
    "process",
    "samplers",
    "schedules",
    "super_resolution",
    "targets",
    "tiling",
    "weightings",
]
jaxtyping.install_import_hook([f"diffjax.{name}" for name in CORE], "beartype.beartype")

import pytest

# Its packages are those that `make test-peers` installs.
collect_ignore = [] if importlib.util.find_spec("physicsnemo") else ["test_peers.py"]


@pytest.fixture(scope="module", autouse=True)
def forgotten():
    """Clear JAX's compiled programs after each file: all of them would take gigabytes."""
    yield
    jax.clear_caches()


@pytest.fixture
def x64():
    """Double precision, for tests whose oracle is more accurate than float32."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A run of 40 steps with checkpoints of steps 20 and 40; a test that changes it copies it."""
    import test_train

    workdir = tmp_path_factory.mktemp("finished") / "run"
    test_train.run(workdir, *test_train.TINY, "--config.steps=40")
    return workdir
