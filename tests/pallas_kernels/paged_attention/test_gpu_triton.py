"""Decode attention on Triton against float64 numpy, in interpret mode."""

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

from pallas_kernels import paged_attention
from pallas_kernels.common.cases import AttentionCase, make_problem, solve
from pallas_kernels.common.scores import ScoreOptions
from pallas_kernels.common.target import Target
from pallas_kernels.paged_attention.cases import CASES, VERIFY_CASES
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
QUICK = ("ragged", "width_80", "fp8_e4m3", "window", "sinks")


@functools.cache
def jitted(target=TARGET):
    return jax.jit(partial(paged_attention, implementation="gpu_triton", target=target))


def attend(problem, q=None, **choice):
    return jitted(**choice)(
        problem.q if q is None else q,
        jnp.asarray(problem.kv),
        problem.block_tables,
        problem.lengths,
        problem.options,
        kv_scales=problem.kv_scales,
    )


def run(case, seed=0, target=TARGET):
    """Output and truth `[S, Q, H, D]`; rows without new tokens have zeros."""
    problem = make_problem(case, seed, num_padding=0)
    rows = np.array(case.num_new) > 0
    shape = (len(case.lengths), max(case.num_new), *problem.q.shape[1:])
    q = np.zeros(shape, np.float32)
    q[rows] = problem.q.reshape(-1, *shape[1:])
    expected = np.zeros(shape)
    expected[rows] = solve(problem).reshape(-1, *shape[1:])
    out = attend(problem, jnp.asarray(q, case.dtype), target=target)
    return np.asarray(out, np.float64), expected


def check(case, seed=0, target=TARGET):
    assert_close(*run(case, seed, target), TRITON_TOLERANCE[case.dtype])


@pytest.mark.parametrize(
    "case",
    [case for case in CASES if case.name in QUICK] + list(VERIFY_CASES),
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


def random_case(lengths, **fields):
    new = tuple(min(length, 1) for length in lengths)
    return AttentionCase("random", tuple(lengths), new, **fields)


def check_random(lengths, seed, **fields):
    if max(lengths):
        check(random_case(lengths, **whole_shared_blocks(lengths, fields)), seed)


@settings(max_examples=4)
@given(
    lengths=st.lists(st.sampled_from(LENGTHS), min_size=3, max_size=3),
    seed=st.integers(0, 1000),
)
def test_any_lengths(lengths, seed):
    check_random(lengths, seed, num_heads=2, num_kv_heads=1, head_dim=16, block_size=4)


@pytest.mark.kernels
@settings(max_examples=15)
@given(
    lengths=st.lists(st.sampled_from(LENGTHS), min_size=1, max_size=5),
    seed=st.integers(0, 1000),
    heads=st.sampled_from([(1, 1), (4, 4), (6, 2), (7, 1), (20, 1)]),
    head_dim=st.sampled_from([16, 64, 80]),
    block_size=st.sampled_from([4, 16, 128]),
    window=st.sampled_from([None, None, 1, 5, 100]),
    has_sinks=st.booleans(),
    shared_blocks=st.integers(0, 3),
)
def test_any_lengths_and_shapes(lengths, seed, heads, **fields):
    num_heads, num_kv_heads = heads
    check_random(
        lengths, seed, num_heads=num_heads, num_kv_heads=num_kv_heads, **fields
    )


@pytest.mark.kernels
@settings(max_examples=10)
@given(
    lengths=st.lists(st.sampled_from([5, 16, 64, 300, 700]), min_size=1, max_size=3),
    num_new=st.integers(2, 5),
    seed=st.integers(0, 1000),
    window=st.sampled_from([None, 1, 7, 100]),
    has_alibi=st.booleans(),
)
def test_verification_of_any_number_of_tokens(lengths, num_new, seed, **fields):
    new = (num_new,) * len(lengths)
    check(AttentionCase("random", tuple(lengths), new, head_dim=16, **fields), seed)


@pytest.mark.kernels
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize(
    "kv_dtype", ["", "float8_e4m3fn", "float8_e5m2", "int8", "uint16"]
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_type_and_width(dtype, kv_dtype, head_dim):
    case = AttentionCase(
        "types",
        (17, 300),
        (1, 1),
        head_dim=head_dim,
        dtype=dtype,
        kv_dtype="" if kv_dtype == "uint16" else kv_dtype,
    )
    if kv_dtype == "uint16":
        check_bits(case)
    else:
        check(case)


@pytest.mark.kernels
@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8", "float8_e4m3fn"])
def test_float32_queries_over_a_narrow_cache(kv_dtype):
    check(random_case((17, 300), kv_dtype=kv_dtype))


def check_bits(case):
    problem = make_problem(case, num_padding=0)
    bits = dataclasses.replace(problem, kv=problem.kv.view(np.uint16))
    q = jnp.asarray(problem.q)
    np.testing.assert_array_equal(attend(bits, q), attend(problem, q))
    np.testing.assert_allclose(
        np.asarray(attend(bits, q), np.float64), solve(problem), atol=1.5e-2
    )


def test_a_cache_of_bits():
    check_bits(random_case((17, 40), dtype="bfloat16"))


def test_one_long_row_among_short_ones_is_shared_out():
    case = random_case(
        (900, 3, 0, 16, 1), num_heads=2, num_kv_heads=1, head_dim=20, has_sinks=True
    )
    check(case)
    check(case, target=dataclasses.replace(TARGET, num_cores=1))


@pytest.mark.kernels
def test_thousands_of_keys():
    check(random_case((9000, 40), num_heads=2, num_kv_heads=1, head_dim=16))


def test_tokens_before_position_zero_give_zeros():
    case = AttentionCase("long", (2, 40), (2, 2), has_sinks=True, head_dim=16)
    problem = make_problem(case, num_padding=0)
    q = jax.random.normal(jax.random.key(0), (2, 3, case.num_heads, case.head_dim))
    out = np.asarray(attend(problem, q))
    assert not out[0, 0].any()
    assert out[0, 1:].any(axis=(1, 2)).all()
    assert np.isfinite(out).all()


def test_places_after_the_length_are_not_read():
    case = random_case((60, 17), num_heads=2, num_kv_heads=1, head_dim=16)
    check_unused_places(attend, make_problem(case, num_padding=0))


def test_blocks_outside_the_pool_are_not_read():
    check_blocks_outside(attend, make_problem(random_case((60, 33)), num_padding=0))


def test_blocks_before_the_window_are_not_read():
    problem = make_problem(random_case((300,), window=20), num_padding=0)
    # The window starts at key 280, in the 17th block.
    check_blocks_before_the_window(attend, problem, 17)


@pytest.mark.parametrize(
    ("shape", "dtype", "kv_dtype", "target", "word"),
    [
        ((1, 1, 2, 512), "bfloat16", "bfloat16", TARGET, "head width 512"),
        ((1, 1, 2, 64), "float16", "float8_e4m3b11fnuz", TARGET, "cache of float8_e4m"),
        ((1, 1, 2, 64), "float32", "uint16", TARGET, "cache of uint16"),
        ((1, 99, 2, 64), "float32", "float32", TARGET, "99 tokens"),
        ((1, 1, 2, 64), "float16", "float16", Target("gpu", "sm_75"), "sm_75"),
        ((1, 1, 2, 64), "float16", "float8_e4m3fn", Target("gpu", "sm_80"), "sm_89"),
    ],
)
def test_what_cannot_be_done_is_refused(shape, dtype, kv_dtype, target, word):
    arrays = (
        jax.ShapeDtypeStruct(shape, dtype),
        jax.ShapeDtypeStruct((2, 2, 1, 16, shape[-1]), kv_dtype),
        jax.ShapeDtypeStruct((1, 1), jnp.int32),
        jax.ShapeDtypeStruct((1,), jnp.int32),
    )
    call = partial(
        paged_attention,
        options=ScoreOptions(1.0),
        kv_scales=jnp.ones((2, 1)),
        implementation="gpu_triton",
        target=target,
    )
    with pytest.raises(NotImplementedError, match=word):
        jax.eval_shape(call, *arrays)


def test_a_pool_beyond_the_offsets_is_refused():
    arrays = (
        jax.ShapeDtypeStruct((1, 1, 8, 128), jnp.bfloat16),
        jax.ShapeDtypeStruct((2**16 + 1, 2, 8, 16, 128), jnp.int8),
        jax.ShapeDtypeStruct((1, 1), jnp.int32),
        jax.ShapeDtypeStruct((1,), jnp.int32),
    )
    call = partial(
        paged_attention,
        options=ScoreOptions(1.0),
        kv_scales=jnp.ones((2, 8)),
        implementation="gpu_triton",
        target=TARGET,
    )
    with pytest.raises(NotImplementedError, match="offsets"):
        jax.eval_shape(call, *arrays)


def test_wrong_arguments_are_named():
    q, kv = jnp.zeros((1, 2, 16)), jnp.zeros((2, 2, 1, 4, 16))
    tables, lengths = jnp.zeros((1, 1), jnp.int32), jnp.ones(1, jnp.int32)
    with pytest.raises(ValueError, match="window=0"):
        inspect.unwrap(paged_attention)(
            q,
            kv,
            tables,
            lengths,
            ScoreOptions(1.0, window=0),
            implementation="gpu_triton",
            target=TARGET,
        )


def test_a_call_without_options_does_not_pay_for_them():
    def trace(fields):
        problem = make_problem(random_case((40,), **fields), num_padding=0)
        return jax.make_jaxpr(partial(attend, problem))(problem.q)

    check_options_cost_nothing(trace)
