"""The guard of counts: what it calls worse, and that it fails then."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks.guard import __main__ as guard
from benchmarks.guard import tables
from benchmarks.guard.counts import program_counts

STORED = {"decode": {"copies": 3, "temporary_bytes": 1000}}


def found(**changes):
    return {"decode": STORED["decode"] | changes}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, []),
        ({"copies": 4}, ["worse: decode: copies: 3 -> 4"]),
        ({"copies": 2}, ["better: decode: copies: 3 -> 2"]),
        ({"temporary_bytes": 1015}, []),
        ({"temporary_bytes": 1030}, ["worse: decode: temporary_bytes: 1000 -> 1030"]),
        ({"fusions": 1}, ["worse: decode: fusions: None -> 1"]),
    ],
)
def test_differences_are_named_with_program_count_old_and_new(changes, words):
    assert list(map(str, tables.compare(STORED, found(**changes)))) == words


def test_a_program_that_is_gone_is_worse():
    changes = tables.compare(STORED, {})
    assert len(changes) == 2
    assert all(change.is_worse for change in changes)


@pytest.fixture
def stored(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "FOLDER", tmp_path)
    for name in ("read", "versions", "write"):
        function = getattr(tables, name)
        defaults = function.__defaults__
        monkeypatch.setattr(function, "__defaults__", (*defaults[:-1], tmp_path))
    tables.write("cpu", STORED, guard.versions("cpu"))


@pytest.mark.usefixtures("stored")
def test_worse_fails_better_passes_and_update_stores():
    assert guard.check("cpu", found(copies=2), update=False)
    assert not guard.check("cpu", found(copies=4), update=False)
    assert guard.check("cpu", found(copies=4), update=True)
    assert guard.check("cpu", found(copies=4), update=False)
    assert tables.read("cpu") == found(copies=4)


def test_counts_of_a_program():
    def step(state, x):
        return state.at[0].set(x.sum()), jnp.sort(x) @ jnp.ones((8, 8))

    jitted = jax.jit(step, donate_argnums=0)
    compiled = jitted.lower(jnp.zeros(4), jnp.ones((8, 8))).compile()
    counts = program_counts(compiled)
    assert counts["flops"] >= 2 * 8**3
    assert 0 < counts["launches"] <= counts["instructions"]
    assert counts["argument_bytes"] == 4 * (4 + 64)
    assert counts["loops"] == 0
