"""Online generation: requests come and go in an event loop while the engine runs."""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import Any, Self

from jllm.checks import wrong
from jllm.config import EngineConfig, make_config, options_of
from jllm.engine.create import create_engine
from jllm.engine.loop import EngineLoop
from jllm.engine.replicas import prepare_probed
from jllm.errors import ConfigError, EngineStoppedError, InvalidRequestError
from jllm.metrics import EngineStats
from jllm.outputs import (
    EmbeddingRequestOutput,
    RequestOutput,
    ScoreOutput,
    ScoreRequestOutput,
)
from jllm.pooling import Pooling, PoolingParams
from jllm.probes import Probes, make_probes
from jllm.text.chat_template import ChatOptions
from jllm.text.delivery import OpenRequest, OutputStream, OutputThread
from jllm.text.embedding import make_stream
from jllm.text.prompts import PreparedRequest, Prompt, make_processor
from jllm.text.scoring import score_output, split_continuations
from jllm.text.tokenizer import Tokenizer
from jllm.types import SamplingParams

LONG_TEXT = 2048
"""Characters or tokens from which a prompt is prepared beside the event loop."""


class AsyncLLM:
    """A model that serves many requests at once; names and arguments as in vLLM.

    Its methods are called in an event loop. Use it as an asynchronous context manager,
    or call `shutdown`, to free the device.
    """

    def __init__(self, model: Any = None, **options: Any) -> None:
        """Loads a model; see `LLM`."""
        self._config = config = make_config(model, options)
        self._ids = itertools.count()
        self._open: dict[str, OpenRequest] = {}
        engine = create_engine(config)
        limits, info = engine.limits, engine.info
        self._max_model_len = limits.max_model_len
        try:
            self._processor = make_processor(
                config,
                info.path,
                vocab_size=limits.vocab_size,
                max_model_len=limits.max_model_len,
            )
            self._default_params = SamplingParams(**info.default_sampling)
        except BaseException:
            engine.close()
            raise
        self._engine = engine
        self._outputs = OutputThread()
        self._loop = EngineLoop(engine, self._outputs)
        # One thread: a tokenizer works for one caller at a time.
        self._encoder = ThreadPoolExecutor(1, thread_name_prefix="jllm-encode")

    @classmethod
    def from_engine_config(cls, config: EngineConfig) -> Self:
        """Loads the model that the options name."""
        return cls(**options_of(config))

    @property
    def config(self) -> EngineConfig:
        """The options it was made with."""
        return self._config

    @property
    def max_model_len(self) -> int:
        """Most tokens of a prompt and its output together."""
        return self._max_model_len

    @property
    def is_running(self) -> bool:
        """Whether requests are accepted."""
        return self._loop.is_alive

    @property
    def errored(self) -> bool:
        """Whether the engine has failed."""
        return self._loop.error is not None

    @property
    def dead_error(self) -> EngineStoppedError | None:
        """What the engine has failed with."""
        return self._loop.error

    @property
    def num_open(self) -> int:
        """Requests that have not ended."""
        return len(self._open)

    def get_tokenizer(self) -> Any:
        """Returns the transformers tokenizer.

        Raises:
            ConfigError: It was not loaded.
        """
        return self._need_tokenizer().hf

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self._engine.limits.vocab_size

    @property
    def num_steps(self) -> int:
        """Steps computed; grows as long as there is work and the engine lives."""
        return self._loop.num_steps

    @property
    def is_busy(self) -> bool:
        """Whether there is work to do."""
        return self._loop.is_busy

    def stats(self) -> EngineStats:
        """Returns what the engine is doing and has done."""
        return self._engine.stats()

    async def tokenize(
        self, text: str, *, add_special_tokens: bool = True
    ) -> list[int]:
        """Splits text into tokens, beside the event loop."""
        encode = self._need_tokenizer().encode
        return await self._encode(
            lambda: encode(text, add_special_tokens=add_special_tokens)
        )

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """Joins tokens into text, special ones included, beside the event loop."""
        decode = self._need_tokenizer().decode
        return await self._encode(lambda: decode(token_ids, skip_special=False))

    def token_text(self, token_id: int) -> str:
        """What a token adds to a text; U+FFFD for a part of a character."""
        return self._need_tokenizer().token_text(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to a text."""
        return self._need_tokenizer().token_bytes(token_id)

    async def start_profile(self, folder: str) -> None:
        """Begins to record what host and device do, for TensorBoard or Perfetto."""
        import jax

        await asyncio.to_thread(jax.profiler.start_trace, folder)

    async def stop_profile(self) -> None:
        """Ends the recording and writes it."""
        import jax

        await asyncio.to_thread(jax.profiler.stop_trace)

    def _need_tokenizer(self) -> Tokenizer:
        if self._processor.tokenizer is None:
            raise ConfigError("there is no tokenizer: skip_tokenizer_init is set")
        return self._processor.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """Returns what is used where no sampling parameters are given."""
        return self._default_params

    @property
    def weights(self) -> Any:
        """The tree of arrays that the model computes with; see `update_weights`."""
        return self._engine.weights

    async def update_weights(self, weights: Any) -> None:
        """Computes with other weights from the next step on; see `LLM`."""
        future = self._loop.call(lambda: self._engine.update_weights(weights))
        await asyncio.wrap_future(future)

    async def reset_prefix_cache(self) -> bool:
        """Forgets cached prompt prefixes; False while requests are running."""
        future = self._loop.call(self._engine.reset_prefix_cache)
        return await asyncio.wrap_future(future)

    async def generate(
        self,
        prompt: Any,
        sampling_params: Any = None,
        request_id: str | None = None,
        *,
        capture: Any = None,
        edit: Any = None,
        priority: int = 0,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Completes one prompt, with outputs of the kind the parameters ask for.

        Leaving the generator, or cancelling the task that reads it, ends the request.

        Args:
            prompt: See `LLM.generate`.
            sampling_params: None takes the model's defaults.
            request_id: Name for `abort`, unique among open requests.
            capture: See `LLM.generate`; what is captured comes with the last output.
            edit: See `LLM.generate`. What is new is compiled beside the engine, which
                goes on with other requests meanwhile.
            priority: Smaller runs first.

        Raises:
            InvalidRequestError: The prompt or a parameter is wrong, or the id in use.
            EngineStoppedError: The engine has failed or was shut down.
        """
        outputs = await self.submit(
            prompt,
            sampling_params,
            request_id,
            probes=make_probes(capture, edit),
            priority=priority,
        )
        try:
            async for output in outputs:
                yield output
        finally:
            outputs.close()

    async def submit(
        self,
        prompt: Any,
        sampling_params: Any = None,
        request_id: str | None = None,
        *,
        probes: Probes | None = None,
        priority: int = 0,
        on_first_token: Callable[[], None] | None = None,
        stream_interval: int = 1,
    ) -> OutputStream:
        """Queues one prompt; returns once the engine has accepted it.

        Args and errors are those of `generate`; `probes` is what is captured and
        edited, and `on_first_token` is called in the event loop, whatever kind of
        outputs is asked for. The caller reads the stream to its end or closes it, which
        ends the request. With `PoolingParams` the one output is an
        `EmbeddingRequestOutput`. An output waits for `stream_interval` tokens of each
        sequence, except the first one and where a sequence ends.
        """
        params = self._default_params if sampling_params is None else sampling_params
        if not isinstance(params, (SamplingParams, PoolingParams)):
            raise InvalidRequestError(
                "sampling_params must be SamplingParams, or PoolingParams for an "
                f"embedding, not {params!r}",
                parameter="sampling_params",
            )
        if probes is not None and isinstance(params, PoolingParams):
            raise wrong("probes", probes, "must be None for an embedding")
        if request_id is None:
            request_id = self._new_id()
        prepare = partial(self._prepare, request_id, prompt, params, priority, probes)
        return await self._submit_as(
            request_id, prepare, on_first_token, stream_interval
        )

    def _new_id(self) -> str:
        return f"request-{next(self._ids)}"

    async def _submit_as(
        self,
        request_id: str,
        prepare: Callable[[], Awaitable[PreparedRequest]],
        on_first_token: Callable[[], None] | None = None,
        stream_interval: int = 1,
    ) -> OutputStream:
        """Takes an id, prepares the request of that id, and queues it."""
        if request_id in self._open:
            raise InvalidRequestError(
                f"request_id={request_id!r} is in use", parameter="request_id"
            )
        # The id is taken before anything is waited for.
        event_loop = asyncio.get_running_loop()
        opened = self._open[request_id] = OpenRequest(event_loop, on_first_token)
        try:
            prepared = await prepare()
            await self._submit(prepared, opened, stream_interval)
        except BaseException:
            self._end(request_id)
            raise
        tokens = prepared.request.prompt_token_ids
        return OutputStream(opened, request_id, tokens, lambda: self._end(request_id))

    def _end(self, request_id: str) -> None:
        del self._open[request_id]
        # Nothing is left to abort, unless the reader has left early.
        self._loop.abort(request_id)

    async def chat(
        self,
        messages: Any,
        sampling_params: Any = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        **chat_options: Any,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Answers one conversation; see `generate` and `LLM.chat`."""
        prompt = await self.chat_prompt(messages, **chat_options)
        outputs = self.generate(prompt, sampling_params, request_id, priority=priority)
        try:
            async for output in outputs:
                yield output
        finally:
            await outputs.aclose()

    async def chat_prompt(self, messages: Any, **chat_options: Any) -> Prompt:
        """Renders a conversation to a prompt for `generate`, beside the event loop."""
        options = ChatOptions.from_keywords(chat_options)
        return await self._encode(self._processor.chat_prompt, messages, options)

    async def embed(
        self,
        prompt: Any,
        *,
        pooling: Pooling = "last",
        normalize: bool = True,
        dimensions: int | None = None,
        truncate_prompt_tokens: int | None = None,
        priority: int = 0,
    ) -> EmbeddingRequestOutput:
        """Computes the embedding of one prompt; see `LLM.embed`.

        Cancelling the task that waits ends the request.
        """
        params = PoolingParams(
            pooling=pooling,
            normalize=normalize,
            dimensions=dimensions,
            truncate_prompt_tokens=truncate_prompt_tokens,
        )
        outputs = await self.submit(prompt, params, priority=priority)
        with contextlib.closing(outputs):
            return await anext(outputs)

    async def score(self, prompt: Any, continuations: Any) -> ScoreRequestOutput:
        """Computes how probable continuations of one prompt are; see `LLM.score`.

        Cancelling the task that waits ends the requests.
        """
        ((_, group),) = split_continuations([prompt], [continuations])

        async def one(continuation: Any) -> ScoreOutput:
            request_id = self._new_id()
            prepared = await self._encode(
                self._processor.prepare_scored, request_id, prompt, continuation
            )

            async def prepare() -> PreparedRequest:
                return prepared

            outputs = await self._submit_as(request_id, prepare)
            with contextlib.closing(outputs):
                found = [output async for output in outputs]
            return score_output(prepared, found[-1])

        # The others follow once the first has filled the prefix cache.
        first = await one(group[0])
        async with asyncio.TaskGroup() as tasks:
            rest = [tasks.create_task(one(own)) for own in group[1:]]
        return ScoreRequestOutput([first, *(task.result() for task in rest)])

    async def abort(self, request_id: str) -> None:
        """Ends a request; its last output has finish reason "abort"."""
        opened = self._open.get(request_id)
        if opened is not None:
            self._loop.abort(request_id)
            opened.abort()

    def shutdown(self) -> None:
        """Fails open requests and frees the device; may be called again."""
        self._loop.close()
        self._outputs.close()
        self._encoder.shutdown(wait=False)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # A running step is waited for; the event loop goes on meanwhile.
        await asyncio.to_thread(self.shutdown)

    async def _prepare(
        self,
        request_id: str,
        prompt: Any,
        params: SamplingParams | PoolingParams,
        priority: int,
        probes: Probes | None,
    ) -> PreparedRequest:
        if not self.is_running:
            raise EngineStoppedError(str(self.dead_error or "it was shut down"))
        prepare: Callable[..., PreparedRequest] = self._processor.prepare_pooled
        arguments: tuple[Any, ...] = request_id, prompt, params, priority
        if isinstance(params, SamplingParams):
            prepare = self._processor.prepare
            arguments = *arguments, await self._processor.grammar(params), probes
        if _length(prompt) < LONG_TEXT:
            return prepare(*arguments)
        return await self._encode(prepare, *arguments)

    async def _encode(self, function: Callable[..., Any], *arguments: Any) -> Any:
        event_loop = asyncio.get_running_loop()
        return await event_loop.run_in_executor(self._encoder, function, *arguments)

    async def _submit(
        self, prepared: PreparedRequest, opened: OpenRequest, interval: int
    ) -> None:
        """Hands a request to the engine, and its outputs to whoever opened it."""
        tokenizer = self._processor.tokenizer
        stream = make_stream(prepared, tokenizer, interval=interval)
        opened.open(stream, partial(self._loop.abort, stream.request_id))
        request = prepared.request
        if request.probes is not None:
            await prepare_probed(self._engine, request)
        try:
            await asyncio.wrap_future(self._loop.add(request, opened))
        except BaseException:
            if request.probes is not None:
                self._engine.release(request.request_id)
            raise


def _length(prompt: Any) -> int:
    """Characters or tokens of a prompt, as far as it has a known form."""
    if isinstance(prompt, dict):
        prompt = prompt.get("prompt_token_ids") or prompt.get("prompt")
    return len(prompt) if isinstance(prompt, (str, list, tuple)) else 0
