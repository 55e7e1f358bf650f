"""How a share of a checkpoint tensor fits the parameter that it fills."""

import math
from collections.abc import Iterator
from typing import Any

from jllm.models.base import ParamSpec, Part


def part_view(part: Part, shape: tuple[int, ...], stored: Any) -> Any:
    """The share as the parameter has it, its first dimension cut in two.

    A view, so that only what is used of it is read, and so that an array of the
    tensor's shape can be filled through it.

    Args:
        part: The share.
        shape: Its shape, as `fitted_shape` gives it.
        stored: An array of the tensor's shape.
    """
    rows = stored.T if part.transposed else stored
    if part.rows is not None:
        rows = rows.reshape(part.groups, -1, *rows.shape[1:])
        rows = rows[:, slice(*part.rows)]
    outer = shape[0] if part.groups == 1 else part.groups
    return rows.reshape(outer, shape[0] // outer, *shape[1:])


def fitted_shape(
    spec: ParamSpec, part: Part, stored: tuple[int, ...]
) -> tuple[int, ...] | None:
    """The shape of what is taken, in the parameter's dimensions; None if it has none.

    The dimension of concatenation follows from the number of elements. Only splitting
    a dimension of the tensor, or adding one of size 1, is a fit: a transposed tensor
    has the right number of elements too.

    Args:
        spec: The parameter.
        part: The tensor's share in it.
        stored: Shape of the tensor in the checkpoint.
    """
    if part.shape is not None and part.shape != stored:
        return None
    taken = _taken_shape(part, stored)
    axis, shape = spec.concat_axis, list(spec.shape)
    if axis != 0:
        if shape[0] % part.repeat:
            return None
        shape[0] //= part.repeat
    others = math.prod(shape[:axis] + shape[axis + 1 :])
    if taken is None or not others or math.prod(taken) % others:
        return None
    shape[axis] = math.prod(taken) // others
    # Groups of heads that share a run of rows may be cut, not joined.
    if part.groups > 1 and shape[0] % part.groups:
        return None
    return tuple(shape) if _merges_into(shape, taken) else None


def _taken_shape(part: Part, stored: tuple[int, ...]) -> tuple[int, ...] | None:
    """Shape of the chosen rows of a tensor, all groups in one dimension."""
    if part.transposed:
        stored = stored[::-1]
    if part.rows is None:
        return stored
    first, last = part.rows
    if not stored or stored[0] % part.groups or last > stored[0] // part.groups:
        return None
    return (part.groups * (last - first), *stored[1:])


def _merges_into(shape: list[int], stored: tuple[int, ...]) -> bool:
    """Whether products of neighbouring dimensions of `shape` are those of `stored`."""
    dims: Iterator[int] = iter(shape)
    for size in stored:
        product = 1
        while product != size:
            step = next(dims, None)
            if step is None or product > size:
                return False
            product *= step
    return all(rest == 1 for rest in dims)
