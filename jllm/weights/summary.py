"""What a model's parameters are and where a mesh puts them, before any is made."""

import dataclasses
import math
import re
from typing import Any

import jax
import numpy as np

from jllm.models.base import Model, ParamSpec
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
        rows: The sharding table.
    """

    parameters: int
    weight_bytes: int
    weight_bytes_per_device: int
    kv_bytes_per_token: int
    kv_bytes_per_token_per_device: int
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
    parameters = checkpoint_parameters(specs)
    return ModelSummary(
        parameters=parameters,
        weight_bytes=parameters * dtype.itemsize,
        weight_bytes_per_device=sum(row.bytes_per_device for row in rows),
        kv_bytes_per_token=_kv_bytes(alone),
        kv_bytes_per_token_per_device=_kv_bytes(model) // model.options.tensor_size,
        rows=rows,
    )


def checkpoint_parameters(specs: Any) -> int:
    """Numbers in the checkpoint: no padding, no copies, each tensor once."""
    sizes: dict[str, int] = {}
    for spec in jax.tree.leaves(specs):
        for part in spec.parts:
            sizes[part.name] = math.prod(part.shape or _only_shape(spec))
    return sum(sizes.values())


def _only_shape(spec: ParamSpec) -> tuple[int, ...]:
    if len(spec.parts) != 1 or spec.pad_axis is not None:
        raise ValueError(f"the parts of {spec} must declare their shapes")
    return spec.shape


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


def _kv_bytes(model: Model) -> int:
    """Bytes per token in the caches of all layers."""
    block = 16
    elements = math.prod(model.kv_shape(1, block)) // block * model.num_layers
    return elements * np.dtype(model.kv_dtype).itemsize
