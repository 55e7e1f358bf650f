"""Shapes that tests, compilation and benchmarks share; attention's float64 oracle."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import ml_dtypes
import numpy as np

from pallas_kernels.common.scores import ScoreOptions


@dataclasses.dataclass(frozen=True, slots=True)
class KernelCase:
    """A call of an operation at a size of real models, to compile and to time.

    Attributes:
        operation: Name of the operation.
        name: Name of the shape and types, unique within the operation.
        function: Takes arrays, and `implementation` and `target` by name.
        arguments: Shapes and types of the arrays.
        make_arguments: Draws arrays of these shapes that make sense.
        num_bytes: Bytes that have to be moved at least.
        num_flops: Floating-point operations, two per multiplication with addition.
        donated: Numbers of the arguments that are updated in place.
        implementations: Those that can do it.
    """

    operation: str
    name: str
    function: Callable[..., Any]
    arguments: tuple[jax.ShapeDtypeStruct, ...]
    make_arguments: Callable[[np.random.Generator], tuple[np.ndarray, ...]]
    num_bytes: int
    num_flops: int
    implementations: tuple[str, ...]
    donated: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class AttentionCase:
    """A named shape of attention over the paged cache.

    Attributes:
        name: Short name.
        lengths: Tokens of each sequence in the cache, the new ones included.
        num_new: New tokens of each sequence.
        num_heads: Query heads `H`.
        num_kv_heads: KV heads `K`.
        head_dim: Head width `D`.
        block_size: Places `P` per block.
        dtype: Type of the queries.
        kv_dtype: Type of the cache; empty for that of the queries. int8 and float8
            caches have scales.
        window: See `ScoreOptions`, as for the following.
        soft_cap: See there.
        has_sinks: Whether there are sinks.
        has_alibi: Whether there are slopes.
        shared_blocks: Full blocks at the start that all sequences share.
    """

    name: str
    lengths: tuple[int, ...]
    num_new: tuple[int, ...]
    num_heads: int = 8
    num_kv_heads: int = 2
    head_dim: int = 64
    block_size: int = 16
    dtype: str = "float32"
    kv_dtype: str = ""
    window: int | None = None
    soft_cap: float | None = None
    has_sinks: bool = False
    has_alibi: bool = False
    shared_blocks: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class AttentionProblem:
    """Arrays of a case: shuffled blocks, garbage and NaN in unused places.

    Attributes:
        q: `[T, H, D]`, sequence after sequence, then padding.
        kv: `[B, 2, K, P, D]`.
        block_tables: `[S, M]`; ids outside the pool past each length.
        row_starts: `[S + 1]`.
        lengths: `[S]`.
        options: How scores become weights; its arrays are float32.
        kv_scales: `[2, K]` for a quantized cache, else None.
    """

    q: np.ndarray
    kv: np.ndarray
    block_tables: np.ndarray
    row_starts: np.ndarray
    lengths: np.ndarray
    options: ScoreOptions
    kv_scales: np.ndarray | None


def numpy_dtype(name: str) -> np.dtype:
    """The numpy type of a name, those of `ml_dtypes` included."""
    return np.dtype(getattr(ml_dtypes, name, name))


def make_problem(
    case: AttentionCase, seed: int = 0, num_padding: int = 3
) -> AttentionProblem:
    """Draws a problem of the case's shape; all values are exact in their types."""
    rng = np.random.default_rng(seed)
    kv_dtype = numpy_dtype(case.kv_dtype or case.dtype)
    is_quantized = kv_dtype.itemsize == 1
    blocks_per_row = [-(-length // case.block_size) for length in case.lengths]
    width = max([1, *blocks_per_row]) + 2
    num_blocks = sum(blocks_per_row) + 3
    pool_shape = (num_blocks, 2, case.num_kv_heads, case.block_size, case.head_dim)
    garbage = 127 if kv_dtype == np.int8 else np.nan
    kv = np.full(pool_shape, garbage, kv_dtype)
    tables = np.full((len(case.lengths), width), num_blocks + 7, np.int32)
    ids = rng.permutation(num_blocks)
    for row, count in enumerate(blocks_per_row):
        tables[row, :count], ids = ids[:count], ids[count:]
        shared = min(case.shared_blocks, count, blocks_per_row[0])
        tables[row, :shared] = tables[0, :shared]
        for position in range(case.lengths[row]):
            block, place = divmod(position, case.block_size)
            if row and block < shared:
                continue
            values = rng.normal(size=(2, case.num_kv_heads, case.head_dim))
            values = np.rint(values * 32) if kv_dtype == np.int8 else values
            kv[tables[row, block], :, :, place] = values.astype(kv_dtype)
    row_starts = np.concatenate([[0], np.cumsum(case.num_new)]).astype(np.int32)
    num_tokens = int(row_starts[-1]) + num_padding
    q = rng.normal(size=(num_tokens, case.num_heads, case.head_dim))
    scale_range = (0.5 / 32, 1.5 / 32) if kv_dtype == np.int8 else (0.5, 1.5)
    scales = rng.uniform(*scale_range, size=(2, case.num_kv_heads)).astype(np.float32)
    sinks = rng.normal(size=case.num_heads).astype(np.float32)
    slopes = 2.0 ** -np.linspace(1, 8, case.num_heads, dtype=np.float32)
    options = ScoreOptions(
        scale=case.head_dim**-0.5,
        window=case.window,
        soft_cap=case.soft_cap,
        sinks=jax.numpy.asarray(sinks) if case.has_sinks else None,
        alibi_slopes=jax.numpy.asarray(slopes) if case.has_alibi else None,
    )
    return AttentionProblem(
        q=q.astype(numpy_dtype(case.dtype)),
        kv=kv,
        block_tables=tables,
        row_starts=row_starts,
        lengths=np.array(case.lengths, np.int32),
        options=options,
        kv_scales=scales if is_quantized else None,
    )


def solve(problem: AttentionProblem) -> np.ndarray:
    """Attention in float64, one query and head after the other; padding is zero."""
    q, kv = problem.q.astype(np.float64), problem.kv.astype(np.float64)
    if problem.kv_scales is not None:
        kv = kv * problem.kv_scales.astype(np.float64)[None, :, :, None, None]
    group = q.shape[1] // kv.shape[2]
    out = np.zeros_like(q)
    for row, length in enumerate(problem.lengths):
        first, last = problem.row_starts[row : row + 2]
        used = -(-length // kv.shape[3])
        blocks = kv[problem.block_tables[row, :used]]  # [M, 2, K, P, D]
        flat = blocks.transpose(1, 2, 0, 3, 4).reshape(2, kv.shape[2], -1, kv.shape[4])
        for token in range(first, last):
            position = int(length - (last - token))
            for head in range(q.shape[1]):
                keys, values = flat[:, head // group, : position + 1]
                out[token, head] = attend_one(
                    q[token, head], keys, values, position, head, problem.options
                )
    return out


def attend_one(
    q: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    position: int,
    head: int,
    options: ScoreOptions,
) -> np.ndarray:
    """One query of one head over the keys 0 ... N - 1, in float64."""
    places = np.arange(len(keys))
    scores = keys @ q * options.scale
    if options.soft_cap is not None:
        scores = options.soft_cap * np.tanh(scores / options.soft_cap)
    if options.alibi_slopes is not None:
        scores += float(options.alibi_slopes[head]) * (places - position)
    if options.window is not None:
        visible = position - places < options.window
        scores, values = scores[visible], values[visible]
    if options.sinks is not None:
        scores = np.append(scores, float(options.sinks[head]))
        values = np.vstack([values, np.zeros_like(values[:1])])
    weights = np.exp(scores - scores.max())
    return weights @ values / weights.sum()
