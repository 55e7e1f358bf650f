"""Captured activations: which tokens of a step they belong to, and who gets them."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from jllm.scheduler.plan import StepPlan

Activations = Mapping[str, np.ndarray]
"""Activations of consecutive tokens of a sequence by name, `[tokens, …]`."""


class CapturedTokens:
    """What has been captured for one sequence and not been handed on.

    Steps are launched before the last one's results are read: positions are claimed in
    the order of the launches, and results come in the same order.
    """

    def __init__(self, names: Sequence[str]) -> None:
        """Begins with nothing; `names` are the activations that are asked for."""
        self.names = tuple(names)
        self._next = 0
        self._pieces: list[Activations] = []

    def claim(self, start: int, end: int) -> range:
        """Positions of a launched step that are not claimed yet.

        What is computed again, after a preemption, was claimed before.
        """
        claimed = range(max(start, self._next), end)
        if claimed:
            self._next = end
        return claimed

    def add(self, piece: Activations) -> None:
        """Takes the activations of the tokens claimed longest ago."""
        self._pieces.append(piece)

    def take(self) -> tuple[Activations, ...]:
        """Gives what has come since the last call."""
        pieces, self._pieces = tuple(self._pieces), []
        return pieces


@dataclasses.dataclass(frozen=True, slots=True)
class CaptureSegment:
    """The tokens of one row of a step that are captured.

    Attributes:
        owner: Who gets them.
        place: Place of the first of them in the step.
        positions: Their positions in the sequence.
    """

    owner: CapturedTokens
    place: int
    positions: range

    @property
    def places(self) -> range:
        """Their places in the step."""
        return range(self.place, self.place + len(self.positions))


def claim_captures(
    plan: StepPlan, owners: Sequence[CapturedTokens | None]
) -> list[CaptureSegment]:
    """Finds the tokens of a step that are captured, and claims them.

    Args:
        plan: The step, which must be launched.
        owners: Of each of its rows; None for one that captures nothing.
    """
    found: list[CaptureSegment] = []
    count = len(plan.decoding)
    for place, owner in enumerate(owners[:count]):
        if owner is not None:
            position = int(plan.decoding.positions[place])
            claimed = owner.claim(position, position + 1)
            if claimed:
                found.append(CaptureSegment(owner, place, claimed))
    place = count
    for row, owner in zip(plan.chunks, owners[count:], strict=True):
        if owner is not None:
            claimed = owner.claim(row.position, row.position + row.num_tokens)
            if claimed:
                first = place + claimed.start - row.position
                found.append(CaptureSegment(owner, first, claimed))
        place += row.num_tokens
    return found


@dataclasses.dataclass(frozen=True, slots=True)
class Captures:
    """What a launched step captures.

    Attributes:
        segments: Its tokens, and who gets them.
        arrays: Activations of all tokens of the step, on their way to the host.
    """

    segments: Sequence[CaptureSegment]
    arrays: Mapping[str, jax.Array]

    def file(self) -> int:
        """Waits for the arrays and hands them out; returns how many were copied."""
        arrays = {name: np.asarray(value) for name, value in self.arrays.items()}
        for segment in self.segments:
            start, stop = segment.places.start, segment.places.stop
            segment.owner.add(
                {
                    name: _piece(name, arrays[name][start:stop], segment.positions)
                    for name in segment.owner.names
                }
            )
        return len(arrays)


def _piece(name: str, values: np.ndarray, positions: range) -> np.ndarray:
    """A copy, since a view would keep the activations of the whole step.

    Attention weights have a place for every position that a block table holds.
    """
    if name.endswith("attn.probs"):
        values = values[:, :, : positions.stop]
    # NumPy has no arithmetic of its own for bfloat16.
    is_half = values.dtype.itemsize == 2
    return values.astype(np.float32) if is_half else values.copy()
