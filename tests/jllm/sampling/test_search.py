"""The bisection finds the exact threshold."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jllm.sampling.search import largest_threshold

# XLA on CPU takes subnormal numbers for zero.
FLOATS = st.floats(width=32, allow_nan=False, allow_subnormal=False)


@jax.jit
def at_least_kth_largest(scores, k):
    found = largest_threshold(scores, lambda kept: jnp.sum(kept, axis=1) >= k)
    return scores >= found[:, None]


@given(hnp.arrays(np.float32, (2, 9), elements=FLOATS), st.integers(1, 9))
def test_finds_the_kth_largest(scores, k):
    kth = np.sort(scores, axis=1)[:, ::-1][:, k - 1]
    found = at_least_kth_largest(jnp.asarray(scores), k)
    np.testing.assert_array_equal(found, scores >= kth[:, None])


def test_minus_infinity_where_never_enough():
    scores = jnp.zeros((1, 9))
    found = largest_threshold(scores, lambda kept: jnp.sum(kept, axis=1) > 9)
    assert np.asarray(found).tolist() == [-np.inf]
