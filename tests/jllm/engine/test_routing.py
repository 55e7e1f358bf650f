"""Routing: the longest cached start, then the least load, within bounds."""

from jllm.engine.routing import REQUEST_TOKENS, Router, SentPrefixes, prompt_pieces

A, B, C = b"a", b"b", b"c"


def router(**options):
    return Router([100, 100], piece_tokens=10, **options)


def test_pieces_are_whole_and_chained():
    tokens = list(range(300))
    pieces = prompt_pieces(tokens, None)
    assert len(pieces) == 2
    assert prompt_pieces(tokens[:256], None) == pieces
    assert prompt_pieces(tokens[:255], None) == pieces[:1]
    # A piece stands for all tokens before it too, and for the salt.
    other = prompt_pieces([9, *tokens[1:]], None)
    assert set(other).isdisjoint(pieces)
    assert set(prompt_pieces(tokens, "s")).isdisjoint(pieces)


def test_the_longest_start_wins_then_the_least_load():
    routes = router()
    first = routes.send([A, B], 25)
    assert (first.replica, first.load) == (0, 25 + REQUEST_TOKENS)
    assert routes.send([C], 15).replica == 1
    # Both are loaded; the longer start decides, and what is cached is no load.
    again = routes.send([A, B, C], 35)
    assert (again.replica, again.load) == (0, 35 - 20 + REQUEST_TOKENS)
    # Nothing is known of it: the least load.
    assert routes.send([b"x"], 15).replica == 1


def test_an_end_takes_the_load_away():
    routes = router()
    sent = [routes.send([A], 15), routes.send([], 5)]
    assert routes.loads == (15 + REQUEST_TOKENS, 5 + REQUEST_TOKENS)
    for route in sent:
        routes.end(route)
    assert routes.loads == (0, 0)


def test_a_replica_far_ahead_is_not_chosen_for_its_cache():
    routes = router(lead_tokens=1000, max_lead=1.0)
    replicas = [routes.send([A], 500).replica for _ in range(8)]
    # 756, then 746 more each: the second one goes elsewhere, and so knows it too.
    assert replicas[:3] == [0, 0, 1]
    assert abs(replicas.count(0) - replicas.count(1)) <= 2


def test_what_a_cache_cannot_hold_is_forgotten():
    sent = SentPrefixes(3)
    sent.add([A, B])
    sent.add([C])
    sent.add([b"d"])
    # Of the oldest prompt the longer start has left first.
    assert (len(sent), sent.num_known([A, B])) == (3, 1)
    sent.clear()
    assert sent.num_known([A]) == 0


def test_without_caches_the_load_alone_counts():
    routes = Router([0, 0])
    assert [routes.send([A], 9).replica for _ in range(4)] == [0, 1, 0, 1]
