"""The chunk table against a plain loop."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.common.chunks import (
    chunked_order,
    make_chunks,
    rows_of_tokens,
    with_padding_row,
)

SIZE, NUM_TOKENS = 4, 43


def plain_chunks(counts):
    """Row, first token and tokens of every chunk."""
    chunks, start = [], 0
    for row, count in enumerate(counts):
        end = start + count
        firsts = range(start, end, SIZE)
        chunks += [(row, first, min(SIZE, end - first)) for first in firsts]
        start = end
    return chunks


make = jax.jit(partial(make_chunks, num_tokens=NUM_TOKENS, size=SIZE))
order = jax.jit(partial(chunked_order, num_tokens=NUM_TOKENS, size=SIZE))
find_rows = jax.jit(partial(rows_of_tokens, num_tokens=NUM_TOKENS))


@settings(max_examples=40)
@given(counts=st.lists(st.integers(0, 10), min_size=4, max_size=4))
def test_chunks_and_order(counts):
    total, num_tokens = sum(counts), NUM_TOKENS
    starts = jnp.asarray(np.concatenate([[0], np.cumsum(counts)]), jnp.int32)
    table = make(starts)
    expected = plain_chunks(counts)
    used = len(expected)
    found = np.stack([table.rows, table.first_tokens, table.num_tokens], axis=1)
    assert [tuple(line) for line in found[:used]] == expected
    assert not found[used:, 2].any()
    rows = [row for row, _, _ in expected]
    firsts = [i == 0 or rows[i] != rows[i - 1] for i in range(used)]
    assert np.asarray(table.is_first).astype(bool).tolist() == [
        *firsts,
        *[False] * (len(found) - used),
    ]
    if used:
        assert (found[used:, 0] == rows[-1]).all()

    _, tokens, places = order(starts)
    tokens, places = np.asarray(tokens), np.asarray(places)
    assert sorted(tokens[tokens < num_tokens]) == list(range(total))
    assert list(tokens[places[:total]]) == list(range(total))
    assert (places[total:] >= tokens.size).all()

    expected_rows = np.repeat(np.arange(len(counts)), counts)
    found_rows = np.asarray(find_rows(starts))
    assert list(found_rows[:total]) == list(expected_rows)
    assert (found_rows[total:] == len(counts)).all()


def test_padding_row_owns_the_rest():
    starts = with_padding_row(jnp.asarray([0, 3, 5], jnp.int32), 9)
    assert list(starts) == [0, 3, 5, 9]
