"""A prefill step scores the rows that sample, in the smallest of a few sizes."""

import dataclasses
from functools import partial

import jax
import numpy as np
import pytest

from jllm.engine.inputs import pack
from jllm.engine.steps import prefill_step
from jllm.scheduler.plan import NO_DECODE_ROWS, ScheduledRow, StepPlan
from tests.engines import request, run, shared_engine


def test_the_program_has_a_branch_per_size():
    engine = shared_engine()
    layout, program = engine.programs.largest_prefill()
    assert layout.scored_rows == engine._parts.options.sizes.rows
    assert layout.scored_rows[0] == 1 < layout.num_rows
    width = engine._parts.model.padded_vocab_size
    scores = f"f32[{layout.num_rows},{width}]"
    lines = [line for line in program.as_text().splitlines() if scores in line]
    assert len([line for line in lines if " conditional(" in line]) == 1


@pytest.mark.parametrize("num_sampling", [0, 1, 2, 8])
def test_logits_past_the_scored_rows_are_not_computed(num_sampling):
    engine = shared_engine()
    layout, program = engine.programs.largest_prefill()
    fields = np.zeros(layout.shapes["fields"][1], np.int32)
    rows = [
        ScheduledRow(i, i, 0, 3, (5 + i, 6, 7), i < num_sampling, starts=True,
                     new_blocks=(i,))
        for i in range(8)
    ]  # fmt: skip
    plan = StepPlan(1, NO_DECODE_ROWS, tuple(rows), 24)
    state = jax.tree.map(lambda leaf: leaf + 0, engine.state)
    _, result = program(engine.weights, state, pack(plan, layout, lambda _: fields))
    scored = min(n for n in layout.scored_rows if n >= num_sampling)
    logits = np.asarray(result.logits)
    assert np.abs(logits[:scored, :331]).max(axis=1).min() > 0
    assert not logits[scored:].any()
    assert np.asarray(result.packed)[:, 1].tolist() == [1] * 8


def test_rows_that_do_not_sample_are_checked_too():
    """A step that computes only a part of a prompt still sees that it went wrong."""
    engine = shared_engine()
    layout, program = engine.programs.largest_prefill()
    weights = dict(engine.weights)
    embed = np.array(weights["embed"])
    embed[9] = np.nan
    weights["embed"] = jax.device_put(embed, engine.weights["embed"].sharding)
    fields = np.zeros(layout.shapes["fields"][1], np.int32)
    rows = [
        ScheduledRow(i, i, 0, 1, (8 + i,), samples=False, starts=True, new_blocks=(i,))
        for i in range(4)
    ]
    plan = StepPlan(1, NO_DECODE_ROWS, tuple(rows), 4)
    state = jax.tree.map(lambda leaf: leaf + 0, engine.state)
    _, result = program(weights, state, pack(plan, layout, lambda _: fields))
    assert np.asarray(result.packed)[:4, 1].tolist() == [1, 0, 1, 1]


def test_scores_cost_by_the_rows_that_sample():
    """Flops of a step that always scores so many rows, by the compiler's count."""
    engine = shared_engine()
    parts = engine._parts
    layout, _ = engine.programs.largest_prefill()

    def flops(count):
        own = dataclasses.replace(layout, scored_rows=(count,))
        step = partial(prefill_step, parts.model, own, parts.options.draw_method)
        vector = np.zeros(layout.size, np.int32)
        compiled = jax.jit(step).lower(engine.weights, engine.state, vector).compile()
        return compiled.cost_analysis()["flops"]

    assert flops(8) - flops(1) >= 7 * 2 * 56 * parts.model.padded_vocab_size


def test_mixed_steps_give_the_tokens_of_plain_ones():
    engine = shared_engine()
    items = [
        request(i, range(3, 20 + 11 * i), temperature=0, max_tokens=9) for i in range(7)
    ]
    together = run(engine, items)
    for item in items:
        alone = run(engine, [item])
        assert alone == {(item.request_id, 0): together[item.request_id, 0]}


def test_without_branches_a_row_is_scored_once_however_long_its_chunk():
    """As on a GPU or TPU: one place per row of the table, never one per token."""
    parts = shared_engine()._parts
    options = dataclasses.replace(parts.options, branches=False)
    layout = options.layout("prefill", options.sizes.tokens[-1])
    assert layout.num_tokens > layout.num_rows
    step = partial(prefill_step, parts.model, layout, options.draw_method)
    vector = np.zeros(layout.size, np.int32)
    jaxpr = jax.make_jaxpr(step)(shared_engine().weights, shared_engine().state, vector)
    width = parts.model.padded_vocab_size
    products = [
        eqn.outvars[0].aval.shape
        for eqn in jaxpr.eqns
        if eqn.primitive.name == "dot_general" and width in eqn.outvars[0].aval.shape
    ]
    assert products == [(layout.num_rows, width)]
