"""Who uses which block: reference counts, the free list and the eviction order."""

from collections.abc import Iterable, Sequence

from jllm.scheduler.prefix_cache import PrefixCache


class BlockPool:
    """Hands out blocks and takes them back.

    A block is in use (one reference per block table that holds it), free, or evictable:
    in no table, but its content can still be found in the prefix cache. Free blocks are
    handed out first, then the evictable one that was used longest ago.
    """

    def __init__(self, num_blocks: int, cache: PrefixCache) -> None:
        """Starts with all blocks free."""
        self._cache = cache
        self._references = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        # A dict keeps its order: least recently used first.
        self._evictable: dict[int, None] = {}

    @property
    def num_blocks(self) -> int:
        """Number of all blocks."""
        return len(self._references)

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can hand out, evictable ones included."""
        return len(self._free) + len(self._evictable)

    @property
    def num_used(self) -> int:
        """Blocks in a table."""
        return self.num_blocks - self.num_free

    def states(self) -> bytes:
        """What each block is used for; may be called from another thread."""
        cached = self._evictable
        return bytes(
            min(count, 2) + 1 if count else int(block in cached)
            for block, count in enumerate(self._references)
        )

    def references(self, block: int) -> int:
        """Number of block tables that hold the block."""
        return self._references[block]

    def num_evictable(self, blocks: Iterable[int]) -> int:
        """How many of the blocks would cease to be free if they were shared."""
        return sum(not self._references[block] for block in blocks)

    def allocate(self, count: int) -> list[int]:
        """Takes blocks for one table; the caller has asked `num_free` before."""
        return [self._take() for _ in range(count)]

    def _take(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block = next(iter(self._evictable))
            del self._evictable[block]
            self._cache.remove(block)
        self._references[block] = 1
        return block

    def share(self, blocks: Iterable[int]) -> None:
        """Adds a reference to blocks that are in use or evictable."""
        for block in blocks:
            if not self._references[block]:
                del self._evictable[block]
            self._references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Drops one reference of each block of a table.

        Goes from the end to the start, so that the end of a context is evicted before
        its start, without which it could not be found.
        """
        for block in reversed(blocks):
            self._references[block] -= 1
            if not self._references[block]:
                if block in self._cache:
                    self._evictable[block] = None
                else:
                    self._free.append(block)

    def evict_all(self) -> None:
        """Frees every evictable block."""
        for block in self._evictable:
            self._cache.remove(block)
        self._free.extend(self._evictable)
        self._evictable.clear()

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Raises AssertionError unless counts and lists agree with all block tables."""
        expected = [0] * self.num_blocks
        for table in tables:
            assert len(set(table)) == len(table), "a table holds a block twice"
            for block in table:
                expected[block] += 1
        assert self._references == expected, "reference counts differ from the tables"
        free, evictable = set(self._free), set(self._evictable)
        unused = {block for block, count in enumerate(expected) if not count}
        assert len(free) == len(self._free), "a block is free twice"
        assert not free & evictable, "a block is both free and evictable"
        assert free | evictable == unused, "a block is lost, or both free and in use"
        assert all(block in self._cache for block in evictable)
        assert not any(block in self._cache for block in free)
        self._cache.check_integrity()
