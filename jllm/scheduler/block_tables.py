"""Gives sequences their blocks: found in the cache, shared by a fork, or new ones."""

import dataclasses
from collections.abc import Iterable, Sequence

from jllm.scheduler.block_pool import BlockPool
from jllm.scheduler.prefix_cache import PrefixCache, empty_prefix, longer_prefix
from jllm.scheduler.request import Request


@dataclasses.dataclass(frozen=True, slots=True)
class Match:
    """What of a sequence's context lies in the pool already.

    Attributes:
        blocks: Blocks it shares, the first ones of its table.
        num_tokens: Tokens it need not compute.
        source: Block whose start holds the rest of `num_tokens`; it must be copied,
            because the sequence will write to it and others read it.
    """

    blocks: Sequence[int] = ()
    num_tokens: int = 0
    source: int | None = None

    def first(self, count: int, block_size: int) -> "Match":
        """The match cut to a number of blocks."""
        return Match(self.blocks[:count], count * block_size)


class BlockTables:
    """Owns the pool and the cache, and changes the block tables of requests.

    Some blocks may be reserved for a sequence: they are still free in the pool, but
    only that sequence can take them.
    """

    def __init__(
        self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool
    ) -> None:
        """Starts with an empty pool."""
        self._block_size = block_size
        self._caching = enable_prefix_caching
        self._cache = PrefixCache()
        self._pool = BlockPool(num_blocks, self._cache)
        self._num_reserved = 0
        self._held: list[int] = []
        self.revision = 0
        """Number of the weights; blocks are shared only under the same one."""

    @property
    def pool(self) -> BlockPool:
        """The pool, to be looked at."""
        return self._pool

    @property
    def cache(self) -> PrefixCache:
        """The prefix cache, to be looked at."""
        return self._cache

    @property
    def num_available(self) -> int:
        """Blocks that a sequence without reservation can take."""
        return self._pool.num_free - self._num_reserved

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return -(-num_tokens // self._block_size)

    def match(self, request: Request) -> Match:
        """Finds the longest start of a waiting sequence that the cache holds.

        At least one token is left to compute, whose logits give the next one. Where
        that token lies inside the last block found, this block is to be copied.
        """
        limit = request.max_cached_tokens
        if not self._caching or limit == 0:
            return Match()
        blocks: list[int] = []
        if request.prefixes and request.prefixes[0].namespace[-1] != self.revision:
            request.prefixes = []
        self._extend_prefixes(request, request.num_tokens)
        prefixes = request.prefixes
        for index in range(1, len(prefixes)):
            found = self._cache.find(prefixes[index])
            if found is None:
                break
            block, prefixes[index] = found
            blocks.append(block)
        length = request.num_tokens
        if limit is not None:
            length = min(length, limit + 1)
        return self._leave_last_token(blocks, length)

    def match_fork(self, request: Request, parent: Request) -> Match:
        """Matches the prompt with its copy in the table of a running sequence."""
        last = request.num_prompt_tokens - 1
        count = last // self._block_size
        request.prefixes = parent.prefixes[: count + 1]
        return self._leave_last_token(parent.block_ids[: count + 1], last + 1)

    def _leave_last_token(self, blocks: list[int], num_tokens: int) -> Match:
        last = num_tokens - 1
        count, rest = divmod(last, self._block_size)
        if len(blocks) <= count:
            return Match(blocks, len(blocks) * self._block_size)
        source = blocks[count] if rest else None
        return Match(blocks[:count], last, source)

    def admits(self, match: Match, table_length: int, spare: int) -> bool:
        """Whether a sequence can start.

        Args:
            match: What it shares; sharing an evictable block takes it from the others,
                and so does holding one for a copy.
            table_length: Blocks that it must be able to hold in all.
            spare: Blocks to be left for the others.
        """
        held = [] if match.source is None else [match.source]
        taken = self._pool.num_evictable([*match.blocks, *held])
        wanted = table_length - len(match.blocks)
        return wanted + taken + spare <= self.num_available

    def start(self, request: Request, match: Match) -> None:
        """Puts the shared blocks into the table of a sequence.

        The source of a copy is held until `end_step`.
        """
        self._pool.share(match.blocks)
        if match.source is not None:
            self._pool.share([match.source])
            self._held.append(match.source)
        request.block_ids = list(match.blocks)
        request.num_computed_tokens = match.num_tokens
        request.num_recorded_blocks = len(match.blocks)

    def end_step(self) -> None:
        """Lets go of the blocks that no copy of the step may have as a target."""
        self._pool.release(self._held)
        self._held.clear()

    def reserve(self, request: Request, count: int) -> None:
        """Sets blocks aside that the sequence will take in later steps."""
        request.num_reserved_blocks = count
        self._num_reserved += count

    def grow(self, request: Request, num_tokens: int) -> tuple[int, ...] | None:
        """Appends new blocks until a table holds so many tokens.

        Returns:
            The new blocks; None, and nothing is changed, if there are too few.
        """
        count = self.num_blocks_for(num_tokens) - len(request.block_ids)
        reserved = min(count, request.num_reserved_blocks)
        if count > reserved and count - reserved > self.num_available:
            return None
        request.num_reserved_blocks -= reserved
        self._num_reserved -= reserved
        blocks = self._pool.allocate(count)
        request.block_ids += blocks
        return tuple(blocks)

    def release(self, request: Request) -> None:
        """Takes back all blocks of a sequence, and what was reserved for it."""
        self._pool.release(request.block_ids)
        self._num_reserved -= request.num_reserved_blocks
        request.block_ids = []
        request.num_reserved_blocks = 0
        request.num_recorded_blocks = 0

    def record(self, request: Request, num_tokens: int) -> None:
        """Lets others find the full blocks among a sequence's first tokens.

        The caller vouches for their content: the steps that wrote it are committed.
        """
        full = num_tokens // self._block_size
        if not self._caching or full <= request.num_recorded_blocks:
            return
        self._extend_prefixes(request, num_tokens)
        for index in range(request.num_recorded_blocks, full):
            self._cache.insert(request.block_ids[index], request.prefixes[index + 1])
        request.num_recorded_blocks = full

    def _extend_prefixes(self, request: Request, num_tokens: int) -> None:
        size, prefixes = self._block_size, request.prefixes
        if not prefixes:
            root = empty_prefix(request.adapter, request.cache_salt, self.revision)
            prefixes.append(root)
        for start in range((len(prefixes) - 1) * size, num_tokens - size + 1, size):
            tokens = tuple(request.token_ids[start : start + size])
            prefixes.append(longer_prefix(prefixes[-1], tokens))

    def forget_content(self) -> None:
        """Empties the prefix cache; no block may be in use."""
        self._pool.evict_all()

    def check_integrity(self, running: Iterable[Request]) -> None:
        """Raises AssertionError unless pool, cache, tables and reservations agree."""
        requests = list(running)
        self._pool.check_integrity([request.block_ids for request in requests])
        reserved = sum(request.num_reserved_blocks for request in requests)
        assert self._num_reserved == reserved, "reservations differ from their sum"
        assert 0 <= self._num_reserved <= self._pool.num_free, "reserved in excess"
