"""Reads the text of a compiled program: its instructions, and what devices send."""

import dataclasses
import math
import re

BYTES = {
    "pred": 1,
    "s8": 1,
    "f8e4m3fn": 1,
    "f8e5m2": 1,
    "u8": 1,
    "bf16": 2,
    "f16": 2,
    "s16": 2,
    "u16": 2,
    "f32": 4,
    "s32": 4,
    "u32": 4,
    "f64": 8,
    "s64": 8,
    "u64": 8,
}
COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)

INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*)$")
ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
OPCODE = re.compile(r"(?:^|[)}\]] )([a-z][\w\-]*)\(")
RETURNS_OPERAND = ("all-gather-start", "collective-permute-start")
"""Instructions whose result begins with their operand."""


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        opcode: Its name.
        arrays: Type, dimensions and layout of each array of its result.
        text: The whole line.
    """

    opcode: str
    arrays: tuple[tuple[str, tuple[int, ...], str], ...]
    text: str

    @property
    def elements(self) -> int:
        """Elements of the largest array of the result."""
        return max((math.prod(dims) for _, dims, _ in self.arrays), default=0)

    @property
    def bytes(self) -> int:
        """Bytes of all arrays of the result."""
        arrays = self.arrays
        if self.opcode in RETURNS_OPERAND:
            arrays = arrays[len(arrays) // 2 :]
        return sum(math.prod(dims) * BYTES.get(kind, 0) for kind, dims, _ in arrays)

    @property
    def shape(self) -> str:
        """The first array of the result, as HLO writes it."""
        kind, dims, layout = self.arrays[0]
        return f"{kind}[{','.join(map(str, dims))}]{{{layout}}}"


def parse_instruction(line: str) -> Instruction | None:
    """The instruction of a line, or None."""
    match = INSTRUCTION.match(line)
    if match is None:
        return None
    # A layout holds parentheses, for example {1,0:T(8,128)}: none of them is an opcode.
    plain = re.sub(r"\{[^{}]*\}", lambda m: "{" + "_" * (len(m[0]) - 2) + "}", match[2])
    opcode = OPCODE.search(plain)
    if opcode is None:
        return None
    result = match[2][: opcode.start(1)]
    arrays = tuple(
        (kind, tuple(int(d) for d in dims.split(",") if d), layout or "")
        for kind, dims, layout in ARRAY.findall(result)
        if kind in BYTES
    )
    return Instruction(opcode[1], arrays, line.strip())


def collectives(text: str) -> list[tuple[str, int]]:
    """Opcode and bytes of every exchange between devices, wherever it stands."""
    found: list[tuple[str, int]] = []
    for line in text.splitlines():
        # Most lines are something else, and parsing is slow.
        if not any(name in line for name in COLLECTIVES):
            continue
        instruction = parse_instruction(line)
        if instruction is None:
            continue
        opcode = instruction.opcode.removesuffix("-start")
        if opcode in COLLECTIVES:
            found.append((opcode, instruction.bytes))
    return found


def sums(found: list[tuple[str, int]]) -> dict[str, tuple[int, int]]:
    """Number and bytes of the exchanges of each kind."""
    total: dict[str, tuple[int, int]] = {}
    for opcode, size in found:
        count, num_bytes = total.get(opcode, (0, 0))
        total[opcode] = (count + 1, num_bytes + size)
    return total
