"""`deterministic=True`: the bits of a request's scores are those it has alone.

Log-probabilities of prompts and of generated tokens are compared by their bits; each
depends on the scores of the whole vocabulary.
"""

import functools
import json
import pathlib
import tempfile

import numpy as np
import pytest

from jllm.config import EngineConfig
from jllm.engine.create import create_engine
from tests.engines import LLAMA, SMALL, drain, request

VOCAB = LLAMA["vocab_size"]
FAMILIES = {
    "llama": LLAMA,
    "gemma2": {
        **LLAMA,
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "sliding_window": 21,
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 1.5,
        "final_logit_softcapping": 3.0,
        "tie_word_embeddings": True,
    },
}
CASES = [(family, dtype) for family in FAMILIES for dtype in ("float32", "bfloat16")]
LENGTHS = (1, 17, 64, 75, 139)
START = np.random.default_rng(3).integers(3, VOCAB, 50).tolist()
SCORES = 20
"""Returned with each token; their normaliser depends on all of the vocabulary."""


def requests(*, of_prompts=False):
    """Greedy ones and drawn ones, two of them with a common start."""
    rng = np.random.default_rng(5)
    made = []
    for i, length in enumerate(LENGTHS):
        prompt = rng.integers(3, VOCAB, length).tolist()
        prompt = START + prompt[50:] if i > 2 else prompt
        made.append(
            request(
                i,
                prompt,
                temperature=0.9 * (i % 2),
                seed=i,
                max_tokens=6 if i else 16,
                ignore_eos=True,
                logprobs=SCORES,
                prompt_logprobs=SCORES if of_prompts else None,
            )
        )
    return made


def engine_for(family, dtype, **options):
    folder = folder_for(family)
    options = SMALL | {"dtype": dtype, "deterministic": True} | options
    config = EngineConfig(model=str(folder), load_format="random", **options)
    return create_engine(config)


@functools.cache
def folder_for(family):
    folder = pathlib.Path(tempfile.mkdtemp(prefix="jllm-test-"))
    (folder / "config.json").write_text(json.dumps(FAMILIES[family]))
    return folder


def bits_of(engine, items):
    """Every score of each request, as what its 32 bits say."""
    for item in items:
        engine.add(item)
    found = {item.request_id: [] for item in items}
    for output in drain(engine):
        for entries in (output.prompt_logprobs, output.logprobs):
            for entry in entries or ():
                order = np.argsort(entry.top_ids)
                scores = np.float32(entry.top_logprobs)[order]
                assert len(scores) >= SCORES
                found[output.request_id].append(scores.tobytes())
    return found


@functools.cache
def alone(family, dtype):
    """One request after the other, in an engine that computes nothing twice."""
    engine = engine_for(family, dtype, enable_prefix_caching=False)
    found = {}
    for item in requests(of_prompts=True):
        found |= bits_of(engine, [item])
    engine.close()
    return found


def check(found, expected):
    """Prompts may be left out: what is there are the last scores."""
    assert found.keys() == expected.keys()
    for key, scores in found.items():
        assert scores
        assert scores == expected[key][-len(scores) :], key


@pytest.mark.parametrize(("family", "dtype"), CASES)
def test_in_a_batch_and_after_prefix_hits(family, dtype):
    engine = engine_for(family, dtype, compile_ahead=True)
    engine.programs.wait()
    expected = alone(family, dtype)
    check(bits_of(engine, requests()), expected)
    hits = engine.scheduler.num_prefix_hits
    for item in requests():
        check(bits_of(engine, [item]), {item.request_id: expected[item.request_id]})
    assert engine.scheduler.num_prefix_hits > hits + 100
    engine.close()


OTHERS = {
    "small-chunks": {"max_num_seqs": 3, "max_num_batched_tokens": 16},
    "whole-prompts": {"max_num_seqs": 12, "max_num_batched_tokens": 256},
    "preempted": {"num_blocks": 20, "max_model_len": 160},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize(("family", "dtype"), CASES)
def test_with_other_chunks_buckets_and_room(family, dtype, name):
    engine = engine_for(family, dtype, **OTHERS[name])
    check(
        bits_of(engine, requests(of_prompts=name != "preempted")), alone(family, dtype)
    )
    assert (engine.scheduler.num_preemptions > 0) == (name == "preempted")
    engine.close()
