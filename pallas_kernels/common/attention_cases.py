"""Attention over the paged cache at the size of real models."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import Array

from pallas_kernels.common.cases import AttentionCase, KernelCase, numpy_dtype
from pallas_kernels.common.scores import ScoreOptions

GPU_BLOCK_SIZE = 16
TPU_BLOCK_SIZE = 128
TPU_HEAD_DIM = 128
TPU_REFUSES = ("float16", "uint16")
"""Caches that Mosaic has no vectors for."""

GPU_IMPLEMENTATIONS = ("gpu_triton", "gpu_mosaic")
TPU_IMPLEMENTATIONS = ("tpu",)

# Values repeat after a prime number of them, which is far quicker than drawing
# gigabytes.
NUM_DRAWN = 1_000_003

AttentionFunction = Callable[..., Array]


def real_case(
    name: str, lengths: Sequence[int], num_new: Sequence[int] | int, **fields: Any
) -> AttentionCase:
    """A case with the heads of Llama 3 8B, unless the fields say otherwise."""
    each = (num_new,) * len(lengths) if isinstance(num_new, int) else tuple(num_new)
    usual: dict[str, Any] = {
        "num_heads": 32,
        "num_kv_heads": 8,
        "head_dim": 128,
        "block_size": GPU_BLOCK_SIZE,
        "dtype": "bfloat16",
    }
    return AttentionCase(name, tuple(lengths), each, **{**usual, **fields})


def variants(lengths: Sequence[int], num_new: int) -> tuple[AttentionCase, ...]:
    """One case for each head width, type and option that the kernels support."""
    make = partial(real_case, lengths=lengths, num_new=num_new)
    return (
        *(make(f"width_{width}", head_dim=width) for width in (64, 80, 96, 256)),
        make("no_groups", num_heads=32, num_kv_heads=32),
        make("one_kv_head", num_heads=8, num_kv_heads=1, head_dim=256),
        make("groups_of_7", num_heads=28, num_kv_heads=4),
        make("float16", dtype="float16"),
        make("float32", dtype="float32"),
        *(
            make(f"bfloat16_over_{kv_dtype}", kv_dtype=kv_dtype)
            for kv_dtype in ("float8_e4m3fn", "float8_e5m2", "int8", "uint16")
        ),
        make("float16_over_int8", dtype="float16", kv_dtype="int8"),
        make("float32_over_bfloat16", dtype="float32", kv_dtype="bfloat16"),
        make("window", window=512),
        make("soft_cap", soft_cap=50.0, head_dim=256, num_heads=16),
        make("sinks", has_sinks=True, window=128, head_dim=64, num_heads=64),
        make("alibi", has_alibi=True),
    )


def for_each_platform(
    operation: str, function: AttentionFunction, cases: Sequence[AttentionCase]
) -> list[KernelCase]:
    """The cases for a GPU, and for a TPU those whose heads fill its registers."""
    gpu = [make_kernel_case(operation, function, case) for case in cases]
    tpu = [
        make_kernel_case(
            operation,
            function,
            dataclasses.replace(
                case, name=f"tpu_{case.name}", block_size=TPU_BLOCK_SIZE
            ),
        )
        for case in cases
        if case.head_dim % TPU_HEAD_DIM == 0
        and (case.kv_dtype or case.dtype) not in TPU_REFUSES
    ]
    return gpu + tpu


def make_kernel_case(
    operation: str, function: AttentionFunction, case: AttentionCase
) -> KernelCase:
    """The call of an attention operation that a case describes.

    Args:
        operation: Name of the operation.
        function: Takes the case, then q, kv, tables, row starts, lengths and whatever
            the options need, and `implementation` and `target` by name.
        case: Shapes, types and options; its block size tells GPU from TPU.
    """
    make = partial(_make_arguments, case)
    kv_dtype = numpy_dtype(case.kv_dtype or case.dtype)
    keys_read, pairs = _count_keys(case)
    num_values = sum(case.num_new) * case.num_heads * case.head_dim
    kv_bytes = keys_read * 2 * case.num_kv_heads * case.head_dim * kv_dtype.itemsize
    is_tpu = case.block_size == TPU_BLOCK_SIZE
    return KernelCase(
        operation=operation,
        name=case.name,
        function=partial(function, case),
        arguments=_describe_arguments(case),
        make_arguments=make,
        num_bytes=kv_bytes + 2 * num_values * numpy_dtype(case.dtype).itemsize,
        num_flops=4 * case.num_heads * case.head_dim * pairs,
        implementations=TPU_IMPLEMENTATIONS if is_tpu else GPU_IMPLEMENTATIONS,
    )


def case_options(
    case: AttentionCase, extra: Sequence[Array]
) -> tuple[ScoreOptions, Array | None]:
    """The options and the cache's scales, from the arrays after the lengths."""
    left = list(extra)
    scales = left.pop(0) if _is_quantized(case) else None
    sinks = left.pop(0) if case.has_sinks else None
    slopes = left.pop(0) if case.has_alibi else None
    options = ScoreOptions(
        scale=case.head_dim**-0.5,
        window=case.window,
        soft_cap=case.soft_cap,
        sinks=sinks,
        alibi_slopes=slopes,
    )
    return options, scales


def _is_quantized(case: AttentionCase) -> bool:
    return numpy_dtype(case.kv_dtype or case.dtype).itemsize == 1


def _count_keys(case: AttentionCase) -> tuple[int, int]:
    """Keys that some query of a row sees, and pairs of a query and a visible key."""
    keys = pairs = 0
    for length, new in zip(case.lengths, case.num_new, strict=True):
        positions = np.arange(length - new, length, dtype=np.int64)
        limit = length if case.window is None else case.window
        pairs += int(np.minimum(positions + 1, limit).sum())
        keys += min(length, limit + max(new - 1, 0)) if new else 0
    return keys, pairs


def _blocks_per_row(case: AttentionCase) -> list[int]:
    return [-(-length // case.block_size) for length in case.lengths]


def _describe_arguments(case: AttentionCase) -> tuple[jax.ShapeDtypeStruct, ...]:
    blocks, rows = _blocks_per_row(case), len(case.lengths)
    heads, width = case.num_heads, case.head_dim
    pool = (sum(blocks) + 1, 2, case.num_kv_heads, case.block_size, width)
    described: list[tuple[tuple[int, ...], Any]] = [
        ((sum(case.num_new), heads, width), numpy_dtype(case.dtype)),
        (pool, numpy_dtype(case.kv_dtype or case.dtype)),
        ((rows, max(blocks)), np.int32),
        ((rows + 1,), np.int32),
        ((rows,), np.int32),
    ]
    if _is_quantized(case):
        described.append(((2, case.num_kv_heads), np.float32))
    num_options = int(case.has_sinks) + int(case.has_alibi)
    described += [((heads,), np.float32)] * num_options
    return tuple(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in described)


def _make_arguments(
    case: AttentionCase, rng: np.random.Generator
) -> tuple[np.ndarray, ...]:
    described = _describe_arguments(case)
    q, kv, tables = described[:3]
    ids = rng.permutation(kv.shape[0]).astype(np.int32)
    block_tables = np.full(tables.shape, kv.shape[0] + 7, np.int32)
    for row, count in enumerate(_blocks_per_row(case)):
        block_tables[row, :count], ids = ids[:count], ids[count:]
    arguments = [
        _draw(rng, q.shape, q.dtype),
        _draw(rng, kv.shape, kv.dtype, case.dtype),
        block_tables,
        np.concatenate([[0], np.cumsum(case.num_new)]).astype(np.int32),
        np.array(case.lengths, np.int32),
    ]
    for left in described[5:]:
        factor = 1 / 32 if kv.dtype == np.int8 and left.shape[0] == 2 else 1
        drawn = factor * rng.uniform(0.5, 1.5, size=left.shape)
        arguments.append(drawn.astype(np.float32))
    return tuple(arguments)


def _draw(
    rng: np.random.Generator,
    shape: tuple[int, ...],
    dtype: np.dtype,
    bits_of: str = "",
) -> np.ndarray:
    drawn = rng.standard_normal(NUM_DRAWN, np.float32)
    if dtype == np.int8:
        return np.resize(np.rint(drawn * 32).clip(-127, 127).astype(dtype), shape)
    if dtype == np.uint16:
        return np.resize(drawn.astype(numpy_dtype(bits_of)), shape).view(dtype)
    return np.resize(drawn.astype(dtype), shape)
