"""The tile table against a loop, on the device and on the host."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.common.target import Target
from pallas_kernels.ragged_attention import (
    TileLayout,
    make_tiles,
    tile_layout,
)
from pallas_kernels.ragged_attention.tiles import tiles_for


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
    layout=st.builds(TileLayout, st.integers(1, 33), st.booleans()),
)
def test_tiles_on_host_and_device_equal_a_loop(counts, num_padding, layout):
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    num_tokens = int(starts[-1]) + num_padding
    on_host = make_tiles(starts, num_tokens, layout)
    on_device = make_tiles(jnp.asarray(starts), num_tokens, layout)
    for name in ("rows", "first_tokens", "num_tokens", "num_used"):
        host, device = getattr(on_host, name), getattr(on_device, name)
        assert isinstance(host, np.ndarray)
        assert isinstance(device, jax.Array)
        assert host.dtype == device.dtype == np.int32
        np.testing.assert_array_equal(host, device)
    tile_q = layout.tile_q(num_tokens)
    runs = [*counts, num_padding] if layout.with_padding else counts
    used, rest = on_host.num_used, num_tokens - sum(runs)
    parts = (on_host.rows, on_host.first_tokens, on_host.num_tokens)
    tiles = [tuple(map(int, tile)) for tile in zip(*parts, strict=True)]
    assert len(tiles) == layout.num_tiles(len(counts), num_tokens)
    assert len(on_host.packed) == layout.table_size(len(counts), num_tokens)
    assert tiles[:used] == expected_tiles(runs, tile_q)
    assert not on_host.num_tokens[used:].any()
    # What is unused is enough for the padding.
    assert (len(on_host.rows) - used) * tile_q >= rest


def test_a_table_that_was_cut_otherwise_is_made_anew():
    starts, own = jnp.array([0, 3, 9], jnp.int32), TileLayout(8)
    other = make_tiles(starts, 16, TileLayout(4))
    assert tiles_for(other, starts, 16, own).layout == own
    table = make_tiles(starts, 16, own)
    assert tiles_for(table, starts, 16, own) is table


@pytest.mark.parametrize(
    ("target", "implementation", "expected"),
    [
        (Target("gpu", "sm_90", "h200"), "auto", TileLayout(128 // 4)),
        (Target("gpu", "sm_90", "h200"), "gpu_mosaic", TileLayout(128 // 4)),
        (Target("tpu", "v6e", "v6e"), "auto", TileLayout(256, with_padding=True)),
        (Target("cpu"), "auto", TileLayout(32)),
        (Target("cpu"), "reference", None),
    ],
)
def test_the_layout_is_that_of_the_kernel(target, implementation, expected):
    q = jax.ShapeDtypeStruct((1, 32, 128), "bfloat16")
    kv = jax.ShapeDtypeStruct((1, 2, 8, 128, 128), "bfloat16")
    found = tile_layout(q, kv, implementation=implementation, target=target)
    assert found == expected
