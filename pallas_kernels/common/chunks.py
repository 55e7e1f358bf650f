"""The chunk table: runs of packed tokens, none of which crosses two sequences."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Int


class ChunkTable(NamedTuple):
    """Runs of at most `size` tokens that cover each sequence, in token order.

    Attributes:
        rows: Sequence of each chunk; that of the last used one for unused chunks.
        first_tokens: Place of its first token in the packed order.
        num_tokens: Its tokens; zero for unused chunks.
        is_first: One where a sequence begins, else zero.
        offsets: First chunk of each sequence.
    """

    rows: Int[Array, " N"]
    first_tokens: Int[Array, " N"]
    num_tokens: Int[Array, " N"]
    is_first: Int[Array, " N"]
    offsets: Int[Array, " S"]


def make_chunks(row_starts: Int[Array, " R"], num_tokens: int, size: int) -> ChunkTable:
    """Cuts each sequence's tokens into chunks; used chunks come first."""
    row_starts = jnp.asarray(row_starts)
    num_rows = row_starts.shape[0] - 1
    max_chunks = -(-num_tokens // size) + num_rows
    per_row = -(-jnp.diff(row_starts) // size)
    ends = jnp.cumsum(per_row)
    chunks = jnp.arange(max_chunks, dtype=jnp.int32)
    used = jnp.minimum(chunks, jnp.maximum(ends[-1] - 1, 0))
    rows = jnp.sum(used[:, None] >= ends[None, :], axis=1, dtype=jnp.int32)
    rows = jnp.minimum(rows, num_rows - 1)
    places = used - (ends - per_row)[rows]
    first_tokens = row_starts[rows] + places * size
    remaining = jnp.where(chunks < ends[-1], row_starts[rows + 1] - first_tokens, 0)
    return ChunkTable(
        rows=rows,
        first_tokens=first_tokens.astype(jnp.int32),
        num_tokens=jnp.clip(remaining, 0, size).astype(jnp.int32),
        is_first=((places == 0) & (chunks < ends[-1])).astype(jnp.int32),
        offsets=(ends - per_row).astype(jnp.int32),
    )


def with_padding_row(row_starts: Int[Array, " R"], num_tokens: int) -> Array:
    """Adds a sequence that owns the padding at the end, so that it is written too."""
    end = jnp.full(1, num_tokens, jnp.int32)
    return jnp.concatenate([jnp.asarray(row_starts, jnp.int32), end])


def rows_of_tokens(row_starts: Int[Array, " R"], num_tokens: int) -> Int[Array, " T"]:
    """Sequence of each packed token; the number of sequences for padding."""
    tokens = jnp.arange(num_tokens, dtype=row_starts.dtype)
    return jnp.sum(tokens[:, None] >= row_starts[None, 1:], axis=1, dtype=jnp.int32)


class ChunkedOrder(NamedTuple):
    """Packed tokens that are padded to whole chunks, and the way back.

    Attributes:
        table: The chunks.
        tokens: Token at each place of the padded order; their number where none is.
        places: Place of each token there, past its end for padding.
    """

    table: ChunkTable
    tokens: Int[Array, " N"]
    places: Int[Array, " T"]


def chunked_order(
    row_starts: Int[Array, " R"], num_tokens: int, size: int
) -> ChunkedOrder:
    """Pads each sequence's tokens to whole chunks."""
    row_starts = jnp.asarray(row_starts)
    table = make_chunks(row_starts, num_tokens, size)
    num_rows = row_starts.shape[0] - 1
    offsets = jnp.arange(size, dtype=jnp.int32)
    tokens = table.first_tokens[:, None] + offsets[None, :]
    tokens = jnp.where(offsets[None, :] < table.num_tokens[:, None], tokens, num_tokens)
    rows = rows_of_tokens(row_starts, num_tokens)
    row = jnp.minimum(rows, num_rows - 1)
    inside = jnp.arange(num_tokens, dtype=jnp.int32) - row_starts[row]
    places = jnp.where(
        rows < num_rows, table.offsets[row] * size + inside, tokens.size
    ).astype(jnp.int32)
    return ChunkedOrder(table, tokens.reshape(-1), places)
