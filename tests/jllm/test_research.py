"""A model without an engine: the same tokens, and clear refusals."""

import jax
import numpy as np
import pytest

import jllm
from shardings.mesh import make_mesh

PROMPTS = [[3, 4, 5], [9, 8, 7, 6, 5, 4, 3]]


def greedy(model, weights, prompts, count):
    """What the model adds, one batch per step."""
    forward = jax.jit(model.forward)
    new, cached = [list(prompt) for prompt in prompts], [0] * len(prompts)
    added = [[] for _ in prompts]
    kv = model.init_kv(len(prompts) * 4, 16)
    for _ in range(count):
        batch = jllm.Batch.from_prompts(new, num_cached=cached, max_len=64)
        hidden, kv = forward(weights, kv, batch)
        logits = model.logits(weights, hidden[batch.row_starts[1:] - 1])
        cached = [c + len(n) for c, n in zip(cached, new, strict=True)]
        new = [[token] for token in np.argmax(logits, axis=-1).tolist()]
        for tokens, (token,) in zip(added, new, strict=True):
            tokens.append(token)
    return added


@pytest.fixture(scope="module")
def expected():
    """What the engine adds to the prompts."""
    params = jllm.SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    with jllm.LLM(max_num_seqs=2, num_blocks=64, compile_ahead=False) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.mark.parametrize("attention", ["reference", "auto"])
def test_a_greedy_loop_gives_the_tokens_of_the_engine(attention, expected):
    model, weights = jllm.load(attention=attention)
    assert greedy(model, weights, PROMPTS, 20) == expected


def test_a_mesh_of_two_devices_gives_the_same_tokens(expected):
    mesh = make_mesh(tensor=2, devices=jax.devices()[:2])
    model, weights = jllm.load(mesh=mesh)
    assert len(weights["layers"][0]["qkv"].sharding.device_set) == 2
    assert greedy(model, weights, PROMPTS, 20) == expected


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "prompts have"),
        ([[1], []], {}, "at least one each"),
        ([[1]], {"num_cached": [1, 2]}, "num_cached="),
        ([[1]], {"num_cached": [-1]}, "num_cached="),
        (
            [[1, 2, 3]],
            {"num_cached": [4], "max_len": 6},
            "max_len=6 must be at least 7",
        ),
        ([[1]], {"block_size": 0}, "block_size=0"),
    ],
)
def test_bad_batches_are_refused_by_name(prompts, options, message):
    with pytest.raises(ValueError, match=message):
        jllm.Batch.from_prompts(prompts, **options)


def test_slots_are_distinct_and_within_each_rows_blocks():
    batch = jllm.Batch.from_prompts(
        [[1, 2, 3], [4]], num_cached=[14, 0], max_len=20, block_size=16
    )
    assert batch.block_tables.tolist() == [[0, 1], [2, 3]]
    assert batch.slots.tolist() == [14, 15, 16, 32]
    assert batch.positions.tolist() == [14, 15, 16, 0]
    assert batch.lengths.tolist() == [17, 1]
    assert not batch.is_decode
