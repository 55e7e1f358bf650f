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
from jax.extend.core import jaxprs_in_params

from pallas_kernels import ragged_attention
from pallas_kernels.common.cases import AttentionCase, make_problem, solve
from pallas_kernels.common.scores import ScoreOptions
from pallas_kernels.common.target import Target
from pallas_kernels.ragged_attention.cases import CASES
from tests.pallas_kernels.targets import gpu_target

TARGET = gpu_target()
TOLERANCE = {"float32": 1e-5, "bfloat16": 1.5e-2, "float16": 2e-3}
LENGTHS = (0, 1, 3, 4, 5, 15, 16, 17, 63, 64, 65, 255, 256, 257, 520)
QUICK = ("mixed", "width_80", "fp8_e4m3", "window", "sinks", "everything")
OPTIONS = {"window": 2, "soft_cap": 2.0, "has_sinks": True, "has_alibi": True}


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
        problem.row_starts,
        problem.lengths,
        problem.options,
        kv_scales=problem.kv_scales,
    )


def check(case, seed=0, num_padding=3):
    problem = make_problem(case, seed, num_padding)
    tolerance = TOLERANCE[case.dtype]
    np.testing.assert_allclose(
        np.asarray(attend(problem), np.float64),
        solve(problem),
        atol=tolerance,
        rtol=tolerance,
    )


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
    # Blocks that are shared are full in every row.
    fields["shared_blocks"] = min(
        fields.get("shared_blocks", 0), min(lengths) // fields["block_size"]
    )
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
    problem = make_problem(AttentionCase("garbage", (60, 17), (5, 17), head_dim=16))
    # Block 0 is the one that an entry which is not loaded stands for.
    kv = np.concatenate([np.full_like(problem.kv[:1], np.nan), problem.kv])
    moved = dataclasses.replace(problem, kv=kv, block_tables=problem.block_tables + 1)
    for each in (problem, moved):
        out = np.asarray(attend(each), np.float64)
        np.testing.assert_allclose(
            out.reshape(problem.q.shape), solve(problem), atol=1e-5
        )


def test_blocks_outside_the_pool_are_not_read():
    case = AttentionCase("bad", (60, 33), (5, 33), head_dim=16)
    problem = make_problem(case)
    problem = dataclasses.replace(problem, kv=np.nan_to_num(problem.kv))
    for bad in (-1, -(2**31), 10**6, 2**31 - 1):
        tables = problem.block_tables.copy()
        tables[:, 0] = bad
        clipped = np.clip(tables, 0, len(problem.kv) - 1)
        outs = [
            attend(dataclasses.replace(problem, block_tables=each))
            for each in (tables, clipped)
        ]
        np.testing.assert_array_equal(*outs)


def test_blocks_before_the_window_are_not_read():
    case = AttentionCase("window", (300,), (10,), head_dim=16, window=20)
    problem = make_problem(case)
    expected = attend(problem)
    # The first token, at 290, sees keys from 271 on, in the 17th block.
    kv = problem.kv.copy()
    kv[problem.block_tables[0, :16]] = np.nan
    out = attend(dataclasses.replace(problem, kv=kv))
    np.testing.assert_array_equal(out, expected)


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
        jax.ShapeDtypeStruct((2,), jnp.int32),
        jax.ShapeDtypeStruct((1,), jnp.int32),
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
    tables, lengths = jnp.zeros((1, 1), jnp.int32), jnp.ones(1, jnp.int32)
    with pytest.raises(ValueError, match="soft_cap=-1"):
        inspect.unwrap(ragged_attention)(
            q,
            kv,
            tables,
            jnp.array([0, 1]),
            lengths,
            ScoreOptions(1.0, soft_cap=-1.0),
            implementation="gpu_triton",
            target=TARGET,
        )


def count_equations(jaxpr):
    """Number of operations in a jaxpr and the ones inside it, and the names of all."""
    names = [equation.primitive.name for equation in jaxpr.eqns]
    for equation in jaxpr.eqns:
        for inner in jaxprs_in_params(equation.params):
            names += count_equations(inner)
    return names


def test_a_call_without_options_does_not_pay_for_them():
    names = {}
    for option in ("", *OPTIONS):
        fields = {option: OPTIONS[option]} if option else {}
        problem = make_problem(AttentionCase("any", (40,), (4,), **fields))
        call = partial(attend, problem)
        names[option] = count_equations(jax.make_jaxpr(call)(problem.q).jaxpr)
    assert all(len(names[option]) > len(names[""]) for option in OPTIONS)
    assert "tanh" in names["soft_cap"]
    assert "tanh" not in names[""]
