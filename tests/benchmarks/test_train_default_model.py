"""The training script: its text, its batches, and the way back to a checkpoint."""

import itertools

import jax
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from benchmarks import train_default_model as script
from jllm.models.base import ModelOptions
from jllm.models.registry import build_model
from jllm.weights.hub import resolve_model
from jllm.weights.loader import load_weights
from jllm.weights.random import random_weights

TINY = {
    **script.CONFIG,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "head_dim": 8,
}
SHAPE = script.Shape(length=16, rows=4, tokens=48)


@pytest.fixture(scope="module")
def tokenizer():
    return script.train_tokenizer(40)


@pytest.fixture(scope="module")
def network():
    """A tiny model, its weights and their shardings."""
    options = ModelOptions(max_model_len=script.CONTEXT, attention="reference")
    model = build_model(TINY, options)
    device = SingleDeviceSharding(jax.devices()[0])
    shardings = jax.tree.map(lambda _: device, model.specs())
    weights = random_weights(model.specs(), shardings, "float32", 0)
    # Norms that differ from one another, so that an exchange is seen.
    weights["norms"] = weights["norms"] + np.arange(5, dtype=np.float32)[:, None]
    weights["qk_norms"] = weights["qk_norms"] * np.arange(4, dtype=np.float32)[:, None]
    return model, weights, shardings


def document(first, size, num_request):
    """Tokens that count up from `first`; the last ones are to be learned."""
    tokens = list(range(first, first + size))
    learned = [False] * num_request + [True] * (size - num_request)
    return script.Document(tokens, learned)


def test_documents_are_laid_out_as_the_chat_template_does(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    script.write_tokenizer(tokenizer, tmp_path)
    script.write_json(tmp_path / "config.json", script.CONFIG)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    turns = [("Tell me a story.", "Once upon a time."), ("Thank you!", "You are kind.")]
    messages = [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    text = loaded.apply_chat_template(messages, tokenize=False)
    ids = loaded(text, add_special_tokens=False)["input_ids"]
    assert script.encode(tokenizer, turns).tokens == ids


def test_only_answers_are_learned(tokenizer):
    made = script.encode(tokenizer, [("Tell me a story.", "Once.")])
    learned = [
        t for t, known in zip(made.tokens, made.is_learned, strict=True) if known
    ]
    assert tokenizer.decode(learned, skip_special_tokens=False) == "Once.<|end|>"


def test_stories_alone_follow_the_first_token(tokenizer):
    made = script.encode(tokenizer, [("", "Once.")])
    assert made.tokens[0] == script.BOS_ID
    assert made.is_learned == [False] + [True] * (len(made.tokens) - 1)


def test_text_survives_the_tokenizer(tokenizer):
    text = 'Zoe said, "Oh no!"\nÄpfel 東京'
    ids = tokenizer.encode(text).ids
    assert ids[0] == script.BOS_ID
    assert tokenizer.decode(ids) == text


def test_packing_keeps_every_document_and_fits():
    sizes = [5, 200, 255, 300, 40, 512, 257, 900, 12] * 20
    made = [document(0, size + 1, 1) for size in sizes]
    packed = list(script.packed(iter(made)))
    kept = [d for _, group in packed for d in group]
    assert sorted(len(d.tokens) - 1 for d in kept) == sorted(
        size for size in sizes if size <= script.CONTEXT
    )
    for shape, group in packed:
        assert len(group) <= shape.rows
        assert sum(len(d.tokens) - 1 for d in group) <= shape.tokens
        assert max(len(d.tokens) - 1 for d in group) <= shape.length


def test_a_packed_loss_is_the_sum_of_the_documents_alone(network):
    model, weights, _ = network
    group = [document(10, 13, 1), document(40, 17, 5), document(90, 4, 1)]

    def loss(documents):
        return float(
            script.loss_sum(model, SHAPE, weights, *script.to_arrays(SHAPE, documents))
        )

    alone = [loss([d]) for d in group]
    assert min(alone) > 0
    np.testing.assert_allclose(loss(group), sum(alone), rtol=1e-5)


@pytest.mark.slow
def test_training_lowers_the_loss(network):
    model, weights, _ = network
    recipe = script.Recipe(steps=15, warmup_steps=2, matrix_rate=5e-2, adam_rate=2e-2)
    optimizer = script.make_optimizer(recipe, model.specs())
    train_step, _ = script.make_steps(model, optimizer)
    weights = jax.tree.map(lambda x: x.copy(), weights)
    state = optimizer.init(weights)
    batch = script.to_arrays(SHAPE, [document(10, 13, 1), document(40, 17, 5)])
    losses = []
    # Optax counts its steps in integers, and powers of decay rates promote.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for _ in range(15):
            weights, state, loss = train_step(SHAPE, weights, state, *batch)
            losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]


def test_the_checkpoint_loads_to_the_same_weights(network, tmp_path):
    model, weights, shardings = network
    tensors = script.checkpoint_tensors(model.specs(), weights, TINY)
    script.save_file(tensors, tmp_path / "model.safetensors")
    script.write_json(tmp_path / "config.json", TINY)
    files = resolve_model(str(tmp_path))
    loaded = load_weights(files, model.specs(), shardings, "float32", progress=False)
    jax.tree.map(np.testing.assert_array_equal, weights, loaded)


def test_at_first_attention_raises_the_score_of_what_it_sees(network):
    model, _, shardings = network
    weights = script.first_weights(model.specs(), shardings, 0, TINY)
    head_dim = TINY["head_dim"]
    for layer in weights["layers"]:
        assert not np.any(layer["down"])
        values = np.asarray(layer["qkv"])[:, -head_dim:].repeat(2, axis=0)
        outs = np.asarray(layer["out"]).T.reshape(values.shape)
        # From a token's embedding through value and output, back onto itself.
        scores = np.einsum("hde,hde->h", values, outs)
        np.testing.assert_allclose(scores, 0.25 * np.sum(values**2, (1, 2)), rtol=1e-5)


def test_training_documents_depend_on_the_seed_alone(tokenizer):
    def first(seed):
        made = script.documents(tokenizer, seed)
        return [d.tokens for d in itertools.islice(made, 5)]

    assert first("train 0") == first("train 0")
    assert first("train 0") != first("held out 0")
