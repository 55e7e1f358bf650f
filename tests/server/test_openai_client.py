"""The real client of OpenAI against the server, over a socket."""

import asyncio

import openai
import pytest

from tests.server.fakes import MODEL

MESSAGES = [{"role": "user", "content": "hi"}]


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


def test_completion(ask):
    async def body(client, running):
        answer = await client.completions.create(model=MODEL, prompt="a", max_tokens=32)
        assert answer.id.startswith("cmpl-")
        assert answer.object == "text_completion"
        assert answer.choices[0].text == "hello world"
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage.prompt_tokens == 2
        assert answer.usage.completion_tokens == 12
        assert answer.usage.total_tokens == 14
        assert answer.usage.prompt_tokens_details.cached_tokens == 3

    ask(body)


def test_chat(ask):
    async def body(client, running):
        answer = await client.chat.completions.create(
            model=MODEL, messages=MESSAGES, max_completion_tokens=5
        )
        assert answer.id.startswith("chatcmpl-")
        assert answer.object == "chat.completion"
        message = answer.choices[0].message
        assert (message.role, message.content) == ("assistant", "hello")
        assert message.refusal is None
        assert answer.choices[0].finish_reason == "length"

    ask(body)


def test_chat_stream(ask):
    async def body(client, running):
        stream = await client.chat.completions.create(
            model=MODEL,
            messages=MESSAGES,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
        *middle, last = chunks
        assert {chunk.id for chunk in chunks} == {chunks[0].id}
        assert {chunk.created for chunk in chunks} == {chunks[0].created}
        assert middle[0].choices[0].delta.role == "assistant"
        assert middle[0].choices[0].delta.content == ""
        text = "".join(c.choices[0].delta.content or "" for c in middle)
        assert text == "hello world"
        assert middle[-1].choices[0].finish_reason == "stop"
        assert middle[-1].choices[0].delta.content is None
        assert [c.choices[0].finish_reason for c in middle[:-1]] == [None] * (
            len(middle) - 1
        )
        assert last.choices == []
        assert last.usage.completion_tokens == 12

    ask(body)


def test_synchronous_client(ask):
    async def body(client, running):
        sync = openai.OpenAI(base_url=f"{running.url}/v1", api_key="none")

        def ask():
            stream = sync.completions.create(
                model=MODEL, prompt="a", max_tokens=32, stream=True
            )
            with stream:
                return "".join(c.choices[0].text for c in stream)

        assert await asyncio.to_thread(ask) == "hello world"
        models = await asyncio.to_thread(sync.models.list)
        assert [model.id for model in models] == [MODEL]
        sync.close()

    ask(body)


def test_errors_are_the_clients_own(ask):
    async def body(client, running):
        with pytest.raises(openai.NotFoundError) as missing:
            await client.completions.create(model="nope", prompt="a")
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as wrong:
            await client.completions.create(model=MODEL, prompt="a", temperature=3)
        assert wrong.value.param == "temperature"
        assert wrong.value.code == "decimal_above_max_value"

    ask(body)


def test_error_within_a_stream(ask):
    async def body(client, running):
        running.engine.fail_at = 4
        stream = await client.chat.completions.create(
            model=MODEL, messages=MESSAGES, stream=True
        )
        with pytest.raises(openai.APIError, match="engine has stopped"):
            async for _ in stream:
                pass

    ask(body)
