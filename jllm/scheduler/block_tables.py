"""Gives sequences their blocks: found in the cache, shared by a fork, or new ones."""

import dataclasses
from collections.abc import Iterable, Sequence

from jllm.config import SchedulerConfig
from jllm.errors import ContextTooLongError
from jllm.scheduler.block_manager import BlockManager, BlockTable
from jllm.scheduler.plan import NO_BLOCK
from jllm.scheduler.prefix_cache import empty_prefix, longer_prefix
from jllm.scheduler.request import Request


@dataclasses.dataclass(frozen=True, slots=True)
class Match:
    """What of a sequence's context lies in the pool already.

    Attributes:
        blocks: Blocks it shares, the first ones of its table.
        num_tokens: Tokens it need not compute.
        source: Block whose start holds the rest of `num_tokens`; it must be copied,
            because the sequence will write to it and others read it.
        windows: The same in the groups with a window, as many blocks in each; those
            before the window are `NO_BLOCK`.
    """

    blocks: Sequence[int] = ()
    num_tokens: int = 0
    source: int | None = None
    windows: "tuple[Match, ...]" = ()


SPARE_SHARE = 100
"""While others run, a start leaves one block in so many free for them to grow into."""


class BlockTables:
    """Changes the block tables of requests, in all cache groups at once.

    Group 0 is that of the layers that see the whole context; it decides how long a
    table is, and which prefixes there are. Some blocks may be reserved for a sequence:
    they are still free in the pool, but only that sequence can take them.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        """Starts with empty pools."""
        self._block_size = config.block_size
        self._caching = config.enable_prefix_caching
        full = BlockManager(config.num_blocks, config.block_size)
        # A sequence may have all tokens of all steps that are not committed.
        under_way = (config.num_stages + 1) * config.token_budget
        self._windows = tuple(
            BlockManager(pool.num_blocks, config.block_size, pool.window, under_way)
            for pool in config.window_pools
        )
        self._full = full
        self._groups = (full, *self._windows)
        self.no_match = Match(windows=(Match(),) * len(self._windows))
        self.revision = 0
        """Number of the weights; blocks are shared only under the same one."""

    @property
    def groups(self) -> tuple[BlockManager, ...]:
        """The manager of each group, to be looked at."""
        return self._groups

    @property
    def shares_reserved(self) -> bool:
        """Whether a sequence with reservations shares blocks; see `BlockManager`."""
        return not self._windows

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return -(-num_tokens // self._block_size)

    def require_room(self, request: Request) -> None:
        """Raises ContextTooLongError if a pool could never hold a sequence."""
        needed = self.num_blocks_for(request.max_length)
        for group in self._groups:
            held, num_blocks = group.most_held(needed), group.pool.num_blocks
            if held > num_blocks:
                raise ContextTooLongError(
                    f"a prompt of {request.num_prompt_tokens} tokens and max_tokens="
                    f"{request.max_tokens} need {held} KV blocks of {self._block_size} "
                    f"tokens{group.label}, but the pool has {num_blocks}",
                    parameter="max_tokens",
                )

    def prepare(self, request: Request) -> None:
        """Gives a new sequence an empty table per group; it was made with one."""
        request.tables = tuple(BlockTable() for _ in self._groups)

    def match(self, request: Request, most_blocks: int | None = None) -> Match:
        """Finds the longest start of a waiting sequence that the cache holds.

        At least one token is left to compute, whose logits give the next one. Where
        that token lies inside the last block found, this block is to be copied.

        Args:
            request: The sequence.
            most_blocks: Most blocks that it may share.
        """
        limit = request.max_cached_tokens
        if not self._caching or limit == 0:
            return self.no_match
        blocks: list[int] = []
        if request.prefixes and request.prefixes[0].namespace[-1] != self.revision:
            request.prefixes = []
        self._extend_prefixes(request, request.num_tokens)
        prefixes = request.prefixes
        for index in range(1, len(prefixes)):
            found = self._full.cache.find(prefixes[index])
            if found is None:
                break
            block, prefixes[index] = found
            blocks.append(block)
        if most_blocks is not None:
            del blocks[most_blocks:]
        length = request.num_tokens
        if limit is not None:
            length = min(length, limit + 1)
        if not self._windows:
            return self._leave_last_token(blocks, length)
        return self._match_windows(request, blocks, length)

    def _match_windows(
        self, request: Request, blocks: list[int], num_tokens: int
    ) -> Match:
        """Cuts a match to the longest one whose last window all groups hold.

        From the long end: a group has no use for blocks before its window.
        """
        last, prefixes = num_tokens - 1, request.prefixes
        count, firsts = min(len(blocks), last // self._block_size + 1), [0]
        while count:
            position = min(count * self._block_size, last)
            firsts = [group.first_needed(position) for group in self._windows]
            missing = [
                group.last_missing(prefixes, first, count)
                for group, first in zip(self._windows, firsts, strict=True)
            ]
            if max(missing) < 0:
                break
            count = min(index for index in missing if index >= 0)
        if not count:
            return self.no_match
        tables = [blocks[:count]] + [
            group.find(prefixes, first, count)
            for group, first in zip(self._windows, firsts, strict=True)
        ]
        return self._join(tables, num_tokens)

    def match_fork(self, request: Request, parent: Request) -> Match | None:
        """Matches the prompt with its copy in the tables of a running sequence.

        Returns:
            What to share; None if the parent has given back, or keeps for itself,
            blocks of a group with a window.
        """
        last = request.num_prompt_tokens - 1
        count = last // self._block_size
        parts: list[list[int]] = []
        for group, table in zip(self._groups, parent.tables, strict=True):
            first = group.first_needed(last)
            if self._windows and (table.is_reserving or table.num_passed > first):
                return None
            own = table.blocks[first : count + 1]
            parts.append([NO_BLOCK] * first + own if first else own)
        request.prefixes = parent.prefixes[: count + 1]
        return self._join(parts, last + 1)

    def _join(self, tables: Sequence[list[int]], num_tokens: int) -> Match:
        full, *others = [self._leave_last_token(each, num_tokens) for each in tables]
        return dataclasses.replace(full, windows=tuple(others)) if others else full

    def _leave_last_token(self, blocks: list[int], num_tokens: int) -> Match:
        last = num_tokens - 1
        count, rest = divmod(last, self._block_size)
        if len(blocks) <= count:
            return Match(blocks, len(blocks) * self._block_size)
        source = blocks[count] if rest else None
        return Match(blocks[:count], last, source)

    def cut(self, request: Request, match: Match, count: int) -> Match:
        """A match of so many blocks at most, and without a copy."""
        if self._windows:  # A shorter one needs other blocks.
            return self.match(request, count)
        return Match(match.blocks[:count], count * self._block_size)

    def admits(self, match: Match, table_length: int, *, leaves_spare: bool) -> bool:
        """Whether a sequence can start.

        Args:
            match: What it shares; sharing an evictable block takes it from the others,
                and so does holding one for a copy.
            table_length: Blocks that it must be able to hold in all.
            leaves_spare: Whether some blocks must be left for the others.
        """
        for group, part in zip(self._groups, (match, *match.windows), strict=True):
            spare = group.pool.num_blocks // SPARE_SHARE if leaves_spare else 0
            if not group.admits(part.blocks, part.source, table_length, spare):
                return False
        return True

    def start(self, request: Request, match: Match) -> None:
        """Puts the shared blocks into the tables of a sequence.

        The source of a copy is held until `end_step`.
        """
        parts = (match, *match.windows)
        for group, table, part in zip(self._groups, request.tables, parts, strict=True):
            group.start(table, part.blocks, part.source)
        request.num_computed_tokens = match.num_tokens
        if self._caching:
            # The root of its prefixes: that of the weights it starts with.
            self._extend_prefixes(request, 0)

    def end_step(self) -> None:
        """Lets go of the blocks that no copy of the step may have as a target."""
        for group in self._groups:
            group.end_step()

    def reserve(self, request: Request, table_length: int) -> None:
        """Sets blocks aside that the sequence will take in later steps."""
        for group, table in zip(self._groups, request.tables, strict=True):
            group.reserve(table, table_length)

    def grow(self, request: Request, num_tokens: int) -> tuple[int, ...] | None:
        """Appends new blocks until the tables hold so many tokens.

        Returns:
            The new blocks of group 0, and each other group has as many; None, and
            nothing is changed, if there are too few.
        """
        first = request.tables[0]
        count = -(-num_tokens // self._block_size) - len(first.blocks)
        if self._full.lacks(first, count):
            return None
        if self._windows and not self._grow_windows(request, count):
            return None
        return tuple(self._full.take(first, count))

    def _grow_windows(self, request: Request, count: int) -> bool:
        groups = tuple(zip(self._windows, request.tables[1:], strict=True))
        if any(group.lacks(table, count) for group, table in groups):
            return False
        for group, table in groups:
            group.take(table, count)
        return True

    def release(self, request: Request) -> None:
        """Takes back all blocks of a sequence, and what was reserved for it."""
        for group, table in zip(self._groups, request.tables, strict=True):
            group.release(table)

    def commit(self, request: Request, num_tokens: int) -> None:
        """Notes that the steps which wrote a sequence's first tokens are complete.

        Others can find the full blocks among them, and those that no later token sees
        go back to the pool.
        """
        first, num_full = request.tables[0], num_tokens // self._block_size
        if self._caching and num_full > first.num_recorded:
            self._extend_prefixes(request, num_tokens)
            self._full.record(first, request.prefixes, num_full)
        if self._windows:
            self._commit_windows(request, num_tokens)

    def _commit_windows(self, request: Request, num_tokens: int) -> None:
        num_full = request.tables[0].num_recorded
        for group, table in zip(self._windows, request.tables[1:], strict=True):
            group.record(table, request.prefixes, num_full)
            group.pass_by(table, num_tokens)

    def _extend_prefixes(self, request: Request, num_tokens: int) -> None:
        size, prefixes = self._block_size, request.prefixes
        if not prefixes:
            root = empty_prefix(request.adapter, request.cache_salt, self.revision)
            prefixes.append(root)
        for start in range((len(prefixes) - 1) * size, num_tokens - size + 1, size):
            tokens = tuple(request.token_ids[start : start + size])
            prefixes.append(longer_prefix(prefixes[-1], tokens))

    def forget_content(self) -> None:
        """Empties the prefix caches; no block may be in use."""
        for group in self._groups:
            group.pool.evict_all()

    def check_integrity(self, running: Iterable[Request]) -> None:
        """Raises AssertionError unless pools, caches, tables and reservations agree."""
        requests = list(running)
        for index, group in enumerate(self._groups):
            group.check_integrity([request.tables[index] for request in requests])
        for request in requests:
            lengths = {len(table.blocks) for table in request.tables}
            assert len(lengths) == 1, "tables of one sequence differ in length"
