"""Cohere Command R7B and Command A: sliding layers, and full ones without positions.

Source: Command A, arXiv:2504.00698.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jllm.models.base import ModelOptions
from jllm.models.cohere import read_cohere
from jllm.models.decoder import Decoder
from jllm.models.decoder_config import LayerConfig
from jllm.models.hf_config import (
    FULL,
    SLIDING,
    read_integer,
    read_layer_types,
    require_value,
)
from jllm.models.hf_decoder import read_window


def make(config: Mapping[str, Any], options: ModelOptions) -> Decoder:
    """The decoder that a Cohere 2 config.json describes.

    Raises:
        UnsupportedModelError: A value is missing or not supported.
        ConfigError: The options do not fit the model's shape.
    """
    require_value(config, "use_qk_norm", (False,))
    shape = read_cohere(config)
    pattern = read_integer(config, "sliding_window_pattern", 4)
    types = read_layer_types(
        config,
        [FULL if (i + 1) % pattern == 0 else SLIDING for i in range(shape.num_layers)],
    )
    sliding = LayerConfig(shape.layers[0].rope, read_window(config, 4096))
    full = LayerConfig(rope=None)
    layers = tuple(sliding if kind == SLIDING else full for kind in types)
    return Decoder(dataclasses.replace(shape, layers=layers), options)
