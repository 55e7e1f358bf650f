import itertools
import math

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from jllm.weights.lazy import LazyArray


class Source:
    """An array that remembers what was read of it."""

    def __init__(self, shape):
        self.array = np.arange(math.prod(shape)).reshape(shape)
        self.read_elements = 0

    def read(self, box):
        part = self.array[tuple(slice(*pair) for pair in box)]
        self.read_elements += part.size
        return part


@st.composite
def cases(draw):
    """Two shapes of the same elements, and an index of the second."""
    factors = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))

    def grouped():
        cuts = sorted(draw(st.sets(st.integers(0, len(factors)), max_size=3)))
        edges = [0, *cuts, len(factors)]
        return [math.prod(factors[a:b]) for a, b in itertools.pairwise(edges)]

    source, seen = grouped(), grouped()
    index = []
    for size in seen[: draw(st.integers(0, len(seen)))]:
        start = draw(st.integers(0, size - 1))
        stop = draw(st.integers(start, size))
        index.append(draw(st.sampled_from([start, slice(start, stop), slice(None)])))
    return source, seen, tuple(index)


@hypothesis.given(cases())
@hypothesis.settings(max_examples=300)
def test_an_index_gives_what_numpy_gives(case):
    shape, seen, index = case
    source = Source(shape)
    array = LazyArray(shape, source.read).reshape(seen)
    expected = source.array.reshape(seen)
    np.testing.assert_array_equal(array[index], expected[index])
    assert array[index].dtype == expected.dtype
    reverse = index[::-1] if len(index) == len(seen) else ()
    np.testing.assert_array_equal(array.T[reverse], expected.T[reverse])


@pytest.mark.parametrize(
    ("shape", "seen", "index", "elements"),
    [
        ((8, 6), (8, 6), (slice(2, 4), slice(1, 3)), 4),
        ((8, 6), (4, 2, 6), (slice(1, 2),), 12),  # a device's rows
        ((2, 3, 6), (6, 6), (slice(3, 6), slice(0, 2)), 6),
        ((4, 1, 3, 5), (12, 5), (slice(3, 9),), 30),
        ((4, 1, 3, 5), (12, 5), (slice(4, 5),), 5),
        ((4, 1, 3, 5), (2, 1, 6, 5), (slice(0, 1),), 30),
    ],
)
def test_no_more_is_read_than_was_asked_for(shape, seen, index, elements):
    source = Source(shape)
    LazyArray(shape, source.read, seen)[index]
    assert source.read_elements == elements


def test_a_run_across_a_split_reads_the_whole_rows_it_touches():
    source = Source((4, 3))
    part = LazyArray((4, 3), source.read, (12,))[2:7]
    np.testing.assert_array_equal(part, [2, 3, 4, 5, 6])
    assert source.read_elements == 9


def test_shapes():
    array = LazyArray((4, 3), Source((4, 3)).read)
    assert array.reshape(2, -1, 3).shape == (2, 2, 3)
    assert array.reshape((12,)).reshape([3, 4]).shape == (3, 4)
    assert array.T.shape == (3, 4)
    assert np.asarray(array, np.float32).dtype == np.float32
    with pytest.raises(ValueError, match="has no shape"):
        array.reshape(5, 3)
