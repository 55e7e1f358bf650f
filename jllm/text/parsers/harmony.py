"""The messages of gpt-oss: channels for reasoning, answers and calls."""

import dataclasses
import re

from jllm.text.parsers.call_object import named_call
from jllm.text.parsers.deltas import ContentDelta, ReasoningDelta
from jllm.text.parsers.formats import Task, attempt, copy_content, is_name
from jllm.text.parsers.json_text import SPACE
from jllm.text.parsers.reader import Steps

_START, _CHANNEL, _CONSTRAIN, _MESSAGE = (
    "<|start|>",
    "<|channel|>",
    "<|constrain|>",
    "<|message|>",
)
_ENDS = frozenset({"<|end|>", "<|return|>", "<|call|>"})
_MARKERS = _ENDS | {_START, _CHANNEL, _CONSTRAIN, _MESSAGE}
_TO = "to="
_HEADS = frozenset({_START, _CHANNEL, _MESSAGE})
_BLANK = re.compile(r"\s*")
_WORDS = ("assistant", "analysis", "commentary", "final", "json", "code")
_MAX_HEAD = 1024
"""A longer head of a message is none."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Head:
    """What stands before the text of a message."""

    role: str = "assistant"
    channel: str = ""
    recipient: str = ""

    @property
    def is_call(self) -> bool:
        return self.role == "assistant" and self.recipient not in ("", "assistant")


@dataclasses.dataclass(frozen=True, slots=True)
class Harmony:
    """`<|channel|>analysis<|message|>…<|end|><|start|>assistant…`.

    The analysis channel is reasoning, a message to a function is a call, and all else
    is content. The text may lack the `<|start|>assistant` that ends the prompt.

    Attributes:
        has_calls: Whether calls are given as such, not as content.
    """

    has_calls: bool = True

    @property
    def openers(self) -> frozenset[str]:
        """None: calls are messages like others."""
        return frozenset()

    @property
    def markers(self) -> frozenset[str]:
        """All markers."""
        return _MARKERS

    @property
    def call_openers(self) -> frozenset[str]:
        """Markers of calls that end reasoning, none."""
        return frozenset()

    @property
    def opener(self) -> str:
        """What stands before reasoning."""
        return f"{_CHANNEL}analysis{_MESSAGE}"

    @property
    def closer(self) -> str:
        """What stands behind reasoning."""
        return "<|end|>"

    def opened_by(self, prompt: str) -> bool | None:
        """Whether an output of this prompt begins within reasoning."""
        if prompt.endswith(self.opener):
            return True
        return False if prompt.endswith(_MESSAGE) else None

    def parse(self, task: Task, *, is_open: bool | None = None) -> Steps[None]:
        """Reads an output to its end; see `TaggedReasoning.parse` for `is_open`."""
        messages = _Messages(task, has_calls=self.has_calls)
        marker = ""
        if is_open is None:
            blank = yield from task.reader.run(_BLANK)
            marker = yield from task.reader.accept(*sorted(_HEADS), _TO)
            task.sink.content("" if marker else blank)
        else:
            head = _Head(channel="analysis" if is_open else "final")
            marker = yield from messages.copy_body(head)
        while True:
            if marker not in _HEADS and marker != _TO:
                marker = yield from copy_content(task, _MARKERS)
                if not marker:
                    return
                continue
            head, marker = yield from messages.read_head(marker)
            if head is not None:
                marker = yield from messages.copy_body(head)


class _Messages:
    """The messages of one output."""

    def __init__(self, task: Task, *, has_calls: bool) -> None:
        self._task = task
        self._has_calls = has_calls
        self._last: type[ContentDelta | ReasoningDelta] | None = None

    def read_head(self, first: str) -> Steps[tuple[_Head | None, str]]:
        """Reads the head of a message, whose first marker has been read.

        Returns:
            The head, or None and the marker behind what turned out to be none; that
            is given back as content, unless the output just ends within it.
        """
        reader = self._task.reader
        texts = {_START: first if first == _TO else "", _CHANNEL: ""}
        place, marker, length = _START, first, 0
        reader.record(first)
        while marker != _MESSAGE:
            place = marker if marker in texts else place
            text, marker = yield from reader.piece(_MARKERS)
            # What is constrained to be JSON is a word of its own.
            texts[place] += text + " " * (marker == _CONSTRAIN)
            length += len(text) + 1
            if length > _MAX_HEAD or marker in _ENDS or not (text or marker):
                break
        text = reader.recorded()
        if marker == _MESSAGE:
            return _head(texts), ""
        if marker or not _may_become_head(texts):
            self._task.sink.content(text.removesuffix(marker))
        return None, marker

    def copy_body(self, head: _Head) -> Steps[str]:
        """Copies the text of a message; returns the marker behind it."""
        task = self._task
        name = head.recipient.removeprefix("functions.")
        if self._has_calls and head.is_call and is_name(name):
            self._last = None
            if (yield from attempt(task, named_call(name))):
                yield from task.reader.skip(SPACE)
        is_reasoning = head.channel == "analysis" and not head.is_call
        kind = ReasoningDelta if is_reasoning else ContentDelta
        emit = task.sink.reasoning if is_reasoning else task.sink.content
        if self._last not in (None, kind):
            task.sink.seam()
        is_first = self._last is kind
        self._last = kind
        markers = _ENDS | {_START, _CHANNEL} | task.ignored
        while True:
            text, marker = yield from task.reader.piece(markers)
            if text and is_first:
                # Messages of one kind are told apart.
                emit("\n")
                is_first = False
            emit(text)
            if not (text or marker) or (marker and marker not in task.ignored):
                return marker


def _head(texts: dict[str, str]) -> _Head:
    head = _Head()
    words = texts[_START].split()
    if words and not words[0].startswith(_TO):
        head = dataclasses.replace(head, role=words[0])
    channel = texts[_CHANNEL].split()
    for word in words + channel:
        if word.startswith(_TO):
            head = dataclasses.replace(head, recipient=word.removeprefix(_TO))
    if channel and not channel[0].startswith(_TO):
        head = dataclasses.replace(head, channel=channel[0])
    return head


def _may_become_head(texts: dict[str, str]) -> bool:
    """Whether the words of a head that the output ended in are those of a head."""
    words = " ".join(texts.values()).split()
    return all(
        word.startswith(_TO) or any(known.startswith(word) for known in _WORDS)
        for word in words
    )
