"""One model over several devices: the same tokens, and only the traffic it needs."""

import re

import jax
import numpy as np
import pytest

from jllm.errors import ConfigError
from tests.engines import (
    LLAMA,
    QWEN3,
    drain,
    make_engine,
    request,
    run,
    shared_engine,
    tokens_of,
)

COLLECTIVE = re.compile(
    r"= \w+\[([\d,]*)\]\S* (all-reduce|all-gather|all-to-all|collective-permute"
    r"|reduce-scatter)(?:-start)?\("
)
FEW_HEADS = {"num_key_value_heads": 2}


def workload():
    rng = np.random.default_rng(2)
    params = [
        {"temperature": 0},
        {"temperature": 0.9, "seed": 4},
        {"temperature": 0.8, "seed": 6, "top_p": 0.9, "repetition_penalty": 1.1},
        {"temperature": 0, "logprobs": 3, "prompt_logprobs": 1},
    ]
    return [
        request(
            i, rng.integers(3, 331, 7 + 11 * i), max_tokens=12, ignore_eos=True, **p
        )
        for i, p in enumerate(params)
    ]


@pytest.fixture(scope="module", params=[LLAMA, QWEN3], ids=["llama", "qwen3"])
def family(request):
    config = {**request.param, **FEW_HEADS}
    return config, run(shared_engine(config), workload())


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4, 8])
def test_tensor_parallel_tokens_are_the_same(family, size):
    config, expected = family
    engine = make_engine(config, tensor_parallel_size=size)
    assert run(engine, workload()) == expected
    engine.close()


@pytest.mark.slow
def test_replicas_give_the_same_tokens(family):
    config, expected = family
    engine = make_engine(config, tensor_parallel_size=2, data_parallel_size=2)
    assert run(engine, workload()) == expected
    assert all(replica.metrics.steps for replica in engine.engines)
    engine.close()


@pytest.mark.slow
def test_replicas_abort_and_forget():
    engine = make_engine(data_parallel_size=2)
    for item in workload():
        engine.add(item)
    engine.step()
    engine.abort("1")
    tokens = tokens_of(drain(engine))
    assert set(tokens) == {("0", 0), ("2", 0), ("3", 0)}
    assert engine.reset_prefix_cache()
    engine.close()


def test_a_prompt_goes_to_the_replica_that_has_its_start():
    engine = make_engine(data_parallel_size=2)
    start = list(range(1, 41))
    engine.add(request(0, start, max_tokens=1))
    drain(engine)
    # The first replica has one open request, the second has none.
    engine.add(request(1, [7] * 40, max_tokens=200, ignore_eos=True))
    engine.add(request(2, [*start, 5, 6], max_tokens=1))
    drain(engine)
    hits = [replica.stats().num_prefix_hits for replica in engine.engines]
    assert hits == [32, 0]
    assert engine.reset_prefix_cache()
    engine.close()


@pytest.mark.parametrize("kind_and_size", [("decode", 8), ("prefill", 64)], ids=str)
def test_two_all_reduces_per_layer_and_nothing_large_is_gathered(kind_and_size):
    engine = make_engine(tensor_parallel_size=4)
    program = engine.programs.get(*kind_and_size)
    vocab = engine._parts.model.padded_vocab_size
    engine.close()
    tokens = kind_and_size[1]
    sizes = {"all-reduce": []}
    for shape, opcode in COLLECTIVE.findall(program.as_text()):
        dims = [int(d) for d in shape.split(",") if d]
        sizes.setdefault(opcode, []).append(int(np.prod(dims or [1])))
    hidden = tokens * LLAMA["hidden_size"]
    # Two per layer, and one for the embedding, whose rows are shared out.
    assert sizes["all-reduce"].count(hidden) == 2 * LLAMA["num_hidden_layers"] + 1
    # The draw exchanges the sums of 128 blocks of the vocabulary, never the logits.
    rows = 8
    others = [n for name, ns in sizes.items() for n in ns if name != "all-reduce"]
    assert max(others) <= rows * 128 < rows * vocab


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="needs 16 devices, but there are 8"):
        make_engine(tensor_parallel_size=16)
    with pytest.raises(ConfigError, match="tensor_parallel_size=3"):
        make_engine(tensor_parallel_size=3)


def test_each_device_holds_its_share_of_the_pool():
    engine = make_engine({**LLAMA, **FEW_HEADS}, tensor_parallel_size=4)
    (leaf, *_) = engine.state.kv
    assert leaf.shape[2] == 4  # two KV heads, each on two devices
    assert {shard.data.shape[2] for shard in leaf.addressable_shards} == {1}
    assert len(jax.tree.leaves(engine.state)) == LLAMA["num_hidden_layers"] + 3
    engine.close()
