"""Writes a checkpoint in Hugging Face's layout, which transformers loads."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from tqdm import tqdm

from jllm.errors import CheckpointError
from jllm.weights.lazy import CheckpointTensor
from jllm.weights.tensors import INDEX_FILE, SINGLE_FILE

SHARD_BYTES = 5 << 30
"""Most bytes of a file, unless one tensor has more."""


def save_safetensors(
    folder: Path,
    tensors: Mapping[str, CheckpointTensor],
    dtype: np.dtype[np.generic],
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes tensors to model.safetensors, or to several files and an index.

    One file's tensors are in memory at a time.

    Args:
        folder: Where.
        tensors: By their Hugging Face names.
        dtype: Type to write them in; values are rounded to it.
        shard_bytes: Most bytes of a file.

    Raises:
        CheckpointError: A tensor cannot be read, or has values that `dtype` cannot
            hold.
    """
    from safetensors.numpy import save_file

    shards = list(_shards(tensors, dtype.itemsize, shard_bytes))
    index: dict[str, str] = {}
    with tqdm(desc="Writing tensors", total=len(tensors), disable=None) as bar:
        for number, names in enumerate(shards, 1):
            file = SINGLE_FILE
            if len(shards) > 1:
                file = f"model-{number:05}-of-{len(shards):05}.safetensors"
            arrays: dict[str, np.ndarray] = {}
            for name in names:
                arrays[name] = _converted(tensors[name], dtype)
                index[name] = file
                bar.update()
            save_file(arrays, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        total = sum(_size(tensor) for tensor in tensors.values()) * dtype.itemsize
        content = {"metadata": {"total_size": total}, "weight_map": index}
        (folder / INDEX_FILE).write_text(json.dumps(content, indent=2) + "\n")


def _shards(
    tensors: Mapping[str, CheckpointTensor], itemsize: int, shard_bytes: int
) -> Iterator[list[str]]:
    """Names of the tensors of each file."""
    names: list[str] = []
    total = 0
    for name, tensor in tensors.items():
        size = _size(tensor) * itemsize
        if names and total + size > shard_bytes:
            yield names
            names, total = [], 0
        names.append(name)
        total += size
    yield names


def _size(tensor: CheckpointTensor) -> int:
    return int(np.prod(tensor.shape, dtype=np.int64))


def _converted(tensor: CheckpointTensor, dtype: np.dtype[np.generic]) -> np.ndarray:
    array = np.asarray(tensor.map())
    try:
        with np.errstate(over="raise"):
            return np.ascontiguousarray(array.astype(dtype, copy=False))
    except FloatingPointError:
        raise CheckpointError(
            f"{tensor.file}: tensor {tensor.name!r} has values that {dtype} cannot "
            f"hold; choose another dtype"
        ) from None
