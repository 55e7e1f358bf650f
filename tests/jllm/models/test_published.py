"""Parameter counts of published models, and configs that are refused."""

import json

import pytest

from jllm.errors import UnsupportedModelError
from jllm.models.base import (
    ModelOptions,
    ParamSpec,
    Part,
    published_parameter_count,
)
from jllm.models.hf_config import longest_context
from jllm.models.registry import ARCHITECTURES, build_model
from tests.published import IN_THE_DATA, MODELS, rounded_like, sizes


def count(config):
    return published_parameter_count(build_model(config, ModelOptions()).specs())


@pytest.mark.parametrize("name", MODELS)
def test_parameter_count(name):
    model = MODELS[name]
    counted = count({"architectures": [model.architecture], **model.config})
    assert counted == model.count
    if model.figure is not None:
        in_files = counted + model.stored_twice
        assert rounded_like(model.figure, in_files) == model.figure, model.source


def test_every_architecture_is_counted():
    counted = {model.architecture for model in MODELS.values()}
    assert counted | {"LlamaForCausalLM", "Qwen3ForCausalLM"} == set(ARCHITECTURES)


def test_configs_in_the_test_data(shared_data):
    """Those of supported architectures parse; the others are refused by name."""
    counts = {}
    for path in (shared_data / "data" / "hf_configs").glob("*_config.json"):
        config = json.loads(path.read_text())
        if "architectures" not in config:
            continue
        if config["architectures"][0] in ARCHITECTURES:
            counts[path.name.removesuffix("_config.json")] = count(config)
            continue
        with pytest.raises(UnsupportedModelError, match=config["architectures"][0]):
            count(config)
    assert counts == IN_THE_DATA


def test_parts_without_a_shape_are_not_counted():
    spec = ParamSpec((2,), (None,), (Part("a"),))
    with pytest.raises(ValueError, match="'a' declares no shape"):
        published_parameter_count({"a": spec})


REFUSED = [
    ("FalconForCausalLM", {"alibi": True}, "alibi=True"),
    ("LlamaForCausalLM", {"pretraining_tp": 2}, "pretraining_tp=2"),
    ("LlamaForCausalLM", {"hidden_act": "xielu"}, "hidden_act='xielu'"),
    ("MistralForCausalLM", {"sliding_window": 0}, "sliding_window=0"),
    ("MistralForCausalLM", {"layer_types": ["full_attention"]}, "layer_types="),
    (
        "Qwen2ForCausalLM",
        {"use_sliding_window": True, "layer_types": ["full_attention"]},
        "must be a list of 2",
    ),
    (
        "Gemma2ForCausalLM",
        {"layer_types": ["full_attention", "chunked_attention"]},
        "'chunked_attention' is not supported",
    ),
    (
        "Gemma3ForCausalLM",
        {"use_bidirectional_attention": True},
        "use_bidirectional_attention=True",
    ),
    ("Gemma2ForCausalLM", {"attn_logit_softcapping": -1.0}, "attn_logit_softcapping"),
    ("Olmo2ForCausalLM", {"clip_qkv": 8.0}, "clip_qkv=8.0 is not supported$"),
    ("PhiForCausalLM", {"qk_layernorm": True}, "qk_layernorm=True"),
    ("Phi3ForCausalLM", {"attention_bias": True}, "attention_bias=True"),
    ("GPT2LMHeadModel", {"scale_attn_weights": False}, "scale_attn_weights=False"),
    (
        "GPT2LMHeadModel",
        {"scale_attn_by_inverse_layer_idx": True},
        "scale_attn_by_inverse_layer_idx=True",
    ),
    ("GPT2LMHeadModel", {"add_cross_attention": True}, "add_cross_attention=True"),
    ("GPTNeoXForCausalLM", {"num_key_value_heads": 2}, "num_key_value_heads=2"),
    ("StableLmForCausalLM", {"head_dim": 64}, "head_dim=64"),
    ("Cohere2ForCausalLM", {"use_qk_norm": True}, "use_qk_norm=True"),
    ("SmolLM3ForCausalLM", {"no_rope_layers": [1]}, "no_rope_layers="),
    ("SmolLM3ForCausalLM", {"no_rope_layers": [1, 2]}, "no_rope_layers="),
    (
        "FalconForCausalLM",
        {"new_decoder_architecture": True, "parallel_attn": False},
        "parallel_attn=False",
    ),
    (
        "FalconForCausalLM",
        {"num_ln_in_parallel_attn": 2},
        "num_ln_in_parallel_attn=2",
    ),
    ("InternLM2ForCausalLM", {"pretraining_tp": 4}, "pretraining_tp=4"),
]
SMALL = sizes(331, 96, 136, 2, 6, 6) | {"n_embd": 96, "n_head": 6, "n_layer": 2}


@pytest.mark.parametrize(("architecture", "change", "message"), REFUSED)
def test_what_would_change_the_network_is_refused(architecture, change, message):
    config = {"architectures": [architecture], **SMALL}
    build_model(config, ModelOptions())
    with pytest.raises(UnsupportedModelError, match=message):
        build_model(config | change, ModelOptions())


WINDOWS = [
    ("MistralForCausalLM", {"sliding_window": 9}, (9, 9)),
    ("MistralForCausalLM", {"sliding_window": None}, (None, None)),
    ("MistralForCausalLM", {"sliding_window": 2048}, (None, None)),
    ("Qwen2ForCausalLM", {"sliding_window": 9}, (None, None)),
    (
        "Qwen2ForCausalLM",
        {"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 1},
        (None, 9),
    ),
    (
        "Qwen3ForCausalLM",
        {"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 0},
        (9, 9),
    ),
    ("Gemma2ForCausalLM", {"sliding_window": 9}, (9, None)),
    (
        "Gemma3ForCausalLM",
        {"sliding_window": 9, "sliding_window_pattern": 2},
        (9, None),
    ),
    (
        "Cohere2ForCausalLM",
        {"sliding_window": 9, "layer_types": ["full_attention", "sliding_attention"]},
        (None, 9),
    ),
]


@pytest.mark.parametrize(("architecture", "change", "expected"), WINDOWS)
def test_windows(architecture, change, expected):
    """A window as long as the context is none."""
    config = {"architectures": [architecture], **SMALL, **change}
    model = build_model(config, ModelOptions(max_model_len=2048))
    assert model.windows == expected


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"n_positions": 1024}, 1024),
        ({"max_position_embeddings": 512}, 512),
        ({}, 2048),
    ],
)
def test_longest_context(config, expected):
    assert longest_context(config) == expected


def test_gemma_3_configs_of_both_formats_agree():
    """The older one stretches the full layers alone."""
    scaling = {"rope_type": "linear", "factor": 8.0}
    old = {
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "rope_scaling": scaling,
        "sliding_window_pattern": 2,
    }
    new = {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "full_attention": {**scaling, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    }
    base = {"architectures": ["Gemma3ForCausalLM"], **SMALL}
    models = [build_model(base | more, ModelOptions()) for more in (old, new)]
    assert models[0] == models[1]
    assert len({layer.rope for layer in models[0].config.layers}) == 2


@pytest.mark.parametrize("name", ["su", "yarn"])
def test_early_names_of_longrope(name):
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    config = {
        "architectures": ["Phi3ForCausalLM"],
        **SMALL,
        "original_max_position_embeddings": 64,
        "max_position_embeddings": 512,
    }
    models = [
        build_model(
            {**config, "rope_scaling": {"type": kind, **factors}}, ModelOptions()
        )
        for kind in (name, "longrope")
    ]
    assert models[0] == models[1]
