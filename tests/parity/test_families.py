"""Every dense family against transformers: scores, greedy tokens, shared layers."""

import numpy as np
import pytest

from jllm.errors import ConfigError
from tests.engines import request
from tests.parity.oracle import (
    TOLERANCE,
    checkpoint,
    engine_for,
    random_prompt,
    rewritten,
    run_all,
)
from tests.parity.test_models import LENGTH, PIECES, network, vocabulary

WINDOW = 12
"""Far shorter than the prompts."""
SLIDES = {"sliding_window": WINDOW}
ALTERNATE = ["sliding_attention", "full_attention"]
LONG_FACTORS = {
    "rope_type": "longrope",
    "rope_theta": 500.0,
    "short_factor": [1.2 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + 0.5 * i for i in range(8)],
    "original_max_position_embeddings": 24,
}
NO_GROUPS = {"num_key_value_heads": None, "head_dim": None}
FALCON = {"family": "falcon", **NO_GROUPS}
FALCON_NEW = {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}
STABLELM = {"family": "stablelm", "head_dim": None}
MODELS = {
    "mistral": {"family": "mistral", **SLIDES},
    "qwen2": {"family": "qwen2"},
    "qwen2-sliding": {
        "family": "qwen2",
        "use_sliding_window": True,
        "max_window_layers": 1,
        **SLIDES,
    },
    "gemma2": {
        "family": "gemma2",
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 1.5,
        "final_logit_softcapping": 3.0,
        "tie_word_embeddings": True,
        **SLIDES,
    },
    "gemma3": {
        "family": "gemma3",
        "query_pre_attn_scalar": 24,
        "tie_word_embeddings": True,
        "layer_types": ALTERNATE,
        "rope_parameters": {
            "full_attention": {
                "rope_type": "linear",
                "factor": 4.0,
                "rope_theta": 5000.0,
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
        **SLIDES,
    },
    "phi": {"family": "phi", "head_dim": None},
    "phi3": {"family": "phi3", "pad_token_id": 0, **SLIDES},
    "phi3-longrope": {
        "family": "phi3",
        "pad_token_id": 0,
        "rope_parameters": LONG_FACTORS,
        "original_max_position_embeddings": 24,
    },
    "phi3-partial": {
        "family": "phi3",
        "pad_token_id": 0,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 500.0,
            "partial_rotary_factor": 0.75,
        },
    },
    "olmo2": {"family": "olmo2"},
    "olmo3": {"family": "olmo3", "layer_types": ALTERNATE, **SLIDES},
    "gpt2": {
        "family": "gpt2",
        "n_embd": 96,
        "n_head": 6,
        "n_layer": 2,
        "n_positions": 256,
        "n_inner": 136,
        "hidden_size": None,
        "intermediate_size": None,
        "num_hidden_layers": None,
        "num_attention_heads": None,
        "max_position_embeddings": None,
        "tie_word_embeddings": True,
        **NO_GROUPS,
    },
    "smollm3": {"family": "smollm3", "no_rope_layers": [1, 0], "pad_token_id": 0},
    "granite": {
        "family": "granite",
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.3,
        "residual_multiplier": 0.4,
        "logits_scaling": 0.5,
        "attention_bias": True,
    },
    "cohere": {"family": "cohere", "logit_scale": 0.5, "use_qk_norm": True},
    "cohere2": {
        "family": "cohere2",
        "logit_scale": 0.5,
        "layer_types": ALTERNATE,
        "tie_word_embeddings": True,
        **SLIDES,
    },
    "starcoder2": {"family": "starcoder2", "norm_epsilon": 1e-4, **SLIDES},
    "stablelm": {**STABLELM, "use_qkv_bias": True},
    "stablelm-parallel": {
        **STABLELM,
        "qk_layernorm": True,
        "use_parallel_residual": True,
    },
    "gpt_neox": {"family": "gpt_neox", **NO_GROUPS},
    "gpt_neox-sequential": {
        "family": "gpt_neox",
        "use_parallel_residual": False,
        **NO_GROUPS,
    },
    "falcon": {**FALCON, "tie_word_embeddings": True},
    "falcon-new": FALCON_NEW,
    "falcon-one-norm": {**FALCON_NEW, "num_ln_in_parallel_attn": 1},
    "falcon-serial": {
        **FALCON,
        "multi_query": False,
        "parallel_attn": False,
        "bias": True,
    },
}


INTERNLM2_NAMES = {
    "model.embed_tokens": "model.tok_embeddings",
    "lm_head": "output",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}


def fused_by_groups(tensors, kv_heads=2):
    """Llama's tensors as InternLM2 has them."""
    renamed = {}
    for name, values in tensors.items():
        if "q_proj" in name:
            parts = [tensors[name.replace("q_proj", f"{x}_proj")] for x in "qkv"]
            rows = [part.reshape(kv_heads, -1, values.shape[1]) for part in parts]
            name = name.replace("self_attn.q_proj", "attention.wqkv")
            renamed[name] = np.concatenate(rows, axis=1).reshape(-1, values.shape[1])
        elif "k_proj" not in name and "v_proj" not in name:
            for old, new in INTERNLM2_NAMES.items():
                name = name.replace(old, new)
            renamed[name] = values
    return renamed


def saved_model(name, **sizes):
    if name == "internlm2":
        config = {"architectures": ["InternLM2ForCausalLM"], "bias": False}
        return rewritten(checkpoint("llama", **sizes), config, fused_by_groups)
    if name == "internlm3":
        config = {"architectures": ["InternLM3ForCausalLM"], "qkv_bias": True}
        return rewritten(checkpoint("qwen2", **sizes), config, dict)
    return checkpoint(**MODELS[name] | sizes)


NAMES = [*MODELS, "internlm2", "internlm3"]
ONE_EACH = [name for name in NAMES if "-" not in name] + ["falcon-new"]


@pytest.mark.parametrize("name", NAMES)
def test_logits(name):
    """A prompt in two chunks, then token by token."""
    saved = saved_model(name)
    tokens = random_prompt(LENGTH)
    expected = saved.logits(tokens)
    assert expected.std() > 0.3  # or the tolerance would mean nothing
    logits = network(saved.folder).logits(tokens, [23, 7] + [1] * 10)
    np.testing.assert_allclose(vocabulary(logits), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ONE_EACH)
def test_greedy_tokens_for_64_steps(name):
    """Of the engine, from a prompt longer than the window.

    The head is not tied: the random network would repeat its last token.
    """
    saved = saved_model(name, tie_word_embeddings=False)
    prompt = random_prompt(20, seed=3)
    engine = engine_for(saved.folder, max_num_seqs=1, max_num_batched_tokens=16)
    again = request("a", prompt, max_tokens=64, temperature=0, ignore_eos=True)
    tokens, _, _ = run_all(engine, [again])
    engine.close()
    expected = saved.greedy(prompt, 64)
    assert len(set(expected)) > 3  # or agreement would mean little
    assert tokens[("a", 0)] == expected


@pytest.mark.parametrize("name", ["cohere", "gemma3", "gpt2"])
def test_logits_in_bfloat16_are_near(name):
    saved = saved_model(name, dtype="bfloat16")
    tokens = random_prompt(LENGTH)
    logits = network(saved.folder, "bfloat16").logits(tokens, PIECES["chunked"])
    expected = saved.logits(tokens)
    errors = np.abs(vocabulary(logits) - expected)
    assert errors.mean() < 0.03
    assert errors.max() < 0.5


# Heads that four devices share, so that two KV heads are kept twice.
SHARED = {
    "hidden_size": 128,
    "intermediate_size": 144,
    "num_attention_heads": 8,
    "num_hidden_layers": 2,
}
SHARED_GPT2 = {"n_embd": 128, "n_head": 8, "n_inner": 144}


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", ONE_EACH)
def test_logits_of_layers_that_devices_share(name, size):
    saved = saved_model(name, **(SHARED_GPT2 if name == "gpt2" else SHARED))
    tokens = random_prompt(LENGTH)
    shared = network(saved.folder, tensor_size=size)
    logits = vocabulary(shared.logits(tokens, PIECES["chunked"]))
    expected = saved.logits(tokens)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["mistral", "gpt2", "falcon"])
def test_heads_that_devices_cannot_share_are_refused(name):
    with pytest.raises(ConfigError, match="tensor_parallel_size=4 must divide the 6"):
        network(saved_model(name).folder, tensor_size=4)
