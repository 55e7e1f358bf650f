"""From the engine through the output thread to readers in an event loop."""

import asyncio
import threading

import pytest

from jllm.errors import EngineStoppedError
from jllm.text.delivery import MAX_STEPS_BEHIND, OpenRequest, OutputThread
from jllm.types import StepOutputs, TokenOutput

SECONDS = 20


class Stream:
    """Collects what is pushed; a token of `bad` has no text."""

    def __init__(self, bad=None):
        self.tokens, self.finished, self.bad = [], False, bad
        self.has_output, self.on_push = False, None

    def push_token(self, index, token_id):
        if self.on_push is not None:
            self.on_push()
        if token_id == self.bad:
            raise ValueError("no text")
        self.tokens.append(token_id)
        self.has_output = True
        return False

    def push(self, output):
        for token_id in output.token_ids:
            self.push_token(output.index, token_id)
        self.finished = output.finish_reason is not None
        return False

    def abort(self):
        self.finished = self.has_output = True

    def take(self):
        self.has_output = False
        taken, self.tokens = self.tokens, []
        return taken


def last(request_id, token_id):
    return TokenOutput(request_id, 0, (token_id,), finish_reason="length")


@pytest.fixture
def outputs():
    outputs = OutputThread()
    yield outputs
    outputs.close()


def opened(outputs, request_id, ended=None, event_loop=None, on_first=None, **options):
    reader = OpenRequest(event_loop or asyncio.get_running_loop(), on_first)
    reader.open(Stream(**options), (ended if ended is not None else []).append)
    outputs.open(request_id, reader)
    return reader


async def read_all(reader):
    found = []
    while not (reader.finished and not reader._stream.has_output):
        found += await asyncio.wait_for(reader.read(), SECONDS)
    return found


def test_tokens_come_in_order_and_to_their_own_reader(outputs):
    async def body():
        readers = {name: opened(outputs, name) for name in "ab"}
        for token_id in range(100):
            keys = [("a", 0), ("b", 0)]
            outputs.deliver(StepOutputs(keys, [token_id, 1000 + token_id]))
        outputs.deliver(StepOutputs(others=[last("a", 100), last("b", 1100)]))
        assert await read_all(readers["a"]) == list(range(101))
        assert await read_all(readers["b"]) == list(range(1000, 1101))

    asyncio.run(body())


def test_text_is_made_in_the_output_thread(outputs):
    async def body():
        reader, threads = opened(outputs, "a"), []
        reader._stream.on_push = lambda: threads.append(threading.current_thread())
        outputs.deliver(StepOutputs([("a", 0)], [1]))
        await asyncio.wait_for(reader.read(), SECONDS)
        assert [thread.name for thread in threads] == ["jllm-output"]

    asyncio.run(body())


def test_tokens_without_a_text_fail_their_request_alone(outputs):
    async def body():
        ended = []
        bad, good = opened(outputs, "bad", ended, bad=7), opened(outputs, "good")
        outputs.deliver(StepOutputs([("bad", 0), ("good", 0)], [7, 7]))
        outputs.deliver(StepOutputs([("bad", 0), ("good", 0)], [8, 8]))
        outputs.deliver(StepOutputs(others=[last("good", 9)]))
        with pytest.raises(ValueError, match="no text"):
            await asyncio.wait_for(bad.read(), SECONDS)
        assert await read_all(good) == [7, 8, 9]
        assert ended == [None]

    asyncio.run(body())


def test_a_slow_reader_is_woken_once_for_many_tokens(outputs):
    async def body():
        reader, wakes = opened(outputs, "a"), []
        notify = reader.notify
        reader.notify = lambda: wakes.append(1) or notify()
        for token_id in range(50):
            outputs.deliver(StepOutputs([("a", 0)], [token_id]))
        while len(reader._stream.tokens) < 50:
            await asyncio.sleep(0)
        assert await reader.read() == list(range(50))
        assert len(wakes) == 1

    asyncio.run(body())


def test_the_engine_waits_only_if_text_is_far_behind(outputs):
    async def body():
        reader, gate, entered = opened(outputs, "a"), threading.Event(), []
        reader._stream.on_push = lambda: entered.append(1) or gate.wait(SECONDS)
        for token_id in range(MAX_STEPS_BEHIND):
            outputs.deliver(StepOutputs([("a", 0)], [token_id]))
        while not entered:
            await asyncio.sleep(0.001)
        # One is being put into text: there is room for one more.
        outputs.deliver(StepOutputs([("a", 0)], [-1]))
        far = threading.Thread(
            target=outputs.deliver, args=[StepOutputs([("a", 0)], [-2])]
        )
        far.start()
        far.join(0.05)
        assert far.is_alive()
        gate.set()
        far.join(SECONDS)
        assert not far.is_alive()

    asyncio.run(body())


def test_what_was_handed_on_is_delivered_before_the_end(outputs):
    async def body():
        reader = opened(outputs, "a")
        for token_id in range(20):
            outputs.deliver(StepOutputs([("a", 0)], [token_id]))
        outputs.fail(EngineStoppedError("gone"))
        outputs.close()
        assert reader._stream.tokens == list(range(20))
        with pytest.raises(EngineStoppedError, match="gone"):
            await asyncio.wait_for(reader.read(), SECONDS)

    asyncio.run(body())


def test_an_id_may_be_used_again(outputs):
    async def body():
        first = opened(outputs, "a")
        outputs.deliver(StepOutputs([("a", 0)], [1]))
        outputs.forget("a")
        second = opened(outputs, "a")
        outputs.deliver(StepOutputs([("a", 0)], [2]))
        outputs.forget("unknown")
        assert await asyncio.wait_for(second.read(), SECONDS) == [2]
        assert first._stream.tokens == [1]

    asyncio.run(body())


def test_the_first_token_is_told_whatever_is_read(outputs):
    async def body():
        told = asyncio.Event()

        def fail():
            told.set()
            raise ValueError("its own fault")

        reader = opened(outputs, "a", on_first=fail)
        other = opened(outputs, "b")
        reader._stream.push = lambda output: False
        outputs.deliver(
            StepOutputs(others=[TokenOutput("a", 0, (1,)), TokenOutput("b", 0, (2,))])
        )
        await asyncio.wait_for(told.wait(), SECONDS)
        assert await asyncio.wait_for(other.read(), SECONDS) == [2]

    asyncio.run(body())


def test_requests_end_when_their_event_loop_is_closed(outputs):
    event_loop, ended = asyncio.new_event_loop(), []
    event_loop.close()
    opened(outputs, "a", ended, event_loop)
    outputs.deliver(StepOutputs([("a", 0)], [1]))
    outputs.close()
    assert ended == [None]
