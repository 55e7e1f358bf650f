"""What the server needs of a model: the part of `jllm.AsyncLLM` that it uses."""

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Protocol

from jllm import EngineStats, SamplingParams


class Outputs(Protocol):
    """Outputs of one accepted request."""

    @property
    def prompt_token_ids(self) -> Sequence[int]:
        """Tokens of the prompt."""
        ...

    def __aiter__(self) -> AsyncIterator[Any]: ...

    def close(self) -> None:
        """Ends the request; may be called again."""
        ...


class Llm(Protocol):
    """A model that serves many requests at once."""

    @property
    def max_model_len(self) -> int:
        """Most tokens of a prompt and its output together."""
        ...

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        ...

    @property
    def num_steps(self) -> int:
        """Steps computed; grows as long as there is work and the engine lives."""
        ...

    @property
    def is_busy(self) -> bool:
        """Whether there is work to do."""
        ...

    @property
    def is_running(self) -> bool:
        """Whether requests are accepted."""
        ...

    @property
    def errored(self) -> bool:
        """Whether the engine has failed."""
        ...

    def stats(self) -> EngineStats:
        """What the engine is doing and has done."""
        ...

    def get_default_sampling_params(self) -> SamplingParams:
        """What is used where a request says nothing."""
        ...

    def get_tokenizer(self) -> Any:
        """The transformers tokenizer."""
        ...

    async def submit(
        self,
        prompt: Any,
        sampling_params: Any = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        on_first_token: Callable[[], None] | None = None,
        stream_interval: int = 1,
    ) -> Outputs:
        """Queues one prompt; returns once the engine has accepted it."""
        ...

    async def chat_prompt(self, messages: Any, **chat_options: Any) -> Any:
        """Renders a conversation to a prompt."""
        ...

    async def tokenize(
        self, text: str, *, add_special_tokens: bool = True
    ) -> list[int]:
        """Splits text into tokens."""
        ...

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """Joins tokens into text."""
        ...

    def token_text(self, token_id: int) -> str:
        """What a token adds to a text."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to a text."""
        ...

    async def start_profile(self, folder: str) -> None:
        """Begins to record what host and device do."""
        ...

    async def stop_profile(self) -> None:
        """Ends the recording and writes it."""
        ...

    def shutdown(self) -> None:
        """Fails open requests and frees the device."""
        ...
