"""/v1/embeddings: forms of inputs and answers, errors, and the rest of operation."""

import asyncio
import base64

import numpy as np
import openai
import pytest

from tests.fakes import WIDTH
from tests.server.fakes import MODEL
from tests.server.test_bad_requests import check_error, check_unharmed

PATH = "/v1/embeddings"


def embedding(value="hi", **fields):
    return {"model": MODEL, "input": value} | fields


def raw(num_tokens):
    """The vector of the fake engine for a prompt of so many tokens."""
    return 1.0 + np.arange(WIDTH) * num_tokens


def unit(vector):
    return vector / np.linalg.norm(vector)


def vectors(answer):
    assert [item["index"] for item in answer["data"]] == list(
        range(len(answer["data"]))
    )
    assert {item["object"] for item in answer["data"]} == {"embedding"}
    return [np.array(item["embedding"]) for item in answer["data"]]


# With BOS a text has a token more than letters.
FORMS = [
    ("abc", [4]),
    (["abc", "a"], [4, 2]),
    ([7, 8, 9], [3]),
    ([[7, 8, 9], [5]], [3, 1]),
]


@pytest.mark.parametrize(("value", "counts"), FORMS)
def test_forms_of_inputs(serve, value, counts):
    async def body(running):
        status, _, answer = await running.post(PATH, embedding(value))
        assert status == 200
        for vector, count in zip(vectors(answer), counts, strict=True):
            np.testing.assert_allclose(vector, unit(raw(count)), atol=1e-6)
        assert answer["object"] == "list"
        assert answer["model"] == MODEL
        assert answer["id"].startswith("embd-")
        total = sum(counts)
        assert answer["usage"] == {"prompt_tokens": total, "total_tokens": total}

    serve(body)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"normalize": False}, raw(3)),
        ({"use_activation": False}, raw(3)),
        ({"use_activation": True, "normalize": True}, unit(raw(3))),
        ({"dimensions": 2}, unit(raw(3)[:2])),
        ({"dimensions": WIDTH}, unit(raw(3))),
        ({"dimensions": 2, "normalize": False}, raw(3)[:2]),
        ({"add_special_tokens": False, "normalize": False}, raw(2)),
        ({"truncate_prompt_tokens": 1, "normalize": False}, raw(1)),
        ({"truncate_prompt_tokens": -1, "normalize": False}, raw(3)),
        ({"encoding_format": "float", "user": "someone"}, unit(raw(3))),
    ],
    ids=str,
)
def test_fields_that_change_the_vector(serve, fields, expected):
    async def body(running):
        _, _, answer = await running.post(PATH, embedding(**fields))
        (vector,) = vectors(answer)
        np.testing.assert_allclose(vector, expected, rtol=1e-6)

    serve(body)


def test_fields_that_the_engine_gets(serve):
    async def body(running):
        fields = {"pooling": "mean", "priority": -3, "cache_salt": "s"}
        _, _, answer = await running.post(PATH, embedding(**fields, request_id="mine"))
        (added,) = running.engine.added
        assert (added.pooling.pooling, added.priority) == ("mean", -3)
        assert added.cache_salt == "s"
        assert answer["id"] == "embd-mine"

    serve(body)


ERRORS = [
    ({"input": ""}, "input", "empty_string"),
    ({"input": ["a", ""]}, "input", "empty_string"),
    ({"input": []}, "input", "empty_array"),
    ({"input": [[]]}, "input", "empty_array"),
    ({"input": None}, "input", None),
    ({"input": 5}, "input", None),
    ({"input": {"text": "a"}}, "input", None),
    ({"input": ["a", [1]]}, "input", None),
    ({"input": [1, "a"]}, "input", None),
    ({"input": [1.5]}, "input", None),
    ({"input": [-1]}, "input", None),
    ({"input": [100_000]}, "input", "invalid_value"),
    ({"input": ["a"] * 2049}, "input", "array_above_max_length"),
    ({"input": "x" * 128}, "input", "context_length_exceeded"),
    ({"input": ["a", "x" * 128]}, "input", "context_length_exceeded"),
    ({"dimensions": 0}, "dimensions", "integer_below_min_value"),
    ({"dimensions": WIDTH + 1}, "dimensions", "invalid_value"),
    ({"dimensions": 1.5}, "dimensions", "invalid_type"),
    ({"encoding_format": "bytes"}, "encoding_format", "invalid_value"),
    ({"pooling": "max"}, "pooling", "invalid_value"),
    ({"normalize": 1}, "normalize", "invalid_type"),
    ({"normalize": True, "use_activation": False}, "use_activation", None),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "invalid_value"),
    ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens", None),
    ({"messages": []}, "messages", "unsupported_parameter"),
    ({"embed_dtype": "float16"}, "embed_dtype", "unsupported_parameter"),
    ({"endianness": "big"}, "endianness", "unsupported_parameter"),
    ({"padding": True}, "padding", "unsupported_parameter"),
    ({"truncation_side": "right"}, "truncation_side", "unsupported_parameter"),
]


def test_errors(serve):
    async def body(running):
        for fields, param, code in ERRORS:
            status, _, answer = await running.post(PATH, embedding() | fields)
            assert status == 400, (fields, answer)
            check_error(answer, param, code)
        missing = {"model": MODEL}
        status, _, answer = await running.post(PATH, missing)
        assert (status, answer["error"]["param"]) == (400, "input")
        status, _, answer = await running.post(PATH, embedding(model="nope"))
        assert (status, answer["error"]["code"]) == (404, "model_not_found")
        assert not [added for added in running.engine.added if added.params.n != 1]
        await check_unharmed(running)

    serve(body)


def test_a_prompt_as_long_as_the_context(serve):
    async def body(running):
        # 127 letters and BOS; a completion would have no room for its token.
        status, _, answer = await running.post(PATH, embedding("x" * 127))
        assert status == 200
        assert answer["usage"]["prompt_tokens"] == 128

    serve(body)


def test_an_output_that_is_not_finite(serve):
    async def body(running):
        def fail_one(engine):
            engine.error_for = engine.added[-1].request_id

        running.engine.on_step = fail_one
        status, _, answer = await running.post(PATH, embedding(["a", "b"]))
        assert (status, answer["error"]["code"]) == (500, "numerical_error")
        running.engine.on_step, running.engine.error_for = None, None
        await check_unharmed(running)

    serve(body)


def test_admission_and_drain(serve):
    async def body(running):
        hold = asyncio.Event()
        loop = asyncio.get_running_loop()
        running.engine.on_step = lambda _: asyncio.run_coroutine_threadsafe(
            hold.wait(), loop
        ).result()
        first = asyncio.create_task(running.post(PATH, embedding(["a", "b"])))
        while running.server.admission.num_queued < 2:
            await asyncio.sleep(0.001)
        status, headers, answer = await running.post(PATH, embedding())
        assert (status, answer["error"]["type"]) == (429, "rate_limit_error")
        assert int(headers["Retry-After"]) >= 1
        running.server.set_draining()
        status, _, answer = await running.post(PATH, embedding())
        assert (status, answer["error"]["code"]) == (503, "shutting_down")
        # What was accepted is finished.
        hold.set()
        status, _, answer = await first
        assert status == 200
        assert len(answer["data"]) == 2
        await running.idle()

    serve(body, max_num_queued_reqs=2)


def test_a_client_that_leaves_ends_its_requests(serve):
    async def body(running):
        hold = asyncio.Event()
        loop = asyncio.get_running_loop()
        running.engine.on_step = lambda _: asyncio.run_coroutine_threadsafe(
            hold.wait(), loop
        ).result()
        asked = asyncio.create_task(running.post(PATH, embedding(["a", "b"])))
        while len(running.engine.added) < 1:
            await asyncio.sleep(0.001)
        asked.cancel()
        while running.server.admission.num_open:
            await asyncio.sleep(0.001)
        hold.set()
        await running.idle()
        assert running.llm.num_open == 0

    serve(body)


def test_it_needs_the_key(serve):
    async def body(running):
        status, _, _ = await running.post(PATH, embedding())
        assert status == 401
        key = {"Authorization": "Bearer secret"}
        status, _, _ = await running.post(PATH, embedding(), headers=key)
        assert status == 200

    serve(body, api_key=["secret"])


def test_it_is_counted(serve):
    async def body(running):
        await running.post(PATH, embedding(["abc", "a"]))
        text = running.server.metrics.render().decode()
        labels = f'{{engine="0",model_name="{MODEL}"}}'
        assert f"jllm:prompt_tokens_total{labels} 6.0" in text
        assert f"jllm:generation_tokens_total{labels} 0.0" in text
        assert f"jllm:request_prompt_tokens_count{labels} 1.0" in text
        assert 'finished_reason="stop",model_name="fake"} 2.0' in text
        assert 'http_requests_total{handler="/v1/embeddings",method="POST"' in text

    serve(body)


def test_many_numbers_are_written_beside_the_event_loop(serve, monkeypatch):
    monkeypatch.setattr("server.routes.embeddings.MOST_NUMBERS_AT_ONCE", 1)

    async def body(running):
        _, _, answer = await running.post(PATH, embedding(["abc", "a"]))
        found = vectors(answer)
        np.testing.assert_allclose(found[1], unit(raw(2)), atol=1e-6)

    serve(body)


def test_base64_is_little_endian_float32(serve):
    async def body(running):
        fields = {"encoding_format": "base64", "normalize": False}
        _, _, answer = await running.post(PATH, embedding(**fields))
        data = base64.b64decode(answer["data"][0]["embedding"])
        np.testing.assert_array_equal(np.frombuffer(data, "<f4"), raw(3))

    serve(body)


@pytest.mark.parametrize("form", ["float", "base64", None])
def test_the_client_of_openai(serve, form):
    """Asked for nothing, the client asks for base64 itself."""

    async def body(running):
        more = {} if form is None else {"encoding_format": form}
        async with openai.AsyncOpenAI(
            base_url=f"{running.url}/v1", api_key="none", max_retries=0
        ) as client:
            answer = await client.embeddings.create(
                model=MODEL, input=["abc", "a"], dimensions=4, **more
            )
            found = [item.embedding for item in answer.data]
            if form == "base64":
                found = [np.frombuffer(base64.b64decode(f), "<f4") for f in found]
            np.testing.assert_allclose(found[0], unit(raw(4)[:4]), atol=1e-6)
            np.testing.assert_allclose(found[1], unit(raw(2)[:4]), atol=1e-6)
            assert answer.usage.prompt_tokens == answer.usage.total_tokens == 6
            with pytest.raises(openai.BadRequestError) as wrong:
                await client.embeddings.create(model=MODEL, input="")
            assert wrong.value.param == "input"

    serve(body)
