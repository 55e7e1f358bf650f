"""Compiles a model's programs for the devices that are here, and writes them to disk.

No weights are read: programs are compiled from shapes.
"""

import dataclasses
from pathlib import Path

from jllm.config import EngineConfig
from jllm.engine.create import (
    fitting_programs,
    make_meshes,
    plan_start,
    resolve_files,
    use_compilation_cache,
)
from jllm.engine.executables import folder_beside
from jllm.engine.memory import device_capacity
from jllm.engine.startup import StartPlan
from jllm.layers.kernels import Target


@dataclasses.dataclass(frozen=True, slots=True)
class Exported:
    """The executables of one replica.

    Attributes:
        folder: Named after the fingerprint of all that they depend on.
        num_blocks: Blocks of the pool that they are for.
        num_compiled: Programs that were compiled.
        num_loaded: Programs that were there already.
        num_bytes: Size of the files of all pools.
    """

    folder: Path
    num_blocks: int
    num_compiled: int
    num_loaded: int
    num_bytes: int


def export_executables(config: EngineConfig) -> tuple[Exported, ...]:
    """Compiles every program that steps use, and writes those that are missing.

    A start with the same options then loads them: by itself from beside the model, or
    from the folder that its `executables` names.

    Args:
        config: Options of the start; `executables` is the folder, "auto" the one beside
            the model.

    Returns:
        What there is now, for each replica.

    Raises:
        ConfigError: An option does not fit, or the folder cannot be used.
        ModelNotFoundError, UnsupportedModelError, CheckpointError: See `jllm.errors`.
    """
    use_compilation_cache(config.compilation_cache_dir, fills=False)
    files = resolve_files(dataclasses.replace(config, load_format="random"))
    if config.executables in (None, "auto"):
        folder = str(folder_beside(files.path))
        config = dataclasses.replace(config, executables=folder)
    found: list[Exported] = []
    for mesh in make_meshes(config):
        target = Target.of(mesh.devices.flat[0])
        plan = plan_start(config, files, mesh, target, device_capacity(mesh))
        found.append(_export(plan))
    return tuple(found)


def _export(plan: StartPlan) -> Exported:
    compiling = plan.start()
    try:
        # Closes what it replaces, so that only the newest is left to close.
        compiling = fitting_programs(plan, compiling)
        compiling.programs.wait()
    finally:
        compiling.programs.close()
    store = plan.store(plan.fingerprint())
    assert store is not None
    sizes = [path.stat().st_size for path in store.folder.rglob("*") if path.is_file()]
    return Exported(
        folder=store.folder,
        num_blocks=compiling.options.num_blocks,
        num_compiled=compiling.programs.num_compiled,
        num_loaded=compiling.programs.num_loaded,
        num_bytes=sum(sizes),
    )
