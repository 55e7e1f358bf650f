"""The device mesh: its axes, how it is made, and how it splits into replicas."""

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh

PIPE = "pipe"
DATA = "data"
EXPERT = "expert"
TENSOR = "tensor"
AXES = (PIPE, DATA, EXPERT, TENSOR)
"""Names of the mesh axes, the one with the most traffic last: neighbours share it."""


def make_mesh(
    *,
    tensor: int = 1,
    data: int = 1,
    pipe: int = 1,
    expert: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """Arranges devices in a mesh with the axes `AXES`.

    Args:
        tensor: Devices that share each layer.
        data: Independent replicas.
        pipe: Stages that share the stack of layers.
        expert: Devices that share the experts of a layer.
        devices: Devices to use, the first ones if there are more than needed; None is
            all that JAX has.

    Raises:
        ValueError: A size below one, or more devices needed than there are.
    """
    sizes = {PIPE: pipe, DATA: data, EXPERT: expert, TENSOR: tensor}
    needed = 1
    for axis, size in sizes.items():
        if size < 1:
            raise ValueError(f"mesh axis {axis}={size} must be at least 1")
        needed *= size
    available = jax.devices() if devices is None else devices
    if needed > len(available):
        wanted = " x ".join(f"{axis}={size}" for axis, size in sizes.items())
        raise ValueError(
            f"the mesh {wanted} needs {needed} devices, but there are {len(available)}"
        )
    return jax.make_mesh(
        tuple(sizes[axis] for axis in AXES),
        AXES,
        # The compiler completes the shardings that the program leaves open.
        axis_types=(AxisType.Auto,) * len(AXES),
        devices=available[:needed],
    )


def abstract_mesh(*, tensor: int = 1, pipe: int = 1) -> AbstractMesh:
    """A mesh without devices: to say how arrays would be divided.

    Args:
        tensor: Devices that share each layer.
        pipe: Stages that share the stack of layers.
    """
    sizes = {TENSOR: tensor, PIPE: pipe}
    return AbstractMesh(
        tuple(sizes.get(axis, 1) for axis in AXES),
        AXES,
        axis_types=(AxisType.Auto,) * len(AXES),
    )


def replica_meshes(mesh: Mesh) -> tuple[Mesh, ...]:
    """Splits a mesh along its data axis, which has size 1 in every part.

    Replicas of the engine share nothing, so that each of them owns a mesh.
    """
    axis = mesh.axis_names.index(DATA)
    return tuple(
        Mesh(mesh.devices.take([replica], axis), mesh.axis_names, mesh.axis_types)
        for replica in range(mesh.shape[DATA])
    )
