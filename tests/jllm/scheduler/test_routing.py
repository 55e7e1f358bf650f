"""Requests go where their prefix is, unless others idle meanwhile."""

import pytest

from jllm.scheduler.routing import ReplicaRouter

SIZE = 4


def prompt(*blocks):
    return [block for block in blocks for _ in range(SIZE)]


@pytest.fixture
def router():
    return ReplicaRouter(3, SIZE, num_blocks=8, most_ahead=2)


def test_unknown_prompts_go_to_the_least_loaded(router):
    assert router.route(prompt(1), [3, 1, 2]) == 1
    assert router.route(prompt(2), [3, 3, 2]) == 2


def test_the_longest_prefix_wins_over_the_load(router):
    assert router.route(prompt(1, 2, 3), [0, 1, 1]) == 0
    assert router.route(prompt(1, 9), [9, 0, 9]) == 1
    assert router.route(prompt(1, 2, 4), [2, 0, 0]) == 0
    assert router.route(prompt(1, 9, 4), [0, 2, 0]) == 1


def test_among_equal_prefixes_the_least_loaded_wins(router):
    router.route(prompt(1), [0, 9, 9])
    router.route(prompt(1), [9, 9, 0])
    assert router.route(prompt(1), [2, 0, 1]) == 2


def test_a_replica_too_far_ahead_gets_no_more(router):
    router.route(prompt(1), [0, 1, 1])
    assert router.route(prompt(1), [2, 0, 1]) == 0
    assert router.route(prompt(1), [3, 0, 1]) == 1


def test_a_part_of_a_block_is_no_prefix(router):
    router.route(prompt(1)[:-1], [0, 1, 1])
    assert router.route(prompt(1)[:-1], [1, 0, 1]) == 1


def test_salts_share_nothing(router):
    router.route(prompt(1), [0, 1, 1], "a")
    assert router.route(prompt(1), [1, 0, 1], "b") == 1
    assert router.route(prompt(1), [1, 0, 1], "a") == 0


def test_what_was_asked_for_the_longest_ago_is_forgotten_from_its_end(router):
    router.route(prompt(1, 2), [0, 1, 1])
    router.route(prompt(3, 4, 5, 6, 7, 8, 9), [0, 1, 1])
    # One block too many: the end of the first prompt is gone, its start is not.
    assert router.route(prompt(1), [1, 0, 1]) == 0
    assert router.route(prompt(1, 2), [9, 9, 0]) == 2
    assert router.route(prompt(1, 2), [1, 0, 1]) == 2


def test_without_a_cache_only_the_load_counts():
    router = ReplicaRouter(2, SIZE, num_blocks=0)
    router.route(prompt(1), [0, 1])
    assert router.route(prompt(1), [1, 0]) == 1


def test_everything_is_forgotten(router):
    router.route(prompt(1), [0, 1, 1])
    router.forget()
    assert router.route(prompt(1), [1, 0, 1]) == 1
