"""The reader of compiled programs finds what it is there to find."""

import jax
import jax.numpy as jnp
import pytest

from jllm.plan.hlo import collectives
from pallas_kernels import kv_write
from tests.aot import hlo

SIZE = 8 * 64 * 32

PROGRAM = """\
HloModule jit_step, input_output_alias={ {0}: (1, {}, may-alias), {1}: (3, {}) }

%fused_convert (p0: bf16[8,64,32]) -> f32[8,64,32] {
  %p0 = bf16[8,64,32]{2,1,0} parameter(0)
  ROOT %c = f32[8,64,32]{2,1,0} convert(%p0)
}

%fused_scatter (p0: f32[8,64,32], p1: s32[4], p2: f32[4,32]) -> f32[512,32] {
  %p0 = f32[8,64,32]{2,1,0} parameter(0)
  ROOT %s = f32[512,32]{1,0} scatter(%p0, %p1, %p2), to_apply=%set
}

ENTRY %main (a: f32[8,64,32]) -> f32[8,64,32] {
  %a = f32[8,64,32]{2,1,0:T(8,128)} parameter(0)
  %f = f32[9]{0} fusion(%a), kind=kLoop, calls=%fused_convert
  %g = f32[9]{0} fusion(%a), kind=kInput, calls=%fused_scatter
  LINE
}
"""


@pytest.mark.parametrize(
    "line",
    [
        "%x = f32[8,64,32]{1,2,0:T(8,128)} copy(%a)",
        "ROOT %x = bf16[8,32,64]{2,1,0} transpose(%a), dimensions={0,2,1}",
        "%x = bf16[512,32]{1,0:T(8,128)(2,1)} convert(%a)",
        "%x = f32[64,8,32]{2,1,0} reshape(%a)",
        "%x = f32[16,64,32]{2,1,0} concatenate(%a, %a), dimensions={0}",
        "%x = f32[8,64,32]{2,1,0} fusion(%a), kind=kLoop, calls=%fused_convert",
        "%x = (f32[8,64,32]{1,2,0}, f32[8,64,32]{2,1,0}, u32[]) copy-start(%a)",
        '%x = f32[8,64,32]{2,1,0} custom-call(%a), custom_call_target="gemm"',
        "%x = f32[8,64,32]{2,1,0} all-gather(%b), dimensions={0}",
    ],
)
def test_finds_a_large_move(line):
    assert len(hlo.large_moves(PROGRAM.replace("LINE", line), {SIZE}, SIZE)) == 1


@pytest.mark.parametrize(
    "line",
    [
        "%x = f32[8,64,16]{1,2,0} copy(%a)",
        "%x = f32[512,32]{1,0} bitcast(%a)",
        "%x = f32[512,32]{1,0} fusion(%a, %i, %n), kind=kInput, calls=%fused_scatter",
        "%x = (f32[512,32]{1,0:T(8)S(1)}, f32[512,32]{1,0:T(8)}) copy-start(%a)",
        "%x = f32[512,32]{1,0} custom-call(%a), output_to_operand_aliasing={{}: (0)}",
    ],
)
def test_leaves_the_rest_alone(line):
    assert hlo.large_moves(PROGRAM.replace("LINE", line), {SIZE}, SIZE) == []


def test_counts_donated_parameters_and_what_is_sent():
    line = "%x = f32[8,4]{1,0} all-reduce-start(%a), to_apply=%add"
    text = PROGRAM.replace("LINE", line)
    assert hlo.aliased_parameters(text) == [1, 3]
    assert collectives(text) == [("all-reduce", 128)]


@pytest.mark.parametrize("donate", [True, False])
def test_a_pool_that_is_not_donated_is_copied(donate):
    pool = jax.ShapeDtypeStruct((64, 2, 2, 16, 32), jnp.float32)
    new = jax.ShapeDtypeStruct((3, 2, 32), jnp.float32)
    slots = jax.ShapeDtypeStruct((3,), jnp.int32)
    write = jax.jit(kv_write, donate_argnums=0 if donate else ())
    text = write.lower(pool, new, new, slots).compile().as_text()
    assert bool(hlo.large_moves(text, {pool.size}, pool.size)) is not donate
    assert hlo.aliased_parameters(text) == ([0] if donate else [])
