"""OLMo 2: norms after each half, and over all heads of queries and keys.

Source: 2 OLMo 2 Furious, arXiv:2501.00656.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jllm.models.base import ModelOptions
from jllm.models.decoder import Decoder
from jllm.models.decoder_config import (
    AttentionConfig,
    BlockConfig,
    DecoderConfig,
    HeadNormConfig,
)
from jllm.models.hf_config import read_flag, require_value
from jllm.models.hf_decoder import read_decoder


def make(config: Mapping[str, Any], options: ModelOptions) -> Decoder:
    """The decoder that a OLMo 2 config.json describes.

    Raises:
        UnsupportedModelError: A value is missing or not supported.
        ConfigError: The options do not fit the model's shape.
    """
    require_value(config, "clip_qkv", ())
    return Decoder(read_olmo(config), options)


def read_olmo(config: Mapping[str, Any]) -> DecoderConfig:
    """What OLMo 2 and 3 share.

    Raises:
        UnsupportedModelError: A value is missing or not supported.
    """
    shape = read_decoder({"rms_norm_eps": 1e-5, **config})
    bias = read_flag(config, "attention_bias", False)
    return dataclasses.replace(
        shape,
        attention=AttentionConfig(
            qkv_bias=bias,
            out_bias=bias,
            head_norms=HeadNormConfig(over="all", kind=shape.norm),
        ),
        block=BlockConfig(
            before_attention=None,
            after_attention="post_attention_layernorm",
            before_mlp=None,
            after_mlp="post_feedforward_layernorm",
        ),
    )
