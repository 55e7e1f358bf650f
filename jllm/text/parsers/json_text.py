"""Copying JSON from a growing text, checked character by character.

Literals of Python are read by the same code and written as JSON.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping

from jllm.text.parsers.reader import Reader, Steps

SPACE = re.compile(r"[ \t\r\n]*")
_PLAIN = re.compile(r'[^"\\\x00-\x1f]*')
_CONTROL = re.compile(r"[\x00-\x1f]*")
_WORD = re.compile(r"[-+.0-9A-Za-z]*")
_SCALAR = re.compile(
    r"true|false|null|-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?"
)
_HEX_DIGITS = frozenset("0123456789abcdefABCDEF")

Emit = Callable[[str], object]


@dataclasses.dataclass(frozen=True, slots=True)
class Dialect:
    """How values are written.

    Attributes:
        brackets: Opening to closing bracket of a container.
        quotes: Characters that begin a string.
        copy_string: Copies a string as JSON; returns whether it is whole.
        scalar: JSON of a word that is no string, None where it is none.
        allows_final_comma: Whether a comma may stand before a closing bracket.
    """

    brackets: Mapping[str, str]
    quotes: str
    copy_string: Callable[[Reader, Emit], Steps[bool]]
    scalar: Callable[[str], str | None]
    allows_final_comma: bool = False


def copy_json(reader: Reader, emit: Emit) -> Steps[bool]:
    """Copies one JSON value, without the white space around its parts.

    Control characters within strings, which models write but JSON forbids, are escaped.

    Returns:
        Whether the value is whole; else the first character that cannot go on with it
        is the next one to read. What was copied up to there stays.
    """
    return copy_value(reader, emit, _JSON)


def copy_value(reader: Reader, emit: Emit, dialect: Dialect) -> Steps[bool]:
    """Copies one value of a dialect as JSON; see `copy_json`."""
    closers: list[str] = []
    while True:
        if not (yield from _copy_start(reader, emit, dialect, closers)):
            return False
        # A value has ended, or a container has begun.
        while closers:
            step = yield from _copy_between(reader, emit, dialect, closers)
            if step == "value":
                break
            if step == "bad":
                return False
        else:
            return True


def copy_string(reader: Reader, emit: Emit) -> Steps[bool]:
    """Copies a JSON string, as `copy_json` does a value."""
    if (yield from reader.peek()) != '"':
        return False
    emit(reader.take(1))
    while True:
        character = yield from reader.peek()
        if character == '"':
            emit(reader.take(1))
            return True
        if character == "\\":
            if not (yield from _copy_escape(reader, emit)):
                return False
        elif not character:
            return False
        elif character < " ":
            emit(escaped(reader.take_run(_CONTROL)))
        else:
            emit(reader.take_run(_PLAIN))


def read_string(reader: Reader) -> Steps[str | None]:
    """Reads a JSON string; None where there is none or it is malformed."""
    parts: list[str] = []
    if not (yield from copy_string(reader, parts.append)):
        return None
    return str(json.loads("".join(parts)))


def read_json(reader: Reader) -> Steps[str | None]:
    """Reads the text of one JSON value; None where it is malformed."""
    parts: list[str] = []
    if not (yield from copy_json(reader, parts.append)):
        return None
    return "".join(parts)


def read_hex(reader: Reader, count: int) -> Steps[str]:
    """Reads at most so many hexadecimal digits."""
    digits = ""
    while len(digits) < count and (yield from reader.peek()) in _HEX_DIGITS:
        digits += reader.take(1)
    return digits


def escaped(text: str) -> str:
    """The text as it stands within the quotes of a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def is_object(text: str) -> bool:
    """Whether the text is JSON of an object."""
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def json_scalar(word: str) -> str | None:
    """The word if it is a JSON number, true, false or null."""
    return word if _SCALAR.fullmatch(word) else None


def _copy_start(
    reader: Reader, emit: Emit, dialect: Dialect, closers: list[str]
) -> Steps[bool]:
    """Copies a scalar, or the bracket with which a container begins."""
    character = yield from reader.skip(SPACE)
    closer = dialect.brackets.get(character)
    if closer is not None:
        reader.take(1)
        emit("{" if closer == "}" else "[")
        # A mark that nothing stands in the container yet.
        closers += [closer, "first"]
        return True
    if character and character in dialect.quotes:
        return (yield from dialect.copy_string(reader, emit))
    text = dialect.scalar((yield from reader.run(_WORD)))
    emit(text or "")
    return text is not None


def _copy_between(
    reader: Reader, emit: Emit, dialect: Dialect, closers: list[str]
) -> Steps[str]:
    """Copies what stands between values: a closing bracket, or a comma and a key.

    Returns:
        "closed", "value" where one has to follow, or "bad".
    """
    may_close, separator = True, ""
    character = yield from reader.skip(SPACE)
    if closers[-1] == "first":
        closers.pop()
    elif character == ",":
        reader.take(1)
        may_close, separator = dialect.allows_final_comma, ", "
        character = yield from reader.skip(SPACE)
    elif character != closers[-1]:
        return "bad"
    closer = closers[-1]
    if character == closer and may_close:
        reader.take(1)
        closers.pop()
        emit("}" if closer == "}" else "]")
        return "closed"
    emit(separator)
    if closer != "}":
        return "value"
    if not character or character not in dialect.quotes:
        return "bad"
    is_key = yield from dialect.copy_string(reader, emit)
    if not is_key or (yield from reader.skip(SPACE)) != ":":
        return "bad"
    reader.take(1)
    emit(": ")
    return "value"


def _copy_escape(reader: Reader, emit: Emit) -> Steps[bool]:
    reader.take(1)
    character = yield from reader.peek()
    if character == "u":
        reader.take(1)
        digits = yield from read_hex(reader, 4)
        emit(f"\\u{digits}")
        return len(digits) == 4
    if not character or character not in '"\\/bfnrt':
        return False
    emit("\\" + reader.take(1))
    return True


_JSON = Dialect({"{": "}", "[": "]"}, '"', copy_string, json_scalar)
