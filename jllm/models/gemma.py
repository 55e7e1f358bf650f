"""Gemma 2 and Gemma 3, text: norms around both halves, alternating windows.

Sources: Gemma 2, arXiv:2408.00118; Gemma 3 Technical Report, arXiv:2503.19786.
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
    read_bound,
    read_flag,
    read_integer,
    read_layer_types,
    read_number,
    require_value,
    with_defaults,
)
from jllm.models.hf_decoder import read_decoder, read_ropes, read_window, with_windows


def gemma2(config: Mapping[str, Any], options: ModelOptions) -> Decoder:
    """The decoder that a Gemma 2 config.json describes.

    Raises:
        UnsupportedModelError: A value is missing or not supported.
        ConfigError: The options do not fit the model's shape.
    """
    shape = _read_gemma(config, soft_caps=(50.0, 30.0))
    default = [FULL if i % 2 else SLIDING for i in range(shape.num_layers)]
    types = read_layer_types(config, default)
    shape = with_windows(shape, read_window(config, 4096), types)
    return Decoder(shape, options)


def gemma3(config: Mapping[str, Any], options: ModelOptions) -> Decoder:
    """The decoder that a Gemma 3 text config.json describes.

    Raises:
        UnsupportedModelError: A value is missing or not supported.
        ConfigError: The options do not fit the model's shape.
    """
    local = config.get("rope_local_base_freq", 10_000.0)
    ropes = read_ropes(
        with_defaults(config, {"head_dim": 256}),
        {FULL: config.get("rope_theta", 1_000_000.0), SLIDING: local},
    )
    shape = _read_gemma({**config, "rope_parameters": None}, soft_caps=(None, None))
    pattern = read_integer(config, "sliding_window_pattern", 6)
    default = [
        FULL if (i + 1) % pattern == 0 else SLIDING for i in range(shape.num_layers)
    ]
    types = read_layer_types(config, default)
    windows = {FULL: None, SLIDING: read_window(config, 4096)}
    attention = dataclasses.replace(
        shape.attention, head_norms=HeadNormConfig(kind=shape.norm)
    )
    layers = tuple(LayerConfig(ropes[kind], windows[kind]) for kind in types)
    shape = dataclasses.replace(shape, attention=attention, layers=layers)
    return Decoder(shape, options)


def _read_gemma(
    config: Mapping[str, Any], soft_caps: tuple[float | None, float | None]
) -> DecoderConfig:
    """What Gemma 2 and 3 share: norms, scales, bounds.

    Args:
        config: Content of config.json.
        soft_caps: Bounds of the attention's scores and of the tokens' scores where
            the config does not say.

    Raises:
        UnsupportedModelError: A value is missing or not supported.
    """
    require_value(config, "use_bidirectional_attention", (False,))
    config = with_defaults(
        config, {"head_dim": 256, "hidden_activation": "gelu_pytorch_tanh"}
    )
    shape = read_decoder(config, activation="hidden_activation")
    bias = read_flag(config, "attention_bias", False)
    query_width = read_number(config, "query_pre_attn_scalar", 256.0)
    return dataclasses.replace(
        shape,
        norm=NormKind(shape.norm.epsilon, weight_offset=1),
        attention=AttentionConfig(
            scale=query_width**-0.5,
            soft_cap=read_bound(config, "attn_logit_softcapping", soft_caps[0]),
            qkv_bias=bias,
            out_bias=bias,
        ),
        block=BlockConfig(
            after_attention="post_attention_layernorm",
            before_mlp="pre_feedforward_layernorm",
            after_mlp="post_feedforward_layernorm",
        ),
        embedding=EmbeddingConfig(
            tied=read_flag(config, "tie_word_embeddings", True),
            scale=shape.width**0.5,
            soft_cap=read_bound(config, "final_logit_softcapping", soft_caps[1]),
        ),
    )
