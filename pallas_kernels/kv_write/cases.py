"""Named shapes of cache writes and copies."""

import dataclasses
from functools import partial
from typing import Any

import numpy as np

from pallas_kernels.common.cases import KernelCase, numpy_dtype
from pallas_kernels.common.elementwise import struct
from pallas_kernels.kv_write.api import copy_blocks, kv_write, qkv_write
from pallas_kernels.kv_write.heads import HeadNorms, Heads, Rotation

CASES = (
    ("one_token", 1, 2, 64, 16, "float32"),
    ("chunk", 40, 4, 80, 16, "float32"),
    ("narrow", 9, 1, 8, 4, "float32"),
    ("wide", 12, 3, 128, 8, "float32"),
    ("bfloat16", 33, 2, 128, 16, "bfloat16"),
)
"""Name, tokens, KV heads, head width, block size, type."""


@dataclasses.dataclass(frozen=True, slots=True)
class RealCase:
    """A write of a real model.

    Attributes:
        name: Name of the model.
        num_tokens: New tokens.
        num_heads: Query heads.
        num_kv_heads: KV heads.
        head_dim: Head width.
        rotary_dim: Features that are rotated.
        has_norms: Whether heads are normalised.
        dtype: Type of the heads.
        kv_dtype: Type of the pool.
    """

    name: str
    num_tokens: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    has_norms: bool = False
    dtype: str = "bfloat16"
    kv_dtype: str = "bfloat16"


REAL = (
    RealCase("llama_8b", 1, 32, 8, 128, 128),
    RealCase("llama_8b", 32, 32, 8, 128, 128),
    RealCase("llama_8b", 8192, 32, 8, 128, 128),
    RealCase("qwen3_0.6b", 32, 16, 8, 128, 128, has_norms=True),
    RealCase("qwen3_0.6b", 2048, 16, 8, 128, 128, has_norms=True),
    RealCase("gemma3_4b", 32, 8, 4, 256, 256, has_norms=True),
    RealCase("glm4_9b", 32, 32, 2, 128, 64),
    RealCase("llama_8b_tp8", 32, 4, 1, 128, 128),
    RealCase("mha", 32, 32, 32, 128, 128),
    RealCase("llama_8b", 32, 32, 8, 128, 128, kv_dtype="int8"),
    RealCase("llama_8b", 2048, 32, 8, 128, 128, kv_dtype="int8"),
    RealCase("llama_8b", 32, 32, 8, 128, 128, kv_dtype="float8_e4m3fn"),
    RealCase("llama_8b", 2048, 32, 8, 128, 128, kv_dtype="float8_e4m3fn"),
    RealCase("llama_8b", 32, 32, 8, 128, 128, kv_dtype="float8_e5m2"),
    RealCase("llama_8b", 32, 32, 8, 128, 128, dtype="float16", kv_dtype="float16"),
    RealCase("llama_8b", 32, 32, 8, 128, 128, dtype="float32", kv_dtype="float32"),
)
POOL_TOKENS = 131072
COPIES = ((1, "bfloat16"), (16, "bfloat16"), (16, "int8"), (16, "float32"))


def kernel_cases() -> list[KernelCase]:
    """Writes and copies of real models, to compile and to time.

    Blocks are as long as the backends that are asked for have them.
    """
    cases: list[KernelCase] = []
    for block_size, backend in ((16, "gpu_triton"), (128, "tpu")):
        for case in REAL:
            is_half = "float16" in (case.dtype, case.kv_dtype)
            if not (is_half and backend == "tpu"):
                cases.append(_write_case(case, block_size, backend, is_fused=False))
                cases.append(_write_case(case, block_size, backend, is_fused=True))
        cases += [_copy_case(*copy, block_size, backend) for copy in COPIES]
    return cases


def call(
    *arrays: Any, is_fused: bool, has_norms: bool, has_scales: bool, **rest: Any
) -> Any:
    """Either write, given its arrays in a row: the pool first, then the slots."""
    kv, slots, q, keys, values, cos, sin, *others = arrays
    norms = HeadNorms(others[0], others[1], 1e-6) if has_norms else None
    rest["kv_scales"] = others[-1] if has_scales else None
    if is_fused:
        heads = Heads(q, keys, values)
        return qkv_write(heads, kv, slots, Rotation(cos, sin), norms=norms, **rest)
    return kv_write(kv, keys, values, slots, **rest)


def _write_case(
    case: RealCase, block_size: int, backend: str, *, is_fused: bool
) -> KernelCase:
    num_blocks = POOL_TOKENS // block_size
    kv_shape = (num_blocks, 2, case.num_kv_heads, block_size, case.head_dim)
    tokens, half = case.num_tokens, case.rotary_dim // 2
    item, kv_item = (numpy_dtype(d).itemsize for d in (case.dtype, case.kv_dtype))
    has_scales = kv_item == 1
    shapes: list[tuple[tuple[int, ...], str]] = [
        (kv_shape, case.kv_dtype),
        ((tokens,), "int32"),
        ((tokens, case.num_heads, case.head_dim), case.dtype),
        ((tokens, case.num_kv_heads, case.head_dim), case.dtype),
        ((tokens, case.num_kv_heads, case.head_dim), case.dtype),
        ((tokens, half), "float32"),
        ((tokens, half), "float32"),
    ]
    shapes += [((case.head_dim,), case.dtype)] * (2 * case.has_norms)
    shapes += [((2, case.num_kv_heads), "float32")] * has_scales

    def draw(rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        arrays = [np.zeros(kv_shape, numpy_dtype(case.kv_dtype))]
        blocks = rng.permutation(num_blocks)[: -(-tokens // block_size)]
        slots = blocks[:, None] * block_size + np.arange(block_size)[None]
        arrays.append(slots.reshape(-1)[:tokens].astype(np.int32))
        arrays += [
            rng.uniform(0.5, 1.0, shape).astype(numpy_dtype(dtype))
            for shape, dtype in shapes[2:]
        ]
        return tuple(arrays)

    per_head = case.head_dim * item
    num_bytes = 2 * tokens * case.num_kv_heads * (per_head + case.head_dim * kv_item)
    num_bytes += 2 * tokens * case.num_heads * per_head * is_fused
    function = partial(
        call, is_fused=is_fused, has_norms=case.has_norms, has_scales=has_scales
    )
    operation = "qkv_write" if is_fused else "kv_write"
    return KernelCase(
        operation=operation,
        name=f"{operation}_{case.name}_{tokens}_{case.kv_dtype}_{backend}",
        function=function,
        arguments=tuple(struct(*shape) for shape in shapes),
        make_arguments=draw,
        num_bytes=num_bytes,
        num_flops=0,
        implementations=("reference", backend),
        donated=(0,),
    )


def _copy_case(count: int, dtype: str, block_size: int, backend: str) -> KernelCase:
    num_blocks = POOL_TOKENS // block_size
    shape = (num_blocks, 2, 8, block_size, 128)

    def draw(rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        blocks = rng.permutation(num_blocks)[: 2 * count].astype(np.int32)
        pool = np.zeros(shape, numpy_dtype(dtype))
        return pool, blocks[:count], blocks[count:]

    ids = struct((count,), "int32")
    return KernelCase(
        operation="copy_blocks",
        name=f"copy_blocks_{count}_{dtype}_{backend}",
        function=copy_blocks,
        arguments=(struct(shape, dtype), ids, ids),
        make_arguments=draw,
        num_bytes=2 * count * int(np.prod(shape[1:])) * numpy_dtype(dtype).itemsize,
        num_flops=0,
        implementations=("reference", backend),
        donated=(0,),
    )
