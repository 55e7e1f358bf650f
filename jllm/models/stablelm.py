"""StableLM 2 and StableLM 3B: layer norms, a quarter of each head rotated.

Source: Stable LM 2 1.6B Technical Report, arXiv:2402.17834.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jllm.layers.norm import NormKind
from jllm.models.base import ModelOptions
from jllm.models.decoder import Decoder
from jllm.models.decoder_config import AttentionConfig, BlockConfig, HeadNormConfig
from jllm.models.hf_config import read_flag, read_number, require_value, with_defaults
from jllm.models.hf_decoder import read_decoder


def make(config: Mapping[str, Any], options: ModelOptions) -> Decoder:
    """The decoder that a StableLM config.json describes.

    Raises:
        UnsupportedModelError: A value is missing or not supported.
        ConfigError: The options do not fit the model's shape.
    """
    require_value(config, "head_dim", ())
    shape = read_decoder(with_defaults(config, {"partial_rotary_factor": 0.25}))
    epsilon = read_number(config, "layer_norm_eps", 1e-5)
    names = ("self_attn.q_layernorm.norms", "self_attn.k_layernorm.norms")
    kind = NormKind(epsilon, centred=True)
    norms = HeadNormConfig(over="each", kind=kind, names=names, listed=True)
    is_parallel = read_flag(config, "use_parallel_residual", False)
    shape = dataclasses.replace(
        shape,
        norm=NormKind(epsilon, centred=True, bias=True),
        attention=AttentionConfig(
            qkv_bias=read_flag(config, "use_qkv_bias", False),
            head_norms=norms if read_flag(config, "qk_layernorm", False) else None,
        ),
        block=BlockConfig(before_mlp=None, parallel=True)
        if is_parallel
        else BlockConfig(),
    )
    return Decoder(shape, options)
