"""Attention that stores the new tokens, at the size of real models."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import Array

from pallas_kernels.common.attention_cases import (
    TPU_BLOCK_SIZE,
    make_kernel_case,
)
from pallas_kernels.common.cases import AttentionCase, KernelCase
from pallas_kernels.common.kv_update import NewTokens


def make_update_case(
    operation: str, function: Callable[..., Any], case: AttentionCase
) -> KernelCase:
    """The call of an operation that stores what it attends to, on a TPU.

    Args:
        operation: Name of the operation.
        function: Takes the case, then tokens and the arrays of attention from the
            pool on, and `implementation` and `target` by name.
        case: Shapes, types and options.
    """
    tpu_case = dataclasses.replace(
        case, name=f"tpu_{case.name}", block_size=TPU_BLOCK_SIZE
    )
    attention = make_kernel_case(operation, function, tpu_case)
    q, kv = attention.arguments[:2]
    new = jax.ShapeDtypeStruct((q.shape[0], kv.shape[2], kv.shape[4]), q.dtype)
    num_values = 2 * new.size
    return dataclasses.replace(
        attention,
        function=partial(_call, attention.function),
        arguments=(q, new, new, *attention.arguments[1:]),
        make_arguments=partial(_make_arguments, attention, new),
        num_bytes=attention.num_bytes
        + num_values * (q.dtype.itemsize + kv.dtype.itemsize),
        donated=(3,),
    )


def _call(
    function: Callable[..., Any],
    q: Array,
    keys: Array,
    values: Array,
    *others: Array,
    **choice: Any,
) -> Any:
    return function(NewTokens(q, keys, values), *others, **choice)


def _make_arguments(
    attention: KernelCase, new: jax.ShapeDtypeStruct, rng: np.random.Generator
) -> tuple[np.ndarray, ...]:
    q, *others = attention.make_arguments(rng)
    drawn = rng.standard_normal((2, *new.shape), np.float32)
    return (q, *drawn.astype(new.dtype), *others)
