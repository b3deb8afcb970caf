"""Bytes that compiled programs move, beside a case computed by hand and the compiler's count."""

import jax
import jax.numpy as jnp
import pytest

from convit_jax.plan.hlo import Program
from convit_jax.plan.traffic import bytes_moved

# In the style of the TPU's compiler. S(1) is the memory on the chip.
PROGRAM = """\
HloModule jit_step
%fused_slice (param_0: f32[10,64], param_1: s32[]) -> f32[64] {
  %param_0 = f32[10,64]{1,0:T(8,128)} parameter(0)
  %param_1 = s32[]{:T(128)} parameter(1)
  %bitcast.1 = f32[10,64]{1,0:T(8,128)} bitcast(%param_0)
  %slice = f32[1,64]{1,0} dynamic-slice(%bitcast.1, %param_1), dynamic_slice_sizes={1,64}
  ROOT %reshape = f32[64]{0} reshape(%slice)
}
%fused_update (param_0: f32[10,64], param_1: f32[64], param_2: s32[]) -> f32[10,64] {
  %param_2 = s32[]{:T(128)} parameter(2)
  %param_0 = f32[10,64]{1,0:T(8,128)} parameter(0)
  %param_1 = f32[64]{0:T(128)} parameter(1)
  %bitcast.2 = f32[1,64]{1,0:T(8,128)} bitcast(%param_1)
  ROOT %update = f32[10,64]{1,0} dynamic-update-slice(%param_0, %bitcast.2, %param_2, %param_2)
}
%body (param: (s32[], f32[10,64])) -> (s32[], f32[10,64]) {
  %param = (s32[]{:T(128)}, /*index=1*/f32[10,64]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%param), index=0
  %x = f32[10,64]{1,0:T(8,128)} get-tuple-element(%param), index=1
  %part = f32[64]{0:T(128)S(1)} fusion(%x, %i), kind=kLoop, calls=%fused_slice
  %new = f32[10,64]{1,0:T(8,128)} fusion(%x, %part, %i), kind=kLoop, calls=%fused_update
  ROOT %tuple = (s32[]{:T(128)}, f32[10,64]{1,0:T(8,128)}) tuple(%i, %new)
}
%fused_cast (param_0: f32[10,64]) -> bf16[64] {
  %param_0 = f32[10,64]{1,0:T(8,128)} parameter(0)
  %slice.2 = bf16[1,64]{1,0:T(8,128)(2,1)} slice(%param_0), slice={[4:5], [0:64]}
  ROOT %bitcast.3 = bf16[64]{0} bitcast(%slice.2)
}
%fused_product (param_0: f32[10,64]) -> bf16[64] {
  %param_0 = f32[10,64]{1,0:T(8,128)} parameter(0)
  %fusion.1 = bf16[64]{0} fusion(%param_0), kind=kLoop, calls=%fused_cast
  ROOT %product = bf16[64]{0} multiply(%fusion.1, %fusion.1)
}
%condition (param: (s32[], f32[10,64])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(10)
  ROOT %lt = pred[]{:T(512)} compare(%i, %constant.1), direction=LT
}
ENTRY %main (p: f32[10,64]) -> f32[10,64] {
  %p = f32[10,64]{1,0:T(8,128)} parameter(0), metadata={op_name="a (b"}
  %zero = s32[]{:T(128)} constant(0)
  %t = (s32[]{:T(128)}, f32[10,64]{1,0:T(8,128)}) tuple(%zero, %p)
  %while.1 = (s32[]{:T(128)}, f32[10,64]{1,0:T(8,128)}) while(%t), condition=%condition, body=%body
  %y = f32[10,64]{1,0:T(8,128)} get-tuple-element(%while.1), index=1
  %fetch = (f32[10,64]{1,0:T(8,128)S(1)}, f32[10,64]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%y)
  %near = f32[10,64]{1,0:T(8,128)S(1)} copy-done(%fetch)
  %slicing = ((f32[10,64]{1,0:T(8,128)}), f32[1,64]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) \
slice-start(%y), slice={[3:4], [0:64]}
  %row = f32[1,64]{1,0:T(8,128)S(1)} slice-done(%slicing)
  %squares = bf16[64]{0:T(256)(128)(2,1)} fusion(%y), kind=kOutput, calls=%fused_product
  ROOT %sum = f32[10,64]{1,0:T(8,128)} add(%near, %y)
}
"""


def test_slices_updates_and_turns_are_counted():
    program = Program.parse(PROGRAM)
    whole, part, scalar = 4 * 640, 4 * 64, 4
    # In each turn: a slice and a counter are read, then a counter again, and a slice is written.
    turn = part + scalar + scalar + part
    # The copies read all and a slice. Of the squares' operand, a slice is read in float32; they are
    # written in bfloat16. The sum reads one of its operands and writes.
    last = whole + part + (part + part // 2) + (whole + whole)
    assert bytes_moved(program) == 10 * turn + last


def test_without_loops_the_count_is_the_compilers():
    def function(x, w):
        return jnp.tanh(jnp.concatenate([x @ w, x], axis=1)).sum(axis=0), w[3:5] + 1

    x, w = jnp.zeros((64, 96)), jnp.zeros((96, 80))
    compiled = jax.jit(function).lower(x, w).compile()
    assert bytes_moved(Program.parse(compiled.as_text())) == pytest.approx(
        compiled.cost_analysis()["bytes accessed"], rel=0.02
    )
