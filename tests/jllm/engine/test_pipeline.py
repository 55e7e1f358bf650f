"""A model over the stages of a pipeline: the same tokens, one dispatch a step."""

import re

import jax
import numpy as np
import pytest

from jllm.errors import ConfigError
from jllm.layers.batch import Batch
from tests.engines import (
    LLAMA,
    drain,
    make_engine,
    request,
    run,
    shared_engine,
    tokens_of,
)

UNEVEN = {**LLAMA, "num_hidden_layers": 3, "tie_word_embeddings": True}
"""Three layers, which no number of stages divides, and one table of embeddings."""
STAGES = 2
OPTIONS = {"block_size": 4, "num_blocks": 64}


def workload(first_id=0):
    """Chunked and short prompts, shared starts, draws with and without rules."""
    rng = np.random.default_rng(2)
    start = rng.integers(3, 331, 21)
    prompts = [[*start, *rng.integers(3, 331, n)] for n in (1, 9, 60)]
    prompts += [rng.integers(3, 331, 5), rng.integers(3, 331, 90)]
    params = [
        {"temperature": 0},
        {"temperature": 0.9, "seed": 4, "n": 2},
        {"temperature": 0, "logprobs": 2, "prompt_logprobs": 1},
        {"temperature": 0.8, "seed": 6, "top_p": 0.9, "repetition_penalty": 1.1},
        {"temperature": 1.0, "seed": 8},
    ]
    return [
        request(first_id + i, prompt, max_tokens=12, ignore_eos=True, **own)
        for i, (prompt, own) in enumerate(zip(prompts, params, strict=True))
    ]


@pytest.fixture(scope="module")
def engine():
    engine = make_engine(UNEVEN, pipeline_parallel_size=STAGES, **OPTIONS)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def expected():
    return run(shared_engine(UNEVEN, **OPTIONS), workload())


def test_tokens_are_those_of_one_device(engine, expected):
    assert run(engine, workload()) == expected
    assert engine.scheduler.num_prefix_hits
    again = run(engine, workload(100))  # everything is found in the cache
    assert list(again.values()) == list(expected.values())
    engine.scheduler.check_integrity()


def test_one_dispatch_a_step_and_stages_idle_at_the_ends_only(engine):
    metrics = engine.metrics
    before = (metrics.steps, metrics.dispatches, metrics.idle_stage_steps)
    prompts = np.random.default_rng(4).integers(3, 331, (4, 9))
    run(
        engine,
        [
            request(i, prompt, max_tokens=40, temperature=0, ignore_eos=True)
            for i, prompt in enumerate(prompts)
        ],
    )
    after = (metrics.steps, metrics.dispatches, metrics.idle_stage_steps)
    steps, dispatches, idle = (b - a for a, b in zip(before, after, strict=True))
    assert dispatches == steps
    # Four rows of 40 tokens, half of them in each step.
    assert steps <= 2 * 40 + 3
    assert idle <= 4


def test_a_row_alone_leaves_the_other_stages_idle(engine):
    metrics = engine.metrics
    before = metrics.steps, metrics.idle_stage_steps
    item = request("a", range(3, 12), max_tokens=10, temperature=0, ignore_eos=True)
    alone = run(shared_engine(UNEVEN, **OPTIONS), [item])
    assert run(engine, [item]) == alone
    steps, idle = metrics.steps - before[0], metrics.idle_stage_steps - before[1]
    assert steps == STAGES * 10
    assert idle == (STAGES - 1) * steps


def test_what_is_on_its_way_may_be_aborted_or_preempted(engine, expected):
    items = workload()
    for item in items:
        engine.add(item)
    for step in range(8):
        engine.step()
        if step % 2 and engine.scheduler.running:
            engine.scheduler.preempt(engine.scheduler.running[-1])
    engine.abort("0")
    late = workload(200)[3]  # takes the row of the one that is gone
    engine.add(late)
    preempted = engine.scheduler.num_preemptions
    outputs = drain(engine)
    tokens = tokens_of(outputs)
    assert preempted
    for (request_id, index), found in tokens.items():
        name = str(int(request_id) % 200)
        if name != "0":
            # What came out before the abort is not in `outputs`.
            assert expected[name, index][-len(found) :] == found
    assert tokens["203", 0] == expected["3", 0]
    engine.scheduler.check_integrity()
    assert engine.scheduler.num_free_blocks == OPTIONS["num_blocks"]


def test_each_device_holds_its_stage(engine):
    weights, state = engine.weights, engine.state
    for leaf in (weights["layers"][0]["qkv"], state.kv[0], state.flights.hidden):
        assert leaf.shape[0] == STAGES
        assert {shard.data.shape[0] for shard in leaf.addressable_shards} == {1}
    assert len(state.kv) == 2  # of three layers
    (shard, *_) = weights["embed"].addressable_shards
    assert shard.data.shape[0] == weights["embed"].shape[0] // STAGES


def test_hidden_states_go_to_the_next_stage_and_nothing_large_besides(engine):
    program = engine.programs.get("prefill", 64)
    text = program.as_text()
    found = re.findall(r"= \w+\[([\d,]*)\]\S* collective-permute(?:-start)?\(", text)
    sizes = [np.prod([int(d) for d in dims.split(",") if d]) for dims in found]
    hidden = 64 * LLAMA["hidden_size"]
    assert sizes.count(hidden) == 1
    assert max(sizes) == hidden
    gathered = re.findall(r"= \w+\[([\d,]*)\]\S* all-gather(?:-start)?\(", text)
    for dims in gathered:
        assert np.prod([int(d) for d in dims.split(",") if d]) <= hidden


@pytest.mark.slow
def test_forward_is_that_of_the_whole_model(engine):
    prompts = [[5, 9, 200, 7, 31], [4, 4]]
    hidden = []
    for one in (engine, shared_engine(UNEVEN, **OPTIONS)):
        model, batch = one._parts.model, Batch.from_prompts(prompts, block_size=4)
        kv = model.init_kv(4, 4)
        first, kv = jax.jit(model.forward)(one.weights, kv, batch)
        # The next token reads what the prompt has left in the pools of all stages.
        later = Batch.from_prompts([[8], [9]], num_cached=[5, 2], block_size=4)
        second, _ = jax.jit(model.forward)(one.weights, kv, later)
        hidden.append((first, second))
    for ours, theirs in zip(*hidden, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="embed"):
        engine._parts.model.forward(engine.weights, kv, batch, capture=["embed"])


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="pipeline_parallel_size=4 must be at most"):
        make_engine(UNEVEN, pipeline_parallel_size=4)
    with pytest.raises(ConfigError, match=r"pipeline_parallel_size=3 x .* needs 12"):
        make_engine(
            UNEVEN,
            pipeline_parallel_size=3,
            tensor_parallel_size=2,
            data_parallel_size=2,
        )
    with pytest.raises(ConfigError, match="pipeline_parallel_size=0 must be"):
        make_engine(UNEVEN, pipeline_parallel_size=0)


@pytest.mark.slow
def test_stages_whose_layers_devices_share_and_replicas(expected):
    engine = make_engine(
        UNEVEN,
        pipeline_parallel_size=STAGES,
        tensor_parallel_size=2,
        data_parallel_size=2,
        **OPTIONS,
    )
    items = workload()
    plain = [items[0], items[4]]  # without the programs of rules
    tokens = run(engine, plain)
    assert tokens == {
        (item.request_id, 0): expected[item.request_id, 0] for item in plain
    }
    assert all(replica.metrics.steps for replica in engine.engines)
    engine.close()
