"""The tile table against a loop, on the device and on the host."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.ragged_attention.tiles import make_tiles, max_tiles


def expected_tiles(counts, tile_q):
    found, first = [], 0
    for row, count in enumerate(counts):
        found += [
            (row, first + offset, min(tile_q, count - offset))
            for offset in range(0, count, tile_q)
        ]
        first += count
    return found


@settings(max_examples=12)
@given(
    counts=st.lists(st.integers(0, 40), min_size=3, max_size=3),
    num_padding=st.integers(0, 40),
    tile_q=st.integers(1, 33),
)
def test_tiles_on_host_and_device_equal_a_loop(counts, num_padding, tile_q):
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    num_tokens = int(starts[-1]) + num_padding
    on_host = make_tiles(starts, num_tokens, tile_q)
    on_device = make_tiles(jnp.asarray(starts), num_tokens, tile_q)
    for host, device in zip(on_host, on_device, strict=True):
        assert isinstance(host, np.ndarray | np.generic)
        assert isinstance(device, jax.Array)
        assert host.dtype == device.dtype == np.int32
        np.testing.assert_array_equal(host, device)
    expected = expected_tiles(counts, tile_q)
    used = on_host.num_used
    assert len(on_host.rows) == max_tiles(len(counts), num_tokens, tile_q)
    assert [tuple(map(int, tile)) for tile in zip(*on_host[:3], strict=True)][
        :used
    ] == expected
    assert not on_host.num_tokens[used:].any()
    # What is unused is enough for the padding.
    assert (len(on_host.rows) - used) * tile_q >= num_tokens - starts[-1]
