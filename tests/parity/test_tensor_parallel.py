"""Transformers' tokens from an engine whose layers several devices share."""

import pytest

from tests.engines import request
from tests.parity.oracle import (
    check_entry,
    checkpoint,
    engine_for,
    random_prompt,
    run_all,
)
from tests.parity.test_families import MODELS

# Two KV heads: with four and eight devices each is kept several times.
SIZES = {"num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 144}
CHECKPOINTS = {
    "llama": {"family": "llama", "attention_bias": True, "mlp_bias": True, **SIZES},
    "qwen3": {"family": "qwen3", "tie_word_embeddings": True, **SIZES},
}
MESHES = [(1, 1), (2, 1), (4, 1), (8, 1), (1, 2), (4, 2)]


@pytest.mark.parametrize(
    ("tensor", "data"), MESHES, ids=[f"tp{t}-dp{d}" for t, d in MESHES]
)
@pytest.mark.parametrize("family", CHECKPOINTS)
def test_greedy_tokens(family, tensor, data):
    saved = checkpoint(**CHECKPOINTS[family])
    engine = engine_for(
        saved.folder, tensor_parallel_size=tensor, data_parallel_size=data
    )
    prompts = [random_prompt(length, seed=length) for length in (1, 18, 45, 70)]
    greedy = {"temperature": 0, "ignore_eos": True, "max_tokens": 24}
    requests = [
        request(i, prompt, logprobs=5 if i == 2 else None, **greedy)
        for i, prompt in enumerate(prompts)
    ]
    tokens, entries, _ = run_all(engine, requests)
    engine.close()
    for i, prompt in enumerate(prompts):
        assert tokens[(str(i), 0)] == saved.greedy(prompt, 24)
    expected = saved.logprobs(prompts[2] + tokens[("2", 0)])[len(prompts[2]) - 1 : -1]
    for entry, row in zip(entries[("2", 0)], expected, strict=True):
        check_entry(entry, row, count=5)


@pytest.mark.parametrize("name", ["mistral", "gemma2"])
def test_greedy_tokens_beyond_a_window(name):
    """Each device has its share of the pools of both cache groups."""
    saved = checkpoint(**MODELS[name])
    engine = engine_for(saved.folder, tensor_parallel_size=2)
    prompts = [random_prompt(length, seed=length) for length in (5, 45)]
    greedy = {"temperature": 0, "ignore_eos": True, "max_tokens": 64}
    requests = [request(i, prompt, **greedy) for i, prompt in enumerate(prompts)]
    tokens, _, _ = run_all(engine, requests)
    assert len(engine.state.window_tables) == 1
    engine.close()
    for i, prompt in enumerate(prompts):
        assert tokens[(str(i), 0)] == saved.greedy(prompt, 64)
