"""Collecting deltas: white space at the seams, numbers and ids of calls."""

from collections.abc import Callable

from jllm.text.parsers.deltas import (
    ContentDelta,
    Delta,
    ReasoningDelta,
    ToolCallDelta,
)


class Sink:
    """Takes what a format finds and makes deltas of it.

    White space between content and a call or reasoning belongs to the format and is
    dropped. Where calls are not streamed, a call is given when it is whole, and a
    malformed one is given back as content.
    """

    def __init__(self, make_id: Callable[[], str], *, streams_calls: bool) -> None:
        """Begins empty; `make_id` names each call that brings no id."""
        self._make_id = make_id
        self._streams_calls = streams_calls
        self._deltas: list[Delta] = []
        self._call: list[ToolCallDelta] | None = None
        self._num_calls = 0
        # White space that is content only if more content follows.
        self._space: list[str] = []
        self._at_seam = False
        self._kind: type[ReasoningDelta | ContentDelta] = ContentDelta

    @property
    def after_call(self) -> bool:
        """Whether nothing but white space has come since a whole call."""
        return self._at_seam and self._num_calls > 0

    def take(self) -> tuple[Delta, ...]:
        """Gives the deltas since the last call, neighbours of a kind joined."""
        deltas, self._deltas = self._deltas, []
        return tuple(_joined(deltas))

    def reasoning(self, text: str) -> None:
        """Takes reasoning."""
        self._add_text(text, ReasoningDelta)

    def content(self, text: str) -> None:
        """Takes content."""
        self._add_text(text, ContentDelta)

    def seam(self) -> None:
        """Drops white space on both sides of this place."""
        self._space.clear()
        self._at_seam = True

    def finish(self) -> None:
        """Ends the text; the white space at its end is kept."""
        if text := "".join(self._space):
            self._deltas.append(self._kind(text))
        self._space.clear()

    def begin_call(self, name: str, call_id: str | None = None) -> None:
        """Takes the head of a call; its arguments follow."""
        self._call = []
        if self._streams_calls:
            self.seam()
        call_id = call_id or self._make_id()
        self._add(ToolCallDelta(self._num_calls, call_id, name, ""))

    def arguments(self, text: str) -> None:
        """Takes more of the JSON text of the call's arguments."""
        if text:
            self._add(ToolCallDelta(self._num_calls, None, None, text))

    def end_call(self) -> None:
        """Ends a call whose arguments are whole."""
        if not self._streams_calls:
            self._deltas += self._call or ()
        self._close_call()

    def fail(self, text: str) -> None:
        """Ends what turned out to be no call.

        Args:
            text: What was read of it, given back as content unless a part of it has
                already been streamed as a call.
        """
        if self._call is None or not self._streams_calls:
            self._call = None
            self.content(text)
        else:
            self._close_call()

    def _add(self, delta: ToolCallDelta) -> None:
        if self._streams_calls:
            self._deltas.append(delta)
        elif self._call is not None:
            self._call.append(delta)

    def _close_call(self) -> None:
        self._call = None
        self._num_calls += 1
        self.seam()

    def _add_text(self, text: str, kind: type[ReasoningDelta | ContentDelta]) -> None:
        if not text:
            return
        self._kind = kind
        if text := self._without_seams(text):
            self._deltas.append(kind(text))

    def _without_seams(self, text: str) -> str:
        if self._at_seam:
            text = text.lstrip()
        visible = text.rstrip()
        if not visible:
            if not self._at_seam:
                self._space.append(text)
            return ""
        before = "".join(self._space)
        self._space = [text[len(visible) :]]
        self._at_seam = False
        return before + visible


def _joined(deltas: list[Delta]) -> list[Delta]:
    """Joins neighbours of one kind; a call's head takes in the arguments behind it."""
    joined: list[Delta] = []
    for group in _groups(deltas):
        first = group[0]
        if len(group) == 1:
            joined.append(first)
        elif isinstance(first, ToolCallDelta):
            arguments = "".join(
                d.arguments for d in group if isinstance(d, ToolCallDelta)
            )
            joined.append(ToolCallDelta(first.index, first.id, first.name, arguments))
        else:
            texts = (d.text for d in group if not isinstance(d, ToolCallDelta))
            joined.append(type(first)("".join(texts)))
    return joined


def _groups(deltas: list[Delta]) -> list[list[Delta]]:
    groups: list[list[Delta]] = []
    for delta in deltas:
        if groups and _continues(groups[-1][-1], delta):
            groups[-1].append(delta)
        else:
            groups.append([delta])
    return groups


def _continues(last: Delta, delta: Delta) -> bool:
    if isinstance(delta, ToolCallDelta):
        return isinstance(last, ToolCallDelta) and delta.id is None
    return type(last) is type(delta)
