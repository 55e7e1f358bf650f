"""`jllm bench serve` and `sweep` against a server that says the same every time."""

import asyncio
import json

import pytest
from aiohttp import web

from jllm.bench.client import Target, make_body, run_load
from jllm.bench.sweep import pareto
from jllm.bench.workload import BenchRequest
from jllm.cli import main

GAP_SECONDS = 0.01


class FakeServer:
    """Streams as many tokens as asked for.

    Attributes:
        bodies: What was asked, in order.
        most_at_once: Largest number of open streams.
        fail_from: Number of the first request that is refused.
    """

    def __init__(self):
        self.bodies, self.most_at_once, self.fail_from = [], 0, None
        self._open = 0

    def app(self):
        app = web.Application()
        app.router.add_get("/v1/models", self.models)
        app.router.add_get("/metrics", self.metrics)
        app.router.add_post("/v1/completions", self.stream)
        app.router.add_post("/v1/chat/completions", self.stream)
        return app

    async def models(self, request):
        model = {"id": "served", "max_model_len": 64}
        return web.json_response({"data": [model]})

    async def metrics(self, request):
        text = "# TYPE vllm:num_requests_running gauge\n"
        return web.Response(text=f"{text}vllm:num_requests_running {self._open}\n")

    async def stream(self, request):
        body = await request.json()
        self.bodies.append(body)
        if self.fail_from is not None and len(self.bodies) > self.fail_from:
            return web.json_response({"error": {"message": "no more"}}, status=503)
        self._open += 1
        self.most_at_once = max(self.most_at_once, self._open)
        try:
            return await self._answer(request, body)
        finally:
            self._open -= 1

    async def _answer(self, request, body):
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        is_chat = "messages" in body
        count = body.get("max_completion_tokens") or body["max_tokens"]
        if is_chat:
            await self._send(response, {"delta": {"role": "assistant", "content": ""}})
        for _ in range(count):
            await asyncio.sleep(GAP_SECONDS)
            piece = {"delta": {"content": "a"}} if is_chat else {"text": ""}
            await self._send(response, piece)
        end = {"delta": {}} if is_chat else {"text": ""}
        await self._send(response, end, finish_reason="length")
        usage = {"prompt_tokens": 9, "completion_tokens": count}
        usage["prompt_tokens_details"] = {"cached_tokens": 3}
        data = json.dumps({"choices": [], "usage": usage})
        await response.write(f": comment\n\ndata: {data}\n\ndata: [DONE]\n\n".encode())
        return response

    async def _send(self, response, choice, finish_reason=None):
        choice = {"index": 0, "finish_reason": finish_reason, **choice}
        data = json.dumps({"choices": [choice]})
        await response.write(f"data: {data}\n\n".encode())


@pytest.fixture
async def fake(aiohttp_server):
    fake = FakeServer()
    fake.url = str((await aiohttp_server(fake.app())).make_url("")).rstrip("/")
    return fake


async def bench(verb, fake, *arguments):
    """Runs the command beside the event loop that serves."""
    common = ["--base-url", fake.url, "--ready-check-timeout-sec", "5"]
    return await asyncio.to_thread(main, ["bench", verb, *common, *arguments])


async def test_serve(fake, tmp_path, capsys):
    result, picture = tmp_path / "result.json", tmp_path / "picture.png"
    code = await bench(
        *("serve", fake, "--vocab-size", "50", "--num-prompts", "5"),
        *("--random-input-len", "4", "--random-output-len", "3", "--num-warmups", "1"),
        *("--max-concurrency", "2", "--goodput", "ttft:10000", "tpot:0.001"),
        *("--metric-percentiles", "25,75", "--json", str(result)),
        *("--plot", str(picture)),
    )
    assert code == 0
    record = json.loads(result.read_text())
    assert len(fake.bodies) == 6
    first = fake.bodies[0]
    assert first["model"] == "served"
    assert len(first["prompt"]) == 4
    assert all(3 <= token < 50 for token in first["prompt"])
    assert (first["max_tokens"], first["ignore_eos"], first["temperature"]) == (
        3,
        True,
        0,
    )
    assert fake.most_at_once == 2
    assert (record["completed"], record["failed"]) == (5, 0)
    assert record["total_input_tokens"] == 45
    assert record["total_output_tokens"] == 15
    assert record["prefix_hit_rate"] == pytest.approx(1 / 3)
    assert [len(t["chunk_times"]) for t in record["timings"]] == [3] * 5
    assert record["p25_ttft_ms"] <= record["p75_ttft_ms"]
    assert record["mean_itl_ms"] >= 1000 * GAP_SECONDS * 0.9
    assert record["mean_ttft_from_schedule_ms"] > record["mean_ttft_ms"]
    assert record["good_share"] == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "time to first token" in capsys.readouterr().out


async def test_chat(fake, tmp_path):
    """The chunk with the role is no token; the words stand for tokens."""
    result = tmp_path / "result.json"
    code = await bench(
        *("serve", fake, "--backend", "openai-chat", "--num-prompts", "1"),
        *("--random-input-len", "4", "--random-output-len", "2", "--num-warmups", "0"),
        *("--no-ignore-eos", "--json", str(result)),
    )
    assert code == 0
    (body,) = fake.bodies
    assert len(body["messages"][0]["content"].split()) == 4
    assert "ignore_eos" not in body
    (timing,) = json.loads(result.read_text())["timings"]
    assert len(timing["chunk_times"]) == timing["num_output_tokens"] == 2


async def test_failed_requests_are_counted(fake, capsys):
    fake.fail_from = 1
    code = await bench(
        *("serve", fake, "--vocab-size", "50", "--num-prompts", "3"),
        *("--random-input-len", "4", "--random-output-len", "1", "--num-warmups", "0"),
    )
    assert code == 1
    assert "2 x HTTP 503" in capsys.readouterr().out


async def test_sweep(fake, tmp_path, capsys):
    result = tmp_path / "result.json"
    code = await bench(
        *("sweep", fake, "--vocab-size", "50", "--prompts-per-concurrency", "2"),
        *("--random-input-len", "4", "--random-output-len", "2", "--num-warmups", "0"),
        *("--max-concurrency", "1", "3", "--json", str(result)),
    )
    assert code == 0
    results = json.loads(result.read_text())["results"]
    assert [r["completed"] for r in results] == [2, 6]
    assert len({r["workload_hash"] for r in results}) == 2
    assert results[1]["output_throughput"] > results[0]["output_throughput"]
    assert "Pareto" in capsys.readouterr().out


async def test_search(fake, capsys):
    """All rates are good, so each step doubles the rate."""
    code = await bench(
        *("sweep", fake, "--vocab-size", "50", "--num-prompts", "2"),
        *("--random-input-len", "4", "--random-output-len", "1", "--num-warmups", "0"),
        *("--request-rate", "50", "--goodput", "ttft:60000"),
        *("--search-goodput", "0.9", "--search-steps", "2"),
    )
    assert code == 0
    assert "90% good requests: 200 requests/s" in capsys.readouterr().out


async def test_broken_streams(aiohttp_server):
    """Each way to break is one failed request with its reason."""
    answers = {"cut": "data: {}\n\n", "bad": "data: {\n\n", "error": ""}
    answers["error"] = 'data: {"error": {"message": "sorry"}}\n\n'

    async def answer(request):
        return web.Response(text=answers[request.match_info["kind"]])

    app = web.Application()
    app.router.add_post("/{kind}", answer)
    url = str((await aiohttp_server(app)).make_url("/"))
    words = {"cut": "[DONE]", "bad": "JSONDecodeError", "error": "sorry"}
    for kind, word in words.items():
        target = Target(url + kind, "openai", "m")
        (timing,) = await run_load(target, [BenchRequest((3,), 1)], [0.0], None)
        assert word in timing.error
        assert not timing.is_complete


async def test_arrivals_are_kept(fake):
    """The second request is sent at its time, not before."""
    target = Target(fake.url + "/v1/completions", "openai", "m")
    requests = [BenchRequest((3,), 1)] * 2
    first, second = await run_load(target, requests, [0.0, 0.2], None)
    assert second.scheduled - first.scheduled == pytest.approx(0.2)
    assert second.start >= second.scheduled


def test_authorization_and_body():
    target = Target("u", "openai", "m", temperature=0.5, ignore_eos=False, api_key="k")
    assert target.headers == {"Authorization": "Bearer k"}
    body = make_body(target, BenchRequest((5, 6), 7))
    assert body["prompt"] == [5, 6]
    assert body["stream_options"] == {"include_usage": True}
    assert (body["max_tokens"], body["temperature"]) == (7, 0.5)


def test_pareto():
    points = [(10, 5), (20, 3), (15, 3), (10, 5), (1, 1)]
    results = [{"output_throughput": a, "interactivity": b} for a, b in points]
    assert pareto(results) == [True, True, False, True, False]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["serve", "--base-url", "ftp://x"], "base_url"),
        (["serve", "--goodput", "fast"], "goodput='fast'"),
        (["serve", "--backend", "grpc"], "--backend"),
        (["serve", "--request-rate", "0"], "request_rate=0"),
        (["serve", "--max-concurrency", "0"], "max_concurrency=0"),
        (["serve", "--metric-percentiles", "50,101"], "--metric-percentiles"),
        (["serve", "--vocab-size", "2"], "vocab_size=2"),
        (["sweep", "--max-concurrency", "0"], "max_concurrency=0"),
        (["sweep", "--search-goodput", "0.9"], "request_rate"),
        (["sweep", "--request-rate", "-1"], "request_rate=-1"),
    ],
)
def test_bad_flags(capsys, arguments, word):
    assert main(["bench", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert word in captured.err


def test_nobody_answers(capsys, unused_tcp_port):
    url = f"http://127.0.0.1:{unused_tcp_port}"
    arguments = ["--base-url", url, "--ready-check-timeout-sec", "0"]
    assert main(["bench", "serve", *arguments]) == 1
    assert "did not answer" in capsys.readouterr().err
