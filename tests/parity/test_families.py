"""Every dense family against transformers: scores, greedy tokens, shared layers."""

import functools

import jax
import numpy as np
import pytest

from jllm.errors import ConfigError
from jllm.models.base import ModelOptions
from jllm.models.registry import build_model
from jllm.weights.hub import resolve_model
from jllm.weights.loader import load_weights
from shardings.mesh import make_mesh
from shardings.place import tree_shardings
from tests.engines import request
from tests.parity.oracle import (
    TOLERANCE,
    checkpoint,
    engine_for,
    random_prompt,
    run_all,
)
from tests.parity.test_models import LENGTH, PIECES, Network, network, vocabulary

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
    "falcon-alibi": {
        **FALCON,
        "alibi": True,
        "multi_query": False,
        "parallel_attn": False,
        "bias": True,
    },
}


@pytest.mark.parametrize("pieces", ["chunked", "decode"])
@pytest.mark.parametrize("name", MODELS)
def test_logits(name, pieces):
    saved = checkpoint(**MODELS[name])
    tokens = random_prompt(LENGTH)
    expected = saved.logits(tokens)
    assert expected.std() > 0.3  # or the tolerance would mean nothing
    logits = network(saved.folder).logits(tokens, PIECES[pieces])
    np.testing.assert_allclose(vocabulary(logits), expected, rtol=0, atol=TOLERANCE)
