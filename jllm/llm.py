"""Offline generation: prompts in, finished outputs out, in the caller's thread."""

import contextlib
import dataclasses
import itertools
import logging
import signal
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

from jllm.config import EngineConfig, make_config
from jllm.engine.admission import validate
from jllm.engine.create import create_engine
from jllm.engine.garbage import QuietGarbage
from jllm.errors import ConfigError, EngineStoppedError, InvalidRequestError
from jllm.text.chat_template import ChatOptions
from jllm.text.output import RequestStream
from jllm.text.prompts import (
    PreparedRequest,
    Prompt,
    make_processor,
    split_prompts,
)
from jllm.types import RequestOutput, RequestOutputKind, SamplingParams

logger = logging.getLogger("jllm")


class LLM:
    """A model to generate text with; names and arguments as in vLLM.

    Not thread-safe. Use it as a context manager, or call `close`, to free the device.
    """

    def __init__(self, model: Any = None, **options: Any) -> None:
        """Loads a model.

        Args:
            model: Folder, or Hugging Face id; none is the embedded model.
            **options: Fields of `EngineConfig`.

        Raises:
            ConfigError: An option is unknown or wrong.
            ModelNotFoundError, UnsupportedModelError, CheckpointError: See
                `jllm.errors`.
        """
        self._config = config = make_config(model, options)
        self._closed = False
        self._ids = itertools.count()
        self._open: dict[str, RequestStream] = {}
        self._engine = create_engine(config)
        limits, info = self._engine.limits, self._engine.info
        try:
            self._processor = make_processor(
                config,
                info.path,
                vocab_size=limits.vocab_size,
                max_model_len=limits.max_model_len,
            )
            self._default_params = SamplingParams(**info.default_sampling)
        except BaseException:
            self.close()
            raise

    @classmethod
    def from_engine_config(cls, config: EngineConfig) -> Self:
        """Loads the model that the options name."""
        return cls(**dataclasses.asdict(config))

    @property
    def config(self) -> EngineConfig:
        """The options it was made with."""
        return self._config

    @property
    def max_model_len(self) -> int:
        """Most tokens of a prompt and its output together."""
        return self._engine.limits.max_model_len

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self._engine.limits.vocab_size

    @property
    def model_path(self) -> Path:
        """Folder of the checkpoint."""
        return self._engine.info.path

    @property
    def engine(self) -> Any:
        """The engine under it, to look at: `metrics`, `scheduler`, `programs`."""
        return self._engine

    def wait_until_compiled(self) -> None:
        """Returns when the programs of all sizes are compiled; then nothing is."""
        self._engine.wait_until_compiled()

    def get_tokenizer(self) -> Any:
        """Returns the transformers tokenizer.

        Raises:
            ConfigError: It was not loaded.
        """
        if self._processor.tokenizer is None:
            raise ConfigError("there is no tokenizer: skip_tokenizer_init is set")
        return self._processor.tokenizer.hf

    def get_default_sampling_params(self) -> SamplingParams:
        """Returns what is used where no sampling parameters are given."""
        return self._default_params

    def reset_prefix_cache(self) -> bool:
        """Forgets cached prompt prefixes; False while requests are running."""
        return self._engine.reset_prefix_cache()

    def generate(
        self,
        prompts: Any,
        sampling_params: Any = None,
        *,
        use_tqdm: bool = True,
        priority: Any = None,
    ) -> list[RequestOutput]:
        """Completes prompts; all are checked before the first is queued.

        Args:
            prompts: One prompt or a list of them. A prompt is a string, a list of token
                ids, `{"prompt": str}` or `{"prompt_token_ids": list[int]}`, the last
                two with an optional `"cache_salt"`.
            sampling_params: `SamplingParams` for all prompts, or a list with one for
                each; None takes the model's defaults.
            use_tqdm: Whether a progress bar is shown.
            priority: An integer for all, or one for each; smaller runs first.

        Returns:
            One finished output per prompt, in their order.

        Raises:
            InvalidRequestError: A prompt or parameter is wrong; says which prompt.
        """
        items = split_prompts(prompts)
        prepared = self._prepare(items, sampling_params, priority)
        return self._run(prepared, use_tqdm=use_tqdm)

    def chat(
        self,
        messages: Any,
        sampling_params: Any = None,
        *,
        use_tqdm: bool = True,
        priority: Any = None,
        **chat_options: Any,
    ) -> list[RequestOutput]:
        """Answers conversations; see `generate`.

        Args:
            messages: One conversation or a list of them. A conversation is a list of
                `{"role": str, "content": str}`.
            sampling_params: As in `generate`.
            use_tqdm: Whether a progress bar is shown.
            priority: As in `generate`.
            **chat_options: `chat_template` (Jinja source), `add_generation_prompt`,
                `continue_final_message`, `tools`, `chat_template_kwargs`.

        Raises:
            InvalidRequestError: A message is malformed, or the template refuses it.
        """
        is_list = isinstance(messages, (list, tuple)) and bool(messages)
        many = is_list and all(isinstance(item, (list, tuple)) for item in messages)
        conversations = list(messages) if many else [messages]
        prompts = [self.chat_prompt(item, **chat_options) for item in conversations]
        prepared = self._prepare(prompts, sampling_params, priority)
        return self._run(prepared, use_tqdm=use_tqdm)

    def chat_prompt(self, messages: Any, **chat_options: Any) -> Prompt:
        """Renders a conversation to a prompt for `generate` or `stream`."""
        options = ChatOptions.from_keywords(chat_options)
        return self._processor.chat_prompt(messages, options)

    def stream(
        self, prompt: Any, sampling_params: Any = None
    ) -> Iterator[RequestOutput]:
        """Completes one prompt, with an output whenever there is more of it.

        Leaving the iterator early ends the request. Several streams may be read in
        turns; they share the steps of the engine.

        Raises:
            InvalidRequestError: The prompt or a parameter is wrong.
        """
        (prepared,) = self._prepare([prompt], sampling_params, None)
        return self._stream(prepared)

    def close(self) -> None:
        """Ends open requests and frees the device; may be called again."""
        if not self._closed:
            self._closed = True
            self._open.clear()
            self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _prepare(
        self, prompts: Sequence[Any], sampling_params: Any, priority: Any
    ) -> list[PreparedRequest]:
        """Checks everything that can be wrong; queues nothing."""
        if self._closed:
            raise EngineStoppedError("the LLM was closed")
        params = one_each(
            "sampling_params", sampling_params, self._default_params, len(prompts)
        )
        priorities = one_each("priority", priority, 0, len(prompts))
        prepared: list[PreparedRequest] = []
        for i, prompt in enumerate(prompts):
            try:
                item = self._processor.prepare(
                    str(next(self._ids)), prompt, params[i], priorities[i]
                )
                validate(item.request, self._engine.limits)
            except InvalidRequestError as error:
                message = f"prompt {i}: {error}"
                raise type(error)(message, parameter=error.parameter) from error
            prepared.append(item)
        return prepared

    def _run(
        self, prepared: Sequence[PreparedRequest], *, use_tqdm: bool
    ) -> list[RequestOutput]:
        progress = _Progress(len(prepared), is_shown=use_tqdm)
        kind = RequestOutputKind.FINAL_ONLY
        with (
            QuietGarbage(freeze=False) as garbage,
            self._serve(prepared, kind) as streams,
            progress,
        ):
            for stream in streams:
                while not stream.finished:
                    progress.update(self._step())
                    garbage.note_step()
        outputs = [stream.take() for stream in streams]
        return [output for output in outputs if output is not None]

    def _stream(self, prepared: PreparedRequest) -> Iterator[RequestOutput]:
        with self._serve([prepared], None) as (stream,):
            finished = False
            while not finished:
                # Another stream's step may have brought something for this one.
                output = stream.take()
                if output is None:
                    self._step()
                else:
                    finished = output.finished
                    yield output

    @contextlib.contextmanager
    def _serve(
        self, prepared: Sequence[PreparedRequest], kind: RequestOutputKind | None
    ) -> Generator[list[RequestStream]]:
        """Queues requests; whatever is left of them in the end is aborted."""
        streams: list[RequestStream] = []
        try:
            for item in prepared:
                stream = RequestStream(item, self._processor.tokenizer, kind)
                self._engine.add(item.request)
                self._open[stream.request_id] = stream
                streams.append(stream)
            yield streams
        finally:
            for stream in streams:
                if self._open.pop(stream.request_id, None) is not None:
                    self._engine.abort(stream.request_id)

    def _step(self) -> list[RequestStream]:
        """Runs a step for all open streams; returns those that ended."""
        if not self._engine.has_unfinished:
            raise EngineStoppedError("the LLM was closed, or the engine has failed")
        with _interrupts_afterwards():
            outputs = self._engine.step()
        ended: list[RequestStream] = []
        for output in outputs:
            stream = self._open.get(output.request_id)
            if stream is None:
                continue
            has_stopped = stream.push(output)
            if stream.finished:
                ended.append(self._open.pop(stream.request_id))
                if stream.error is not None:
                    logger.warning("prompt %s: %s", stream.request_id, stream.error)
            if has_stopped and stream.finished:
                self._engine.abort(output.request_id)
            elif has_stopped:
                self._engine.abort_sequence(output.request_id, output.index)
        return ended


def one_each(name: str, value: Any, default: Any, count: int) -> list[Any]:
    """Spreads one value over all prompts, or takes a list with one for each.

    Raises:
        InvalidRequestError: The list has another length, or a value another type.
    """
    if value is None:
        return [default] * count
    values = list(value) if isinstance(value, (list, tuple)) else [value] * count
    if len(values) != count:
        raise InvalidRequestError(
            f"{name} has {len(values)} entries, but there are {count} prompts",
            parameter=name,
        )
    for item in values:
        if not isinstance(item, type(default)) or isinstance(item, bool):
            kind = type(default).__name__
            raise InvalidRequestError(
                f"{name} must hold {kind}, not {item!r}", parameter=name
            )
    return values


class _Progress:
    """A bar over the prompts, with the speed in tokens per second."""

    def __init__(self, total: int, *, is_shown: bool) -> None:
        self._bar = tqdm(
            total=total, disable=not is_shown, desc="prompts", dynamic_ncols=True
        )
        self._began = time.perf_counter()
        self._num_tokens = 0

    def update(self, ended: Sequence[RequestStream]) -> None:
        """Counts prompts that ended."""
        if ended:
            self._num_tokens += sum(stream.num_tokens for stream in ended)
            speed = self._num_tokens / (time.perf_counter() - self._began)
            self._bar.set_postfix_str(f"{speed:.1f} tokens/s", refresh=False)
            self._bar.update(len(ended))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


@contextlib.contextmanager
def _interrupts_afterwards() -> Generator[None]:
    """Delays Ctrl-C to the end of a step, which would leave the state half updated."""
    previous = signal.getsignal(signal.SIGINT)
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or not callable(previous):
        yield
        return
    caught: list[Any] = []
    signal.signal(signal.SIGINT, lambda *arguments: caught.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if caught:
            previous(*caught[-1])
