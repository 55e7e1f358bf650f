"""Other weights between two steps, as training on a model's own outputs needs."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jllm.errors import ConfigError
from jllm.layers.batch import Batch
from jllm.llm import LLM
from jllm.models.base import ModelOptions
from jllm.models.registry import build_model
from jllm.types import SamplingParams
from jllm.weights.random import random_weights
from jllm.weights.update import placed_like
from tests.engines import QWEN3, SMALL, model_folder, request, run
from tests.engines import make_engine as make_tiny_engine

NUM_ROUNDS = 3
NUM_TOKENS = 12
QUIET = {"use_tqdm": False}
PROMPT = tuple(range(5, 45))


@pytest.fixture(scope="module")
def llm():
    folder = model_folder(json.dumps(QWEN3))
    with LLM(str(folder), skip_tokenizer_init=True, **SMALL) as llm:
        llm.wait_until_compiled()
        yield llm


@pytest.fixture(scope="module")
def model():
    """The same network, through which gradients flow."""
    return build_model(QWEN3, ModelOptions(max_model_len=256, attention="reference"))


def whole_batch(tokens, block_size=16):
    """One sequence from its start, in blocks of its own."""
    length = len(tokens)
    places = jnp.arange(length, dtype=jnp.int32)
    num_blocks = -(-length // block_size)
    return num_blocks, Batch(
        tokens=jnp.asarray(tokens, jnp.int32),
        positions=places,
        slots=places,
        block_tables=jnp.arange(num_blocks, dtype=jnp.int32)[None],
        row_starts=jnp.array([0, length], jnp.int32),
        lengths=jnp.array([length], jnp.int32),
    )


@functools.partial(jax.jit, static_argnums=0)
def sequence_logprobs(model, weights, tokens):
    """Log-probability of each token but the first, by the forward that trains."""
    num_blocks, batch = whole_batch(tokens)
    kv = model.init_kv(num_blocks, 16)
    hidden, _ = model.forward(weights, kv, batch)
    scores = jax.nn.log_softmax(model.logits(weights, hidden[:-1]))
    return jnp.take_along_axis(scores, batch.tokens[1:, None], axis=1)[:, 0]


@functools.partial(jax.jit, static_argnums=0)
def train(model, weights, rollouts):
    """A step of a policy gradient: rollouts of even tokens are to be likelier."""

    def loss(weights):
        total = jnp.zeros((), jnp.float32)
        for tokens in rollouts:
            own = sequence_logprobs(model, weights, tokens)[-NUM_TOKENS:]
            is_even = (tokens[-NUM_TOKENS:] % 2 == 0).astype(jnp.float32)
            total = total - (jnp.mean(is_even) - 0.4) * jnp.sum(own)
        return total

    gradient = jax.grad(loss)(weights)
    return jax.tree.map(lambda w, g: w - jnp.float32(0.02) * g, weights, gradient)


@pytest.mark.slow
def test_training_and_rollouts_in_turns(llm, model):
    compiled = []

    def record(name, *_, **__):
        if "backend_compile" in name:
            compiled.append(name)

    before = llm.weights
    params = SamplingParams(
        temperature=1.0, seed=7, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=0
    )
    prompts = [list(PROMPT), list(PROMPT[:20])]
    seen, num_compiled = [], llm.engine.programs.num_compiled
    for _ in range(NUM_ROUNDS):
        jax.monitoring.register_event_duration_secs_listener(record)
        outputs = llm.generate(prompts, params, **QUIET)
        jax.monitoring.unregister_event_duration_listener(record)
        rollouts = []
        for prompt, output in zip(prompts, outputs, strict=True):
            (own,) = output.outputs
            tokens = list(own.token_ids)
            found = [
                entry[t].logprob for entry, t in zip(own.logprobs, tokens, strict=True)
            ]
            rollouts.append(jnp.asarray(prompt + tokens, jnp.int32))
            expected = sequence_logprobs(model, llm.weights, rollouts[-1])
            np.testing.assert_allclose(
                found, expected[len(prompt) - 1 :], rtol=0, atol=1e-5
            )
        seen.append([output.outputs[0].token_ids for output in outputs])
        llm.update_weights(train(model, llm.weights, rollouts))
    assert seen[0] != seen[1] != seen[2]
    assert compiled == []
    assert llm.engine.programs.num_compiled == num_compiled
    llm.update_weights(before)
    outputs = llm.generate(prompts, params, **QUIET)
    assert [output.outputs[0].token_ids for output in outputs] == seen[0]


def other_weights(engine, seed=5):
    specs = engine._parts.model.specs()
    places = jax.tree.map(lambda leaf: leaf.sharding, engine.weights)
    return random_weights(specs, places, "float32", seed)


def addresses(tree):
    return [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)]


def test_nothing_is_copied_and_no_old_prefix_is_found():
    engine, fresh = make_tiny_engine(QWEN3), make_tiny_engine(QWEN3)
    old, new = engine.weights, other_weights(engine)
    given = addresses(new)
    fresh.update_weights(new)
    item = request("a", PROMPT, temperature=0, max_tokens=8, ignore_eos=True)
    before = run(engine, [item])
    engine.update_weights(new)
    assert addresses(engine.weights) == given
    assert run(engine, [item]) == run(fresh, [item]) != before
    assert engine.scheduler.num_prefix_hits == 0
    run(engine, [item])
    assert engine.scheduler.num_prefix_hits == 32
    # What was computed with the first weights is of no use, even with them again.
    engine.update_weights(old)
    assert run(engine, [item]) == before
    assert engine.scheduler.num_prefix_hits == 32
    engine.scheduler.check_integrity()
    engine.close()
    fresh.close()


def test_while_requests_run_and_wait():
    """Those that run go on; those that wait begin with the new weights alone."""
    engine, fresh = (make_tiny_engine(QWEN3, max_num_seqs=1) for _ in range(2))
    new = other_weights(engine)
    fresh.update_weights(new)
    late = request("late", PROMPT, temperature=0, max_tokens=6, ignore_eos=True)
    running = request("a", PROMPT, temperature=0, max_tokens=20, ignore_eos=True)
    expected = run(fresh, [late])
    # The prefix of those that wait is in the cache, computed with the old weights.
    engine.add(running)
    engine.add(late)
    for _ in range(6):
        engine.step()
    engine.update_weights(new)
    found = run(engine, [])
    assert found[("late", 0)] == expected[("late", 0)]
    assert len(found[("a", 0)]) > 10
    engine.close()
    fresh.close()


def test_what_is_refused():
    engine = make_tiny_engine(QWEN3)
    present = engine.weights
    wrong = dict(present)
    wrong["embed"] = wrong["embed"][:5]
    with pytest.raises(ConfigError, match="weights embed has shape"):
        engine.update_weights(wrong)
    wrong["embed"] = present["embed"].astype(jnp.bfloat16)
    with pytest.raises(ConfigError, match="weights embed has dtype bfloat16"):
        engine.update_weights(wrong)
    del wrong["embed"]
    with pytest.raises(ConfigError, match=r"missing \['embed'\], unknown \[\]"):
        engine.update_weights(wrong | {})
    assert engine.weights is present
    engine.close()


def test_numpy_arrays_are_placed():
    present = {"a": jnp.zeros(3), "b": [jnp.ones((2, 2))]}
    placed = placed_like(
        jax.tree.map(lambda leaf: np.asarray(leaf) + 1, present), present
    )
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(placed))
    np.testing.assert_array_equal(placed["b"][0], 2 * np.ones((2, 2)))
