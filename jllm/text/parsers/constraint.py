"""Grammars that make a model call: what `tool_choice` asks for, as structural tags.

Calls are written as the model's parser reads them. Where a format is not JSON, they are
call objects in its tags, which its parser reads too.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jllm.errors import InvalidRequestError
from jllm.structured_outputs import StructuredOutputsParams
from jllm.text.parsers.harmony import Harmony
from jllm.text.parsers.llama_json import LlamaJson
from jllm.text.parsers.mistral import MistralCalls
from jllm.text.parsers.pythonic import PythonicCalls
from jllm.text.parsers.registry import tool_format
from jllm.text.parsers.sections import SectionCalls
from jllm.text.parsers.tagged_json import TaggedJson
from jllm.text.parsers.xml_calls import XmlCalls

Tag = dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class _Frame:
    """What stands around the arguments of calls.

    Attributes:
        begin: Before the arguments of a call, of the function's name.
        end: Behind them.
        opener: Before the first call.
        separator: Between calls; None where an output has only one.
        closer: Behind the last call.
    """

    begin: Callable[[str], str]
    end: str
    opener: str = ""
    separator: str | None = ""
    closer: str = ""


def tool_constraint(
    parser: str,
    tools: Sequence[Mapping[str, Any]],
    tool_choice: str | Mapping[str, Any],
    *,
    parallel_tool_calls: bool = True,
) -> StructuredOutputsParams | None:
    """The constraint under which an output is nothing but calls of the tools.

    Args:
        parser: Name of the tool parser that will read the output.
        tools: The request's tools, as OpenAI has them. Arguments follow their schemas;
            one that does not say so allows no further properties.
        tool_choice: "none" and "auto" constrain nothing, "required" asks for at least
            one call, `{"type": "function", "function": {"name": …}}` for one of it.
        parallel_tool_calls: Whether "required" may give several calls.

    Returns:
        A structural tag; None without a constraint.

    Raises:
        ConfigError: There is no such parser.
        InvalidRequestError: `tool_choice` is malformed, names no tool of the request,
            or there are none.
    """
    frame = _frame(parser)
    chosen = _chosen(tools, tool_choice)
    if chosen is None:
        return None
    is_one = not parallel_tool_calls or not isinstance(tool_choice, str)
    tags = [
        {
            "type": "tag",
            "begin": frame.begin(str(function["name"])),
            "content": {"type": "json_schema", "json_schema": _schema(function)},
            "end": frame.end,
        }
        for function in chosen
    ]
    calls: Tag = {
        "type": "tags_with_separator",
        "tags": tags,
        "separator": frame.separator or "",
        "at_least_one": True,
        "stop_after_first": is_one or frame.separator is None,
    }
    parts = [_text(frame.opener), calls, _text(frame.closer)]
    form: Tag = {"type": "sequence", "elements": [part for part in parts if part]}
    if isinstance(tool_format(parser), Harmony):
        form = _behind_analysis(form)
    return StructuredOutputsParams(
        structural_tag={"type": "structural_tag", "format": form},
        disable_any_whitespace=True,
    )


def _chosen(
    tools: Sequence[Mapping[str, Any]], choice: str | Mapping[str, Any]
) -> list[Mapping[str, Any]] | None:
    """The functions of which one must be called; None without a constraint."""
    if choice in ("none", "auto"):
        return None
    functions = [tool.get("function", tool) for tool in tools]
    if not functions:
        raise _fail(f"tool_choice={choice!r} needs tools")
    if choice == "required":
        return functions
    inner = choice.get("function", choice) if isinstance(choice, Mapping) else {}
    name = inner.get("name") if isinstance(inner, Mapping) else None
    if not isinstance(name, str):
        raise _fail(
            f"tool_choice={choice!r} must be 'none', 'auto', 'required' or name a "
            f"function"
        )
    named = [function for function in functions if function.get("name") == name]
    if not named:
        raise _fail(f"tool_choice names {name!r}, which is none of the tools")
    return named[:1]


def _schema(function: Mapping[str, Any]) -> Tag:
    """The schema of a function's arguments, which are an object."""
    schema: Tag = dict(function.get("parameters") or {"properties": {}})
    schema.setdefault("type", "object")
    # Properties may also come from other keywords; then the object stays open.
    combined = {"allOf", "anyOf", "oneOf", "$ref", "patternProperties"}
    if not combined & schema.keys():
        schema.setdefault("additionalProperties", False)
    return schema


def _frame(parser: str) -> _Frame:
    found = tool_format(parser)
    if isinstance(found, SectionCalls):
        return _section_frame(found)
    if isinstance(found, Harmony):
        return _Frame(_harmony_head, "", separator=None)
    if isinstance(found, LlamaJson):
        return _Frame(_object(key="parameters"), "}", separator="; ")
    if isinstance(found, PythonicCalls):
        return _Frame(_object(), "}", "[", ", ", "]")
    opener, closer = "<tool_call>", "</tool_call>"
    if isinstance(found, (TaggedJson, XmlCalls)):
        opener, closer = found.opener, found.closer
    elif isinstance(found, MistralCalls):
        opener, closer = next(iter(found.openers)), None
    if closer is None:
        return _Frame(_object(), "}", opener + "[", ", ", "]")
    return _Frame(_object(opener + "\n"), "}\n" + closer, separator="\n")


def _harmony_head(name: str) -> str:
    to = f"<|channel|>commentary to=functions.{name} "
    return to + "<|constrain|>json<|message|>"


def _section_frame(found: SectionCalls) -> _Frame:
    def begin(name: str) -> str:
        if found.has_type:
            return f"{found.call}function{found.separator}{name}\n```json\n"
        head = f"functions.{name}:0" if found.has_id else name
        return f"{found.call}{head}{found.separator}"

    end = ("\n```" if found.has_type else "") + found.call_end
    return _Frame(
        begin, end, found.opener, "\n" if found.has_type else "", found.closer
    )


def _object(before: str = "", key: str = "arguments") -> Callable[[str], str]:
    """The text of a call object up to its arguments."""
    return lambda name: f'{before}{{"name": {json.dumps(name)}, "{key}": '


def _behind_analysis(form: Tag) -> Tag:
    """Lets the model of the harmony format think before its message."""
    analysis = {
        "type": "tag",
        "begin": "<|channel|>analysis<|message|>",
        "content": {"type": "any_text"},
        "end": "<|end|>",
    }
    start = _text("<|start|>assistant")
    thinks = {"type": "sequence", "elements": [analysis, start, form]}
    return {"type": "or", "elements": [form, thinks]}


def _text(value: str) -> Tag:
    return {"type": "const_string", "value": value} if value else {}


def _fail(message: str) -> InvalidRequestError:
    return InvalidRequestError(message, parameter="tool_choice")
