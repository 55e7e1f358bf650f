import pytest

from jllm.scheduler.block_tables import BlockTables, Match
from jllm.scheduler.request import Request


@pytest.fixture
def tables():
    return BlockTables(8, 4, enable_prefix_caching=True)


def request(number, prompt):
    return Request(
        sequence_id=number,
        request_id=str(number),
        index=0,
        prompt_token_ids=tuple(prompt),
        max_tokens=4,
    )


def cached(tables, prompt):
    """Computes a prompt and leaves its full blocks in the cache."""
    one = request(0, prompt)
    blocks = tables.grow(one, len(prompt))
    tables.record(one, len(prompt))
    tables.release(one)
    return blocks


@pytest.mark.parametrize(
    ("length", "num_shared", "num_tokens", "copies"),
    [
        (4, 0, 3, True),  # one full block, found: its last token is left to compute
        (5, 1, 4, False),
        (8, 1, 7, True),
        (11, 2, 8, False),
        (12, 2, 11, True),
        (13, 3, 12, False),
    ],
)
def test_a_match_leaves_the_last_token(tables, length, num_shared, num_tokens, copies):
    blocks = cached(tables, range(12))
    match = tables.match(request(1, range(length)))
    source = blocks[num_shared] if copies else None
    assert match == Match(list(blocks[:num_shared]), num_tokens, source)


def test_a_match_ends_at_the_first_block_that_differs(tables):
    blocks = cached(tables, range(12))
    match = tables.match(request(1, [*range(4), 9, 9, 9, 9, *range(8, 12)]))
    assert match == Match([blocks[0]], 4)


def test_blocks_of_one_token_need_no_copy():
    tables = BlockTables(8, 1, enable_prefix_caching=True)
    blocks = cached(tables, range(3))
    assert tables.match(request(1, range(3))) == Match(list(blocks[:2]), 2)


def test_the_source_of_a_copy_is_held_until_the_end_of_the_step(tables):
    cached(tables, range(8))
    one = request(1, range(8))
    match = tables.match(one)
    tables.start(one, match)
    assert tables.pool.references(match.source) == 1
    assert len(tables.grow(one, 4 * 7)) == 6
    assert match.source not in one.block_ids
    assert tables.grow(request(2, range(4)), 4) is None
    tables.end_step()
    assert tables.pool.references(match.source) == 0
    tables.check_integrity([one])


def test_reserved_blocks_are_kept_for_their_owner(tables):
    one, other = request(1, range(4)), request(2, range(4))
    tables.reserve(one, 6)
    assert tables.num_available == 2
    assert not tables.admits(Match(), 3, 0)
    assert tables.admits(Match(), 2, 0)
    assert not tables.admits(Match(), 2, 1)
    assert tables.grow(other, 12) is None
    assert len(tables.grow(other, 8)) == 2
    assert len(tables.grow(one, 20)) == 5
    assert one.num_reserved_blocks == 1
    tables.check_integrity([one, other])
    tables.release(one)
    assert tables.num_available == 6


def test_sharing_an_evictable_block_counts_as_taking_it(tables):
    cached(tables, range(8))
    match = tables.match(request(1, range(9)))
    tables.grow(request(2, range(4)), 24)
    assert tables.num_available == 2
    assert tables.admits(match, 2, 0)
    assert not tables.admits(match, 3, 0)


def test_integrity_check_sees_a_wrong_reservation(tables):
    one = request(1, range(4))
    tables.reserve(one, 2)
    with pytest.raises(AssertionError, match="reservations"):
        tables.check_integrity([])
