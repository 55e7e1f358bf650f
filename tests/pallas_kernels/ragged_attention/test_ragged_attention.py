"""Prefill attention against float64 numpy, and its gradient."""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from pallas_kernels import ragged_attention
from pallas_kernels.common.cases import AttentionCase, make_problem, solve
from pallas_kernels.common.scores import ScoreOptions
from pallas_kernels.ragged_attention.cases import CASES
from pallas_kernels.ragged_attention.tiles import TokenRuns
from tests.pallas_kernels.paged_cache import TOLERANCE, assert_close


def run(case, implementation, seed=0, num_padding=3):
    problem = make_problem(case, seed, num_padding)
    attend = jax.jit(partial(ragged_attention, implementation=implementation))
    out = attend(
        jnp.asarray(problem.q),
        jnp.asarray(problem.kv),
        problem.block_tables,
        TokenRuns(problem.row_starts, problem.lengths),
        problem.options,
        kv_scales=problem.kv_scales,
    )
    return np.asarray(out, np.float64), solve(problem)


@pytest.mark.parametrize("implementation", ["reference", "blocked"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_float64(case, implementation):
    assert_close(*run(case, implementation), TOLERANCE[case.dtype])


@settings(max_examples=10)
@given(
    rows=st.lists(
        st.sampled_from([(0, 0), (1, 1), (5, 5), (31, 7), (33, 33), (40, 1), (66, 34)]),
        min_size=3,
        max_size=3,
    ),
    seed=st.integers(0, 1000),
)
def test_any_mix(rows, seed):
    lengths = tuple(length for length, _ in rows)
    new = tuple(count for _, count in rows)
    case = AttentionCase("random", lengths, new, head_dim=8, block_size=4)
    out, expected = run(case, "blocked", seed, num_padding=105 - sum(new))
    np.testing.assert_allclose(out, expected, atol=2e-6, rtol=2e-6)


def test_reference_is_differentiable():
    case = AttentionCase("small", (6, 3), (4, 3), num_heads=2, head_dim=4, block_size=4)
    problem = make_problem(case, num_padding=0)
    kv = np.nan_to_num(problem.kv)

    def total(q, kv):
        out = ragged_attention(
            jnp.asarray(q),
            jnp.asarray(kv),
            jnp.asarray(problem.block_tables),
            TokenRuns(*map(jnp.asarray, (problem.row_starts, problem.lengths))),
            problem.options,
            implementation="reference",
        )
        return jnp.sum(jnp.sin(out))

    check_grads(total, (jnp.asarray(problem.q), jnp.asarray(kv)), 1, ["rev"], eps=1e-2)


@pytest.mark.parametrize(
    ("num_starts", "num_lengths", "word"),
    [(3, 3, "starts has shape"), (3, 2, "lengths has shape")],
)
def test_there_must_be_a_run_for_each_row(num_starts, num_lengths, word):
    runs = TokenRuns(
        jnp.zeros(num_starts, jnp.int32), jnp.zeros(num_lengths, jnp.int32)
    )
    with pytest.raises(ValueError, match=word):
        inspect.unwrap(ragged_attention)(
            jnp.zeros((2, 2, 4)),
            jnp.zeros((1, 2, 1, 4, 4)),
            jnp.zeros((3, 1), jnp.int32),
            runs,
            ScoreOptions(1.0),
        )
