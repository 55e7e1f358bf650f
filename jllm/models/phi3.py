"""Phi-3, Phi-3.5 and Phi-4: Llama with fused projections, a window or LongRoPE.

Source: Phi-3 Technical Report, arXiv:2404.14219; Phi-4, arXiv:2412.08905.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jllm.models.base import ModelOptions
from jllm.models.decoder import Decoder
from jllm.models.decoder_config import Names
from jllm.models.hf_config import require_value
from jllm.models.hf_decoder import read_decoder, read_window, with_windows


def make(config: Mapping[str, Any], options: ModelOptions) -> Decoder:
    """The decoder that a Phi-3 config.json describes.

    Raises:
        UnsupportedModelError: A value is missing or not supported.
        ConfigError: The options do not fit the model's shape.
    """
    require_value(config, "attention_bias", (False,))
    shape = read_decoder({**config, "rope_scaling": _scaling(config)})
    shape = with_windows(shape, read_window(config))
    names = Names(qkv=("self_attn.qkv_proj",), up=("mlp.gate_up_proj",))
    return Decoder(dataclasses.replace(shape, names=names), options)


def _scaling(config: Mapping[str, Any]) -> Any:
    """The scaling of RoPE; early configs call LongRoPE by other names."""
    scaling = config.get("rope_scaling") or config.get("rope_parameters")
    if not isinstance(scaling, Mapping):
        return scaling
    values: dict[str, Any] = dict(scaling)  # pyright: ignore[reportUnknownArgumentType]
    if values.get("rope_type", values.get("type")) in ("su", "yarn"):
        values |= {"rope_type": "longrope"}
    return values
