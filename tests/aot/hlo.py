"""Reads the text of a compiled program: what moves, and what is donated."""

import re

from jllm.plan.hlo import COLLECTIVES, parse_instruction

MAKES_NOTHING = {
    "parameter",
    "bitcast",
    "tuple",
    "get-tuple-element",
    "while",
    "conditional",
    "call",
    "optimization-barrier",
    "copy-done",
    "slice-start",
    "slice-done",
}
"""Opcodes that make no array of their own; a copy is counted where it starts, and a
weight fetched slice by slice arrives in the memory of a TPU's core."""

UPDATES = re.compile(r" (?:scatter|dynamic-update-slice)\(")


def split_computations(text):
    """Lines of each computation, by name."""
    computations, name = {}, None
    for line in text.splitlines():
        if line and not line[0].isspace():
            head = re.match(r"(?:ENTRY )?%?([\w.\-]+) \(", line)
            name = head[1] if head and line.rstrip().endswith("{") else None
            if name is not None:
                computations[name] = []
        elif name is not None:
            computations[name].append(line)
    return computations


def instructions(text):
    """All instructions outside of fusions, each with the lines that it fuses."""
    computations = split_computations(text)
    fused = set(re.findall(r" fusion\(.*?calls=%?([\w.\-]+)", text))
    for name, lines in computations.items():
        if name in fused:
            continue
        for line in lines:
            instruction = parse_instruction(line)
            if instruction is not None:
                called = re.search(r"calls=%?([\w.\-]+)", line)
                inner = computations.get(called[1], []) if called else []
                yield instruction, inner


def large_moves(text, sizes, pool_size):
    """What makes an array as large as a pool leaf or a weight, in elements.

    Only an update in place may have such a result: a scatter, a dynamic update of a
    slice, or a kernel that aliases its operand. A copy into the memory of a TPU's core
    is no move either: that is how a weight is read.
    """
    return [
        f"{instruction.opcode} {instruction.shape}"
        for instruction, inner in instructions(text)
        if (instruction.elements in sizes or instruction.elements >= pool_size)
        and not _is_free(instruction, inner)
    ]


def _is_free(instruction, inner):
    opcode = instruction.opcode
    if opcode in MAKES_NOTHING or opcode in ("scatter", "dynamic-update-slice"):
        return True
    if opcode.removesuffix("-start") in COLLECTIVES:
        return False
    if opcode == "copy-start":
        (_, _, target), (_, _, source) = instruction.arrays[:2]
        return "S(1)" in target and target.replace("S(1)", "") == source
    if opcode == "custom-call":
        fetched = "ConcatBitcast" in instruction.text
        return fetched or "output_to_operand_aliasing" in instruction.text
    lines = [instruction.text, *inner]
    return opcode == "fusion" and any(UPDATES.search(line) for line in lines)


def count_copies(text):
    """Copies of any size outside of fusions."""
    return sum(i.opcode in ("copy", "copy-start") for i, _ in instructions(text))


def custom_calls(text):
    """How often each foreign kernel is called."""
    targets = re.findall(r'custom_call_target="([^"]+)"', text)
    return {target: targets.count(target) for target in sorted(set(targets))}


def aliased_parameters(text):
    """Parameters whose buffer is that of a result."""
    header = text.splitlines()[0]
    return sorted(int(n) for n in re.findall(r"\}: \((\d+), \{\}", header))
