"""Messages of a conversation: checked by hand, so that errors name the very field."""

import json
from typing import Any, NoReturn

from pydantic_core import PydanticCustomError

TEXT_PARTS = ("text", "input_text", "output_text", "refusal")
ROLES = ("system", "developer", "user", "assistant", "tool", "function")

TEXT = {"type": "string"}
PART_SCHEMA = {
    "anyOf": [
        TEXT,
        {
            "type": "object",
            "required": ["text"],
            "properties": {"type": {"enum": list(TEXT_PARTS[:-1])}, "text": TEXT},
        },
        {
            "type": "object",
            "required": ["type", "refusal"],
            "properties": {"type": {"const": "refusal"}, "refusal": TEXT},
        },
    ]
}
MESSAGES_SCHEMA = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "required": ["role"],
        "properties": {
            "role": {"type": "string", "enum": list(ROLES)},
            "content": {
                "anyOf": [
                    TEXT,
                    {"type": "array", "minItems": 1, "items": PART_SCHEMA},
                    {"type": "null"},
                ]
            },
            "name": TEXT,
            "tool_call_id": TEXT,
            "tool_calls": {"type": "array", "items": {"type": "object"}},
        },
    },
}


class FieldError(Exception):
    """A wrong field inside a value that pydantic sees as one.

    Attributes:
        path: Where it is, below the value.
        code: Word for programs.
    """

    def __init__(self, path: str, message: str, code: str = "invalid_value") -> None:
        """Stores where, what and a word for it."""
        super().__init__(message)
        self.path = path
        self.code = code


def read_messages(value: Any) -> list[dict[str, Any]]:
    """Checks a conversation and brings it to the form that chat templates expect.

    The role developer is system's newer name. Arguments of tool calls become objects.
    """
    if not isinstance(value, list):
        raise PydanticCustomError("list_type", "must be a list of messages")
    if not value:
        raise PydanticCustomError("empty_array", "must not be empty")
    try:
        return [_read_message(i, message) for i, message in enumerate(value)]
    except FieldError as error:
        raise PydanticCustomError(
            "field",
            "{text}",
            {"text": str(error), "path": error.path, "word": error.code},
        ) from error


def _fail(path: str, message: str, code: str = "invalid_value") -> NoReturn:
    raise FieldError(path, message, code)


def _read_message(index: int, value: Any) -> dict[str, Any]:
    where = str(index)
    if not isinstance(value, dict):
        _fail(where, "must be an object", "invalid_type")
    role = value.get("role")
    if role not in ROLES:
        _fail(f"{where}.role", f"must be one of {', '.join(ROLES)}")
    message = {key: item for key, item in value.items() if item is not None}
    message["role"] = "system" if role == "developer" else role
    if role == "tool" and not isinstance(value.get("tool_call_id"), str):
        _fail(
            f"{where}.tool_call_id",
            "must be the id of the call that the message answers",
            "missing_required_parameter",
        )
    if "tool_calls" in message:
        message["tool_calls"] = _read_tool_calls(where, message["tool_calls"])
    content = value.get("content")
    if content is None and role == "assistant" and _has_other_content(message):
        message["content"] = None
    else:
        message["content"] = read_content(f"{where}.content", content)
    _check_text(f"{where}.name", message.get("name", ""))
    return message


def _has_other_content(message: dict[str, Any]) -> bool:
    fields = ("tool_calls", "reasoning", "reasoning_content", "refusal")
    return any(message.get(field) for field in fields)


def read_content(path: str, value: Any) -> str | list[dict[str, str]]:
    """Checks the content of a message; text parts stay apart for the template.

    Raises:
        FieldError: It is no text.
    """
    if isinstance(value, str):
        return _check_text(path, value)
    if not isinstance(value, list):
        _fail(path, "must be a string or a list of text parts", "invalid_type")
    if not value:
        _fail(path, "must not be empty", "empty_array")
    return [_read_part(f"{path}.{i}", part) for i, part in enumerate(value)]


def _read_part(path: str, part: Any) -> dict[str, str]:
    if isinstance(part, str):
        return {"type": "text", "text": _check_text(path, part)}
    if not isinstance(part, dict):
        _fail(path, "must be a text part", "invalid_type")
    kind = part.get("type", "text")
    if kind not in TEXT_PARTS:
        name = repr(kind)[:40]
        _fail(path, f"has type {name}: only text is supported", "unsupported_content")
    text = part.get("refusal" if kind == "refusal" else "text")
    if not isinstance(text, str):
        _fail(f"{path}.text", "must be a string", "invalid_type")
    return {"type": "text", "text": _check_text(f"{path}.text", text)}


def _check_text(path: str, text: Any) -> str:
    if not isinstance(text, str):
        _fail(path, "must be a string", "invalid_type")
    try:
        text.encode()
    except UnicodeEncodeError:
        _fail(path, "is no valid Unicode: it holds half a surrogate pair")
    return text


def _read_tool_calls(where: str, calls: Any) -> list[dict[str, Any]]:
    path = f"{where}.tool_calls"
    if not isinstance(calls, list):
        _fail(path, "must be a list", "invalid_type")
    return [_read_tool_call(f"{path}.{i}", call) for i, call in enumerate(calls)]


def _read_tool_call(path: str, call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        _fail(path, "must hold a function with a name", "invalid_type")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            _fail(f"{path}.function.arguments", "must be JSON")
    if not isinstance(arguments, dict | None):
        _fail(f"{path}.function.arguments", "must be a JSON object")
    return {**call, "function": {**function, "arguments": arguments or {}}}
