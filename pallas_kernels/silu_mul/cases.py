"""Named shapes of gated activations."""

from functools import partial

import numpy as np

from pallas_kernels.common.cases import KernelCase, numpy_dtype
from pallas_kernels.common.elementwise import ACTIVATIONS, Activation, struct
from pallas_kernels.silu_mul.api import silu_mul

CASES = (
    ("one_token", 1, 128, "float32"),
    ("ragged", 9, 384, "bfloat16"),
    ("half", 3, 256, "float16"),
)
"""Name, tokens, width F, type."""

REAL = (("llama_8b", 14336), ("qwen3_0.6b", 3072), ("gemma2_9b", 14336))
TOKENS = (1, 32, 8192)


def kernel_cases() -> list[KernelCase]:
    """Activations of real models, to compile and to time."""
    cases = [
        _case(f"{name}_{num_tokens}_bfloat16", num_tokens, width, "bfloat16", "silu")
        for name, width in REAL[:2]
        for num_tokens in TOKENS
    ]
    cases += [
        _case(f"llama_8b_32_{dtype}", 32, REAL[0][1], dtype, "silu")
        for dtype in ("float16", "float32")
    ]
    cases += [
        _case(f"gemma2_9b_512_{activation}", 512, REAL[2][1], "bfloat16", activation)
        for activation in ACTIVATIONS[1:]
    ]
    return cases


def _case(
    name: str, num_tokens: int, width: int, dtype: str, activation: Activation
) -> KernelCase:
    shape = (num_tokens, 2 * width)

    def draw(rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        return (rng.standard_normal(shape, np.float32).astype(numpy_dtype(dtype)),)

    item = numpy_dtype(dtype).itemsize
    return KernelCase(
        operation="silu_mul",
        name=name,
        function=partial(silu_mul, activation=activation),
        arguments=(struct(shape, dtype),),
        make_arguments=draw,
        num_bytes=3 * num_tokens * width * item,
        num_flops=6 * num_tokens * width,
        implementations=("reference", "gpu_triton") + ("tpu",) * (dtype != "float16"),
    )
