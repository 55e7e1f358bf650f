"""Named shapes of products with stored weights, for tests and benchmarks."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.common.cases import KernelCase, numpy_dtype
from pallas_kernels.quantized_matmul.api import quantized_matmul
from pallas_kernels.quantized_matmul.weights import PACK_BLOCK, QuantizedWeight

BYTE_TYPES = ("int8", "float8_e4m3fn", "float8_e5m2")


@dataclasses.dataclass(frozen=True, slots=True)
class MatmulCase:
    """A named product.

    Attributes:
        name: Short name.
        rows: M.
        channels: N.
        inputs: K.
        dtype: Type of x; int8 and float8 have scales.
        weight: Type of the weights, "int4" included.
        group: Inputs per scale of int4 weights.
        has_zeros: Whether int4 weights have zero points.
        has_order: Whether the inputs are permuted.
        out_dtype: Type of the result; empty for the default.
    """

    name: str
    rows: int
    channels: int
    inputs: int
    dtype: str = "bfloat16"
    weight: str = "int8"
    group: int = 128
    has_zeros: bool = False
    has_order: bool = False
    out_dtype: str = ""


CASES = (
    MatmulCase("one_row", 1, 128, 2176),
    MatmulCase("few_rows", 5, 96, 1408, out_dtype="float32"),
    MatmulCase("plain_one", 1, 128, 512, weight="bfloat16"),
    MatmulCase("plain", 9, 128, 256, weight="bfloat16"),
    MatmulCase("float32", 7, 64, 160, "float32"),
    MatmulCase("e4m3", 16, 64, 256, weight="float8_e4m3fn"),
    MatmulCase("e5m2", 3, 64, 256, weight="float8_e5m2"),
    MatmulCase("int4", 4, 64, 512, weight="int4"),
    MatmulCase("int4_zeros", 1, 72, 640, weight="int4", group=64, has_zeros=True),
    MatmulCase("int4_order", 3, 64, 256, weight="int4", has_zeros=True, has_order=True),
    MatmulCase("int4_one_group", 3, 64, 256, "float32", "int4", 256),
    MatmulCase("both_int8", 6, 128, 256, "int8"),
    MatmulCase("both_e4m3", 6, 128, 256, "float8_e4m3fn", "float8_e4m3fn"),
    MatmulCase("many_rows", 150, 136, 256),
)

# Channels and inputs of the matrices of Llama 3 8B (arXiv:2407.21783 table 3), the ones
# that are read together stored together.
LLAMA_8B = {
    "qkv": (6144, 4096),
    "o": (4096, 4096),
    "gate_up": (28672, 4096),
    "down": (4096, 14336),
}
DECODE_ROWS = (1, 16)
OTHER_ROWS = (8, 64, 512, 2048)
SCHEMES = (
    ("bfloat16", "bfloat16", False),
    ("bfloat16", "int8", False),
    ("bfloat16", "float8_e4m3fn", False),
    ("bfloat16", "int4", False),
    ("bfloat16", "int4", True),
    ("int8", "int8", False),
    ("float8_e4m3fn", "float8_e4m3fn", False),
)


def real_cases() -> list[MatmulCase]:
    """Products of real models, in every combination of types."""
    found: list[MatmulCase] = []

    def add(matrix: str, rows: int, types: tuple[str, str, bool], group: int) -> None:
        dtype, weight, has_zeros = types
        channels, inputs = LLAMA_8B[matrix]
        name = f"{matrix}-{rows}-{dtype}-{weight}"
        name += f"-g{group}" * (weight == "int4") + "-zeros" * has_zeros
        found.append(
            MatmulCase(
                name,
                rows,
                channels,
                inputs,
                dtype,
                weight,
                group,
                has_zeros,
                out_dtype="bfloat16",
            )
        )

    for types in SCHEMES:
        for matrix in LLAMA_8B:
            for rows in DECODE_ROWS:
                add(matrix, rows, types, 128)
        for rows in OTHER_ROWS:
            add("down", rows, types, 128)
    for rows in (1, 64):
        for dtype in ("bfloat16", "float16", "float32"):
            add("qkv", rows, (dtype, "float8_e5m2", False), 128)
            if dtype != "bfloat16":
                add("qkv", rows, (dtype, dtype, False), 128)
                add("qkv", rows, (dtype, "int8", False), 128)
                add("qkv", rows, (dtype, "int4", True), 128)
        add("qkv", rows, ("bfloat16", "int4", True), 32)
        add("qkv", rows, ("float8_e5m2", "float8_e5m2", False), 128)
    return found


def array_shapes(case: MatmulCase) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and type of each array of a case, in the order of the arguments."""
    shapes: dict[str, tuple[tuple[int, ...], str]] = {
        "x": ((case.rows, case.inputs), case.dtype)
    }
    if case.weight == "int4":
        width = -(-case.inputs // PACK_BLOCK) * PACK_BLOCK // 2
        groups = (case.channels, case.inputs // case.group)
        shapes["values"] = ((case.channels, width), "uint8")
        shapes["scales"] = (groups, "bfloat16")
        if case.has_zeros:
            shapes["zeros"] = (groups, "uint8")
    else:
        shapes["values"] = ((case.channels, case.inputs), case.weight)
        if case.weight in BYTE_TYPES:
            shapes["scales"] = ((case.channels,), "float32")
    if case.has_order:
        shapes["order"] = ((case.inputs,), "int32")
    if case.dtype in BYTE_TYPES:
        shapes["x_scales"] = ((case.rows,), "float32")
    return shapes


def make_arrays(case: MatmulCase, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Random arrays of a case, exact in their types; sums are of the order of one."""
    magnitude = {"int4": 4.0, "int8": 40.0}.get(case.weight, 1.0)
    spread = case.inputs**-0.5 / magnitude
    x_spread = 1 / 40 if case.dtype == "int8" else 1.0
    arrays: dict[str, np.ndarray] = {}
    for name, (shape, dtype) in array_shapes(case).items():
        if name == "order":
            arrays[name] = rng.permutation(case.inputs).astype(np.int32)
        elif name == "zeros":
            arrays[name] = rng.integers(0, 17, shape, np.uint8)
        elif dtype == "uint8":
            arrays[name] = rng.integers(0, 256, shape, np.uint8)
        elif name.endswith("scales"):
            factor = x_spread if name == "x_scales" else spread
            values = rng.uniform(0.5 * factor, 1.5 * factor, shape)
            arrays[name] = values.astype(numpy_dtype(dtype))
        else:
            plain = name == "values" and case.weight not in BYTE_TYPES
            arrays[name] = _draw(rng, shape, dtype, spread if plain else 1.0)
    return arrays


def _draw(
    rng: np.random.Generator, shape: tuple[int, ...], dtype: str, spread: float
) -> np.ndarray:
    # A prime number of draws, repeated: large matrices are drawn in no time.
    count = min(int(np.prod(shape)), 1048583)
    draws = rng.standard_normal(count, np.float32) * np.float32(spread)
    if dtype == "int8":
        draws = np.clip(np.rint(draws * 40), -127, 127)
    return np.resize(draws.astype(numpy_dtype(dtype)), shape)


def _call(*arrays: Any, names: tuple[str, ...], out_dtype: str, **options: Any) -> Any:
    parts = dict(zip(names, arrays, strict=True))
    weight = QuantizedWeight(
        *(parts.get(name) for name in ("values", "scales", "zeros", "order"))
    )
    return quantized_matmul(
        parts["x"],
        weight,
        x_scales=parts.get("x_scales"),
        out_dtype=out_dtype or None,
        **options,
    )


def case_function(case: MatmulCase) -> Any:
    """The operation with the arrays of a case as its arguments."""
    names = tuple(array_shapes(case))
    return partial(_call, names=names, out_dtype=case.out_dtype)


def kernel_cases() -> list[KernelCase]:
    """Products of real models, to compile and to time."""
    return [_kernel_case(case) for case in real_cases()]


def _kernel_case(case: MatmulCase) -> KernelCase:
    structs = tuple(
        jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
        for shape, dtype in array_shapes(case).values()
    )

    def draw(rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        return tuple(make_arrays(case, rng).values())

    implementations = ("reference", "gpu_triton", "tpu")
    if case.dtype == "float16":
        implementations = implementations[:2]
    out_bytes = case.rows * case.channels * numpy_dtype(case.out_dtype).itemsize
    in_bytes = sum(struct.size * struct.dtype.itemsize for struct in structs)
    return KernelCase(
        operation="quantized_matmul",
        name=case.name,
        function=case_function(case),
        arguments=structs,
        make_arguments=draw,
        num_bytes=in_bytes + out_bytes,
        num_flops=2 * case.rows * case.channels * case.inputs,
        implementations=implementations,
    )
