"""From a parameter back to the checkpoint tensors that it was put together from."""

import math
from collections.abc import Callable

import numpy as np

from jllm.models.base import ParamSpec, Part
from jllm.weights.lazy import Box, LazyArray

Read = Callable[[tuple[slice, ...]], np.ndarray]
"""Reads a part of a parameter; the slices may have steps."""


def part_arrays(spec: ParamSpec, read: Read) -> dict[str, LazyArray]:
    """The checkpoint tensors of a parameter, each seen through the parameter.

    What loading does to each part is undone: its place along `concat_axis`, copies of
    KV heads, padding, the reshape, the choice of rows and the transposition.

    Args:
        spec: The parameter; every part must declare its shape.
        read: Gives the parameter's values.

    Returns:
        Tensor name to array, in the shape that the checkpoint has it in.
    """
    pieces: dict[str, list[tuple[Part, LazyArray]]] = {}
    start = 0
    for part in spec.parts:
        array, start = _part_array(spec, part, start, read)
        pieces.setdefault(part.name, []).append((part, array))
    return {name: _whole(found) for name, found in pieces.items()}


def _part_array(
    spec: ParamSpec, part: Part, start: int, read: Read
) -> tuple[LazyArray, int]:
    """What was taken of the tensor, and where the next part starts."""
    taken = _taken_shape(part)
    axis, repeat = spec.concat_axis, part.repeat
    shape = list(spec.shape)
    if axis != 0:
        shape[0] //= repeat
    shape[axis] = math.prod(taken) // math.prod(shape[:axis] + shape[axis + 1 :])

    def read_part(box: Box) -> np.ndarray:
        index = [slice(*pair) for pair in box]
        low, high = box[0]
        # Of the copies of a KV head any one will do.
        index[0] = slice(low * repeat, (high - 1) * repeat + 1, repeat)
        low, high, step = index[axis].start, index[axis].stop, index[axis].step
        index[axis] = slice(low + start, high + start, step)
        return read(tuple(index))

    length = shape[axis] * (repeat if axis == 0 else 1)
    return LazyArray(shape, read_part, taken), start + length


def _taken_shape(part: Part) -> tuple[int, ...]:
    """Shape of the chosen rows, outputs first."""
    if part.shape is None:
        raise ValueError(f"part {part.name!r} does not declare its shape")
    shape = part.shape[::-1] if part.transposed else part.shape
    if part.rows is None:
        return shape
    first, last = part.rows
    return (part.groups * (last - first), *shape[1:])


def _whole(pieces: list[tuple[Part, LazyArray]]) -> LazyArray:
    """A tensor from the rows that were taken of it; any copy of all of them does."""
    part, array = pieces[0]
    if part.rows is not None:
        array = _joined(pieces)
    return array.T if part.transposed else array


def _joined(pieces: list[tuple[Part, LazyArray]]) -> LazyArray:
    """Rows of several parts, in each of the groups one after the other."""
    part = pieces[0][0]
    assert part.shape is not None
    shape = part.shape[::-1] if part.transposed else part.shape
    run, rest = shape[0] // part.groups, shape[1:]
    runs: list[tuple[int, int, LazyArray]] = []
    for piece, array in pieces:
        first, last = piece.rows or (0, run)
        runs.append((first, last, array.reshape(part.groups, last - first, *rest)))
    runs.sort(key=lambda entry: entry[0])

    def read(box: Box) -> np.ndarray:
        (low, high), others = box[1], box[2:]
        found: list[np.ndarray] = []
        for first, last, array in runs:
            start, stop = max(low, first), min(high, last)
            if start < stop or (low == high and not found):
                cut = slice(max(start - first, 0), max(stop - first, 0))
                index = (slice(*box[0]), cut, *(slice(*pair) for pair in others))
                found.append(array[index])
        return np.concatenate(found, axis=1)

    return LazyArray((part.groups, run, *rest), read, shape)
