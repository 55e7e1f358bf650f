"""Writes a Llama or Qwen3 checkpoint as GGUF, without a vocabulary.

llama.cpp's own converter wants a tokenizer that it knows; token ids need none.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ARCHITECTURES = {"LlamaForCausalLM": "llama", "Qwen3ForCausalLM": "qwen3"}
LAYER_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def tensors(folder: Path) -> Iterator[tuple[str, Any]]:
    """Names and float32 arrays of all safetensors files of a folder."""
    import numpy as np

    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        data = np.memmap(path, np.uint8, "r", 8 + size)
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            low, high = entry["data_offsets"]
            raw = data[low:high]
            if entry["dtype"] == "BF16":
                values = (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
            else:
                kinds = {"F32": np.float32, "F16": np.float16}
                values = raw.view(kinds[entry["dtype"]]).astype(np.float32)
            yield name, values.reshape(entry["shape"])


def gguf_name(name: str) -> str:
    """The name of a tensor in GGUF."""
    if name in NAMES:
        return NAMES[name]
    _, _, number, rest = name.split(".", 3)
    return f"blk.{number}.{LAYER_NAMES[rest.removesuffix('.weight')]}.weight"


def interleaved(weight: Any, num_heads: int) -> Any:
    """Rows of q or k in the order of llama.cpp's Llama: RoPE turns neighbours.

    Hugging Face's turns the first half of a head with the second.
    """
    half = weight.shape[0] // num_heads // 2
    heads = weight.reshape(num_heads, 2, half, *weight.shape[1:])
    return heads.swapaxes(1, 2).reshape(weight.shape)


def write(folder: Path, target: Path, *, is_bfloat16: bool) -> None:
    """Writes the file; norms stay float32."""
    import gguf

    config = json.loads((folder / "config.json").read_text())
    if config.get("rope_scaling"):
        raise ValueError("RoPE scaling is not written")
    (architecture,) = config["architectures"]
    name = ARCHITECTURES[architecture]
    unfinished = target.with_suffix(".part")
    writer = gguf.GGUFWriter(str(unfinished), name)
    add_settings(writer, config)
    types = gguf.GGMLQuantizationType
    for source, values in tensors(folder):
        if name == "llama":
            for part, heads in (
                ("q_proj", "num_attention_heads"),
                ("k_proj", "num_key_value_heads"),
            ):
                if part in source:
                    values = interleaved(values, config[heads])
        kind = types.BF16 if is_bfloat16 and values.ndim > 1 else types.F32
        data = gguf.quants.quantize(values, kind)
        writer.add_tensor(gguf_name(source), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    unfinished.rename(target)


def add_settings(writer: Any, config: dict[str, Any]) -> None:
    """The shape of the network."""
    num_heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // num_heads
    rope = config.get("rope_parameters") or {}
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(num_heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config.get("rope_theta") or rope["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
