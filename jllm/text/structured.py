"""Constraints of outputs, compiled to grammars: beside the engine, bounded and cached.

llguidance bounds the work itself (fuel, grammar size, lexer states), so that a compile
ends within seconds whatever it is given. The time limit here frees those who wait, and
takes what has not begun out of the queue; two threads bound the processors taken.
"""

import asyncio
import collections
import dataclasses
import json
import re
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Any

from jllm.errors import InvalidRequestError
from jllm.sampling.grammar import Grammar
from jllm.structured_outputs import StructuredOutputsParams
from jllm.text.json_schemas import (
    check_references,
    close_objects,
    map_schema,
    tighten_format,
)
from jllm.text.structural_tags import Rewriting, structural_tag_grammar
from jllm.text.tokenizer import Tokenizer

COMPILE_SECONDS = 5.0
"""A compile that takes longer is refused."""
COMPILE_THREADS = 2
CACHE_BYTES = 64 * 2**20
"""Memory of all grammars kept, by estimate."""
WHITESPACE = r"[ \t\r\n]{1,32}"
"""Between the tokens of JSON; without a bound a small model fills its output so."""
GRAMMAR_BYTES = 100_000
BYTES_PER_SOURCE_BYTE = 40
"""Memory of a grammar: so much, and so much per byte of its source; measured."""
MAX_REASON = 240
"""Characters of llguidance's errors that are told, which may repeat the grammar."""
LIMITS: Mapping[str, Any] = {
    "max_lexer_states": 50_000,
    "max_grammar_size": 200_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "initial_lexer_fuel": 1_000_000,
    "verbose_errors": False,
}
"""Of llguidance: about 100 MB for a sequence and 20 ms for a mask at the very worst."""


@dataclasses.dataclass(frozen=True, slots=True)
class Vocabulary:
    """A tokenizer as grammars see it.

    Attributes:
        tokens: The `LLTokenizer`.
        special_tokens: Text and id of the tokens that are never part of a text.
    """

    tokens: Any
    special_tokens: Mapping[str, int]


def make_vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    """Takes a second or two for a large vocabulary."""
    import llguidance

    state = json.loads(tokenizer.serialize())
    state |= {"truncation": None, "padding": None}
    eos = tokenizer.eos_token_id
    tokens = llguidance.LLTokenizer(json.dumps(state), eos_token=eos)
    special = {
        text: token_id
        for token_id, text in tokenizer.added_tokens.items()
        if tokens.is_special_token(token_id)
    }
    return Vocabulary(tokens, special)


class GrammarCompiler:
    """Compiles constraints for one tokenizer; may be called from any thread."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        seconds: float = COMPILE_SECONDS,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        """Does nothing yet: the first constraint prepares the tokenizer.

        Args:
            tokenizer: Of the model.
            seconds: Time limit of one compile.
            cache_bytes: Bound of the grammars kept.
        """
        self._tokenizer = tokenizer
        self._seconds = seconds
        self._cache_bytes = cache_bytes
        self._pool = ThreadPoolExecutor(COMPILE_THREADS, "jllm-grammar")
        self._lock = threading.Lock()
        # Least recently used first; failed ones are not kept.
        self._grammars: collections.OrderedDict[StructuredOutputsParams, Grammar] = (
            collections.OrderedDict()
        )
        self._num_bytes = 0
        self._compiling: dict[StructuredOutputsParams, Future[Grammar]] = {}
        self._vocabulary: Future[Vocabulary] | None = None

    @property
    def num_bytes(self) -> int:
        """Estimated memory of the grammars kept."""
        return self._num_bytes

    def compile(self, constraint: StructuredOutputsParams) -> Grammar:
        """Takes a grammar from the cache, or waits for it.

        Raises:
            InvalidRequestError: It cannot be compiled, or not in time; names the field.
        """
        vocabulary, future = self._submit(constraint)
        vocabulary.result()
        try:
            return future.result(self._seconds)
        except (TimeoutError, CancelledError) as error:
            self._drop(constraint, future)
            raise self._too_slow(constraint) from error

    async def compile_async(self, constraint: StructuredOutputsParams) -> Grammar:
        """Does what `compile` does without blocking the event loop."""
        vocabulary, future = self._submit(constraint)
        # Others may wait for the same futures, so that none is cancelled here.
        await asyncio.shield(asyncio.wrap_future(vocabulary))
        waiting = asyncio.wrap_future(future)
        waiting.add_done_callback(lambda done: done.cancelled() or done.exception())
        done, _ = await asyncio.wait({waiting}, timeout=self._seconds)
        if not done or waiting.cancelled():
            self._drop(constraint, future)
            raise self._too_slow(constraint)
        return waiting.result()

    def _drop(
        self, constraint: StructuredOutputsParams, future: Future[Grammar]
    ) -> None:
        """Takes a compile that has not begun out of the queue; others gave it up too.

        Whoever else waits for it is told the same.
        """
        if not future.cancel():
            return
        with self._lock:
            if self._compiling.get(constraint) is future:
                del self._compiling[constraint]

    def _submit(
        self, constraint: StructuredOutputsParams
    ) -> tuple[Future[Vocabulary], Future[Grammar]]:
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = self._pool.submit(make_vocabulary, self._tokenizer)
            if constraint in self._grammars:
                self._grammars.move_to_end(constraint)
                done: Future[Grammar] = Future()
                done.set_result(self._grammars[constraint])
                return self._vocabulary, done
            future = self._compiling.get(constraint)
            if future is None:
                future = self._pool.submit(self._compile, constraint)
                self._compiling[constraint] = future
            return self._vocabulary, future

    def _compile(self, constraint: StructuredOutputsParams) -> Grammar:
        assert self._vocabulary is not None
        try:
            # Another thread of the pool has it in hand, at the latest.
            grammar = compile_grammar(constraint, self._vocabulary.result())
            self._keep(constraint, grammar)
            return grammar
        finally:
            with self._lock:
                self._compiling.pop(constraint, None)

    def _keep(self, constraint: StructuredOutputsParams, grammar: Grammar) -> None:
        with self._lock:
            self._grammars[constraint] = grammar
            self._num_bytes += grammar.num_bytes
            while self._num_bytes > self._cache_bytes:
                _, dropped = self._grammars.popitem(last=False)
                self._num_bytes -= dropped.num_bytes

    def _too_slow(self, constraint: StructuredOutputsParams) -> InvalidRequestError:
        return _fail(constraint.kind, f"was not compiled within {self._seconds:g} s")


def compile_grammar(
    constraint: StructuredOutputsParams, vocabulary: Vocabulary
) -> Grammar:
    """Compiles a constraint for a vocabulary.

    Raises:
        InvalidRequestError: It is malformed, beyond a limit, uses what is not
            supported, or allows no output at all; names the field and the reason.
    """
    import llguidance

    kind, tokens = constraint.kind, vocabulary.tokens
    try:
        source = grammar_source(constraint, vocabulary.special_tokens)
    except InvalidRequestError:
        raise
    except (ValueError, RecursionError) as error:
        raise _fail(kind, f"cannot be read: {_reason(error)}") from error
    limits = llguidance.LLParserLimits(**LIMITS)
    matcher = llguidance.LLMatcher(tokens, source, log_level=0, limits=limits)
    if not matcher.is_error():
        # The first mask shows what can never match, and prepares the lexer.
        matcher.compute_bitmask()
        if matcher.is_error():
            reason = _reason(matcher.get_error())
            raise _fail(kind, f"allows no output: {reason}")
    if matcher.is_error():
        raise _fail(kind, f"is refused: {_reason(matcher.get_error())}")
    return Grammar(matcher, GRAMMAR_BYTES + BYTES_PER_SOURCE_BYTE * len(source))


def grammar_source(
    constraint: StructuredOutputsParams, special_tokens: Mapping[str, int]
) -> str:
    """The constraint in llguidance's own notation.

    Raises:
        ValueError: It is malformed.
        InvalidRequestError: A part of a structural tag is.
    """
    from llguidance import LLMatcher, grammar_from, regex_to_lark

    options = _schema_options(constraint)
    if constraint.json is not None:
        text = json.dumps(_prepared(json.loads(str(constraint.json)), constraint))
        return LLMatcher.grammar_from_json_schema(text, overrides=options)  # pyright: ignore[reportArgumentType]
    if constraint.json_object:
        return LLMatcher.grammar_from_json_schema('{"type":"object"}', None, options)  # pyright: ignore[reportArgumentType]
    if constraint.regex is not None:
        return LLMatcher.grammar_from_regex(_without_anchors(constraint.regex))
    if constraint.choice is not None:
        return LLMatcher.grammar_from_lark(_choice_grammar(constraint.choice))
    if constraint.grammar is not None:
        return grammar_from("grammar", constraint.grammar)
    tag = json.loads(str(constraint.structural_tag))
    rewriting = Rewriting(
        special_tokens=special_tokens,
        schema=lambda schema: {**_prepared(schema, constraint), "x-guidance": options},
        regex=lambda regex: regex_to_lark(regex, ""),
    )
    return structural_tag_grammar(tag, rewriting)


def _schema_options(constraint: StructuredOutputsParams) -> dict[str, Any]:
    """Options of llguidance; none that makes it ignore or approximate a keyword."""
    options: dict[str, Any] = {
        "lenient": False,
        "coerce_one_of": False,
        "whitespace_pattern": WHITESPACE,
    }
    if constraint.disable_any_whitespace:
        del options["whitespace_pattern"]
        options["whitespace_flexible"] = False
    if constraint.whitespace_pattern is not None:
        options["whitespace_pattern"] = constraint.whitespace_pattern
    return options


def _prepared(schema: Any, constraint: StructuredOutputsParams) -> Any:
    """A schema as llguidance takes it, with what its formats leave out."""
    if schema is False:
        raise ValueError("a schema of false allows no output")
    check_references(schema)
    if constraint.disable_additional_properties:
        schema = map_schema(schema, close_objects)
    return map_schema({} if schema is True else schema, tighten_format)


def _without_anchors(regex: str) -> str:
    """Drops `^` in front and `$` behind, which mean nothing where all has to match."""
    regex = regex.removeprefix("^")
    if re.search(r"(?<!\\)(\\\\)*\$$", regex):
        regex = regex[:-1]
    return regex


def _choice_grammar(choices: Iterable[str]) -> str:
    return "start: " + " | ".join(json.dumps(c, ensure_ascii=False) for c in choices)


def _reason(error: object) -> str:
    """The first line of an error and what it says is wrong, shortened in the middle."""
    lines = [line.strip() for line in str(error).splitlines()]
    told = [line for line in lines[1:] if line.startswith("error:")]
    text = " ".join([*lines[:1], *told]) or type(error).__name__
    if len(text) <= MAX_REASON:
        return text
    return f"{text[: MAX_REASON // 2]} … {text[-MAX_REASON // 2 :]}"


def _fail(kind: str, reason: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"structured_outputs.{kind} {reason}", parameter="structured_outputs"
    )
