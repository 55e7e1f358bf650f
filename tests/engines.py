"""Tiny engines with random weights, for tests; one per set of options and process."""

import contextlib
import functools
import json
import pathlib
import tempfile

import jax
import numpy as np
from safetensors.numpy import save_file

from jllm.config import EngineConfig
from jllm.engine.create import create_engine
from jllm.types import EngineRequest, SamplingParams

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 56,
    "intermediate_size": 144,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 24,
    "vocab_size": 331,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
"""Llama-3.1-8B, to plan for; without its RoPE scaling."""
QWEN3 = {**LLAMA, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
SMALL = {
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,
    "num_blocks": 256,
    "compile_ahead": False,
}
"""Few rows and tokens, and two programs, which compile in a moment."""
WORK = ("jaxpr_trace_duration", "jaxpr_to_mlir_module_duration", "backend_compile")


def random_tensors(config, seed=0):
    """Tensors of a checkpoint in Hugging Face layout, by name."""
    rng = np.random.default_rng(seed)
    width, mlp, head_dim = (
        config[key] for key in ("hidden_size", "intermediate_size", "head_dim")
    )
    q_width = config["num_attention_heads"] * head_dim
    kv_width = config["num_key_value_heads"] * head_dim
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], width)}
    shapes["model.norm.weight"] = (width,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], width)
    for i in range(config["num_hidden_layers"]):
        layer = {
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
        if config["architectures"] == ["Qwen3ForCausalLM"]:
            layer |= {"self_attn.q_norm": (head_dim,), "self_attn.k_norm": (head_dim,)}
        shapes |= {f"model.layers.{i}.{k}.weight": shape for k, shape in layer.items()}

    def draw(shape):
        if len(shape) == 1:
            return 1 + 0.1 * rng.normal(size=shape)
        return rng.normal(size=shape) / np.sqrt(shape[-1])

    return {name: draw(shape).astype(np.float32) for name, shape in shapes.items()}


@functools.cache
def model_folder(config_text):
    """A folder with a random checkpoint."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix="jllm-test-"))
    (folder / "config.json").write_text(config_text)
    tensors = random_tensors(json.loads(config_text))
    save_file(tensors, folder / "model.safetensors")
    return folder


def make_engine(config=LLAMA, **options):
    """A new engine; callers close it."""
    folder = model_folder(json.dumps(config))
    return create_engine(EngineConfig(model=str(folder), **SMALL | options))


@functools.cache
def _shared(config_text, options):
    return make_engine(json.loads(config_text), **dict(options))


def shared_engine(config=LLAMA, **options):
    """An engine that tests of one process share; it is idle between them."""
    return _shared(json.dumps(config), tuple(sorted(options.items())))


def request(request_id, prompt, **params):
    engine_fields = {
        name: params.pop(name)
        for name in (
            "priority",
            "cache_salt",
            "bad_words_token_ids",
            "eos_token_ids",
            "pooling",
            "prompt_logprobs_start",
        )
        if name in params
    }
    return EngineRequest(
        request_id=str(request_id),
        prompt_token_ids=tuple(int(token) for token in prompt),
        params=SamplingParams(**params),
        **engine_fields,
    )


def drain(engine, on_step=None):
    """Steps until nothing is left; all outputs in order."""
    outputs = []
    while engine.has_unfinished:
        outputs += engine.step()
        if on_step is not None:
            on_step(outputs)
    return outputs


def tokens_of(outputs):
    """Tokens per (request id, index)."""
    tokens = {}
    for output in outputs:
        key = (output.request_id, output.index)
        tokens.setdefault(key, []).extend(output.token_ids)
    return tokens


def run(engine, requests, **kwargs):
    """Adds all requests, drains, and returns the tokens per (request id, index)."""
    for item in requests:
        engine.add(item)
    return tokens_of(drain(engine, **kwargs))


@contextlib.contextmanager
def counted_work():
    """Names of all traces, lowerings and compilations in the block."""
    found = []

    def record(name, *_, **__):
        found.extend(word for word in WORK if word in name)

    jax.monitoring.register_event_duration_secs_listener(record)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(record)
