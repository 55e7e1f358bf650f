"""Decides what each step computes; no arrays, no device, no clock.

There are no phases: a sequence has computed some of its tokens and must catch up with
the rest, under one budget of tokens per step. Chunks of prompts, single tokens, hits in
the prefix cache and preempted sequences are all this one case.

Sequences take turns by priority, then arrival: first those that run, then those that
wait, none overtaking. Whoever computes a single token gets it before the chunks share
what is left of the budget, so that no prompt delays an output. When the pool is
exhausted, the last of the running gives up its blocks and waits again, which may be the
one that asked.

A sequence is preempted `max_preemptions` times at most. From then on it is immune: it
starts only when all blocks that it can ever need are free, and these are reserved for
it. This rules out a deadlock. An immune sequence never asks for a block in vain. Any
other that does is at last preempted itself, so that none holds blocks while it waits
for more; as preemptions are bounded, the running ones end. Then the head of the queue
starts, at the latest in an empty pool: a sequence too long for that was refused.

`schedule` may be called while one earlier plan is not committed, and in a pipeline one
for each stage. The device executes plans in order, so blocks and rows can be given away
as soon as their owner has ended.

In a pipeline a plan comes out `num_stages` steps after it went in. While any are on
their way a step without rows moves them on. Who is preempted on the way does not wait
for its token: it computes it again, and draws the same.
"""

import collections
import heapq
from collections.abc import Collection, Iterator, Sequence
from operator import attrgetter

from jllm.config import SchedulerConfig
from jllm.scheduler.block_pool import BlockPool
from jllm.scheduler.block_tables import BlockTables, Match
from jllm.scheduler.decoding import DecodingSequences
from jllm.scheduler.draft import Draft
from jllm.scheduler.launched import LaunchedStep, SequenceUpdate, StepUpdates
from jllm.scheduler.plan import NO_DECODE_ROWS, StepPlan
from jllm.scheduler.request import Request, RequestStatus
from jllm.scheduler.sequences import Sequences
from jllm.types import FinishReason


class Scheduler:
    """Owns all sequences, the block pool and the prefix cache."""

    def __init__(self, config: SchedulerConfig) -> None:
        """Starts idle."""
        self._config = config
        self._tables = BlockTables(config)
        self._sequences = Sequences(config.max_num_seqs)
        self._decoding = DecodingSequences(
            config.max_num_seqs,
            config.block_size,
            len(config.window_pools),
            config.num_stages,
        )
        self._launched: collections.deque[LaunchedStep] = collections.deque()
        self._num_steps = 0
        self._num_preemptions = 0
        self._num_prefix_queries = 0
        self._num_prefix_hits = 0

    # --- requests in and out -------------------------------------------------

    def add(self, request: Request) -> None:
        """Queues a sequence.

        Raises:
            InvalidRequestError: The prompt is empty, or the sequence id is in use.
            ContextTooLongError: It could never fit in the context or in the pool.
        """
        request.fit_context(self._config.max_model_len)
        self._tables.require_room(request)
        self._tables.prepare(request)
        self._sequences.add(request)

    def abort(self, request_id: str) -> list[Request]:
        """Ends all sequences of a request; returns those that had not ended before."""
        aborted = self._sequences.of_request(request_id)
        for request in aborted:
            self._finish(request, "abort")
        return aborted

    def abort_sequence(self, request: Request) -> None:
        """Ends one sequence; without effect if it has ended."""
        if not request.is_finished:
            self._finish(request, "abort")

    def preempt(self, request: Request) -> bool:
        """Takes row and blocks from a running sequence, which waits again.

        Returns:
            Whether it was done: not to a sequence that is immune or does not run.
        """
        immune = self._is_immune(request)
        if immune or request.status is not RequestStatus.RUNNING:
            return False
        self._release(request)
        if self._config.num_stages > 1:
            request.num_pending = 0
        self._sequences.preempt(request)
        self._num_preemptions += 1
        return True

    def _finish(self, request: Request, reason: FinishReason) -> None:
        self._release(request)
        self._sequences.finish(request, reason)

    def _release(self, request: Request) -> None:
        if request.first_sample_step:
            self._decoding.remove(request)
        self._tables.release(request)

    # --- planning ------------------------------------------------------------

    def schedule(self, token_limit: int | None = None) -> StepPlan | None:
        """Plans the next step, which the caller must launch and later commit.

        Args:
            token_limit: Most tokens, if fewer than the budget; at least one per row.

        Returns:
            The plan, or None if nothing can be computed before the next commit. One
            without rows moves a pipeline on, and is not committed.
        """
        num_stages = self._config.num_stages
        assert len(self._launched) <= num_stages, "too many plans await their commit"
        draft = Draft(self._config, self._num_steps + 1, token_limit)
        num_preemptions = self._num_preemptions
        self._schedule_running(draft)
        if self._num_preemptions == num_preemptions:
            self._schedule_waiting(draft)
        for parent in draft.first_samples:
            self._sequences.queue_forks(parent)
            self._decoding.add(parent, draft.step)
        self._tables.end_step()
        if (plan := draft.plan()) is not None:
            self._num_steps = plan.step
            self._launched.append(LaunchedStep.of(plan, draft.requests, num_stages))
        elif self._launched and draft.step - self._launched[-1].plan.step < num_stages:
            self._num_steps = draft.step
            return StepPlan(draft.step, NO_DECODE_ROWS, (), 0)
        return plan

    def _schedule_running(self, draft: Draft) -> None:
        """Blocks are given in the order of turns, tokens to single ones first."""
        due = self._decoding.due(draft.tokens_left, draft.step)
        for request in self._in_turn(due.lacking):
            if request.row < 0:
                continue  # preempted by one before it
            if not request.first_sample_step:
                self._schedule_chunk(request, draft, due.num_tokens)
            elif draft.appends_left:
                length = self._decoding.num_computed_tokens(request) + 1
                if blocks := self._grow(request, length):
                    self._decoding.append_block(request, blocks[0])
                    draft.appends_left -= 1
        limit = min(due.num_tokens, draft.tokens_left)
        planned = self._decoding.advance(limit, draft.step)
        if planned is not None:
            draft.set_decoding(*planned)

    def _in_turn(self, lacking: list[Request]) -> Iterator[Request]:
        """Those that lack a block, and those with chunks, in the order of turns."""
        running = self._sequences.running
        if len(running) == len(self._decoding):
            return iter(lacking)
        chunks = [request for request in running if not request.first_sample_step]
        return heapq.merge(lacking, chunks, key=attrgetter("order"))

    def _schedule_chunk(self, request: Request, draft: Draft, num_due: int) -> None:
        """Plans a part of what a sequence must catch up with.

        Args:
            request: A running sequence that has not sampled.
            draft: The plan.
            num_due: Tokens of the budget that are kept for single ones.
        """
        block_size = self._config.block_size
        position = request.num_computed_tokens
        count = min(request.num_tokens - position, draft.tokens_left - num_due)
        new_blocks: tuple[int, ...] = ()
        room = len(request.block_ids) * block_size - position
        if count > room:
            count = min(count, room + draft.appends_left * block_size)
            new_blocks = self._grow(request, position + count)
        if count > 0 and request.row >= 0:
            draft.add_chunk(request, count, new_blocks)

    def _grow(self, request: Request, num_tokens: int) -> tuple[int, ...]:
        """Appends blocks until the table holds so many tokens; returns them.

        Preempts others if need be, at last the request itself. Whoever is preempted
        comes after the request, or is it, and so has no row in the draft yet.
        """
        while request.row >= 0:
            blocks = self._tables.grow(request, num_tokens)
            if blocks is not None:
                return blocks
            # The request is a victim itself, or immune; then it does not get here.
            next(v for v in reversed(self._sequences.running) if self.preempt(v))
        return ()

    def _schedule_waiting(self, draft: Draft) -> None:
        while draft.tokens_left and self._sequences.has_free_row:
            request = self._sequences.next_waiting()
            # A preempted sequence resumes once the token in flight is known.
            if request is None or request.num_pending:
                return
            match = self._find_match(request, draft)
            if match is None or not self._start(request, match, draft):
                return

    def _find_match(self, request: Request, draft: Draft) -> Match | None:
        """Finds what to share; None if the step has no room for so long a table."""
        match = self._match(request, draft)
        if len(match.blocks) >= draft.appends_left:
            # Whoever starts first in a step takes what there is; others can wait.
            if draft.num_starts or not draft.appends_left:
                return None
            return self._tables.cut(request, match, draft.appends_left - 1)
        return match if match.source is None or draft.copies_left else None

    def _match(self, request: Request, draft: Draft) -> Match:
        parent, tables = request.fork_of, self._tables
        if self._is_immune(request) and not tables.shares_reserved:
            return tables.no_match
        match = None
        # Blocks of the parent that this very step writes cannot be copied in it.
        if (
            parent is not None
            and not request.num_preemptions
            and 0 < parent.first_sample_step < draft.step
        ):
            match = tables.match_fork(request, parent)
        return match or tables.match(request)

    def _is_immune(self, request: Request) -> bool:
        return request.num_preemptions >= self._config.max_preemptions

    def _start(self, request: Request, match: Match, draft: Draft) -> bool:
        """Starts the sequence at the head of the queue, if the pool has room for it."""
        tables = self._tables
        immune = self._is_immune(request)
        length = request.max_length
        if not immune:
            length = min(length, request.num_tokens + 1)
        table_length = tables.num_blocks_for(length)
        others_run = bool(self._sequences.running)
        if match.source is not None and not tables.admits(
            match, table_length, leaves_spare=others_run
        ):
            # Computed again rather than copied, which needs a block more for a step.
            match = tables.cut(request, match, len(match.blocks))
        if not tables.admits(match, table_length, leaves_spare=others_run):
            return False
        self._count_hits(request, match)
        tables.start(request, match)
        if immune:
            tables.reserve(request, table_length)
        self._sequences.start_next()
        position, size = match.num_tokens, self._config.block_size
        count = min(
            request.num_tokens - position,
            draft.tokens_left,
            draft.appends_left * size - position,
        )
        tables.grow(request, position + count)
        draft.add_start(request, count, match)
        return True

    def _count_hits(self, request: Request, match: Match) -> None:
        if request.num_preemptions:
            return
        request.num_cached_tokens = min(match.num_tokens, request.num_prompt_tokens)
        self._num_prefix_queries += request.num_prompt_tokens
        self._num_prefix_hits += request.num_cached_tokens

    # --- results -------------------------------------------------------------

    def requests_of(self, plan: StepPlan) -> Sequence[Request]:
        """The sequences of the rows of the newest plan, in their order."""
        launched = self._launched[-1]
        assert launched.plan is plan, "another step has been planned since"
        return launched.requests

    def lost_rows(self, plan: StepPlan) -> frozenset[int]:
        """Places in the oldest plan not yet committed whose tokens will not be taken.

        Only in a pipeline: their sequences were preempted, and compute them again.
        """
        assert self._launched[0].plan is plan, "plans are committed in order"
        return self._launched[0].lost

    def commit(
        self,
        plan: StepPlan,
        token_ids: Sequence[int],
        failed: Collection[int] = (),
        complete: Collection[int] = (),
    ) -> StepUpdates:
        """Takes in what the device computed for the oldest plan not yet committed.

        Args:
            plan: That plan.
            token_ids: The sampled token of each of its rows, anything for a row that
                does not sample.
            failed: Places of the rows whose scores are not finite, or whose grammar
                could not go on.
            complete: Places of the rows whose grammar allows nothing after the token.

        Returns:
            What became of each sequence that got a token or ended. Those that had ended
            before are left out.
        """
        launched = self._launched.popleft()
        assert launched.plan is plan, "plans are committed in the order of their launch"
        lost = launched.lost
        useless = [*failed, *lost]
        for request, length in launched.computed(self._config.block_size, useless):
            self._tables.commit(request, length)
        may_end = launched.may_end([*useless, *complete])
        is_running = RequestStatus.RUNNING
        looked_at: list[int] = []
        # Runs for every row of every step: plain code, few calls.
        for index, (request, token, may) in enumerate(
            zip(launched.requests, token_ids, may_end, strict=True)
        ):
            goes_on = not may and request.status is is_running
            if goes_on and token not in request.stop_token_ids:
                request.token_ids.append(token)
            else:
                looked_at.append(index)
        updates: list[SequenceUpdate] = []
        for index in looked_at:
            request, token = launched.requests[index], token_ids[index]
            if request.is_finished or index in lost:
                continue
            if index in failed:
                self._finish(request, "error")
                updates.append(SequenceUpdate(request, index, None, "error"))
            elif launched.samples(index):
                reason = self._take_token(request, token, is_complete=index in complete)
                updates.append(SequenceUpdate(request, index, token, reason))
        return launched.updates(token_ids, updates, looked_at)

    def _take_token(
        self, request: Request, token: int, *, is_complete: bool
    ) -> FinishReason | None:
        """Appends a token and ends the sequence if it is the last; returns why."""
        request.token_ids.append(token)
        if request.status is RequestStatus.PREEMPTED:
            request.num_pending -= 1
        reason = request.reason_to_end(is_complete=is_complete)
        if reason is not None:
            self._finish(request, reason)
        return reason

    # --- state, to be looked at ----------------------------------------------

    @property
    def num_running(self) -> int:
        """Sequences that have a row."""
        return len(self._sequences.running)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for a row, preempted ones and forks included."""
        return len(self._sequences) - self.num_running

    @property
    def has_unfinished(self) -> bool:
        """Whether any sequence has not ended."""
        return len(self._sequences) > 0

    def get(self, sequence_id: int) -> Request:
        """Finds a sequence that has not ended; raises KeyError for others."""
        return self._sequences.get(sequence_id)

    @property
    def running(self) -> Sequence[Request]:
        """The running sequences, in the order of their turn."""
        return self._sequences.running

    def num_pending(self, request: Request) -> int:
        """Sampled tokens of a sequence whose values have not reached the host."""
        if request.first_sample_step:
            return self._decoding.num_pending(request)
        return request.num_pending

    def num_computed_tokens(self, request: Request) -> int:
        """Tokens of a sequence whose KV has been computed or is being computed."""
        if request.first_sample_step:
            return self._decoding.num_computed_tokens(request)
        return request.num_computed_tokens

    @property
    def pool(self) -> BlockPool:
        """The block pool of the layers that see the whole context."""
        return self._tables.groups[0].pool

    @property
    def pools(self) -> tuple[BlockPool, ...]:
        """The block pool of each cache group."""
        return tuple(group.pool for group in self._tables.groups)

    @property
    def config(self) -> SchedulerConfig:
        """Its sizes."""
        return self._config

    @property
    def num_free_blocks(self) -> int:
        """Blocks of `pool` in no table, cached ones included."""
        return self.pool.num_free

    @property
    def num_preemptions(self) -> int:
        """Preemptions so far."""
        return self._num_preemptions

    @property
    def num_prefix_queries(self) -> int:
        """Prompt tokens looked up in the prefix cache so far."""
        return self._num_prefix_queries

    @property
    def num_prefix_hits(self) -> int:
        """Prompt tokens found there so far, those shared by forks included."""
        return self._num_prefix_hits

    def reset_prefix_cache(self) -> bool:
        """Forgets the content of all blocks; refuses while any sequence runs."""
        if self._sequences.running:
            return False
        self._tables.forget_content()
        return True

    def start_revision(self) -> None:
        """Keeps what is computed from now on apart from what was cached before."""
        self._tables.revision += 1

    def check_integrity(self) -> None:
        """Raises AssertionError unless all parts of the state agree."""
        self._tables.check_integrity(self._sequences.running)
        self._sequences.check_integrity()
        self._decoding.check_integrity(self._sequences.running)
