"""Decode attention against float64 numpy."""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import paged_attention
from pallas_kernels.common import attention as common
from pallas_kernels.common.attention import load_blocks
from pallas_kernels.common.cases import AttentionCase, make_problem, solve
from pallas_kernels.common.scores import ScoreOptions
from pallas_kernels.paged_attention.cases import CASES

TOLERANCE = {"float32": 2e-6, "bfloat16": 1e-2, "float16": 1e-3}


def run(case, implementation, seed=0):
    problem = make_problem(case, seed, num_padding=0)
    rows = np.array(case.num_new) == 1
    q = np.zeros((len(case.lengths), *problem.q.shape[1:]), np.float32)
    q[rows] = problem.q
    attend = jax.jit(partial(paged_attention, implementation=implementation))
    out = attend(
        jnp.asarray(q, case.dtype),
        jnp.asarray(problem.kv),
        problem.block_tables,
        problem.lengths,
        problem.options,
        kv_scales=problem.kv_scales,
    )
    expected = np.zeros_like(q, np.float64)
    expected[rows] = solve(problem)
    return np.asarray(out, np.float64), expected


@pytest.mark.parametrize("implementation", ["reference", "blocked"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_float64(case, implementation):
    out, expected = run(case, implementation)
    tolerance = TOLERANCE[case.dtype]
    np.testing.assert_allclose(out, expected, atol=tolerance, rtol=tolerance)


@settings(max_examples=15)
@given(
    lengths=st.lists(
        st.sampled_from([0, 1, 3, 4, 5, 63, 64, 65, 130]), min_size=3, max_size=3
    ),
    seed=st.integers(0, 1000),
)
def test_any_lengths(lengths, seed):
    new = tuple(min(length, 1) for length in lengths)
    case = AttentionCase("random", tuple(lengths), new, head_dim=8, block_size=4)
    out, expected = run(case, "blocked", seed)
    np.testing.assert_allclose(out, expected, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize(
    ("q", "kv", "word"),
    [
        ((2, 3, 8), (4, 2, 2, 4, 8), "heads"),
        ((2, 4, 6), (4, 2, 2, 4, 8), "width"),
        ((2, 4, 8), (4, 2, 4, 8), "kv has shape"),
    ],
)
def test_wrong_shapes_are_named(q, kv, word):
    tables, lengths = jnp.zeros((2, 1), jnp.int32), jnp.ones(2, jnp.int32)
    with pytest.raises(ValueError, match=word):
        inspect.unwrap(paged_attention)(
            jnp.zeros(q), jnp.zeros(kv), tables, lengths, ScoreOptions(1.0)
        )


@pytest.mark.parametrize(
    ("num_rows", "num_lengths", "word"), [(2, 3, "lengths has shape"), (3, 2, "3 rows")]
)
def test_rows_that_do_not_match_are_named(num_rows, num_lengths, word):
    with pytest.raises(ValueError, match=word):
        inspect.unwrap(paged_attention)(
            jnp.zeros((num_rows, 2, 8)),
            jnp.zeros((4, 2, 2, 4, 8)),
            jnp.zeros((2, 1), jnp.int32),
            jnp.ones(num_lengths, jnp.int32),
            ScoreOptions(1.0),
        )


def test_work_follows_the_live_tokens_not_the_capacity(monkeypatch):
    """Counts the chunks of keys that are loaded."""
    loaded = []

    def count(cache, blocks, first_position, limit, dtype, *, narrow):
        jax.debug.callback(lambda first: loaded.append(int(first)), first_position)
        return load_blocks(cache, blocks, first_position, limit, dtype, narrow=narrow)

    monkeypatch.setattr(common, "load_blocks", count)
    lengths = jnp.array([0, 5, 300, 256], jnp.int32)
    tables = jnp.zeros((4, 512), jnp.int32)  # a capacity of 8192 tokens per row
    kv, q = jnp.zeros((1, 2, 1, 16, 8)), jnp.zeros((4, 2, 8))
    paged_attention(q, kv, tables, lengths, ScoreOptions(1.0)).block_until_ready()
    jax.effects_barrier()
    # Chunks of 256 keys, all four rows at once: the longest has two.
    assert loaded == [0, 256]
