"""Fields of OpenAI's and vLLM's requests that cannot be honoured here.

Each has the values that ask for nothing; any other is refused by name.
"""

from collections.abc import Mapping
from typing import Any

NOTHING: tuple[Any, ...] = (None,)
OFF: tuple[Any, ...] = (None, False)

UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "access_programs": (None, []),
    "audio": NOTHING,
    "background_options": NOTHING,
    "context_management": NOTHING,
    "conversation": NOTHING,
    "data_sources": NOTHING,
    "enable_response_messages": OFF,
    "ec_transfer_params": NOTHING,
    "embed_dtype": (None, "float32"),
    "endianness": (None, "native", "little"),
    "function_call": (None, "none"),
    "functions": (None, []),
    "guided_decoding_backend": NOTHING,
    "guided_whitespace_pattern": NOTHING,
    "kv_transfer_params": NOTHING,
    "late_chunking_params": NOTHING,
    "length_penalty": (None, 1),
    "image": NOTHING,
    "logits_processors": (None, []),
    "media_io_kwargs": (None, {}),
    "max_tool_calls": NOTHING,
    "mm_payload": (None, "tensors"),
    "mm_processor_kwargs": (None, {}),
    "modalities": (None, ["text"]),
    "moderation": NOTHING,
    "padding": (None, False, "do_not_pad"),
    "prediction": NOTHING,
    "previous_input_messages": NOTHING,
    "prompt_cache_options": NOTHING,
    "prompt_embeds": NOTHING,
    "repetition_detection": NOTHING,
    "return_mm_kwargs": OFF,
    "return_prompt_text": OFF,
    "return_token_offsets": OFF,
    "return_weight_versions": OFF,
    "routed_experts_prompt_start": (None, 0),
    "session_id": NOTHING,
    "suffix": (None, ""),
    "truncation_side": (None, "left"),
    "use_beam_search": OFF,
    "vllm_xargs": (None, {}),
    "watermarking": OFF,
    "web_search_options": NOTHING,
}

UNSUPPORTED_IN_RESPONSES = ("prompt", "request_id")
"""Fields that have a meaning elsewhere; here a null is all that is accepted."""
