"""Prefill attention on Triton against float64 numpy, in interpret mode."""

import dataclasses
import functools
import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import ragged_attention
from pallas_kernels.common.cases import AttentionCase, make_problem, solve
from pallas_kernels.common.scores import ScoreOptions
from pallas_kernels.common.target import Target
from pallas_kernels.ragged_attention.cases import CASES
from pallas_kernels.ragged_attention.tiles import TokenRuns
from tests.pallas_kernels.paged_cache import (
    LENGTHS,
    TRITON_TOLERANCE,
    assert_close,
    check_blocks_before_the_window,
    check_blocks_outside,
    check_options_cost_nothing,
    check_unused_places,
    whole_shared_blocks,
)
from tests.pallas_kernels.targets import gpu_target

TARGET = gpu_target()
QUICK = ("mixed", "width_80", "fp8_e4m3", "window", "sinks", "everything")


@functools.cache
def jitted(target=TARGET):
    return jax.jit(
        partial(ragged_attention, implementation="gpu_triton", target=target)
    )


def attend(problem, q=None, **choice):
    return jitted(**choice)(
        problem.q if q is None else q,
        jnp.asarray(problem.kv),
        problem.block_tables,
        TokenRuns(problem.row_starts, problem.lengths),
        problem.options,
        kv_scales=problem.kv_scales,
    )


def check(case, seed=0, num_padding=3):
    problem = make_problem(case, seed, num_padding)
    assert_close(attend(problem), solve(problem), TRITON_TOLERANCE[case.dtype])


@pytest.mark.parametrize(
    "case",
    [case for case in CASES if case.name in QUICK],
    ids=lambda case: case.name,
)
def test_equals_float64(case):
    check(case)


@pytest.mark.kernels
@pytest.mark.parametrize(
    "case",
    [case for case in CASES if case.name not in QUICK],
    ids=lambda case: case.name,
)
def test_every_case_equals_float64(case):
    check(case)


@st.composite
def rows(draw, max_rows):
    """Lengths of sequences and how many of their tokens are new."""
    lengths = draw(st.lists(st.sampled_from(LENGTHS), min_size=1, max_size=max_rows))
    new = [
        min(length, draw(st.sampled_from([0, 1, 2, 16, 17, 65, 600])))
        for length in lengths
    ]
    new[0] = max(new[0], min(1, lengths[0]))
    return tuple(lengths), tuple(new)


def check_rows(lengths_and_new, seed, num_padding=3, **fields):
    lengths, new = lengths_and_new
    fields = whole_shared_blocks(lengths, fields)
    check(AttentionCase("random", lengths, new, **fields), seed, num_padding)


def test_tiles_of_one_token():
    case = AttentionCase(
        "many", (40, 9), (17, 9), num_heads=20, num_kv_heads=1, head_dim=16
    )
    check(case)


def test_a_window_of_several_tiles_of_keys():
    case = AttentionCase(
        "window",
        (700, 300),
        (80, 300),
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        window=290,
    )
    check(case)


@settings(max_examples=3)
@given(lengths_and_new=rows(3), seed=st.integers(0, 1000))
def test_any_lengths(lengths_and_new, seed):
    check_rows(
        lengths_and_new, seed, num_heads=2, num_kv_heads=1, head_dim=16, block_size=4
    )


@pytest.mark.kernels
@settings(max_examples=15)
@given(
    lengths_and_new=rows(5),
    seed=st.integers(0, 1000),
    num_padding=st.sampled_from([1, 3, 200]),
    heads=st.sampled_from([(1, 1), (4, 4), (6, 2), (7, 1), (20, 1)]),
    head_dim=st.sampled_from([16, 64, 80]),
    block_size=st.sampled_from([4, 16, 128]),
    window=st.sampled_from([None, None, 1, 5, 100, 300]),
    has_sinks=st.booleans(),
    has_alibi=st.booleans(),
    shared_blocks=st.integers(0, 3),
)
def test_any_lengths_and_shapes(lengths_and_new, seed, num_padding, heads, **fields):
    num_heads, num_kv_heads = heads
    check_rows(
        lengths_and_new,
        seed,
        num_padding,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        **fields,
    )


@pytest.mark.kernels
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("kv_dtype", ["", "float8_e4m3fn", "float8_e5m2", "int8"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_type_and_width(dtype, kv_dtype, head_dim):
    check(
        AttentionCase(
            "types",
            (17, 300),
            (3, 70),
            head_dim=head_dim,
            dtype=dtype,
            kv_dtype=kv_dtype,
        )
    )


@pytest.mark.kernels
@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8", "float8_e4m3fn"])
def test_float32_queries_over_a_narrow_cache(kv_dtype):
    check(AttentionCase("types", (17, 300), (3, 70), kv_dtype=kv_dtype))


@pytest.mark.kernels
def test_thousands_of_keys():
    check(
        AttentionCase(
            "long",
            (5000, 40),
            (150, 40),
            num_heads=2,
            num_kv_heads=1,
            head_dim=16,
        )
    )


def test_a_cache_of_bits():
    problem = make_problem(
        AttentionCase("bits", (17, 40), (3, 40), dtype="bfloat16", head_dim=16)
    )
    bits = dataclasses.replace(problem, kv=problem.kv.view(np.uint16))
    out = attend(bits)
    np.testing.assert_array_equal(out, attend(problem))
    np.testing.assert_allclose(np.asarray(out, np.float64), solve(problem), atol=1.5e-2)


def test_padding_gives_zeros_whatever_it_holds():
    case = AttentionCase("padded", (70, 9), (33, 9), head_dim=16)
    problem = make_problem(case, num_padding=300)
    problem.q[42:] = np.nan
    out = np.asarray(attend(problem))
    assert out[:42].any(axis=(1, 2)).all()
    assert np.isfinite(out[:42]).all()
    assert not out[42:].any()


def test_places_after_the_length_are_not_read():
    case = AttentionCase("garbage", (60, 17), (5, 17), head_dim=16)
    check_unused_places(attend, make_problem(case))


def test_blocks_outside_the_pool_are_not_read():
    case = AttentionCase("bad", (60, 33), (5, 33), head_dim=16)
    check_blocks_outside(attend, make_problem(case))


def test_blocks_before_the_window_are_not_read():
    case = AttentionCase("window", (300,), (10,), head_dim=16, window=20)
    # The first token, at 290, sees keys from 271 on, in the 17th block.
    check_blocks_before_the_window(attend, make_problem(case), 16)


@pytest.mark.parametrize(
    ("heads", "width", "dtype", "kv_dtype", "target", "word"),
    [
        (2, 512, "bfloat16", "bfloat16", TARGET, "head width 512"),
        (2, 64, "float16", "float8_e4m3b11fnuz", TARGET, "cache of float8_e4m"),
        (2, 64, "float32", "uint16", TARGET, "cache of uint16"),
        (300, 64, "float16", "float16", TARGET, "300 query heads"),
        (2, 64, "float16", "float16", Target("gpu", "sm_75"), "sm_75"),
    ],
)
def test_what_cannot_be_done_is_refused(heads, width, dtype, kv_dtype, target, word):
    arrays = (
        jax.ShapeDtypeStruct((4, heads, width), dtype),
        jax.ShapeDtypeStruct((2, 2, 1, 16, width), kv_dtype),
        jax.ShapeDtypeStruct((1, 1), jnp.int32),
        TokenRuns(
            jax.ShapeDtypeStruct((2,), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
        ),
    )
    call = partial(
        ragged_attention,
        options=ScoreOptions(1.0),
        kv_scales=jnp.ones((2, 1)),
        implementation="gpu_triton",
        target=target,
    )
    with pytest.raises(NotImplementedError, match=word):
        jax.eval_shape(call, *arrays)


def test_wrong_arguments_are_named():
    q, kv = jnp.zeros((1, 2, 16)), jnp.zeros((2, 2, 1, 4, 16))
    runs = TokenRuns(jnp.array([0, 1]), jnp.ones(1, jnp.int32))
    with pytest.raises(ValueError, match="soft_cap=-1"):
        inspect.unwrap(ragged_attention)(
            q,
            kv,
            jnp.zeros((1, 1), jnp.int32),
            runs,
            ScoreOptions(1.0, soft_cap=-1.0),
            implementation="gpu_triton",
            target=TARGET,
        )


def test_a_call_without_options_does_not_pay_for_them():
    def trace(fields):
        problem = make_problem(AttentionCase("any", (40,), (4,), **fields))
        return jax.make_jaxpr(partial(attend, problem))(problem.q)

    check_options_cost_nothing(trace)
