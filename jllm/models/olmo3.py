"""OLMo 3: OLMo 2 with three sliding layers to each full one.

Source: Olmo 3, arXiv:2512.13961.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jllm.models.base import ModelOptions
from jllm.models.decoder import Decoder
from jllm.models.decoder_config import LayerConfig
from jllm.models.hf_config import FULL, SLIDING, read_layer_types
from jllm.models.hf_decoder import read_ropes, read_window
from jllm.models.olmo2 import read_olmo


def make(config: Mapping[str, Any], options: ModelOptions) -> Decoder:
    """The decoder that a OLMo 3 config.json describes.

    Raises:
        UnsupportedModelError: A value is missing or not supported.
        ConfigError: The options do not fit the model's shape.
    """
    theta = config.get("rope_theta", 500_000.0)
    ropes = read_ropes(config, {FULL: theta, SLIDING: theta})
    shape = read_olmo({**config, "rope_parameters": None})
    default = [FULL if i % 4 == 3 else SLIDING for i in range(shape.num_layers)]
    types = read_layer_types(config, default)
    windows = {FULL: None, SLIDING: read_window(config, 4096)}
    layers = tuple(LayerConfig(ropes[kind], windows[kind]) for kind in types)
    return Decoder(dataclasses.replace(shape, layers=layers), options)
