"""Descriptions of devices that are not here, from the compilers that know them."""

import functools
import importlib.util
import os
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from jllm.errors import ConfigError
from jllm.plan.topology import Layout, Topology
from shardings.mesh import make_mesh, replica_meshes

COMPILERS = {"tpu": ("libtpu",), "gpu": ("jax_cuda13_plugin", "jax_cuda12_plugin")}
"""Packages of which one is needed."""

SETTINGS = {
    # There is nobody to ask about the machine, and several processes may compile.
    "tpu": {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "true"},
    # Autotuning would need the device.
    "gpu": {"XLA_FLAGS": "--xla_gpu_autotune_level=0"},
}
"""What the compilers read from the environment, and from nowhere else."""


@functools.cache
def described_devices(topology: Topology) -> tuple[Any, ...]:
    """The devices of a topology; they can be compiled for, not run on.

    One process can compile for one platform. The environment of the process is changed:
    it has to be called before JAX has made a backend.

    Raises:
        ConfigError: The compiler is not installed.
    """
    platform = topology.device.platform
    if not any(map(importlib.util.find_spec, COMPILERS[platform])):
        raise ConfigError(
            f"the compiler for {topology.device.name} is not installed: pip install "
            "'jllm[aot]', or give --programs none for an estimate without it"
        )
    import jax
    from jax.experimental import topologies

    for name, value in SETTINGS[platform].items():
        given = os.environ.get(name, "")  # noqa: TID251
        os.environ[name] = f"{given} {value}" if name == "XLA_FLAGS" else value  # noqa: TID251
    jax.config.update("jax_platforms", "cpu")
    if platform == "tpu":
        # The compiler knows whole hosts only, and of one chip all that it is alone.
        name = topology.name.replace(":1x1", ":2x2")
        slice_ = topologies.get_topology_desc(name, platform="tpu")
        return tuple(slice_.devices[: topology.num_devices])
    name = topology.device.name
    target = Path(__file__).parent / f"nvidia_{name}.txtpb"
    return tuple(
        topologies.get_topology_desc(
            name,
            platform="cuda",
            topology=f"1x1x{topology.num_devices}",
            target_config=target.read_text(),
        ).devices
    )


def replica_mesh(layout: Layout, described: tuple[Any, ...]) -> Mesh:
    """The mesh of one replica: all of them run the same programs."""
    mesh = make_mesh(
        tensor=layout.tensor,
        data=layout.data,
        pipe=layout.pipeline,
        devices=described,
    )
    return replica_meshes(mesh)[0]
