"""The tokens of one step, as models and attention layers take them."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Int

from jllm.layers.kernels import TileTable


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WindowTables:
    """Where the tokens of a step lie in the pools of the layers with one window.

    Attributes:
        slots: As in `Batch`.
        block_tables: As in `Batch`, right for the blocks that the step's tokens see.
    """

    slots: Int[Array, " T"]
    block_tables: Int[Array, "S M"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """The tokens of one step, packed row after row.

    Tokens of row `s` are `row_starts[s] : row_starts[s + 1]`; they are the last ones of
    its context, so that the query at place `i` of the row sees keys up to and including
    its own position. Padding tokens lie past `row_starts[-1]`.

    Attributes:
        tokens: Token ids.
        positions: Position of each token in its own sequence.
        slots: Where each token's key and value go, `block * block_size + place`; a slot
            outside the pool is not written. All slots are distinct.
        block_tables: Pool block of each run of `block_size` positions of each row.
        row_starts: First token of each row in the packed order, then their number.
        lengths: Tokens of each row in the cache after this step; zero for unused rows.
        tiles: The tokens cut for the attention kernel, as the model's `tile_layout`
            says; None leaves that to the kernel.
        windows: The same slots and tables in the other cache groups of the model; none
            where all layers keep the whole context, whatever they see of it.
        is_decode: Whether every row has exactly one token, token `s` that of row `s`.
    """

    tokens: Int[Array, " T"]
    positions: Int[Array, " T"]
    slots: Int[Array, " T"]
    block_tables: Int[Array, "S M"]
    row_starts: Int[Array, " S+1"]
    lengths: Int[Array, " S"]
    tiles: TileTable | None = None
    windows: tuple[WindowTables, ...] = ()
    is_decode: bool = dataclasses.field(default=False, metadata={"static": True})

    def of_group(self, group: int) -> "Batch":
        """The step as the layers of a cache group see it."""
        if not self.windows:
            return self
        if not group:
            return dataclasses.replace(self, windows=())
        tables = self.windows[group - 1]
        return dataclasses.replace(
            self, slots=tables.slots, block_tables=tables.block_tables, windows=()
        )

    @classmethod
    def from_prompts(
        cls,
        prompts: Sequence[Sequence[int]],
        *,
        num_cached: Sequence[int] | None = None,
        max_len: int | None = None,
        block_size: int = 16,
    ) -> "Batch":
        """New tokens of some sequences, each with blocks of its own in the cache.

        Sequence `s` has blocks `s * M` and on, `M = ceil(max_len / block_size)`, so
        that `model.init_kv(len(prompts) * M, block_size)` has room for all.

        Args:
            prompts: The tokens, at least one for each sequence.
            num_cached: Tokens of each that are in the cache already; None for none. A
                greedy loop gives each drawn token here as a prompt of its own.
            max_len: Tokens for which a sequence has blocks; None for as many as there
                are now. Calls for the same cache give the same number.
            block_size: Places per block of the cache.

        Raises:
            ValueError: An argument is out of its bounds.
        """
        num_cached = [0] * len(prompts) if num_cached is None else num_cached
        counts = [len(prompt) for prompt in prompts]
        _check_prompts(counts, num_cached, block_size)
        lengths = np.add(counts, num_cached).astype(np.int32)
        longest = int(lengths.max())
        max_len = longest if max_len is None else max_len
        if longest > max_len:
            raise ValueError(
                f"max_len={max_len} must be at least {longest}, the longest"
            )
        num_blocks = -(-max_len // block_size)
        blocks = np.arange(len(prompts) * num_blocks, dtype=np.int32)
        positions = np.concatenate(
            [np.arange(n, n + c) for n, c in zip(num_cached, counts, strict=True)]
        ).astype(np.int32)
        rows = np.repeat(np.arange(len(prompts), dtype=np.int32), counts)
        return cls(
            tokens=jnp.asarray(
                np.concatenate([np.asarray(p) for p in prompts]), jnp.int32
            ),
            positions=jnp.asarray(positions),
            slots=jnp.asarray(rows * (num_blocks * block_size) + positions),
            block_tables=jnp.asarray(blocks.reshape(len(prompts), num_blocks)),
            row_starts=jnp.asarray(np.cumsum([0, *counts]), jnp.int32),
            lengths=jnp.asarray(lengths),
            is_decode=all(count == 1 for count in counts),
        )


def _check_prompts(
    counts: Sequence[int], num_cached: Sequence[int], block_size: int
) -> None:
    if not counts or min(counts) < 1:
        raise ValueError(
            f"prompts have {list(counts)} tokens, expected at least one each"
        )
    if len(num_cached) != len(counts) or min(num_cached) < 0:
        raise ValueError(
            f"num_cached={list(num_cached)} must be {len(counts)} numbers from 0 on"
        )
    if block_size < 1:
        raise ValueError(f"block_size={block_size} must be at least 1")
