"""Finds a model by name and reads its JSON files; no other code is ever run."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jllm.errors import CheckpointError, ModelNotFoundError
from jllm.weights.gguf import SUFFIX as GGUF
from jllm.weights.gguf import read_gguf
from jllm.weights.lazy import CheckpointTensor

CONFIG_FILE = "config.json"
JSON_FILES = ("*.json", "*.jinja", "tokenizer.model")
WEIGHT_FILES = ("*.safetensors",)
# Files in folders are other formats of the same model, and so is "consolidated".
OTHER_FORMATS = ("*/*", "consolidated*")


@dataclasses.dataclass(frozen=True, slots=True)
class CheckpointFiles:
    """A model's folder and the settings read from it.

    Attributes:
        path: The folder, or the GGUF file.
        config: Content of config.json.
        generation_config: Content of generation_config.json, empty if there is none.
        tensors: The tensors, of a format that lists them beside the settings.
    """

    path: Path
    config: Mapping[str, Any]
    generation_config: Mapping[str, Any]
    tensors: Mapping[str, CheckpointTensor] | None = None


def resolve_model(
    name: str, *, revision: str | None = None, with_weights: bool = True
) -> CheckpointFiles:
    """Finds a model and reads its settings.

    Args:
        name: A local folder, a GGUF file, or the id of a Hugging Face repository,
            which is fetched unless it is in the cache.
        revision: Branch, tag or commit of the repository.
        with_weights: Whether to fetch the weights too.

    Raises:
        ModelNotFoundError: Neither a folder nor a repository that can be had.
        CheckpointError: config.json is missing or is not a JSON object.
    """
    path = Path(name).expanduser()
    if path.is_file() and path.suffix == GGUF:
        config, tensors = read_gguf(path)
        return CheckpointFiles(path, config, {}, tensors)
    if path.is_file():
        raise ModelNotFoundError(
            f"model {name!r} is a file, but no {GGUF} file; name the folder it is in"
        )
    if not name or not path.is_dir():  # the empty path would be the current folder
        weights = WEIGHT_FILES if with_weights else ()
        path = _fetch(name, revision, (*JSON_FILES, *weights))
    generation = path / "generation_config.json"
    return CheckpointFiles(
        path=path,
        config=read_json(path / CONFIG_FILE),
        generation_config=read_json(generation) if generation.exists() else {},
    )


def resolve_config(name: str, *, revision: str | None = None) -> CheckpointFiles:
    """Finds a model and reads its config.json, and fetches nothing else.

    Args:
        name: As for `resolve_model`, or the path of a config.json.
        revision: Branch, tag or commit of the repository.

    Raises:
        ModelNotFoundError, CheckpointError: As `resolve_model` does.
    """
    path = Path(name).expanduser()
    if path.is_dir() or path.suffix == GGUF:
        return resolve_model(name, with_weights=False)
    if not path.is_file():
        path = _fetch(name, revision, (CONFIG_FILE,)) / CONFIG_FILE
    return CheckpointFiles(path, read_json(path), {})


def read_json(path: Path) -> dict[str, Any]:
    """Reads a file that holds one JSON object.

    Raises:
        CheckpointError: Missing, unreadable, invalid, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise CheckpointError(f"{path}: must hold a JSON object, but holds a {kind}")
    return value


def _fetch(name: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        raise ModelNotFoundError(
            f"model {name!r} is neither a folder nor the id of a repository"
        ) from None
    try:
        folder = snapshot_download(
            name,
            revision=revision,
            allow_patterns=list(patterns),
            ignore_patterns=list(OTHER_FORMATS),
        )
    # Missing, private, offline, no such revision: many types, none of them ours.
    except (OSError, ValueError, RuntimeError) as error:
        at = "" if revision is None else f" at revision {revision!r}"
        raise ModelNotFoundError(
            f"model {name!r}{at} is no folder, nor a repository to be had: {error}"
        ) from error
    return Path(folder)
