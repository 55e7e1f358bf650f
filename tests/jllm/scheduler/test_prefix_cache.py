import pytest

from jllm.scheduler import prefix_cache
from jllm.scheduler.prefix_cache import PrefixCache, empty_prefix, longer_prefix


def chain(*blocks, adapter=None, salt=None):
    prefix = empty_prefix(adapter, salt)
    for tokens in blocks:
        prefix = longer_prefix(prefix, tokens)
    return prefix


def test_finds_a_block_by_all_tokens_before_its_end():
    cache = PrefixCache()
    cache.insert(5, chain((1, 2), (3, 4)))
    block, _ = cache.find(chain((1, 2), (3, 4)))
    assert block == 5
    assert cache.find(chain((3, 4))) is None
    assert cache.find(chain((9, 2), (3, 4))) is None
    assert 5 in cache
    assert len(cache) == 1


@pytest.mark.parametrize("other", [{"adapter": "x"}, {"salt": "x"}, {"salt": ""}])
def test_adapters_and_salts_do_not_share(other):
    cache = PrefixCache()
    cache.insert(0, chain((1, 2)))
    assert cache.find(chain((1, 2), **other)) is None
    assert chain((1, 2)).digest != chain((1, 2), **other).digest


def test_adapter_and_salt_are_not_interchangeable():
    assert chain((1,), adapter="x").digest != chain((1,), salt="x").digest


def test_the_first_of_equal_blocks_is_kept():
    cache = PrefixCache()
    cache.insert(0, chain((1,)))
    cache.insert(1, chain((1,)))
    assert cache.find(chain((1,)))[0] == 0
    assert 1 not in cache
    cache.check_integrity()


def test_a_removed_block_is_not_found_and_its_content_can_return():
    cache = PrefixCache()
    cache.insert(0, chain((1,)))
    cache.remove(0)
    assert cache.find(chain((1,))) is None
    cache.insert(3, chain((1,)))
    assert cache.find(chain((1,)))[0] == 3
    cache.check_integrity()


@pytest.fixture
def colliding(monkeypatch):
    monkeypatch.setattr(prefix_cache, "digest", lambda parent, content: b"same")


def test_a_collision_of_the_last_block_is_a_miss(colliding):
    cache = PrefixCache()
    cache.insert(0, chain((1,)))
    assert cache.find(chain((2,))) is None
    assert cache.find(chain((1,)))[0] == 0


def test_a_collision_further_up_the_chain_is_a_miss(colliding):
    cache = PrefixCache()
    cache.insert(0, chain((1,), (7,)))
    assert cache.find(chain((2,), (7,))) is None
    assert cache.find(chain((7,))) is None
    assert cache.find(chain((1,), (7,)))[0] == 0


def test_a_collision_of_salts_is_a_miss(colliding):
    cache = PrefixCache()
    cache.insert(0, chain((1,), salt="a"))
    assert cache.find(chain((1,), salt="b")) is None


def test_found_prefixes_compare_in_one_step():
    cache = PrefixCache()
    cache.insert(0, chain((1,)))
    _, found = cache.find(chain((1,)))
    longer = longer_prefix(found, (2,))
    assert longer.parent is found
    assert longer.equals(chain((1,), (2,)))


def test_long_chains_need_no_recursion():
    blocks = [(number,) for number in range(5_000)]
    left, right = chain(*blocks), chain(*blocks)
    assert left.equals(right)
    assert not left.equals(chain(*blocks[1:]))
    assert len(repr(left)) < 1000
