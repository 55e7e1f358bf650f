"""The layer around the kernels."""

import jax.numpy as jnp
import numpy as np
import pytest

from jllm.layers.attention import (
    AttentionOptions,
    Heads,
    Rotation,
    cached_attention,
)
from jllm.layers.batch import Batch

HEAD_DIM = 24
OPTIONS = AttentionOptions(scale=0.2, implementation="auto", target=None, mesh=None)


def attend(width, *, is_decode):
    """Two rows, five cached tokens in the first; a pool of the given head width."""
    rng = np.random.default_rng(0)
    num_tokens = 2 if is_decode else 7
    pool = np.zeros((9, 2, 2, 4, width), np.float32)
    pool[..., :HEAD_DIM] = rng.normal(size=(9, 2, 2, 4, HEAD_DIM))
    q, keys, values = (
        jnp.asarray(rng.normal(size=(num_tokens, heads, HEAD_DIM)), jnp.float32)
        for heads in (4, 2, 2)
    )
    starts = [0, 1, 2] if is_decode else [0, 3, 7]
    positions = [5, 0] if is_decode else [5, 6, 7, 0, 1, 2, 3]
    slots = [13, 24] if is_decode else [13, 14, 15, 24, 25, 26, 27]
    batch = Batch(
        tokens=jnp.zeros(num_tokens, jnp.int32),
        positions=jnp.array(positions, jnp.int32),
        slots=jnp.array(slots, jnp.int32),
        block_tables=jnp.array([[1, 3], [6, 0]], jnp.int32),
        row_starts=jnp.array(starts, jnp.int32),
        lengths=jnp.array([6, 1] if is_decode else [8, 4], jnp.int32),
        is_decode=is_decode,
    )
    angles = jnp.zeros((num_tokens, HEAD_DIM // 2))
    rotation = Rotation(jnp.cos(angles), jnp.sin(angles))
    heads = Heads(q, keys, values)
    return cached_attention(heads, rotation, None, jnp.asarray(pool), batch, OPTIONS)


@pytest.mark.parametrize("is_decode", [True, False])
def test_a_pool_with_wider_heads_gives_the_same(is_decode):
    expected, pool = attend(HEAD_DIM, is_decode=is_decode)
    out, wide_pool = attend(128, is_decode=is_decode)
    assert float(jnp.abs(expected).min(axis=(1, 2)).max()) > 0
    np.testing.assert_allclose(out, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(wide_pool[..., :HEAD_DIM], pool)
    np.testing.assert_array_equal(wide_pool[..., HEAD_DIM:], 0)
