"""Random runs of the scheduler; see `simulator.py`.

Each run is a function of its seed. The runs are shared out over processes of their own:
the type checks that the test session puts into every function would take most of the
time. A few runs are made with them.
"""

import dataclasses
import pathlib
import subprocess
import sys

import pytest

from jllm.scheduler import draft, prefix_cache
from jllm.scheduler.block_manager import BlockManager
from jllm.scheduler.block_tables import BlockTables
from tests.jllm.scheduler import simulator

NUM_PARTS = 4
SCRIPT = pathlib.Path(simulator.__file__)
ROOT = pathlib.Path(__file__).parents[3]


@pytest.mark.slow
@pytest.mark.parametrize("part", range(NUM_PARTS))
def test_invariants_hold_after_every_step(simulator_seeds, part):
    count = -(-simulator_seeds // NUM_PARTS)
    arguments = [f"--seeds={count}", f"--first-seed={part * count}"]
    run = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr


def test_runs_hold_with_type_checks_and_reach_every_case():
    counts = simulator.run_seeds(0, 10)
    assert all(counts[name] > 0 for name in simulator.COUNTED), counts


def test_a_seed_gives_the_same_run_again():
    runs = [simulator.Simulation(7) for _ in range(2)]
    for run in runs:
        run.run()
    first, second = ([r.token_ids for r in run.requests] for run in runs)
    assert first == second
    assert len(first) > 10


def test_colliding_digests_cost_hits_but_no_tokens(monkeypatch):
    strong = prefix_cache.digest

    def weak(parent, content):
        return bytes([strong(parent, content)[0] % 4])

    monkeypatch.setattr(prefix_cache, "digest", weak)
    assert simulator.run_seeds(0, 8)["hits"] > 0


def test_a_failing_seed_is_named(monkeypatch):
    monkeypatch.setattr(simulator, "sample", lambda seed, entries, _: len(entries) % 2)
    monkeypatch.setattr(simulator, "tokens_alone", lambda request, seed, _: [])
    with pytest.raises(AssertionError) as failure:
        simulator.run_seeds(3, 1)
    assert "--seed 3" in failure.value.__notes__[0]


def one_too_many(first_needed):
    return lambda self, position: first_needed(self, position + self._block_size)


def idle(wrapped):
    return lambda self, *arguments: None


def only_the_first_copy(copies):
    return lambda request, match: copies(request, match)[:1]


def blind(last_missing):
    return lambda self, prefixes, first, end: -1


def forgetful(wrapped):
    """Blocks that are given back are not reserved anew."""

    def pass_by(self, table, position):
        reserving, table.is_reserving = table.is_reserving, False
        wrapped(self, table, position)
        table.is_reserving = reserving

    return pass_by


def same_for_all(match_windows):
    """Windows are looked for at the end of what the whole context has."""

    def match(self, request, blocks, num_tokens):
        found = match_windows(self, request, blocks, num_tokens)
        return dataclasses.replace(found, num_tokens=len(blocks) * self._block_size)

    return match


BUGS = {
    "a block too many goes back": (BlockManager, "first_needed", one_too_many),
    "no block goes back": (BlockManager, "pass_by", idle),
    "no copy in the windows": (draft, "_copies", only_the_first_copy),
    "a window that is lost is shared": (BlockManager, "last_missing", blind),
    "reservations end": (BlockManager, "pass_by", forgetful),
    "the groups disagree": (BlockTables, "_match_windows", same_for_all),
    "a source is kept": (BlockManager, "end_step", idle),
}


@pytest.mark.parametrize("bug", BUGS)
def test_bugs_in_the_groups_with_a_window_are_found(monkeypatch, bug):
    owner, name, change = BUGS[bug]
    monkeypatch.setattr(owner, name, change(getattr(owner, name)))
    with pytest.raises(AssertionError):
        simulator.run_seeds(0, 100, num_steps=60)
