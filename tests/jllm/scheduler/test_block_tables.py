import pytest

from jllm.config import SchedulerConfig, WindowPool
from jllm.scheduler.block_tables import BlockTables, Match
from jllm.scheduler.plan import NO_BLOCK
from jllm.scheduler.request import Request


def make(block_size=4, **changes):
    values = {
        "max_num_seqs": 4,
        "token_budget": 4,
        "block_size": block_size,
        "num_blocks": 8,
        "max_model_len": 64,
        "max_block_appends": 64,
    }
    return BlockTables(SchedulerConfig(**values | changes))


@pytest.fixture
def tables():
    return make()


def pool_of(tables):
    return tables.groups[0].pool


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
    tables.commit(one, len(prompt))
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
    tables = make(block_size=1)
    blocks = cached(tables, range(3))
    assert tables.match(request(1, range(3))) == Match(list(blocks[:2]), 2)


def test_the_source_of_a_copy_is_held_until_the_end_of_the_step(tables):
    cached(tables, range(8))
    one = request(1, range(8))
    match = tables.match(one)
    tables.start(one, match)
    assert pool_of(tables).references(match.source) == 1
    assert len(tables.grow(one, 4 * 7)) == 6
    assert match.source not in one.block_ids
    assert tables.grow(request(2, range(4)), 4) is None
    tables.end_step()
    assert pool_of(tables).references(match.source) == 0
    tables.check_integrity([one])


def test_reserved_blocks_are_kept_for_their_owner(tables):
    one, other = request(1, range(4)), request(2, range(4))
    tables.reserve(one, 6)
    (full,) = tables.groups
    assert full.num_available == 2
    assert not full.admits((), None, 3, 0)
    assert full.admits((), None, 2, 0)
    assert not full.admits((), None, 2, 1)
    assert tables.grow(other, 12) is None
    assert len(tables.grow(other, 8)) == 2
    assert len(tables.grow(one, 20)) == 5
    assert one.num_reserved_blocks == 1
    tables.check_integrity([one, other])
    tables.release(one)
    assert full.num_available == 6


def test_sharing_an_evictable_block_counts_as_taking_it(tables):
    cached(tables, range(8))
    match = tables.match(request(1, range(9)))
    tables.grow(request(2, range(4)), 24)
    assert tables.groups[0].num_available == 2
    assert tables.admits(match, 2, leaves_spare=False)
    assert not tables.admits(match, 3, leaves_spare=False)


def test_integrity_check_sees_a_wrong_reservation(tables):
    one = request(1, range(4))
    tables.reserve(one, 2)
    with pytest.raises(AssertionError, match="reservations"):
        tables.check_integrity([])


# --- groups with a window -----------------------------------------------------


def windowed(window=6, num_blocks=8, **changes):
    """Blocks of 4 tokens; a token of 6 sees two or three of them."""
    return make(
        num_blocks=32, window_pools=(WindowPool(window, num_blocks),), **changes
    )


def prepared(tables, number, prompt):
    one = request(number, prompt)
    tables.prepare(one)
    return one


def compute(tables, one, num_tokens, step=4):
    """Computes a sequence's tokens in chunks, each complete before the next."""
    for end in range(step, num_tokens + 1, step):
        assert tables.grow(one, end) is not None
        tables.commit(one, end)
        tables.check_integrity([one])


def test_blocks_before_the_window_go_back_and_can_be_found():
    tables = windowed()
    one = prepared(tables, 0, range(24))
    compute(tables, one, 24)
    full, window = one.tables
    # Token 24 sees positions 19 to 24, hence blocks 4 and 5.
    assert window.blocks[:4] == [NO_BLOCK] * 4
    assert len(window.held) == 2
    assert NO_BLOCK not in full.blocks
    pool = tables.groups[1].pool
    assert pool.num_free == 6
    assert len(pool._evictable) == 4


def test_a_prefix_is_found_where_its_last_window_is():
    tables = windowed()
    one = prepared(tables, 0, range(24))
    compute(tables, one, 24)
    table = list(one.block_ids)
    tables.release(one)
    other = prepared(tables, 1, range(30))
    match = tables.match(other)
    assert match.blocks == table
    assert match.num_tokens == 24
    (window,) = match.windows
    assert window.blocks[:4] == [NO_BLOCK] * 4
    assert NO_BLOCK not in window.blocks[4:]
    tables.start(other, match)
    tables.check_integrity([other])


def test_a_prefix_is_lost_with_the_blocks_of_its_windows():
    tables = windowed()
    one = prepared(tables, 0, range(24))
    compute(tables, one, 24)
    group = tables.groups[1]
    last = one.tables[1].blocks[5]
    tables.release(one)
    # Until the last block goes; the one before it, released later, stays.
    other = prepared(tables, 1, [9] * 8)
    while last in group.cache:
        group.take(other.tables[1], 1)
    assert len(group.cache) == 1
    assert tables.match(prepared(tables, 2, range(30))) == tables.no_match
    assert len(tables.groups[0].cache) == 6


def test_the_shortest_window_that_is_missing_decides():
    """Two groups that hold different parts: the longest start that both can serve."""
    tables = make(num_blocks=32, window_pools=(WindowPool(4, 16), WindowPool(8, 16)))
    one = prepared(tables, 0, range(24))
    compute(tables, one, 24)
    prefixes, blocks = list(one.prefixes), [list(t.blocks) for t in one.tables]
    tables.release(one)
    for group, index in ((1, 5), (2, 2)):
        cache = tables.groups[group].cache
        block, _ = cache.find(prefixes[index + 1])
        pool = tables.groups[group].pool
        pool.share([block])
        cache.remove(block)
        pool.release([block])
    # Group 1 lacks block 5, so 5 blocks at most, whose window needs block 4 of it and
    # blocks 3 and 4 of group 2, which lacks block 2 only.
    match = tables.match(prepared(tables, 1, range(30)))
    assert match.num_tokens == 20
    assert list(match.blocks) == blocks[0][:5]
    first, second = match.windows
    assert [b == NO_BLOCK for b in first.blocks] == [True] * 4 + [False]
    assert [b == NO_BLOCK for b in second.blocks] == [True] * 3 + [False] * 2


def test_a_cut_match_asks_for_the_window_before_the_cut():
    tables = windowed()
    one = prepared(tables, 0, range(24))
    compute(tables, one, 24)
    tables.release(one)
    other = prepared(tables, 1, range(30))
    match = tables.cut(other, tables.match(other), 3)
    assert match.num_tokens == 12
    assert [b == NO_BLOCK for b in match.windows[0].blocks] == [True, False, False]


def test_a_fork_shares_the_window_while_its_parent_has_it():
    tables = windowed()
    parent, fork = prepared(tables, 0, range(10)), prepared(tables, 1, range(10))
    compute(tables, parent, 8)
    assert tables.grow(parent, 10) is not None
    tables.commit(parent, 10)
    match = tables.match_fork(fork, parent)
    assert match is not None
    assert match.num_tokens == 9
    assert match.source == parent.block_ids[2]
    (window,) = match.windows
    assert window.source == parent.tables[1].blocks[2]
    assert list(window.blocks) == [NO_BLOCK, parent.tables[1].blocks[1]]
    for token in range(20):
        parent.token_ids.append(token)
    compute(tables, parent, 28)
    assert tables.match_fork(fork, parent) is None


def test_what_is_given_back_is_reserved_anew():
    tables = windowed(num_blocks=6)
    one = prepared(tables, 0, range(40))
    group = tables.groups[1]
    assert group.most_held(10) == 6
    tables.reserve(one, 10)
    assert group.num_available == 0
    compute(tables, one, 40)
    assert group.num_available == 0
    assert len(group.cache) == 0, "others could share what is given back"
    tables.release(one)
    assert group.num_available == 6
    tables.check_integrity([])


def test_blocks_of_older_weights_are_not_found(tables):
    one = request(0, range(8))
    one.max_cached_tokens = 0  # nothing is looked for, hence nothing hashed yet
    tables.start(one, tables.match(one))
    tables.grow(one, 8)
    tables.revision += 1
    tables.commit(one, 8)
    tables.release(one)
    assert tables.match(request(1, range(12))).num_tokens == 0
