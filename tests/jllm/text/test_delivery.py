"""Outputs on their way from the engine's thread to an event loop."""

import asyncio

import pytest

from jllm.text.delivery import Mailbox


def test_a_reader_that_fails_does_not_hold_up_the_others():
    async def body():
        loop, taken, errors = asyncio.get_running_loop(), asyncio.Event(), []
        loop.set_exception_handler(lambda _, context: errors.append(context))

        def fail(item):
            raise ValueError(item)

        mailbox = Mailbox(loop)
        mailbox.sink(fail)("bad")
        mailbox.sink(lambda item: taken.set())("good")
        await asyncio.wait_for(taken.wait(), 10)
        assert len(errors) == 1

    asyncio.run(body())


def test_everyone_hears_that_the_event_loop_is_closed():
    loop = asyncio.new_event_loop()
    loop.close()
    post = Mailbox(loop).sink(print)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="closed"):
            post("item")
