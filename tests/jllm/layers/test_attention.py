"""The layer around the kernels."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jllm.layers.attention import (
    AttentionOptions,
    HeadNorms,
    Heads,
    cached_attention,
)
from jllm.layers.batch import Batch
from jllm.layers.kernels import Target, collect_fallbacks
from jllm.layers.rope import rotation_of
from tests.pallas_kernels.targets import gpu_target

HEAD_DIM = 24
OPTIONS = AttentionOptions(scale=0.2, implementation="auto", target=None, mesh=None)


def attend(width, *, is_decode, block_size=4, target=None):
    """Two rows, five cached tokens in the first; a pool of the given head width."""
    rng = np.random.default_rng(0)
    num_tokens = 2 if is_decode else 7
    pool = np.zeros((9, 2, 2, block_size, width), np.float32)
    pool[..., :HEAD_DIM] = rng.normal(size=(9, 2, 2, block_size, HEAD_DIM))
    q, keys, values = (
        jnp.asarray(rng.normal(size=(num_tokens, heads, HEAD_DIM)), jnp.float32)
        for heads in (4, 2, 2)
    )
    starts = [0, 1, 2] if is_decode else [0, 3, 7]
    positions = [5, 0] if is_decode else [5, 6, 7, 0, 1, 2, 3]
    tables = np.array([[1, 3], [6, 0]], np.int32)
    owners = np.repeat([0, 1], np.diff(starts))
    blocks = tables[owners, np.array(positions) // block_size]
    slots = blocks * block_size + np.array(positions) % block_size
    batch = Batch(
        tokens=jnp.zeros(num_tokens, jnp.int32),
        positions=jnp.array(positions, jnp.int32),
        slots=jnp.array(slots, jnp.int32),
        block_tables=jnp.array(tables),
        row_starts=jnp.array(starts, jnp.int32),
        lengths=jnp.array([6, 1] if is_decode else [8, 4], jnp.int32),
        is_decode=is_decode,
    )
    inv_freq = 10.0 ** -np.linspace(0, 2, HEAD_DIM // 2, dtype=np.float32)
    rotation = rotation_of(batch.positions, inv_freq, 1.0)
    norms = HeadNorms(jnp.full(HEAD_DIM, 1.5), jnp.full(HEAD_DIM, 0.5), 1e-5)
    heads = Heads(q, keys, values)
    options = dataclasses.replace(OPTIONS, target=target)
    return cached_attention(heads, rotation, norms, jnp.asarray(pool), batch, options)


@pytest.mark.parametrize("is_decode", [True, False])
def test_a_pool_with_wider_heads_gives_the_same(is_decode):
    expected, pool = attend(HEAD_DIM, is_decode=is_decode)
    out, wide_pool = attend(128, is_decode=is_decode)
    assert float(jnp.abs(expected).min(axis=(1, 2)).max()) > 0
    np.testing.assert_allclose(out, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(wide_pool[..., :HEAD_DIM], pool)
    np.testing.assert_array_equal(wide_pool[..., HEAD_DIM:], 0)


@pytest.mark.parametrize("is_decode", [True, False])
@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_the_kernels_of_other_devices_give_the_same(platform, is_decode):
    """Interpreted: queries and keys normalised, rotated, stored, and attended to."""
    interpret = pltpu.InterpretParams(uninitialized_memory="nan")
    tpu = Target("tpu", "v6e", "v6e", 1, interpret=interpret)
    target, width = (gpu_target(), HEAD_DIM) if platform == "gpu" else (tpu, 128)
    cpu = attend(width, is_decode=is_decode, block_size=8)
    with collect_fallbacks() as found:
        other = attend(width, is_decode=is_decode, block_size=8, target=target)
    assert found == []
    for expected, array in zip(cpu, other, strict=True):
        np.testing.assert_allclose(array, expected, rtol=2e-5, atol=2e-5)
