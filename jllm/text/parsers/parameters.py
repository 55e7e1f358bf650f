"""Arguments that are written as text, parameter by parameter, made JSON by schema."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from jllm.text.parsers.json_text import escaped
from jllm.text.parsers.python_text import literal_json
from jllm.text.parsers.reader import Reader, Steps

Emit = Callable[[str], object]
_STRING = frozenset({"string"})
_WORDS = {"True": "true", "False": "false", "None": "null"}


class ObjectWriter:
    """Writes the JSON text of an object, key by key."""

    def __init__(self, emit: Emit) -> None:
        """Begins with nothing written."""
        self.emit = emit
        self._num_keys = 0

    def key(self, name: str) -> None:
        """Writes a key; its value has to follow."""
        self.emit(f"{', ' if self._num_keys else '{'}{_quoted(name)}: ")
        self._num_keys += 1

    def end(self) -> None:
        """Writes the end of the object."""
        self.emit("}" if self._num_keys else "{}")


def types_of(schema: Mapping[str, Any], name: str) -> frozenset[str]:
    """JSON types that a function's parameter may have; empty where none is told.

    Args:
        schema: The function's parameters as a JSON schema.
        name: Of the parameter.
    """
    properties = schema.get("properties")
    own = properties.get(name) if isinstance(properties, Mapping) else None
    return _types(own, depth=4)


def copy_text_value(
    reader: Reader, emit: Emit, types: frozenset[str], ends: frozenset[str]
) -> Steps[str]:
    """Copies a value up to the marker behind it, as JSON.

    A string streams; a newline at each of its ends belongs to the format. Any other
    value is held until it is whole.

    Returns:
        The marker, empty if the text ended before it; then the value is not whole.
    """
    if types == _STRING:
        return (yield from _copy_text(reader, emit, ends))
    parts: list[str] = []
    while True:
        text, marker = yield from reader.piece(ends)
        parts.append(text)
        if marker:
            emit(value_json("".join(parts), types))
        if marker or not text:
            return marker


def value_json(text: str, types: frozenset[str]) -> str:
    """A value that was written as text, as JSON of one of the types.

    What is no JSON is a string, and so is what is JSON of another type where the
    parameter may be a string.
    """
    plain = text.strip()
    word = _WORDS.get(plain, plain)
    kind = _json_type(word)
    if kind is None and types & {"array", "object"}:
        # Models write lists and dictionaries as Python does, too.
        word = literal_json(plain) or word
        kind = _json_type(word)
    if kind is None or (kind not in types and types and "string" in types):
        return _quoted(_without_newlines(text))
    if kind == "string" and "string" in types:
        return _quoted(_without_newlines(text))
    return word


def _copy_text(reader: Reader, emit: Emit, ends: frozenset[str]) -> Steps[str]:
    emit('"')
    yield from reader.accept("\n")
    newline = ""
    while True:
        text, marker = yield from reader.piece(ends)
        if marker or not text:
            emit(escaped((newline + text).removesuffix("\n")) + ('"' if marker else ""))
            return marker
        text = newline + text
        newline = "\n" if text.endswith("\n") else ""
        emit(escaped(text.removesuffix("\n")))


def _quoted(text: str) -> str:
    return f'"{escaped(text)}"'


def _without_newlines(text: str) -> str:
    return text.removeprefix("\n").removesuffix("\n")


def _json_type(text: str) -> str | None:
    try:
        value = json.loads(text, parse_constant=_refuse)
    # Deep nesting and numbers of thousands of digits are refused too.
    except (ValueError, RecursionError):
        return None
    if isinstance(value, bool):
        return "boolean"
    if value is None:
        return "null"
    names = {int: "integer", float: "number", str: "string", list: "array"}
    return names.get(type(value), "object")


def _refuse(word: str) -> None:
    raise ValueError(word)


def _types(schema: Any, depth: int) -> frozenset[str]:
    if not isinstance(schema, Mapping) or depth == 0:
        return frozenset()
    found: set[str] = set()
    own = schema.get("type")
    for name in (own,) if isinstance(own, str) else _sequence(own):
        found.add(str(name))
    for value in _sequence(schema.get("enum")):
        found.add(_json_type(json.dumps(value)) or "object")
    for key in ("anyOf", "oneOf"):
        for option in _sequence(schema.get(key)):
            found |= _types(option, depth - 1)
    if "number" in found:
        found.add("integer")
    return frozenset(found)


def _sequence(value: Any) -> Sequence[Any]:
    return cast(Sequence[Any], value) if isinstance(value, (list, tuple)) else ()
