"""Claims where no lock can be asked: only the signs of life tell."""

import time

import pytest

from jllm.batch import JobBusyError, Store, declare_dead
from jllm.batch.leases import FINISHED, Claims, Peers, Presence, wait_for_turn

LEASE = 0.2


@pytest.fixture
def store(tmp_path):
    return Store(f"memory:/{tmp_path}")


@pytest.fixture
def other(store):
    """A worker that lives, until it is told to die without a word."""
    presence = Presence(store, "other", is_shared=True, lease_seconds=LEASE)
    with presence:
        yield presence


def die(presence):
    presence._stopped.set()
    presence._thread.join()


def watch(peers, worker):
    """The first thing that is certain of a worker."""
    while (state := peers.state(worker)) == "unknown":
        time.sleep(0.01)
    return state


def test_a_worker_lives_as_long_as_it_gives_signs(store, other):
    peers = Peers(store, LEASE)
    assert peers.names() == [other.worker]
    assert peers.state(other.worker) == "unknown"
    assert watch(peers, other.worker) == "alive"
    die(other)
    began = time.monotonic()
    while peers.state(other.worker) == "alive":
        time.sleep(0.01)
    assert peers.state(other.worker) == "lost"
    assert time.monotonic() - began > LEASE / 2


def test_work_of_the_lost_is_taken_once(store, other):
    mine = Claims(store, other.worker, Peers(store, LEASE))
    assert mine.take("a", None)
    assert not mine.take("a", "000000")
    die(other)
    takers = [Claims(store, name, Peers(store, LEASE)) for name in ("x", "y")]
    assert not takers[0].take("a", "000000")
    for taker in takers:
        assert watch(taker._peers, other.worker) == "lost"
    # Both have seen the same claim; the number after it is given once.
    assert [taker.take("a", "000000") for taker in takers] == [True, False]
    assert mine.lost(["a"]) == ["a"]
    takers[0].finish("a")
    assert takers[1].latest() == {"a": FINISHED}
    assert not takers[1].take("a", FINISHED)
    takers[0].reopen("a")
    assert takers[1].take("a", takers[1].latest().get("a"))


def test_a_claim_without_an_owner_is_taken_in_the_end(store):
    store.create("claims/a.000000", b"")
    claims = Claims(store, "x", Peers(store, LEASE))
    assert not claims.take("a", "000000")
    assert watch(claims._peers, "") == "lost"
    assert claims.take("a", "000000")


def test_who_is_declared_dead_is_lost_at_once(store, other):
    declare_dead(store, "another")
    assert Peers(store, LEASE).state(other.worker) != "lost"
    die(other)
    declare_dead(store, "other")
    assert Peers(store, LEASE).state(other.worker) == "lost"


def test_a_job_waits_for_its_turn(store, other):
    claims, peers = Claims(store, "x", Peers(store, LEASE)), Peers(store, LEASE)
    options = {"is_shared": False, "lease_seconds": LEASE}
    with pytest.raises(JobBusyError, match=r"worker other-\w+ \(process \d+"):
        wait_for_turn(claims, peers, "x", **options)
    die(other)
    # Worker x has the job's claim, and gives no signs: it is waited out.
    peers = Peers(store, LEASE)
    wait_for_turn(
        Claims(store, "y", peers), peers, "y", is_shared=True, lease_seconds=LEASE
    )
    assert peers.state("x") == "lost"
