"""Copying Python literals from a growing text as JSON; nothing is evaluated."""

import re

from jllm.text.parsers.json_text import (
    Dialect,
    Emit,
    copy_value,
    escaped,
    json_scalar,
    read_hex,
)
from jllm.text.parsers.reader import Reader, Steps

_TEXT = re.compile(r"[^'\"\\]*")
_NUMBER = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
_WORDS = {"True": "true", "False": "false", "None": "null"}
_ESCAPES = dict(zip("abfnrtv0\\'\"\n", "\a\b\f\n\r\t\v\0\\'\"", strict=False))
_ESCAPES["\n"] = ""
_HEX_LENGTHS = {"x": 2, "u": 4, "U": 8}


def copy_literal(reader: Reader, emit: Emit) -> Steps[bool]:
    """Copies a Python literal as JSON; see `json_text.copy_json`."""
    return copy_value(reader, emit, _PYTHON)


def literal_json(text: str) -> str | None:
    """JSON of a Python literal; None where the text is none."""
    reader = Reader()
    reader.feed(text)
    reader.end()
    parts: list[str] = []
    steps = copy_literal(reader, parts.append)
    try:
        while True:
            next(steps)
    except StopIteration as end:
        is_whole = bool(end.value)
    return "".join(parts) if is_whole and not reader.num_held else None


def _copy_string(reader: Reader, emit: Emit) -> Steps[bool]:
    quote = reader.take(1)
    emit('"')
    while True:
        character = yield from reader.peek()
        if not character:
            return False
        if character == quote:
            emit('"')
            reader.take(1)
            return True
        if character == "\\":
            if not (yield from _copy_escape(reader, emit)):
                return False
        elif character in "'\"":
            emit(escaped(reader.take(1)))
        else:
            emit(escaped(reader.take_run(_TEXT)))


def _copy_escape(reader: Reader, emit: Emit) -> Steps[bool]:
    reader.take(1)
    character = yield from reader.peek()
    if not character:
        return False
    if character not in _HEX_LENGTHS:
        # As in Python, a backslash before any other character is one.
        emit(escaped(_ESCAPES.get(character, "\\")))
        if character in _ESCAPES:
            reader.take(1)
        return True
    reader.take(1)
    count = _HEX_LENGTHS[character]
    digits = yield from read_hex(reader, count)
    code = int(digits, 16) if len(digits) == count else -1
    if not 0 <= code <= 0x10FFFF:
        return False
    # Two escapes may be the halves of one character, as in JSON.
    emit(f"\\u{code:04x}" if code <= 0xFFFF else escaped(chr(code)))
    return True


def _scalar(word: str) -> str | None:
    text = _WORDS.get(word) or json_scalar(word)
    if text is None and _NUMBER.fullmatch(word):
        number = repr(float(word))
        return None if "inf" in number else number
    return text


_PYTHON = Dialect(
    {"{": "}", "[": "]", "(": ")"},
    "'\"",
    _copy_string,
    _scalar,
    allows_final_comma=True,
)
