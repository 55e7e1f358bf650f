"""Which architectures there are; one line per model."""

import importlib
from collections.abc import Mapping
from typing import Any

from jllm.errors import UnsupportedModelError
from jllm.models.base import Model, ModelOptions

ARCHITECTURES: Mapping[str, str] = {
    "CohereForCausalLM": "jllm.models.cohere:command_r",
    "Cohere2ForCausalLM": "jllm.models.cohere:command_a",
    "FalconForCausalLM": "jllm.models.falcon:make",
    "GPT2LMHeadModel": "jllm.models.gpt2:make",
    "GPTNeoXForCausalLM": "jllm.models.gpt_neox:make",
    "Gemma2ForCausalLM": "jllm.models.gemma:gemma2",
    "Gemma3ForCausalLM": "jllm.models.gemma:gemma3",
    "GraniteForCausalLM": "jllm.models.granite:make",
    "InternLM2ForCausalLM": "jllm.models.internlm2:make",
    "InternLM3ForCausalLM": "jllm.models.internlm3:make",
    "LlamaForCausalLM": "jllm.models.llama:make",
    "MistralForCausalLM": "jllm.models.mistral:make",
    "Olmo2ForCausalLM": "jllm.models.olmo:olmo2",
    "Olmo3ForCausalLM": "jllm.models.olmo:olmo3",
    "Phi3ForCausalLM": "jllm.models.phi3:make",
    "PhiForCausalLM": "jllm.models.phi:make",
    "Qwen2ForCausalLM": "jllm.models.qwen2:make",
    "Qwen3ForCausalLM": "jllm.models.qwen3:make",
    "SmolLM3ForCausalLM": "jllm.models.smollm3:make",
    "StableLmForCausalLM": "jllm.models.stablelm:make",
    "Starcoder2ForCausalLM": "jllm.models.starcoder2:make",
}
"""Name in config.json to the module and its function of `(config, options)`."""


def architecture_of(config: Mapping[str, Any]) -> str:
    """The supported architecture that a config.json names.

    Raises:
        UnsupportedModelError: It names none, or none that is supported.
    """
    names = config.get("architectures")
    if not isinstance(names, list) or not names:
        raise UnsupportedModelError(
            f"config.json: architectures={names!r} must name the architecture"
        )
    for name in names:  # pyright: ignore[reportUnknownVariableType]
        if name in ARCHITECTURES:
            return str(name)  # pyright: ignore[reportUnknownArgumentType]
    raise UnsupportedModelError(
        f"architecture {names[0]!r} is not supported; supported are "
        + ", ".join(sorted(ARCHITECTURES))
    )


def build_model(config: Mapping[str, Any], options: ModelOptions) -> Model:
    """The model that a config.json describes; no weights are made.

    Raises:
        UnsupportedModelError: Unknown architecture, or a value it cannot have.
        ConfigError: The options do not fit the model's shape.
    """
    module, _, function = ARCHITECTURES[architecture_of(config)].partition(":")
    make = getattr(importlib.import_module(module), function)
    return make(config, options)
