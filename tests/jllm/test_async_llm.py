"""Online generation in an event loop, on an engine whose tokens are known."""

import asyncio
import threading

import pytest

from jllm.async_llm import AsyncLLM
from jllm.errors import EngineStoppedError, InvalidRequestError
from jllm.text.output import RequestStream
from jllm.types import RequestOutputKind, SamplingParams
from tests.fakes import BOS, FakeEngine

SECONDS = 20
DELTA = RequestOutputKind.DELTA


def echo(request, index):
    return bytes(i for i in request.prompt_token_ids if i < 256).decode() + str(index)


def params(**fields):
    return SamplingParams(**{"max_tokens": None, "output_kind": DELTA} | fields)


@pytest.fixture
def serve(monkeypatch):
    """Runs `body(llm, engine)` in an event loop."""

    def serve(body, *arguments, **fake):
        engine = FakeEngine(*arguments, **fake)
        monkeypatch.setattr("jllm.async_llm.create_engine", lambda config: engine)

        async def run():
            async with AsyncLLM("model") as llm:
                await asyncio.wait_for(body(llm, engine), SECONDS)

        asyncio.run(run())
        assert engine.closed == 1

    return serve


async def collect(outputs):
    return [output async for output in outputs]


async def idle(llm, engine):
    """Until the engine has nothing to do; each turn waits for its thread."""
    while await asyncio.wrap_future(llm._loop.call(lambda: engine.has_unfinished)):
        pass


def test_many_requests_at_once(serve):
    async def body(llm, engine):
        prompts = [f"prompt {i}" for i in range(20)]
        found = await asyncio.gather(
            *(collect(llm.generate(p, params(), f"id {p}")) for p in prompts)
        )
        for prompt, outputs in zip(prompts, found, strict=True):
            assert "".join(o.outputs[0].text for o in outputs) == prompt + "0"
            assert [o.finished for o in outputs].count(True) == 1
            assert outputs[-1].finished
        assert llm.num_open == 0

    serve(body, echo)


def test_tokens_without_a_text_fail_their_reader_alone(serve, monkeypatch):
    push = RequestStream.push

    def fail_or_push(self, output):
        if self.request_id == "bad":
            raise ValueError("no text")
        return push(self, output)

    monkeypatch.setattr(RequestStream, "push", fail_or_push)

    async def body(llm, engine):
        bad = asyncio.create_task(collect(llm.generate("a", params(), "bad")))
        good = await collect(llm.generate("abc", params(), "good"))
        assert "".join(o.outputs[0].text for o in good) == "abc0"
        with pytest.raises(ValueError, match="no text"):
            await bad
        await idle(llm, engine)
        assert llm.num_open == 0

    serve(body, echo)


@pytest.mark.parametrize("kind", list(RequestOutputKind))
def test_output_kinds(serve, kind):
    async def body(llm, engine):
        outputs = await collect(llm.generate("abc", params(output_kind=kind)))
        texts = [output.outputs[0].text for output in outputs]
        if kind is DELTA:
            texts = ["".join(texts)]
        assert texts[-1] == "abc0"
        assert len(outputs) == 1 or kind is not RequestOutputKind.FINAL_ONLY

    serve(body, echo)


def test_defaults_and_chat(serve):
    async def body(llm, engine):
        await collect(llm.generate("a"))
        assert engine.added[0].params.top_k == 7
        messages = [{"role": "user", "content": "Hi"}]
        outputs = await collect(llm.chat(messages, params()))
        assert outputs[-1].prompt == "<s>user: Hi\nassistant:"
        assert llm.get_tokenizer().encode("A") == [BOS, 65]
        assert await llm.reset_prefix_cache()
        assert llm.max_model_len == 128

    serve(body, echo)


def test_stop_string_ends_the_request_in_the_engine(serve):
    async def body(llm, engine):
        outputs = await collect(llm.generate("a", params(stop=" t"), "r"))
        assert "".join(o.outputs[0].text for o in outputs) == "one"
        assert outputs[-1].outputs[0].stop_reason == " t"
        await idle(llm, engine)
        assert engine.aborted in (["r"], [])

    serve(body, "one two" + "o" * 100)


@pytest.mark.parametrize("how", ["break", "cancel", "aclose"])
def test_leaving_early_aborts(serve, how):
    async def body(llm, engine):
        outputs = [llm.generate("a", params(), "r")]

        async def read():
            async for _ in outputs[0]:
                if how != "cancel":
                    break

        engine.on_step = lambda fake: fake.num_steps > 3 and gate.wait(SECONDS)
        gate = threading.Event()
        task = asyncio.ensure_future(read())
        while not engine.num_steps:
            await asyncio.sleep(0.001)
        if how == "cancel":
            task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        if how == "aclose":
            await outputs[0].aclose()
        outputs.clear()
        while llm.num_open:
            await asyncio.sleep(0.001)
        gate.set()
        await idle(llm, engine)
        assert engine.aborted == ["r"]
        again = await collect(llm.generate("a", params(max_tokens=2), "r"))
        assert again[-1].finished

    serve(body, "x" * 100)


def test_abort_gives_a_last_output(serve):
    async def body(llm, engine):
        outputs, gate = [], threading.Event()
        engine.on_step = lambda fake: fake.num_steps > 3 and gate.wait(SECONDS)
        async for output in llm.generate("a", params(), "r"):
            outputs.append(output)
            await llm.abort("r")
        gate.set()
        assert outputs[-1].finished
        assert outputs[-1].outputs[0].finish_reason == "abort"
        await llm.abort("r")
        await idle(llm, engine)

    serve(body, "x" * 100)


def test_duplicate_id_is_refused(serve):
    async def body(llm, engine):
        gate = threading.Event()
        engine.on_step = lambda fake: fake.num_steps > 1 and gate.wait(SECONDS)
        first = llm.generate("a", params(), "r")
        await anext(first)
        with pytest.raises(InvalidRequestError, match="in use"):
            await anext(llm.generate("b", params(), "r"))
        gate.set()
        assert (await collect(first))[-1].finished

    serve(body, echo)


@pytest.mark.parametrize(
    ("prompt", "sampling", "word"),
    [
        (5, None, "prompt"),
        ([9999], None, "vocabulary"),
        ("x" * 3000, None, "prompt has 3001"),
        ("a", "hot", "SamplingParams"),
    ],
)
def test_bad_requests(serve, prompt, sampling, word):
    async def body(llm, engine):
        with pytest.raises(InvalidRequestError, match=word):
            await collect(llm.generate(prompt, sampling, "r"))
        assert (llm.num_open, engine.added) == (0, [])
        assert await collect(llm.generate("a", params(), "r"))

    serve(body, echo)


def test_failed_engine_fails_everything(serve):
    async def body(llm, engine):
        assert (llm.is_running, llm.errored) == (True, False)
        tasks = [collect(llm.generate("a", params())) for _ in range(3)]
        for error in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(error, EngineStoppedError)
            assert "the device is gone" in str(error)
        assert (llm.is_running, llm.errored) == (False, True)
        assert "the device is gone" in str(llm.dead_error)
        with pytest.raises(EngineStoppedError, match="the device is gone"):
            await collect(llm.generate("a"))

    serve(body, "x" * 100, fail_at=1)


def test_shutdown_fails_what_is_open(serve):
    async def body(llm, engine):
        outputs = llm.generate("a", params())
        engine.on_step = lambda fake: gate.wait(SECONDS)
        gate = threading.Event()
        task = asyncio.ensure_future(collect(outputs))
        while not engine.num_steps:
            await asyncio.sleep(0.001)
        closing = asyncio.ensure_future(asyncio.to_thread(llm.shutdown))
        while llm.is_running:
            await asyncio.sleep(0.001)
        gate.set()
        await closing
        with pytest.raises(EngineStoppedError, match="shut down"):
            await task
        with pytest.raises(EngineStoppedError):
            await collect(llm.generate("a"))
        llm.shutdown()

    serve(body, "x" * 100)


def test_another_event_loop(monkeypatch):
    engine = FakeEngine(echo)
    monkeypatch.setattr("jllm.async_llm.create_engine", lambda config: engine)
    llm = AsyncLLM.from_engine_config(AsyncLLM("model").config)
    for _ in range(2):
        outputs = asyncio.run(collect(llm.generate("ab", params())))
        assert "".join(o.outputs[0].text for o in outputs) == "ab0"
    llm.shutdown()
