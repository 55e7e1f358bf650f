"""Prompts as users write them, checked and made into requests in token space."""

import dataclasses
import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jllm.config import EngineConfig
from jllm.errors import InvalidRequestError
from jllm.pooling import PoolingParams
from jllm.probes import Probes
from jllm.sampling.grammar import Grammar
from jllm.sampling.thinking import Thinking
from jllm.structured_outputs import StructuredOutputsParams
from jllm.text.chat_template import ChatOptions, load_chat_template, render_chat
from jllm.text.structured import GrammarCompiler
from jllm.text.thinking import make_thinking
from jllm.text.tokenizer import Tokenizer, load_tokenizer
from jllm.types import EngineRequest, SamplingParams
from jllm.weights.hub import resolve_model

MAX_BAD_WORD_TOKENS = 1024
"""Tokens of all bad words of a request."""
PROMPT_KEYS = ("prompt", "prompt_token_ids", "cache_salt")
PROMPT_RULE = (
    "must be a string, a list of token ids, or an object with prompt or "
    "prompt_token_ids"
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One prompt, of the right types; text, tokens or both.

    Attributes:
        text: Its text, encoded only where there are no tokens.
        token_ids: Its tokens.
        cache_salt: Prompts share cached blocks only under the same salt.
    """

    text: str | None = None
    token_ids: tuple[int, ...] | None = None
    cache_salt: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class PreparedRequest:
    """A request ready for the engine.

    Attributes:
        request: The request in token space.
        prompt: Text of the prompt, None for token prompts.
    """

    request: EngineRequest
    prompt: str | None


def split_prompts(prompts: Any) -> list[Any]:
    """Tells one prompt from a list of prompts; a list of integers is one prompt."""
    if isinstance(prompts, Sequence) and not isinstance(prompts, (str, bytes)):
        if prompts and all(_is_integer(item) for item in prompts):
            return [prompts]
        return list(prompts)
    return [prompts]


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


def parse_prompt(value: Any) -> Prompt:
    """Checks the types of one prompt.

    Raises:
        InvalidRequestError: It is none of the forms that a prompt may have.
    """
    if isinstance(value, Prompt):
        return value
    if isinstance(value, str):
        return Prompt(text=value)
    if not isinstance(value, Mapping):
        return Prompt(token_ids=_token_ids(value))
    for key in value:
        if key not in PROMPT_KEYS:
            raise _bad_prompt(f"has the unknown key {key!r}")
    text, token_ids = value.get("prompt"), value.get("prompt_token_ids")
    salt = value.get("cache_salt")
    if text is None and token_ids is None:
        raise _bad_prompt(PROMPT_RULE)
    if text is not None and not isinstance(text, str):
        raise _bad_prompt("must hold a string as prompt")
    if salt is not None and (not isinstance(salt, str) or not salt):
        raise InvalidRequestError(
            f"cache_salt={salt!r} must be a string, not empty", parameter="cache_salt"
        )
    ids = None if token_ids is None else _token_ids(token_ids)
    return Prompt(text=text, token_ids=ids, cache_salt=salt)


class PromptProcessor:
    """Turns prompts into requests: template, tokens, truncation, bad words."""

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        *,
        vocab_size: int,
        max_model_len: int,
        chat_template: str | None = None,
    ) -> None:
        """Takes over the tokenizer; without one only token prompts are accepted."""
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len
        eos = None if tokenizer is None else tokenizer.eos_token_id
        # A tokenizer may know more tokens than the model.
        self._eos = () if eos is None or eos >= vocab_size else (eos,)
        self._chat_template = chat_template
        self._compiler = None if tokenizer is None else GrammarCompiler(tokenizer)

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer, None with `skip_tokenizer_init`."""
        return self._tokenizer

    def prepare(
        self,
        request_id: str,
        prompt: Any,
        params: SamplingParams,
        priority: int = 0,
        grammar: Grammar | None = None,
        probes: Probes | None = None,
    ) -> PreparedRequest:
        """Makes a request.

        Args:
            request_id: Its id.
            prompt: See `parse_prompt`.
            params: How its tokens are chosen.
            priority: Smaller runs first.
            grammar: That of its structured output, compiled here where it is missing.
            probes: What is captured and edited of its activations.

        Raises:
            InvalidRequestError: The prompt is malformed, or needs a tokenizer, or the
                grammar cannot be compiled.
        """
        parsed = parse_prompt(prompt)
        token_ids = self._tokens(parsed)
        if params.stop:
            self._need_tokenizer("stop")
        constraint = params.structured_outputs
        if grammar is None and isinstance(constraint, StructuredOutputsParams):
            grammar = self._need_compiler().compile(constraint)
        request = EngineRequest(
            request_id=request_id,
            prompt_token_ids=self._truncate(
                token_ids, params.truncate_prompt_tokens, params.max_tokens or 1
            ),
            params=params,
            eos_token_ids=self._eos,
            bad_words_token_ids=self._bad_words(params.bad_words or ()),
            priority=_priority(priority),
            cache_salt=parsed.cache_salt,
            grammar=grammar,
            thinking=self._thinking(token_ids, params),
            probes=probes,
        )
        return PreparedRequest(request, parsed.text)

    def prepare_pooled(
        self, request_id: str, prompt: Any, params: PoolingParams, priority: int = 0
    ) -> PreparedRequest:
        """Makes a request for an embedding; arguments and errors as in `prepare`."""
        parsed = parse_prompt(prompt)
        tokens = self._truncate(self._tokens(parsed), params.truncate_prompt_tokens, 0)
        request = EngineRequest(
            request_id=request_id,
            prompt_token_ids=tokens,
            params=SamplingParams(temperature=0),
            priority=_priority(priority),
            cache_salt=parsed.cache_salt,
            pooling=params,
        )
        return PreparedRequest(request, parsed.text)

    def prepare_scored(
        self, request_id: str, prompt: Any, continuation: Any
    ) -> PreparedRequest:
        """Makes a request for the log-probabilities of what follows a prompt.

        Two texts are joined before they are encoded; a token that spans the border
        counts as the continuation's.

        Raises:
            InvalidRequestError: One of the two is malformed or has no tokens.
        """
        before, after = parse_prompt(prompt), parse_prompt(continuation)
        start, tokens = self._join(before, after)
        if not 0 < start < len(tokens):
            name = "prompt" if start < len(tokens) else "continuation"
            raise InvalidRequestError(f"the {name} has no tokens", parameter=f"{name}s")
        request = EngineRequest(
            request_id=request_id,
            prompt_token_ids=tokens,
            params=SamplingParams(
                temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False
            ),
            cache_salt=before.cache_salt,
            prompt_logprobs_start=start,
        )
        return PreparedRequest(request, None)

    def _join(self, before: Prompt, after: Prompt) -> tuple[int, tuple[int, ...]]:
        """Where the continuation begins, and the tokens of both."""
        tokens = self._tokens(before)
        if before.token_ids is None and after.token_ids is None:
            joined = self._tokens(Prompt(text=f"{before.text or ''}{after.text or ''}"))
            pairs = enumerate(zip(tokens, joined, strict=False))
            differs = (i for i, (own, other) in pairs if own != other)
            return next(differs, min(len(tokens), len(joined))), joined
        rest = after.token_ids
        if rest is None:
            encode = self._need_tokenizer("continuations").encode
            rest = tuple(encode(after.text or "", add_special_tokens=False))
        return len(tokens), tokens + rest

    def _tokens(self, prompt: Prompt) -> tuple[int, ...]:
        if prompt.token_ids is not None:
            return prompt.token_ids
        return tuple(self._need_tokenizer("prompt").encode(prompt.text or ""))

    def chat_prompt(self, messages: Any, options: ChatOptions) -> Prompt:
        """Renders and encodes a conversation.

        Raises:
            InvalidRequestError: See `render_chat`.
        """
        tokenizer = self._need_tokenizer("messages")
        if options.chat_template is None:
            options = dataclasses.replace(options, chat_template=self._chat_template)
        text = render_chat(tokenizer, messages, options)
        # Most templates write BOS and the like themselves.
        special = options.add_special_tokens
        ids = tokenizer.encode(text, add_special_tokens=special)
        return Prompt(text=text, token_ids=tuple(ids))

    async def grammar(self, params: SamplingParams) -> Grammar | None:
        """Compiles the grammar of a structured output beside the event loop.

        Raises:
            InvalidRequestError: It cannot be compiled, or there is no tokenizer.
        """
        constraint = params.structured_outputs
        if not isinstance(constraint, StructuredOutputsParams):
            return None
        return await self._need_compiler().compile_async(constraint)

    def _thinking(
        self, token_ids: Sequence[int], params: SamplingParams
    ) -> Thinking | None:
        """What bounds the reasoning of an output, None where nothing does."""
        budget = params.thinking_token_budget
        if params.reasoning_parser is None and budget not in (None, -1):
            raise InvalidRequestError(
                f"thinking_token_budget={budget} needs reasoning_parser, the form of "
                "the model's reasoning",
                parameter="thinking_token_budget",
            )
        if params.reasoning_parser is None:
            return None
        tokenizer = self._need_tokenizer("reasoning_parser")
        thinking = make_thinking(tokenizer, params, token_ids)
        if thinking is not None and max(thinking.all_ids) >= self._vocab_size:
            raise InvalidRequestError(
                f"reasoning_parser={params.reasoning_parser!r} has markers that the "
                "model does not know",
                parameter="reasoning_parser",
            )
        return thinking

    def _need_compiler(self) -> GrammarCompiler:
        if self._compiler is None:
            self._need_tokenizer("structured_outputs")
        assert self._compiler is not None
        return self._compiler

    def _need_tokenizer(self, parameter: str) -> Tokenizer:
        if self._tokenizer is None:
            raise InvalidRequestError(
                f"{parameter} needs a tokenizer, but skip_tokenizer_init is set",
                parameter=parameter,
            )
        return self._tokenizer

    def _truncate(
        self, token_ids: tuple[int, ...], kept: int | None, num_reserved: int
    ) -> tuple[int, ...]:
        """Keeps the last tokens of a prompt; -1 leaves room for those reserved."""
        if kept is None:
            return token_ids
        if kept == -1:
            kept = max(1, self._max_model_len - num_reserved)
        return token_ids[-kept:]

    def _bad_words(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Tokens of the words as they begin a text and as they follow a space."""
        found: list[tuple[int, ...]] = []
        for word in words:
            encode = self._need_tokenizer("bad_words").encode
            plain = tuple(encode(word.lstrip(), add_special_tokens=False))
            spaced = tuple(encode(" " + word.lstrip(), add_special_tokens=False))
            if plain:
                found.append(plain)
            # With a space of its own in front, the word is banned by the first form.
            if len(spaced) == len(plain) and spaced[:1] != plain[:1]:
                found.append(spaced)
        total = sum(map(len, found))
        if total > MAX_BAD_WORD_TOKENS:
            raise InvalidRequestError(
                f"bad_words have {total} tokens in all, at most "
                f"{MAX_BAD_WORD_TOKENS} are possible",
                parameter="bad_words",
            )
        return tuple(found)


def make_processor(
    config: EngineConfig, model_path: Path, *, vocab_size: int, max_model_len: int
) -> PromptProcessor:
    """Loads the tokenizer and template that the options name.

    Raises:
        CheckpointError, ModelNotFoundError, ConfigError: A file is missing or broken.
    """
    template = config.chat_template and load_chat_template(config.chat_template)
    tokenizer = None
    if not config.skip_tokenizer_init:
        tokenizer = load_tokenizer(_tokenizer_folder(config, model_path))
    return PromptProcessor(
        tokenizer,
        vocab_size=vocab_size,
        max_model_len=max_model_len,
        chat_template=template,
    )


def _tokenizer_folder(config: EngineConfig, model_path: Path) -> Path:
    if config.tokenizer is None:
        return model_path
    folder = Path(config.tokenizer).expanduser()
    if folder.is_dir():
        return folder
    return resolve_model(config.tokenizer, with_weights=False).path


def _is_integer(value: Any) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool)


def _token_ids(value: Any) -> tuple[int, ...]:
    if isinstance(value, (str, bytes)) or not hasattr(value, "__iter__"):
        raise _bad_prompt(PROMPT_RULE)
    items = list(value)
    for item in items:
        if not _is_integer(item):
            raise _bad_prompt(f"holds {item!r}, which is no token id")
    return tuple(operator.index(item) for item in items)


def _priority(value: Any) -> int:
    if not _is_integer(value):
        raise InvalidRequestError(
            f"priority={value!r} must be an integer", parameter="priority"
        )
    return operator.index(value)


def _bad_prompt(rule: str) -> InvalidRequestError:
    return InvalidRequestError(f"the prompt {rule}", parameter="prompt")
