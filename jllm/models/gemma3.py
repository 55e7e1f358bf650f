"""Gemma 3, text: five sliding layers to each full one, with a rotation of their own.

Source: Gemma 3 Technical Report, arXiv:2503.19786.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jllm.models.base import ModelOptions
from jllm.models.decoder import Decoder
from jllm.models.decoder_config import HeadNormConfig, LayerConfig
from jllm.models.gemma2 import read_gemma
from jllm.models.hf_config import FULL, SLIDING, read_integer, read_layer_types
from jllm.models.hf_decoder import read_ropes, read_window


def make(config: Mapping[str, Any], options: ModelOptions) -> Decoder:
    """The decoder that a Gemma 3 text config.json describes.

    Raises:
        UnsupportedModelError: A value is missing or not supported.
        ConfigError: The options do not fit the model's shape.
    """
    local = config.get("rope_local_base_freq", 10_000.0)
    ropes = read_ropes(
        {"head_dim": 256, **config},
        {FULL: config.get("rope_theta", 1_000_000.0), SLIDING: local},
    )
    shape = read_gemma({**config, "rope_parameters": None}, soft_caps=(None, None))
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
