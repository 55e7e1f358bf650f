"""The blocks of one cache group: its pool, its prefix cache, its part of all tables."""

import dataclasses
from collections.abc import Iterable, Sequence

from jllm.scheduler.block_pool import BlockPool
from jllm.scheduler.plan import NO_BLOCK
from jllm.scheduler.prefix_cache import Prefix, PrefixCache


@dataclasses.dataclass(slots=True, eq=False)
class BlockTable:
    """The blocks of one sequence in one cache group, in order of position.

    Attributes:
        blocks: Pool blocks; `NO_BLOCK` for those that it no longer needs.
        num_passed: Leading entries that are `NO_BLOCK`: all that it sees lies behind.
        num_recorded: Leading entries that were offered to the prefix cache.
        num_reserved: Blocks set aside for it that it has not taken.
        is_reserving: Whether blocks are set aside for it, also for those it gives back.
    """

    blocks: list[int] = dataclasses.field(default_factory=lambda: list[int]())
    num_passed: int = 0
    num_recorded: int = 0
    num_reserved: int = 0
    is_reserving: bool = False

    @property
    def held(self) -> list[int]:
        """The blocks that it uses."""
        return self.blocks[self.num_passed :] if self.num_passed else self.blocks


class BlockManager:
    """Owns the pool and the prefix cache of the layers that see alike.

    Layers with a window need the blocks of the newest positions only. The others go
    back to the pool while the sequence runs, and a prefix is found where the blocks of
    its last window are. Tables of all groups are equally long.

    A sequence for which blocks of such a group are reserved shares none of them with
    others, so that a block it gives back is free, and can be reserved for it anew.

    Args:
        num_blocks: Blocks in the pool.
        block_size: Tokens per block.
        window: Newest positions that a token sees; None for the whole context.
        tokens_under_way: Most tokens of one sequence in steps that are not committed.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        window: int | None = None,
        tokens_under_way: int = 0,
    ) -> None:
        """Starts with an empty pool."""
        self._block_size = block_size
        # The first block that is kept is full of tokens, whatever the window.
        self._window = None if window is None else max(window, block_size)
        self._tokens_under_way = tokens_under_way
        self._num_reserved = 0
        self._copied: list[int] = []
        self.cache = PrefixCache()
        self.pool = BlockPool(num_blocks, self.cache)

    @property
    def num_available(self) -> int:
        """Blocks that a sequence without reservation can take."""
        return self.pool.num_free - self._num_reserved

    @property
    def label(self) -> str:
        """What to add, in an error, to a number of blocks."""
        return "" if self._window is None else f" for a window of {self._window}"

    def first_needed(self, position: int) -> int:
        """Index in a table of the first block that tokens from a position on see."""
        if self._window is None:
            return 0
        return max(0, position - self._window + 1) // self._block_size

    def most_held(self, table_length: int) -> int:
        """Most blocks that a sequence uses until its table has so many entries.

        A block more than the window and the tokens under way for where they begin, and
        one for the blocks of single tokens, which are given back one by one.
        """
        if self._window is None:
            return table_length
        span = self._window + self._tokens_under_way
        return min(table_length, -(-span // self._block_size) + 2)

    def last_missing(self, prefixes: Sequence[Prefix], first: int, end: int) -> int:
        """Index of the last block of a context, from `first` to `end`, not to be found.

        Entry `i + 1` of the prefixes ends with block `i`. -1 if all can be found.
        """
        for index in range(end - 1, first - 1, -1):
            if self.cache.find(prefixes[index + 1]) is None:
                return index
        return -1

    def find(self, prefixes: Sequence[Prefix], first: int, end: int) -> list[int]:
        """The blocks up to `end`; those from `first` are known to be there."""
        blocks = [NO_BLOCK] * first
        for index in range(first, end):
            found = self.cache.find(prefixes[index + 1])
            assert found is not None, "a block was evicted while it was looked for"
            blocks.append(found[0])
        return blocks

    def admits(
        self, shared: Sequence[int], source: int | None, table_length: int, spare: int
    ) -> bool:
        """Whether a sequence can start.

        Args:
            shared: The first entries of its table; sharing an evictable block takes it
                from the others, and so does holding one for a copy.
            source: Block to be copied, if any.
            table_length: Entries that it must be able to hold in all.
            spare: Blocks to be left for the others.
        """
        held = [block for block in shared if block != NO_BLOCK]
        num_passed = len(shared) - len(held)
        wanted = self.most_held(table_length - num_passed) - len(held)
        copied = [] if source is None else [source]
        taken = self.pool.num_evictable([*held, *copied])
        return max(0, wanted) + taken + spare <= self.num_available

    def start(
        self, table: BlockTable, shared: Sequence[int], source: int | None
    ) -> None:
        """Puts the shared blocks into an empty table.

        The source of a copy is held until `end_step`.
        """
        table.blocks = list(shared)
        table.num_recorded = len(shared)
        table.num_passed = shared.count(NO_BLOCK) if self._window else 0
        self.pool.share(table.held)
        if source is not None:
            self.pool.share([source])
            self._copied.append(source)

    def end_step(self) -> None:
        """Lets go of the blocks that no copy of the step may have as a target."""
        self.pool.release(self._copied)
        self._copied.clear()

    def reserve(self, table: BlockTable, table_length: int) -> None:
        """Sets blocks aside for all that a sequence will take until so many entries."""
        count = self.most_held(table_length) - len(table.held)
        table.num_reserved, table.is_reserving = count, True
        self._num_reserved += count

    def lacks(self, table: BlockTable, count: int) -> bool:
        """Whether there are too few blocks to take."""
        return (
            count > table.num_reserved
            and count - table.num_reserved > self.num_available
        )

    def take(self, table: BlockTable, count: int) -> list[int]:
        """Appends new blocks; the caller has asked `lacks` before."""
        if table.num_reserved:
            reserved = min(count, table.num_reserved)
            table.num_reserved -= reserved
            self._num_reserved -= reserved
        blocks = self.pool.allocate(count)
        table.blocks += blocks
        return blocks

    def record(
        self, table: BlockTable, prefixes: Sequence[Prefix], num_full: int
    ) -> None:
        """Lets others find the first blocks of a table, which are full."""
        if table.is_reserving and self._window is not None:
            return
        # Runs for every block that is filled: one turn, mostly.
        for index in range(table.num_recorded, num_full):
            self.cache.insert(table.blocks[index], prefixes[index + 1])
        table.num_recorded = num_full

    def pass_by(self, table: BlockTable, position: int) -> None:
        """Takes back the blocks that tokens from a position on do not see."""
        first = self.first_needed(position)
        passed = table.blocks[table.num_passed : first]
        if not passed:
            return
        self.pool.release(passed)
        table.blocks[table.num_passed : first] = [NO_BLOCK] * len(passed)
        table.num_passed = first
        if table.is_reserving:
            table.num_reserved += len(passed)
            self._num_reserved += len(passed)

    def release(self, table: BlockTable) -> None:
        """Takes back all blocks of a table, and what was reserved for it."""
        self.pool.release(table.held)
        self._num_reserved -= table.num_reserved
        table.blocks = []
        table.num_passed = table.num_reserved = table.num_recorded = 0
        table.is_reserving = False

    def check_integrity(self, tables: Iterable[BlockTable]) -> None:
        """Raises AssertionError unless pool, cache, tables and reservations agree."""
        tables = list(tables)
        self.pool.check_integrity([table.held for table in tables])
        for table in tables:
            passed = table.blocks[: table.num_passed]
            assert passed == [NO_BLOCK] * table.num_passed, "a passed block is held"
            assert NO_BLOCK not in table.held, "a table has a gap"
            most = self.most_held(len(table.blocks))
            assert len(table.held) <= most, "a table holds more than its window"
        reserved = sum(table.num_reserved for table in tables)
        assert self._num_reserved == reserved, "reservations differ from their sum"
        assert 0 <= self._num_reserved <= self.pool.num_free, "reserved in excess"
