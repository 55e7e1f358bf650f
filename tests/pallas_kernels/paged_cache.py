"""What the tests of attention over a paged cache have in common."""

import dataclasses
from collections import Counter

import jax.numpy as jnp
import numpy as np
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from jax.extend.core import jaxprs_in_params

from pallas_kernels.common.cases import AttentionCase, solve
from pallas_kernels.common.target import Target

TPU = Target(
    "tpu",
    "v6e",
    "v6e",
    1,
    interpret=pltpu.InterpretParams(
        detect_races=True, dma_execution_mode="on_wait", uninitialized_memory="nan"
    ),
)
"""Memory of NaN, late DMA, races detected."""
H200 = Target("gpu", "sm_90", "h200", 132)

TOLERANCE = {"float32": 2e-6, "bfloat16": 1e-2, "float16": 1e-3}
TRITON_TOLERANCE = {"float32": 1e-5, "bfloat16": 1.5e-2, "float16": 2e-3}

LENGTHS = (0, 1, 3, 4, 5, 15, 16, 17, 63, 64, 65, 255, 256, 257, 520)
TPU_LENGTHS = (0, 1, 7, 8, 9, 15, 16, 17, 40)
OPTIONS = {"window": 2, "soft_cap": 2.0, "has_sinks": True, "has_alibi": True}
BAD_BLOCKS = (-1, -(2**31), 10**6, 2**31 - 1)
MOSAIC_HEADS = {"num_heads": 4, "num_kv_heads": 1, "dtype": "bfloat16"}
LARGEST = {"float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}


def tpu_case(name, lengths, num_new, **fields):
    """A small case with the head width of a TPU's register."""
    small = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 128, "block_size": 8}
    return AttentionCase(name, lengths, num_new, **{**small, **fields})


def optional(array):
    return None if array is None else jnp.asarray(array)


def assert_no_races():
    assert not interpret_pallas_call.races.races_found


def assert_close(out, expected, tolerance):
    out = np.asarray(out, np.float64)
    np.testing.assert_allclose(out, expected, atol=tolerance, rtol=tolerance)


def assert_same(kv, expected):
    """Float32 holds all values of a cache, and numpy knows its NaN."""
    np.testing.assert_array_equal(
        np.asarray(kv).astype(np.float32), expected.astype(np.float32)
    )


def store(problem, case, new):
    """The pool without the new tokens, and with them; by numpy."""
    before, after = problem.kv.copy(), problem.kv.copy()
    garbage = 127 if before.dtype == np.int8 else np.nan
    stored = new.astype(np.float32)
    if problem.kv_scales is not None:
        stored = stored / problem.kv_scales[:, None, :, None]
    if before.dtype == np.int8:
        stored = np.clip(np.rint(stored), -128, 127)
    elif case.kv_dtype in LARGEST:
        largest = LARGEST[case.kv_dtype]
        stored = np.clip(stored, -largest, largest)
    for row, length in enumerate(case.lengths):
        first, last = problem.row_starts[row : row + 2]
        for token in range(max(first, last - length), last):
            run, place = divmod(length - (last - token), case.block_size)
            block = problem.block_tables[row, run]
            if block < len(before):
                before[block, :, :, place] = garbage
                after[block, :, :, place] = stored[:, token].astype(after.dtype)
    return before, after


def whole_shared_blocks(lengths, fields):
    """The fields with so many shared blocks as are full in every row."""
    most = min(lengths) // fields["block_size"]
    return fields | {"shared_blocks": min(fields.get("shared_blocks", 0), most)}


def check_unused_places(attend, problem):
    """Places after the length are not read.

    Args:
        attend: Takes a problem and gives the packed tokens' output, in any shape.
        problem: What to attend to.
    """
    # Block 0 is the one that an entry which is not loaded stands for.
    kv = np.concatenate([np.full_like(problem.kv[:1], np.nan), problem.kv])
    moved = dataclasses.replace(problem, kv=kv, block_tables=problem.block_tables + 1)
    for each in (problem, moved):
        out = np.asarray(attend(each), np.float64)
        expected = solve(problem)
        np.testing.assert_allclose(out.reshape(expected.shape), expected, atol=1e-5)


def check_blocks_outside(attend, problem, blocks=BAD_BLOCKS):
    """Blocks that the pool does not have give what its first or last one gives."""
    # Not numpy's nan_to_num, which knows no bfloat16.
    is_nan = np.isnan(problem.kv.astype(np.float32))
    kv = np.where(is_nan, np.zeros_like(problem.kv), problem.kv)
    problem = dataclasses.replace(problem, kv=kv)
    for bad in blocks:
        tables = problem.block_tables.copy()
        tables[:, 0] = bad
        clipped = np.clip(tables, 0, len(problem.kv) - 1)
        outs = [
            attend(dataclasses.replace(problem, block_tables=each))
            for each in (tables, clipped)
        ]
        np.testing.assert_array_equal(*outs)


def check_blocks_before_the_window(attend, problem, num_blocks):
    """The first blocks of the only row may hold anything."""
    kv = problem.kv.copy()
    kv[problem.block_tables[0, :num_blocks]] = np.nan
    out = attend(dataclasses.replace(problem, kv=kv))
    np.testing.assert_array_equal(out, attend(problem))


def count_equations(jaxpr):
    """Number of operations of each kind in a jaxpr and the ones inside it."""
    found = Counter(equation.primitive.name for equation in jaxpr.eqns)
    for equation in jaxpr.eqns:
        for inner in jaxprs_in_params(equation.params):
            found += count_equations(inner)
    return found


def check_options_cost_nothing(trace):
    """A call without options does not pay for them.

    Args:
        trace: Takes fields of a case and gives the traced call.
    """
    kernels = {
        name: count_equations(trace({name: value} if name else {}).jaxpr)
        for name, value in {"": None, **OPTIONS}.items()
    }
    plain = kernels[""].total()
    assert all(kernels[name].total() > plain for name in OPTIONS)
    assert kernels["soft_cap"]["tanh"]
    assert not kernels[""]["tanh"]
    assert kernels[""]["pallas_call"] == 1
