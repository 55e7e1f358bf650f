"""Tool calls and reasoning, as clients see them."""

import json

import pytest

from tests.server.fakes import chat

CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
SHORT_CALL = '<tool_call>{"name":"add","arguments":{}}</tool_call>'
NO_TOOL = {"type": "function", "function": {"name": "nope"}}
OPTIONS = {
    "tool_call_parser": "hermes",
    "reasoning_parser": "qwen3",
    "enable_auto_tool_choice": True,
}


def request(**fields):
    return chat(tools=[TOOL], max_tokens=100) | fields


def test_a_call(serve):
    async def body(running):
        _, _, whole = await running.post(CHAT, request())
        choice = whole["choices"][0]
        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"]["content"] is None
        (call,) = choice["message"]["tool_calls"]
        assert call["id"].startswith("call_")
        assert call["function"]["name"] == "add"
        assert json.loads(call["function"]["arguments"]) == {"a": 1}
        chunks = await running.stream(CHAT, request())
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks[:-1]]
        head = deltas[0]
        assert (head["role"], head["content"]) == ("assistant", None)
        (first,) = head["tool_calls"]
        assert (first["index"], first["type"]) == (0, "function")
        assert first["function"]["name"] == "add"
        rest = [d["tool_calls"][0] for d in deltas[1:-1]]
        assert all(set(call) == {"index", "function"} for call in rest)
        arguments = first["function"]["arguments"] + "".join(
            call["function"]["arguments"] for call in rest
        )
        assert json.loads(arguments) == {"a": 1}
        assert chunks[-2]["choices"][0]["finish_reason"] == "tool_calls"

    serve(body, CALL, **OPTIONS)


def test_a_call_that_is_cut_off_is_content(serve):
    """Unless it is streamed: what was sent cannot be taken back."""

    async def body(running):
        _, _, whole = await running.post(CHAT, request(max_tokens=46))
        choice = whole["choices"][0]
        assert choice["finish_reason"] == "length"
        assert "tool_calls" not in choice["message"]
        assert choice["message"]["content"] == CALL[:46]
        chunks = await running.stream(CHAT, request(max_tokens=46))
        assert "tool_calls" in chunks[0]["choices"][0]["delta"]

    serve(body, CALL, **OPTIONS)


def test_parallel_calls(serve):
    async def body(running):
        _, _, whole = await running.post(CHAT, request(max_tokens=None))
        assert len(whole["choices"][0]["message"]["tool_calls"]) == 2
        _, _, whole = await running.post(
            CHAT, request(max_tokens=None, parallel_tool_calls=False)
        )
        assert len(whole["choices"][0]["message"]["tool_calls"]) == 1

    serve(body, 2 * SHORT_CALL, **OPTIONS)


def test_none_is_text(serve):
    async def body(running):
        _, _, whole = await running.post(CHAT, request(tool_choice="none"))
        message = whole["choices"][0]["message"]
        assert message["content"] == CALL
        assert "tool_calls" not in message

    serve(body, CALL, **OPTIONS)


def test_reasoning(serve):
    async def body(running):
        _, _, whole = await running.post(CHAT, chat(max_tokens=100))
        message = whole["choices"][0]["message"]
        assert message["reasoning"].strip() == "let me see"
        assert message["content"].strip() == "four"
        details = whole["usage"]["completion_tokens_details"]
        assert details["reasoning_tokens"] >= len("let me see")
        chunks = await running.stream(CHAT, chat(max_tokens=100))
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks[:-1]]
        reasoning = "".join(d.get("reasoning", "") for d in deltas)
        assert reasoning.strip() == "let me see"
        hidden = chat(max_tokens=100, include_reasoning=False)
        _, _, whole = await running.post(CHAT, hidden)
        assert "reasoning" not in whole["choices"][0]["message"]

    serve(body, "<think>let me see</think>four", **OPTIONS)


def test_responses(serve):
    async def body(running):
        tool = {"type": "function"} | TOOL["function"]
        ask = {"model": "fake", "input": "hi", "tools": [tool]}
        _, _, whole = await running.post(RESPONSES, ask)
        assert [item["type"] for item in whole["output"]] == [
            "reasoning",
            "function_call",
        ]
        call = whole["output"][1]
        assert (call["name"], json.loads(call["arguments"])) == ("add", {"a": 1})
        output = {"type": "function_call_output", "call_id": call["call_id"]}
        follow = ask | {
            "input": [output | {"output": "2"}],
            "previous_response_id": whole["id"],
        }
        status, _, answer = await running.post(RESPONSES, follow)
        assert status == 200, answer
        events = await running.stream(RESPONSES, ask)
        kinds = [event["type"] for event in events]
        assert "response.reasoning_text.delta" in kinds
        arguments = [
            event["delta"]
            for event in events
            if event["type"] == "response.function_call_arguments.delta"
        ]
        assert json.loads("".join(arguments)) == {"a": 1}

    serve(body, f"<think>so</think>{CALL}", **OPTIONS)


@pytest.mark.parametrize(
    ("options", "fields", "param"),
    [
        ({}, {}, "tools"),
        ({"tool_call_parser": "hermes"}, {}, "tool_choice"),
        (OPTIONS, {"tool_choice": NO_TOOL}, "tool_choice"),
    ],
)
def test_choices_that_cannot_be_met(serve, options, fields, param):
    async def body(running):
        status, _, answer = await running.post(CHAT, request(**fields))
        assert (status, answer["error"]["param"]) == (400, param)

    serve(body, CALL, **options)


def test_a_budget_of_reasoning_reaches_the_engine(serve):
    async def body(running):
        status, _, answer = await running.post(CHAT, chat(thinking_token_budget=5))
        assert status == 200, answer
        params = running.engine.added[-1].params
        assert params.thinking_token_budget == 5
        assert params.reasoning_parser == "qwen3"

    serve(body, **OPTIONS)


def test_a_budget_needs_a_parser(serve):
    async def body(running):
        status, _, answer = await running.post(CHAT, chat(thinking_token_budget=5))
        assert (status, answer["error"]["param"]) == (400, "thinking_token_budget")

    serve(body)


def test_a_required_call_constrains_the_output(serve):
    async def body(running):
        status, _, answer = await running.post(CHAT, request(tool_choice="required"))
        assert status == 200, answer
        params = running.engine.added[-1].params
        assert params.structured_outputs.kind == "structural_tag"
        form = {"type": "json_object"}
        status, _, answer = await running.post(
            CHAT, request(tool_choice="required", response_format=form)
        )
        assert (status, answer["error"]["param"]) == (400, "response_format")

    serve(body, CALL, **OPTIONS)
