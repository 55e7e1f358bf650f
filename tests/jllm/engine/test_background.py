"""Background work: the order of calls, and what becomes of those in the queue."""

import threading

from jllm.engine.background import BackgroundWork


def test_calls_run_in_order_unless_one_is_waited_for():
    work, gate, order = BackgroundWork(1, "test"), threading.Event(), []
    work.submit(gate.wait)
    futures = [work.submit(lambda i=i: order.append(i)) for i in range(4)]
    work.hasten(futures[2])
    gate.set()
    for future in futures:
        future.result(10)
    assert order == [2, 0, 1, 3]


def test_hastening_what_has_run_or_runs_changes_nothing():
    work = BackgroundWork(1, "test")
    done = work.submit(lambda: 1)
    assert done.result(10) == 1
    work.hasten(done)
    assert done.result(10) == 1


def test_closing_drops_the_queue():
    work, gate = BackgroundWork(1, "test"), threading.Event()
    begun = threading.Event()
    running = work.submit(lambda: begun.set() or gate.wait(10))
    queued = work.submit(lambda: 1)
    # Else it would be dropped from the queue itself.
    assert begun.wait(10)
    closing = threading.Thread(target=work.close)
    closing.start()
    while not queued.cancelled():
        pass
    gate.set()
    closing.join(10)
    assert running.result(10)
