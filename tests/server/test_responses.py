"""/v1/responses, mostly through OpenAI's own client."""

import asyncio
import threading

import openai
import pytest

from tests.server.fakes import MODEL

PATH = "/v1/responses"


@pytest.fixture
def ask(serve):
    """Runs `body(client, running)` against a server."""

    def ask(body, *arguments, **options):
        async def with_client(running):
            async with openai.AsyncOpenAI(
                base_url=f"{running.url}/v1", api_key="none", max_retries=0
            ) as client:
                await body(client, running)

        serve(with_client, *arguments, **options)

    return ask


def prompt_of(running):
    tokens = running.engine.added[-1].prompt_token_ids
    return bytes(token for token in tokens if token < 256).decode()


def test_create(ask):
    async def body(client, running):
        response = await client.responses.create(
            model=MODEL, input="hi", instructions="be brief", metadata={"a": "b"}
        )
        assert response.id.startswith("resp_")
        assert response.status == "completed"
        assert response.output_text == "hello world"
        assert [item.type for item in response.output] == ["message"]
        assert response.usage.output_tokens == 12
        assert response.usage.input_tokens_details.cached_tokens == 3
        assert response.metadata == {"a": "b"}
        assert prompt_of(running) == "system: be brief\nuser: hi\nassistant:"
        cut = await client.responses.create(
            model=MODEL, input="hi", max_output_tokens=5, store=False
        )
        assert (cut.status, cut.output_text) == ("incomplete", "hello")
        assert cut.incomplete_details.reason == "max_output_tokens"
        assert cut.output[0].status == "incomplete"
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(cut.id)

    ask(body)


def test_stream(ask):
    async def body(client, running):
        stream = await client.responses.create(model=MODEL, input="hi", stream=True)
        events = [event async for event in stream]
        kinds = [event.type for event in events]
        assert kinds[:4] == [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added",
        ]
        assert kinds[-4:] == [
            "response.output_text.done",
            "response.content_part.done",
            "response.output_item.done",
            "response.completed",
        ]
        assert set(kinds[4:-4]) == {"response.output_text.delta"}
        assert [event.sequence_number for event in events] == list(range(len(events)))
        text = "".join(event.delta for event in events[4:-4])
        assert text == events[-1].response.output_text == "hello world"
        assert events[0].response.status == "in_progress"

    ask(body)


def test_turns_are_remembered_within_bounds(ask):
    async def body(client, running):
        first = await client.responses.create(model=MODEL, input="one")
        found = await client.responses.retrieve(first.id)
        assert found.output_text == "hello world"
        second = await client.responses.create(
            model=MODEL, input="two", previous_response_id=first.id
        )
        assert prompt_of(running) == (
            "user: one\nassistant: hello world\nuser: two\nassistant:"
        )
        assert second.previous_response_id == first.id
        await client.responses.create(model=MODEL, input="three")
        with pytest.raises(openai.NotFoundError) as gone:
            await client.responses.retrieve(first.id)
        assert gone.value.code == "response_not_found"
        await client.responses.delete(second.id)
        with pytest.raises(openai.NotFoundError):
            await client.responses.create(
                model=MODEL, input="x", previous_response_id=second.id
            )

    ask(body, max_stored_responses=2)


def test_background_responses_leave_room_for_no_more(ask):
    async def body(client, running):
        gate = threading.Event()
        running.engine.on_step = lambda _: gate.wait(20)
        first = await client.responses.create(model=MODEL, input="hi", background=True)
        with pytest.raises(openai.RateLimitError):
            await client.responses.create(model=MODEL, input="ho", background=True)
        assert running.server.admission.num_open == 1
        assert (await client.responses.cancel(first.id)).status == "cancelled"
        gate.set()
        await client.responses.create(model=MODEL, input="ho", background=True)

    ask(body, max_stored_responses=1)


def test_background(ask):
    async def body(client, running):
        gate = threading.Event()
        running.engine.on_step = lambda _: gate.wait(20)
        waiting = await client.responses.create(
            model=MODEL, input="hi", background=True
        )
        assert waiting.status == "queued"
        assert running.server.admission.num_open == 1
        other = await client.responses.create(model=MODEL, input="ho", background=True)
        cancelled = await client.responses.cancel(other.id)
        assert cancelled.status == "cancelled"
        gate.set()
        while (found := await client.responses.retrieve(waiting.id)).status != (
            "completed"
        ):
            await asyncio.sleep(0.01)
        assert found.output_text == "hello world"
        await running.idle()
        assert running.server.background == {}
        plain = await client.responses.create(model=MODEL, input="hi")
        with pytest.raises(openai.BadRequestError):
            await client.responses.cancel(plain.id)

    ask(body)


def test_a_failure_within_a_stream(ask):
    async def body(client, running):
        running.engine.on_step = lambda _: threading.Event().wait(0.02)
        stream = await client.responses.create(model=MODEL, input="hi", stream=True)
        kinds = [event.type async for event in stream]
        assert kinds[-1] == "error"

    ask(body, "x" * 100, request_timeout=0.4)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": [3]}, "input.0"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0.type"),
        ({"input": [{"role": "user", "content": 3}]}, "input.0.content"),
        ({"input": "x" * 200}, "input"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"truncation": "auto"}, "truncation"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"reasoning": {"summary": "auto"}}, "reasoning.summary"),
        ({"include": ["file_search_call.results"]}, "include.0"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"previous_response_id": "resp_x"}, "previous_response_id"),
        ({"background": True, "stream": True}, "background"),
        ({"background": True, "store": False}, "background"),
        ({"conversation": "x"}, "conversation"),
        ({"max_tool_calls": 1}, "max_tool_calls"),
        ({"stream_options": {}}, "stream_options"),
    ],
    ids=str,
)
def test_bad_requests(serve, fields, param):
    async def body(running):
        request = {"model": MODEL, "input": "hi"} | fields
        status, _, answer = await running.post(PATH, request)
        assert status in (400, 404), answer
        assert answer["error"]["param"] == param, answer
        status, _, answer = await running.post(PATH, {"model": MODEL, "input": "hi"})
        assert status == 200, answer

    serve(body)


def test_responses_belong_to_their_key(serve):
    async def body(running):
        mine = {"Authorization": "Bearer a"}
        request = {"model": MODEL, "input": "hi"}
        _, _, answer = await running.post(PATH, request, mine)
        path = f"{PATH}/{answer['id']}"
        assert (await running.get(path, mine))[0] == 200
        other = {"Authorization": "Bearer b"}
        assert (await running.get(path, other))[0] == 404
        request["previous_response_id"] = answer["id"]
        assert (await running.post(PATH, request, other))[0] == 404

    serve(body, api_key=["a", "b"])
