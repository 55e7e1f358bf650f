import pytest

from jllm.config import SchedulerConfig, WindowPool
from jllm.errors import ConfigError, ContextTooLongError, InvalidRequestError
from jllm.scheduler.plan import BlockCopy
from jllm.scheduler.request import Request, RequestStatus
from jllm.scheduler.scheduler import Scheduler

STOP = 99


def make(**overrides):
    limits = {
        "max_num_seqs": 4,
        "token_budget": 16,
        "block_size": 4,
        "num_blocks": 16,
        "max_model_len": 64,
        "max_block_appends": 32,
    }
    return Scheduler(SchedulerConfig(**(limits | overrides)))


def request(number, prompt=range(1, 7), max_tokens=4, **fields):
    defaults = {"request_id": f"r{number}", "index": 0, "arrival": number}
    return Request(
        sequence_id=number,
        prompt_token_ids=tuple(prompt),
        max_tokens=max_tokens,
        **(defaults | fields),
    )


def forks(prompt, count, max_tokens=4, **fields):
    parent = request(0, prompt, max_tokens, request_id="r", **fields)
    others = [
        request(
            i, prompt, max_tokens, request_id="r", index=i, arrival=0, fork_of=parent
        )
        for i in range(1, count)
    ]
    return [parent, *others]


def commit(scheduler, plan, token=50, finite=True):
    places = range(plan.num_rows)
    failed = () if finite else places
    return scheduler.commit(plan, [token for _ in places], failed).one_by_one()


def step(scheduler, token=50, finite=True):
    plan = scheduler.schedule()
    updates = commit(scheduler, plan, token, finite)
    scheduler.check_integrity()
    return plan, updates


def run(scheduler, token=50):
    plans = []
    while scheduler.has_unfinished:
        plans.append(step(scheduler, token)[0])
    return plans


# --- chunks, budget, order ---------------------------------------------------


def test_a_prompt_is_computed_in_chunks_and_then_token_by_token():
    scheduler = make(token_budget=4)
    one = request(0, range(10), max_tokens=3)
    scheduler.add(one)
    plans = run(scheduler)
    rows = [plan.rows[0] for plan in plans]
    assert [row.position for row in rows] == [0, 4, 8, 10, 11]
    assert [row.tokens for row in rows] == [
        (0, 1, 2, 3),
        (4, 5, 6, 7),
        (8, 9),
        (),
        (),
    ]
    assert [row.samples for row in rows] == [False, False, True, True, True]
    assert [row.starts for row in rows] == [True] + 4 * [False]
    blocks = [(row.first_block, len(row.new_blocks)) for row in rows]
    assert blocks[:3] == [(0, 1), (1, 1), (2, 1)]
    assert [count for _, count in blocks[3:]] == [0, 0]
    assert [plan.step for plan in plans] == [1, 2, 3, 4, 5]
    assert [plan.is_decode for plan in plans] == [False] * 3 + [True] * 2
    assert one.output_token_ids == [50, 50, 50]
    assert one.finish_reason == "length"
    assert scheduler.schedule() is None


@pytest.mark.parametrize(("limit", "counts"), [(5, [5, 1]), (16, [6]), (99, [6])])
def test_a_step_may_be_limited_to_fewer_tokens_than_the_budget(limit, counts):
    scheduler = make()
    scheduler.add(request(0, max_tokens=1))
    found = []
    while scheduler.has_unfinished:
        plan = scheduler.schedule(limit)
        commit(scheduler, plan)
        found.append(plan.num_tokens)
    assert found == counts


def test_single_tokens_and_chunks_share_a_step_within_the_budget():
    scheduler = make(token_budget=8)
    scheduler.add(request(0, range(8)))
    step(scheduler)
    scheduler.add(request(1, range(20, 32)))
    plan, _ = step(scheduler)
    assert [(row.sequence_id, row.num_tokens) for row in plan.rows] == [(0, 1), (1, 7)]
    assert plan.num_tokens == 8
    assert not plan.is_decode


def test_lower_priorities_go_first_then_earlier_arrivals():
    scheduler = make(max_num_seqs=2)
    scheduler.add(request(0, max_tokens=1))
    scheduler.add(request(1, max_tokens=1))
    scheduler.add(request(2, max_tokens=1, priority=-1))
    plan, _ = step(scheduler)
    assert [row.sequence_id for row in plan.rows] == [2, 0]
    plan, _ = step(scheduler)
    assert [row.sequence_id for row in plan.rows] == [1]


def test_the_head_of_the_queue_is_not_overtaken():
    scheduler = make(num_blocks=4)
    scheduler.add(request(0, range(9), max_tokens=4))
    step(scheduler)
    scheduler.add(request(1, range(20, 31), max_tokens=1))
    scheduler.add(request(2, range(40, 41), max_tokens=1))
    plan, _ = step(scheduler)
    assert [row.sequence_id for row in plan.rows] == [0]
    assert scheduler.num_waiting == 2


def test_table_entries_of_a_step_are_limited():
    scheduler = make(max_block_appends=2)
    scheduler.add(request(0, range(16)))
    plan, _ = step(scheduler)
    assert plan.rows[0].num_tokens == 8
    plan, _ = step(scheduler)
    assert plan.rows[0].num_tokens == 8


def test_a_long_table_found_in_the_cache_is_cut_to_the_entries_of_a_step():
    scheduler = make(max_block_appends=3)
    scheduler.add(request(0, range(16), max_tokens=1))
    run(scheduler)
    scheduler.add(request(1, range(16), max_tokens=1))
    plan, _ = step(scheduler)
    row = plan.rows[0]
    assert (row.position, row.num_tokens, len(row.new_blocks)) == (8, 4, 3)
    assert row.copy is None


def test_rows_are_reused_lowest_first():
    scheduler = make()
    for number in range(3):
        scheduler.add(request(number, (number,), max_tokens=1 + (number != 1)))
    plan, _ = step(scheduler)
    assert [row.row for row in plan.rows] == [0, 1, 2]
    scheduler.add(request(3, (7,)))
    plan, _ = step(scheduler)
    assert [row.row for row in plan.rows] == [0, 2, 1]


# --- the end of a sequence ---------------------------------------------------


def test_a_stop_token_ends_the_sequence_and_is_named():
    scheduler = make()
    one = request(0, stop_token_ids=frozenset({STOP}))
    scheduler.add(one)
    step(scheduler)
    _, updates = step(scheduler, token=STOP)
    assert [tuple(update[1:]) for update in updates] == [(0, STOP, "stop")]
    assert updates[0].request is one
    assert one.stop_reason == STOP
    assert one.is_finished
    assert not scheduler.has_unfinished
    assert scheduler.num_free_blocks == 16


def test_no_stop_token_counts_before_min_tokens():
    scheduler = make()
    one = request(0, min_tokens=3, stop_token_ids=frozenset({STOP}))
    scheduler.add(one)
    run(scheduler, token=STOP)
    assert one.output_token_ids == [STOP] * 3
    assert one.finish_reason == "stop"


def test_the_context_length_ends_a_sequence():
    scheduler = make(max_model_len=8)
    one = request(0, range(6), max_tokens=1000)
    scheduler.add(one)
    run(scheduler)
    assert one.num_output_tokens == 2
    assert one.finish_reason == "length"


def test_an_unfinished_prompt_brings_no_update():
    scheduler = make(token_budget=4)
    scheduler.add(request(0))
    assert step(scheduler)[1] == []
    assert len(step(scheduler)[1]) == 1


def test_a_row_that_is_not_finite_fails_alone_and_is_not_cached():
    scheduler = make()
    bad, good = request(0, range(10, 18)), request(1, range(20, 28))
    scheduler.add(bad)
    scheduler.add(good)
    plan = scheduler.schedule()
    updates = scheduler.commit(plan, [1, 2], [0]).one_by_one()
    assert [update.finish_reason for update in updates] == ["error", None]
    assert [update.token_id for update in updates] == [None, 2]
    assert bad.output_token_ids == []
    scheduler.abort("r1")
    scheduler.add(request(2, range(10, 18)))
    scheduler.add(request(3, range(20, 28)))
    plan, _ = step(scheduler)
    assert [row.position for row in plan.rows] == [0, 7]


def test_abort_ends_running_and_waiting_sequences_once():
    scheduler = make(max_num_seqs=1)
    running, waiting = request(0), request(1)
    scheduler.add(running)
    scheduler.add(waiting)
    step(scheduler)
    assert scheduler.abort("r1") == [waiting]
    assert scheduler.abort("r0") == [running]
    assert scheduler.abort("r0") == []
    assert scheduler.abort("unknown") == []
    assert running.finish_reason == waiting.finish_reason == "abort"
    assert not scheduler.has_unfinished
    assert scheduler.schedule() is None
    scheduler.check_integrity()


def test_one_sequence_of_a_request_can_be_aborted():
    scheduler = make()
    family = forks(range(6), 3)
    for one in family:
        scheduler.add(one)
    scheduler.abort_sequence(family[1])
    scheduler.abort_sequence(family[1])
    assert scheduler.num_waiting == 2
    run(scheduler)
    assert [one.finish_reason for one in family] == ["length", "abort", "length"]


# --- overlap -----------------------------------------------------------------


def test_a_step_is_planned_before_the_last_token_is_known():
    scheduler = make()
    one = request(0, max_tokens=3)
    scheduler.add(one)
    first = scheduler.schedule()
    second = scheduler.schedule()
    assert second.rows[0].tokens == ()
    assert second.rows[0].position == 6
    assert scheduler.num_pending(one) == 2
    commit(scheduler, first, token=7)
    assert scheduler.num_pending(one) == 1
    third = scheduler.schedule()
    commit(scheduler, second, token=8)
    assert scheduler.schedule() is None  # the third token is the last
    commit(scheduler, third, token=9)
    assert one.output_token_ids == [7, 8, 9]
    assert one.is_finished


def test_the_step_run_too_far_is_ignored():
    scheduler = make()
    one = request(0, max_tokens=8, stop_token_ids=frozenset({STOP}))
    scheduler.add(one)
    first, second = scheduler.schedule(), scheduler.schedule()
    commit(scheduler, first, token=STOP)
    assert scheduler.num_free_blocks == 16
    assert commit(scheduler, second, token=STOP) == []
    assert one.output_token_ids == [STOP]


def test_a_row_of_an_aborted_sequence_is_ignored():
    scheduler = make()
    one = request(0)
    scheduler.add(one)
    plan = scheduler.schedule()
    scheduler.abort("r0")
    assert commit(scheduler, plan) == []
    assert one.output_token_ids == []


def test_a_preempted_sequence_gets_its_token_in_flight_and_then_resumes():
    scheduler = make(token_budget=64)
    one = request(0, range(6), max_tokens=4)
    scheduler.add(one)
    plan = scheduler.schedule()
    assert scheduler.preempt(one)
    assert one.status is RequestStatus.PREEMPTED
    assert scheduler.schedule() is None
    commit(scheduler, plan, token=7)
    assert one.output_token_ids == [7]
    plan = scheduler.schedule()
    assert plan.rows[0].starts
    assert plan.rows[0].tokens == (0, 1, 2, 3, 4, 5, 7)


def test_plans_are_committed_in_order_and_not_piled_up():
    scheduler = make()
    scheduler.add(request(0, max_tokens=9))
    scheduler.schedule()
    second = scheduler.schedule()
    with pytest.raises(AssertionError, match="too many plans"):
        scheduler.schedule()
    with pytest.raises(AssertionError, match="order"):
        commit(scheduler, second)


# --- preemption --------------------------------------------------------------


def test_a_start_needs_room_for_its_next_token_too():
    scheduler = make(num_blocks=4, token_budget=64)
    scheduler.add(request(0, range(8), max_tokens=3))
    scheduler.add(request(1, range(20, 28), max_tokens=3))
    assert [len(plan.rows) for plan in run(scheduler)] == [1] * 6
    assert scheduler.num_preemptions == 0


def test_the_victim_resumes_after_the_others_with_prompt_and_output():
    scheduler = make(num_blocks=5, token_budget=64)
    first, second = request(0, range(7), 12), request(1, range(20, 26), 6)
    scheduler.add(first)
    scheduler.add(second)
    plans = run(scheduler)
    assert first.num_preemptions == 0
    assert second.num_preemptions >= 1
    assert scheduler.num_preemptions == second.num_preemptions
    starts = [row for plan in plans for row in plan.rows if row.starts][2:]
    assert starts[0].sequence_id == 1
    assert starts[0].position + starts[0].num_tokens > 6
    assert first.output_token_ids == [50] * 12
    assert second.output_token_ids == [50] * 6


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_preemptions_of_a_sequence_are_bounded(limit):
    scheduler = make(num_blocks=8, max_preemptions=limit, max_num_seqs=8)
    requests = [request(i, range(i * 8, i * 8 + 3), 20) for i in range(8)]
    for one in requests:
        scheduler.add(one)
    run(scheduler)
    assert all(one.num_preemptions <= limit for one in requests)
    assert all(one.num_output_tokens == 20 for one in requests)
    assert (scheduler.num_preemptions > 0) == (limit > 0)


def test_an_immune_sequence_keeps_its_blocks_and_reserves_the_rest():
    scheduler = make(num_blocks=6, max_preemptions=0, token_budget=64)
    one = request(0, range(4), max_tokens=12)
    scheduler.add(one)
    step(scheduler)
    assert one.num_reserved_blocks == 3
    assert not scheduler.preempt(one)
    scheduler.add(request(1, range(20, 24), max_tokens=8))
    plan, _ = step(scheduler)
    assert [row.sequence_id for row in plan.rows] == [0]


# --- prefix cache ------------------------------------------------------------


def test_a_prompt_start_is_found_and_counted():
    scheduler = make()
    scheduler.add(request(0, range(10), max_tokens=1))
    (first,) = run(scheduler)
    second = request(1, [*range(8), 60, 61, 62])
    scheduler.add(second)
    plan, _ = step(scheduler)
    row = plan.rows[0]
    assert (row.position, row.tokens) == (8, (60, 61, 62))
    assert row.new_blocks[:2] == first.rows[0].new_blocks[:2]
    assert row.first_block == 0
    assert second.num_cached_tokens == 8
    assert (scheduler.num_prefix_hits, scheduler.num_prefix_queries) == (8, 21)


def test_blocks_are_found_only_after_commit():
    scheduler = make(token_budget=64)
    scheduler.add(request(0, range(8)))
    first = scheduler.schedule()
    scheduler.add(request(1, range(8)))
    second = scheduler.schedule()
    assert second.rows[1].position == 0
    commit(scheduler, first)
    scheduler.add(request(2, range(8)))
    third = scheduler.schedule()
    assert third.rows[2].position == 7


def test_a_fully_cached_prompt_computes_its_last_token_in_a_copy():
    scheduler = make()
    scheduler.add(request(0, range(8), max_tokens=1))
    (plan,) = run(scheduler)
    blocks = plan.rows[0].new_blocks
    scheduler.add(request(1, range(8), max_tokens=1))
    (plan,) = run(scheduler)
    row = plan.rows[0]
    assert (row.position, row.tokens, row.samples) == (7, (7,), True)
    assert row.new_blocks[0] == blocks[0]
    assert row.new_blocks[1] != blocks[1]
    assert row.copy == BlockCopy(source=blocks[1], target=row.new_blocks[1])


def test_copies_of_a_step_are_limited():
    scheduler = make(max_block_copies=1)
    scheduler.add(request(0, range(8), max_tokens=1))
    run(scheduler)
    for number in (1, 2):
        scheduler.add(request(number, range(8), max_tokens=1))
    assert [len(plan.rows) for plan in run(scheduler)] == [1, 1]


@pytest.mark.parametrize(
    "fields", [{"cache_salt": "s"}, {"adapter": "a"}, {"max_cached_tokens": 0}]
)
def test_salt_adapter_and_choice_keep_requests_apart(fields):
    scheduler = make()
    scheduler.add(request(0, range(8), max_tokens=1))
    run(scheduler)
    scheduler.add(request(1, range(8), max_tokens=1, **fields))
    assert step(scheduler)[0].rows[0].position == 0


def test_without_prefix_caching_nothing_is_found():
    scheduler = make(enable_prefix_caching=False)
    for number in range(2):
        scheduler.add(request(number, range(8), max_tokens=1))
        assert step(scheduler)[0].rows[0].position == 0


def test_reset_forgets_contents_and_refuses_while_running():
    scheduler = make()
    scheduler.add(request(0, range(8), max_tokens=2))
    step(scheduler)
    assert not scheduler.reset_prefix_cache()
    step(scheduler)
    assert scheduler.reset_prefix_cache()
    scheduler.add(request(1, range(8), max_tokens=1))
    assert step(scheduler)[0].rows[0].position == 0


# --- forks -------------------------------------------------------------------


@pytest.mark.parametrize("caching", [True, False])
def test_forks_share_the_prompt_and_copy_its_last_block(caching):
    scheduler = make(enable_prefix_caching=caching)
    for one in forks(range(10), 3):
        scheduler.add(one)
    first, _ = step(scheduler)
    assert [row.sequence_id for row in first.rows] == [0]
    second, _ = step(scheduler)
    parent, *others = second.rows
    table = first.rows[0].new_blocks
    assert parent.tokens == ()
    for row in others:
        assert (row.position, row.tokens) == (9, (9,))
        assert row.new_blocks[:2] == table[:2]
        assert row.copy == BlockCopy(source=table[2], target=row.new_blocks[2])
        assert row.new_blocks[2] not in table
    run(scheduler)
    assert scheduler.num_free_blocks == 16


def test_forks_start_while_the_parents_first_token_is_in_flight():
    scheduler = make()
    for one in forks(range(9), 2):
        scheduler.add(one)
    scheduler.schedule()
    second = scheduler.schedule()
    assert [row.sequence_id for row in second.rows] == [0, 1]
    # The last token of nine is the first in its block: nothing to copy.
    assert second.rows[1].copy is None
    assert second.rows[1].position == 8


def test_forks_do_not_hold_up_the_queue():
    scheduler = make(token_budget=4)
    for one in forks(range(12), 2):
        scheduler.add(one)
    scheduler.add(request(5, (1,), max_tokens=1, priority=1))
    plans = run(scheduler)
    started = [row.sequence_id for plan in plans for row in plan.rows if row.starts]
    assert started == [0, 1, 5]


@pytest.mark.parametrize("end", ["abort", "preempt", "fail"])
def test_forks_go_on_without_their_parent(end):
    scheduler = make(token_budget=4)
    parent, fork = forks(range(10), 2)
    scheduler.add(parent)
    scheduler.add(fork)
    step(scheduler, finite=end != "fail")
    if end == "abort":
        scheduler.abort_sequence(parent)
    elif end == "preempt":
        assert scheduler.preempt(parent)
    run(scheduler)
    assert fork.output_token_ids == [50] * 4
    assert fork.finish_reason == "length"


# --- refusals ----------------------------------------------------------------


def test_an_empty_prompt_is_refused():
    with pytest.raises(InvalidRequestError, match="empty"):
        make().add(request(0, ()))


def test_a_prompt_that_fills_the_context_is_refused():
    scheduler = make(max_model_len=8)
    with pytest.raises(ContextTooLongError, match=r"8 tokens.*holds 8"):
        scheduler.add(request(0, range(8)))
    scheduler.add(request(1, range(7)))
    assert scheduler.num_waiting == 1


def test_a_request_that_can_never_fit_the_pool_is_refused():
    scheduler = make(num_blocks=2)
    with pytest.raises(ContextTooLongError, match=r"need 3 KV blocks.*pool has 2"):
        scheduler.add(request(0, range(6), max_tokens=3))
    scheduler.add(request(1, range(6), max_tokens=2))
    run(scheduler)


def test_a_sequence_id_in_use_is_refused():
    scheduler = make()
    scheduler.add(request(0))
    with pytest.raises(InvalidRequestError, match="sequence_id=0 is in use"):
        scheduler.add(request(0))
    assert scheduler.num_waiting == 1


@pytest.mark.parametrize("field", ["max_num_seqs", "token_budget", "max_block_copies"])
def test_limits_below_one_are_refused(field):
    with pytest.raises(ConfigError, match=f"{field}=0"):
        make(**{field: 0})


def test_a_sequence_is_found_by_its_id_until_it_ends():
    scheduler = make()
    one = request(3, max_tokens=1)
    scheduler.add(one)
    assert scheduler.get(3) is one
    run(scheduler)
    with pytest.raises(KeyError):
        scheduler.get(3)


# --- groups with a window -----------------------------------------------------


def test_a_sequence_that_never_fits_a_window_is_refused():
    # 8 tokens of the window and 32 under way, hence 12 blocks at most.
    scheduler = make(window_pools=(WindowPool(8, 11),))
    with pytest.raises(ContextTooLongError, match="12 KV blocks of 4 tokens for a win"):
        scheduler.add(request(0, range(40), max_tokens=20))
    scheduler.add(request(1, range(40), max_tokens=4))


def test_a_long_sequence_runs_in_a_small_window():
    scheduler = make(window_pools=(WindowPool(8, 12),), num_blocks=16)
    scheduler.add(request(0, range(40), max_tokens=24))
    plans = run(scheduler)
    assert sum(plan.num_tokens for plan in plans) == 63
    full, window = scheduler.pools
    assert full.num_free == 16
    assert window.num_free == 12


def test_who_lacks_a_block_of_a_window_preempts_the_last():
    scheduler = make(
        window_pools=(WindowPool(24, 13),),
        num_blocks=64,
        token_budget=32,
        max_num_seqs=2,
    )
    scheduler.add(request(0, range(24), max_tokens=20))
    scheduler.add(request(1, range(24, 48), max_tokens=20))
    run(scheduler)
    assert scheduler.num_preemptions > 0


def test_an_immune_sequence_shares_nothing_with_a_window():
    scheduler = make(
        window_pools=(WindowPool(8, 32),), num_blocks=64, max_preemptions=0
    )
    for number in range(2):
        scheduler.add(request(number, range(20)))
        run(scheduler)
    assert scheduler.num_prefix_hits == 0
