"""The shapes that are measured: real ones, and a tiny one for a trial."""

import json
import pathlib
from typing import Any

COMMON: dict[str, Any] = {
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "attention_bias": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
    },
    "qwen3-0.6b": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 1024,
        "max_position_embeddings": 2048,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
    },
}


def config_folder(name: str, parent: pathlib.Path) -> pathlib.Path:
    """A folder with the config.json of a shape, and nothing else."""
    folder = parent / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(COMMON | SHAPES[name]))
    return folder


def weight_bytes(name: str, itemsize: int = 2) -> int:
    """Bytes of the weights that a decode step reads: all but the embedding's gather."""
    c = SHAPES[name]
    width, heads, kv = (
        c["hidden_size"],
        c["num_attention_heads"],
        c["num_key_value_heads"],
    )
    attention = width * c["head_dim"] * (2 * heads + 2 * kv)
    layer = attention + 3 * width * c["intermediate_size"]
    return itemsize * (c["num_hidden_layers"] * layer + width * c["vocab_size"])


def kv_bytes(name: str, itemsize: int = 2) -> int:
    """Bytes of one cached token."""
    c = SHAPES[name]
    per_layer = 2 * c["num_key_value_heads"] * c["head_dim"]
    return itemsize * c["num_hidden_layers"] * per_layer
