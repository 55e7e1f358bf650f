"""Named shapes of normalisations."""

from functools import partial
from typing import Any

import numpy as np

from pallas_kernels.common.cases import KernelCase, numpy_dtype
from pallas_kernels.common.elementwise import struct
from pallas_kernels.rms_norm.api import rms_norm

CASES = (
    ("one_token", 1, 128, "float32"),
    ("ragged", 19, 256, "bfloat16"),
    ("half", 5, 384, "float16"),
)
"""Name, tokens, width E, type."""

VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"has_residual": True},
    {"weight_offset": 1, "has_residual": True},
    {"quantize": "int8", "has_residual": True},
    {"quantize": "float8_e4m3fn"},
)

REAL = (
    ("qwen3_0.6b", 1024, 32, "bfloat16"),
    ("llama_8b", 4096, 1, "bfloat16"),
    ("llama_8b", 4096, 32, "bfloat16"),
    ("llama_8b", 4096, 8192, "bfloat16"),
    ("llama_70b", 8192, 512, "bfloat16"),
    ("wide", 16384, 64, "bfloat16"),
    ("llama_8b", 4096, 32, "float16"),
    ("llama_8b", 4096, 32, "float32"),
)


def rms_norm_call(
    x: Any, weight: Any, residual: Any = None, *, has_residual: bool, **options: Any
) -> Any:
    """The operation with the residual, if any, as the third array."""
    assert has_residual == (residual is not None)
    return rms_norm(x, weight, 1e-6, residual=residual, **options)


def kernel_cases() -> list[KernelCase]:
    """Normalisations of real models, to compile and to time."""
    return [
        _case(name, width, tokens, dtype, variant)
        for name, width, tokens, dtype in REAL
        for variant in VARIANTS
    ]


def _case(
    name: str, width: int, tokens: int, dtype: str, variant: dict[str, Any]
) -> KernelCase:
    options = {"has_residual": False, **variant}
    shapes = [(tokens, width), (width,)] + [(tokens, width)] * options["has_residual"]
    item = numpy_dtype(dtype).itemsize
    out_item = 1 if "quantize" in options else item

    def draw(rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        return tuple(
            rng.standard_normal(shape, np.float32).astype(numpy_dtype(dtype))
            for shape in shapes
        )

    words = [f"{key}={value}" for key, value in variant.items()]
    return KernelCase(
        operation="rms_norm",
        name="_".join([name, str(tokens), dtype, *words]),
        function=partial(rms_norm_call, **options),
        arguments=tuple(struct(shape, dtype) for shape in shapes),
        make_arguments=draw,
        num_bytes=tokens
        * width
        * (item * (1 + 2 * options["has_residual"]) + out_item),
        num_flops=5 * tokens * width,
        implementations=("reference", "gpu_triton") + ("tpu",) * (dtype != "float16"),
    )
