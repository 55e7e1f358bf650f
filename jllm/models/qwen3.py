"""Qwen3, dense: a decoder whose queries and keys are normalised per head.

Source: Qwen3 Technical Report, arXiv:2505.09388.
"""

from collections.abc import Mapping
from typing import Any

from jllm.layers.rope import RopeConfig
from jllm.models.base import ModelOptions
from jllm.models.decoder import Decoder
from jllm.models.decoder_config import DecoderConfig
from jllm.models.hf_config import (
    read_flag,
    read_heads,
    read_integer,
    read_number,
    require_value,
)


def make(config: Mapping[str, Any], options: ModelOptions) -> Decoder:
    """The decoder that a Qwen3 config.json describes.

    Raises:
        UnsupportedModelError: A value is missing or not supported.
    """
    require_value(config, "hidden_act", ("silu", "swish"))
    require_value(config, "use_sliding_window", (False,))
    num_heads, num_kv_heads, head_dim = read_heads({"head_dim": 128, **config})
    bias = read_flag(config, "attention_bias", False)
    shape = DecoderConfig(
        vocab_size=read_integer(config, "vocab_size"),
        width=read_integer(config, "hidden_size"),
        num_layers=read_integer(config, "num_hidden_layers", high=1024),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        mlp_width=read_integer(config, "intermediate_size"),
        norm_epsilon=read_number(config, "rms_norm_eps", 1e-6),
        rope=RopeConfig.from_hf(config),
        max_position_embeddings=read_integer(config, "max_position_embeddings", 32768),
        tie_embeddings=read_flag(config, "tie_word_embeddings", False),
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=True,
    )
    return Decoder(shape, options)
