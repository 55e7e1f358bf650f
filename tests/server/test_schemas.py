"""Schemas that are made to hurt: an answer in time, and nobody else waits."""

import asyncio
import io
import json

import pytest

from tests.server.fakes import JSON, chat, completion

CHAT = "/v1/chat/completions"


def nested(depth):
    return '{"type":"object","properties":{"a":' * depth + "{}" + "}}" * depth


def prop(**schema):
    kind = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return json.dumps(kind | {"additionalProperties": False})


HOSTILE = {
    "nested 300 deep": nested(300),
    "nested 10,000 deep": nested(10_000),
    "50,000 properties": json.dumps(
        {"type": "object", "properties": {f"p{i}": {} for i in range(50_000)}}
    ),
    "a pattern that backtracks": prop(type="string", pattern="(a+)+$"),
    "a repetition": prop(type="string", pattern="((a{1,999}){1,999}){1,999}"),
    "a long string": prop(type="string", minLength=10**9, maxLength=10**9),
    "100,000 choices": prop(enum=[f"choice {i}" for i in range(100_000)]),
    "many items": prop(type="array", items={"type": "null"}, minItems=10**7),
    "a reference to itself": json.dumps({"$ref": "#"}),
    "references that double": json.dumps(
        {
            "$ref": "#/$defs/d0",
            "$defs": {
                f"d{i}": {
                    "type": "array",
                    "prefixItems": 2 * [{"$ref": f"#/$defs/d{j}"}],
                }
                for i, j in enumerate([*range(1, 30), 29])
            },
        }
    ),
    "a number with bounds": prop(type="integer", minimum=10**300, maximum=10**301),
}


def request(schema):
    """A request with a schema, put in as text: some are too deep for a writer."""
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": "HERE"}}
    return json.dumps(chat(response_format=form)).replace('"HERE"', schema).encode()


async def post(running, body):
    data = {"data": io.BytesIO(body), "headers": JSON}
    async with running.session.post(running.url + CHAT, **data) as response:
        return response.status, await response.json()


async def check_unharmed(running):
    status, _, answer = await running.post("/v1/completions", completion())
    assert (status, answer["choices"][0]["text"]) == (200, "hello world")


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile(serve, name):
    async def body(running):
        asked = asyncio.create_task(post(running, request(HOSTILE[name])))
        # Others are served meanwhile.
        await check_unharmed(running)
        status, answer = await asked
        # The fake engine does not keep to a schema; one that compiles gets that far.
        assert status in (200, 400), answer
        if status == 400:
            assert answer["error"]["message"]
            assert answer["error"]["type"] == "invalid_request_error"
        await check_unharmed(running)

    serve(body)


UNSATISFIABLE = {
    "no choice": prop(enum=[]),
    "bounds that cross": prop(type="integer", minimum=5, maximum=4),
    "lengths that cross": prop(type="string", minLength=5, maxLength=4),
    "counts that cross": prop(type="array", minItems=5, maxItems=4),
    "false": "false",
    "a property that is false": prop(**{"not": {}}),
    "no kind": prop(type=[]),
}


@pytest.mark.parametrize("name", UNSATISFIABLE)
def test_unsatisfiable(serve, name):
    async def body(running):
        status, _, answer = await running.post(CHAT, request(UNSATISFIABLE[name]))
        assert status == 400, answer
        assert answer["error"]["type"] == "invalid_request_error"
        assert answer["error"]["param"].startswith("response_format"), answer
        assert not running.engine.added
        await check_unharmed(running)

    serve(body)
