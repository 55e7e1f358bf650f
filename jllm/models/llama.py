"""Llama 1 to 3.3: the plain decoder.

Source: LLaMA, arXiv:2302.13971; The Llama 3 Herd of Models, arXiv:2407.21783.
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
    """The decoder that a Llama config.json describes.

    Raises:
        UnsupportedModelError: A value is missing or not supported.
    """
    require_value(config, "hidden_act", ("silu", "swish"))
    require_value(config, "pretraining_tp", (1,))
    num_heads, num_kv_heads, head_dim = read_heads(config)
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
        max_position_embeddings=read_integer(config, "max_position_embeddings", 2048),
        tie_embeddings=read_flag(config, "tie_word_embeddings", False),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=read_flag(config, "mlp_bias", False),
    )
    return Decoder(shape, options)
