"""Pure-JAX inference for large language models.

    from jllm import LLM, SamplingParams

    with LLM() as llm:
        outputs = llm.generate("Once upon a time", SamplingParams(max_tokens=64))
        print(outputs[0].outputs[0].text)

Importing this package imports no JAX; the first use of `LLM` or `AsyncLLM` does.
"""

import importlib
from typing import Any

from jllm.config import EngineConfig
from jllm.errors import (
    CheckpointError,
    ConfigError,
    ContextTooLongError,
    EngineStoppedError,
    InvalidRequestError,
    JllmError,
    ModelNotFoundError,
    UnsupportedModelError,
)
from jllm.types import (
    CompletionOutput,
    Logprob,
    RequestMetrics,
    RequestOutput,
    RequestOutputKind,
    SamplingParams,
)

__all__ = [
    "LLM",  # pyright: ignore[reportUnsupportedDunderAll]
    "AsyncLLM",  # pyright: ignore[reportUnsupportedDunderAll]
    "CheckpointError",
    "CompletionOutput",
    "ConfigError",
    "ContextTooLongError",
    "EngineConfig",
    "EngineStoppedError",
    "InvalidRequestError",
    "JllmError",
    "Logprob",
    "ModelNotFoundError",
    "RequestMetrics",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "UnsupportedModelError",
    "__version__",  # pyright: ignore[reportUnsupportedDunderAll]
]


def __getattr__(name: str) -> Any:
    """Imports the heavy part of the front door when it is first asked for."""
    if name == "LLM":
        return importlib.import_module("jllm.llm").LLM
    if name == "AsyncLLM":
        return importlib.import_module("jllm.async_llm").AsyncLLM
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("jllm")
    raise AttributeError(f"module 'jllm' has no attribute {name!r}")
