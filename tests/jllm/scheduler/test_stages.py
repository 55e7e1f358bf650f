"""Rows in the stages of a pipeline: who takes part in which step, and who idles."""

import collections
import itertools
import random

import pytest

from jllm.config import SchedulerConfig
from jllm.scheduler.request import Request
from jllm.scheduler.scheduler import Scheduler


def run(num_stages, num_rows, num_steps=1000, seed=0):
    """Steps with always so many sequences, each ended one followed by another.

    Returns the share of stages without a microbatch, after the first ones, and for each
    sequence the steps in which it computed a single token.
    """
    rng = random.Random(seed)
    scheduler = Scheduler(
        SchedulerConfig(
            max_num_seqs=num_rows,
            token_budget=256,
            block_size=16,
            num_blocks=4096,
            max_model_len=1024,
            max_block_appends=512,
            num_stages=num_stages,
        )
    )
    held = collections.deque([None] * (num_stages - 1))
    in_flight, num_added = None, 0
    idle, busy, turns = 0, 0, collections.defaultdict(list)
    for step in range(num_steps):
        while scheduler.num_running + scheduler.num_waiting < num_rows:
            prompt = tuple(rng.choices(range(50), k=rng.randint(1, 200)))
            scheduler.add(
                Request(
                    sequence_id=num_added,
                    request_id=str(num_added),
                    index=0,
                    prompt_token_ids=prompt,
                    max_tokens=rng.randint(50, 400),
                )
            )
            num_added += 1
        plan = scheduler.schedule()
        held.append(plan if plan and plan.num_rows else None)
        if step > 20 * num_stages:
            busy += sum(one is not None for one in held)
            idle += held.count(None)
        for sequence_id in plan.decoding.sequence_ids.tolist() if plan else ():
            turns[sequence_id].append(step)
        leaving, in_flight = in_flight, held.popleft()
        if leaving is not None:
            scheduler.commit(leaving, [7] * leaving.num_rows)
    scheduler.check_integrity()
    return idle / (idle + busy), turns


@pytest.mark.parametrize("num_stages", [2, 4, 8])
@pytest.mark.parametrize("more", [0, 1, 5])
def test_less_than_a_twentieth_is_idle_with_as_many_rows_as_stages(num_stages, more):
    share, _ = run(num_stages, num_stages + more)
    assert share < 0.05


@pytest.mark.parametrize("num_stages", [2, 4])
def test_a_row_alone_uses_one_stage_at_a_time(num_stages):
    share, turns = run(num_stages, 1)
    assert share == pytest.approx((num_stages - 1) / num_stages, abs=0.02)
    for steps in turns.values():
        gaps = {b - a for a, b in itertools.pairwise(steps)}
        assert gaps <= {num_stages}


def test_a_row_waits_for_its_token_and_never_much_longer():
    _, turns = run(4, 9)
    gaps = [
        later - step
        for steps in turns.values()
        for step, later in itertools.pairwise(steps)
    ]
    assert min(gaps) == 4
    assert sum(gap > 4 for gap in gaps) < 0.05 * len(gaps)
    assert max(gaps) <= 8
