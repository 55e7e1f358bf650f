"""Cache writes and block copies against numpy."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import copy_blocks, kv_write
from pallas_kernels.kv_write.cases import CASES

NUM_BLOCKS = 11


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_writes_only_its_slots(case):
    _, num_tokens, num_kv_heads, head_dim, block_size, dtype = case
    rng = np.random.default_rng(0)
    pool = rng.normal(size=(NUM_BLOCKS, 2, num_kv_heads, block_size, head_dim))
    keys, values = rng.normal(size=(2, num_tokens, num_kv_heads, head_dim))
    slots = rng.permutation(NUM_BLOCKS * block_size + 5)[:num_tokens]
    to = lambda x: jnp.asarray(x, dtype)  # noqa: E731
    out = jax.jit(kv_write)(to(pool), to(keys), to(values), jnp.asarray(slots))
    expected = np.array(to(pool))
    for token, slot in enumerate(slots):
        block, place = divmod(int(slot), block_size)
        if block < NUM_BLOCKS:
            expected[block, 0, :, place] = to(keys)[token]
            expected[block, 1, :, place] = to(values)[token]
    np.testing.assert_array_equal(np.asarray(out), expected)


def test_copies_blocks_and_drops_padding():
    pool = np.arange(24.0, dtype=np.float32).reshape(6, 4)
    sources = jnp.array([1, 0, 0], jnp.int32)
    targets = jnp.array([4, 6, 7], jnp.int32)
    out = jax.jit(copy_blocks)(jnp.asarray(pool), sources, targets)
    expected = pool.copy()
    expected[4] = pool[1]
    np.testing.assert_array_equal(np.asarray(out), expected)


def test_the_donated_pool_keeps_its_address():
    pool = jnp.zeros((64, 2, 2, 16, 32))
    address = pool.unsafe_buffer_pointer()
    write = jax.jit(kv_write, donate_argnums=0)
    new = jnp.ones((3, 2, 32))
    out = write(pool, new, new, jnp.array([5, 17, 900]))
    assert out.unsafe_buffer_pointer() == address


@pytest.mark.parametrize("shape", [(3, 1, 32), (3, 2, 16)])
def test_wrong_shapes_are_named(shape):
    pool = jnp.zeros((4, 2, 2, 16, 32))
    with pytest.raises(ValueError, match="do not fit the pool"):
        inspect.unwrap(kv_write)(
            pool, jnp.zeros(shape), jnp.zeros(shape), jnp.arange(3)
        )
