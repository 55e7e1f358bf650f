"""Captured activations against hooks on the modules of transformers; gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jllm
from tests.parity.hooks import hooked
from tests.parity.oracle import TOLERANCE, checkpoint, random_prompt

torch = pytest.importorskip("torch")

LENGTH = 21
MODELS = {
    "llama": {"family": "llama"},
    "qwen3": {"family": "qwen3"},
    "gemma2": {
        "family": "gemma2",
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 1.5,
        "sliding_window": 6,
        "tie_word_embeddings": True,
    },
    "gpt_neox": {
        "family": "gpt_neox",
        "num_key_value_heads": None,
        "head_dim": None,
    },
}


def forward_of(model):
    """One program per batch shape and capture, rather than one per operation."""
    return jax.jit(model.forward, static_argnames="capture")


@pytest.mark.parametrize("name", MODELS)
def test_captured_activations_are_those_of_transformers(name):
    saved = checkpoint(**MODELS[name])
    tokens = random_prompt(LENGTH)
    expected = hooked(saved.model, tokens)
    model, weights = jllm.load(str(saved.folder))
    batch = jllm.Batch.from_prompts([random_prompt(5, seed=1), tokens])
    kv = model.init_kv(batch.block_tables.size, 16)
    names = ("layers.*", "final")
    _, _, seen = forward_of(model)(weights, kv, batch, capture=names)
    for activation, values in expected.items():
        got = np.asarray(seen[activation])[5:]
        if activation.endswith("probs"):
            got = got[:, :, :LENGTH]
        np.testing.assert_allclose(got, values, atol=TOLERANCE, err_msg=activation)


def test_activations_of_a_cached_prefix_and_of_chunks_are_those_of_the_whole():
    saved = checkpoint(**MODELS["gemma2"])
    tokens = random_prompt(LENGTH)
    model, weights = jllm.load(str(saved.folder))
    kv = model.init_kv(2, 16)
    forward = forward_of(model)
    whole = jllm.Batch.from_prompts([tokens])
    _, _, expected = forward(weights, kv, whole, capture=("*",))
    done = 0
    for count in (9, 11, 1):
        batch = jllm.Batch.from_prompts(
            [tokens[done : done + count]], num_cached=[done], max_len=32
        )
        _, kv, seen = forward(weights, kv, batch, capture=("*",))
        for name, values in seen.items():
            np.testing.assert_allclose(
                values, expected[name][done : done + count], atol=1e-5, err_msg=name
            )
        done += count


def loss(weights, model, tokens, edit=None):
    """Mean negative log-probability of each next token."""
    batch = jllm.Batch.from_prompts([tokens])
    kv = model.init_kv(batch.block_tables.size, 16)
    hidden, _ = model.forward(weights, kv, batch, edit=edit)
    logits = model.logits(weights, hidden[:-1])[:, : model.vocab_size]
    scores = jax.nn.log_softmax(logits, axis=-1)
    targets = jnp.asarray(tokens[1:])[:, None]
    return -jnp.mean(jnp.take_along_axis(scores, targets, axis=1))


def test_gradients_of_weights_are_those_of_torch():
    saved = checkpoint("llama")
    tokens = random_prompt(LENGTH)
    saved.model.zero_grad()
    ids = torch.tensor([tokens])
    saved.model(ids, labels=ids).loss.backward()
    model, weights = jllm.load(str(saved.folder))
    gradients = jax.jit(jax.grad(lambda tree: loss(tree, model, tokens)))(weights)
    own = dict(saved.model.named_parameters())
    vocab = model.vocab_size
    for got, name in [
        (gradients["embed"][:vocab], "model.embed_tokens.weight"),
        (gradients["head"][:vocab], "lm_head.weight"),
        (gradients["layers"][0]["out"], "model.layers.0.self_attn.o_proj.weight"),
        (gradients["layers"][1]["down"], "model.layers.1.mlp.down_proj.weight"),
        (gradients["norms"][2], "model.layers.1.input_layernorm.weight"),
    ]:
        np.testing.assert_allclose(got, own[name].grad, atol=TOLERANCE, err_msg=name)
    saved.model.zero_grad()


@pytest.mark.parametrize("name", ["embed", "layers.0.resid_mid", "layers.1.attn.probs"])
def test_gradients_of_activations_are_finite_differences(name):
    model, weights = jllm.load(str(checkpoint("llama").folder))
    tokens = random_prompt(LENGTH)
    batch = jllm.Batch.from_prompts([tokens])
    kv = model.init_kv(batch.block_tables.size, 16)
    run = jax.eval_shape(forward_of(model), weights, kv, batch, capture=(name,))
    shape = run[2][name].shape

    def shifted(delta):
        return loss(weights, model, tokens, edit={name: lambda x: x + delta})

    direction = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    direction = jnp.asarray(direction / np.linalg.norm(direction))
    along = jax.jit(lambda step: shifted(step * direction))
    slope = jnp.sum(jax.jit(jax.grad(shifted))(jnp.zeros(shape)) * direction)
    width = 0.02
    difference = (along(width) - along(-width)) / (2 * width)
    assert abs(slope) > 1e-4
    np.testing.assert_allclose(slope, difference, rtol=0.02, atol=2e-4)
