"""Cohere Command R, R7B and A: attention and MLP in parallel, pairs of neighbours.

Sources: docs.cohere.com/docs/command-r; Command A, arXiv:2504.00698; parallel layers,
arXiv:2204.02311.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jllm.layers.norm import NormKind
from jllm.models.base import ModelOptions
from jllm.models.decoder import Decoder
from jllm.models.decoder_config import (
    AttentionConfig,
    BlockConfig,
    DecoderConfig,
    EmbeddingConfig,
    HeadNormConfig,
    LayerConfig,
)
from jllm.models.hf_config import (
    FULL,
    SLIDING,
    read_flag,
    read_integer,
    read_layer_types,
    read_number,
    require_value,
    with_defaults,
)
from jllm.models.hf_decoder import read_decoder, read_window


def command_r(config: Mapping[str, Any], options: ModelOptions) -> Decoder:
    """The decoder that a Cohere config.json describes.

    Raises:
        UnsupportedModelError: A value is missing or not supported.
        ConfigError: The options do not fit the model's shape.
    """
    shape = _read_cohere(with_defaults(config, {"rope_theta": 500_000.0}))
    if read_flag(config, "use_qk_norm", False):
        norms = HeadNormConfig(over="each", kind=shape.norm)
        attention = dataclasses.replace(shape.attention, head_norms=norms)
        shape = dataclasses.replace(shape, attention=attention)
    return Decoder(shape, options)


def command_a(config: Mapping[str, Any], options: ModelOptions) -> Decoder:
    """The decoder that a Cohere 2 config.json describes.

    Raises:
        UnsupportedModelError: A value is missing or not supported.
        ConfigError: The options do not fit the model's shape.
    """
    require_value(config, "use_qk_norm", (False,))
    shape = _read_cohere(config)
    pattern = read_integer(config, "sliding_window_pattern", 4)
    types = read_layer_types(
        config,
        [FULL if (i + 1) % pattern == 0 else SLIDING for i in range(shape.num_layers)],
    )
    sliding = LayerConfig(shape.layers[0].rope, read_window(config, 4096))
    full = LayerConfig(rope=None)
    layers = tuple(sliding if kind == SLIDING else full for kind in types)
    return Decoder(dataclasses.replace(shape, layers=layers), options)


def _read_cohere(config: Mapping[str, Any]) -> DecoderConfig:
    """What Command R and R7B share.

    Raises:
        UnsupportedModelError: A value is missing or not supported.
    """
    bias = read_flag(config, "attention_bias", False)
    return dataclasses.replace(
        read_decoder(config),
        norm=NormKind(read_number(config, "layer_norm_eps", 1e-5), centred=True),
        attention=AttentionConfig(qkv_bias=bias, out_bias=bias, interleaved=True),
        block=BlockConfig(before_mlp=None, parallel=True),
        embedding=EmbeddingConfig(
            tied=read_flag(config, "tie_word_embeddings", True),
            logit_scale=read_number(config, "logit_scale", 0.0625),
        ),
    )
