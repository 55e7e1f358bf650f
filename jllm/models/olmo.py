"""OLMo 2 and 3: norms after each half, and over all heads of queries and keys.

Sources: 2 OLMo 2 Furious, arXiv:2501.00656; Olmo 3, arXiv:2512.13961.
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
    LayerConfig,
)
from jllm.models.hf_config import (
    FULL,
    SLIDING,
    read_flag,
    read_layer_types,
    require_value,
    with_defaults,
)
from jllm.models.hf_decoder import read_decoder, read_ropes, read_window


def olmo2(config: Mapping[str, Any], options: ModelOptions) -> Decoder:
    """The decoder that a OLMo 2 config.json describes.

    Raises:
        UnsupportedModelError: A value is missing or not supported.
        ConfigError: The options do not fit the model's shape.
    """
    require_value(config, "clip_qkv", ())
    return Decoder(_read_olmo(config), options)


def olmo3(config: Mapping[str, Any], options: ModelOptions) -> Decoder:
    """The decoder that a OLMo 3 config.json describes.

    Raises:
        UnsupportedModelError: A value is missing or not supported.
        ConfigError: The options do not fit the model's shape.
    """
    theta = config.get("rope_theta", 500_000.0)
    ropes = read_ropes(config, {FULL: theta, SLIDING: theta})
    shape = _read_olmo({**config, "rope_parameters": None})
    default = [FULL if i % 4 == 3 else SLIDING for i in range(shape.num_layers)]
    types = read_layer_types(config, default)
    windows = {FULL: None, SLIDING: read_window(config, 4096)}
    layers = tuple(LayerConfig(ropes[kind], windows[kind]) for kind in types)
    return Decoder(dataclasses.replace(shape, layers=layers), options)


def _read_olmo(config: Mapping[str, Any]) -> DecoderConfig:
    """What OLMo 2 and 3 share.

    Raises:
        UnsupportedModelError: A value is missing or not supported.
    """
    shape = read_decoder(with_defaults(config, {"rms_norm_eps": 1e-5}))
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
