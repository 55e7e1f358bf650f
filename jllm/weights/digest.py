"""Digests of a checkpoint's files, to see whether two computers have the same one."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

from jllm.weights.hub import CheckpointFiles

WHOLE_BYTES = 1 << 16
"""Files up to this size are read as a whole."""

SAMPLES = 16
SAMPLE_BYTES = 4096

LENGTH_BYTES = 8
"""First bytes of a safetensors file: the length of its header."""

MAX_HEADER = 1 << 27
"""Bytes; a file that promises a longer header is damaged, and will be refused."""


def checkpoint_digests(files: CheckpointFiles) -> dict[str, str]:
    """Digest of each file that weights depend on, by its path in the model's folder.

    Small files, config.json among them, are read as a whole. Of the others go in: the
    size, the header of safetensors, and sixteen stretches of 4 KiB, evenly spaced.
    Thus another checkpoint of the same architecture is found in no time, but a few
    changed numbers may be missed.
    """
    root = files.path if files.path.is_dir() else files.path.parent
    return {str(path.relative_to(root)): _digest(path) for path in _files(files.path)}


def _files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
        return
    yield path / "config.json"
    for pattern in ("*.safetensors", "*.safetensors.index.json", "orbax.json"):
        yield from sorted(path.glob(pattern))
    # An orbax checkpoint has too many files of values: of each array its description,
    # and one of them.
    for folder in sorted(path.glob("orbax/*")):
        if folder.is_dir():
            yield from sorted(file for file in folder.iterdir() if file.is_file())[:2]


def _digest(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= WHOLE_BYTES:
            digest.update(file.read())
            return digest.hexdigest()[:16]
        if path.suffix == ".safetensors":
            length = int.from_bytes(file.read(LENGTH_BYTES), "little")
            digest.update(file.read(min(length, MAX_HEADER)))
        for i in range(SAMPLES):
            file.seek((size - SAMPLE_BYTES) * i // (SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]
