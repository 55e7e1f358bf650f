"""Rules that map the logical axes of an array to the axes of the mesh."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from jax.sharding import PartitionSpec

from shardings.mesh import EXPERT, PIPE, TENSOR

Rules = Mapping[str, tuple[str, ...]]
"""Logical axis to the mesh axes that divide it; an empty tuple is for none."""

DEFAULT_RULES: Rules = MappingProxyType(
    {
        "heads": (TENSOR,),
        "kv_heads": (TENSOR,),
        "mlp": (TENSOR,),
        "experts": (EXPERT,),
        "stages": (PIPE,),
        # Embedding and head belong to no stage: all of them share the vocabulary.
        "vocab": (PIPE, TENSOR),
    }
)


def partition_spec(
    axes: Sequence[str | None], rules: Rules = DEFAULT_RULES
) -> PartitionSpec:
    """Translates the logical axes of an array.

    Args:
        axes: Logical axis of each dimension, None for one that is not divided.
        rules: Mesh axes of each logical axis.

    Raises:
        ValueError: An axis without a rule, or two dimensions on one mesh axis.
    """
    owner: dict[str, str] = {}
    entries: list[str | tuple[str, ...] | None] = []
    for axis in axes:
        mesh_axes = () if axis is None else _rule(axis, rules)
        for mesh_axis in mesh_axes:
            if mesh_axis in owner:
                raise ValueError(
                    f"logical axes {owner[mesh_axis]!r} and {axis!r} of {tuple(axes)} "
                    f"are both mapped to mesh axis {mesh_axis!r}"
                )
            owner[mesh_axis] = str(axis)
        entries.append(_entry(mesh_axes))
    return PartitionSpec(*entries)


def _rule(axis: str, rules: Rules) -> tuple[str, ...]:
    if axis not in rules:
        known = ", ".join(sorted(rules))
        raise ValueError(f"no rule for logical axis {axis!r}; there are: {known}")
    return rules[axis]


def _entry(mesh_axes: tuple[str, ...]) -> str | tuple[str, ...] | None:
    """The shortest spelling, since specs are compared literally in places."""
    if len(mesh_axes) > 1:
        return mesh_axes
    return mesh_axes[0] if mesh_axes else None
