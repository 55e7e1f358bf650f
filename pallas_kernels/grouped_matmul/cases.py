"""Named shapes of grouped products, for tests and benchmarks."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.common.cases import KernelCase, numpy_dtype
from pallas_kernels.grouped_matmul.api import grouped_matmul

BYTE_TYPES = ("int8", "float8_e4m3fn", "float8_e5m2")


@dataclasses.dataclass(frozen=True, slots=True)
class GroupedCase:
    """A named grouped product.

    Attributes:
        name: Short name.
        sizes: Rows of each group.
        padding: Rows past the last group.
        channels: N.
        inputs: K.
        dtype: Type of x.
        weight: Type of the weights; empty for that of x.
        out_dtype: Type of the result; empty for that of x.
    """

    name: str
    sizes: tuple[int, ...]
    padding: int = 0
    channels: int = 64
    inputs: int = 128
    dtype: str = "bfloat16"
    weight: str = ""
    out_dtype: str = ""

    @property
    def rows(self) -> int:
        """Rows of all groups and padding."""
        return sum(self.sizes) + self.padding


CASES = (
    GroupedCase("even", (8, 8, 8, 8)),
    GroupedCase("ragged", (1, 0, 19, 0, 0, 7, 33), 5),
    GroupedCase("one_row", (0, 0, 1, 0), inputs=256),
    GroupedCase("one_group", (70,), 3),
    GroupedCase("all_padding", (0, 0, 0), 6),
    GroupedCase("float32", (3, 0, 6), 2, 48, 96, "float32"),
    GroupedCase("int8", (5, 0, 16, 2), 1, weight="int8", out_dtype="float32"),
    GroupedCase("e4m3", (2, 9), 0, 128, weight="float8_e4m3fn"),
    GroupedCase("e5m2", (4, 17), 3, 128, weight="float8_e5m2"),
    GroupedCase("wide", (3, 40, 1, 0, 20), 7, 136, 384),
)

# Experts, those of a token, channels and inputs of the first and the second product of
# Qwen3-30B-A3B (arXiv:2505.09388 table 2) and Mixtral 8x7B (arXiv:2401.04088 table 1).
REAL = {
    "qwen3_up": (128, 8, 1536, 2048),
    "qwen3_down": (128, 8, 2048, 768),
    "mixtral_up": (8, 2, 28672, 4096),
}
TYPES = (
    ("bfloat16", "bfloat16"),
    ("bfloat16", "int8"),
    ("bfloat16", "float8_e4m3fn"),
)


def real_cases() -> list[GroupedCase]:
    """Products of real models; tokens choose experts at random."""
    found: list[GroupedCase] = []

    def add(model: str, tokens: int, dtype: str, weight: str) -> None:
        experts, per_token, channels, inputs = REAL[model]
        rng = np.random.default_rng(tokens)
        chosen = [rng.permutation(experts)[:per_token] for _ in range(tokens)]
        sizes = np.bincount(np.concatenate(chosen), minlength=experts)
        name = f"{model}-{tokens}-{dtype}-{weight}"
        groups = tuple(map(int, sizes))
        found.append(GroupedCase(name, groups, 0, channels, inputs, dtype, weight))

    for types in TYPES:
        for model in ("qwen3_up", "qwen3_down"):
            for tokens in (1, 8, 64, 512, 2048):
                add(model, tokens, *types)
        add("mixtral_up", 4, *types)
        add("mixtral_up", 512, *types)
    for dtype in ("float16", "float32"):
        for weight in (dtype, "int8", "float8_e5m2"):
            add("qwen3_down", 8, dtype, weight)
    return found


def array_shapes(case: GroupedCase) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and type of each array of a case, in the order of the arguments."""
    groups = len(case.sizes)
    weight = case.weight or case.dtype
    shapes: dict[str, tuple[tuple[int, ...], str]] = {
        "x": ((case.rows, case.inputs), case.dtype),
        "weights": ((groups, case.channels, case.inputs), weight),
        "group_sizes": ((groups,), "int32"),
    }
    if weight in BYTE_TYPES:
        shapes["scales"] = ((groups, case.channels), "float32")
    return shapes


def make_arrays(case: GroupedCase, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Random arrays; padding rows and matrices of empty groups hold NaN."""
    arrays: dict[str, np.ndarray] = {}
    spread = case.inputs**-0.5
    for name, (shape, dtype) in array_shapes(case).items():
        if name == "group_sizes":
            arrays[name] = np.array(case.sizes, np.int32)
        elif name == "scales":
            factor = spread / 40 if case.weight == "int8" else spread
            values = rng.uniform(0.5 * factor, 1.5 * factor, shape)
            arrays[name] = values.astype(np.float32)
        else:
            plain = name == "weights" and case.weight not in BYTE_TYPES
            arrays[name] = _draw(rng, shape, dtype, spread if plain else 1.0)
    arrays["x"][sum(case.sizes) :] = np.nan
    if arrays["weights"].dtype != np.int8:
        arrays["weights"][np.array(case.sizes) == 0] = np.nan
    return arrays


def _draw(
    rng: np.random.Generator, shape: tuple[int, ...], dtype: str, spread: float
) -> np.ndarray:
    # A prime number of draws, repeated: large stacks are drawn in no time.
    count = min(int(np.prod(shape)), 1048583)
    draws = rng.standard_normal(count, np.float32) * np.float32(spread)
    if dtype == "int8":
        draws = np.clip(np.rint(draws * 40), -127, 127)
    return np.resize(draws.astype(numpy_dtype(dtype)), shape)


def _call(*arrays: Any, out_dtype: str, **options: Any) -> Any:
    x, weights, group_sizes, *scales = arrays
    return grouped_matmul(
        x,
        weights,
        group_sizes,
        scales=scales[0] if scales else None,
        out_dtype=out_dtype or None,
        **options,
    )


def case_function(case: GroupedCase) -> Any:
    """The operation with the arrays of a case as its arguments."""
    return partial(_call, out_dtype=case.out_dtype)


def kernel_cases() -> list[KernelCase]:
    """Products of real models, to compile and to time."""
    return [_kernel_case(case) for case in real_cases()]


def _kernel_case(case: GroupedCase) -> KernelCase:
    structs = {
        name: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
        for name, (shape, dtype) in array_shapes(case).items()
    }

    def draw(rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        return tuple(make_arrays(case, rng).values())

    used = sum(size > 0 for size in case.sizes)
    num_bytes = sum(
        structs[name].size * structs[name].dtype.itemsize
        for name in ("x", "group_sizes")
    )
    for name in ("weights", "scales"):
        if name in structs:
            size = structs[name].size * structs[name].dtype.itemsize
            num_bytes += size // len(case.sizes) * used
    out_dtype = numpy_dtype(case.out_dtype or case.dtype)
    num_bytes += case.rows * case.channels * out_dtype.itemsize
    implementations = ("blocked", "gpu_triton", "tpu")
    if case.dtype == "float16":
        implementations = ("blocked", "gpu_triton")
    return KernelCase(
        operation="grouped_matmul",
        name=case.name,
        function=case_function(case),
        arguments=tuple(structs.values()),
        make_arguments=draw,
        num_bytes=num_bytes,
        num_flops=2 * sum(case.sizes) * case.channels * case.inputs,
        implementations=implementations,
    )
