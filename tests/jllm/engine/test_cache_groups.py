"""Layers with a window: the same tokens, and blocks go back while a request runs."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jllm.engine import create
from jllm.engine.memory import MemoryBudget, WindowShare
from jllm.models.base import CacheGroup
from jllm.models.decoder import Decoder
from jllm.scheduler.plan import NO_BLOCK
from tests.engines import drain, make_engine, request, run, tokens_of

WINDOW, BLOCK_SIZE, BUDGET = 10, 4, 64
GREEDY = {"temperature": 0, "max_tokens": 24, "ignore_eos": True}


class WindowedDecoder(Decoder):
    """Layer 0 sees a few tokens, layer 1 all of them."""

    @property
    def windows(self):
        return (WINDOW, None)


class NarrowDecoder(Decoder):
    """No layer sees a whole context."""

    @property
    def windows(self):
        return (14, WINDOW)


def one_group(kind):
    """The same network, in which every layer keeps the whole context."""

    class Ungrouped(kind):
        @property
        def cache_groups(self):
            return (CacheGroup((0, 1), None),)

    return Ungrouped


def make(kind, **options):
    build = create.build_model

    def build_windowed(*arguments):
        model = build(*arguments)
        return kind(model.config, model.options)

    options = {"block_size": BLOCK_SIZE, "max_num_batched_tokens": BUDGET} | options
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(create, "build_model", build_windowed)
        return make_engine(**options)


def workload():
    """Requests of all kinds, shorter and longer than the window; some share a start."""
    rng = np.random.default_rng(5)
    shared = rng.integers(3, 331, 40).tolist()
    requests = []
    for i, length in enumerate((1, 9, 11, 30, 50, 64, 70, 110)):
        prompt = rng.integers(3, 331, length).tolist()
        params = GREEDY if i % 2 else GREEDY | {"temperature": 0.9, "seed": i}
        if i == 4:
            params = params | {"repetition_penalty": 1.3, "top_p": 0.9}
        requests.append(request(i, shared * (i % 3 == 0) + prompt, **params))
    return requests


def alone(kind):
    engine = make(one_group(kind), enable_prefix_caching=False)
    assert len(engine.state.window_tables) == 0
    tokens = {}
    for item in workload():
        tokens |= run(engine, [item])
    engine.close()
    return tokens


@pytest.fixture(scope="module")
def expected():
    """Each request by itself, where all layers keep the whole context."""
    return alone(WindowedDecoder)


def spoil_free_blocks(engine):
    """Makes all that is in no table and no cache NaN."""
    kv = list(engine.state.kv)
    groups = engine._parts.model.cache_groups
    for group, pool in zip(groups, engine.scheduler.pools, strict=True):
        # As long as the pool, so that one program does: the others are dropped.
        free = np.full(pool.num_blocks, pool.num_blocks, np.int32)
        free[: len(pool._free)] = pool._free
        for layer in group.layers:
            kv[layer] = kv[layer].at[free].set(jnp.nan, mode="drop")
    engine.executor.state = dataclasses.replace(engine.state, kv=tuple(kv))


def test_the_window_matters(expected):
    engine = make(Decoder, enable_prefix_caching=False)
    tokens = run(engine, workload())
    engine.close()
    assert tokens[("0", 0)] != expected[("0", 0)]


@pytest.mark.slow
def test_in_a_batch_and_with_prefix_hits(expected):
    engine = make(WindowedDecoder)
    assert len(engine.state.window_tables) == 1
    full, window = engine.scheduler.pools
    assert window.num_blocks < full.num_blocks
    assert [leaf.shape[0] for leaf in engine.state.kv] == [
        window.num_blocks,
        full.num_blocks,
    ]
    stats, state = engine.stats(), engine.state
    assert stats.kv_bytes_used == 0
    pools = [*state.kv, state.block_tokens]
    assert stats.kv_bytes == sum(leaf.nbytes for leaf in pools)
    assert run(engine, workload()) == expected
    engine.scheduler.check_integrity()
    hits = engine.scheduler.num_prefix_hits
    for item in workload():
        assert run(engine, [item])[(item.request_id, 0)] == expected[item.request_id, 0]
    # Whole prompts, though most of their blocks are lost to the window group.
    assert engine.scheduler.num_prefix_hits > hits + 200
    engine.close()


@pytest.mark.slow
def test_alone_with_all_free_blocks_spoilt(expected):
    engine = make(WindowedDecoder, max_num_batched_tokens=16, max_num_seqs=2)
    for item in workload()[1::3]:
        outputs = []
        engine.add(item)
        while engine.has_unfinished:
            spoil_free_blocks(engine)
            outputs += engine.step()
        assert tokens_of(outputs) == {
            (item.request_id, 0): expected[item.request_id, 0]
        }
    engine.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"max_num_seqs": 4, "max_num_batched_tokens": 7},
        {"num_blocks": 44, "max_model_len": 160},
    ],
    ids=["chunked", "preempted"],
)
def test_with_other_options(expected, options):
    engine = make(WindowedDecoder, **options)
    assert run(engine, workload()) == expected
    if "num_blocks" in options:
        assert engine.scheduler.num_preemptions > 0
    engine.scheduler.check_integrity()
    engine.close()


@pytest.mark.slow
def test_forks_copy_in_every_group():
    tokens = []
    for kind in (one_group(WindowedDecoder), WindowedDecoder):
        engine = make(kind)
        options = {"temperature": 1.0, "max_tokens": 20, "ignore_eos": True}
        prompt = list(range(3, 3 + 39))
        tokens.append(run(engine, [request("n", prompt, n=4, seed=100, **options)]))
        engine.scheduler.check_integrity()
        engine.close()
    assert tokens[0] == tokens[1]
    assert len({tuple(ids) for ids in tokens[1].values()}) == 4


@pytest.mark.slow
def test_a_model_without_a_layer_that_sees_all():
    engine = make(NarrowDecoder)
    # The group of the whole context has the token history only.
    assert [len(g.layers) for g in engine._parts.model.cache_groups] == [0, 1, 1]
    assert run(engine, workload()) == alone(NarrowDecoder)
    engine.scheduler.check_integrity()
    engine.close()


def test_a_long_request_holds_a_bounded_number_of_blocks():
    engine = make(WindowedDecoder, max_num_seqs=2, max_num_batched_tokens=16)
    engine.add(request("long", range(3, 103), **GREEDY | {"max_tokens": 100}))
    held, lengths = [], []

    def look(_):
        for sequence in engine.scheduler.running:
            full, window = (table.blocks for table in sequence.tables)
            held.append(sum(block != NO_BLOCK for block in window))
            lengths.append(len(full))

    drain(engine, on_step=look)
    engine.close()
    assert max(lengths) == 200 // BLOCK_SIZE
    # The window, two chunks under way, and two for where they begin and end.
    assert max(held) <= -(-(WINDOW + 2 * 16) // BLOCK_SIZE) + 2
    # While it decodes: the window and a block for where it begins, and one more.
    assert max(held[-50:]) <= -(-WINDOW // BLOCK_SIZE) + 2
    assert min(held[-50:]) >= WINDOW // BLOCK_SIZE


def test_the_memory_is_divided_by_what_rows_can_hold():
    budget = MemoryBudget(
        capacity=1000,
        utilization=1.0,
        weights=0,
        temporaries=0,
        block=4,
        most_useful_blocks=10**6,
        windows=(WindowShare(window=8, block=4, held=20),),
    )
    blocks = budget.num_blocks
    # 4 n + 4 (20 + n // 8) <= 1000
    assert blocks == 205
    assert budget.pool_bytes(blocks) <= 1000 < budget.pool_bytes(blocks + 1)
    assert budget.windows[0].num_blocks(blocks) == 45
    assert budget.windows[0].num_blocks(10) == 10
