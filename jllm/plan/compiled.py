"""What the real compiler makes of the step programs, without the devices."""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from jllm.engine.memory import fresh_bytes, sampler_bytes
from jllm.engine.startup import StartPlan
from jllm.plan.hlo import collectives, sums

Choice = Literal["all", "largest", "none"]
"""Which programs are compiled: every size that the engine has of decode and prefill,
the largest of each, which decide the memory, or none."""


@dataclasses.dataclass(frozen=True, slots=True)
class CompiledStep:
    """Facts of one program, on one device.

    Attributes:
        kind: "decode" or "prefill".
        size: Rows or tokens.
        compile_seconds: Time that lowering and compiling took here.
        argument_bytes: Weights, pools, tables and the step's input.
        temporary_bytes: Scratch memory, and results that replace no argument.
        flops: Operations by the compiler's count, kernels left out; None if not told.
        bytes: Bytes read and written by its count, kernels left out; None if not told.
        estimated_seconds: The compiler's estimate; None if not told.
        collectives: Number and bytes of the exchanges of each kind.
        fallbacks: Kernels that could not be used, and why.
    """

    kind: str
    size: int
    compile_seconds: float
    argument_bytes: int
    temporary_bytes: int
    flops: float | None
    bytes: float | None
    estimated_seconds: float | None
    collectives: dict[str, tuple[int, int]]
    fallbacks: tuple[str, ...]


def step_keys(start: StartPlan, choice: Choice) -> tuple[tuple[str, int], ...]:
    """Kind and size of the step programs, the largest prefill first."""
    sizes = start.resolved.sizes
    if choice == "none":
        return ()
    count = 1 if choice == "largest" else None
    prefills = [("prefill", size) for size in reversed(sizes.tokens)]
    decodes = [("decode", size) for size in reversed(sizes.rows)]
    return (*prefills[:count], *decodes[:count])


def compile_steps(
    start: StartPlan, num_blocks: int, keys: Sequence[tuple[str, int]]
) -> Iterator[CompiledStep]:
    """Compiles step programs for a pool, one after the other.

    Args:
        start: The replica, on a mesh of described devices.
        num_blocks: Blocks of the pool.
        keys: Kind and size of each program.
    """
    builder = start.builder(num_blocks)
    for kind, size in keys:
        began = time.perf_counter()
        executable = builder.build(kind, size)
        seconds = time.perf_counter() - began
        yield _facts(kind, size, seconds, executable)


def temporaries(start: StartPlan, steps: Sequence[CompiledStep]) -> int:
    """Bytes that the largest program needs beside its arguments.

    Those that look at whole rows of logits are not compiled, but estimated, as the
    engine does.
    """
    logits = start.builder(1).logits(start.resolved.sizes.rows[-1])
    return max(sampler_bytes(logits), *(step.temporary_bytes for step in steps))


def _facts(kind: str, size: int, seconds: float, executable: Any) -> CompiledStep:
    program = executable.program
    costs = _costs(program)
    return CompiledStep(
        kind=kind,
        size=size,
        compile_seconds=round(seconds, 1),
        argument_bytes=program.memory_analysis().argument_size_in_bytes,
        temporary_bytes=fresh_bytes(program),
        flops=costs.get("flops"),
        bytes=costs.get("bytes accessed"),
        estimated_seconds=costs.get("optimal_seconds"),
        collectives=sums(collectives(program.as_text())),
        fallbacks=tuple(sorted(map(str, executable.fallbacks))),
    )


def _costs(program: Any) -> dict[str, float]:
    """What the compiler expects of a run; that of a GPU says nothing without one."""
    try:
        costs = program.cost_analysis() or {}
    except (NotImplementedError, RuntimeError):
        return {}
    return {name: value for name, value in costs.items() if value >= 0}
