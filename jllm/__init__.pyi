# What `jllm/__init__.py` gives, for type checkers and editors.
from jllm.async_llm import AsyncLLM as AsyncLLM
from jllm.config import EngineConfig as EngineConfig
from jllm.errors import CheckpointError as CheckpointError
from jllm.errors import ConfigError as ConfigError
from jllm.errors import ContextTooLongError as ContextTooLongError
from jllm.errors import EngineStoppedError as EngineStoppedError
from jllm.errors import InvalidRequestError as InvalidRequestError
from jllm.errors import JllmError as JllmError
from jllm.errors import ModelNotFoundError as ModelNotFoundError
from jllm.errors import UnsupportedModelError as UnsupportedModelError
from jllm.llm import LLM as LLM
from jllm.types import CompletionOutput as CompletionOutput
from jllm.types import Logprob as Logprob
from jllm.types import RequestMetrics as RequestMetrics
from jllm.types import RequestOutput as RequestOutput
from jllm.types import RequestOutputKind as RequestOutputKind
from jllm.types import SamplingParams as SamplingParams

__version__: str
