"""Sums of hidden states: what they cost, whose they are, and what is refused."""

import itertools

import jax
import numpy as np
import pytest

from jllm.engine.pooling import PooledPrompt, pool_step
from jllm.errors import ContextTooLongError, InvalidRequestError
from jllm.pooling import PoolingParams
from jllm.types import EngineRequest, SamplingParams
from tests.engines import LLAMA, drain, make_engine, request, shared_engine

NAMES = ("steps", "dispatches", "host_to_device_copies", "device_to_host_copies")


@pytest.fixture(scope="module")
def engine():
    engine = shared_engine()
    engine.programs.wait()
    return engine


def pooled(request_id, prompt, **fields):
    return EngineRequest(
        request_id=str(request_id),
        prompt_token_ids=tuple(int(token) for token in prompt),
        params=SamplingParams(temperature=0),
        pooling=PoolingParams(**fields),
    )


def per_step(engine, requests):
    """What each step has cost: dispatches, uploads, downloads."""
    for item in requests:
        engine.add(item)
    costs = []

    def note(_):
        costs.append([getattr(engine.metrics, name) for name in NAMES])

    note(None)
    outputs = drain(engine, note)
    return outputs, [np.subtract(b, a).tolist() for a, b in itertools.pairwise(costs)]


@pytest.mark.parametrize(
    ("pooling", "num_pooled"), [("mean", 3), ("last", 1), ("cls", 1)]
)
def test_one_dispatch_more_in_the_steps_that_count(engine, pooling, num_pooled):
    # Three chunks; beside them a request that generates, which ends later.
    items = [
        request("g", range(3, 9), temperature=0, max_tokens=12, ignore_eos=True),
        pooled("p", range(3, 153), pooling=pooling),
    ]
    before = [getattr(engine.metrics, name) for name in NAMES]
    outputs, costs = per_step(engine, items)
    after = [getattr(engine.metrics, name) for name in NAMES]
    steps, dispatches, uploads, downloads = np.subtract(after, before)
    assert dispatches == uploads == downloads == steps + num_pooled
    assert [own.finish_reason for own in outputs if own.request_id == "p"] == ["stop"]
    assert max(cost[1] for cost in costs) == 2
    # None is pooled any more, and each step is one dispatch again.
    assert [cost[1] for cost in costs[-6:-1]] == [1] * 5


def test_requests_that_generate_run_the_same_programs(engine, monkeypatch):
    """Tokens and programs are those that they have without pooled ones beside them."""
    ran = []
    step = engine.programs.step
    monkeypatch.setattr(
        engine.programs,
        "step",
        lambda **options: ran.append(options["has_rules"]) or step(**options),
    )
    item = request("g", range(3, 40), temperature=0.8, seed=1, max_tokens=8)
    alone = [own.token_ids for own in per_step(engine, [item])[0]]
    others = [pooled(k, range(50, 120), pooling=k) for k in ("last", "mean", "cls")]
    outputs, _ = per_step(engine, [others[0], item, *others[1:]])
    assert [own.token_ids for own in outputs if own.request_id == "g"] == alone
    assert not any(ran)


def test_nothing_compiles_for_the_first_pooled_prompt(engine):
    compiled = []

    def record(name, *_, **__):
        if "backend_compile" in name:
            compiled.append(name)

    jax.monitoring.register_event_duration_secs_listener(record)
    per_step(engine, [pooled("a", range(3, 80), pooling="mean")])
    jax.monitoring.unregister_event_duration_listener(record)
    assert compiled == []


def test_a_row_that_is_not_finite_fails_alone():
    hidden = np.ones((6, 4), np.float32)
    hidden[1] = np.nan
    hidden[5] = np.inf
    owners = np.array([0, 0, 1, 1, 3, 2], np.int32)
    sums = np.asarray(
        pool_step(3, jax.numpy.asarray(hidden), jax.numpy.asarray(owners))
    )
    assert np.isnan(sums[0]).all()
    np.testing.assert_array_equal(sums[1], 2 * np.ones(4))
    assert np.isinf(sums[2]).all()


def test_a_nan_anywhere_fails_a_mean():
    """The step itself looks at the last hidden state of a row only."""
    engine = make_engine()
    pool = engine.programs.pool(64)
    results = []

    def spoil(hidden, owners):
        sums = np.array(pool(hidden, owners))
        if not results:
            sums[0, 0] = np.nan
        results.append(sums)
        return jax.numpy.asarray(sums)

    engine.programs.pool = lambda _: spoil
    items = [pooled("bad", range(3, 100), pooling="mean"), pooled("good", range(3, 9))]
    for item in items:
        engine.add(item)
    outputs = {output.request_id: output for output in drain(engine)}
    assert outputs["bad"].finish_reason == "error"
    assert outputs["bad"].pooled is None
    assert "not finite" in outputs["bad"].error
    assert np.isfinite(outputs["good"].pooled).all()
    engine.close()


def test_a_position_is_claimed_once():
    prompt = PooledPrompt(PoolingParams(pooling="mean"), 10)
    assert list(prompt.claim(0, 4)) == [0, 1, 2, 3]
    # Preempted, and computed again in other chunks.
    assert list(prompt.claim(0, 3)) == []
    assert list(prompt.claim(3, 8)) == [4, 5, 6, 7]
    assert list(prompt.claim(8, 10)) == [8, 9]
    last = PooledPrompt(PoolingParams(), 10)
    assert list(last.claim(0, 9)) == []
    assert list(last.claim(9, 10)) == [9]
    assert list(last.claim(9, 10)) == []


def test_what_is_refused(engine):
    context, width = engine.limits.max_model_len, LLAMA["hidden_size"]
    assert engine.limits.width == width
    with pytest.raises(ContextTooLongError, match=f"{context} tokens.*{context + 1}"):
        engine.add(pooled("a", [5] * (context + 1)))
    with pytest.raises(InvalidRequestError, match=f"dimensions={width + 1}.*{width}"):
        engine.add(pooled("a", [5], dimensions=width + 1))
    with pytest.raises(InvalidRequestError, match="empty"):
        engine.add(pooled("a", []))
    with pytest.raises(InvalidRequestError, match="vocabulary"):
        engine.add(pooled("a", [331]))
    outputs, _ = per_step(engine, [pooled("a", [5] * context, dimensions=width)])
    assert outputs[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pooling": "max"}, "pooling='max' must be last, mean or cls"),
        ({"pooling": None}, "pooling"),
        ({"normalize": 1}, "normalize=1 must be true or false"),
        ({"dimensions": 0}, "dimensions=0 must be at least 1"),
        ({"dimensions": True}, "dimensions=True must be an integer"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens=0"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens=-2"),
    ],
)
def test_wrong_options(fields, message):
    with pytest.raises(InvalidRequestError, match=message) as error:
        PoolingParams(**fields)
    assert error.value.parameter == next(iter(fields))


def test_aborted_in_the_middle(engine):
    engine.add(pooled("a", range(3, 203), pooling="mean"))
    engine.step()
    engine.abort("a")
    outputs, _ = per_step(engine, [pooled("b", range(3, 20))])
    assert {output.request_id for output in outputs} == {"b"}
    engine.scheduler.check_integrity()
    assert engine.num_open == 0
