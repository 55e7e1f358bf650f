"""Named shapes of the rule and of the step, for tests, compilation and benchmarks."""

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
from pallas_kernels.gated_delta_rule.api import (
    DeltaInputs,
    gated_delta_rule,
    gated_delta_step,
)


@dataclasses.dataclass(frozen=True, slots=True)
class DeltaCase:
    """A named shape of a scan; `num_new` tokens of each sequence, then padding."""

    name: str
    num_new: tuple[int, ...]
    num_heads: int = 4
    num_key_heads: int = 2
    key_width: int = 32
    width: int = 32
    dtype: str = "float32"
    padding: int = 3


CASES = (
    DeltaCase("one_token", (1,), padding=0),
    DeltaCase("ragged", (0, 1, 69, 65, 0, 130)),
    DeltaCase("chunk_borders", (63, 64, 128, 129), num_key_heads=4),
    DeltaCase("wide", (40, 17), num_heads=2, num_key_heads=1, key_width=128, width=64),
    DeltaCase("bfloat16", (70, 3), dtype="bfloat16"),
    DeltaCase("float16", (33, 1), dtype="float16"),
)
"""Small ones, for tests."""

QWEN3_NEXT = DeltaCase("qwen3_next", (2048,), 32, 16, 128, 128, "bfloat16", 0)
REAL_CASES = (
    QWEN3_NEXT,
    dataclasses.replace(
        QWEN3_NEXT, name="qwen3_next_ragged", num_new=(1500, 1, 400, 1, 146)
    ),
    dataclasses.replace(QWEN3_NEXT, name="qwen3_next_float16", dtype="float16"),
    dataclasses.replace(QWEN3_NEXT, name="qwen3_next_float32", dtype="float32"),
)


def array_shapes(case: DeltaCase, num_tokens: int, num_rows: int, last: int) -> Shapes:
    """Shape and type of q, k, v, g, beta, row_starts or rows (`last`), and state."""
    heads, key_width = case.num_heads, case.key_width
    return (
        ((num_tokens, case.num_key_heads, key_width), case.dtype),
        ((num_tokens, case.num_key_heads, key_width), case.dtype),
        ((num_tokens, heads, case.width), case.dtype),
        ((num_tokens, heads), "float32"),
        ((num_tokens, heads), "float32"),
        ((last,), "int32"),
        ((num_rows, heads, key_width, case.width), "float32"),
    )


def make_arrays(case: DeltaCase, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Random arrays of a scan in the order of `array_shapes`."""
    num_rows = len(case.num_new)
    num_tokens = sum(case.num_new) + case.padding
    shapes = array_shapes(case, num_tokens, num_rows, num_rows + 1)
    return _draw(np.random.default_rng(seed), shapes, row_starts(case.num_new))


def _draw(
    rng: np.random.Generator, shapes: Shapes, indices: np.ndarray
) -> tuple[np.ndarray, ...]:
    arrays = [rng.normal(size=s).astype(numpy_dtype(t)) for s, t in shapes]
    arrays[3] = -rng.exponential(0.2, shapes[3][0]).astype(np.float32)
    arrays[4] = rng.uniform(0, 1, shapes[4][0]).astype(np.float32)
    arrays[5] = indices.astype(np.int32)
    return tuple(arrays)


def call_rule(*arrays: Any, **options: Any) -> Any:
    """The rule with the arrays of a case."""
    *inputs, starts, state = arrays
    inputs = DeltaInputs(*inputs)
    return gated_delta_rule(inputs, state, starts, normalise=True, **options)


def call_step(*arrays: Any, **options: Any) -> Any:
    """The step with the arrays of a case."""
    *inputs, rows, state = arrays
    inputs = DeltaInputs(*inputs)
    return gated_delta_step(inputs, state, rows, normalise=True, **options)


def kernel_cases() -> list[KernelCase]:
    """Calls of real models, to compile and to time."""
    steps = [
        dataclasses.replace(QWEN3_NEXT, name=f"qwen3_next_{n}_rows", num_new=(1,) * n)
        for n in (1, 32, 128)
    ]
    steps.append(dataclasses.replace(steps[1], name="step_float32", dtype="float32"))
    steps.append(dataclasses.replace(steps[1], name="step_float16", dtype="float16"))
    return [_rule_case(case) for case in REAL_CASES] + [_step_case(c) for c in steps]


def _implementations(case: DeltaCase, *, is_step: bool) -> tuple[str, ...]:
    on_tpu = is_step or case.dtype != "float16"
    return ("reference", "gpu_triton", *(("tpu",) if on_tpu else ()))


def _num_bytes(shapes: Shapes) -> int:
    sizes = [math.prod(s) * numpy_dtype(t).itemsize for s, t in shapes]
    return sum(sizes) + sizes[2] + sizes[-1]  # the output is as large as v


def _rule_case(case: DeltaCase) -> KernelCase:
    num_tokens, num_rows = sum(case.num_new), len(case.num_new)
    shapes = array_shapes(case, num_tokens, num_rows, num_rows + 1)
    return scan_case(
        shapes,
        case.num_new,
        _draw,
        operation="gated_delta_rule",
        name=case.name,
        function=call_rule,
        num_bytes=_num_bytes(shapes),
        # As the recurrence has it: decay, two products with the state, one update.
        num_flops=7 * num_tokens * case.num_heads * case.key_width * case.width,
        implementations=_implementations(case, is_step=False),
    )


def _step_case(case: DeltaCase) -> KernelCase:
    num_rows = len(case.num_new)
    shapes = array_shapes(case, num_rows, num_rows, num_rows)
    return step_case(
        shapes,
        _draw,
        operation="gated_delta_step",
        name=case.name,
        function=call_step,
        num_bytes=_num_bytes(shapes),
        num_flops=7 * math.prod(shapes[-1][0]),
        implementations=_implementations(case, is_step=True),
    )
