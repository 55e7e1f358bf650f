"""Splitting one output into reasoning, content and tool calls while it is written."""

import secrets
import string
from collections.abc import Mapping, Sequence
from typing import Any

from jllm.errors import ConfigError
from jllm.text.parsers.deltas import Delta
from jllm.text.parsers.formats import Task, ToolFormat, copy_content
from jllm.text.parsers.harmony import Harmony
from jllm.text.parsers.reader import Reader, Steps
from jllm.text.parsers.reasoning import TaggedReasoning
from jllm.text.parsers.registry import reasoning_format, tool_format
from jllm.text.parsers.sink import Sink

_MISTRAL_ID_LENGTH = 9
"""Mistral's templates refuse ids of any other length."""
_CALL_ID_BYTES = 12


class OutputParser:
    """Parses one output; made by `make_output_parser`.

    What it gives in all does not depend on how the text was cut into pieces, takes time
    linear in the text, and holds all of it: what looks like a call and is none comes
    back as content.
    """

    def __init__(
        self, reader: Reader, sink: Sink, steps: Steps[None], *, needs_special: bool
    ) -> None:
        """Takes over its parts; `steps` waits for text."""
        self._reader = reader
        self._sink = sink
        self._steps = steps
        self._needs_special = needs_special

    @property
    def needs_special_tokens(self) -> bool:
        """Whether the text has to be decoded with `skip_special_tokens=False`."""
        return self._needs_special

    def push(self, text: str) -> tuple[Delta, ...]:
        """Takes more text; returns what is certain now."""
        self._reader.feed(text)
        next(self._steps, None)
        return self._sink.take()

    def finish(self) -> tuple[Delta, ...]:
        """Ends the text; returns the rest."""
        self._reader.end()
        next(self._steps, None)
        self._sink.finish()
        return self._sink.take()


def make_output_parser(
    *,
    reasoning: str | None,
    tools: str | None,
    tool_schemas: Sequence[Mapping[str, Any]] = (),
    starts_in_reasoning: bool | None = None,
    special_tokens: Sequence[str] = (),
    stream_arguments: bool = True,
) -> OutputParser:
    """Makes a parser for one output.

    Args:
        reasoning: Name of the reasoning parser; None leaves reasoning in the content.
        tools: Name of the tool parser; None leaves calls in the content.
        tool_schemas: The request's tools as OpenAI has them; their parameters tell the
            types where a format does not.
        starts_in_reasoning: Whether the prompt ends within reasoning, as
            `prompt_opens_reasoning` tells; None leaves it to the parser.
        special_tokens: The tokenizer's special tokens. Those that mean nothing to the
            parsers are left out of the content.
        stream_arguments: Gives arguments as they come. Else a call is given when it is
            whole, so that one that goes wrong or is cut off within its arguments is
            content, not a call with unfinished arguments.

    Raises:
        ConfigError: There is no parser of that name, or the two do not fit together.
    """
    thinks = None if reasoning is None else reasoning_format(reasoning)
    calls = None if tools is None else tool_format(tools)
    markers = (thinks.markers if thinks else frozenset()) | (
        calls.markers if calls else frozenset()
    )
    needs_special = bool(markers)
    if special_tokens:
        needs_special = any(_is_part(token, markers) for token in special_tokens)
    reader = Reader()
    make_id = _mistral_id if tools == "mistral" else _call_id
    sink = Sink(make_id, streams_calls=stream_arguments)
    ignored = _ignored(special_tokens, markers)
    task = Task(reader, sink, ignored, _parameters(tool_schemas))
    steps = _parse(task, thinks, calls, is_open=starts_in_reasoning)
    return OutputParser(reader, sink, steps, needs_special=needs_special)


def prompt_opens_reasoning(reasoning: str, prompt: str) -> bool | None:
    """Whether the output of a prompt begins within reasoning.

    Args:
        reasoning: Name of the reasoning parser.
        prompt: Text of the prompt as rendered.

    Returns:
        True and False where the prompt ends with the tag that opens or closes it; None
        where the model decides.

    Raises:
        ConfigError: There is no parser of that name.
    """
    return reasoning_format(reasoning).opened_by(prompt)


def reasoning_markers(reasoning: str) -> tuple[str, str]:
    """The texts before and behind reasoning, as the model writes them.

    Raises:
        ConfigError: There is no parser of that name.
    """
    found = reasoning_format(reasoning)
    return found.opener, found.closer


def _parse(
    task: Task,
    thinks: TaggedReasoning | Harmony | None,
    calls: ToolFormat | None,
    *,
    is_open: bool | None,
) -> Steps[None]:
    if isinstance(thinks, Harmony) or isinstance(calls, Harmony):
        for other in (thinks, calls):
            if not isinstance(other, Harmony | None):
                raise ConfigError("openai and openai_gptoss go with each other only")
        return Harmony(has_calls=calls is not None).parse(task, is_open=is_open)
    return _parse_tagged(task, thinks, calls, is_open=is_open)


def _parse_tagged(
    task: Task,
    thinks: TaggedReasoning | None,
    calls: ToolFormat | None,
    *,
    is_open: bool | None,
) -> Steps[None]:
    if thinks is not None:
        openers = calls.openers if calls else frozenset[str]()
        yield from thinks.parse(task, is_open=is_open, call_openers=openers)
    if calls is not None:
        yield from calls.parse(task)
    else:
        yield from copy_content(task, frozenset())


def _parameters(tools: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    found: dict[str, Mapping[str, Any]] = {}
    for tool in tools:
        function = tool.get("function", tool)
        name, schema = function.get("name"), function.get("parameters")
        if isinstance(name, str) and isinstance(schema, Mapping):
            found[name] = schema
    return found


def _is_part(token: str, markers: frozenset[str]) -> bool:
    return any(token in marker for marker in markers)


def _ignored(tokens: Sequence[str], markers: frozenset[str]) -> frozenset[str]:
    """Special tokens of which none is within another or shares text with a marker."""
    kept: set[str] = set()
    for token in sorted(set(tokens) - {""}, key=len):
        clashes = any(token in m or m in token for m in markers)
        if not clashes and not any(other in token for other in kept):
            kept.add(token)
    return frozenset(kept)


def _call_id() -> str:
    return f"call_{secrets.token_hex(_CALL_ID_BYTES)}"


def _mistral_id() -> str:
    letters = string.ascii_letters + string.digits
    return "".join(secrets.choice(letters) for _ in range(_MISTRAL_ID_LENGTH))
