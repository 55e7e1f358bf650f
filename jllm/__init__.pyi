# What `jllm/__init__.py` gives, for type checkers and editors.
from jllm.async_llm import AsyncLLM as AsyncLLM
from jllm.config import EngineConfig as EngineConfig
from jllm.config import HostConfig as HostConfig
from jllm.engine.follow import follow as follow
from jllm.errors import CheckpointError as CheckpointError
from jllm.errors import ConfigError as ConfigError
from jllm.errors import ContextTooLongError as ContextTooLongError
from jllm.errors import EngineStoppedError as EngineStoppedError
from jllm.errors import InvalidRequestError as InvalidRequestError
from jllm.errors import JllmError as JllmError
from jllm.errors import ModelNotFoundError as ModelNotFoundError
from jllm.errors import UnsupportedModelError as UnsupportedModelError
from jllm.layers.batch import Batch as Batch
from jllm.llm import LLM as LLM
from jllm.metrics import STEP_TOKEN_BOUNDS as STEP_TOKEN_BOUNDS
from jllm.metrics import BlockState as BlockState
from jllm.metrics import EngineStats as EngineStats
from jllm.outputs import CompletionOutput as CompletionOutput
from jllm.outputs import EmbeddingOutput as EmbeddingOutput
from jllm.outputs import EmbeddingRequestOutput as EmbeddingRequestOutput
from jllm.outputs import Logprob as Logprob
from jllm.outputs import RequestMetrics as RequestMetrics
from jllm.outputs import RequestOutput as RequestOutput
from jllm.outputs import ScoreOutput as ScoreOutput
from jllm.outputs import ScoreRequestOutput as ScoreRequestOutput
from jllm.pooling import PoolingParams as PoolingParams
from jllm.probes import Edit as Edit
from jllm.processors import LogitsProcessor as LogitsProcessor
from jllm.research import load as load
from jllm.text.parsers.constraint import tool_constraint as tool_constraint
from jllm.text.parsers.deltas import ContentDelta as ContentDelta
from jllm.text.parsers.deltas import ReasoningDelta as ReasoningDelta
from jllm.text.parsers.deltas import ToolCallDelta as ToolCallDelta
from jllm.text.parsers.output_parser import OutputParser as OutputParser
from jllm.text.parsers.output_parser import make_output_parser as make_output_parser
from jllm.text.parsers.output_parser import (
    prompt_opens_reasoning as prompt_opens_reasoning,
)
from jllm.text.parsers.output_parser import reasoning_markers as reasoning_markers
from jllm.text.parsers.registry import detect_parsers as detect_parsers
from jllm.types import RequestOutputKind as RequestOutputKind
from jllm.types import SamplingParams as SamplingParams
from jllm.types import StructuredOutputsParams as StructuredOutputsParams

__version__: str
