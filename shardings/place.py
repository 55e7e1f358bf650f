"""Where each array of a declared tree goes on a mesh."""

import math
from typing import Any, Protocol, runtime_checkable

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from shardings.rules import DEFAULT_RULES, Rules, partition_spec


@runtime_checkable
class Declared(Protocol):
    """An array that is declared, and perhaps not made yet."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        ...

    @property
    def axes(self) -> tuple[str | None, ...]:
        """Logical axis of each dimension, None for one that is not divided."""
        ...


def tree_shardings(
    tree: Any, mesh: Mesh | AbstractMesh, rules: Rules = DEFAULT_RULES
) -> Any:
    """Maps a tree of `Declared` to the tree of their `NamedSharding`.

    Arrays divided in the same way share one object, so that comparing the shardings of
    a step's arguments is a comparison of identity.

    Raises:
        ValueError: A collision, an axis without a rule, as many axes as dimensions not
            given, or a dimension that its devices cannot share evenly.
    """
    made: dict[PartitionSpec, NamedSharding] = {}

    def place(path: Any, array: Declared) -> NamedSharding:
        spec = partition_spec(array.axes, rules)
        _check_divides(
            jax.tree_util.keystr(path, simple=True, separator="."), array, spec, mesh
        )
        return made.setdefault(spec, NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(
        place, tree, is_leaf=lambda node: hasattr(node, "axes")
    )


def _check_divides(
    name: str, array: Declared, spec: PartitionSpec, mesh: Mesh | AbstractMesh
) -> None:
    if len(array.axes) != len(array.shape):
        raise ValueError(
            f"{name}: axes {array.axes} do not name the dimensions of {array.shape}"
        )
    for size, axis, entry in zip(array.shape, array.axes, spec, strict=True):
        mesh_axes = (entry,) if isinstance(entry, str) else tuple(entry or ())
        parts = math.prod(mesh.shape[mesh_axis] for mesh_axis in mesh_axes)
        if size % parts:
            raise ValueError(
                f"{name}: dimension {axis!r} of {array.shape} cannot be shared evenly "
                f"by {parts} devices"
            )
