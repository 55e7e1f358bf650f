"""Random ragged attention problems and their float64 answers."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, slots=True)
class AttentionCase:
    """A named shape.

    Attributes:
        name: Short name.
        lengths: Tokens of each sequence in the cache, the new ones included.
        num_new: New tokens of each sequence.
        num_heads: Query heads `H`.
        num_kv_heads: KV heads `K`.
        head_dim: Head width `D`.
        block_size: Places `P` per block.
        dtype: Type of queries and cache.
    """

    name: str
    lengths: tuple[int, ...]
    num_new: tuple[int, ...]
    num_heads: int = 8
    num_kv_heads: int = 2
    head_dim: int = 64
    block_size: int = 16
    dtype: str = "float32"


@dataclasses.dataclass(frozen=True, slots=True)
class AttentionProblem:
    """Arrays of a case: shuffled blocks, garbage and NaN in unused places.

    Attributes:
        q: `[T, H, D]`, sequence after sequence, then padding.
        kv: `[B, 2, K, P, D]`.
        block_tables: `[S, M]`; ids outside the pool past each length.
        row_starts: `[S + 1]`.
        lengths: `[S]`.
        scale: Factor on the scores.
    """

    q: np.ndarray
    kv: np.ndarray
    block_tables: np.ndarray
    row_starts: np.ndarray
    lengths: np.ndarray
    scale: float


def make_problem(
    case: AttentionCase, seed: int = 0, num_padding: int = 3
) -> AttentionProblem:
    """Draws a problem of the case's shape."""
    rng = np.random.default_rng(seed)
    blocks_per_row = [-(-length // case.block_size) for length in case.lengths]
    width = max([1, *blocks_per_row]) + 2
    num_blocks = sum(blocks_per_row) + 3
    pool_shape = (num_blocks, 2, case.num_kv_heads, case.block_size, case.head_dim)
    kv = np.full(pool_shape, np.nan, np.float32)
    tables = np.full((len(case.lengths), width), num_blocks + 7, np.int32)
    ids = rng.permutation(num_blocks)
    for row, count in enumerate(blocks_per_row):
        tables[row, :count], ids = ids[:count], ids[count:]
        for position in range(case.lengths[row]):
            block, place = divmod(position, case.block_size)
            values = rng.normal(size=(2, case.num_kv_heads, case.head_dim))
            kv[tables[row, block], :, :, place] = values
    row_starts = np.concatenate([[0], np.cumsum(case.num_new)]).astype(np.int32)
    num_tokens = int(row_starts[-1]) + num_padding
    q = rng.normal(size=(num_tokens, case.num_heads, case.head_dim))
    return AttentionProblem(
        q=q.astype(np.float32),
        kv=kv,
        block_tables=tables,
        row_starts=row_starts,
        lengths=np.array(case.lengths, np.int32),
        scale=case.head_dim**-0.5,
    )


def solve(problem: AttentionProblem) -> np.ndarray:
    """Attention in float64, one query and head after the other; padding is zero."""
    q, kv = problem.q.astype(np.float64), problem.kv.astype(np.float64)
    group = q.shape[1] // kv.shape[2]
    out = np.zeros_like(q)
    for row, length in enumerate(problem.lengths):
        first, last = problem.row_starts[row : row + 2]
        used = -(-length // kv.shape[3])
        blocks = kv[problem.block_tables[row, :used]]  # [M, 2, K, P, D]
        flat = blocks.transpose(1, 2, 0, 3, 4).reshape(2, kv.shape[2], -1, kv.shape[4])
        for token in range(first, last):
            seen = length - (last - token) + 1
            for head in range(q.shape[1]):
                keys, values = flat[:, head // group, :seen]
                scores = keys @ q[token, head] * problem.scale
                weights = np.exp(scores - scores.max())
                out[token, head] = weights @ values / weights.sum()
    return out
