"""Counts of a compiled program, from its text and from what the compiler reports."""

import re
from collections.abc import Iterator
from typing import Any

from jllm.plan.hlo import Instruction, parse_instruction
from tests.aot import hlo

NO_LAUNCH = frozenset(
    {
        "parameter",
        "constant",
        "bitcast",
        "tuple",
        "get-tuple-element",
        "call",
        "while",
        "conditional",
        "optimization-barrier",
        "after-all",
        "partition-id",
        "replica-id",
        "copy-done",
        "slice-done",
        "async-done",
        "all-reduce-done",
        "all-gather-done",
        "collective-permute-done",
    }
)
"""Opcodes that start nothing on the device."""

CAPTURED = frozenset({"fusion", "custom-call", "copy", "all-reduce", "all-gather"})
"""Opcodes that XLA's GPU runtime records into a command buffer by default or when asked
to: fusions, cuBLAS and Triton calls, device copies, collectives."""


CALLED = re.compile(r"[={,] ?%?([\w.\-]+)")
"""Names after an equals sign or in a list; those of computations are looked up."""


def executed(text: str) -> Iterator[Instruction]:
    """Instructions that run by themselves: of the entry and what it calls or repeats.

    Not those inside of a fusion, nor those of the function of a reduction or a sort.
    """
    computations = hlo.split_computations(text)
    entry = re.search(r"^ENTRY %?([\w.\-]+)", text, re.MULTILINE)
    assert entry is not None
    waiting, seen = [entry[1]], {entry[1]}
    while waiting:
        for line in computations[waiting.pop()]:
            instruction = parse_instruction(line)
            if instruction is None:
                continue
            yield instruction
            if instruction.opcode in ("while", "call", "conditional", "async-start"):
                called = set(CALLED.findall(line)) & set(computations)
                waiting += called - seen
                seen |= called


def program_counts(compiled: Any) -> dict[str, int]:
    """Counts of one compiled program, per device.

    Args:
        compiled: What `jax.jit(...).lower(...).compile()` gave.

    Returns:
        By name: `instructions` outside of fusions, `fusions`, `launches` (instructions
        that start something on the device), `copies`, `custom_calls`, `loops`,
        `uncaptured` (launches that no command buffer can hold), `argument_bytes`,
        `temporary_bytes` and, where the compiler tells, `flops` and `bytes_accessed`.
    """
    text = compiled.as_text()
    opcodes = [found.opcode for found in executed(text)]
    launched = [name for name in opcodes if name not in NO_LAUNCH]
    memory = compiled.memory_analysis()
    counts = {
        "instructions": len(opcodes),
        "fusions": opcodes.count("fusion"),
        "launches": len(launched),
        "copies": hlo.count_copies(text),
        "custom_calls": opcodes.count("custom-call"),
        "loops": opcodes.count("while"),
        "uncaptured": sum(name not in CAPTURED for name in launched),
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
    }
    return counts | _costs(compiled)


def _costs(compiled: Any) -> dict[str, int]:
    """What the compiler expects of a run; that of a GPU says nothing without one."""
    try:
        costs = compiled.cost_analysis() or {}
    except (NotImplementedError, RuntimeError):
        return {}
    names = {"flops": "flops", "bytes accessed": "bytes_accessed"}
    return {ours: int(costs[name]) for name, ours in names.items() if name in costs}
