"""InternLM2: Llama with fused projections of each KV head.

Source: InternLM2 Technical Report, arXiv:2403.17297.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jllm.models.base import ModelOptions
from jllm.models.decoder import Decoder
from jllm.models.decoder_config import AttentionConfig, BlockConfig, Names
from jllm.models.hf_config import read_flag, require_value
from jllm.models.hf_decoder import read_decoder


def make(config: Mapping[str, Any], options: ModelOptions) -> Decoder:
    """The decoder that a InternLM2 config.json describes.

    Raises:
        UnsupportedModelError: A value is missing or not supported.
        ConfigError: The options do not fit the model's shape.
    """
    require_value(config, "pretraining_tp", (1,))
    bias = read_flag(config, "bias", False)
    shape = dataclasses.replace(
        read_decoder(config),
        attention=AttentionConfig(qkv_bias=bias, out_bias=bias),
        block=BlockConfig("attention_norm", before_mlp="ffn_norm"),
        names=Names(
            embed="model.tok_embeddings",
            head="output",
            qkv=("attention.wqkv",),
            out="attention.wo",
            up=("feed_forward.w1", "feed_forward.w3"),
            down="feed_forward.w2",
            grouped=True,
        ),
    )
    return Decoder(shape, options)
