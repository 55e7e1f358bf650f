"""Offline generation: prompts in, finished outputs out, in the caller's thread."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from jllm.config import EngineConfig, make_config, options_of
from jllm.engine.admission import validate
from jllm.engine.create import create_engine
from jllm.errors import ConfigError, EngineStoppedError, InvalidRequestError
from jllm.offline import RequestRunner
from jllm.outputs import EmbeddingRequestOutput, RequestOutput, ScoreRequestOutput
from jllm.pooling import Pooling, PoolingParams
from jllm.probes import Probes, probes_each
from jllm.text.chat_template import ChatOptions
from jllm.text.prompts import (
    PreparedRequest,
    Prompt,
    make_processor,
    one_each,
    split_prompts,
)
from jllm.text.scoring import score_output, split_continuations
from jllm.types import SamplingParams


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
            self._closed = True
            self._engine.close()
            raise
        self._runner = RequestRunner(self._engine, self._processor.tokenizer)

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

    @property
    def weights(self) -> Any:
        """The tree of arrays that the model computes with; see `update_weights`."""
        return self._engine.weights

    def update_weights(self, weights: Any) -> None:
        """Computes with other weights from the next step on.

        Nothing is compiled, and nothing copied that is on the devices already. Cached
        prefixes are not used any more; sequences that run go on with what they have.

        Args:
            weights: A tree like `weights`: the same structure, shapes and types.

        Raises:
            ConfigError: It is not; names the array.
        """
        self._engine.update_weights(weights)

    def reset_prefix_cache(self) -> bool:
        """Forgets cached prompt prefixes; False while requests are running."""
        return self._engine.reset_prefix_cache()

    def generate(
        self,
        prompts: Any,
        sampling_params: Any = None,
        *,
        capture: Any = None,
        edit: Any = None,
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
            capture: Names, or patterns of names, of activations that come with the
                outputs; or a list with such a tuple, or None, for each prompt.
            edit: What changes which activation: a mapping from names to `jllm.Edit` or
                to functions; or a list with such a mapping, or None, for each prompt.
            use_tqdm: Whether a progress bar is shown.
            priority: An integer for all, or one for each; smaller runs first.

        Returns:
            One finished output per prompt, in their order.

        Raises:
            InvalidRequestError: A prompt or parameter is wrong; says which prompt.
        """
        items = split_prompts(prompts)
        probes = probes_each(capture, edit, len(items))
        prepared = self._prepare(items, sampling_params, priority, probes)
        return self._runner.run(prepared, use_tqdm=use_tqdm)

    def chat(
        self,
        messages: Any,
        sampling_params: Any = None,
        *,
        capture: Any = None,
        edit: Any = None,
        use_tqdm: bool = True,
        priority: Any = None,
        **chat_options: Any,
    ) -> list[RequestOutput]:
        """Answers conversations; see `generate`.

        Args:
            messages: One conversation or a list of them. A conversation is a list of
                `{"role": str, "content": str}`.
            sampling_params: As in `generate`.
            capture: As in `generate`.
            edit: As in `generate`.
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
        return self.generate(
            prompts,
            sampling_params,
            capture=capture,
            edit=edit,
            use_tqdm=use_tqdm,
            priority=priority,
        )

    def embed(
        self,
        prompts: Any,
        *,
        pooling: Pooling = "last",
        normalize: bool = True,
        dimensions: int | None = None,
        truncate_prompt_tokens: int | None = None,
        use_tqdm: bool = True,
        priority: Any = None,
    ) -> list[EmbeddingRequestOutput]:
        """Computes embeddings of prompts from the model's last hidden states.

        Args:
            prompts: As in `generate`.
            pooling: "last", "mean" or "cls"; see `jllm.PoolingParams`.
            normalize: Whether vectors are scaled to length 1.
            dimensions: Leading numbers kept of each; None keeps all.
            truncate_prompt_tokens: Last tokens kept of each prompt; -1 is as many as
                the context holds.
            use_tqdm: Whether a progress bar is shown.
            priority: As in `generate`.

        Returns:
            One output per prompt, in their order; the vector is `outputs.embedding`.
        """
        params = PoolingParams(
            pooling=pooling,
            normalize=normalize,
            dimensions=dimensions,
            truncate_prompt_tokens=truncate_prompt_tokens,
        )
        items = split_prompts(prompts)
        priorities = one_each("priority", priority, 0, len(items))
        prepare = self._processor.prepare_pooled
        prepared = [
            self._prepare_one(f"prompt {i}", prepare, item, params, priorities[i])
            for i, item in enumerate(items)
        ]
        return self._runner.run(prepared, use_tqdm=use_tqdm)

    def score(
        self, prompts: Any, continuations: Any, *, use_tqdm: bool = True
    ) -> list[ScoreRequestOutput]:
        """Computes how probable continuations of prompts are.

        What they share is computed once, as far as the prefix cache holds it. Texts are
        joined before they are encoded; a token on the border is the continuation's.

        Args:
            prompts: As in `generate`.
            continuations: For one prompt a string, a list of token ids, or a list of
                these; for a list of prompts a list with one such entry for each.
            use_tqdm: Whether a progress bar is shown.

        Returns:
            One output per prompt, in their order, with a score per continuation.

        Raises:
            InvalidRequestError: A prompt or continuation is wrong, or has no tokens.
        """
        prepare = self._processor.prepare_scored
        groups = [
            [
                self._prepare_one(f"prompt {i}, continuation {j}", prepare, prompt, own)
                for j, own in enumerate(group)
            ]
            for i, (prompt, group) in enumerate(
                split_continuations(prompts, continuations)
            )
        ]
        # The others follow once the first has filled the prefix cache.
        followers = {group[0].request.request_id: group[1:] for group in groups}
        firsts = [group[0] for group in groups]
        outputs = self._runner.run(firsts, use_tqdm=use_tqdm, followers=followers)
        found = {output.request_id: output for output in outputs}
        return [
            ScoreRequestOutput(
                [score_output(item, found[item.request.request_id]) for item in group]
            )
            for group in groups
        ]

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
        return self._runner.stream(prepared)

    def close(self) -> None:
        """Ends open requests and frees the device; may be called again."""
        if not self._closed:
            self._closed = True
            self._runner.close()
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
        self,
        prompts: Sequence[Any],
        sampling_params: Any,
        priority: Any,
        probes: Sequence[Probes | None] | None = None,
    ) -> list[PreparedRequest]:
        """Checks everything that can be wrong; queues nothing."""
        params = one_each(
            "sampling_params", sampling_params, self._default_params, len(prompts)
        )
        priorities = one_each("priority", priority, 0, len(prompts))
        probes = probes or [None] * len(prompts)
        return [
            self._prepare_one(
                f"prompt {i}",
                partial(self._processor.prepare, probes=probes[i]),
                prompt,
                params[i],
                priorities[i],
            )
            for i, prompt in enumerate(prompts)
        ]

    def _prepare_one(
        self, name: str, prepare: Callable[..., PreparedRequest], *arguments: Any
    ) -> PreparedRequest:
        if self._closed:
            raise EngineStoppedError("the LLM was closed")
        try:
            item = prepare(str(next(self._ids)), *arguments)
            validate(item.request, self._engine.limits)
        except InvalidRequestError as error:
            message = f"{name}: {error}"
            raise type(error)(message, parameter=error.parameter) from error
        return item
