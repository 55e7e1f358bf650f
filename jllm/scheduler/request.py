"""One sequence on its way through the engine."""

import dataclasses
import enum
from typing import Any

from jllm.errors import ContextTooLongError, InvalidRequestError
from jllm.scheduler.block_manager import BlockTable
from jllm.scheduler.prefix_cache import Prefix
from jllm.types import FinishReason


class RequestStatus(enum.Enum):
    """Where a sequence stands; it is in exactly one state at any time."""

    WAITING = enum.auto()
    RUNNING = enum.auto()
    PREEMPTED = enum.auto()
    """Waiting again, after it lost its row and its blocks."""
    FINISHED = enum.auto()


@dataclasses.dataclass(slots=True, eq=False, kw_only=True)
class Request:
    """One sequence: its tokens, limits and place on the device.

    A request for `n` sequences is `n` objects with one `request_id`; those with an
    index of 1 or more name the first as `fork_of` and share the blocks of its prompt.
    Only the scheduler changes a request once it has been added.

    Attributes:
        sequence_id: Number of the sequence, unique within the engine.
        request_id: Id of the request it belongs to.
        index: Which of the request's sequences, counted from 0.
        prompt_token_ids: The prompt.
        max_tokens: Most tokens generated; the context's length may lower it.
        min_tokens: No stop token ends the sequence before this many.
        stop_token_ids: Tokens that end it, the model's own included.
        priority: Lower numbers go first.
        arrival: Counter; among equal priorities the earlier goes first.
        cache_salt: Blocks are shared only among requests of equal salt.
        adapter: Blocks are shared only among requests of equal adapter.
        max_cached_tokens: Most tokens taken from the prefix cache, None for as many as
            it has; prompt logprobs and pooling need the others computed.
        fork_of: Sequence 0 of the same request.
        payload: Anything the caller wants to find again.
        key: Request id and index.
        token_ids: Prompt and output as far as the host knows them.
        num_computed_tokens: Tokens whose KV has been computed or is being computed,
            until it samples; from then on see `Scheduler.num_computed_tokens`.
        num_pending: Tokens sampled before it was preempted whose values have not
            reached the host; while it runs see `Scheduler.num_pending`.
        row: Row of the device table, -1 without one.
        tables: Block table of each cache group.
        num_preemptions: How often it was preempted.
        num_cached_tokens: Prompt tokens found in the prefix cache at the first start.
        status: Where it stands.
        finish_reason: Set once, at the end.
        stop_reason: The stop token that ended it.
        first_sample_step: Step that sampled first since it got its row; 0 before. From
            then on the last token is on the device.
        prefixes: Entry `i` describes the first `i` full blocks; grows with the tokens.
    """

    sequence_id: int
    request_id: str
    index: int
    prompt_token_ids: tuple[int, ...]
    max_tokens: int
    min_tokens: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    priority: int = 0
    arrival: int = 0
    cache_salt: str | None = None
    adapter: str | None = None
    max_cached_tokens: int | None = None
    fork_of: "Request | None" = dataclasses.field(default=None, repr=False)
    payload: Any = dataclasses.field(default=None, repr=False)

    key: tuple[str, int] = dataclasses.field(init=False, repr=False)
    token_ids: list[int] = dataclasses.field(init=False)
    num_computed_tokens: int = dataclasses.field(init=False, default=0)
    num_pending: int = dataclasses.field(init=False, default=0)
    row: int = dataclasses.field(init=False, default=-1)
    tables: tuple[BlockTable, ...] = dataclasses.field(
        init=False, default_factory=lambda: (BlockTable(),)
    )
    num_preemptions: int = dataclasses.field(init=False, default=0)
    num_cached_tokens: int = dataclasses.field(init=False, default=0)
    status: RequestStatus = dataclasses.field(init=False, default=RequestStatus.WAITING)
    finish_reason: FinishReason | None = dataclasses.field(init=False, default=None)
    stop_reason: int | None = dataclasses.field(init=False, default=None)
    first_sample_step: int = dataclasses.field(init=False, default=0)
    prefixes: list[Prefix] = dataclasses.field(
        init=False, default_factory=lambda: list[Prefix](), repr=False
    )

    def __post_init__(self) -> None:
        """Starts the list of known tokens with the prompt."""
        self.key = (self.request_id, self.index)
        self.token_ids = list(self.prompt_token_ids)

    @property
    def order(self) -> tuple[int, int, int]:
        """Sort key of its turn: priority, then arrival; unique."""
        return self.priority, self.arrival, self.sequence_id

    @property
    def block_ids(self) -> list[int]:
        """Block table of the layers that see the whole context."""
        return self.tables[0].blocks

    @property
    def num_reserved_blocks(self) -> int:
        """Blocks set aside for that table that it has not taken yet."""
        return self.tables[0].num_reserved

    @property
    def num_prompt_tokens(self) -> int:
        """Length of the prompt."""
        return len(self.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens known on the host, prompt and output."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Generated tokens known on the host."""
        return len(self.token_ids) - len(self.prompt_token_ids)

    @property
    def output_token_ids(self) -> list[int]:
        """Generated tokens known on the host."""
        return self.token_ids[len(self.prompt_token_ids) :]

    @property
    def max_length(self) -> int:
        """Most tokens it can ever have, prompt and output."""
        return len(self.prompt_token_ids) + self.max_tokens

    @property
    def is_finished(self) -> bool:
        """Whether it has ended, for whatever reason."""
        return self.status is RequestStatus.FINISHED

    def fit_context(self, length: int) -> None:
        """Lowers `max_tokens` to what a context of so many tokens has room for.

        Raises:
            InvalidRequestError: The prompt is empty.
            ContextTooLongError: It leaves no room for an output.
        """
        num_prompt = self.num_prompt_tokens
        if not num_prompt:
            raise InvalidRequestError("the prompt is empty", parameter="prompt")
        if num_prompt + min(1, self.max_tokens) > length:
            raise ContextTooLongError(
                f"the prompt has {num_prompt} tokens, but the context holds {length}, "
                "one of them for the output",
                parameter="prompt",
            )
        self.max_tokens = min(self.max_tokens, length - num_prompt)

    def reason_to_end(self, *, is_complete: bool) -> FinishReason | None:
        """Why the newest token ends it, None if it goes on; notes a stop token.

        Args:
            is_complete: Whether its grammar allows nothing after the token.
        """
        token, num_output = self.token_ids[-1], self.num_output_tokens
        if token in self.stop_token_ids and num_output >= self.min_tokens:
            self.stop_reason = token
            return "stop"
        if is_complete:
            return "stop"
        return "length" if num_output >= self.max_tokens else None
