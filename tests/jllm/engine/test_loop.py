"""The engine's thread: order, errors, failure, shutdown."""

import threading
import time

import pytest

from jllm.engine.loop import EngineLoop
from jllm.errors import EngineStoppedError, InvalidRequestError
from jllm.types import EngineRequest, SamplingParams
from tests.fakes import FakeEngine

SECONDS = 20


class Sink:
    """Reader of one request."""

    def __init__(self):
        self.items, self.ended = [], threading.Event()

    def push(self, item):
        self.items.append(item)
        if isinstance(item, EngineStoppedError) or item.finish_reason:
            self.ended.set()

    def wait(self):
        assert self.ended.wait(SECONDS)
        return self.items


class Readers:
    """Outlet that hands everything to sinks at once."""

    def __init__(self):
        self.sinks = {}

    def open(self, request_id, sink):
        self.sinks[request_id] = sink

    def forget(self, request_id):
        del self.sinks[request_id]

    def deliver(self, outputs):
        for output in outputs:
            self.sinks[output.request_id].push(output)

    def fail(self, error):
        for sink in self.sinks.values():
            if not sink.ended.is_set():
                sink.push(error)


def request(request_id="r", prompt=(1,), **params):
    return EngineRequest(request_id, prompt, SamplingParams(**params))


@pytest.fixture
def make():
    loops = []

    def make(*arguments, **options):
        loops.append(EngineLoop(FakeEngine(*arguments, **options), Readers()))
        return loops[-1]

    yield make
    for loop in loops:
        loop.close()


def held(loop):
    """Makes the engine wait in its next step until the event is set."""
    entered, leave = threading.Event(), threading.Event()

    def wait(_):
        entered.set()
        assert leave.wait(SECONDS)

    loop._engine.on_step = wait
    return entered, leave


def test_outputs_reach_their_sinks(make):
    loop = make(lambda r, i: r.request_id)
    sinks = {name: Sink() for name in ("one", "three")}
    for name, sink in sinks.items():
        loop.add(request(name), sink).result(SECONDS)
    for name, sink in sinks.items():
        found = b"".join(
            bytes(o.token_ids) for o in sink.wait() if o.token_ids[0] < 256
        )
        assert found.decode() == name


def test_error_of_add_goes_to_its_caller(make):
    loop = make()
    with pytest.raises(InvalidRequestError, match="vocabulary"):
        loop.add(request(prompt=(9999,)), Sink()).result(SECONDS)
    sink = Sink()
    loop.add(request(), sink).result(SECONDS)
    assert sink.wait()[-1].finish_reason


def test_no_steps_without_requests(make):
    loop = make()
    loop.call(lambda: None).result(SECONDS)
    assert loop._engine.num_steps == 0


def test_abort_silences_the_sink(make):
    loop, sink = make("x" * 100), Sink()
    entered, leave = held(loop)
    loop.add(request(max_tokens=None), sink).result(SECONDS)
    assert entered.wait(SECONDS)
    loop.abort("r")
    loop.abort("unknown")
    leave.set()
    loop.call(lambda: None).result(SECONDS)
    assert len(sink.items) == 1
    assert loop._engine.aborted == ["r"]


def test_abort_of_sequences_ends_the_request_with_the_last(make):
    loop, sink = make("x" * 100), Sink()
    _, leave = held(loop)
    loop.add(request(n=2, max_tokens=None), sink).result(SECONDS)
    loop.abort("r", 1)
    loop.abort("r", 1)
    loop.abort("r", 0)
    leave.set()
    loop.call(lambda: None).result(SECONDS)
    assert loop._engine.aborted == [("r", 1), "r"]
    assert not loop._engine.has_unfinished


def test_failing_step_fails_all(make):
    loop, sink = make(fail_at=2), Sink()
    entered, leave = held(loop)
    loop.add(request(), sink).result(SECONDS)
    assert entered.wait(SECONDS)
    waiting = loop.add(request("late", max_tokens=None), late := Sink())
    leave.set()
    error = sink.wait()[-1]
    assert isinstance(error, EngineStoppedError)
    assert "RuntimeError: the device is gone" in str(error)
    assert waiting.result(SECONDS) is None
    assert isinstance(late.wait()[-1], EngineStoppedError)
    loop._thread.join(SECONDS)
    assert not loop.is_alive
    assert isinstance(loop.error, EngineStoppedError)
    with pytest.raises(EngineStoppedError, match="the device is gone"):
        loop.add(request("later"), Sink())
    loop.abort("later")
    assert loop._engine.closed == 1


def test_close_fails_what_is_open(make):
    loop, sink = make("x" * 100), Sink()
    entered, leave = held(loop)
    loop.add(request(max_tokens=None), sink).result(SECONDS)
    assert entered.wait(SECONDS)
    closer = threading.Thread(target=loop.close)
    closer.start()
    while loop.is_alive:
        time.sleep(0.001)
    leave.set()
    closer.join(SECONDS)
    loop.close()
    assert isinstance(sink.wait()[-1], EngineStoppedError)
    assert (loop.error, loop.is_alive, loop._engine.closed) == (None, False, 1)
    with pytest.raises(EngineStoppedError, match="shut down"):
        loop.call(lambda: None)


def test_a_caller_that_gave_up_is_not_served(make):
    loop = make("x" * 50)
    entered, leave = held(loop)
    loop.add(request(max_tokens=None), Sink()).result(SECONDS)
    assert entered.wait(SECONDS)
    future = loop.add(request("cancelled"), Sink())
    assert future.cancel()
    leave.set()
    loop.call(lambda: None).result(SECONDS)
    assert [r.request_id for r in loop._engine.added] == ["r"]
