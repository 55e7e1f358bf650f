"""The collector is off while an engine works, and as it was afterwards."""

import gc
import subprocess
import sys
import weakref

import pytest

from jllm.engine import garbage
from jllm.engine.garbage import QuietGarbage
from jllm.engine.loop import EngineLoop
from jllm.llm import LLM
from jllm.text.delivery import OutputThread
from jllm.types import SamplingParams
from tests.fakes import FakeEngine


class Cycle:
    def __init__(self):
        self.itself = self


def dropped_cycle():
    return weakref.ref(Cycle())


@pytest.fixture(autouse=True)
def collector_is_on():
    # An engine that other tests share may have turned it off.
    was_on = gc.isenabled()
    gc.enable()
    yield
    assert gc.isenabled()
    if not was_on:
        gc.disable()


def test_young_objects_are_collected_every_few_steps(monkeypatch):
    monkeypatch.setattr(garbage, "YOUNG_EVERY", 3)
    with QuietGarbage(freeze=False) as quiet:
        cycle = dropped_cycle()
        for _ in range(2):
            quiet.note_step()
        assert cycle() is not None
        quiet.note_step()
        assert cycle() is None


def test_nothing_stays_frozen():
    # In a process of its own, where no engine that other tests share freezes objects.
    code = """
import gc
from jllm.engine.garbage import QuietGarbage
with QuietGarbage(freeze=True):
    assert gc.get_freeze_count() > 0
assert gc.get_freeze_count() == 0
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_idle_moments_collect_all_but_rarely(monkeypatch):
    with QuietGarbage(freeze=True) as quiet:
        assert gc.get_freeze_count() > 0
        held = dropped_cycle()
        quiet.note_step()
        quiet.note_idle()
        assert held() is not None
        monkeypatch.setattr(garbage, "FULL_EVERY", -1.0)
        quiet.note_idle()
        assert held() is None


def test_without_idle_moments_old_objects_are_collected_all_the_same(monkeypatch):
    monkeypatch.setattr(garbage, "YOUNG_EVERY", 1)
    with QuietGarbage(freeze=False) as quiet:
        cycle = Cycle()
        gc.collect()  # now it is old
        held = weakref.ref(cycle)
        del cycle
        quiet.note_step()
        assert held() is not None
        monkeypatch.setattr(garbage, "FULL_AT_LATEST", -1.0)
        quiet.note_step()
        assert held() is None


def test_two_at_once_leave_it_on():
    first, second = QuietGarbage(freeze=False), QuietGarbage(freeze=False)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)


def test_the_loop_works_with_the_collector_off():
    loop = EngineLoop(FakeEngine(), OutputThread())
    assert loop.call(gc.isenabled).result(20) is False
    assert loop.call(gc.get_freeze_count).result(20) > 0
    loop.close()


def test_generate_works_with_the_collector_off(monkeypatch):
    engine, seen = FakeEngine(), []
    engine.on_step = lambda _: seen.append(gc.isenabled())
    monkeypatch.setattr("jllm.llm.create_engine", lambda config: engine)
    with LLM("model") as llm:
        llm.generate("a", SamplingParams(max_tokens=3), use_tqdm=False)
    assert seen
    assert not any(seen)
