import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from jllm.scheduler.block_pool import BlockPool
from jllm.scheduler.prefix_cache import PrefixCache, empty_prefix, longer_prefix


def prefix(*tokens):
    return longer_prefix(empty_prefix(None, None), tokens)


@pytest.fixture
def cache():
    return PrefixCache()


@pytest.fixture
def pool(cache):
    return BlockPool(4, cache)


def test_hands_out_each_block_once(pool):
    blocks = pool.allocate(4)
    assert sorted(blocks) == [0, 1, 2, 3]
    assert pool.num_free == 0
    pool.check_integrity([blocks])


def test_a_shared_block_is_free_after_its_last_release(pool):
    blocks = pool.allocate(1)
    pool.share(blocks)
    assert pool.references(blocks[0]) == 2
    pool.release(blocks)
    assert pool.num_free == 3
    pool.release(blocks)
    assert pool.num_free == 4


def test_cached_blocks_are_evicted_last_and_tails_before_heads(pool, cache):
    blocks = pool.allocate(3)
    for number, block in enumerate(blocks):
        cache.insert(block, prefix(number))
    pool.release(blocks)
    assert pool.num_free == 4
    assert pool.allocate(1)[0] not in blocks
    assert pool.allocate(1) == [blocks[2]]
    assert blocks[2] not in cache
    assert pool.allocate(2) == [blocks[1], blocks[0]]
    assert len(cache) == 0


def test_the_least_recently_used_is_evicted_first(pool, cache):
    first, second, third, _ = pool.allocate(4)
    for block in (first, second, third):
        cache.insert(block, prefix(block))
        pool.release([block])
    pool.share([first])
    pool.release([first])
    assert pool.allocate(3) == [second, third, first]


def test_a_shared_evictable_block_is_not_evicted(pool, cache):
    blocks = pool.allocate(4)
    cache.insert(blocks[0], prefix(1))
    pool.release(blocks)
    assert pool.num_evictable(blocks[:1]) == 1
    pool.share(blocks[:1])
    assert pool.num_evictable(blocks[:1]) == 0
    assert pool.num_free == 3
    assert blocks[0] not in pool.allocate(3)
    assert blocks[0] in cache


def test_evict_all_spares_blocks_in_use(pool, cache):
    used, unused = pool.allocate(2)
    cache.insert(used, prefix(1))
    cache.insert(unused, prefix(2))
    pool.release([unused])
    pool.evict_all()
    assert used in cache
    assert unused not in cache
    pool.check_integrity([[used]])


def test_integrity_check_sees_a_lost_block(pool):
    blocks = pool.allocate(2)
    with pytest.raises(AssertionError, match="reference counts"):
        pool.check_integrity([blocks[:1]])
    pool._free.pop()
    with pytest.raises(AssertionError, match="lost"):
        pool.check_integrity([blocks])


class PoolMachine(RuleBasedStateMachine):
    """Compares the pool with lists of tables and a dictionary of contents."""

    size = 6

    def __init__(self):
        super().__init__()
        self.cache = PrefixCache()
        self.pool = BlockPool(self.size, self.cache)
        self.tables = []
        self.content = {}
        self.number = 0

    def in_use(self):
        return {block for table in self.tables for block in table}

    @rule(count=st.integers(0, 3))
    def allocate(self, count):
        if count > self.pool.num_free:
            return
        used, free = self.in_use(), self.size - len(self.in_use()) - len(self.idle())
        expected_evictions = max(0, count - free)
        oldest_first = list(self.pool._evictable)
        blocks = self.pool.allocate(count)
        assert not used & set(blocks)
        evicted = [block for block in blocks if block in self.content]
        assert evicted == oldest_first[:expected_evictions]
        for block in evicted:
            del self.content[block]
        self.tables.append(blocks)

    def idle(self):
        return set(self.content) - self.in_use()

    @precondition(lambda self: any(self.tables))
    @rule(data=st.data())
    def insert(self, data):
        block = data.draw(st.sampled_from(sorted(self.in_use())))
        self.number += 1
        self.cache.insert(block, prefix(self.number))
        self.content.setdefault(block, self.number)

    @precondition(lambda self: self.content)
    @rule(data=st.data())
    def share(self, data):
        block = data.draw(st.sampled_from(sorted(self.content)))
        self.pool.share([block])
        self.tables.append([block])

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data):
        index = data.draw(st.integers(0, len(self.tables) - 1))
        self.pool.release(self.tables.pop(index))

    @rule()
    def evict_all(self):
        for block in self.idle():
            del self.content[block]
        self.pool.evict_all()

    @invariant()
    def agrees_with_the_model(self):
        self.pool.check_integrity(self.tables)
        assert self.pool.num_free == self.size - len(self.in_use())
        for block in range(self.size):
            assert (block in self.cache) == (block in self.content)
        for block, number in self.content.items():
            assert self.cache.find(prefix(number))[0] == block


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=30, stateful_step_count=30)
