"""Streams as OpenAI sends them, and what they hold besides the text."""

import asyncio

import pytest
from aiohttp import web

from server.sse import event
from tests.server.fakes import chat, completion

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def test_events_are_one_line_each():
    framed = event({"a": "x\n\ny\r\u2028é"})
    assert framed.endswith(b"\n\n")
    assert framed.count(b"\n") == 2
    assert framed.startswith(b"data: {")


def test_chat_stream(serve):
    async def body(running):
        request = chat(stream_options={"include_usage": True})
        *chunks, last, done = await running.stream(CHAT, request)
        assert done == "[DONE]"
        assert chunks[0]["choices"] == [
            {
                "index": 0,
                "delta": {"role": "assistant", "content": "", "refusal": None},
                "logprobs": None,
                "finish_reason": None,
            }
        ]
        middle = [chunk["choices"][0] for chunk in chunks[1:-1]]
        assert "".join(c["delta"]["content"] for c in middle) == "hello world"
        assert all(set(c["delta"]) == {"content"} for c in middle)
        assert chunks[-1]["choices"] == [
            {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}
        ]
        assert all(chunk["usage"] is None for chunk in chunks)
        assert last["choices"] == []
        assert last["usage"]["completion_tokens"] == 12
        for chunk in chunks:
            assert chunk["object"] == "chat.completion.chunk"
        _, _, whole = await running.post(CHAT, chat())
        assert last["usage"] == whole["usage"]

    serve(body)


def test_no_comment_follows_the_last_chunk(serve, monkeypatch):
    """A slow reader would take it for the beginning of the next answer."""
    write, write_eof = web.StreamResponse.write, web.StreamResponse.write_eof
    ending, late = set(), []

    async def slow_end(self, data=b""):
        ending.add(id(self))
        await asyncio.sleep(0.05)
        await write_eof(self, data)

    async def noted_write(self, data):
        late.extend([data] if id(self) in ending else [])
        await write(self, data)

    monkeypatch.setattr(web.StreamResponse, "write", noted_write)
    monkeypatch.setattr(web.StreamResponse, "write_eof", slow_end)

    async def body(running):
        assert (await running.stream(CHAT, chat()))[-1] == "[DONE]"
        assert ending
        assert late == []

    serve(body, keep_alive_interval=0.01)


def test_no_usage_unless_asked(serve):
    async def body(running):
        for path, request in ((CHAT, chat()), (COMPLETIONS, completion())):
            chunks = await running.stream(path, request)
            assert all("usage" not in chunk for chunk in chunks[:-1])
            request["stream_options"] = {"continuous_usage_stats": True}
            chunks = await running.stream(path, request)
            counts = [c["usage"]["completion_tokens"] for c in chunks[:-1]]
            assert counts == sorted(counts)
            assert counts[-1] == 12

    serve(body)


def test_completion_stream(serve):
    async def body(running):
        *chunks, done = await running.stream(COMPLETIONS, completion(echo=True))
        assert done == "[DONE]"
        text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
        assert text == "hihello world"
        last = chunks[-1]["choices"][0]
        assert (last["text"], last["finish_reason"]) == ("", "stop")
        reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]]
        assert set(reasons) == {None}

    serve(body)


@pytest.mark.parametrize("temperature", [0, 1])
def test_n_outputs(serve, temperature):
    def answer(request, index):
        return f"number {index if temperature else 0}"

    async def body(running):
        request = chat(n=3, temperature=temperature)
        chunks = await running.stream(CHAT, request)
        texts, ends = ["", "", ""], []
        for chunk in chunks[:-1]:
            (choice,) = chunk["choices"]
            texts[choice["index"]] += choice["delta"].get("content", "")
            if choice["finish_reason"]:
                ends.append(choice["index"])
        expected = [f"number {i if temperature else 0}" for i in range(3)]
        assert texts == expected
        assert sorted(ends) == [0, 1, 2]
        _, _, whole = await running.post(CHAT, request)
        found = [choice["message"]["content"] for choice in whole["choices"]]
        assert found == expected
        assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2]
        assert whole["usage"]["completion_tokens"] == 27
        # Greedy outputs are equal: the engine makes one.
        assert len(running.engine.added[-1:]) == 1
        assert running.engine.added[-1].params.n == (3 if temperature else 1)

    serve(body, answer)


def test_lists_of_prompts(serve):
    def answer(request, index):
        return bytes(i for i in request.prompt_token_ids if i < 256).decode() + "!"

    async def body(running):
        request = completion(["a", "bc", "def"], n=2, temperature=1)
        _, _, whole = await running.post(COMPLETIONS, request)
        texts = [choice["text"] for choice in whole["choices"]]
        assert texts == ["a!", "a!", "bc!", "bc!", "def!", "def!"]
        assert [c["index"] for c in whole["choices"]] == list(range(6))
        assert whole["usage"]["prompt_tokens"] == 2 + 3 + 4
        chunks = await running.stream(COMPLETIONS, request)
        texts = [""] * 6
        for chunk in chunks[:-1]:
            (choice,) = chunk["choices"]
            texts[choice["index"]] += choice["text"]
        assert texts == ["a!", "a!", "bc!", "bc!", "def!", "def!"]
        tokens = completion([[97], [98, 99]])
        _, _, whole = await running.post(COMPLETIONS, tokens)
        assert [choice["text"] for choice in whole["choices"]] == ["a!", "bc!"]
        assert whole["usage"]["prompt_tokens"] == 3
        await running.idle()

    serve(body, answer)


def test_one_bad_prompt_refuses_all(serve):
    async def body(running):
        request = completion([[97], [9999]])
        status, _, answer = await running.post(COMPLETIONS, request)
        assert (status, answer["error"]["param"]) == (400, "prompt")
        await running.idle()

    serve(body)


def test_chat_logprobs(serve):
    async def body(running):
        request = chat(logprobs=True, top_logprobs=2)
        _, _, whole = await running.post(CHAT, request)
        content = whole["choices"][0]["logprobs"]["content"]
        text = b"".join(bytes(entry["bytes"]) for entry in content[:-1])
        assert text == b"hello world"
        assert [len(entry["top_logprobs"]) for entry in content] == [2] * 12
        assert content[0]["logprob"] == -0.5
        assert content[0]["top_logprobs"][0]["token"] == "A"
        chunks = await running.stream(CHAT, request)
        first = chunks[0]["choices"][0]["logprobs"]
        assert first == {"content": [], "refusal": None}
        streamed = [
            entry
            for chunk in chunks[:-2]
            for entry in chunk["choices"][0]["logprobs"]["content"]
        ]
        assert streamed == content
        assert chunks[-2]["choices"][0]["logprobs"] is None
        _, _, none = await running.post(CHAT, chat(logprobs=True, top_logprobs=0))
        entries = none["choices"][0]["logprobs"]["content"]
        assert [entry["top_logprobs"] for entry in entries] == [[]] * 12
        _, _, plain = await running.post(CHAT, chat())
        assert plain["choices"][0]["logprobs"] is None

    serve(body)


def test_completion_logprobs(serve):
    async def body(running):
        request = completion(logprobs=1, echo=True)
        _, _, whole = await running.post(COMPLETIONS, request)
        choice = whole["choices"][0]
        scores = choice["logprobs"]
        assert choice["text"] == "hihello world"
        assert scores["token_logprobs"][:3] == [None, -2.0, -2.0]
        assert scores["top_logprobs"][0] is None
        assert len(scores["tokens"]) == 3 + 12
        assert scores["text_offset"][-2:] == [len("hihello worl"), 12 + 1]
        chunks = await running.stream(COMPLETIONS, request)
        streamed = [chunk["choices"][0]["logprobs"] for chunk in chunks[:-2]]
        for field in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            assert [x for s in streamed for x in s[field]] == scores[field]
        _, _, whole = await running.post(COMPLETIONS, completion(logprobs=0))
        tops = whole["choices"][0]["logprobs"]["top_logprobs"]
        assert tops[0] == {"h": -0.5}

    serve(body)


def test_scoring_a_prompt_generates_nothing(serve):
    async def body(running):
        request = completion(echo=True, logprobs=1, max_tokens=0)
        _, _, whole = await running.post(COMPLETIONS, request)
        choice = whole["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == ("hi", "length")
        assert len(choice["logprobs"]["tokens"]) == 3
        assert whole["usage"]["completion_tokens"] == 0

    serve(body)


def test_further_fields(serve):
    async def body(running):
        request = completion(
            prompt_logprobs=1, return_token_ids=True, stop=["wor"], request_id="mine"
        )
        _, _, whole = await running.post(COMPLETIONS, request)
        choice = whole["choices"][0]
        assert whole["id"] == "cmpl-mine"
        assert choice["text"] == "hello "
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "wor")
        assert choice["prompt_logprobs"][0] is None
        assert choice["prompt_logprobs"][1]["104"]["logprob"] == -2.0
        assert choice["prompt_token_ids"] == [256, 104, 105]
        assert choice["token_ids"] == list(b"hello wor")
        _, _, whole = await running.post(
            CHAT, chat(logprobs=True, return_tokens_as_token_ids=True)
        )
        first = whole["choices"][0]["logprobs"]["content"][0]
        assert first["token"] == "token_id:104"
        _, _, whole = await running.post(
            COMPLETIONS, completion(add_special_tokens=False)
        )
        assert whole["usage"]["prompt_tokens"] == 2

    serve(body)


def test_sampling_fields_reach_the_engine(serve):
    async def body(running):
        request = chat(
            temperature=0.5,
            top_p=0.9,
            top_k=5,
            min_p=0.1,
            seed=7,
            presence_penalty=0.5,
            frequency_penalty=-0.5,
            repetition_penalty=1.1,
            logit_bias={"5": -100},
            stop_token_ids=[9],
            bad_words=["x"],
            allowed_token_ids=[104, 105],
            min_tokens=2,
            ignore_eos=True,
            max_completion_tokens=9,
            priority=3,
            cache_salt="s",
        )
        status, _, answer = await running.post(CHAT, request)
        assert status == 200, answer
        added = running.engine.added[-1]
        params = added.params
        assert (params.temperature, params.top_p, params.top_k) == (0.5, 0.9, 5)
        assert (params.min_p, params.seed, params.max_tokens) == (0.1, 7, 9)
        assert (params.presence_penalty, params.frequency_penalty) == (0.5, -0.5)
        assert params.repetition_penalty == 1.1
        assert params.logit_bias == {5: -100.0}
        assert (params.stop_token_ids, params.bad_words) == ((9,), ("x",))
        assert params.allowed_token_ids == (104, 105)
        assert (params.min_tokens, params.ignore_eos) == (2, True)
        assert (added.priority, added.cache_salt) == (3, "s")
        # What a request leaves out is the model's default.
        await running.post(CHAT, chat())
        assert running.engine.added[-1].params.top_k == 7
        await running.post(CHAT, chat(max_tokens=None))
        assert running.engine.added[-1].params.max_tokens is None
        await running.post(COMPLETIONS, completion(max_tokens=None))
        assert running.engine.added[-1].params.max_tokens == 16

    serve(body)


def test_conversations(serve):
    async def body(running):
        call = {
            "id": "c1",
            "type": "function",
            "function": {"name": "f", "arguments": "{}"},
        }
        messages = [
            {"role": "developer", "content": [{"type": "text", "text": "be brief"}]},
            {"role": "user", "content": "hi", "name": "tim"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": "4"},
        ]
        status, _, answer = await running.post(CHAT, chat(messages=messages))
        assert status == 200, answer
        tokens = running.engine.added[-1].prompt_token_ids
        prompt = bytes(t for t in tokens if t < 256).decode()
        assert prompt.startswith("system: be brief\nuser: hi\n")
        open_end = [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "we"},
        ]
        request = chat(messages=open_end, continue_final_message=True, echo=True)
        _, _, answer = await running.post(CHAT, request)
        assert answer["choices"][0]["message"]["content"] == "wehello world"
        tokens = running.engine.added[-1].prompt_token_ids
        assert bytes(t for t in tokens if t < 256).endswith(b"assistant: we")
        request = chat(add_generation_prompt=False)
        await running.post(CHAT, request)
        tokens = running.engine.added[-1].prompt_token_ids
        assert not bytes(t for t in tokens if t < 256).endswith(b"assistant:")

    serve(body)
