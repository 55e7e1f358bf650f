"""The tokens of one step, as models and attention layers take them."""

import dataclasses

import jax
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
