"""The file formats of checkpoints: each gives tensors under Hugging Face's names."""

from collections.abc import Mapping

from jllm.weights import orbax
from jllm.weights.hub import CheckpointFiles
from jllm.weights.lazy import CheckpointTensor
from jllm.weights.tensors import INDEX_FILE, SINGLE_FILE, find_tensors


def checkpoint_tensors(files: CheckpointFiles) -> Mapping[str, CheckpointTensor]:
    """Lists the tensors of a checkpoint of any format; reads none.

    Raises:
        CheckpointError: A file is missing, damaged, or contradicts the others.
    """
    if files.tensors is not None:
        return files.tensors
    if orbax.is_orbax(files.path):
        return orbax.find_tensors(files.path, files.config)
    return find_tensors(files.path)


def has_weights(files: CheckpointFiles) -> bool:
    """Whether there are tensors beside the settings, in any format."""
    folder = files.path
    if files.tensors is not None or orbax.is_orbax(folder):
        return True
    return any((folder / name).exists() for name in (SINGLE_FILE, INDEX_FILE))
