"""The program that a GPU would get, which XLA can lower on a machine without a GPU.

Where its compiler for GPUs is installed, it can optimise the program too: `make aot-test`.
"""

import collections
import importlib
import re
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import train
from diffjax.experiment import Config, resolve
from diffjax.experiment.functions import initial_state
from diffjax.models import UNetConfig

BATCH = 8


@pytest.fixture(scope="module")
def program():
    """The training step of a network in bfloat16, as lowered for CUDA."""
    model = UNetConfig(64, (1, 2), 1, attention=(8,), groups=8, bfloat16=True)
    e = resolve(Config(model=model, batch_size=BATCH))
    state = jax.eval_shape(initial_state(e, (16, 16, 3)))
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves((state.params, state.ema_params)))
    step = train.make_step(e, train.make_loss(e, None))
    batch = {
        "x": jax.ShapeDtypeStruct((BATCH, 16, 16, 3), jnp.float32),
        "index": jax.ShapeDtypeStruct((BATCH,), jnp.int32),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "default_backend", lambda: "gpu")
        # JAX asks for the version of cuDNN, which is not installed here.
        cudnn = "jax._src.cudnn.fused_attention_stablehlo."
        patch.setattr(cudnn + "check_cudnn_version", lambda: 91000)
        patch.setattr(cudnn + "check_compute_capability", lambda _: True)
        jitted = jax.jit(step, donate_argnums=0)
        return jitted.trace(state, batch).lower(lowering_platforms=("cuda",)).as_text()


def test_nothing_calls_the_host(program):
    calls = set(re.findall(r"custom_call @([\w$.]+)", program))
    assert calls and all(name.startswith("__cudnn$fmha") for name in calls), calls
    assert not re.search(r"callback|infeed|outfeed", program)


def test_attention_is_cudnns_and_its_backward_pass_too(program):
    calls = collections.Counter(re.findall(r"custom_call @(__cudnn\$fmha\w+)", program))
    assert calls == {"__cudnn$fmhaSoftmax": 4, "__cudnn$fmhaSoftmaxBackward": 4}


def test_convolutions_are_in_bfloat16_and_keep_the_layout_of_images(program):
    lines = [line for line in program.splitlines() if "stablehlo.convolution" in line]
    forward = [line for line in lines if "[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]" in line]
    # Two in each of 2 + 2 + 4 blocks, in, out, one that halves, and four that double.
    assert len(forward) == 16 + 2 + 1 + 4 and len(lines) == 3 * len(forward) - 1
    for line in lines:
        assert set(re.findall(r"x(bf16|f32)>", line)) == {"bf16"}, line


def test_statistics_are_in_float32(program):
    roots = re.findall(r"stablehlo\.rsqrt .*tensor<[\dx]*x(\w+)>", program)
    assert len(roots) > 10 and set(roots) == {"f32"}


def test_no_image_is_transposed(program):
    """Only the heads of attention are, because its kernel returns gradients in that layout."""
    found = re.findall(r"transpose .*dims = \[(.*)\] : \(tensor<([\dx]+)x\w+>\)", program)
    assert len(found) > 20
    for dims, shape in found:
        shape = [int(n) for n in shape.split("x")]
        moved = [int(axis) for axis in dims.split(", ") if shape[int(axis)] > 1]
        assert moved == sorted(moved) or BATCH not in shape, (dims, shape)


def test_the_state_is_donated(program):
    head = program[program.index("@main(") :].splitlines()[0]
    state = head.count("tensor<") - head.split("->")[1].count("tensor<")
    given = head.count("tf.aliasing_output") + head.count("jax.buffer_donor")
    assert given >= state - 4, (given, state)  # batch and key are not


@pytest.mark.faults
@pytest.mark.skipif(not find_spec("jax_cuda12_plugin"), reason="needs jax[cuda12]")
def test_the_optimised_step_of_ddpm_stays_within_bounds(monkeypatch):
    """For an H100, at a batch of 128: what docs/accelerators.md has, and a tenth more."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "studies")
    found = importlib.import_module("aot").compiled("ddpm")
    assert found["kernels"] < 2500
    assert sum(part["bytes"] for part in found["parts"].values()) < 35e9
    assert found["temporary"] < 3.4e9
    computed = sum(part["flops"] for part in found["parts"].values())
    assert 0.95 < computed / found["flops"] < 1.05
