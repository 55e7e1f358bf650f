"""The tensors of a safetensors checkpoint: found, checked and memory-mapped."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from jllm.errors import CheckpointError
from jllm.weights.hub import read_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
DTYPES: Mapping[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""Types that weights may be stored in, by their name in the header."""


@dataclasses.dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies in a checkpoint.

    Attributes:
        name: Its name.
        file: File that holds it.
        dtype: Its type as the header names it.
        shape: Its shape.
        start: First byte in the file.
        stop: Byte after the last.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def check_readable(self) -> None:
        """Checks type and size.

        Raises:
            CheckpointError: Not a type for weights, or a size that contradicts it.
        """
        if self.dtype not in DTYPES:
            raise CheckpointError(
                f"{self.file}: tensor {self.name!r} has type {self.dtype}, but weights "
                f"must be one of {', '.join(DTYPES)}"
            )
        if self.stop - self.start != self.size * DTYPES[self.dtype].itemsize:
            raise CheckpointError(
                f"{self.file}: tensor {self.name!r} of type {self.dtype} and shape "
                f"{self.shape} cannot have {self.stop - self.start} bytes"
            )

    def map(self) -> np.ndarray:
        """Maps the tensor into memory; only what is used is read.

        Raises:
            CheckpointError: The file is gone or has become shorter.
        """
        if not self.size:
            return np.zeros(self.shape, DTYPES[self.dtype])
        try:
            mapped = np.memmap(
                self.file, DTYPES[self.dtype], "r", self.start, self.shape
            )
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{self.file}: tensor {self.name!r} cannot be read: {error}"
            ) from error
        return np.asarray(mapped)


def find_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Lists the tensors of a checkpoint, in one file or in several with an index.

    Raises:
        CheckpointError: No safetensors file, a missing or damaged one, a tensor in two
            files, or an index that contradicts the files.
    """
    if (folder / SINGLE_FILE).exists():
        return read_header(folder / SINGLE_FILE)
    if not (folder / INDEX_FILE).exists():
        raise CheckpointError(_nothing_found(folder))
    index = _read_index(folder / INDEX_FILE)
    tensors: dict[str, StoredTensor] = {}
    for file in sorted(set(index.values())):
        for name, tensor in read_header(folder / file).items():
            if name in tensors:
                raise CheckpointError(
                    f"{tensor.file}: tensor {name!r} is also in {tensors[name].file}"
                )
            tensors[name] = tensor
    for name, file in index.items():
        if name not in tensors or tensors[name].file.name != file:
            raise CheckpointError(
                f"{folder / file}: tensor {name!r} is missing, though {INDEX_FILE} "
                f"places it there"
            )
    return tensors


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Lists the tensors of one safetensors file.

    The safetensors library checks the header: sizes, overlaps, gaps, truncation. It
    does not tell offsets, which are then read from the header itself.

    Raises:
        CheckpointError: Missing, not a file, damaged or truncated.
    """
    if not path.is_file():
        what = "is not a file" if path.exists() else "no such file"
        raise CheckpointError(f"{path}: {what}")
    try:
        with safe_open(path, framework="np"):
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length), object_pairs_hook=_unique)
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: not a sound safetensors file: {error}"
        ) from error
    header.pop("__metadata__", None)
    return {name: _stored(name, path, 8 + length, header[name]) for name in header}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        raise ValueError("a name occurs twice in the header")
    return entries


def _stored(name: str, path: Path, data: int, entry: Mapping[str, Any]) -> StoredTensor:
    start, stop = entry["data_offsets"]
    shape = tuple(entry["shape"])
    return StoredTensor(name, path, entry["dtype"], shape, data + start, data + stop)


def _read_index(path: Path) -> dict[str, str]:
    index = read_json(path).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise CheckpointError(f"{path}: weight_map must name the file of each tensor")
    for name, file in index.items():
        if not isinstance(file, str) or not _is_plain_name(file):
            raise CheckpointError(
                f"{path}: tensor {name!r} must be in a .safetensors file of the same "
                f"folder, not in {file!r}"
            )
    return index


def _is_plain_name(file: str) -> bool:
    """Whether a name cannot lead out of its folder, on any operating system."""
    return file.endswith(".safetensors") and not set(file) & set("/\\:\0")


def _nothing_found(folder: Path) -> str:
    pickled = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLED)
    if pickled:
        return (
            f"{folder}: has weights only as {pickled[0]}, which could run code when "
            f"read; convert them to safetensors"
        )
    return f"{folder}: neither {SINGLE_FILE} nor {INDEX_FILE} is there"
