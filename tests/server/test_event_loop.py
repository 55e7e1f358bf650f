"""Turns of the event loop: bounded, fair, and counted."""

import asyncio
import contextlib
import socket

import pytest

from server.event_loop import FairSelector, Turns, make_event_loop

READ = 1


@pytest.fixture
def pairs():
    """Connected sockets; the first of each pair has something to read."""
    with contextlib.ExitStack() as stack:
        found = [socket.socketpair() for _ in range(40)]
        for left, right in found:
            stack.enter_context(left)
            stack.enter_context(right)
            right.send(b"x")
        yield found


def test_a_turn_serves_some_and_the_next_one_others(pairs):
    with FairSelector(Turns(), most=8) as selector:
        for left, _ in pairs:
            selector.register(left, READ, left)
        turns = [selector.select(0) for _ in range(5)]
        assert [len(ready) for ready in turns] == [8] * 5
        # Nobody has read: still all had their turn.
        assert {key.data for ready in turns for key, _ in ready} == {
            left for left, _ in pairs
        }
        assert {events for ready in turns for _, events in ready} == {READ}
        for left, _ in pairs:
            selector.unregister(left)
        assert selector.select(0) == []


def test_a_socket_that_is_closed_at_the_other_end_is_given(pairs):
    with FairSelector(Turns()) as selector:
        left, right = pairs[0]
        left.recv(1)
        selector.register(left, READ, "here")
        assert selector.select(0) == []
        right.close()
        assert [(key.data, events) for key, events in selector.select(1)] == [
            ("here", READ)
        ]


def test_turns_are_counted():
    turns = Turns()

    async def main():
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"hi")
        assert await reader.read() == b"HI"
        writer.close()
        server.close()
        # Two turns at least.
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    async def answer(reader, writer):
        writer.write((await reader.read(2)).upper())
        writer.close()

    with asyncio.Runner(loop_factory=lambda: make_event_loop(turns)) as runner:
        runner.run(main())
    family = turns.seconds.family("turns", "", ["l"], ["v"])
    values = {sample.name: sample.value for sample in family.samples}
    assert values["turns_count"] > 5
    assert 0 < turns.longest <= values["turns_sum"]
    buckets = [s.value for s in family.samples if s.name == "turns_bucket"]
    assert buckets == sorted(buckets)
    assert buckets[-1] == values["turns_count"]
