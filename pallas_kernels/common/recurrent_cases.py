"""Shapes of layers that carry a state per sequence, for their cases."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.common.cases import KernelCase

Shapes = tuple[tuple[tuple[int, ...], str], ...]
"""Shape and type of each array, the row starts or rows and the states last."""


def row_starts(num_new: Sequence[int]) -> np.ndarray:
    """First token of each sequence, then their number."""
    return np.concatenate([[0], np.cumsum(num_new)]).astype(np.int32)


def scan_case(
    shapes: Shapes,
    num_new: Sequence[int],
    draw: Callable[..., Any],
    **facts: Any,
) -> KernelCase:
    """A scan over sequences of so many tokens.

    Args:
        shapes: Of its arrays.
        num_new: Tokens of each sequence.
        draw: Takes a generator, and `shapes` and `indices` by name; gives the arrays.
        **facts: The other fields of the case.
    """
    return _make_case(shapes, row_starts(num_new), draw, facts)


def step_case(shapes: Shapes, draw: Callable[..., Any], **facts: Any) -> KernelCase:
    """A step of each row, with the states in place; see `scan_case`."""
    facts["donated"] = (len(shapes) - 1,)
    (num_rows,), _ = shapes[-2]
    return _make_case(shapes, np.arange(num_rows), draw, facts)


def _make_case(
    shapes: Shapes, indices: np.ndarray, draw: Callable[..., Any], facts: Any
) -> KernelCase:
    arguments = tuple(jax.ShapeDtypeStruct(s, jnp.dtype(t)) for s, t in shapes)
    make = partial(draw, shapes=shapes, indices=indices)
    return KernelCase(arguments=arguments, make_arguments=make, **facts)
