"""Mistral: Llama with a sliding window in every layer, or none.

Source: Mistral 7B, arXiv:2310.06825.
"""

from collections.abc import Mapping
from typing import Any

from jllm.models.base import ModelOptions
from jllm.models.decoder import Decoder
from jllm.models.hf_config import require_value
from jllm.models.hf_decoder import read_decoder, read_window, with_windows


def make(config: Mapping[str, Any], options: ModelOptions) -> Decoder:
    """The decoder that a Mistral config.json describes.

    Raises:
        UnsupportedModelError: A value is missing or not supported.
        ConfigError: The options do not fit the model's shape.
    """
    require_value(config, "layer_types", ())
    shape = with_windows(read_decoder(config), read_window(config, 4096))
    return Decoder(shape, options)
