"""Named shapes of threshold searches."""

import numpy as np

from pallas_kernels.common.cases import KernelCase
from pallas_kernels.common.elementwise import struct
from pallas_kernels.top_p_threshold.api import top_p_threshold

CASES = (
    ("one_row", 1, 128),
    ("some_rows", 11, 640),
    ("a_block_of_rows", 8, 1152),
)
"""Name, rows, vocabulary."""

REAL = (
    ("qwen3", 1, 151936),
    ("qwen3", 32, 152064),
    ("llama3", 128, 128512),
    ("gemma3", 32, 262144),
    ("llama2", 256, 32256),
)


def kernel_cases() -> list[KernelCase]:
    """Searches in the vocabularies of real models, to compile and to time."""
    return [_case(*case) for case in REAL]


def _case(name: str, num_rows: int, vocab_size: int) -> KernelCase:
    def draw(rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        scores = rng.standard_normal((num_rows, vocab_size), np.float32) * 2.5
        return (
            scores,
            rng.integers(0, 100, num_rows).astype(np.int32),
            rng.uniform(0.5, 1.0, num_rows).astype(np.float32),
            rng.uniform(0.5, 1.2, num_rows).astype(np.float32),
        )

    return KernelCase(
        operation="top_p_threshold",
        name=f"{name}_{num_rows}_{vocab_size}",
        function=top_p_threshold,
        arguments=(
            struct((num_rows, vocab_size), "float32"),
            struct((num_rows,), "int32"),
            struct((num_rows,), "float32"),
            struct((num_rows,), "float32"),
        ),
        make_arguments=draw,
        num_bytes=4 * num_rows * vocab_size,
        num_flops=0,
        implementations=("reference", "blocked", "gpu_triton", "tpu"),
    )
