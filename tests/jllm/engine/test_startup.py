"""What serves while programs compile, and that nothing compiles once all are ready."""

import threading

import jax
import numpy as np
import pytest

from jllm.engine.builder import ProgramBuilder
from jllm.engine.memory import PoolSizes
from tests.engines import SMALL, drain, make_engine, request, shared_engine

SMALL_SIZES = {"max_num_seqs": 5, "max_num_batched_tokens": 96}
"""Two decode sizes and two prefill sizes."""


@pytest.fixture
def held_back(monkeypatch):
    """Holds back every program but those that are needed first, until it is set."""
    gate, build = threading.Event(), ProgramBuilder.build

    def wait_and_build(self, kind, size):
        if (kind, size) not in {("init_state", 256), ("prefill", 64)}:
            assert gate.wait(60)
        return build(self, kind, size)

    monkeypatch.setattr(ProgramBuilder, "build", wait_and_build)
    yield gate
    gate.set()


@pytest.mark.slow
def test_requests_are_served_while_the_other_programs_compile(held_back):
    engine = make_engine(compile_ahead=True, **SMALL_SIZES)
    for i in range(5):
        engine.add(request(i, range(3, 30 + i), temperature=0, max_tokens=4))
    outputs = drain(engine)
    assert sum(len(output.token_ids) for output in outputs) == 20
    assert engine.programs.num_compiled == 2
    held_back.set()
    engine.wait_until_compiled()
    assert engine.programs.num_compiled == len(engine.programs.all_keys()) + 1
    engine.close()


def test_a_long_prompt_is_cut_to_the_programs_that_are_ready(held_back):
    engine = make_engine(compile_ahead=True, **SMALL_SIZES)
    answers: list[list[int]] = []
    for number, limit in enumerate((64, 96)):
        assert engine.programs.token_limit == limit
        engine.add(request(number, range(3, 133), temperature=0, max_tokens=1))
        steps = engine.metrics.steps
        outputs = drain(engine)
        answers.append([token for output in outputs for token in output.token_ids])
        assert engine.metrics.steps - steps == -(-130 // limit)
        engine.reset_prefix_cache()
        held_back.set()
        engine.wait_until_compiled()
    assert answers[0] == answers[1] != []
    engine.close()


def test_a_size_whose_sampler_is_not_ready_is_passed_over(monkeypatch):
    programs = shared_engine().programs
    ready = {("decode", 1), ("decode", 8), ("prefill", 64), ("sampler", 8)}
    monkeypatch.setattr(programs, "_is_ready", lambda key: key in ready)

    def size(num_rows, *, has_rules, is_decode=True):
        layout, _ = programs.step(
            is_decode=is_decode,
            num_rows=num_rows,
            num_tokens=num_rows,
            has_rules=has_rules,
        )
        return layout.kind, layout.num_tokens

    assert size(1, has_rules=False) == ("decode", 1)
    assert size(1, has_rules=True) == ("decode", 8)
    ready.remove(("decode", 8))
    assert size(1, has_rules=True) == ("prefill", 64)
    ready.remove(("sampler", 8))
    assert size(1, has_rules=True) == ("prefill", 64)


def test_a_size_that_another_host_lacks_is_passed_over(monkeypatch):
    ready = {("decode", 8), ("prefill", 64)}

    class Others:
        def is_ready(self, num_blocks, key):
            assert num_blocks == SMALL["num_blocks"]
            return key in ready

    programs = shared_engine().programs
    programs.get("decode", 8)
    monkeypatch.setattr(programs, "_readiness", Others())
    wanted = {"is_decode": True, "num_rows": 8, "num_tokens": 8, "has_rules": False}
    assert programs.step(**wanted)[0].kind == "decode"
    ready.remove(("decode", 8))
    assert programs.step(**wanted)[0].kind == "prefill"


def test_every_shape_at_once_compiles_nothing_once_ready():
    engine = shared_engine()
    engine.wait_until_compiled()
    compiled, used = [], set()

    def record(name, *_, **__):
        if "backend_compile" in name or "trace_duration" in name:
            compiled.append(name)

    jax.monitoring.register_event_duration_secs_listener(record)
    rng = np.random.default_rng(0)
    extras = [{}, {"top_k": 3}, {"logprobs": 2}, {"prompt_logprobs": 1}, {"n": 2}]
    step = engine.programs.step

    def watched(**kwargs):
        layout, program = step(**kwargs)
        used.add((layout.kind, layout.num_tokens))
        return layout, program

    engine.programs.step = watched
    for i, length in enumerate([1, 2, 7, 30, 63, 64, 65, 120, 150, 200]):
        prompt = rng.integers(3, 331, length)
        params = {"max_tokens": 3 + 2 * i, **extras[i % len(extras)]}
        engine.add(request(i, prompt, ignore_eos=True, **params))
    drain(engine)
    del engine.programs.step
    jax.monitoring.unregister_event_duration_listener(record)
    assert compiled == []
    steps = {k for k in engine.programs.all_keys() if k[0] in ("decode", "prefill")}
    assert used == steps


def test_sizes_of_pools_are_remembered(tmp_path):
    sizes = PoolSizes(tmp_path / "pools" / "name")
    assert sizes.read() == ()
    sizes.add(128)
    sizes.add(96)
    sizes.add(128)
    assert sizes.read() == (128, 96)
    (tmp_path / "pools" / "name").write_bytes(b"\xff\xfe 12")
    assert sizes.read() == ()
