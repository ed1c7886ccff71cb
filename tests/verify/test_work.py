# ruff: noqa: E501 (lines of compiled programs)
"""FLOPs and bytes of kernels, counted by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from galvatron_jax.verify.hlo import read_module
from galvatron_jax.verify.work import Work, instruction_work

from .snippets import module


def work(main: str, *others: str) -> Work:
    """Of the last instruction of the entry."""
    found = read_module(module(main, *others))
    return instruction_work(found, found.main, found.main.instructions[-1])


def test_a_matrix_product_multiplies_and_adds_once_per_element_and_contracted_index() -> None:
    found = work(
        """
  %a = bf16[8,128,64]{2,1,0} parameter(0)
  %b = bf16[8,64,32]{2,1,0} parameter(1)
  ROOT %c = bf16[8,128,32]{2,1,0} dot(%a, %b), lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0}, rhs_contracting_dims={1}
"""
    )
    assert found.flops == {"bf16": 2 * 8 * 128 * 32 * 64}
    assert found.bytes == 2 * 8 * (128 * 64 + 64 * 32 + 128 * 32)


def test_a_library_call_counts_as_the_product_it_is() -> None:
    found = work(
        """
  %a = bf16[128,64]{1,0} parameter(0)
  %b = bf16[64,32]{1,0} parameter(1)
  ROOT %c = (bf16[128,32]{1,0}, s8[1024]{0}) custom-call(%a, %b), custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
"""
    )
    assert found.flops == {"bf16": 2 * 128 * 32 * 64}


@pytest.mark.parametrize(("target", "products"), [("__cudnn$fmhaSoftmax", 2), ("__cudnn$fmhaSoftmaxBackward", 5)])
def test_fused_attention_is_two_products_forward_and_five_backward(target: str, products: int) -> None:
    found = work(
        f"""
  %q = bf16[2,1024,8,64]{{3,2,1,0}} parameter(0)
  %k = bf16[2,512,8,64]{{3,2,1,0}} parameter(1)
  ROOT %o = (bf16[2,1024,8,64]{{3,2,1,0}}, u8[0]{{0}}) custom-call(%q, %k, %k), custom_call_target="{target}"
"""
    )
    assert found.flops == {"bf16": products * 2 * 2 * 8 * 1024 * 512 * 64}


def test_a_convolution_sums_over_the_kernel_but_its_output_channels() -> None:
    found = work(
        """
  %x = f32[2,32,32,3]{3,2,1,0} parameter(0)
  %k = f32[4,4,3,16]{3,2,1,0} parameter(1)
  ROOT %y = f32[2,8,8,16]{3,2,1,0} convolution(%x, %k), window={size=4x4 stride=4x4}, dim_labels=b01f_01io->b01f
"""
    )
    assert found.flops == {"f32": 2 * (2 * 8 * 8 * 16) * (4 * 4 * 3)}


SLICED = """
%fused (p0: f32[10,64], p1: s32[], p2: f32[64]) -> f32[64] {
  %p0 = f32[10,64]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %p2 = f32[64]{0} parameter(2)
  %zero = s32[] constant(0)
  %row = f32[1,64]{1,0} dynamic-slice(%p0, %p1, %zero), dynamic_slice_sizes={1,64}
  %flat = f32[64]{0} bitcast(%row)
  ROOT %sum = f32[64]{0} add(%flat, %p2)
}
"""

UPDATED = """
%fused (p0: f32[10,64], p1: s32[], p2: f32[64]) -> f32[10,64] {
  %p0 = f32[10,64]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %p2 = f32[64]{0} parameter(2)
  %zero = s32[] constant(0)
  %twice = f32[64]{0} add(%p2, %p2)
  %row = f32[1,64]{1,0} bitcast(%twice)
  ROOT %new = f32[10,64]{1,0} dynamic-update-slice(%p0, %row, %p1, %zero)
}
"""

ENTRY = """
  %a = f32[10,64]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %b = f32[64]{0} parameter(2)
"""


def test_a_kernel_that_takes_a_slice_reads_the_slice_only() -> None:
    found = work(ENTRY + "  ROOT %c = f32[64]{0} fusion(%a, %i, %b), kind=kLoop, calls=%fused", SLICED)
    assert found.bytes == 4 * 64 + 4 + 4 * 64 + 4 * 64


def test_a_kernel_that_updates_a_slice_in_place_writes_the_slice_only() -> None:
    found = work(ENTRY + "  ROOT %c = f32[10,64]{1,0} fusion(%a, %i, %b), kind=kLoop, calls=%fused", UPDATED)
    assert found.bytes == 4 + 4 * 64 + 4 * 64


def test_a_product_within_a_fusion_counts() -> None:
    fused = """
%fused (p0: f32[16,64], p1: f32[64,8]) -> f32[16,8] {
  %p0 = f32[16,64]{1,0} parameter(0)
  %p1 = f32[64,8]{1,0} parameter(1)
  %d = f32[16,8]{1,0} dot(%p0, %p1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %n = f32[16,8]{1,0} negate(%d)
}
"""
    main = """
  %a = f32[16,64]{1,0} parameter(0)
  %b = f32[64,8]{1,0} parameter(1)
  ROOT %c = f32[16,8]{1,0} fusion(%a, %b), kind=kCustom, calls=%fused
"""
    assert work(main, fused) == Work({"f32": 2 * 16 * 8 * 64}, 4 * (16 * 64 + 64 * 8 + 16 * 8))


def test_flops_of_a_program_are_those_that_jax_counts() -> None:
    """On CPU, whose products stand alone or in fusions; XLA's own count adds the elementwise work."""

    def mlp(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.maximum(x @ a, 0.0) @ b

    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((64, 128), (128, 256), (256, 32))]
    text = jax.jit(mlp).lower(*shapes).compile().as_text()
    found = read_module(text)
    kernels = [i for i in found.main.instructions if i.opcode in ("dot", "fusion", "custom-call")]
    total = sum(instruction_work(found, found.main, i).total_flops for i in kernels)
    assert total == 2 * 64 * 128 * 256 + 2 * 64 * 256 * 32
