"""The same tokens whatever happens around a request."""

import jax.numpy as jnp
import numpy as np
import pytest

from jllm.layers.batch import Batch
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

PARAMS = [
    {"temperature": 0},
    {"temperature": 1.0, "seed": 7},
    {"temperature": 0.8, "seed": 11, "top_k": 20, "top_p": 0.9},
    {"temperature": 0.9, "seed": 3, "repetition_penalty": 1.2, "presence_penalty": 0.5},
    {"temperature": 0, "frequency_penalty": 0.7, "logprobs": 2},
]


def workload(count=32):
    """Requests of all kinds, some sharing a prefix."""
    rng = np.random.default_rng(5)
    shared = rng.integers(3, 331, 40).tolist()
    requests = []
    for i in range(count):
        prompt = rng.integers(3, 331, int(rng.integers(1, 70))).tolist()
        prompt = shared + prompt if i % 3 == 0 else prompt
        params = PARAMS[i % len(PARAMS)]
        requests.append(request(i, prompt, max_tokens=20, ignore_eos=True, **params))
    return requests


@pytest.fixture(scope="module")
def alone():
    """Each request run by itself, one after the other, without a cached prefix."""
    engine = make_engine(enable_prefix_caching=False)
    tokens = {}
    for item in workload():
        tokens |= run(engine, [item])
    engine.close()
    assert all(len(ids) == 20 for ids in tokens.values())
    return tokens


@pytest.mark.parametrize("config", [LLAMA, QWEN3], ids=["llama", "qwen3"])
def test_greedy_tokens_are_those_of_the_plain_forward(config):
    """Recomputes the whole context with the reference attention for every token."""
    engine = shared_engine(config)
    prompt = list(range(5, 43))
    (tokens,) = run(
        engine, [request("a", prompt, temperature=0, max_tokens=12, ignore_eos=True)]
    ).values()
    model = engine._parts.model
    context = list(prompt)
    for token in tokens:
        count = len(context)
        batch = Batch(
            tokens=jnp.asarray(context, jnp.int32),
            positions=jnp.arange(count, dtype=jnp.int32),
            slots=jnp.arange(count, dtype=jnp.int32),
            block_tables=jnp.arange(16, dtype=jnp.int32)[None],
            row_starts=jnp.array([0, count], jnp.int32),
            lengths=jnp.array([count], jnp.int32),
        )
        kv = model.init_kv(16, 16)
        hidden, _ = model.forward(engine.weights, kv, batch)
        logits = model.logits(engine.weights, hidden[-1:])
        assert int(jnp.argmax(logits)) == token
        context.append(token)


def test_in_a_batch(alone):
    assert run(shared_engine(), workload()) == alone


def test_with_every_bucket_compiled(alone):
    engine = shared_engine()
    engine.programs.wait()
    assert run(engine, workload()) == alone
    first = [item for item in workload() if item.request_id == "0"]
    assert run(engine, first)[("0", 0)] == alone[("0", 0)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"max_num_seqs": 1, "max_num_batched_tokens": 1},
        {"max_num_seqs": 4, "max_num_batched_tokens": 7},
        {"max_num_seqs": 8, "max_num_batched_tokens": 256},
        {"overlap": False},
        {"enable_prefix_caching": False},
        {"block_size": 4},
        {"attention": "reference"},
    ],
    ids=str,
)
def test_with_other_options(alone, options):
    engine = make_engine(**options)
    assert run(engine, workload()) == alone
    engine.scheduler.check_integrity()
    engine.close()


def test_with_a_prefix_hit(alone):
    engine = make_engine()
    for _ in range(2):
        for item in workload(6):
            assert (
                run(engine, [item])[(item.request_id, 0)] == alone[(item.request_id, 0)]
            )
    assert engine.scheduler.num_prefix_hits > 100
    engine.close()


def test_preempted(alone):
    engine = make_engine(num_blocks=20, max_model_len=160)
    assert run(engine, workload()) == alone
    assert engine.scheduler.num_preemptions > 3
    engine.scheduler.check_integrity()
    engine.close()


def test_with_aborts_around(alone):
    engine = make_engine()
    for item in workload():
        engine.add(item)
    outputs = []
    for step in range(10_000):
        if not engine.has_unfinished:
            break
        outputs += engine.step()
        if step in (3, 7, 12):
            engine.abort(str(step))
    tokens = tokens_of(outputs)
    for key, ids in alone.items():
        if key[0] not in ("3", "7", "12"):
            assert tokens[key] == ids
    engine.scheduler.check_integrity()
    engine.close()


@pytest.mark.parametrize("prompt_len", [1, 16, 17, 37])
@pytest.mark.parametrize("cached", [True, False])
def test_each_fork_is_a_request_with_its_own_seed(prompt_len, cached):
    engine = shared_engine(enable_prefix_caching=cached)
    prompt = list(range(3, 3 + prompt_len))
    options = {"temperature": 1.0, "max_tokens": 12, "ignore_eos": True}
    forks = run(engine, [request("n", prompt, n=4, seed=100, **options)])
    assert len({tuple(ids) for ids in forks.values()}) > 1
    for index in range(4):
        single = run(engine, [request("one", prompt, seed=100 + index, **options)])
        assert single[("one", 0)] == forks[("n", index)]


def test_a_restart_gives_the_same_tokens(alone):
    engine = make_engine()
    items = workload(4)
    assert run(engine, items) == {(str(i), 0): alone[(str(i), 0)] for i in range(4)}
    engine.close()


def test_unseeded_requests_follow_the_engine_seed():
    def first_tokens(seed):
        engine = make_engine(seed=0)
        engine._seeds = np.random.default_rng(seed)
        tokens = run(engine, [request("a", range(3, 20), max_tokens=16)])
        engine.close()
        return tokens

    assert first_tokens(1) == first_tokens(1)
    assert first_tokens(1) != first_tokens(2)


def test_device_and_host_agree_on_stop_tokens():
    engine = shared_engine()
    plain = run(
        engine,
        [request("a", range(3, 20), temperature=0, max_tokens=20, ignore_eos=True)],
    )[("a", 0)]
    stop = plain[7]
    engine.add(
        request("b", range(3, 20), temperature=0, max_tokens=20, stop_token_ids=[stop])
    )
    outputs = drain(engine)
    expected = plain[: plain.index(stop) + 1]
    assert tokens_of(outputs)[("b", 0)] == expected
    assert outputs[-1].finish_reason == "stop"
    assert outputs[-1].stop_reason == stop
