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

KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
FALCON = {
    "vocab_size": 65024,
    "hidden_size": 4544,
    "num_hidden_layers": 32,
    "num_attention_heads": 71,
    "num_kv_heads": 71,
}
FALCON_40B = {
    "new_decoder_architecture": True,
    "hidden_size": 8192,
    "num_hidden_layers": 60,
    "num_attention_heads": 128,
    "num_kv_heads": 8,
}
GPT2 = {"vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12}


def sizes(*values, **more):
    return dict(zip(KEYS, values, strict=True)) | more


# Parameters that these models are known to have, GPT-2 and Pythia without their masks;
# neither these nor the sizes were compared with the files on huggingface.co. Of Granite
# 3.3 and Command R7B it is what the declaration counts: a guard against change.
PUBLISHED = {
    "openai-community/gpt2": ("GPT2LMHeadModel", GPT2, 124_439_808),
    "mistralai/Mistral-7B-v0.1": (
        "MistralForCausalLM",
        sizes(32000, 4096, 14336, 32, 32, 8, sliding_window=4096),
        7_241_732_096,
    ),
    "Qwen/Qwen2.5-7B": (
        "Qwen2ForCausalLM",
        sizes(152064, 3584, 18944, 28, 28, 4),
        7_615_616_512,
    ),
    "Qwen/Qwen2.5-0.5B": (
        "Qwen2ForCausalLM",
        sizes(151936, 896, 4864, 24, 14, 2, tie_word_embeddings=True),
        494_032_768,
    ),
    "google/gemma-2-2b": (
        "Gemma2ForCausalLM",
        sizes(256000, 2304, 9216, 26, 8, 4),
        2_614_341_888,
    ),
    "google/gemma-2-9b": (
        "Gemma2ForCausalLM",
        sizes(256000, 3584, 14336, 42, 16, 8),
        9_241_705_984,
    ),
    "google/gemma-3-1b-pt": (
        "Gemma3ForCausalLM",
        sizes(262144, 1152, 6912, 26, 4, 1),
        999_885_952,
    ),
    "microsoft/phi-2": (
        "PhiForCausalLM",
        sizes(51200, 2560, 10240, 32, 32, 32, partial_rotary_factor=0.4),
        2_779_683_840,
    ),
    "microsoft/Phi-3-mini-4k-instruct": (
        "Phi3ForCausalLM",
        sizes(32064, 3072, 8192, 32, 32, 32, sliding_window=2047),
        3_821_079_552,
    ),
    "microsoft/phi-4": (
        "Phi3ForCausalLM",
        sizes(100352, 5120, 17920, 40, 40, 10),
        14_659_507_200,
    ),
    "EleutherAI/pythia-70m": (
        "GPTNeoXForCausalLM",
        sizes(50304, 512, 2048, 6, 8, 8),
        70_426_624,
    ),
    "EleutherAI/pythia-1.4b": (
        "GPTNeoXForCausalLM",
        sizes(50304, 2048, 8192, 24, 16, 16),
        1_414_647_808,
    ),
    "tiiuae/falcon-7b": ("FalconForCausalLM", FALCON, 6_921_720_704),
    "tiiuae/falcon-40b": ("FalconForCausalLM", FALCON | FALCON_40B, 41_303_293_952),
    "HuggingFaceTB/SmolLM3-3B": (
        "SmolLM3ForCausalLM",
        sizes(128256, 2048, 11008, 36, 16, 4),
        3_075_098_624,
    ),
    "ibm-granite/granite-3.3-2b-instruct": (
        "GraniteForCausalLM",
        sizes(49159, 2048, 8192, 40, 32, 8, tie_word_embeddings=True),
        2_533_539_840,
    ),
    "allenai/OLMo-2-1124-7B": (
        "Olmo2ForCausalLM",
        sizes(100352, 4096, 11008, 32, 32, 32),
        7_298_617_344,
    ),
    "allenai/Olmo-3-1025-7B": (
        "Olmo3ForCausalLM",
        sizes(100278, 4096, 11008, 32, 32, 32),
        7_298_011_136,
    ),
    "CohereLabs/c4ai-command-r-v01": (
        "CohereForCausalLM",
        sizes(256000, 8192, 22528, 40, 64, 64),
        34_980_831_232,
    ),
    "CohereLabs/c4ai-command-r7b-12-2024": (
        "Cohere2ForCausalLM",
        sizes(256000, 4096, 14336, 32, 32, 8),
        8_028_033_024,
    ),
    "bigcode/starcoder2-3b": (
        "Starcoder2ForCausalLM",
        sizes(49152, 3072, 12288, 30, 24, 2),
        3_030_371_328,
    ),
    "bigcode/starcoder2-7b": (
        "Starcoder2ForCausalLM",
        sizes(49152, 4608, 18432, 32, 36, 4),
        7_173_923_840,
    ),
    "stabilityai/stablelm-2-1_6b": (
        "StableLmForCausalLM",
        sizes(100352, 2048, 5632, 24, 32, 32, use_qkv_bias=True),
        1_644_515_328,
    ),
    "stabilityai/stablelm-3b-4e1t": (
        "StableLmForCausalLM",
        sizes(50304, 2560, 6912, 32, 32, 32),
        2_795_443_200,
    ),
    "internlm/internlm2-7b": (
        "InternLM2ForCausalLM",
        sizes(92544, 4096, 14336, 32, 32, 8),
        7_737_708_544,
    ),
    "internlm/internlm3-8b-instruct": (
        "InternLM3ForCausalLM",
        sizes(128512, 4096, 10240, 48, 32, 2, head_dim=128),
        8_804_241_408,
    ),
}
# Of the files in the test data; their weights count a tied head once.
IN_THE_DATA = {
    "Qwen--Qwen3-0.6B": 596_049_920,
    "Qwen--Qwen3-1.7B": 1_720_574_976,
    "Qwen--Qwen3-8B": 8_190_735_360,
    "Qwen--Qwen3-32B": 32_762_123_264,
    "Qwen--Qwen3-32B-FP8": 32_762_123_264,
    "Qwen--Qwen3-32B-FP8-Static-PerTensor": 32_762_123_264,
    "meta-llama--Meta-Llama-3.1-8B": 8_030_261_248,
    "meta-llama--Meta-Llama-3.1-70B": 70_553_706_496,
    "meta-llama--Meta-Llama-3.1-405B": 405_853_388_800,
    "nvidia--Llama-3.1-70B-Instruct-FP8": 70_553_706_496,
}


def count(config):
    return published_parameter_count(build_model(config, ModelOptions()).specs())


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_count(name):
    architecture, config, expected = PUBLISHED[name]
    assert count({"architectures": [architecture], **config}) == expected


def test_every_architecture_is_counted():
    counted = {architecture for architecture, _, _ in PUBLISHED.values()}
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
