"""The life of a server process: signals, drains, deaths."""

import asyncio
import contextlib
import json
import pathlib
import re
import signal
import socket
import sys

import aiohttp
import openai
import psutil
import pytest

pytestmark = pytest.mark.slow
ROOT = pathlib.Path(__file__).parents[2]
SECONDS = 60
REQUEST = {"model": "fake", "prompt": "hi", "max_tokens": 100}


@contextlib.asynccontextmanager
async def process(**options):
    """Starts a process; yields it and its URL when it is ready."""
    arguments = json.dumps({"port": 0} | options)
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.server.process", arguments),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        lines = []
        while not (lines and lines[-1].startswith("ready on ")):
            line = await asyncio.wait_for(child.stdout.readline(), SECONDS)
            assert line, "".join(lines)
            lines.append(line.decode())
        yield child, re.search(r"http://\S+", lines[-1])[0]
    finally:
        if child.returncode is None:
            child.kill()
        await child.communicate()


async def stream(session, url):
    async with session.post(
        f"{url}/v1/completions", json=REQUEST | {"stream": True}
    ) as response:
        assert response.status == 200
        yield response
        async for line in response.content:
            yield line


def run(body):
    asyncio.run(asyncio.wait_for(body(), SECONDS))


def test_drain():
    async def body():
        async with process() as (child, url), aiohttp.ClientSession() as session:
            sockets = psutil.Process(child.pid).net_connections("inet")
            listening = [s for s in sockets if s.status == psutil.CONN_LISTEN]
            assert len(listening) == 1
            assert listening[0].laddr.ip == "127.0.0.1"
            lines = stream(session, url)
            await anext(lines)
            child.send_signal(signal.SIGTERM)
            async with session.get(f"{url}/ready") as response:
                while response.status == 200:
                    response = await session.get(f"{url}/ready")
            async with session.post(f"{url}/v1/completions", json=REQUEST) as refused:
                assert refused.status == 503
                assert refused.headers["Connection"] == "close"
            text = b"".join([line async for line in lines])
            assert text.endswith(b"data: [DONE]\n\n")
            assert b'"finish_reason":"length"' in text
            assert await asyncio.wait_for(child.wait(), 10) == 0

    run(body)


def test_a_second_signal_stops_at_once():
    async def body():
        async with process() as (child, url), aiohttp.ClientSession() as session:
            lines = stream(session, url)
            await anext(lines)
            child.send_signal(signal.SIGTERM)
            while (await session.get(f"{url}/ready")).status == 200:
                pass
            child.send_signal(signal.SIGTERM)
            assert await asyncio.wait_for(child.wait(), 1) == 128 + signal.SIGTERM
            with contextlib.suppress(aiohttp.ClientError):
                await lines.aclose()

    run(body)


@pytest.mark.slow
def test_a_port_is_handed_over():
    """Clients that try again, as OpenAI's does, notice nothing."""

    async def ask(client, counts, over):
        while not over.is_set():
            answer = await client.completions.create(**REQUEST | {"max_tokens": 5})
            counts.append(answer.usage.completion_tokens)

    async def body():
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            options = {"port": probe.getsockname()[1], "reuse_port": True}
        counts, over = [], asyncio.Event()
        async with process(**options) as (old, url):
            # A log that nobody reads would stop the server in the end.
            log = asyncio.create_task(old.stdout.read())
            client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none")
            asking = [asyncio.create_task(ask(client, counts, over)) for _ in range(4)]
            async with process(**options) as (new, _):
                more = asyncio.create_task(new.stdout.read())
                served = len(counts)
                assert served > 0
                old.send_signal(signal.SIGTERM)
                assert await asyncio.wait_for(old.wait(), 10) == 0
                while len(counts) < served + 20:
                    await asyncio.sleep(0.01)
                over.set()
                await asyncio.gather(*asking)
                assert set(counts) == {5}
                assert new.returncode is None
                await log
                more.cancel()
            await client.close()

    run(body)


def test_the_drain_has_an_end():
    async def body():
        options = {"step_seconds": 0.2, "shutdown_timeout": 0.5}
        async with (
            process(**options) as (child, url),
            aiohttp.ClientSession() as session,
        ):
            lines = stream(session, url)
            await anext(lines)
            child.send_signal(signal.SIGTERM)
            text = b"".join([line async for line in lines])
            assert b'"code":"engine_dead"' in text
            assert text.endswith(b"data: [DONE]\n\n")
            assert await asyncio.wait_for(child.wait(), 5) == 0

    run(body)


def test_a_dead_engine_ends_the_process():
    async def body():
        async with (
            process(raise_at=20) as (child, url),
            aiohttp.ClientSession() as session,
        ):
            lines = stream(session, url)
            await anext(lines)
            text = b"".join([line async for line in lines])
            assert b'"code":"engine_dead"' in text
            assert text.endswith(b"data: [DONE]\n\n")
            assert await asyncio.wait_for(child.wait(), 10) == 1

    run(body)


@pytest.mark.slow
def test_a_hanging_engine_does_not_keep_the_process():
    async def body():
        options = {"hang_at": 5, "stall_timeout": 0.3, "shutdown_timeout": 0.3}
        async with (
            process(**options) as (child, url),
            aiohttp.ClientSession() as session,
        ):
            lines = stream(session, url)
            await anext(lines)
            while (await session.get(f"{url}/health")).status == 200:
                await asyncio.sleep(0.05)
            child.send_signal(signal.SIGTERM)
            assert await asyncio.wait_for(child.wait(), 15) == 0
            with contextlib.suppress(aiohttp.ClientError):
                await lines.aclose()

    run(body)
