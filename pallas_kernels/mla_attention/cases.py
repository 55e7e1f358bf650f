"""Named shapes of latent attention, for tests, compilation and benchmarks."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.common.cases import KernelCase, numpy_dtype
from pallas_kernels.mla_attention.api import mla_attention

SCALE = 192**-0.5
"""Of DeepSeek's heads: 128 without and 64 with rotary embedding."""


@dataclasses.dataclass(frozen=True, slots=True)
class MlaCase:
    """A named shape of latent attention.

    Attributes:
        name: Short name.
        lengths: Tokens of each sequence in the cache, the new ones included.
        num_new: New tokens of each sequence.
        num_heads: Query heads.
        rank: Width of the latents.
        rope: Width of the rotary part.
        width: Width of a place of the pool.
        block_size: Places per block.
        dtype: Type of the queries.
        latent_dtype: Type of the pool; empty for that of the queries.
        padding: Tokens after those of the sequences.
    """

    name: str
    lengths: tuple[int, ...]
    num_new: tuple[int, ...]
    num_heads: int = 16
    rank: int = 128
    rope: int = 16
    width: int = 144
    block_size: int = 32
    dtype: str = "float32"
    latent_dtype: str = ""
    padding: int = 3


CASES = (
    MlaCase("one_row", (37,), (1,), padding=0),
    MlaCase("decode", (1, 31, 32, 33, 300, 0), (1, 1, 1, 1, 1, 0)),
    MlaCase("verify", (40, 4, 65), (4, 4, 4)),
    MlaCase("prompts", (33, 64, 1), (33, 64, 1)),
    MlaCase("mixed", (1, 40, 17, 130, 0, 200), (1, 40, 1, 65, 0, 33)),
    MlaCase("more_new_than_cached", (2, 5), (4, 5)),
    MlaCase("wide_pool", (70, 9), (3, 9), width=256),
    MlaCase("bfloat16", (60, 200), (60, 1), dtype="bfloat16"),
    MlaCase(
        "float8", (60, 40), (1, 40), dtype="bfloat16", latent_dtype="float8_e4m3fn"
    ),
)
"""Small ones, for tests."""

DEEPSEEK = MlaCase(
    "deepseek", (8192,), (1,), 128, 512, 64, 576, 16, "bfloat16", padding=0
)


def make_arrays(case: MlaCase, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Queries, pool, tables, row starts and lengths; garbage where nothing is used."""
    rng = np.random.default_rng(seed)
    dtype = numpy_dtype(case.dtype)
    pool_dtype = numpy_dtype(case.latent_dtype or case.dtype)
    counts = [-(-length // case.block_size) for length in case.lengths]
    num_blocks = sum(counts) + 3
    pool = np.full((num_blocks, case.block_size, case.width), np.nan, pool_dtype)
    tables = np.full((len(counts), max([1, *counts]) + 2), num_blocks + 7, np.int32)
    ids = rng.permutation(num_blocks)
    used = case.rank + case.rope
    for row, count in enumerate(counts):
        tables[row, :count], ids = ids[:count], ids[count:]
        for start in range(0, case.lengths[row], case.block_size):
            places = min(case.block_size, case.lengths[row] - start)
            values = rng.normal(size=(places, used)).astype(pool_dtype)
            pool[tables[row, start // case.block_size], :places, :used] = values
    starts = np.concatenate([[0], np.cumsum(case.num_new)]).astype(np.int32)
    shape = (int(starts[-1]) + case.padding, case.num_heads)
    return (
        rng.normal(size=(*shape, case.rank)).astype(dtype),
        rng.normal(size=(*shape, case.rope)).astype(dtype),
        pool,
        tables,
        starts,
        np.array(case.lengths, np.int32),
    )


def call(*arrays: Any, **options: Any) -> Any:
    """The operation with the arrays of a case."""
    q_latent, q_rope, latent, tables, starts, lengths = arrays
    return mla_attention(
        q_latent, q_rope, latent, tables, starts, lengths, SCALE, **options
    )


def kernel_cases() -> list[KernelCase]:
    """Calls of real models, to compile and to time."""
    shapes = [
        dataclasses.replace(DEEPSEEK, name=f"{rows}_rows_{length}", lengths=lengths)
        for rows, length in ((1, 8192), (32, 8192), (128, 2048))
        for lengths in [(length,) * rows]
    ]
    shapes.append(dataclasses.replace(shapes[1], name="32_rows_16_heads", num_heads=16))
    for dtype in ("float16", "float32"):
        shapes.append(
            dataclasses.replace(shapes[1], name=f"32_rows_{dtype}", dtype=dtype)
        )
    for dtype in ("float8_e4m3fn", "float8_e5m2"):
        shapes.append(
            dataclasses.replace(shapes[1], name=f"32_rows_{dtype}", latent_dtype=dtype)
        )
    cases = [dataclasses.replace(s, num_new=(1,) * len(s.lengths)) for s in shapes]
    cases += [
        dataclasses.replace(cases[1], name="verify_4", num_new=(4,) * 32, num_heads=16),
        dataclasses.replace(
            DEEPSEEK, name="prefill_2048", lengths=(4096,), num_new=(2048,)
        ),
        dataclasses.replace(
            DEEPSEEK,
            name="prefill_ragged_16_heads",
            lengths=(4096, 700, 1, 9000),
            num_new=(1500, 400, 1, 147),
            num_heads=16,
        ),
    ]
    return [
        _kernel_case(case, implementation)
        for case in cases
        for implementation in ("gpu_triton", "tpu")
        if implementation != "tpu" or case.dtype != "float16"
    ]


def _kernel_case(case: MlaCase, implementation: str) -> KernelCase:
    """A case with the pool's layout of the device."""
    if implementation == "tpu":
        width = -(-case.width // 128) * 128
        case = dataclasses.replace(case, block_size=128, width=width)
    counts = [-(-length // case.block_size) for length in case.lengths]
    num_tokens, num_rows = sum(case.num_new), len(case.lengths)
    itemsize = numpy_dtype(case.dtype).itemsize
    pool_dtype = case.latent_dtype or case.dtype
    pairs = sum(
        new * length - new * (new - 1) // 2
        for new, length in zip(case.num_new, case.lengths, strict=True)
    )
    used = case.rank + case.rope
    arguments = (
        ((num_tokens, case.num_heads, case.rank), case.dtype),
        ((num_tokens, case.num_heads, case.rope), case.dtype),
        ((sum(counts) + 3, case.block_size, case.width), pool_dtype),
        ((num_rows, max(counts) + 2), "int32"),
        ((num_rows + 1,), "int32"),
        ((num_rows,), "int32"),
    )
    read = sum(case.lengths) * used * numpy_dtype(pool_dtype).itemsize
    moved = num_tokens * case.num_heads * (used + case.rank) * itemsize
    return KernelCase(
        operation="mla_attention",
        name=case.name,
        function=call,
        arguments=tuple(jax.ShapeDtypeStruct(s, jnp.dtype(t)) for s, t in arguments),
        make_arguments=partial(_draw, case),
        num_bytes=read + moved,
        num_flops=2 * pairs * case.num_heads * (used + case.rank),
        implementations=("reference", implementation),
    )


def _draw(case: MlaCase, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    return make_arrays(case, int(rng.integers(2**31)))
