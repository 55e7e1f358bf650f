"""Scores of the plain forward against transformers, for every shape and kind."""

import dataclasses
import functools
import json
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jllm.layers.batch import Batch
from jllm.models.base import ModelOptions
from jllm.models.registry import build_model
from jllm.weights.hub import resolve_model
from jllm.weights.loader import lay_out, load_weights
from jllm.weights.random import random_weights
from jllm.weights.tensors import find_tensors
from shardings.mesh import make_mesh
from shardings.place import tree_shardings
from tests.parity.oracle import (
    FAMILIES,
    TOLERANCE,
    VOCAB,
    WHOLE,
    checkpoint,
    load,
    random_prompt,
)

LENGTH = 40
PIECES = {"whole": [40], "chunked": [23, 17], "decode": [30] + [1] * 10}
BLOCK_SIZE = 8
HEADS = [
    # family, head width, query heads, KV heads
    ("llama", 64, 4, 4),
    ("llama", 80, 6, 2),
    ("llama", 96, 6, 1),
    ("llama", 128, 8, 2),
    ("llama", 256, 2, 1),
    ("qwen3", 64, 8, 1),
    ("qwen3", 80, 3, 3),
    ("qwen3", 96, 6, 3),
    ("qwen3", 128, 4, 1),
    ("qwen3", 256, 2, 2),
]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
SHAPES = {
    "llama": {"family": "llama"},
    "llama-tied": {"family": "llama", "tie_word_embeddings": True},
    "llama-attention-bias": {"family": "llama", "attention_bias": True},
    "llama-mlp-bias": {"family": "llama", "mlp_bias": True},
    "llama-biases": {"family": "llama", "attention_bias": True, "mlp_bias": True},
    "llama-sharded": {"family": "llama", "shard_size": "100KB"},
    "qwen3": {"family": "qwen3"},
    "qwen3-tied": {"family": "qwen3", "tie_word_embeddings": True},
    "qwen3-yarn": {"family": "qwen3", "rope_parameters": {"rope_theta": 500.0, **YARN}},
    "qwen3-bias": {"family": "qwen3", "attention_bias": True},
    "qwen3-sharded": {"family": "qwen3", "shard_size": "100KB"},
} | {
    f"{family}-{width}-{heads}-{kv_heads}": {
        "family": family,
        "head_dim": width,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "num_hidden_layers": 1,
    }
    for family, width, heads, kv_heads in HEADS
}
LONG_FACTORS = {
    "rope_type": "longrope",
    "short_factor": [1.2 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + 0.5 * i for i in range(8)],
}
ROPE = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.5},
    # A context longer than the one trained: LENGTH tokens.
    "dynamic": {"rope_type": "dynamic", "factor": 3.0, "max_position_embeddings": 24},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": YARN,
    "yarn-mscale": {**YARN, "mscale": 1.2, "mscale_all_dim": 0.8},
    "longrope-short": {**LONG_FACTORS, "original_max_position_embeddings": 64},
    "longrope-long": {**LONG_FACTORS, "original_max_position_embeddings": 24},
}


@dataclasses.dataclass
class Network:
    """The model of a checkpoint and its weights."""

    model: object
    weights: object

    @functools.cached_property
    def step(self):
        def compute(weights, kv, batch):
            hidden, kv = self.model.forward(weights, kv, batch)
            return self.model.logits(weights, hidden), kv

        return jax.jit(compute)

    def logits(self, tokens, pieces):
        """Scores after each token, computed piece after piece over the cache."""
        assert sum(pieces) == len(tokens) == LENGTH
        kv = self.model.init_kv(LENGTH // BLOCK_SIZE + 2, BLOCK_SIZE)
        # Where a step leaves it, or the second step would be compiled again.
        if self.model.options.mesh is None:
            kv = jax.device_put(kv, jax.tree.leaves(self.weights)[0].sharding)
        rows, start = [], 0
        for count in pieces:
            batch = one_row(tokens, start, count)
            logits, kv = self.step(self.weights, kv, batch)
            rows.append(np.asarray(logits, np.float32)[:count])
            start += count
        return np.concatenate(rows)


def one_row(tokens, start, count):
    """Tokens `start : start + count` of a sequence whose blocks lie backwards.

    Decode steps have one token; prefill chunks are padded to LENGTH.
    """
    table = np.arange(LENGTH // BLOCK_SIZE)[::-1] + 1
    size = 1 if count == 1 else LENGTH
    positions = np.arange(start, start + count)
    slots = table[positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
    outside = (len(table) + 2) * BLOCK_SIZE + np.arange(size - count)

    def padded(values):
        return jnp.asarray(np.pad(values, (0, size - count)), jnp.int32)

    return Batch(
        tokens=padded(tokens[start : start + count]),
        positions=padded(positions),
        slots=jnp.asarray(np.concatenate([slots, outside]), jnp.int32),
        block_tables=jnp.asarray(table, jnp.int32)[None],
        row_starts=jnp.array([0, count], jnp.int32),
        lengths=jnp.array([start + count], jnp.int32),
        is_decode=count == 1,
    )


@functools.cache
def network(folder, dtype="float32", max_model_len=LENGTH, tensor_size=1):
    """The network of a checkpoint, on so many devices."""
    files = resolve_model(str(folder))
    mesh = make_mesh(tensor=tensor_size, devices=jax.devices()[:tensor_size])
    options = ModelOptions(
        dtype=dtype,
        max_model_len=max_model_len,
        mesh=None if tensor_size == 1 else mesh,
    )
    model = build_model(files.config, options)
    specs = model.specs()
    places = tree_shardings(specs, mesh)
    weights = load_weights(files, specs, places, dtype, progress=False)
    return Network(model, weights)


def vocabulary(logits):
    """The scores without padding, which must be impossible to draw."""
    assert logits.shape[1] == 512
    assert np.all(np.isneginf(logits[:, VOCAB:]))
    return logits[:, :VOCAB]


@pytest.mark.parametrize("pieces", PIECES)
@pytest.mark.parametrize("shape", SHAPES)
def test_logits(shape, pieces):
    saved = checkpoint(**SHAPES[shape])
    tokens = random_prompt(LENGTH)
    expected = saved.logits(tokens)
    assert expected.std() > 0.3  # or the tolerance would mean nothing
    logits = network(saved.folder).logits(tokens, PIECES[pieces])
    np.testing.assert_allclose(vocabulary(logits), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("family", WHOLE)
def test_a_sharded_checkpoint_is_sharded(family):
    folder = checkpoint(**SHAPES[f"{family}-sharded"]).folder
    assert (folder / "model.safetensors.index.json").exists()
    assert len(list(folder.glob("*.safetensors"))) > 5


def with_rope(kind):
    values = dict(ROPE[kind])
    sizes = {"max_position_embeddings": values.pop("max_position_embeddings", 256)}
    # A small base, so that all pairs of features turn within the prompt.
    return checkpoint("llama", rope_parameters={"rope_theta": 500.0, **values}, **sizes)


@pytest.mark.parametrize("pieces", PIECES)
@pytest.mark.parametrize("kind", ROPE)
def test_logits_with_rope(kind, pieces):
    """Kinds that depend on the length agree where the prompt fills the context."""
    saved = with_rope(kind)
    tokens = random_prompt(LENGTH)
    expected = saved.logits(tokens)
    if kind != "default":
        plain = with_rope("default").logits(tokens)
        assert np.abs(plain - expected).max() > 0.1  # or the kind would not show
    logits = network(saved.folder).logits(tokens, PIECES[pieces])
    np.testing.assert_allclose(vocabulary(logits), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("pieces", PIECES)
@pytest.mark.parametrize(("dtype", "atol"), [("bfloat16", 0.15), ("float16", 0.02)])
@pytest.mark.parametrize("family", WHOLE)
def test_logits_in_16_bits_are_near(family, dtype, atol, pieces):
    saved = checkpoint(family, dtype=dtype)
    tokens = random_prompt(LENGTH)
    logits = network(saved.folder, dtype).logits(tokens, PIECES[pieces])
    expected = saved.logits(tokens)
    np.testing.assert_allclose(vocabulary(logits), expected, rtol=0, atol=atol)
    # The same rounded weights, computed in float32.
    exact = network(saved.folder).logits(tokens, PIECES[pieces])
    np.testing.assert_allclose(vocabulary(exact), expected, rtol=0, atol=TOLERANCE)


def split(name, spec, array, tensors):
    """Undoes the fusing of a parameter: its checkpoint tensors by name."""
    parts = {}
    for section in lay_out(name, spec, tensors):
        stop = section.start + section.length(spec.concat_axis)
        values = np.take(array, range(section.start, stop), spec.concat_axis)
        stored = parts.setdefault(
            section.tensor.name, np.zeros(section.tensor.shape, array.dtype)
        )
        share = section.view(stored)
        share[...] = values.reshape(share.shape)
    return parts


@pytest.mark.parametrize("shape", ["llama-biases", "llama-tied", "qwen3", "qwen3-tied"])
def test_transformers_loads_what_the_parameters_declare(shape):
    """Parameters made by jllm, taken apart again, are a complete checkpoint."""
    saved = checkpoint(**SHAPES[shape])
    model = network(saved.folder).model
    specs = model.specs()
    places = tree_shardings(specs, make_mesh(devices=jax.devices()[:1]))
    weights = random_weights(specs, places, "float32", 3)
    weights["embed"] = weights["embed"].at[model.vocab_size :].set(0)
    stored = find_tensors(saved.folder)
    tensors = {}
    leaves = jax.tree.leaves(specs), jax.tree.leaves(weights)
    for i, (spec, array) in enumerate(zip(*leaves, strict=True)):
        tensors |= split(str(i), spec, np.asarray(array), stored)
    theirs = load_file(saved.folder / "model.safetensors")
    assert {name: values.shape for name, values in tensors.items()} == {
        name: values.shape for name, values in theirs.items()
    }

    folder = pathlib.Path(tempfile.mkdtemp(prefix="jllm-parity-"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((saved.folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config))
    family = SHAPES[shape]["family"]
    tokens = random_prompt(LENGTH)
    expected = load(folder, FAMILIES[family][1]).logits(tokens)
    logits = Network(model, weights).logits(tokens, [LENGTH])
    np.testing.assert_allclose(vocabulary(logits), expected, rtol=0, atol=TOLERANCE)
