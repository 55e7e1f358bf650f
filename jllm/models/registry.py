"""Which architectures there are; one line per model."""

import importlib
from collections.abc import Mapping
from typing import Any

from jllm.errors import UnsupportedModelError
from jllm.models.base import Model, ModelOptions

ARCHITECTURES: Mapping[str, str] = {
    "CohereForCausalLM": "jllm.models.cohere",
    "Cohere2ForCausalLM": "jllm.models.cohere2",
    "FalconForCausalLM": "jllm.models.falcon",
    "GPT2LMHeadModel": "jllm.models.gpt2",
    "GPTNeoXForCausalLM": "jllm.models.gpt_neox",
    "Gemma2ForCausalLM": "jllm.models.gemma2",
    "Gemma3ForCausalLM": "jllm.models.gemma3",
    "GraniteForCausalLM": "jllm.models.granite",
    "InternLM2ForCausalLM": "jllm.models.internlm2",
    "InternLM3ForCausalLM": "jllm.models.internlm3",
    "LlamaForCausalLM": "jllm.models.llama",
    "MistralForCausalLM": "jllm.models.mistral",
    "Olmo2ForCausalLM": "jllm.models.olmo2",
    "Olmo3ForCausalLM": "jllm.models.olmo3",
    "Phi3ForCausalLM": "jllm.models.phi3",
    "PhiForCausalLM": "jllm.models.phi",
    "Qwen2ForCausalLM": "jllm.models.qwen2",
    "Qwen3ForCausalLM": "jllm.models.qwen3",
    "SmolLM3ForCausalLM": "jllm.models.smollm3",
    "StableLmForCausalLM": "jllm.models.stablelm",
    "Starcoder2ForCausalLM": "jllm.models.starcoder2",
}
"""Name in config.json to the module with the function `make(config, options)`."""


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
    module = importlib.import_module(ARCHITECTURES[architecture_of(config)])
    return module.make(config, options)
