"""Transformers' tokens from an engine whose layers are shared out over stages."""

import pytest

from tests.engines import request
from tests.parity.oracle import check_entry, engine_for, random_prompt, run_all
from tests.parity.test_families import ALTERNATE, saved_model

LAYERS = {"num_hidden_layers": 4, "tie_word_embeddings": False}
ALTERNATING = {**LAYERS, "layer_types": ALTERNATE * 2}
FAMILIES = {
    "mistral": (2, LAYERS),
    "gemma2": (2, LAYERS),
    "gemma3-tied": (2, {**ALTERNATING, "tie_word_embeddings": True}),
    "smollm3": (2, {**LAYERS, "no_rope_layers": [1, 0, 1, 0]}),
    "qwen2-sliding": (2, {**LAYERS, "num_hidden_layers": 3}),
    "gpt2": (2, {"tie_word_embeddings": False}),
    "granite": (4, LAYERS),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_tokens(name):
    """Prompts longer than the window and than a step, and one with the same start."""
    stages, sizes = FAMILIES[name]
    saved = saved_model(name.removesuffix("-tied"), **sizes)
    engine = engine_for(
        saved.folder, pipeline_parallel_size=stages, compile_ahead=False
    )
    prompts = [random_prompt(length, seed=3) for length in (45, 3)]
    prompts += [random_prompt(20, seed=length) for length in (1, 18)]
    prompts.append([*prompts[0], 7])
    greedy = {"temperature": 0, "ignore_eos": True, "max_tokens": 24}
    requests = [
        request(i, prompt, logprobs=5 if i == 2 else None, **greedy)
        for i, prompt in enumerate(prompts)
    ]
    tokens, entries, _ = run_all(engine, requests)
    engine.scheduler.check_integrity()
    engine.close()
    for i, prompt in enumerate(prompts):
        assert tokens[(str(i), 0)] == saved.greedy(prompt, 24)
    expected = saved.logprobs(prompts[2] + tokens[("2", 0)])[len(prompts[2]) - 1 : -1]
    for entry, row in zip(entries[("2", 0)], expected, strict=True):
        check_entry(entry, row, count=5)
