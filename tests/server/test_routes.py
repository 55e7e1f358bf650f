"""The smaller routes, metrics, log lines and traces."""

import json

import jsonschema
import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client.parser import text_string_to_metric_families

from jllm.metrics import BlockState
from server.routes.status import block_map
from server.store import ResponseStore
from server.tracing import Tracer
from tests.server.fakes import MODEL, chat, completion

CHAT = "/v1/chat/completions"
LABELS = {"model_name": MODEL, "engine": "0"}


def test_models(serve):
    async def body(running):
        status, _, answer = await running.get("/v1/models")
        assert [card["id"] for card in answer["data"]] == ["org/name", "short"]
        for path in ("org/name", "org%2Fname", "short"):
            status, _, card = await running.get(f"/v1/models/{path}")
            assert (status, card["object"]) == (200, "model")
            assert card["max_model_len"] == 128
        status, _, answer = await running.post(CHAT, chat(model="short"))
        assert (status, answer["model"]) == (200, "short")

    serve(body, served_model_name=["org/name", "short"])


def test_tokens_there_and_back(serve):
    async def body(running):
        request = {"prompt": "hi", "return_token_strs": True}
        _, _, answer = await running.post("/tokenize", request)
        assert answer == {
            "count": 3,
            "max_model_len": 128,
            "tokens": [256, 104, 105],
            "token_strs": ["<s>", "h", "i"],
        }
        request = {"prompt": "hi", "add_special_tokens": False}
        _, _, answer = await running.post("/tokenize", request)
        assert answer["tokens"] == [104, 105]
        request = {"messages": chat()["messages"], "model": MODEL}
        _, _, answer = await running.post("/tokenize", request)
        assert bytes(answer["tokens"][1:]) == b"user: hi\nassistant:"
        request = {"tokens": answer["tokens"][1:]}
        _, _, answer = await running.post("/detokenize", request)
        assert answer == {"prompt": "user: hi\nassistant:"}
        for path, request, param in (
            ("/tokenize", {}, "prompt"),
            ("/tokenize", {"prompt": "a", "messages": chat()["messages"]}, "prompt"),
            ("/detokenize", {"tokens": [260]}, "tokens"),
            ("/detokenize", {"tokens": "x"}, "tokens"),
        ):
            status, _, answer = await running.post(path, request)
            assert (status, answer["error"]["param"]) == (400, param)

    serve(body)


def test_status(serve):
    async def body(running):
        for path in ("/health", "/ready", "/ping", "/version"):
            status, headers, _ = await running.get(path)
            assert status == 200
            assert headers["X-Request-Id"]
        async with running.session.head(running.url + "/health") as response:
            assert response.status == 200
        status, _, state = await running.get("/engine/state")
        assert (state["running"], state["waiting"]) == (0, 0)
        assert set(state["blocks"]) == {"free", "cached", "used", "shared"}

    serve(body)


def test_block_map():
    states = bytes([BlockState.FREE, BlockState.CACHED, BlockState.USED, 3])
    assert block_map(states) == "fcus"
    assert block_map(b"") == ""
    large = block_map(states * 2000)
    assert len(large) == 1000
    assert set(large) == {"s"}


def test_metrics(serve):
    async def body(running):
        await running.post("/v1/completions", completion())
        await running.stream(CHAT, chat(max_tokens=5))
        await running.idle()
        async with running.session.get(running.url + "/metrics") as response:
            text = await response.text()
        families = {f.name: f for f in text_string_to_metric_families(text)}

        def value(sample, **labels):
            family = families[
                sample.removesuffix("_total").rpartition("_count")[0]
                or (sample.removesuffix("_total"))
            ]
            (found,) = [
                s.value
                for s in family.samples
                if s.name == sample and s.labels == LABELS | labels
            ]
            return found

        assert value("jllm:prompt_tokens_total") == 3 + 20
        assert value("jllm:generation_tokens_total") == 12 + 5
        assert value("jllm:request_success_total", finished_reason="stop") == 1
        assert value("jllm:request_success_total", finished_reason="length") == 1
        assert value("jllm:time_to_first_token_seconds_count") == 2
        assert value("jllm:inter_token_latency_seconds_count") <= 4
        assert value("jllm:num_requests_running") == 0
        for name in (
            "num_requests_waiting",
            "kv_cache_usage_perc",
            "prefix_cache_queries",
            "prefix_cache_hits",
            "num_preemptions",
            "request_time_per_output_token_seconds",
            "e2e_request_latency_seconds",
            "request_queue_time_seconds",
            "request_inference_time_seconds",
            "request_prefill_time_seconds",
            "request_decode_time_seconds",
            "request_prompt_tokens",
            "request_generation_tokens",
            "request_params_n",
            "request_params_max_tokens",
            "iteration_tokens_total",
            "cache_config_info",
            "admission_rejections",
        ):
            assert f"jllm:{name}" in families, name

    serve(body)


def test_one_log_line_per_request(serve, caplog):
    async def body(running):
        headers = {"X-Request-Id": "mine-1"}
        _, found, _ = await running.post(CHAT, chat(max_tokens=5), headers)
        assert found["X-Request-Id"] == "mine-1"
        _, found, _ = await running.post(CHAT, chat(model="a\x1b[31m\nb"))
        _, found, _ = await running.get("/x%0d%0aforged", {"X-Request-Id": "a b"})
        assert found["X-Request-Id"].startswith("req_")

    with caplog.at_level("INFO", "jllm.server.access"):
        serve(body)
    lines = [r.getMessage() for r in caplog.records if r.name == "jllm.server.access"]
    assert len(lines) == 3
    assert all(line.isprintable() for line in lines)
    first, second, third = map(json.loads, lines)
    assert first["request_id"] == "mine-1"
    assert (first["status"], first["reason"]) == (200, "length")
    assert (first["prompt_tokens"], first["completion_tokens"]) == (20, 5)
    assert first["ttft_ms"] <= first["total_ms"]
    assert (second["status"], second["reason"]) == (404, "invalid")
    assert (third["status"], third["route"]) == (404, "none")


def test_a_trace_per_request(serve):
    pytest.importorskip("opentelemetry.exporter", reason="needs the extra otel")
    exporter = InMemorySpanExporter()

    async def body(running):
        running.server.tracer = Tracer(None, exporter)
        trace = "0af7651916cd43dd8448eb211c80319c"
        headers = {"traceparent": f"00-{trace}-b7ad6b7169203331-01"}
        await running.post(CHAT, chat(), headers)
        await running.get("/health")
        running.server.tracer._provider.force_flush()
        (span,) = exporter.get_finished_spans()
        assert f"{span.context.trace_id:032x}" == trace
        assert span.name == f"POST {CHAT}"
        assert span.attributes["gen_ai.usage.completion_tokens"] == 12
        assert span.end_time > span.start_time

    serve(body)


def test_openapi_describes_the_routes(serve):
    async def body(running):
        _, _, described = await running.get("/openapi.json")
        canonical = {
            (route.method.lower(), route.resource.canonical)
            for route in running.server_routes()
        }
        for path, methods in described["paths"].items():
            for method in methods:
                assert (method, path) in canonical
        schemas = described["components"]["schemas"]
        resolver = {"components": {"schemas": schemas}}
        schema = resolver | {"$ref": "#/components/schemas/ChatCompletionRequest"}
        jsonschema.validate(chat(), schema)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(chat(temperature=3), schema)
        schema = resolver | {"$ref": "#/components/schemas/ChatCompletionResponse"}
        _, _, answer = await running.post(CHAT, chat(logprobs=True, top_logprobs=1))
        jsonschema.validate(answer, schema)
        schema = resolver | {"$ref": "#/components/schemas/CompletionResponse"}
        request = completion(logprobs=1, echo=True)
        _, _, answer = await running.post("/v1/completions", request)
        jsonschema.validate(answer, schema)
        schema = resolver | {"$ref": "#/components/schemas/ChatCompletionRequest"}
        parts = ["a", {"type": "text", "text": "b"}, {"type": "refusal", "refusal": ""}]
        jsonschema.validate(chat(parts), schema)
        assert (await running.post(CHAT, chat(parts)))[0] == 200
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(chat([{"type": "image_url"}]), schema)
        streamed = {
            path
            for path, methods in described["paths"].items()
            if "text/event-stream" in str(methods)
        }
        assert streamed == {"/v1/completions", CHAT, "/v1/responses"}
        schema = resolver | {"$ref": "#/components/schemas/EngineState"}
        _, _, answer = await running.get("/engine/state")
        jsonschema.validate(answer, schema)

    serve(body)


def test_profiles(serve, monkeypatch, tmp_path):
    async def body(running):
        calls = []

        async def note(*arguments):
            calls.append(arguments)

        monkeypatch.setattr(running.llm, "start_profile", note)
        monkeypatch.setattr(running.llm, "stop_profile", note)
        assert (await running.post("/stop_profile", {}))[0] == 409
        assert (await running.post("/start_profile", {}))[0] == 200
        assert (await running.post("/start_profile", {}))[0] == 409
        assert (await running.post("/stop_profile", {}))[0] == 200
        assert calls == [(str(tmp_path),), ()]

    serve(body, profiler_dir=str(tmp_path))


def test_no_profiles_without_a_folder(serve):
    async def body(running):
        assert (await running.post("/start_profile", {}))[0] == 404

    serve(body)


def test_the_store_is_bounded():
    store = ResponseStore(max_responses=3, max_bytes=100)
    for i in range(5):
        store.put(str(i), {"a": i})
    assert (len(store), store.get("1"), store.get("4")) == (3, None, {"a": 4})
    store.get("2")
    store.put("5", {"a": 5})
    assert store.get("2") is not None
    assert store.get("3") is None
    store.put("6", {"a": "x" * 80})
    assert len(store) == 2
    store.put("7", {"a": "x" * 200})
    assert store.get("7") is None
    assert store.delete("6")
    assert not store.delete("6")


def test_running_responses_are_not_given_up():
    store = ResponseStore(max_responses=2, max_bytes=100)
    assert store.put("runs", {"a": 0}, is_running=True)
    for i in range(3):
        assert store.put(str(i), {"a": i})
    assert store.get("runs") == {"a": 0}
    assert len(store) == 2
    assert store.put("too", {"a": 0}, is_running=True)
    assert not store.put("more", {"a": 0}, is_running=True)
    assert store.put("runs", {"a": 1})
    assert store.put("more", {"a": 0})
    assert (store.get("runs"), store.get("too")) == (None, {"a": 0})
