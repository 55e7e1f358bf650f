"""Checkpoints of fused and sharded parameters, as orbax-checkpoint writes them.

The folder is a model's folder: config.json and tokenizer beside `FOLDER`, with the
parameters as orbax arrays, and `FILE`, which says how they were laid out. An array's
chunks are the slices of the devices that saved it, one file each and not compressed, so
that a device reads the files of its slice. Tensors are seen through the parameters
under their Hugging Face names; hence any mesh can read what another one has saved.
"""

import contextlib
import json
import logging
import math
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh

from jllm.errors import CheckpointError, JllmError
from jllm.models.base import ModelOptions, ParamSpec
from jllm.models.registry import architecture_of, build_model
from jllm.weights.hub import read_json
from jllm.weights.inverse import Read, part_arrays
from jllm.weights.lazy import LazyTensor
from shardings.mesh import abstract_mesh

FILE = "orbax.json"
FOLDER = "orbax"
FORMAT = "jllm-orbax"
VERSION = 1
DTYPES: Mapping[str, str] = {"<f4": "F32", "<f2": "F16", "bfloat16": "BF16"}
"""Type in an array's metadata to the name that safetensors has for it."""
CACHE_BYTES = 1 << 30
"""Chunks kept in memory, since a fused parameter is read part by part."""


def is_orbax(folder: Path) -> bool:
    """Whether a folder holds such a checkpoint."""
    return (folder / FILE).exists()


def save(folder: Path, weights: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Writes parameters, and the description of how they are laid out.

    Args:
        folder: The model's folder.
        weights: Tree of arrays of `Model.specs()`, divided as their devices will
            read them.
        config: Content of config.json.
    """
    import orbax.checkpoint as ocp

    arrays = jax.tree.leaves(weights)
    size = arrays[0].sharding.mesh.shape["tensor"]
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False)
    with _without_warnings(), ocp.Checkpointer(handler) as checkpointer:
        target = (folder / FOLDER).absolute()
        checkpointer.save(target, args=ocp.args.PyTreeSave(weights))
    description = {
        "format": FORMAT,
        "version": VERSION,
        "architecture": architecture_of(config),
        "dtype": str(arrays[0].dtype),
        "tensor_parallel_size": size,
    }
    (folder / FILE).write_text(json.dumps(description, indent=2) + "\n")


def find_tensors(folder: Path, config: Mapping[str, Any]) -> dict[str, LazyTensor]:
    """Lists the tensors of a checkpoint; reads descriptions and sizes of files only.

    Raises:
        CheckpointError: A file is missing, damaged, of another length than its
            description says, or belongs to no parameter.
    """
    import tensorstore

    specs = _saved_specs(folder / FILE, config)
    root = folder / FOLDER
    if not root.is_dir():
        raise CheckpointError(f"{root}: no such folder, though {FILE} is there")
    context = tensorstore.Context({"cache_pool": {"total_bytes_limit": CACHE_BYTES}})
    tensors: dict[str, LazyTensor] = {}
    known: set[str] = set()
    for path, spec in jax.tree_util.tree_leaves_with_path(specs):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        known.add(name)
        dtype = _check_array(root / name, spec)
        for tensor, array in part_arrays(spec, _reader(root / name, context)).items():
            tensors[tensor] = LazyTensor(tensor, root / name, dtype, array)
    for path in sorted(root.iterdir()):
        if (path / ".zarray").exists() and path.name not in known:
            raise CheckpointError(f"{path}: belongs to no parameter of the model")
    return tensors


@contextlib.contextmanager
def _without_warnings() -> Generator[None]:
    """Orbax warns that there is nothing to merge where nothing was to be merged."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _saved_specs(file: Path, config: Mapping[str, Any]) -> Any:
    """The parameters as the mesh that saved them had them."""
    described = read_json(file)
    if described.get("format") != FORMAT or described.get("version") != VERSION:
        raise CheckpointError(
            f"{file}: format {described.get('format')!r} version "
            f"{described.get('version')!r} is not known, only {FORMAT!r} {VERSION}"
        )
    architecture = architecture_of(config)
    if described.get("architecture") != architecture:
        raise CheckpointError(
            f"{file}: architecture={described.get('architecture')!r} contradicts "
            f"{architecture!r} of config.json"
        )
    size = described.get("tensor_parallel_size")
    if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= 2**20:
        raise CheckpointError(
            f"{file}: tensor_parallel_size={size!r} must be an integer, at least 1"
        )
    mesh: AbstractMesh = abstract_mesh(tensor=size)
    try:
        return build_model(config, ModelOptions(mesh=mesh)).specs()
    except JllmError as error:
        raise CheckpointError(f"{file}: {error}") from error


def _check_array(folder: Path, spec: ParamSpec) -> str:
    """Checks description and file sizes of an array; returns its type's name."""
    described = folder / ".zarray"
    values = read_json(described)
    shape = values.get("shape")
    if shape != list(spec.shape):
        raise CheckpointError(
            f"{described}: shape {shape} is not {list(spec.shape)}, which config.json "
            f"and {FILE} ask for"
        )
    if values.get("dtype") not in DTYPES or values.get("compressor") is not None:
        raise CheckpointError(
            f"{described}: dtype={values.get('dtype')!r} must be one of "
            f"{', '.join(DTYPES)}, without compressor"
        )
    chunks: Any = values.get("chunks")
    if not _are_chunks(chunks, spec.shape):
        raise CheckpointError(f"{described}: chunks {chunks} do not divide {shape}")
    dtype = DTYPES[values["dtype"]]
    size = math.prod(chunks) * (4 if dtype == "F32" else 2)
    counts = [whole // chunk for whole, chunk in zip(spec.shape, chunks, strict=True)]
    for place in np.ndindex(*counts):
        file = folder / ".".join(map(str, place))
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            what = "is missing" if found is None else f"has {found} bytes"
            raise CheckpointError(f"{file}: {what}, must have {size}")
    return dtype


def _are_chunks(chunks: Any, shape: tuple[int, ...]) -> bool:
    return (
        isinstance(chunks, list)
        and len(chunks) == len(shape)
        and all(
            isinstance(chunk, int) and chunk > 0 and size % chunk == 0
            for chunk, size in zip(chunks, shape, strict=True)
        )
    )


def _reader(folder: Path, context: Any) -> Read:
    """Reads parts of an array; opens it at the first."""
    stores: list[Any] = []

    def read(index: tuple[slice, ...]) -> np.ndarray:
        import tensorstore

        try:
            if not stores:
                spec = {
                    "driver": "zarr",
                    "kvstore": {"driver": "file", "path": f"{folder.absolute()}/"},
                }
                opening = tensorstore.open(
                    spec,
                    open=True,
                    read=True,
                    context=context,
                    recheck_cached_data=False,
                )
                stores.append(opening.result())
            return stores[0][index].read().result()
        except (ValueError, OSError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"{folder}: cannot be read: {reason}") from error

    return read
