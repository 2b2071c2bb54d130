"""What studies/hlo.py reads from an optimised program, compared with what was asked for."""

import importlib
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from diffjax.training import telemetry

STUDIES = Path(__file__).parents[1] / "studies"


@pytest.fixture(scope="module")
def hlo():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(STUDIES)
        return importlib.import_module("hlo")


def compiled(f, *args):
    return jax.jit(f).lower(*args).compile().as_text()


def test_a_product_reads_its_operands_and_writes_its_result(hlo):
    a, b = jnp.ones((30, 40)), jnp.ones((40, 50))
    (product,) = [k for k in hlo.kernels(compiled(jnp.matmul, a, b)) if k.flops]
    assert (product.read, product.written) == (a.nbytes + b.nbytes, 4 * 30 * 50)
    assert product.flops == telemetry.flops(jnp.matmul, a, b)


def test_a_loop_launches_its_kernels_in_every_round_and_reads_a_slice_each_time(hlo):
    x, w = jnp.ones((32, 32)), jnp.ones((7, 32, 32))

    def f(x, w):
        return jax.lax.scan(lambda x, w: (jnp.sin(x @ w), x.sum()), x, w)

    kernels = hlo.kernels(compiled(f, x, w))
    assert {k.times for k in kernels} == {1, 7}
    assert sum(k.times * k.flops for k in kernels) == telemetry.flops(f, x, w)
    assert max(k.read for k in kernels) == 2 * x.nbytes  # and not w


def test_a_convolution_and_its_gradients_compute_what_the_function_asks_for(hlo):
    image, kernel = jnp.ones((2, 9, 9, 4)), jnp.ones((3, 3, 4, 8))

    def f(image, kernel):
        dims = ("NHWC", "HWIO", "NHWC")
        out = jax.lax.conv_general_dilated(image, kernel, (2, 2), "SAME", dimension_numbers=dims)
        return (out**3).sum()

    grad = jax.grad(f, (0, 1))
    kernels = hlo.kernels(compiled(grad, image, kernel))
    assert sum(k.flops for k in kernels) == telemetry.flops(grad, image, kernel)


GPU = """\
HloModule jit_step, is_scheduled=true

%wrapped (a: f32[4,8]) -> f32[4,1] {
  ROOT %reduce-scatter.1 = f32[4,1]{1,0} reduce-scatter(%a), dimensions={1}
}

%update (p: f32[9,4], q: f32[1,4], i: s32[]) -> f32[9,4] {
  %q = f32[1,4]{1,0} parameter(1)
  %p = f32[9,4]{1,0} parameter(0)
  %i = s32[] parameter(2)
  ROOT %d = f32[9,4]{1,0} dynamic-update-slice(%p, %q, %i, %i)
}

ENTRY %main (x: bf16[2,8,8,4], k: bf16[6,3,3,4]) -> bf16[2,4,4,6] {
  %x = bf16[2,8,8,4]{3,2,1,0} parameter(0)
  %k = bf16[6,3,3,4]{3,2,1,0} parameter(1)
  %y = (bf16[2,4,4,6]{3,2,1,0}, u8[640]{0}) custom-call(%x, %k), window={size=3x3 stride=2x2}, \
dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convForward", \
metadata={op_name="jit(step)/jvp(UNet)/conv"}
  %out = bf16[2,4,4,6]{3,2,1,0} get-tuple-element(%y), index=0
  %start = (f32[10]{0}, f32[2,5]{1,0}) all-reduce-start(%g, %h), to_apply=%add
  %w = (bf16[6,3,3,4]{3,2,1,0}, u8[0]{0}) custom-call(%x, %out), window={size=3x3 stride=2x2}, \
dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBackwardFilter"
  %f = f32[9,4]{1,0} fusion(%big, %new, %at), kind=kLoop, calls=%update
  %done = (f32[10]{0}, f32[2,5]{1,0}) all-reduce-done(%start)
  %async = ((f32[4,8]{1,0}), f32[4,1]{1,0}) async-start(%m), calls=%wrapped
  %end = f32[4,1]{1,0} async-done(%async)
  %qkv = f32[2,64,3,32]{3,2,1,0} parameter(2)
  %lt = (f32[5,7]{1,0}, s8[99]{0}) custom-call(%l, %r), custom_call_target="__cublas$gemm", \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["0"]}}}
  %l = f32[9,5]{1,0} parameter(3)
  %a = (bf16[2,64,3,32]{3,2,1,0}, u8[0]{0}) custom-call(%qkv, %qkv, %qkv), \
custom_call_target="__cudnn$fmhaSoftmax"
}
"""


def test_what_a_gpu_has_beside(hlo):
    """cuDNN's and cuBLAS's calls, updates in place and communication: counted by hand."""
    kernels = {k.line.name: k for k in hlo.kernels(GPU)}
    forward, gradient = kernels["y"], kernels["w"]
    assert forward.flops == gradient.flops == 2 * 2 * (4 * 3) ** 2 * 4 * 6
    assert forward.read == 2 * (2 * 8 * 8 * 4 + 6 * 3 * 3 * 4)
    assert forward.written == 2 * 2 * 4 * 4 * 6 and "UNet" in forward.paths
    assert kernels["f"].written == kernels["f"].read - 4 == 4 * 4  # a row and its place
    assert kernels["lt"].flops == 2 * 9 * 5 * 7 and kernels["lt"].written == 4 * 5 * 7
    assert kernels["a"].flops == 2 * 2 * (2 * 64 * 3 * 32) * 64
    assert set(kernels) == {"y", "start", "w", "f", "reduce-scatter.1", "lt", "a"}
    summed, scattered = hlo.collectives(GPU)
    assert summed == ("all-reduce", 80, ["w", "f"])
    assert scattered == ("reduce-scatter", 16, [])
