"""Calls written as JSON objects: a name and arguments."""

import functools
import json

from jllm.text.parsers.formats import CopyCall, Task, attempt, attempt_list, is_name
from jllm.text.parsers.json_text import (
    SPACE,
    copy_json,
    is_object,
    read_json,
    read_string,
)
from jllm.text.parsers.reader import Steps

ARGUMENT_KEYS = ("arguments", "parameters")


def copy_calls(task: Task, opener: str, closer: str | None = None) -> Steps[None]:
    """Copies one call object or a list of them, which follow an opener.

    What is no call is given back as content.

    Args:
        task: What is parsed.
        opener: Has been read.
        closer: Stands behind the calls, unless the model forgets it.
    """
    before = opener + (yield from task.reader.run(SPACE))
    if bracket := (yield from task.reader.accept("[")):
        yield from attempt_list(task, copy_object, before + bracket)
    else:
        yield from attempt(task, copy_object, before)
    if closer and task.sink.after_call:
        yield from task.reader.skip(SPACE)
        yield from task.reader.accept(closer)


def copy_object(task: Task) -> Steps[bool]:
    """Copies `{"name": …, "arguments": {…}}`, whatever the order of its keys.

    Without arguments it is a call with none. One whose arguments are whole is a call
    even without the brace at its end.
    """
    return (yield from _CallObject(task).copy(needs_arguments=False))


def copy_full_object(task: Task) -> Steps[bool]:
    """Copies a call object that must have arguments, else it is no call."""
    return (yield from _CallObject(task).copy(needs_arguments=True))


def copy_arguments(task: Task, name: str, call_id: str | None = None) -> Steps[bool]:
    """Begins a call and copies its arguments, which come next.

    An object within a string and null for no arguments are accepted too.
    """
    character = yield from task.reader.skip(SPACE)
    if character == "{":
        task.sink.begin_call(name, call_id)
        return (yield from copy_json(task.reader, task.sink.arguments))
    text = _object_text((yield from read_json(task.reader)))
    if text is None:
        return False
    task.sink.begin_call(name, call_id)
    task.sink.arguments(text)
    return True


def named_call(name: str, call_id: str | None = None) -> CopyCall:
    """Reads the arguments of a call whose name is known."""
    return functools.partial(copy_arguments, name=name, call_id=call_id)


class _CallObject:
    """One object while it is read."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._reader = task.reader
        self._name: str | None = None
        # Arguments that came before the name.
        self._early: str | None = None
        self._has_arguments = False

    def copy(self, *, needs_arguments: bool) -> Steps[bool]:
        separator = "{"
        while (yield from self._reader.skip(SPACE)) == separator:
            self._reader.take(1)
            if (yield from self._reader.skip(SPACE)) == "}":
                break
            if not (yield from self._copy_pair()):
                return self._has_arguments
            separator = ","
        closed = yield from self._reader.accept("}")
        if self._has_arguments:
            return True
        if self._name is None or not closed:
            return False
        if self._early is None and needs_arguments:
            return False
        self._task.sink.begin_call(self._name)
        self._task.sink.arguments(self._early or "{}")
        return True

    def _copy_pair(self) -> Steps[bool]:
        key = yield from read_string(self._reader)
        if key is None or (yield from self._reader.skip(SPACE)) != ":":
            return False
        self._reader.take(1)
        yield from self._reader.skip(SPACE)
        if key == "name" and self._name is None:
            name = yield from read_string(self._reader)
            self._name = name if is_name(name) else None
            return self._name is not None
        is_new = not self._has_arguments and self._early is None
        if key not in ARGUMENT_KEYS or not is_new:
            return (yield from read_json(self._reader)) is not None
        if self._name is None:
            self._early = _object_text((yield from read_json(self._reader)))
            return self._early is not None
        self._has_arguments = yield from copy_arguments(self._task, self._name)
        return self._has_arguments


def _object_text(text: str | None) -> str | None:
    """JSON of arguments as JSON of an object; None if they are none."""
    if text is None or text.startswith("{"):
        return text
    if text == "null":
        return "{}"
    if not text.startswith('"'):
        return None
    inner = str(json.loads(text))
    return inner if is_object(inner) else None
