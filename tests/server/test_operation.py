"""Queues, deadlines, departures and deaths."""

import asyncio
import json
import logging
import socket
import threading

import pytest

from server.state import Phase
from tests.server.fakes import chat, completion

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
LONG = "x" * 100


class Gate:
    """Holds the engine's steps back until it is opened."""

    def __init__(self, engine):
        self.event = threading.Event()
        engine.on_step = lambda _: self.event.wait(20)

    def open(self):
        self.event.set()


async def until(condition):
    while not condition():
        await asyncio.sleep(0.001)


def test_a_full_queue_refuses(serve):
    async def body(running):
        gate = Gate(running.engine)
        admission = running.server.admission
        tasks = [
            asyncio.create_task(running.post(COMPLETIONS, completion()))
            for _ in range(4)
        ]
        await until(lambda: admission.num_queued == 4)
        status, headers, answer = await running.post(COMPLETIONS, completion())
        assert status == 429
        assert 1 <= int(headers["Retry-After"]) <= 60
        assert answer["error"]["type"] == "rate_limit_error"
        assert answer["error"]["code"] == "queue_full"
        gate.open()
        assert [(await task)[0] for task in tasks] == [200] * 4
        await running.idle()
        assert (await running.post(COMPLETIONS, completion()))[0] == 200

    serve(body, max_num_queued_reqs=4)


def test_the_queue_is_bounded_by_tokens_too(serve):
    async def body(running):
        gate = Gate(running.engine)
        admission = running.server.admission
        first = asyncio.create_task(running.post(COMPLETIONS, completion([7] * 100)))
        await until(lambda: admission.num_queued_tokens == 100)
        status, _, _ = await running.post(COMPLETIONS, completion([7] * 100))
        assert status == 429
        gate.open()
        assert (await first)[0] == 200
        await running.idle()
        assert admission.num_queued_tokens == 0

    serve(body, max_num_queued_tokens=110)


def test_n_counts_n_times(serve):
    async def body(running):
        gate = Gate(running.engine)
        task = asyncio.create_task(running.post(COMPLETIONS, completion(n=3)))
        await until(lambda: running.server.admission.num_queued == 3)
        status, _, _ = await running.post(COMPLETIONS, completion(n=2))
        assert status == 429
        gate.open()
        assert (await task)[0] == 200

    serve(body, max_num_queued_reqs=4)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_request(serve, stream):
    async def body(running):
        gate = Gate(running.engine)
        request = json.dumps(chat(stream=stream)).encode()
        host, port = running.url.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\n"
            + f"Content-Length: {len(request)}\r\n\r\n".encode()
            + request
        )
        await until(lambda: running.engine.added)
        writer.close()
        await writer.wait_closed()
        await until(lambda: not running.llm.num_open)
        num_steps = running.engine.num_steps
        gate.open()
        await running.idle()
        assert running.engine.aborted == [running.engine.added[0].request_id]
        assert not running.engine.has_unfinished
        assert running.engine.num_steps - num_steps <= 1

    serve(body, LONG)


def test_log_lines_hold_no_foreign_lines(serve, caplog):
    """Whatever a client writes: an event is one line, and keys are not in it."""
    odd = "a\r\nb\x1b[31m\x00"
    caplog.set_level(logging.DEBUG, "jllm.server")

    async def body(running):
        key = {"Authorization": "Bearer s3cret"}
        await running.post(COMPLETIONS, completion(model=odd, user=odd), key)
        await running.post(COMPLETIONS, completion(**{odd: 1, "user": odd}), key)
        await running.get("/v1/models/%0d%0aforged%1b%00", key)
        await running.get("/%0d%0aforged", key)

    serve(body, api_key=["s3cret"])
    ends = [r.getMessage() for r in caplog.records if "request_end" in r.getMessage()]
    assert len(ends) == 4
    for record in caplog.records:
        assert record.getMessage().isprintable()
        assert "s3cret" not in record.getMessage()


@pytest.mark.parametrize("option", ["request_timeout", "queue_timeout"])
def test_deadlines(serve, option):
    async def body(running):
        gate = Gate(running.engine)
        for request in (completion(), completion(stream=True)):
            status, _, answer = await running.post(COMPLETIONS, request)
            assert (status, answer["error"]["code"]) == (504, "timeout")
        gate.open()
        await running.idle()
        assert running.engine.added[0].request_id in running.engine.aborted

    serve(body, **{option: 0.05})


def test_a_deadline_within_a_stream(serve):
    async def body(running):
        running.engine.on_step = lambda _: threading.Event().wait(0.02)
        *_, error, done = await running.stream(CHAT, chat(max_tokens=100))
        assert (error["error"]["code"], done) == ("timeout", "[DONE]")
        await running.idle()
        assert running.engine.aborted == [running.engine.added[0].request_id]

    serve(body, LONG, request_timeout=0.4)


@pytest.mark.parametrize("stream", [False, True])
def test_the_first_token_ends_the_queue(serve, stream):
    async def body(running):
        running.engine.on_step = lambda _: threading.Event().wait(0.02)
        admission = running.server.admission
        request = completion(max_tokens=100, stream=stream)
        data = running.session.post(running.url + COMPLETIONS, json=request)
        async with data as response:
            if stream:
                await response.content.readline()
                assert admission.num_queued == 0
                assert admission.num_queued_tokens == 0
            assert response.status == 200
            assert (await response.text()).count("x") >= 99

    # Far less than the answer takes in all.
    serve(body, LONG, queue_timeout=1.0)


def test_a_slow_reader_is_given_up(serve, caplog):
    async def body(running):
        host, port = running.url.removeprefix("http://").split(":")
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        client.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(client, (host, int(port)))
        # Scores make each token large, so that the buffers on the way fill up.
        body = completion([7], max_tokens=100, n=100, logprobs=20, temperature=1)
        request = json.dumps(body | {"stream": True}).encode()
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(request)}\r\n\r\n"
        )
        await loop.sock_sendall(client, head.encode() + request)
        await until(lambda: running.engine.added)
        assert (await running.post(COMPLETIONS, completion()))[0] == 200
        await until(lambda: running.server.admission.num_open == 0)
        client.close()
        await running.idle()

    with caplog.at_level("INFO", "jllm.server.access"):
        serve(body, LONG, write_timeout=0.2, max_buffered_bytes=2048)
    reasons = [json.loads(r.message)["reason"] for r in caplog.records]
    assert "abort_slow_client" in reasons


def test_a_dead_engine_answers_everyone(serve):
    async def body(running):
        def die_with_two(engine):
            threading.Event().wait(0.005)
            if len(engine.added) == 2 and engine.fail_at is None:
                engine.fail_at = engine.num_steps + 5

        running.engine.on_step = die_with_two
        request = completion(max_tokens=100)
        whole = asyncio.create_task(running.post(COMPLETIONS, request))
        await until(lambda: running.engine.added)
        events = await running.stream(CHAT, chat(max_tokens=100))
        assert events[-1] == "[DONE]"
        assert events[-2]["error"]["code"] == "engine_dead"
        status, _, answer = await whole
        assert (status, answer["error"]["code"]) == (503, "engine_dead")
        status, _, answer = await running.get("/health")
        assert (status, answer["error"]["code"]) == (503, "engine_dead")
        assert running.server.fatal.is_set()
        status, _, answer = await running.post(COMPLETIONS, completion())
        assert (status, answer["error"]["code"]) == (503, "engine_dead")

    serve(body, LONG)


def test_one_failed_request_harms_no_other(serve):
    async def body(running):
        gate = Gate(running.engine)
        bad = asyncio.create_task(running.post(COMPLETIONS, completion("bad")))
        await until(lambda: running.engine.added)
        running.engine.error_for = running.engine.added[0].request_id
        good = asyncio.create_task(running.post(COMPLETIONS, completion("good")))
        await until(lambda: running.server.admission.num_open == 2)
        gate.open()
        status, _, answer = await bad
        assert (status, answer["error"]["code"]) == (500, "numerical_error")
        assert (await good)[0] == 200
        assert (await running.get("/health"))[0] == 200

    serve(body)


def test_a_stall_is_seen(serve):
    async def body(running):
        gate = Gate(running.engine)
        task = asyncio.create_task(running.post(COMPLETIONS, completion()))
        await until(lambda: running.engine.num_steps == 1)
        status, answer = 200, {}
        while status == 200:
            status, _, answer = await running.get("/health")
        assert (status, answer["error"]["code"]) == (503, "engine_stalled")
        assert (await running.get("/ready"))[0] == 503
        gate.open()
        assert (await task)[0] == 200
        assert (await running.get("/health"))[0] == 200

    serve(body, stall_timeout=0.2)


def test_draining_refuses_what_is_new(serve):
    async def body(running):
        gate = Gate(running.engine)
        task = asyncio.create_task(running.post(COMPLETIONS, completion()))
        await until(lambda: running.server.admission.num_open)
        running.server.set_draining()
        status, headers, answer = await running.post(COMPLETIONS, completion())
        assert (status, answer["error"]["code"]) == (503, "shutting_down")
        assert headers["Connection"] == "close"
        assert int(headers["Retry-After"]) <= 120
        assert answer["error"]["type"] == "service_unavailable_error"
        assert (await running.get("/ready"))[0] == 503
        assert (await running.get("/health"))[0] == 200
        gate.open()
        assert (await task)[0] == 200

    serve(body)


def test_loading_refuses_inference(serve):
    async def body(running):
        running.server._llm, llm = None, running.server._llm
        running.server.phase = Phase.LOADING
        status, _, answer = await running.post(COMPLETIONS, completion())
        assert (status, answer["error"]["code"]) == (503, "model_loading")
        assert (await running.get("/ready"))[0] == 503
        assert (await running.get("/health"))[0] == 200
        assert (await running.get("/v1/models"))[0] == 200
        running.server.phase, running.server._llm = Phase.READY, llm
        assert (await running.get("/ready"))[0] == 200

    serve(body)


def test_a_bug_is_no_secret_told(serve, monkeypatch):
    async def body(running):
        def broken(*_):
            raise RuntimeError("secret at 0x7fffdeadbeef in /home/me")

        monkeypatch.setattr(running.server, "check_model", broken)
        status, headers, answer = await running.post(COMPLETIONS, completion())
        assert status == 500
        name = headers["X-Request-Id"]
        assert answer["error"]["message"] == f"Internal error, request id {name}"
        assert answer["error"]["type"] == "server_error"

    serve(body)


def test_a_body_that_does_not_come(serve):
    async def body(running):
        host, port = running.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Length: 100\r\n\r\n{"
        )
        answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 408")
        writer.close()
        assert (await running.post(COMPLETIONS, completion()))[0] == 200

    serve(body, body_timeout=0.1)


def test_long_prompts_leave_the_event_loop_free(serve):
    async def body(running):
        loop = asyncio.get_running_loop()
        worst, is_over = 0.0, False

        async def measure():
            nonlocal worst
            while not is_over:
                began = loop.time()
                await asyncio.sleep(0.001)
                worst = max(worst, loop.time() - began)

        measuring = asyncio.create_task(measure())
        status, _, answer = await running.post(
            COMPLETIONS, completion("word " * 200_000)
        )
        is_over = True
        await measuring
        assert status == 400
        assert answer["error"]["code"] == "context_length_exceeded"
        return worst

    serve(body)


def test_half_a_surrogate_in_a_prompt(serve):
    async def body(running):
        request = json.dumps(completion("\ud800")).encode()
        status, _, answer = await running.post(COMPLETIONS, request)
        assert (status, answer["error"]["param"]) == (400, "prompt")

    serve(body)
