"""What a model's parameters are and where a mesh puts them, before any is made."""

import dataclasses
import math
import re
from typing import Any

import jax
import numpy as np

from jllm.models.base import Model, published_parameter_count
from shardings.mesh import abstract_mesh
from shardings.place import tree_shardings

LAYER = re.compile(r"(?<=\.)\d+(?=\.|$)")
"""The number of a layer in a parameter's name."""


@dataclasses.dataclass(frozen=True, slots=True)
class ParameterRow:
    """Parameters that differ in nothing but their layer.

    Attributes:
        name: Path in the tree, `*` for the number of the layer.
        count: How many there are.
        shape: Shape, with padding and copied KV heads.
        dtype: Type.
        axes: Logical axis of each dimension, None for one that is not divided.
        mesh_axes: Mesh axes that divide each dimension.
        shape_per_device: Shape of a device's share.
        bytes_per_device: Bytes of a device's share of all `count` of them.
    """

    name: str
    count: int
    shape: tuple[int, ...]
    dtype: str
    axes: tuple[str | None, ...]
    mesh_axes: tuple[tuple[str, ...], ...]
    shape_per_device: tuple[int, ...]
    bytes_per_device: int


@dataclasses.dataclass(frozen=True, slots=True)
class ModelSummary:
    """Sizes of a model on a mesh.

    Attributes:
        parameters: Numbers in the checkpoint, each tensor once.
        weight_bytes: Their bytes, on one device without padding.
        weight_bytes_per_device: Bytes of a device's share, padding and copies included.
        kv_bytes_per_token: Bytes of a token in the caches of all layers, on one device.
        kv_bytes_per_token_per_device: Bytes of a device's heads, copied ones included.
        max_model_len: Tokens of the context that is sized.
        context_bytes: Bytes of such a context, of which a layer with a window keeps the
            newest tokens, on one device.
        context_bytes_per_device: Bytes of a device's heads.
        rows: The sharding table.
    """

    parameters: int
    weight_bytes: int
    weight_bytes_per_device: int
    kv_bytes_per_token: int
    kv_bytes_per_token_per_device: int
    max_model_len: int
    context_bytes: int
    context_bytes_per_device: int
    rows: tuple[ParameterRow, ...]


def summarize(model: Model, alone: Model) -> ModelSummary:
    """Sizes of a model.

    Args:
        model: For the mesh in its options, which need not have devices.
        alone: The same one for a single device.
    """
    specs, dtype = model.specs(), np.dtype(model.options.dtype)
    mesh = model.options.mesh or abstract_mesh()
    found: dict[tuple[Any, ...], list[str]] = {}
    places = jax.tree.leaves(tree_shardings(specs, mesh))
    for (path, spec), place in zip(
        jax.tree_util.tree_leaves_with_path(specs), places, strict=True
    ):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        key = (LAYER.sub("*", name), spec.shape, spec.axes, place)
        found.setdefault(key, []).append(name)
    rows = tuple(
        _row(name, spec_shape, axes, place, len(names), dtype)
        for (name, spec_shape, axes, place), names in found.items()
    )
    parameters = published_parameter_count(specs)
    size, context = model.options.tensor_size, model.options.max_model_len
    return ModelSummary(
        parameters=parameters,
        weight_bytes=parameters * dtype.itemsize,
        weight_bytes_per_device=sum(row.bytes_per_device for row in rows),
        kv_bytes_per_token=_kv_bytes(alone),
        kv_bytes_per_token_per_device=_kv_bytes(model) // size,
        max_model_len=context,
        context_bytes=_kv_bytes(alone, context),
        context_bytes_per_device=_kv_bytes(model, context) // size,
        rows=rows,
    )


def _row(
    name: str,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    place: Any,
    count: int,
    dtype: np.dtype[Any],
) -> ParameterRow:
    share = place.shard_shape(shape)
    return ParameterRow(
        name=name,
        count=count,
        shape=shape,
        dtype=dtype.name,
        axes=axes,
        mesh_axes=tuple(_entry(entry) for entry in place.spec),
        shape_per_device=share,
        bytes_per_device=count * math.prod(share) * dtype.itemsize,
    )


def _entry(entry: Any) -> tuple[str, ...]:
    """The mesh axes of one dimension."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def _kv_bytes(model: Model, num_tokens: int = 1) -> int:
    """Bytes of so many tokens of a sequence, outside of windows only where needed."""
    block = 16
    elements = math.prod(model.kv_shape(1, block)) // block
    places = sum(
        len(group.layers) * min(num_tokens, group.window or num_tokens)
        for group in model.cache_groups
    )
    return places * elements * np.dtype(model.kv_dtype).itemsize
