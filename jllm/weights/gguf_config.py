"""GGUF's names of settings and tensors, in Hugging Face's words."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jllm.errors import CheckpointError, UnsupportedModelError

ARCHITECTURES: Mapping[str, tuple[str, str]] = {
    "llama": ("LlamaForCausalLM", "llama"),
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
}
"""`general.architecture` to the architecture and model type of a config.json."""
OUTER_TENSORS: Mapping[str, str] = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
LAYER_TENSORS: Mapping[str, str] = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
INTEGERS: Mapping[str, str] = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "max_position_embeddings": "context_length",
}
"""Field of config.json to GGUF's, behind the architecture's name."""
LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
OUTER = re.compile(r"(\w+)\.(weight|bias)")


def hf_name(path: Path, name: str) -> str:
    """The Hugging Face name of a tensor.

    Raises:
        CheckpointError: No such tensor is known.
    """
    if (match := LAYER.fullmatch(name)) and match[2] in LAYER_TENSORS:
        return f"model.layers.{match[1]}.{LAYER_TENSORS[match[2]]}.{match[3]}"
    if (match := OUTER.fullmatch(name)) and match[1] in OUTER_TENSORS:
        return f"{OUTER_TENSORS[match[1]]}.{match[2]}"
    raise CheckpointError(
        f"{path}: tensor {name!r} belongs to no parameter that is known"
    )


def is_interleaved(settings: Mapping[str, Any], name: str) -> bool:
    """Whether a tensor's rows are in llama.cpp's order: q and k of Llama."""
    match = LAYER.fullmatch(name)
    is_llama = settings["general.architecture"] == "llama"
    return is_llama and match is not None and match[2] in ("attn_q", "attn_k")


def hf_config(
    path: Path,
    settings: Mapping[str, Any],
    *,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: str,
    rope_factors: list[float] | None,
) -> dict[str, Any]:
    """What the config.json of the model would hold.

    Args:
        path: The file, for messages.
        settings: Its metadata.
        shapes: Of its tensors, rows first.
        dtype: Type to compute with.
        rope_factors: Divisors of the rotary frequencies, if the file has any.

    Raises:
        CheckpointError: A setting is missing or of another type.
        UnsupportedModelError: An architecture or setting that is not supported.
    """
    own = _Settings(path, settings)
    name = own.architecture
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{path}: general.architecture={name!r} is not supported, only "
            f"{', '.join(ARCHITECTURES)}"
        )
    if own.integer("expert_count", 0):
        raise UnsupportedModelError(f"{path}: mixtures of experts are not supported")
    architecture, model_type = ARCHITECTURES[name]
    config: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": model_type,
        **{field: own.integer(key) for field, key in INTEGERS.items()},
    }
    width, heads = config["hidden_size"], max(config["num_attention_heads"], 1)
    head_dim = own.integer("attention.key_length", width // heads)
    if own.integer("rope.dimension_count", head_dim) != head_dim:
        raise UnsupportedModelError(
            f"{path}: rope.dimension_count must be the head width {head_dim}"
        )
    rows, *_ = shapes.get("token_embd.weight", (0,))
    biases = "blk.0.attn_q.bias" in shapes
    return {
        **config,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "attention_bias": biases and name != "qwen2",
        "mlp_bias": "blk.0.ffn_gate.bias" in shapes,
        "rms_norm_eps": own.number("attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope(own, rope_factors),
        "tie_word_embeddings": "output.weight" not in shapes,
        "vocab_size": rows,
        "dtype": dtype,
        **_special_tokens(settings),
    }


class _Settings:
    """Checked reading of the metadata of one architecture."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self.path, self._values = path, values
        self.architecture = values.get("general.architecture")

    def get(self, key: str) -> Any:
        """A value, None where there is none; of equal ones for all layers, the one."""
        value = self._values.get(f"{self.architecture}.{key}")
        if isinstance(value, list) and value and all(v == value[0] for v in value):
            return value[0]
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        """An integer."""
        return int(self._number(key, default, (int,)))

    def number(self, key: str, default: float | None = None) -> float:
        """A number; the 32 bits in the file are written as briefly as they can be."""
        return float(f"{self._number(key, default, (int, float)):.7g}")

    def _number(self, key: str, default: Any, kinds: tuple[type, ...]) -> Any:
        value = self.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, kinds):
            raise CheckpointError(
                f"{self.path}: {self.architecture}.{key}={value!r} must be a number, "
                f"the same for all layers"
            )
        return value


def _rope(own: _Settings, factors: list[float] | None) -> dict[str, Any]:
    """The rotary embedding, in the form that transformers 5 writes it."""
    values: dict[str, Any] = {"rope_theta": own.number("rope.freq_base", 10000.0)}
    kind = own.get("rope.scaling.type") or "none"
    if factors is not None:
        # One divisor per pair, whatever rule they came from.
        return values | {
            "rope_type": "longrope",
            "short_factor": factors,
            "long_factor": factors,
            "attention_factor": 1.0,
            "original_max_position_embeddings": own.integer("context_length"),
        }
    if kind == "none":
        return values | {"rope_type": "default"}
    if kind not in ("linear", "yarn"):
        raise UnsupportedModelError(
            f"{own.path}: rope.scaling.type={kind!r} is not supported, only "
            f"linear and yarn"
        )
    values |= {"rope_type": kind, "factor": own.number("rope.scaling.factor")}
    if kind == "yarn":
        values["original_max_position_embeddings"] = own.integer(
            "rope.scaling.original_context_length"
        )
    return values


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Ids of the tokens that begin and end a text; a turn's end ends an output too."""
    ids = {
        kind: settings.get(f"tokenizer.ggml.{kind}_token_id")
        for kind in ("bos", "eos", "eot")
    }
    ends: list[Any] = []
    for kind in ("eos", "eot"):
        if ids[kind] is not None and ids[kind] not in ends:
            ends.append(ids[kind])
    found: dict[str, Any] = {}
    if ids["bos"] is not None:
        found["bos_token_id"] = ids["bos"]
    if ends:
        found["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    return found
