"""Once the server is ready no request makes it trace or compile anything."""

import asyncio
import json

import jax
import pytest

from tests.engines import LLAMA, make_engine, model_folder
from tests.fakes import save_tokenizer
from tests.server.fakes import MODEL, running_server

# A folder of its own: it has a tokenizer, and more ids than the tokenizer knows.
CONFIG = LLAMA | {"rope_theta": 10001.0}
TEXT = {"model": MODEL, "prompt": "hello", "max_tokens": 6}
CHAT = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "hi"}],
    "max_tokens": 6,
}
FIELDS = (
    {},
    {"stream": True},
    {"temperature": 0},
    {"temperature": 0.7, "top_k": 5, "top_p": 0.8, "min_p": 0.1, "seed": 3},
    {"n": 3, "logprobs": 2},
    {"prompt_logprobs": 1},
    {"presence_penalty": 1, "frequency_penalty": 1, "repetition_penalty": 1.2},
    {"logit_bias": {"65": 5}, "bad_words": ["b"], "allowed_token_ids": [65, 66]},
    {"min_tokens": 2, "stop": ["z"], "logprob_token_ids": [65]},
    {"structured_outputs": {"choice": ["yes", "no"]}},
)
REQUESTS = (
    *(("/v1/completions", TEXT | fields) for fields in FIELDS),
    ("/v1/completions", TEXT | {"prompt": ["a", "b" * 90], "echo": True}),
    ("/v1/completions", TEXT | {"max_tokens": 0, "echo": True, "logprobs": 1}),
    ("/v1/chat/completions", CHAT),
    ("/v1/chat/completions", CHAT | {"stream": True, "n": 2}),
    ("/v1/chat/completions", CHAT | {"logprobs": True, "top_logprobs": 3}),
    ("/v1/responses", {"model": MODEL, "input": "hi", "max_output_tokens": 4}),
    ("/v1/embeddings", {"model": MODEL, "input": ["hi", "there"]}),
    ("/tokenize", {"model": MODEL, "prompt": "hello"}),
    ("/v1/completions", TEXT | {"prompt": [10**6]}),
    ("/v1/completions", TEXT | {"max_tokens": -1}),
)


@pytest.mark.slow
def test_no_request_compiles_anything(monkeypatch):
    save_tokenizer(model_folder(json.dumps(CONFIG)))
    engine = make_engine(CONFIG)
    engine.wait_until_compiled()
    events = []

    def record(name, *_, **__):
        if "backend_compile" in name or "trace_duration" in name:
            events.append(name)

    async def ask(running, path, body):
        async with running.session.post(running.url + path, json=body) as response:
            text = await response.text()
            assert response.status < 500, text
            return response.status

    async def body():
        async with running_server(monkeypatch, engine=engine) as running:
            alone = [await ask(running, *one) for one in REQUESTS]
            assert alone[:-2] == [200] * (len(REQUESTS) - 2)
            together = await asyncio.gather(*(ask(running, *one) for one in REQUESTS))
            assert together == alone

    jax.monitoring.register_event_duration_secs_listener(record)
    try:
        asyncio.run(asyncio.wait_for(body(), 120))
    finally:
        jax.monitoring.unregister_event_duration_listener(record)
    assert events == []
