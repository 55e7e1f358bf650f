"""A server over the fake engine, and a client that speaks plain HTTP to it."""

import asyncio
import contextlib
import json

import aiohttp
import pytest
from aiohttp import web

from jllm.async_llm import AsyncLLM
from server.app import make_app
from server.auth import load_keys
from server.config import ServerConfig
from server.serving import make_runner, make_tls
from server.state import Server
from tests.fakes import FakeEngine

MODEL = "fake"
SECONDS = 30
JSON = {"Content-Type": "application/json"}


class Running:
    """A server that runs, and a session to it."""

    def __init__(self, server, llm, engine, url, session):
        self.server, self.llm, self.engine = server, llm, engine
        self.url, self.session = url, session
        self.app = None

    def server_routes(self):
        """The routes of the application."""
        return list(self.app.router.routes())

    async def post(self, path, body, headers=None):
        """Posts JSON, or bytes as they are; returns status, headers and JSON."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        async with self.session.post(
            self.url + path, data=data, headers=JSON | (headers or {})
        ) as response:
            return response.status, response.headers, await response.json()

    async def get(self, path, headers=None):
        async with self.session.get(self.url + path, headers=headers) as response:
            return response.status, response.headers, await response.json()

    async def stream(self, path, body, headers=None):
        """Posts a request for a stream; returns the text of its events."""
        async with self.session.post(
            self.url + path, json=body | {"stream": True}, headers=headers
        ) as response:
            assert response.status == 200, await response.text()
            assert response.headers["Content-Type"].startswith("text/event-stream")
            return events_of(await response.text())

    async def idle(self):
        """Until nothing is open; each turn waits for the engine's thread."""
        while self.llm.num_open or self.server.admission.num_open or self.llm.is_busy:
            await asyncio.wrap_future(self.llm._loop.call(lambda: None))


def events_of(text):
    """Splits a stream into the data of its events."""
    blocks = [b for b in text.split("\n\n") if b and not b.startswith(":")]
    assert all(block.startswith(("data: ", "event: ")) for block in blocks)
    data = [block.partition("data: ")[2] for block in blocks]
    return [d if d == "[DONE]" else json.loads(d) for d in data]


def chat(content="hi", **fields):
    messages = [{"role": "user", "content": content}]
    return {"model": MODEL, "messages": messages, "max_tokens": 32} | fields


def completion(prompt="hi", **fields):
    return {"model": MODEL, "prompt": prompt, "max_tokens": 32} | fields


@contextlib.asynccontextmanager
async def running_server(monkeypatch, answer="hello world", *, engine=None, **options):
    """Runs a server; options are those of `ServerConfig`."""
    engine = engine or FakeEngine(answer)
    monkeypatch.setattr("jllm.async_llm.create_engine", lambda config: engine)
    config = ServerConfig(port=0, **options)
    server = Server(config, MODEL)
    app = make_app(server, load_keys(config))
    runner = make_runner(app)
    await runner.setup()
    tls = make_tls(config)
    site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls)
    await site.start()
    port = runner.addresses[0][1]
    async with AsyncLLM("model") as llm, aiohttp.ClientSession() as session:
        server.set_ready(llm, "test")
        url = f"{'https' if tls else 'http'}://127.0.0.1:{port}"
        running = Running(server, llm, engine, url, session)
        running.app = app
        try:
            yield running
        finally:
            await session.close()
            await runner.cleanup()
            server.close()


@pytest.fixture
def serve(monkeypatch):
    """Runs `body(running)` against a server; keywords are those of `running_server`."""

    def serve(body, *arguments, **keywords):
        async def run():
            async with running_server(monkeypatch, *arguments, **keywords) as running:
                await asyncio.wait_for(body(running), SECONDS)

        asyncio.run(run())

    return serve
