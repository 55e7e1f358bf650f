"""What an engine and its programs keep, and what they give up in the end."""

import weakref

import jax
import jax.numpy as jnp

from jllm.engine.executables import Executable
from jllm.engine.programs import ProgramOptions, Programs, ProgramSizes
from jllm.engine.state import EngineState, RowTable
from tests.engines import make_engine, request, shared_engine


def test_a_request_whose_sequences_were_all_aborted_is_forgotten():
    engine = shared_engine()
    engine.add(request("r", [3, 4, 5], n=2, max_tokens=4))
    engine.step()
    engine.abort_sequence("r", 1)
    assert engine.is_open("r")
    engine.abort_sequence("r", 0)
    assert not engine.is_open("r")
    assert engine.num_open == 0
    engine.step()
    assert not engine.has_unfinished


def test_rows_that_decode_and_go_on_are_columns():
    engine = shared_engine()
    for i in range(3):
        engine.add(request(i, [3, 4, 5 + i], max_tokens=5, ignore_eos=True))
    steps = []
    while engine.has_unfinished:
        steps.append(engine.step())
    told = [([key for key, _ in step.keys], len(step.others)) for step in steps]
    names = ["0", "1", "2"]
    assert told == [([], 0), ([], 3), *[(names, 0)] * 3, ([], 3)]
    assert all(len(step.token_ids) == len(step.keys) for step in steps)


def test_log_probabilities_are_told_row_by_row():
    engine = shared_engine()
    engine.add(request("r", [3, 4, 5], max_tokens=4, logprobs=1, temperature=0))
    steps = []
    while engine.has_unfinished:
        steps.append(engine.step())
    assert not any(step.keys for step in steps)
    outputs = [output for step in steps for output in step]
    assert [len(output.logprobs) for output in outputs] == [1] * 4


def test_a_closed_engine_has_nothing_to_do_and_no_state():
    engine = make_engine()
    engine.add(request("r", [3, 4, 5], max_tokens=100, ignore_eos=True))
    engine.step()
    leaf = weakref.ref(engine.state.kv[0])
    engine.close()
    assert not engine.has_unfinished
    assert engine.num_open == 0
    assert leaf() is None
    engine.close()


class OneState:
    """Builds programs of which one makes a state that can be watched."""

    def build(self, kind, size):
        return Executable(self.make if kind == "init_state" else None, frozenset())

    def make(self):
        return EngineState((), jnp.zeros(1), jnp.zeros(1), RowTable(jnp.zeros(1)))

    def trees(self, kind):
        return (), ()

    def logits(self, num_rows):
        return jax.ShapeDtypeStruct((num_rows, 1), "float32")


def test_closed_programs_free_the_state_that_nobody_took():
    """Else two pools are in memory when programs are made again for a smaller one."""
    options = ProgramOptions(
        sizes=ProgramSizes(rows=(1,), tokens=(8,)),
        num_blocks=1,
        block_size=1,
        max_blocks=1,
        max_appends=1,
        max_copies=1,
        num_logprobs=1,
        rule_size=1,
        draw_method="gumbel",
        tiles=None,
        branches=False,
    )
    programs = Programs(OneState(), options)
    programs.start()
    state = weakref.ref(programs._empty.result())
    assert state() is not None
    programs.close()
    assert state() is None
