"""Two-level argmax and top-k against sorting."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jllm.sampling.blocks import argmax, top_k

CASES = [(1, 1), (7, 3), (129, 129), (1000, 20), (1000, 600)]
MANY_TIES = st.sampled_from([-np.inf, -3.0, 0.0, 1e-30, 2.0, 1e30])
argmax_jit = jax.jit(argmax)
top_k_jit = jax.jit(top_k, static_argnums=1)


@pytest.mark.parametrize(("vocab_size", "count"), CASES)
def test_equals_a_stable_sort(vocab_size, count):
    @given(hnp.arrays(np.float32, (2, vocab_size), elements=MANY_TIES, fill=MANY_TIES))
    def check(scores):
        order = np.argsort(-scores, axis=1, kind="stable")[:, :count]
        values, ids = top_k_jit(jnp.asarray(scores), count)
        np.testing.assert_array_equal(ids, order)
        np.testing.assert_array_equal(values, np.take_along_axis(scores, order, 1))
        np.testing.assert_array_equal(argmax_jit(jnp.asarray(scores)), order[:, 0])

    check()


@pytest.mark.parametrize("vocab_size", [512, 1000])
def test_random_scores(vocab_size):
    scores = np.random.default_rng(0).normal(size=(8, vocab_size)).astype(np.float32)
    _, ids = jax.jit(partial(top_k, count=20))(jnp.asarray(scores))
    np.testing.assert_array_equal(ids, np.argsort(-scores, axis=1)[:, :20])


@pytest.mark.parametrize("vocab_size", [1, 130])
def test_nan_gives_an_id_of_the_vocabulary(vocab_size):
    scores = jnp.full((2, vocab_size), jnp.nan)
    tokens = np.asarray(argmax(scores))
    assert ((tokens >= 0) & (tokens < vocab_size)).all()
