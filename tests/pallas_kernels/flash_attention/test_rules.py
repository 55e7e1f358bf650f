"""Lists of live tiles against all pairs of queries and keys, one by one."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.flash_attention.rules import (
    COLUMN_SHIFT,
    FIRST,
    FULL,
    LAST,
    MAX_COLUMNS,
    PARTIAL,
    ROW_SHIFT,
    Arrays,
    Rules,
    live_pairs,
    live_ranges,
    make_tiles,
)

TILE_Q, TILE_K = 4, 3


def visible_pairs(rules, arrays):
    """Who sees whom, `[B, T, S]`, by the definition."""
    rows = np.arange(rules.num_queries)[:, None]
    columns = np.arange(rules.num_keys)[None, :]
    distance = rows - columns
    if rules.causal:
        distance = distance + rules.num_keys - rules.num_queries
    seen = np.ones(distance.shape, bool)
    if rules.causal:
        seen &= distance >= 0
    if rules.window is not None:
        seen &= abs(distance) < rules.window
    if arrays.q_segments is None:
        return seen[None]
    q_ids, kv_ids = np.asarray(arrays.q_segments), np.asarray(arrays.kv_segments)
    return seen[None] & (q_ids[:, :, None] == kv_ids[:, None, :])


def tile_facts(seen):
    """Whether each tile is seen at all and wholly; past the last key nothing is."""
    _, t, s = seen.shape
    padding = ((0, 0), (0, -t % TILE_Q), (0, -s % TILE_K))
    shape = (seen.shape[0], -(-t // TILE_Q), TILE_Q, -(-s // TILE_K), TILE_K)
    some = np.pad(seen, padding).reshape(shape).any(axis=(2, 4))
    rows_extended = np.pad(seen, (*padding[:2], (0, 0)), constant_values=True)
    every = np.pad(rows_extended, (padding[0], (0, 0), padding[2]))
    return some, every.reshape(shape).all(axis=(2, 4))


@st.composite
def calls(draw, *, with_ids):
    # Few sizes with ids: JAX compiles for each.
    sizes = st.sampled_from([1, 8, 17]) if with_ids else st.integers(1, 17)
    t, s = draw(sizes), draw(sizes)
    window = draw(st.sampled_from([None, 1, 3, 8]))
    rules = Rules(t, s, draw(st.booleans()), 1.0, window, None)
    ids = [None, None]
    if with_ids:
        rng = np.random.default_rng(draw(st.integers(0, 99)))
        ids = [rng.integers(0, 3, (2, size)) for size in (t, s)]
        if draw(st.booleans()):
            ids = [np.sort(x) for x in ids]
        ids = [jnp.asarray(x, jnp.int32) for x in ids]
    zeros = jnp.zeros((2, 1, 1, 1))
    return rules, Arrays(zeros, zeros, zeros, None, None, *ids)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("with_ids", [False, True])
def test_lists_hold_what_is_visible(with_ids, transposed):
    # With ids the lists are made by JAX, one operation at a time.
    @settings(max_examples=5 if with_ids else 100)
    @given(calls(with_ids=with_ids))
    def check(call):
        rules, arrays = call
        some, every = tile_facts(visible_pairs(rules, arrays))
        tiles = make_tiles(rules, arrays, TILE_Q, TILE_K)
        if transposed:
            tiles, some, every = (
                tiles.transposed(),
                some.swapaxes(1, 2),
                every.swapaxes(1, 2),
            )
        check_ranges(np.asarray(live_ranges(tiles)), some, every)
        check_pairs(np.asarray(live_pairs(tiles)), some, every)

    check()


def check_ranges(ranges, some, every):
    for n, row in np.ndindex(some.shape[:2]):
        first, full_first, full_end, end = ranges[n, row]
        assert 0 <= first <= full_first <= full_end <= end <= some.shape[2]
        assert set(np.flatnonzero(some[n, row])) <= set(range(first, end))
        assert every[n, row, full_first:full_end].all()


def check_pairs(pairs, some, every):
    for n in range(len(pairs)):
        live = [number for number in pairs[n] if number & (FULL | PARTIAL)]
        rows = [number >> ROW_SHIFT for number in live]
        columns = [(number >> COLUMN_SHIFT) & (MAX_COLUMNS - 1) for number in live]
        places = list(zip(rows, columns, strict=True))
        assert len(set(places)) == len(places)
        assert rows == sorted(rows)
        assert set(rows) == set(range(some.shape[1]))
        assert set(zip(*np.nonzero(some[n]), strict=True)) <= set(places)
        for index, (number, place) in enumerate(zip(live, places, strict=True)):
            assert every[n][place] or not number & FULL
            is_first = index == 0 or rows[index - 1] != rows[index]
            is_last = index == len(rows) - 1 or rows[index + 1] != rows[index]
            assert bool(number & FIRST) == is_first
            assert bool(number & LAST) == is_last
        # Past the live pairs the last one is repeated, so that nothing is fetched.
        for number in pairs[n][len(live) :]:
            assert number >> COLUMN_SHIFT == live[-1] >> COLUMN_SHIFT
            assert number & (FIRST | LAST | FULL | PARTIAL) == 0


def test_causal_lists_leave_out_half():
    rules = Rules(40, 40, True, 1.0, None, None)
    zeros = jnp.zeros((1, 1, 1, 1))
    arrays = Arrays(zeros, zeros, zeros, None, None, None, None)
    pairs = np.asarray(live_pairs(make_tiles(rules, arrays, 4, 4)))
    assert pairs.shape == (1, 55)
    assert (pairs & PARTIAL).astype(bool).sum() == 10
