"""Pure-JAX inference for large language models.

    from jllm import LLM, SamplingParams

    with LLM() as llm:
        outputs = llm.generate("Once upon a time", SamplingParams(max_tokens=64))
        print(outputs[0].outputs[0].text)

Importing this package imports no JAX; the first use of `LLM` or `AsyncLLM` does.
"""

import importlib
from typing import Any

from jllm.config import EngineConfig, HostConfig
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
from jllm.metrics import STEP_TOKEN_BOUNDS, BlockState, EngineStats
from jllm.outputs import (
    CompletionOutput,
    EmbeddingOutput,
    EmbeddingRequestOutput,
    Logprob,
    RequestMetrics,
    RequestOutput,
    ScoreOutput,
    ScoreRequestOutput,
)
from jllm.pooling import PoolingParams
from jllm.probes import Edit
from jllm.processors import LogitsProcessor
from jllm.types import (
    RequestOutputKind,
    SamplingParams,
    StructuredOutputsParams,
)

__all__ = [
    "LLM",  # pyright: ignore[reportUnsupportedDunderAll]
    "STEP_TOKEN_BOUNDS",
    "AsyncLLM",  # pyright: ignore[reportUnsupportedDunderAll]
    "Batch",  # pyright: ignore[reportUnsupportedDunderAll]
    "BlockState",
    "CheckpointError",
    "CompletionOutput",
    "ConfigError",
    "ContentDelta",  # pyright: ignore[reportUnsupportedDunderAll]
    "ContextTooLongError",
    "Edit",
    "EmbeddingOutput",
    "EmbeddingRequestOutput",
    "EngineConfig",
    "EngineStats",
    "EngineStoppedError",
    "HostConfig",
    "InvalidRequestError",
    "JllmError",
    "LogitsProcessor",
    "Logprob",
    "ModelNotFoundError",
    "OutputParser",  # pyright: ignore[reportUnsupportedDunderAll]
    "PoolingParams",
    "ReasoningDelta",  # pyright: ignore[reportUnsupportedDunderAll]
    "RequestMetrics",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "ScoreOutput",
    "ScoreRequestOutput",
    "StructuredOutputsParams",
    "ToolCallDelta",  # pyright: ignore[reportUnsupportedDunderAll]
    "UnsupportedModelError",
    "__version__",  # pyright: ignore[reportUnsupportedDunderAll]
    "detect_parsers",  # pyright: ignore[reportUnsupportedDunderAll]
    "follow",  # pyright: ignore[reportUnsupportedDunderAll]
    "load",  # pyright: ignore[reportUnsupportedDunderAll]
    "make_output_parser",  # pyright: ignore[reportUnsupportedDunderAll]
    "prompt_opens_reasoning",  # pyright: ignore[reportUnsupportedDunderAll]
    "reasoning_markers",  # pyright: ignore[reportUnsupportedDunderAll]
    "tool_constraint",  # pyright: ignore[reportUnsupportedDunderAll]
]

_HEAVY_MODULES = {
    "LLM": "llm",
    "AsyncLLM": "async_llm",
    "Batch": "layers.batch",
    "follow": "engine.follow",
    "load": "research",
    "ContentDelta": "text.parsers.deltas",
    "OutputParser": "text.parsers.output_parser",
    "ReasoningDelta": "text.parsers.deltas",
    "ToolCallDelta": "text.parsers.deltas",
    "detect_parsers": "text.parsers.registry",
    "make_output_parser": "text.parsers.output_parser",
    "prompt_opens_reasoning": "text.parsers.output_parser",
    "reasoning_markers": "text.parsers.output_parser",
    "tool_constraint": "text.parsers.constraint",
}
"""Names of the front door to the modules that hold them."""


def __getattr__(name: str) -> Any:
    """Imports the heavy part of the front door when it is first asked for."""
    if name in _HEAVY_MODULES:
        module = f"jllm.{_HEAVY_MODULES[name]}"
        return getattr(importlib.import_module(module), name)
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("jllm")
    raise AttributeError(f"module 'jllm' has no attribute {name!r}")
