"""Named shapes of the scan and of the step, for tests, compilation and benchmarks."""

import dataclasses
import math
from typing import Any

import numpy as np

from pallas_kernels.common.cases import KernelCase, numpy_dtype
from pallas_kernels.common.recurrent_cases import (
    Shapes,
    row_starts,
    scan_case,
    step_case,
)
from pallas_kernels.ssm_scan.api import SsmInputs, SsmParameters, ssm_scan, ssm_step


@dataclasses.dataclass(frozen=True, slots=True)
class SsmCase:
    """A named shape of a scan; `num_new` tokens of each sequence, then padding."""

    name: str
    num_new: tuple[int, ...]
    num_heads: int = 4
    num_groups: int = 1
    width: int = 32
    state_width: int = 16
    dtype: str = "float32"
    padding: int = 3


CASES = (
    SsmCase("one_token", (1,), padding=0),
    SsmCase("ragged", (0, 1, 69, 65, 0, 130), num_groups=2),
    SsmCase("chunk_borders", (63, 64, 128, 129)),
    SsmCase("wide", (40, 17), num_heads=2, width=64, state_width=128),
    SsmCase("bfloat16", (70, 3), dtype="bfloat16"),
    SsmCase("float16", (33, 1), dtype="float16"),
)
"""Small ones, for tests."""

MAMBA_2 = SsmCase("mamba2_2.7b", (2048,), 80, 1, 64, 128, "bfloat16", 0)
MAMBA_2_RAGGED = dataclasses.replace(
    MAMBA_2, name="mamba2_2.7b_ragged", num_new=(1500, 1, 400, 1, 146)
)
GROUPED = dataclasses.replace(MAMBA_2, name="mamba2_8_groups", num_groups=8)
REAL_CASES = (
    MAMBA_2,
    MAMBA_2_RAGGED,
    GROUPED,
    dataclasses.replace(MAMBA_2, name="mamba2_2.7b_float16", dtype="float16"),
    dataclasses.replace(MAMBA_2, name="mamba2_2.7b_float32", dtype="float32"),
)


def array_shapes(case: SsmCase, num_tokens: int, num_rows: int, last: int) -> Shapes:
    """Those of x, dt, B, C, A, D, dt_bias, row_starts or rows (`last`), and state."""
    heads, groups, width = case.num_heads, case.num_groups, case.width
    return (
        ((num_tokens, heads, width), case.dtype),
        ((num_tokens, heads), case.dtype),
        ((num_tokens, groups, case.state_width), case.dtype),
        ((num_tokens, groups, case.state_width), case.dtype),
        ((heads,), "float32"),
        ((heads,), "float32"),
        ((heads,), "float32"),
        ((last,), "int32"),
        ((num_rows, heads, width, case.state_width), "float32"),
    )


def make_arrays(case: SsmCase, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Random arrays of a scan in the order of `array_shapes`, with ordinary decays."""
    num_rows = len(case.num_new)
    num_tokens = sum(case.num_new) + case.padding
    shapes = array_shapes(case, num_tokens, num_rows, num_rows + 1)
    return _draw(np.random.default_rng(seed), shapes, row_starts(case.num_new))


def _draw(
    rng: np.random.Generator, shapes: Shapes, indices: np.ndarray
) -> tuple[np.ndarray, ...]:
    arrays = [rng.normal(size=s).astype(numpy_dtype(t)) for s, t in shapes]
    arrays[4] = -rng.uniform(0.5, 8, shapes[4][0]).astype(np.float32)
    arrays[6] = rng.uniform(-5, 0, shapes[6][0]).astype(np.float32)
    arrays[7] = indices.astype(np.int32)
    return tuple(arrays)


def call_scan(*arrays: Any, **options: Any) -> Any:
    """The scan with the arrays of a case."""
    x, dt, b, c, a, d, bias, starts, state = arrays
    inputs, parameters = SsmInputs(x, dt, b, c), SsmParameters(a, d, bias)
    return ssm_scan(inputs, parameters, state, starts, **options)


def call_step(*arrays: Any, **options: Any) -> Any:
    """The step with the arrays of a case."""
    x, dt, b, c, a, d, bias, rows, state = arrays
    inputs, parameters = SsmInputs(x, dt, b, c), SsmParameters(a, d, bias)
    return ssm_step(inputs, parameters, state, rows, **options)


def kernel_cases() -> list[KernelCase]:
    """Calls of real models, to compile and to time."""
    steps = [
        dataclasses.replace(
            MAMBA_2, name=f"mamba2_2.7b_{rows}_rows", num_new=(1,) * rows
        )
        for rows in (1, 32, 128)
    ]
    steps.append(dataclasses.replace(steps[1], name="step_float32", dtype="float32"))
    steps.append(dataclasses.replace(steps[1], name="step_groups", num_groups=8))
    return [_scan_case(case) for case in REAL_CASES] + [_step_case(c) for c in steps]


def _num_bytes(case: SsmCase, num_tokens: int, num_rows: int) -> int:
    itemsize = numpy_dtype(case.dtype).itemsize
    heads, width = case.num_heads, case.state_width
    per_token = heads * (2 * case.width + 1) + 2 * case.num_groups * width
    states = 2 * 4 * num_rows * heads * case.width * width
    return num_tokens * per_token * itemsize + states


def _scan_case(case: SsmCase) -> KernelCase:
    num_tokens, num_rows = sum(case.num_new), len(case.num_new)
    on_tpu = () if case.dtype == "float16" else ("tpu",)
    return scan_case(
        array_shapes(case, num_tokens, num_rows, num_rows + 1),
        case.num_new,
        _draw,
        operation="ssm_scan",
        name=case.name,
        function=call_scan,
        num_bytes=_num_bytes(case, num_tokens, num_rows),
        # As the recurrence has it: decay, outer product and sum; the product with C.
        num_flops=5 * num_tokens * case.num_heads * case.width * case.state_width,
        implementations=("reference", "gpu_triton", *on_tpu),
    )


def _step_case(case: SsmCase) -> KernelCase:
    num_rows = len(case.num_new)
    shapes = array_shapes(case, num_rows, num_rows, num_rows)
    return step_case(
        shapes,
        _draw,
        operation="ssm_step",
        name=case.name,
        function=call_step,
        num_bytes=_num_bytes(case, num_rows, num_rows),
        num_flops=5 * math.prod(shapes[-1][0]),
        implementations=("reference", "gpu_triton", "tpu"),
    )
