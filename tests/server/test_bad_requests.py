"""Wrong requests: each gets its status and error body, and harms nothing."""

import json
import math

import pytest

from jllm.engine.engine import ModelInfo
from tests.engines import LLAMA, make_engine
from tests.fakes import FakeEngine, save_tokenizer
from tests.server.fakes import MODEL, chat, completion

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
VOCABULARY = 260
CONTEXT = 128
USER = {"role": "user", "content": "hi"}


def message(content):
    return {"messages": [{"role": "user", "content": content}]}


# Fields that replace those of a good chat request, then status, param and code.
CHAT_ROWS = [
    ({"messages": "x"}, "messages", "invalid_type"),
    ({"messages": {}}, "messages", "invalid_type"),
    ({"messages": None}, "messages", "invalid_type"),
    ({"messages": []}, "messages", "empty_array"),
    ({"messages": [123]}, "messages.0", "invalid_type"),
    ({"messages": [{}]}, "messages.0.role", "invalid_value"),
    ({"messages": [None]}, "messages.0", "invalid_type"),
    (message("\ud800"), "messages.0.content", "invalid_value"),
    (message(123), "messages.0.content", "invalid_type"),
    (message({}), "messages.0.content", "invalid_type"),
    (message(None), "messages.0.content", "invalid_type"),
    (message([]), "messages.0.content", "empty_array"),
    (
        message([{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]),
        "messages.0.content.0",
        "unsupported_content",
    ),
    (
        message([{"type": "input_audio", "input_audio": {}}]),
        "messages.0.content.0",
        "unsupported_content",
    ),
    (
        {"messages": [USER, {"role": "tool", "content": "4"}]},
        "messages.1.tool_call_id",
        "missing_required_parameter",
    ),
    (message("x" * 200), "messages", "context_length_exceeded"),
    ({"max_tokens": 0}, "max_tokens", "integer_below_min_value"),
    ({"max_tokens": -1}, "max_tokens", "integer_below_min_value"),
    ({"max_tokens": 1.5}, "max_tokens", "invalid_type"),
    ({"max_tokens": "4"}, "max_tokens", "invalid_type"),
    ({"max_tokens": True}, "max_tokens", "invalid_type"),
    ({"max_tokens": []}, "max_tokens", "invalid_type"),
    ({"max_tokens": 2**63}, "max_tokens", "integer_above_max_value"),
    ({"max_tokens": 10**30}, "max_tokens", "integer_above_max_value"),
    ({"temperature": -0.1}, "temperature", "decimal_below_min_value"),
    ({"temperature": 2.1}, "temperature", "decimal_above_max_value"),
    ({"temperature": float("nan")}, "temperature", None),
    ({"temperature": float("inf")}, "temperature", None),
    ({"top_p": -1}, "top_p", "decimal_below_min_value"),
    ({"top_p": 1.1}, "top_p", "decimal_above_max_value"),
    ({"top_k": -2}, "top_k", "integer_below_min_value"),
    ({"top_k": 1.5}, "top_k", "invalid_type"),
    ({"frequency_penalty": 2.5}, "frequency_penalty", "decimal_above_max_value"),
    ({"presence_penalty": -3}, "presence_penalty", "decimal_below_min_value"),
    ({"n": 0}, "n", "integer_below_min_value"),
    ({"n": -1}, "n", "integer_below_min_value"),
    ({"n": 129}, "n", "integer_above_max_value"),
    ({"n": 10**6}, "n", "integer_above_max_value"),
    ({"n": 1.0}, "n", "invalid_type"),
    ({"top_logprobs": 5}, "top_logprobs", "invalid_value"),
    ({"logprobs": 5}, "logprobs", "invalid_type"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
    ({"logit_bias": {"abc": 1}}, "logit_bias", "invalid_value"),
    ({"logit_bias": {"-1": 1}}, "logit_bias", "invalid_value"),
    ({"logit_bias": {"999999": 1}}, "logit_bias", "invalid_value"),
    ({"logit_bias": {"5": 101}}, "logit_bias", "invalid_value"),
    ({"logit_bias": {"5": "x"}}, "logit_bias", "invalid_value"),
    ({"logit_bias": {"5": float("nan")}}, "logit_bias", "invalid_value"),
    ({"logit_bias": []}, "logit_bias", "invalid_type"),
    ({"logit_bias": dict.fromkeys(map(str, range(2000)), 1)}, "logit_bias", None),
    ({"stop": ""}, "stop", "invalid_type"),
    ({"stop": [""]}, "stop", "invalid_type"),
    ({"stop": [1]}, "stop", "invalid_type"),
    ({"stop": {}}, "stop", "invalid_type"),
    ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "array_above_max_length"),
    ({"stop": "x" * 10**6}, "stop", "string_above_max_length"),
    ({"seed": "x"}, "seed", "invalid_type"),
    ({"seed": 1.5}, "seed", "invalid_type"),
    ({"seed": 2**64}, "seed", "integer_above_max_value"),
    ({"stream": "true"}, "stream", "invalid_type"),
    ({"stream": 1}, "stream", "invalid_type"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
    ({"stream": True, "stream_options": "x"}, "stream_options", "invalid_type"),
    (
        {"stream": True, "stream_options": {"include_usage": "yes"}},
        "stream_options.include_usage",
        "invalid_type",
    ),
    ({"response_format": {"type": "xml"}}, "response_format.type", "invalid_value"),
    ({"response_format": "json"}, "response_format", "invalid_type"),
    ({"response_format": {}}, "response_format.type", "invalid_value"),
    (
        {"response_format": {"type": "json_schema"}},
        "response_format.json_schema",
        "missing_required_parameter",
    ),
    (
        {"response_format": {"type": "json_object"}, "guided_regex": "a"},
        "structured_outputs",
        "invalid_value",
    ),
    ({"tools": [{}] * 129}, "tools", None),
    ({"tools": [{"type": "function"}]}, "tools.0.function", None),
    ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
    ({"tool_choice": "sometimes"}, "tool_choice", "invalid_value"),
    ({"parallel_tool_calls": "x"}, "parallel_tool_calls", "invalid_type"),
    (
        {"chat_template_kwargs": {"tokenize": True}},
        "chat_template_kwargs",
        "invalid_value",
    ),
    ({"chat_template_kwargs": "x"}, "chat_template_kwargs", "invalid_type"),
    (
        {"chat_template_kwargs": {"a": "x" * 10**6}},
        "chat_template_kwargs",
        "string_above_max_length",
    ),
    ({"chat_template": "{{ 1 }}"}, "chat_template", "unsupported_parameter"),
    ({"user": 123}, "user", "invalid_type"),
    ({"user": "x" * 10**6}, "user", "string_above_max_length"),
    ({"functions": [{"name": "f"}]}, "functions", "unsupported_parameter"),
    ({"modalities": ["audio"]}, "modalities", "unsupported_parameter"),
    ({"audio": {}}, "audio", "unsupported_parameter"),
    ({"web_search_options": {}}, "web_search_options", "unsupported_parameter"),
    ({"use_beam_search": True}, "use_beam_search", "unsupported_parameter"),
    ({"length_penalty": 2.0}, "length_penalty", "unsupported_parameter"),
    ({"cache_salt": ""}, "cache_salt", "empty_string"),
    ({"cache_salt": 123}, "cache_salt", "invalid_type"),
    (
        {"continue_final_message": True, "add_generation_prompt": True},
        "continue_final_message",
        "invalid_value",
    ),
    ({"stop_token_ids": [VOCABULARY]}, "stop_token_ids", "invalid_value"),
    ({"allowed_token_ids": []}, "allowed_token_ids", "empty_array"),
    ({"model": None}, "model", "missing_required_parameter"),
    ({"model": 1}, "model", "invalid_type"),
    ({"model": "x" * 10**6}, "model", "string_above_max_length"),
]
COMPLETION_ROWS = [
    ({"prompt": []}, "prompt", "empty_array"),
    ({"prompt": [[]]}, "prompt", "empty_array"),
    ({"prompt": [[1], []]}, "prompt", "empty_array"),
    ({"prompt": [-1]}, "prompt", "invalid_value"),
    ({"prompt": [VOCABULARY]}, "prompt", "invalid_value"),
    ({"prompt": [VOCABULARY], "echo": True}, "prompt", "invalid_value"),
    ({"prompt": [1.5]}, "prompt", "invalid_value"),
    ({"prompt": [True]}, "prompt", "invalid_value"),
    ({"prompt": [None]}, "prompt", "invalid_value"),
    ({"prompt": [2**40]}, "prompt", "invalid_value"),
    ({"prompt": ["a"] * 2049}, "prompt", "array_above_max_length"),
    ({"prompt": [1] * CONTEXT}, "prompt", "context_length_exceeded"),
    ({"prompt": {}}, "prompt", "invalid_type"),
    ({"echo": "x"}, "echo", "invalid_type"),
    ({"suffix": "x"}, "suffix", "unsupported_parameter"),
    ({"prompt_embeds": "x"}, "prompt_embeds", "unsupported_parameter"),
    ({"prompt_logprobs": -2}, "prompt_logprobs", "integer_below_min_value"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "invalid_value"),
    ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens", None),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "invalid_value"),
    ({"logprobs": 21}, "logprobs", "integer_above_max_value"),
    ({"best_of": 2, "n": 3}, "best_of", "invalid_value"),
    ({"best_of": 21}, "best_of", "integer_above_max_value"),
    ({"best_of": 2, "n": 2, "stream": True}, "best_of", "invalid_value"),
    ({"max_tokens": -1}, "max_tokens", "integer_below_min_value"),
    ({"min_tokens": 40}, "min_tokens", "invalid_value"),
]
BODIES = [
    (b"{bad", "invalid_json"),
    (b"", "invalid_json"),
    (b"[]", "invalid_json"),
    (b'{"model": "\xff"}', "invalid_json"),
    (b"\xef\xbb\xbf{}", "invalid_json"),
    (b"[" * 100_000, "invalid_json"),
]


async def check_unharmed(running):
    """A good request gets what it always gets, and nothing is left behind."""
    status, _, answer = await running.post(COMPLETIONS, completion())
    assert (status, answer["choices"][0]["text"]) == (200, "hello world")
    status, _, _ = await running.get("/health")
    assert status == 200
    await running.idle()
    admission = running.server.admission
    assert (admission.num_open, admission.num_queued) == (0, 0)
    assert admission.num_queued_tokens == 0


def check_error(answer, param, code):
    error = answer["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    assert len(error["message"]) < 1200
    for forbidden in ("Traceback", "0x", "site-packages", "/tmp"):
        assert forbidden not in error["message"]
    assert error["param"] == param, error
    if code is not None:
        assert error["code"] == code, error


@pytest.mark.parametrize(
    ("path", "make", "rows"),
    [(CHAT, chat, CHAT_ROWS), (COMPLETIONS, completion, COMPLETION_ROWS)],
    ids=["chat", "completions"],
)
def test_fields(serve, path, make, rows):
    async def body(running):
        for fields, param, code in rows:
            status, headers, answer = await running.post(path, make() | fields)
            assert status == 400, (fields, answer)
            assert headers["Content-Type"].startswith("application/json")
            assert headers["X-Request-Id"]
            check_error(answer, param, code)
            await check_unharmed(running)

    serve(body)


def test_bodies(serve):
    async def body(running):
        for raw, code in BODIES:
            status, _, answer = await running.post(CHAT, raw)
            assert status == 400, raw[:20]
            check_error(answer, None, code)
            await check_unharmed(running)
        huge = json.dumps(chat()).replace("32", "9" * 5000).encode()
        status, _, answer = await running.post(CHAT, huge)
        assert status == 400
        check_error(answer, "max_tokens", None)
        overflow = json.dumps(chat(temperature=5)).replace("5}", "1e999}").encode()
        status, _, answer = await running.post(CHAT, overflow)
        check_error(answer, "temperature", None)
        nested = json.dumps(chat(metadata={"a": float("nan")})).encode()
        status, _, answer = await running.post(CHAT, nested)
        check_error(answer, None, "invalid_json")

    serve(body)


def test_transport(serve):
    async def body(running):
        status, _, answer = await running.post(
            CHAT, chat(), headers={"Content-Encoding": "gzip"}
        )
        assert status == 415
        status, _, answer = await running.post(
            CHAT, chat(), headers={"Content-Type": "text/plain"}
        )
        assert status == 415
        status, headers, answer = await running.post(CHAT, b" " * 5000)
        assert (status, answer["error"]["code"]) == (413, "request_too_large")
        status, headers, answer = await running.get(CHAT)
        assert (status, headers["Allow"]) == (405, "POST")
        assert answer["error"]["code"] == "method_not_allowed"
        for path in (f"{CHAT}/", f"/{CHAT}", "/v1", "/nothing", "/v1/models/nope"):
            status, _, answer = await running.get(path)
            assert status == 404, path
            assert set(answer["error"]) == {"message", "type", "param", "code"}
        assert answer["error"]["code"] == "model_not_found"
        status, _, answer = await running.get("/v1/models?limit=x")
        assert status == 200
        await check_unharmed(running)

    serve(body, max_body_bytes=4096)


def test_unknown_model(serve):
    async def body(running):
        status, _, answer = await running.post(CHAT, chat(model="nope"))
        assert status == 404
        check_error(answer, "model", "model_not_found")

    serve(body)


def test_accepted_although_odd(serve):
    async def body(running):
        for fields in (
            {"n": None},
            {"temperature": 1e-300},
            {"top_p": 0},
            {"top_k": 0},
            {"top_k": -1},
            {"top_k": 10**9},
            {"stop": []},
            {"stop": None},
            {"seed": -1},
            {"seed": 2**63 - 1},
            {"tools": []},
            {"tool_choice": None},
            {"store": True, "metadata": {str(i): "x" for i in range(20)}},
            {"max_completion_tokens": 5, "max_tokens": 9},
            {"response_format": {"type": "text"}},
            {"unheard_of": 1},
        ):
            status, _, answer = await running.post(CHAT, chat() | fields)
            assert status == 200, (fields, answer)
        status, _, answer = await running.post(COMPLETIONS, completion(""))
        assert status == 200
        assert answer["usage"]["prompt_tokens"] == 1
        status, _, _ = await running.post(COMPLETIONS, completion(best_of=1))
        assert status == 200
        prompt = [1] * (CONTEXT - 1)
        status, _, _ = await running.post(COMPLETIONS, completion(prompt, max_tokens=1))
        assert status == 200

    serve(body)


def test_a_template_that_refuses_the_conversation(serve, tmp_path):
    async def body(running):
        talk = [USER, *[{"role": "assistant", "content": "a"}] * 2]
        status, _, answer = await running.post(CHAT, chat(messages=talk))
        assert status == 400
        check_error(answer, "messages", None)
        assert "roles must alternate" in answer["error"]["message"]
        assert "Traceback" not in answer["error"]["message"]
        await check_unharmed(running)

    engine = FakeEngine()
    template = (
        "{% if messages[-1].role == 'assistant' %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}x"
    )
    engine.info = ModelInfo(save_tokenizer(tmp_path, template), {})
    serve(body, engine=engine)


@pytest.mark.slow
def test_a_banned_vocabulary_leaves_finite_numbers(serve, monkeypatch, tmp_path):
    async def body(running):
        bans = (
            {"logit_bias": dict.fromkeys(map(str, range(LLAMA["vocab_size"])), -100)},
            {"logit_bias": {"7": -100}, "allowed_token_ids": [7]},
        )
        for fields in bans:
            for temperature in (0, 1):
                request = completion([1, 5, 9], max_tokens=4, logprobs=2)
                status, _, answer = await running.post(
                    COMPLETIONS, request | fields | {"temperature": temperature}
                )
                assert status == 200, answer
                (choice,) = answer["choices"]
                assert all(map(math.isfinite, choice["logprobs"]["token_logprobs"]))
        await running.idle()

    engine = make_engine()
    # The folder of the checkpoint is shared with other tests, and has no tokenizer.
    info = ModelInfo(save_tokenizer(tmp_path), {})
    monkeypatch.setattr(type(engine), "info", info)
    serve(body, engine=engine)


def test_strict_fields(serve):
    async def body(running):
        status, _, answer = await running.post(CHAT, chat(unheard_of=1))
        assert status == 400
        check_error(answer, "unheard_of", "unknown_parameter")
        status, _, answer = await running.post(
            CHAT, chat(stream=True, stream_options={"odd": 1})
        )
        check_error(answer, "stream_options.odd", "unknown_parameter")
        assert (await running.post(CHAT, chat()))[0] == 200
        assert (await running.post(CHAT, chat(length_penalty=1.0)))[0] == 200

    serve(body, strict_fields=True)


def test_default_model(serve):
    async def body(running):
        request = chat()
        del request["model"]
        status, _, answer = await running.post(CHAT, request)
        assert (status, answer["model"]) == (200, MODEL)

    serve(body, default_model=True)


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (CHAT, {"response_format": {"type": "json_schema"}}, "response_format"),
        (CHAT, {"guided_regex": "("}, "guided_regex"),
        (CHAT, {"structured_outputs": {"regex": "("}}, "structured_outputs"),
        (COMPLETIONS, {"guided_regex": "("}, "guided_regex"),
        ("/v1/responses", {"text": {"format": {"type": "json_schema"}}}, "text.format"),
    ],
)
def test_a_form_is_named_as_the_request_names_it(serve, path, fields, param):
    async def body(running):
        body = {**(completion() if path == COMPLETIONS else chat()), **fields}
        if path == "/v1/responses":
            body = {"model": MODEL, "input": "hi", **fields}
            body["text"]["format"] |= {"name": "a", "schema": {"enum": []}}
        if "response_format" in fields:
            body["response_format"] |= {"json_schema": {"schema": {"enum": []}}}
        status, _, answer = await running.post(path, body)
        assert (status, answer["error"]["param"]) == (400, param)
        await check_unharmed(running)

    serve(body)
