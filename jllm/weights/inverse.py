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
    KV heads, padding, the reshape.

    Args:
        spec: The parameter; every part must declare its shape.
        read: Gives the parameter's values.

    Returns:
        Tensor name to array, in the shape that the checkpoint has it in.
    """
    arrays: dict[str, LazyArray] = {}
    start = 0
    for part in spec.parts:
        arrays[part.name], start = _part_array(spec, part, start, read)
    return arrays


def _part_array(
    spec: ParamSpec, part: Part, start: int, read: Read
) -> tuple[LazyArray, int]:
    """The tensor, and where the next part starts along `concat_axis`."""
    if part.shape is None:
        raise ValueError(f"part {part.name!r} does not declare its shape")
    axis, repeat = spec.concat_axis, part.repeat
    shape = list(spec.shape)
    if axis != 0:
        shape[0] //= repeat
    shape[axis] = math.prod(part.shape) // math.prod(shape[:axis] + shape[axis + 1 :])

    def read_part(box: Box) -> np.ndarray:
        index = [slice(*pair) for pair in box]
        low, high = box[0]
        # Of the copies of a KV head any one will do.
        index[0] = slice(low * repeat, (high - 1) * repeat + 1, repeat)
        low, high, step = index[axis].start, index[axis].stop, index[axis].step
        index[axis] = slice(low + start, high + start, step)
        return read(tuple(index))

    length = shape[axis] * (repeat if axis == 0 else 1)
    return LazyArray(shape, read_part, part.shape), start + length
