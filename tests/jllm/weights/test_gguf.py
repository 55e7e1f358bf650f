"""GGUF files against gguf's own dequantisation, and against transformers."""

import functools
import json
import pathlib
import tempfile

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jllm import LLM, SamplingParams
from jllm.engine.create import DEFAULT_MODEL
from jllm.errors import CheckpointError, ModelNotFoundError, UnsupportedModelError
from jllm.models.base import ModelOptions
from jllm.models.registry import build_model
from jllm.text.tokenizer import load_tokenizer
from jllm.weights.gguf import QUANTIZATIONS, read_gguf
from jllm.weights.hub import resolve_model
from jllm.weights.loader import load_weights
from shardings.mesh import make_mesh
from shardings.place import tree_shardings
from tests.engines import LLAMA, QWEN3, SMALL, random_tensors

SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 320,
}
"""Rows of whole blocks of the K quantizations, which have 256 weights."""
CONFIGS = {
    "llama": {**LLAMA, **SIZES},
    "qwen3": {**QWEN3, **SIZES, "tie_word_embeddings": True},
}
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
OUTER_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
KINDS = gguf.GGMLQuantizationType


def gguf_name(name):
    stem, end = name.rsplit(".", 1)
    if stem in OUTER_NAMES:
        return f"{OUTER_NAMES[stem]}.{end}"
    _, _, number, rest = stem.split(".", 3)
    return f"blk.{number}.{LAYER_NAMES[rest]}.{end}"


def heads_of(config, name):
    """Heads whose rows llama.cpp's converter puts in another order, if any."""
    if config["architectures"] != ["LlamaForCausalLM"]:
        return None
    if "q_proj" in name:
        return config["num_attention_heads"]
    return config["num_key_value_heads"] if "k_proj" in name else None


def interleaved(rows, heads):
    """As llama.cpp's converter does it."""
    shape = (heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return rows.reshape(shape).swapaxes(1, 2).reshape(rows.shape)


def separated(rows, heads):
    """The other way."""
    shape = (heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return rows.reshape(shape).swapaxes(1, 2).reshape(rows.shape)


def quantized(array, kind):
    """Bytes of a matrix; gguf has no Python code that makes K quantizations."""
    if kind not in (KINDS.Q4_K, KINDS.Q6_K):
        return gguf.quants.quantize(array, kind)
    weights, size = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(array.size)
    blocks = rng.integers(0, 256, (array.shape[0], array.shape[1] // weights, size))
    blocks = blocks.astype(np.uint8)
    scale = np.frombuffer(np.float16(2e-5).tobytes(), np.uint8)
    places = (208,) if kind == KINDS.Q6_K else (0, 2)
    for place in places:
        blocks[..., place : place + 2] = scale
    if kind == KINDS.Q4_K:
        blocks[..., 0:2] = np.frombuffer(np.float16(1e-4).tobytes(), np.uint8)
    return blocks.reshape(array.shape[0], -1)


def add_vocabulary(writer, folder):
    """A byte-level vocabulary, as llama.cpp's converter writes it."""
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    special = {token["content"]: token["id"] for token in content["added_tokens"]}
    tokens = {number: token for token, number in (vocabulary | special).items()}
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([tokens[number] for number in range(len(tokens))])
    kinds = (gguf.TokenType.NORMAL, gguf.TokenType.CONTROL)
    numbers = set(special.values())
    writer.add_token_types([kinds[number in numbers] for number in range(len(tokens))])
    writer.add_token_merges([" ".join(pair) for pair in content["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_chat_template((folder / "chat_template.jinja").read_text())


def write(
    path, config, kind="Q8_0", *, settings=(), extra=(), leave_out=(), model=None
):
    """Writes a model; returns the tensors' values in Hugging Face's order."""
    arch = "llama" if "Llama" in config["architectures"][0] else "qwen3"
    writer = gguf.GGUFWriter(str(path), arch)
    values = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config["head_dim"],
        "rope.dimension_count": config["head_dim"],
    }
    values |= {key: value for key, value in dict(settings).items() if "." in key}
    for key, value in values.items():
        if key not in leave_out:
            add = writer.add_string if isinstance(value, str) else writer.add_uint32
            add(f"{arch}.{key}", value)
    epsilon = dict(settings).get("epsilon", 1e-5)
    writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", epsilon)
    writer.add_float32(f"{arch}.rope.freq_base", dict(settings).get("theta", 10000.0))
    writer.add_uint32("tokenizer.ggml.eos_token_id", config["eos_token_id"])
    expected = {}
    arrays = random_tensors(config)
    if model is not None:
        arrays = load_file(model / "model.safetensors")
        add_vocabulary(writer, model)
    for name, array in arrays.items():
        heads = heads_of(config, name)
        stored = array if heads is None else interleaved(array, heads)
        own = KINDS[kind] if array.ndim > 1 else KINDS.F32
        data = quantized(stored, own)
        writer.add_tensor(gguf_name(name), data, raw_dtype=own)
        decoded = gguf.quants.dequantize(data, own).reshape(array.shape)
        expected[name] = decoded if heads is None else separated(decoded, heads)
    for name, array in dict(extra).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


@functools.cache
def model(family, kind):
    """A file, and its values as gguf decodes them."""
    path = pathlib.Path(tempfile.mkdtemp(prefix="jllm-gguf-")) / "model.gguf"
    return path, write(path, CONFIGS[family], kind)


@pytest.mark.parametrize("kind", QUANTIZATIONS)
@pytest.mark.parametrize("family", CONFIGS)
def test_tensors(family, kind):
    """To the bit, whole and in parts."""
    path, expected = model(family, kind)
    _, tensors = read_gguf(path)
    assert set(tensors) == set(expected)
    for name, array in expected.items():
        assert tensors[name].shape == array.shape
        found = tensors[name].map()
        np.testing.assert_array_equal(np.asarray(found).astype(np.float32), array)
        if array.ndim > 1:
            part = found[5:77, 30:190].astype(np.float32)
            np.testing.assert_array_equal(part, array[5:77, 30:190])


def test_only_the_rows_of_a_slice_are_decoded(monkeypatch):
    path, _ = model("llama", "Q4_K")
    rows = []
    original = gguf.quants.dequantize
    monkeypatch.setattr(
        gguf.quants,
        "dequantize",
        lambda data, kind: rows.append(data.shape) or original(data, kind),
    )
    _, tensors = read_gguf(path)
    assert rows == []
    tensors["model.layers.0.mlp.down_proj.weight"].map()[10:20, 256:512]
    assert rows == [(10, 144)]  # one of two blocks of each row


def test_rows_of_biases_are_reordered_too(tmp_path):
    path, size = tmp_path / "m.gguf", 8 * 32
    bias = np.random.default_rng(0).normal(size=size).astype(np.float32)
    extra = {"blk.1.attn_q.bias": interleaved(bias, 8), "blk.1.attn_v.bias": bias}
    write(path, CONFIGS["llama"], extra=extra)
    _, tensors = read_gguf(path)
    for kind in "qv":
        found = tensors[f"model.layers.1.self_attn.{kind}_proj.bias"].map()
        assert found.shape == (size,)
        np.testing.assert_array_equal(found, bias)
        np.testing.assert_array_equal(found[9:70], bias[9:70])


def test_settings():
    config, tensors = read_gguf(model("qwen3", "Q8_0")[0])
    theirs = CONFIGS["qwen3"]
    for key in (*SIZES, "architectures", "model_type", "tie_word_embeddings"):
        assert config[key] == theirs[key]
    assert config["rope_parameters"] == {"rope_theta": 10000.0, "rope_type": "default"}
    assert config["rms_norm_eps"] == 1e-5
    assert config["eos_token_id"] == 2
    assert config["dtype"] == "bfloat16"
    assert "lm_head.weight" not in tensors


@pytest.mark.parametrize(
    ("kind", "dtype"), [("F32", "float32"), ("F16", "float16"), ("BF16", "bfloat16")]
)
def test_plain_types_are_kept(kind, dtype):
    config, tensors = read_gguf(model("llama", kind)[0])
    assert config["dtype"] == dtype
    assert tensors["lm_head.weight"].dtype == kind


@pytest.mark.parametrize("tensor", [1, 4])
def test_parameters_on_a_mesh(tmp_path, tensor):
    """The same as from a folder with the decoded values; 4 devices copy KV heads."""
    path, expected = model("llama", "Q4_0")
    save_file(expected, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["llama"]))
    trees = []
    for place in (path, tmp_path):
        files = resolve_model(str(place))
        mesh = make_mesh(tensor=tensor, devices=jax.devices()[:tensor])
        specs = build_model(files.config, ModelOptions(mesh=mesh)).specs()
        trees.append(load_weights(files, specs, tree_shardings(specs, mesh), "float32"))
    for a, b in zip(*map(jax.tree.leaves, trees), strict=True):
        assert a.sharding == b.sharding
        assert np.array_equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Q8_0", "Q6_K"])
@pytest.mark.parametrize("family", CONFIGS)
def test_scores_are_those_of_transformers(family, kind):
    """The same values in torch, in Hugging Face's order of rows."""
    from tests.parity.test_models import network

    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    path, expected = model(family, kind)
    shape = {key: CONFIGS[family][key] for key in SIZES}
    tied = CONFIGS[family]["tie_word_embeddings"]
    make = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    }[family]
    oracle = make[1](make[0](**shape, rms_norm_eps=1e-5, tie_word_embeddings=tied))
    state = {name: torch.tensor(array) for name, array in expected.items()}
    left = oracle.load_state_dict(state, strict=False)
    assert set(left.missing_keys) <= {"lm_head.weight"}
    assert not left.unexpected_keys
    oracle.tie_weights()
    tokens = np.random.default_rng(0).integers(0, 320, 40).tolist()
    with torch.no_grad():
        scores = oracle.eval()(torch.tensor([tokens])).logits[0].numpy()
    found = network(path).logits(tokens, [23, 17])[:, :320]
    assert scores.std() > 0.1
    np.testing.assert_allclose(found, scores, rtol=0, atol=1e-4)


def test_rope_factors_are_a_setting(tmp_path):
    """What Llama 3.1's converter writes: a divisor per pair of features."""
    factors = np.linspace(1, 8, 16, dtype=np.float32)
    path = tmp_path / "m.gguf"
    write(path, CONFIGS["llama"], extra={"rope_freqs.weight": factors})
    config, tensors = read_gguf(path)
    assert "rope_freqs.weight" not in tensors
    decoder = build_model(config, ModelOptions())
    from jllm.layers.rope import rope_frequencies

    found, scale = rope_frequencies(decoder.config.layers[0].rope, 256)
    expected = 10000.0 ** -(np.arange(0, 32, 2) / 32) / factors
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert scale == 1.0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"leave_out": ("context_length",)}, CheckpointError, "llama.context_length"),
        (
            {"settings": {"rope.dimension_count": 16}},
            UnsupportedModelError,
            "rope.dimension_count must be the head width 32",
        ),
        (
            {"settings": {"rope.scaling.type": "longrope"}},
            UnsupportedModelError,
            "rope.scaling.type='longrope' is not supported",
        ),
        (
            {"extra": {"blk.0.ssm_a.weight": np.zeros((2, 2), np.float32)}},
            CheckpointError,
            "'blk.0.ssm_a.weight' belongs to no parameter",
        ),
        (
            {"extra": {"blk.0.attn_q.scale": np.zeros((2, 2), np.int8)}},
            CheckpointError,
            "has type I8, only F32",
        ),
    ],
)
def test_what_is_not_supported_is_named(tmp_path, change, error, message):
    path = tmp_path / "m.gguf"
    write(path, CONFIGS["llama"], **change)
    with pytest.raises(error, match=message) as raised:
        read_gguf(path)
    assert str(path) in str(raised.value)


def test_another_architecture(tmp_path):
    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UnsupportedModelError, match="architecture='mamba'"):
        read_gguf(tmp_path / "m.gguf")


@pytest.mark.parametrize("share", [0, 0.001, 0.01, 0.3, 0.9, 0.9999])
def test_a_truncated_file_is_named(tmp_path, share):
    content = model("llama", "Q4_0")[0].read_bytes()
    path = tmp_path / "short.gguf"
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match=r"short\.gguf: ") as error:
        resolve_model(str(path))
    assert "\n" not in str(error.value)


def test_damaged_headers_are_refused_or_read(tmp_path):
    """No other error than ours, whatever byte is wrong."""
    content = bytearray(model("llama", "Q4_0")[0].read_bytes())
    rng = np.random.default_rng(0)
    path, refused = tmp_path / "m.gguf", []
    for place in rng.integers(0, 2500, 60):
        damaged = bytearray(content)
        damaged[place] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged)
        try:
            read_gguf(path)
        except (CheckpointError, UnsupportedModelError) as error:
            refused.append(str(error))
    assert len(refused) > 10
    assert all("\n" not in message for message in refused)


def test_a_file_of_another_kind(tmp_path):
    path = tmp_path / "m.bin"
    path.write_bytes(b"GGUF")
    with pytest.raises(ModelNotFoundError, match="is a file, but no"):
        resolve_model(str(path))
    with pytest.raises(ModelNotFoundError, match="neither a folder nor"):
        resolve_model(str(tmp_path / "none.gguf" / "x" / "y"))


@pytest.mark.slow
def test_a_real_model_with_its_vocabulary(tmp_path):
    """Text in, text out, from one file; the same as from the folder."""
    config = json.loads((DEFAULT_MODEL / "config.json").read_text())
    path = tmp_path / "stories.gguf"
    theta = config["rope_theta"]
    settings = {"theta": theta, "epsilon": config["rms_norm_eps"]}
    write(path, config, "F32", settings=settings, model=DEFAULT_MODEL)
    params = SamplingParams(temperature=0, max_tokens=12)
    found = []
    for place in (path, DEFAULT_MODEL):
        with LLM(place, **SMALL) as llm:
            (output,) = llm.generate("Once upon a time", params, use_tqdm=False)
            found.append((output.prompt_token_ids, output.outputs[0].text))
            story = [{"role": "user", "content": "Tell me a story about Zoë."}]
            found.append(llm.chat_prompt(story))
    assert found[:2] == found[2:]
    assert len(found[0][1]) > 10


@pytest.mark.slow
def test_a_model_without_a_vocabulary(tmp_path):
    """Token ids do; text needs a tokenizer, which is said in one line."""
    path, _ = model("llama", "Q4_0")
    params = SamplingParams(temperature=0, max_tokens=4)
    prompt = {"prompt_token_ids": [3, 4, 5]}
    with LLM(path, skip_tokenizer_init=True, **SMALL) as llm:
        (output,) = llm.generate(prompt, params, use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 4
    with pytest.raises(CheckpointError, match=r"model\.gguf: has no vocabulary"):
        load_tokenizer(path)


def test_random_weights_from_the_settings_alone():
    from jllm.weights.random import random_weights

    files = resolve_model(str(model("llama", "Q8_0")[0]), with_weights=False)
    specs = build_model(files.config, ModelOptions()).specs()
    mesh = make_mesh(devices=jax.devices()[:1])
    weights = random_weights(specs, tree_shardings(specs, mesh), jnp.float32, 0)
    assert weights["embed"].shape == (512, 256)
