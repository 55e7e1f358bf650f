"""OpenAI's client: structured outputs, tools, many streams at once, Responses."""

import asyncio
import sys

import openai
import pydantic

MESSAGES = [{"role": "user", "content": "Once upon a time"}]
NUM_STREAMS = 32


class Animal(pydantic.BaseModel):
    legs: int = pydantic.Field(ge=0, le=8)
    wild: bool


def check_parse(client, model):
    answer = client.chat.completions.parse(
        model=model, messages=MESSAGES, response_format=Animal, max_tokens=400
    )
    assert isinstance(answer.choices[0].message.parsed, Animal), answer
    stream = client.chat.completions.stream(
        model=model, messages=MESSAGES, response_format=Animal, max_tokens=400
    )
    with stream as events:
        final = events.get_final_completion()
    assert isinstance(final.choices[0].message.parsed, Animal), final


def check_tools(client, model):
    answer = client.chat.completions.parse(
        model=model,
        messages=MESSAGES,
        tools=[openai.pydantic_function_tool(Animal)],
        tool_choice="required",
        max_tokens=400,
    )
    for call in answer.choices[0].message.tool_calls:
        assert isinstance(call.function.parsed_arguments, Animal), call


def check_responses(client, model):
    answer = client.responses.create(model=model, input="Once", max_output_tokens=8)
    assert answer.usage.output_tokens == 8, answer
    assert client.responses.retrieve(answer.id).output_text == answer.output_text
    events = client.responses.create(
        model=model, input="Once", max_output_tokens=8, stream=True
    )
    kinds = [event.type for event in events]
    assert kinds[0] == "response.created"
    assert kinds[-1] in ("response.completed", "response.incomplete"), kinds


async def check_many_streams(url, model):
    async with openai.AsyncOpenAI(base_url=url, api_key="none") as client:

        async def ask(i):
            stream = await client.chat.completions.create(
                model=model,
                messages=MESSAGES,
                max_tokens=16,
                seed=i,
                stream=True,
                stream_options={"include_usage": True},
            )
            chunks = [chunk async for chunk in stream]
            assert chunks[-2].choices[0].finish_reason in ("stop", "length")
            return chunks[-1].usage.completion_tokens

        counts = await asyncio.gather(*(ask(i) for i in range(NUM_STREAMS)))
    assert all(1 <= count <= 16 for count in counts), counts


def main(url):
    url = f"{url}/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        model = client.models.list().data[0].id
        check_parse(client, model)
        check_tools(client, model)
        check_responses(client, model)
    asyncio.run(check_many_streams(url, model))


if __name__ == "__main__":
    main(*sys.argv[1:])
