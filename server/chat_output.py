"""Outputs of /v1/chat/completions, whole and in chunks."""

import dataclasses
from typing import Any

from jllm import (
    CompletionOutput,
    ContentDelta,
    Logprob,
    OutputParser,
    ReasoningDelta,
    ToolCallDelta,
)
from server.answer import to_json
from server.logprobs import TokenNames, chat_logprobs

OutputDelta = ReasoningDelta | ContentDelta | ToolCallDelta


@dataclasses.dataclass(frozen=True, slots=True)
class ChatOptions:
    """What the answer has to hold.

    Attributes:
        names: How tokens are written.
        num_top: Alternatives per token; None for no scores at all.
        wants_token_ids: Token ids beside the text.
        include_reasoning: Gives reasoning where the model's is known.
        parallel_tool_calls: Gives all calls, else the first.
        is_named_tool: Whether the request named the function to call.
        prefix: Text put in front of the content.
    """

    names: TokenNames
    num_top: int | None = None
    wants_token_ids: bool = False
    include_reasoning: bool = True
    parallel_tool_calls: bool = True
    is_named_tool: bool = False
    prefix: str = ""


class AnswerText:
    """Splits the text of one output into reasoning, content and tool calls."""

    def __init__(self, parser: OutputParser | None, options: ChatOptions) -> None:
        """Takes over a parser; without one all text is content."""
        self._parser = parser
        self._options = options
        self.reasoning: list[str] = []
        self.content: list[str] = []
        self.calls: list[dict[str, Any]] = []

    def push(self, text: str, *, is_last: bool) -> list[OutputDelta]:
        """Takes more text; gives what is to be shown of it."""
        deltas: list[OutputDelta] = []
        if self._parser is None:
            deltas += [ContentDelta(text)] if text else []
        else:
            deltas += self._parser.push(text) if text else ()
            deltas += self._parser.finish() if is_last else ()
        return [delta for delta in deltas if self._note(delta)]

    def _note(self, delta: OutputDelta) -> bool:
        """Collects; tells whether it is to be shown."""
        match delta:
            case ReasoningDelta():
                self.reasoning.append(delta.text)
                return self._options.include_reasoning
            case ContentDelta():
                self.content.append(delta.text)
            case ToolCallDelta():
                if delta.index and not self._options.parallel_tool_calls:
                    return False
                if delta.index == len(self.calls):
                    self.calls.append(
                        {"id": delta.id, "name": delta.name, "arguments": ""}
                    )
                self.calls[delta.index]["arguments"] += delta.arguments
        return True

    def finish_reason(self, completion: CompletionOutput) -> str | None:
        """Why the output ended; calls that the model chose to make are a reason."""
        reason = completion.finish_reason
        if reason == "stop" and self.calls and not self._options.is_named_tool:
            return "tool_calls"
        return reason


class ChatChoice:
    """One answer: collects pieces, gives choices."""

    def __init__(
        self, index: int, parser: OutputParser | None, options: ChatOptions
    ) -> None:
        """Begins empty."""
        self._index = index
        self._options = options
        self._answer = AnswerText(parser, options)
        self._has_begun = False
        self._entries: list[dict[int, Logprob]] = []
        self._tokens: list[int] = []

    @property
    def reasoning(self) -> str:
        """The reasoning so far."""
        return "".join(self._answer.reasoning)

    def whole(self, completion: CompletionOutput) -> dict[str, Any]:
        """The choice of a finished output."""
        self._answer.push(completion.text, is_last=True)
        content = self._options.prefix + "".join(self._answer.content)
        calls = self._answer.calls
        message: dict[str, Any] = {
            "role": "assistant",
            "content": None if calls and not content.strip() else content,
            "refusal": None,
        }
        if self.reasoning and self._options.include_reasoning:
            message["reasoning"] = self.reasoning
        if calls:
            message["tool_calls"] = [_call(call) for call in calls]
        self._collect(completion)
        choice: dict[str, Any] = {
            "index": self._index,
            "message": message,
            "logprobs": self._take_logprobs(),
            "finish_reason": self._answer.finish_reason(completion),
        }
        _add_stop_reason(choice, completion)
        if self._options.wants_token_ids:
            choice["token_ids"] = self._tokens
        return choice

    def chunks(self, completion: CompletionOutput) -> list[str]:
        """JSON of the choices that news make: role, deltas, then the end."""
        is_last = completion.finish_reason is not None
        deltas = self._answer.push(completion.text, is_last=is_last)
        self._collect(completion)
        found: list[str] = []
        if not self._has_begun and (deltas or is_last):
            found.append(to_json(self._first(deltas)))
        found += [self._delta_choice(delta) for delta in deltas]
        # Tokens without text of their own still have scores.
        if is_last and (self._entries or self._tokens):
            found.append(to_json(self._choice({"content": ""})))
        if is_last:
            end = self._choice({}, has_scores=False)
            end["finish_reason"] = self._answer.finish_reason(completion)
            _add_stop_reason(end, completion)
            found.append(to_json(end))
        return found

    def _delta_choice(self, delta: OutputDelta) -> str:
        has_more = self._options.num_top is not None or self._options.wants_token_ids
        if has_more or not isinstance(delta, ContentDelta):
            return to_json(self._choice(_delta(delta)))
        # Most chunks of most streams; what is made of a dictionary is the same.
        return (
            f'{{"index":{self._index},"delta":{{"content":{to_json(delta.text)}}},'
            '"logprobs":null,"finish_reason":null}'
        )

    def _first(self, deltas: list[OutputDelta]) -> dict[str, Any]:
        """The chunk with the role; a tool call that comes first is in it."""
        self._has_begun = True
        head: dict[str, Any] = {"role": "assistant", "content": "", "refusal": None}
        if deltas and isinstance(deltas[0], ToolCallDelta):
            head = {"role": "assistant", "content": None, **_delta(deltas.pop(0))}
            return self._choice(head)
        if self._options.prefix:
            head["content"] = self._options.prefix
        choice = self._choice(head, has_scores=False)
        if self._options.num_top is not None:
            choice["logprobs"] = {"content": [], "refusal": None}
        return choice

    def _choice(
        self, delta: dict[str, Any], *, has_scores: bool = True
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": self._index,
            "delta": delta,
            "logprobs": self._take_logprobs() if has_scores else None,
            "finish_reason": None,
        }
        if has_scores and self._options.wants_token_ids:
            choice["token_ids"], self._tokens = self._tokens, []
        return choice

    def _collect(self, completion: CompletionOutput) -> None:
        if self._options.num_top is not None:
            self._entries += completion.logprobs or []
        if self._options.wants_token_ids:
            self._tokens += completion.token_ids

    def _take_logprobs(self) -> dict[str, Any] | None:
        num_top = self._options.num_top
        if num_top is None:
            return None
        entries, self._entries = self._entries, []
        content = chat_logprobs(entries, self._options.names, num_top)
        return {"content": content, "refusal": None}


def _add_stop_reason(choice: dict[str, Any], completion: CompletionOutput) -> None:
    """The stop string or token, which is no field of OpenAI's."""
    if completion.stop_reason is not None:
        choice["stop_reason"] = completion.stop_reason


def _call(call: dict[str, Any]) -> dict[str, Any]:
    function = {"name": call["name"], "arguments": call["arguments"]}
    return {"id": call["id"], "type": "function", "function": function}


def _delta(delta: OutputDelta) -> dict[str, Any]:
    match delta:
        case ReasoningDelta():
            return {"reasoning": delta.text}
        case ContentDelta():
            return {"content": delta.text}
        case ToolCallDelta():
            call: dict[str, Any] = {"index": delta.index}
            if delta.id is not None:
                function = {"name": delta.name, "arguments": delta.arguments}
                call |= {"id": delta.id, "type": "function", "function": function}
            else:
                call["function"] = {"arguments": delta.arguments}
            return {"tool_calls": [call]}
