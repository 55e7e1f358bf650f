"""Outputs of /v1/responses: items, and the events that tell how they grow."""

from collections.abc import Sequence
from typing import Any

from jllm import CompletionOutput, ContentDelta, OutputParser, ReasoningDelta
from server.chat_output import AnswerText, ChatOptions, OutputDelta
from server.logprobs import chat_logprobs
from server.sse import event
from server.state import new_id

PREFIXES = {"message": "msg_", "reasoning": "rs_", "function_call": "fc_"}


class ResponseWriter:
    """Builds one response; each step returns its events, framed for a stream.

    Items are written one after the other: reasoning, messages, calls.
    """

    def __init__(
        self, head: dict[str, Any], parser: OutputParser | None, options: ChatOptions
    ) -> None:
        """Takes over the response without its output."""
        self.response = head
        self._answer = AnswerText(parser, options)
        self._options = options
        self._sequence = 0
        self._item: dict[str, Any] | None = None
        self._call_index = -1
        self._logprobs: list[dict[str, Any]] = []

    @property
    def reasoning(self) -> str:
        """The reasoning so far."""
        return "".join(self._answer.reasoning)

    def error_event(self, error: dict[str, Any]) -> bytes:
        """The event of a failure under way."""
        return self._event("error", **error)

    def begin(self) -> list[bytes]:
        """Announces the response."""
        self.response["status"] = "in_progress"
        return [
            self._event("response.created", response=self.response),
            self._event("response.in_progress", response=self.response),
        ]

    def push(self, completion: CompletionOutput) -> list[bytes]:
        """Takes news of the output."""
        is_last = completion.finish_reason is not None
        deltas = self._answer.push(completion.text, is_last=is_last)
        if self._options.num_top is not None:
            self._logprobs += chat_logprobs(
                completion.logprobs or (), self._options.names, self._options.num_top
            )
        events: list[bytes] = []
        for delta in deltas:
            events += self._push_delta(delta)
        return events

    def finish(self, reason: str | None, usage: dict[str, Any]) -> list[bytes]:
        """Ends the output; a cut one is incomplete."""
        events = self._close_item()
        is_cut = reason == "length"
        if not self.response["output"]:
            events += self._open_item("message")
            events += self._close_item()
        if is_cut:
            self.response["output"][-1]["status"] = "incomplete"
        self.response |= {
            "status": "incomplete" if is_cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "usage": usage,
        }
        name = f"response.{self.response['status']}"
        return [*events, self._event(name, response=self.response)]

    def _push_delta(self, delta: OutputDelta) -> list[bytes]:
        if isinstance(delta, ReasoningDelta):
            events = self._need_item("reasoning")
            self._part["text"] += delta.text
            return [*events, self._text_event("reasoning_text.delta", delta=delta.text)]
        if isinstance(delta, ContentDelta):
            events = self._need_item("message")
            self._part["text"] += delta.text
            logprobs = self._take_logprobs()
            more = self._text_event(
                "output_text.delta", delta=delta.text, logprobs=logprobs
            )
            return [*events, more]
        events: list[bytes] = []
        if delta.index != self._call_index:
            self._call_index = delta.index
            events = self._close_item()
            events += self._open_item(
                "function_call", call_id=delta.id, name=delta.name, arguments=""
            )
        assert self._item is not None
        self._item["arguments"] += delta.arguments
        if delta.arguments:
            more = self._item_event(
                "function_call_arguments.delta", delta=delta.arguments
            )
            events.append(more)
        return events

    @property
    def _part(self) -> dict[str, Any]:
        assert self._item is not None
        return self._item["content"][0]

    def _take_logprobs(self) -> list[dict[str, Any]]:
        found, self._logprobs = self._logprobs, []
        if found:
            self._part["logprobs"] += found
        return found

    def _need_item(self, kind: str) -> list[bytes]:
        if self._item is not None and self._item["type"] == kind:
            return []
        return self._close_item() + self._open_item(kind)

    def _open_item(self, kind: str, **fields: Any) -> list[bytes]:
        item: dict[str, Any] = {
            "id": new_id(PREFIXES[kind]),
            "type": kind,
            "status": "in_progress",
            **fields,
        }
        if kind == "message":
            item |= {"role": "assistant", "content": []}
        if kind == "reasoning":
            item |= {"summary": [], "content": []}
        self._item = item
        self.response["output"].append(item)
        events = [self._event("response.output_item.added", item=item, **self._place)]
        if kind != "function_call":
            part: dict[str, Any] = {"type": "reasoning_text", "text": ""}
            if kind == "message":
                part = {
                    "type": "output_text",
                    "text": "",
                    "annotations": [],
                    "logprobs": [],
                }
            item["content"].append(part)
            events.append(self._text_event("content_part.added", part=part))
        return events

    def _close_item(self) -> list[bytes]:
        item = self._item
        if item is None:
            return []
        events: list[bytes] = []
        if item["type"] == "function_call":
            done = "function_call_arguments.done"
            events = [self._item_event(done, arguments=item["arguments"])]
        else:
            kind, more = "reasoning_text.done", {"text": self._part["text"]}
            if item["type"] == "message":
                self._take_logprobs()
                kind = "output_text.done"
                more |= {"logprobs": self._part["logprobs"]}
            events = [
                self._text_event(kind, **more),
                self._text_event("content_part.done", part=self._part),
            ]
        item["status"] = "completed"
        done = self._event("response.output_item.done", item=item, **self._place)
        self._item = None
        return [*events, done]

    @property
    def _place(self) -> dict[str, Any]:
        return {"output_index": len(self.response["output"]) - 1}

    def _item_event(self, name: str, **fields: Any) -> bytes:
        assert self._item is not None
        place = {"item_id": self._item["id"], **self._place}
        return self._event(f"response.{name}", **place, **fields)

    def _text_event(self, name: str, **fields: Any) -> bytes:
        return self._item_event(name, content_index=0, **fields)

    def _event(self, name: str, **fields: Any) -> bytes:
        number = self._sequence
        self._sequence += 1
        return event({"type": name, "sequence_number": number, **fields}, name)


def as_messages(output: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The output of a response as chat messages, for the turn that follows."""
    content = "".join(
        part["text"]
        for item in output
        if item["type"] == "message"
        for part in item["content"]
    )
    calls = [
        {
            "id": item["call_id"],
            "type": "function",
            "function": {"name": item["name"], "arguments": item["arguments"]},
        }
        for item in output
        if item["type"] == "function_call"
    ]
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if calls:
        message["tool_calls"] = calls
    return [message]
