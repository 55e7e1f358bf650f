"""Each field of each request changes what is done or answered, or is refused.

The oracle is the request without the field: the answer, what the engine was given, and
how its outputs were asked for must not all be the same.
"""

import dataclasses
import re

import pytest

from server.protocol.chat import ChatCompletionRequest
from server.protocol.completions import CompletionRequest
from server.protocol.embeddings import EmbeddingRequest
from server.protocol.responses import ResponsesRequest
from tests.fakes import TEMPLATE, FakeEngine, save_tokenizer
from tests.server.fakes import JSON, MODEL
from tests.server.test_fields import HINTS
from tests.server.test_tools import CALL, OPTIONS, TOOL

PATHS = "/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/embeddings"
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
USER = {"role": "user", "content": "hi"}
OPEN = {
    "messages": [USER, {"role": "assistant", "content": "well"}],
    "add_generation_prompt": False,
    "continue_final_message": True,
}
STREAM, TOOLS = {"stream": True}, {"tools": [TOOL]}
FUNCTION = {"type": "function", **TOOL["function"]}
LOGPROBS = {"include": ["message.output_text.logprobs"]}
# Value, and the fields without which it means nothing.
SAMPLING = {
    "temperature": (0.5, {}),
    "top_p": (0.5, {}),
    "top_k": (3, {}),
    "min_p": (0.1, {}),
    "frequency_penalty": (1, {}),
    "presence_penalty": (1, {}),
    "repetition_penalty": (1.5, {}),
    "seed": (5, {}),
    "stop": (["wor"], {}),
    "stop_token_ids": ([9], {}),
    "bad_words": (["x"], {}),
    "logit_bias": ({"5": 1}, {}),
    "allowed_token_ids": ([104], {}),
    "min_tokens": (1, {}),
    "ignore_eos": (True, {}),
    "skip_special_tokens": (False, {}),
    "spaces_between_special_tokens": (False, {}),
    "include_stop_str_in_output": (True, {"stop": ["wor"]}),
    "thinking_token_budget": (3, {}),
    "model": ("other", {}),
    "stream": (True, {}),
    "stream_options": ({"include_usage": True}, STREAM),
    "structured_outputs": ({"choice": ["hello"]}, {}),
    "priority": (3, {}),
    "cache_salt": ("s", {}),
}
COMMON = SAMPLING | {
    "n": (2, {}),
    "stream_interval": (3, STREAM),
    "prompt_logprobs": (1, {}),
    "logprob_token_ids": ([5], {}),
    "truncate_prompt_tokens": (1, {}),
    "request_id": ("mine", {}),
    "return_token_ids": (True, {}),
    "response_format": ({"type": "json_object"}, {}),
    "guided_json": (SCHEMA, {}),
    "guided_regex": ("a+", {}),
    "guided_choice": (["a"], {}),
    "guided_grammar": ('start: "a"', {}),
    "max_tokens": (3, {}),
    "echo": (True, {}),
}
COMPLETION = COMMON | {
    "prompt": ("other", {}),
    "add_special_tokens": (False, {}),
    "logprobs": (1, {}),
    "best_of": (3, {}),
    "return_tokens_as_token_ids": (True, {"logprobs": 1}),
}
CHAT = COMMON | {
    "messages": ([USER, USER], {}),
    "add_special_tokens": (True, {}),
    "max_completion_tokens": (3, {}),
    "logprobs": (True, {}),
    "top_logprobs": (2, {"logprobs": True}),
    "return_tokens_as_token_ids": (True, {"logprobs": True}),
    "echo": (True, OPEN),
    "tools": ([TOOL], {}),
    "tool_choice": ("none", TOOLS),
    "parallel_tool_calls": (False, TOOLS),
    "reasoning_effort": ("low", {}),
    "include_reasoning": (False, {}),
    "add_generation_prompt": (False, {}),
    "continue_final_message": (
        True,
        {"messages": OPEN["messages"], "add_generation_prompt": False},
    ),
    "chat_template": ("x", {}),
    "chat_template_kwargs": ({"mood": "sad"}, {}),
    "documents": ([{"text": "d"}], {}),
}
RESPONSES = SAMPLING | {
    "stream_options": ({"include_obfuscation": True}, STREAM),
    "input": ("other", {}),
    "instructions": ("be brief", {}),
    "max_output_tokens": (3, {}),
    "background": (True, {}),
    "store": (False, {}),
    "previous_response_id": ("resp_none", {}),
    "include": (LOGPROBS["include"], {}),
    "top_logprobs": (2, LOGPROBS),
    "tools": ([FUNCTION], {}),
    "tool_choice": ("none", {"tools": [FUNCTION]}),
    "parallel_tool_calls": (False, {"tools": [FUNCTION]}),
    "reasoning": ({"effort": "low"}, {}),
    "include_reasoning": (False, {}),
    "text": ({"format": {"type": "json_object"}}, {}),
    "chat_template_kwargs": ({"mood": "sad"}, {}),
    "truncation": ("auto", {}),
    "metadata": ({"a": "b"}, {}),
}
EMBEDDING = {
    "input": ("other", {}),
    "model": ("other", {}),
    "encoding_format": ("base64", {}),
    "dimensions": (2, {}),
    "pooling": ("mean", {}),
    "normalize": (False, {}),
    "use_activation": (False, {}),
    "truncate_prompt_tokens": (1, {}),
    "add_special_tokens": (False, {}),
    "priority": (3, {}),
    "request_id": ("mine", {}),
    "cache_salt": ("s", {}),
}
REFUSED = {
    *("/v1/completions best_of", "/v1/chat/completions chat_template"),
    *("/v1/responses previous_response_id", "/v1/responses truncation"),
    *("/v1/responses stream_options", *(f"{path} model" for path in PATHS)),
}
"""Values of the tables above that this server does not honour, and says so."""
CASES = {
    PATHS[0]: (CompletionRequest, COMPLETION, {"prompt": "hi"}),
    PATHS[1]: (ChatCompletionRequest, CHAT, {"messages": [USER]}),
    PATHS[2]: (ResponsesRequest, RESPONSES, {"input": "hi"}),
    PATHS[3]: (EmbeddingRequest, EMBEDDING, {"input": "hi"}),
}


def engine():
    """Calls tools where it is shown any, and thinks otherwise."""

    def answer(request, index):
        prompt = bytes(t for t in request.prompt_token_ids if t < 256)
        return f"{CALL}{CALL}" if b"parameters" in prompt else "<think>hm</think>hello"

    engine = FakeEngine(answer, max_model_len=2048)
    more = "{{ documents }}{{ tools }}{{ mood }}{{ reasoning_effort }}"
    save_tokenizer(engine.info.path, TEMPLATE + more)
    return engine


def normal(text):
    """What is new with every request is left out."""
    text = str(text)
    if text.startswith(("data:", "event:")):
        # How many chunks there are depends on who is faster.
        return sorted(set(re.findall(r'"(\w+)":', text)))
    text = re.sub(r"[0-9a-f]{24,}", "ID", text)
    return re.sub(r'"(created|created_at|completed_at)":[0-9.]+', "", text)


@pytest.mark.parametrize("path", CASES)
def test_every_field_has_an_effect(serve, path):
    kind, table, base = CASES[path]
    # Neither list may have grown without the other.
    assert set(kind.model_fields) - HINTS == set(table) - HINTS

    async def body(running):
        asked = []
        submit = running.llm.submit

        async def note(*arguments, **keywords):
            asked.append(keywords["stream_interval"])
            return await submit(*arguments, **keywords)

        running.llm.submit = note

        async def outcome(fields):
            added, asked[:] = len(running.engine.added), []
            data = {"model": MODEL} | base | fields
            async with running.session.post(
                running.url + path, json=data, headers=JSON
            ) as response:
                text = normal(await response.text())
            await running.idle()
            given = [
                dataclasses.replace(request, grammar=None, request_id="")
                for request in running.engine.added[added:]
            ]
            return response.status, (text, normal(given), list(asked))

        baselines = {}
        for name, (value, context) in table.items():
            key = str(context)
            if key not in baselines:
                baselines[key] = await outcome(context)
                assert baselines[key] == await outcome(context), context
                assert baselines[key][0] == 200, baselines[key]
            status, found = await outcome(context | {name: value})
            assert (status == 200) == (f"{path} {name}" not in REFUSED), (name, found)
            assert found != baselines[key][1], name

    serve(body, engine=engine(), **OPTIONS)
