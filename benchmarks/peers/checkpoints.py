"""Writes the random checkpoints of the comparison: two shapes, bfloat16, seeded.

    python -m benchmarks.peers.checkpoints --cache FOLDER [NAME ...]

llama-120m is a small Llama of 124.7 million parameters, 100 million of which are read
per token; qwen3-0.6b has the shape of Qwen/Qwen3-0.6B. Speed does not depend on the
values; they are drawn so that activations stay of order one.
"""

import argparse
import json
from pathlib import Path
from typing import Any

COMMON = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "rms_norm_eps": 1e-06,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama-120m": {
        **COMMON,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    },
    "qwen3-0.6b": {
        **COMMON,
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
        "use_sliding_window": False,
    },
}


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors, as in Hugging Face's files."""
    width, mlp = config["hidden_size"], config["intermediate_size"]
    head_dim = config["head_dim"]
    q_width = config["num_attention_heads"] * head_dim
    kv_width = config["num_key_value_heads"] * head_dim
    layer: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (q_width, width),
        "self_attn.k_proj": (kv_width, width),
        "self_attn.v_proj": (kv_width, width),
        "self_attn.o_proj": (width, q_width),
        "mlp.gate_proj": (mlp, width),
        "mlp.up_proj": (mlp, width),
        "mlp.down_proj": (width, mlp),
        "input_layernorm": (width,),
        "post_attention_layernorm": (width,),
    }
    if config["model_type"] == "qwen3":
        layer |= {"self_attn.q_norm": (head_dim,), "self_attn.k_norm": (head_dim,)}
    result: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], width),
        "model.norm.weight": (width,),
    }
    if not config["tie_word_embeddings"]:
        result["lm_head.weight"] = (config["vocab_size"], width)
    for number in range(config["num_hidden_layers"]):
        for name, shape in layer.items():
            result[f"model.layers.{number}.{name}.weight"] = shape
    return result


def write_checkpoint(config: dict[str, Any], folder: Path, seed: int = 0) -> Path:
    """Writes config.json and model.safetensors, unless they are there."""
    if (folder / "config.json").exists():
        return folder
    import ml_dtypes
    import numpy as np
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in shapes(config).items():
        if len(shape) == 1:
            values = np.ones(shape, np.float32)
        else:
            values = rng.standard_normal(shape, np.float32) * shape[-1] ** -0.5
        tensors[name] = values.astype(ml_dtypes.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    # Written last: its presence says that the rest is there.
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return folder


def checkpoint(name: str, cache: Path) -> Path:
    """The folder of one of the two, written if need be."""
    return write_checkpoint(CONFIGS[name], cache / name)


def main() -> None:
    """Writes checkpoints and prints where they are."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", default=list(CONFIGS))
    parser.add_argument("--cache", type=Path, required=True)
    options = parser.parse_args()
    for name in options.names:
        print(checkpoint(name, options.cache))


if __name__ == "__main__":
    main()
