"""The running sequences that have sampled: each computes one token a step."""

import enum
from bisect import bisect
from collections.abc import Sequence
from operator import attrgetter
from typing import NamedTuple

import numpy as np

from jllm.scheduler.plan import NO_BLOCK, NO_WINDOW_BLOCKS, DecodeRows
from jllm.scheduler.request import Request


class Due(NamedTuple):
    """The sequences that can compute a token now.

    Attributes:
        num_tokens: How many they are.
        lacking: Those of them whose blocks are full, in the order of their turn.
    """

    num_tokens: int
    lacking: list[Request]


class Line(enum.IntEnum):
    """Lines of the matrix of what is known of each sequence."""

    LENGTH = 0
    """Tokens known, with those that steps under way sample."""
    END = 1
    """Tokens that there is room for in the context, or that are wanted."""
    ROOM = 2
    """Tokens that its blocks hold."""
    NEW_BLOCK = 3
    """Block appended since the last step, or `NO_BLOCK`."""
    ROW = 4
    SEQUENCE_ID = 5
    READY = 6
    """First step that can read its last token, in a pipeline; unused elsewhere."""


class DecodingSequences:
    """Owns what changes in every step of a sequence that computes single tokens.

    It lies in a matrix with one column per sequence, in the order of their turn, so
    that a step is planned by a few array operations, however many sequences there are.
    Below the lines that are named it has one for each cache group with a window: the
    block appended there.

    In a pipeline a sequence takes part in one step of every `num_stages`. The steps
    get equally many of them, so that no stage is idle while another has two turns'
    worth of rows.
    """

    def __init__(
        self,
        num_rows: int,
        block_size: int,
        num_windows: int = 0,
        num_stages: int = 1,
    ) -> None:
        """Starts without sequences."""
        self._num_stages = num_stages
        self._block_size = block_size
        self._num_windows = num_windows
        self._places = [-1] * num_rows
        """By row of the device table: the sequence's place in the order of turns."""
        self._requests: list[Request] = []
        self._set(np.zeros((len(Line) + num_windows, 0), np.int64))

    def _set(self, matrix: np.ndarray) -> None:
        """Keeps what every plan shares while the sequences stay the same."""
        self._matrix = matrix
        self._rows = matrix[Line.ROW].astype(np.int32)
        self._ids = matrix[Line.SEQUENCE_ID].copy()
        self._shared = tuple(self._requests)
        for place, row in enumerate(self._rows.tolist()):
            self._places[row] = place

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self._requests)

    def add(self, request: Request, step: int) -> None:
        """Takes over a sequence whose first token is being sampled in a step."""
        column = np.full(len(self._matrix), NO_BLOCK, np.int64)
        column[Line.LENGTH] = request.num_tokens + 1
        column[Line.END] = request.max_length
        column[Line.ROOM] = len(request.block_ids) * self._block_size
        column[Line.ROW] = request.row
        column[Line.SEQUENCE_ID] = request.sequence_id
        column[Line.READY] = step + self._num_stages
        index = bisect(self._requests, request.order, key=attrgetter("order"))
        self._requests.insert(index, request)
        self._set(np.insert(self._matrix, index, column, axis=1))

    def remove(self, request: Request) -> None:
        """Gives back a sequence that is about to lose its row."""
        request.num_pending = self.num_pending(request)
        index = self._places[request.row]
        del self._requests[index]
        self._set(np.delete(self._matrix, index, axis=1))

    def append_block(self, request: Request, block: int) -> None:
        """Takes note of a block appended to each table of a sequence."""
        index = self._places[request.row]
        self._matrix[Line.ROOM, index] += self._block_size
        self._matrix[Line.NEW_BLOCK, index] = block
        if self._num_windows:
            others = [table.blocks[-1] for table in request.tables[1:]]
            self._matrix[len(Line) :, index] = others

    def num_pending(self, request: Request) -> int:
        """Tokens of a sequence that steps under way sample."""
        return self._length(request) - request.num_tokens

    def num_computed_tokens(self, request: Request) -> int:
        """Tokens of a sequence whose KV has been or is being computed."""
        return self._length(request) - 1

    def due(self, limit: int, step: int) -> Due:
        """Finds the sequences that a step can compute, at most so many."""
        lengths, ends, rooms = self._matrix[:3]
        # A full one waits for the tokens on their way, with which it ends.
        is_due, lacks = lengths < ends, lengths > rooms
        if self._num_stages > 1:
            limit = min(limit, self._share(is_due, step))
            is_due &= self._matrix[Line.READY] <= step
        count = int(np.count_nonzero(is_due))
        if count > limit:
            is_due[np.flatnonzero(is_due)[limit:]] = False
        lacking = np.flatnonzero(is_due & lacks).tolist() if lacks.any() else ()
        return Due(min(count, limit), [self._requests[index] for index in lacking])

    def advance(
        self, limit: int, step: int
    ) -> tuple[DecodeRows, Sequence[Request]] | None:
        """Plans the next token of all that are not full and have a block for it.

        Args:
            limit: Most tokens; those that `due` has found come first.
            step: Number of the step.

        Returns:
            The rows and their sequences, in the order of their turn; None without any.
        """
        if not self._requests:
            return None
        lengths, ends, rooms, blocks = self._matrix[:4]
        is_due = (lengths < ends) & (lengths <= rooms)
        if self._num_stages > 1:
            is_due &= self._matrix[Line.READY] <= step
        rows, ids, requests = self._rows, self._ids, self._shared
        where: slice | np.ndarray = slice(None)
        if len(requests) > limit or not is_due.all():
            where = np.flatnonzero(is_due)[:limit]
            rows, ids = rows[where], ids[where]
            requests = tuple(requests[index] for index in where.tolist())
        positions = (lengths[where] - 1).astype(np.int32)
        new_blocks = blocks[where].astype(np.int32)
        lengths[where] += 1
        blocks[where] = NO_BLOCK
        self._matrix[Line.READY, where] = step + self._num_stages
        window_blocks = NO_WINDOW_BLOCKS
        if self._num_windows:
            window_blocks = self._matrix[len(Line) :, where].astype(np.int32)
            self._matrix[len(Line) :, where] = NO_BLOCK
        planned = DecodeRows(
            sequence_ids=ids,
            rows=rows,
            positions=positions,
            new_blocks=new_blocks,
            are_last=lengths[where] >= ends[where],
            block_size=self._block_size,
            window_blocks=window_blocks,
        )
        return (planned, requests) if requests else None

    def _share(self, goes_on: np.ndarray, step: int) -> int:
        """Most sequences for a step of a pipeline.

        What is ready and not taken is left for the next steps that will have too few
        coming back.

        Args:
            goes_on: Which sequences are not full.
            step: Number of the step.
        """
        ready, stages = self._matrix[Line.READY], self._num_stages
        total = int(np.count_nonzero(goes_on))
        ahead = ready[goes_on] - step
        few, many = total // stages, -(-total // stages)
        coming = np.bincount(ahead[ahead > 0] - 1, minlength=stages - 1)
        missing = int(np.maximum(few - coming, 0).sum())
        num_ready = int(np.count_nonzero(ahead <= 0))
        return min(many, max(few, num_ready - missing))

    def _length(self, request: Request) -> int:
        return int(self._matrix[Line.LENGTH, self._places[request.row]])

    def check_integrity(self, running: Sequence[Request]) -> None:
        """Raises AssertionError unless the matrix agrees with the sequences."""
        sampled = [request for request in running if request.first_sample_step]
        assert self._requests == sampled, "who decodes is not who has sampled"
        for request, column in zip(sampled, self._matrix.T.tolist(), strict=True):
            room = len(request.block_ids) * self._block_size
            identity = [request.row, request.sequence_id]
            windows = [NO_BLOCK] * self._num_windows
            expected = [request.max_length, room, NO_BLOCK, *identity, *windows]
            del column[Line.READY]
            assert column[1:] == expected
            assert 0 <= self.num_pending(request) <= 2
