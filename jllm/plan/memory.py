"""What one replica takes of each device's memory, and how many requests it holds."""

import dataclasses
import math

from jllm.engine.startup import StartPlan

CONTEXTS = (2048, 8192, 32768)
"""Lengths, in tokens, for which concurrent requests are counted."""


@dataclasses.dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Bytes on one device, and the pool that they allow.

    Attributes:
        capacity: Memory that programs can have.
        allowed: The share of it that the engine takes.
        weights: Weights.
        pool: KV pools, with the token history.
        temporaries: Largest scratch memory of any program, and its results.
        missing: Bytes beyond what is allowed; 0 where the model fits.
        num_blocks: Blocks of the pool.
        block_size: Tokens of a block.
        max_num_seqs: Rows of the engine's table.
        max_model_len: Longest context in tokens.
    """

    capacity: int
    allowed: int
    weights: int
    pool: int
    temporaries: int
    missing: int
    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_model_len: int

    @property
    def fits(self) -> bool:
        """Whether the engine would start."""
        return self.missing == 0

    def requests(self, num_tokens: int) -> int | None:
        """Requests of so many tokens that run at once; None if they are too long."""
        if num_tokens > self.max_model_len:
            return None
        blocks = math.ceil(num_tokens / self.block_size)
        return min(self.max_num_seqs, self.num_blocks // blocks)


def device_memory(
    start: StartPlan, temporaries: int, most_blocks: int | None = None
) -> DeviceMemory:
    """The memory of one device by the engine's own rule.

    Args:
        start: What is known of the replica.
        temporaries: Bytes that its largest program needs beside its arguments.
        most_blocks: The pool that was compiled for, which does not grow any more.
    """
    budget, resolved, config = start.budget(temporaries), start.resolved, start.config
    size = resolved.block_size
    # A context that was asked for must fit the pool; another one is cut to it.
    least = config.num_blocks or max(1, math.ceil((config.max_model_len or 1) / size))
    num_blocks = config.num_blocks or budget.num_blocks
    if most_blocks is not None:
        num_blocks = min(num_blocks, most_blocks)
    allowed = int(budget.capacity * budget.utilization)
    needed = budget.weights + temporaries + budget.pool_bytes(least)
    return DeviceMemory(
        capacity=budget.capacity,
        allowed=allowed,
        weights=budget.weights,
        pool=budget.pool_bytes(num_blocks),
        temporaries=temporaries,
        missing=max(0, needed - allowed),
        num_blocks=num_blocks,
        block_size=size,
        max_num_seqs=resolved.max_num_seqs,
        max_model_len=min(resolved.max_model_len, num_blocks * size),
    )
