"""Which host hung: dead, silent, behind the others, or none."""

import pytest

from jllm.distributed.watch import Progress, Watch


class Result:
    def __init__(self):
        self.ready = False

    def is_ready(self):
        return self.ready


def tell(watch, *states, compiling=()):
    """Reports (launched, done) of host 0, 1, …"""
    for host, (launched, done) in enumerate(states):
        watch.report(host, launched, done, is_compiling=host in compiling)


def test_a_silent_host_is_named():
    watch = Watch(3.0, range(3))
    for _ in range(4):
        watch.hear(0)
        watch.hear(2)
        fault = watch.tick(1.0)
    assert fault == "host 1 has not been heard for 3 s"


def test_a_host_that_is_slow_but_moves_is_left_alone():
    watch = Watch(3.0, range(2))
    for call in range(1, 10):
        for _ in range(2):
            tell(watch, (call, call), (call - 1, call - 1))
            assert watch.tick(1.0, asked=call) is None


def test_idle_hosts_are_left_alone():
    watch = Watch(3.0, range(2))
    for _ in range(20):
        tell(watch, (7, 7), (7, 7))
        assert watch.tick(1.0, asked=7) is None


@pytest.mark.parametrize(
    ("states", "what"),
    [
        # Host 1 is heard, but its thread that calls programs hangs.
        ([(8, 6), (6, 6), (8, 6)], "host 1 has launched call 6 of 8"),
        # All have launched; the device of host 2 is behind.
        ([(8, 7), (8, 7), (8, 6)], "host 2 has computed call 6 of 8"),
        # Nobody is to blame alone.
        ([(8, 7), (8, 7), (8, 7)], "host 0, 1, 2 has computed call 7 of 8"),
    ],
)
def test_the_host_that_is_behind_is_named(states, what):
    watch = Watch(3.0, range(3))
    faults = []
    for _ in range(5):
        tell(watch, *states)
        faults.append(watch.tick(1.0, asked=8))
    assert faults[:4] == [None] * 4
    assert faults[4] == f"{what} and not moved on for 3 s"


def test_compiling_is_no_standstill():
    watch = Watch(3.0, range(2))
    for _ in range(20):
        tell(watch, (4, 4), (3, 3), compiling=[1])
        assert watch.tick(1.0, asked=4) is None
    for _ in range(5):
        tell(watch, (4, 4), (3, 3))
        fault = watch.tick(1.0, asked=4)
    assert "host 1" in fault


def test_calls_are_done_in_their_order():
    progress, results = Progress(), [Result() for _ in range(3)]
    for number, result in enumerate(results, 1):
        progress.note(number, result)
    assert progress.read() == (3, 0)
    results[0].ready = results[2].ready = True
    assert progress.read() == (3, 1)
    results[1].ready = True
    assert progress.read() == (3, 3)
    progress.note(4, None)
    assert progress.read() == (4, 4)


def test_results_are_let_go_when_they_are_there():
    progress = Progress()
    for number in range(1, 1000):
        result = Result()
        result.ready = True
        progress.note(number, result)
    assert len(progress._awaited) == 0
