"""Rotary embeddings against transformers."""

import jax.numpy as jnp
import numpy as np
import pytest

from jllm.layers.rope import RopeConfig, rope_frequencies, rotation_of
from pallas_kernels.kv_write.heads import rotate

torch = pytest.importorskip("torch")
modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
rope_utils = pytest.importorskip("transformers.modeling_rope_utils")
transformers = pytest.importorskip("transformers")

TRAINED_LEN = 256
LONG = {
    "short_factor": [1.0 + 0.05 * i for i in range(16)],
    "long_factor": [1.0 + 0.5 * i for i in range(16)],
    "original_max_position_embeddings": 64,
}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
KINDS = {
    "linear": {"type": "linear", "factor": 2.5},
    "dynamic": {"type": "dynamic", "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": YARN,
    "yarn-betas": {**YARN, "beta_fast": 20.0, "beta_slow": 2.0},
    "yarn-mscale": {**YARN, "mscale": 1.2, "mscale_all_dim": 0.8},
    "yarn-attention-factor": {**YARN, "attention_factor": 1.1},
    "yarn-not-truncated": {**YARN, "truncate": False},
    "longrope": {"type": "longrope", **LONG},
    "longrope-factor": {"type": "longrope", "factor": 2.0, **LONG},
    "longrope-attention-factor": {"type": "longrope", "attention_factor": 1.7, **LONG},
}


def configs(scaling, **more):
    """The same config as a dict and as transformers understands it."""
    config = {
        "hidden_size": 128,
        "num_attention_heads": 4,
        "head_dim": 32,
        "max_position_embeddings": TRAINED_LEN,
        "rope_theta": 50000.0,
        "rope_scaling": scaling,
        **more,
    }
    return config, transformers.LlamaConfig(**{**config, "rope_scaling": dict(scaling)})


@pytest.mark.parametrize("new_format", [False, True])
@pytest.mark.parametrize("max_model_len", [64, 256, 1000])
@pytest.mark.parametrize("kind", KINDS)
def test_frequencies(kind, max_model_len, new_format):
    config, theirs = configs(KINDS[kind])
    if new_format:
        config = theirs.to_dict()
        assert "rope_parameters" in config
        assert "rope_scaling" not in config
    init = rope_utils.ROPE_INIT_FUNCTIONS[theirs.rope_parameters["rope_type"]]
    expected, expected_scaling = init(theirs, "cpu", seq_len=max_model_len)
    inv_freq, scaling = rope_frequencies(RopeConfig.from_hf(config), max_model_len)
    np.testing.assert_allclose(inv_freq, expected.numpy(), rtol=1e-6)
    assert scaling == pytest.approx(expected_scaling, rel=1e-12)


def test_partial_rotation():
    config, theirs = configs(KINDS["linear"], partial_rotary_factor=0.5)
    expected, _ = rope_utils.ROPE_INIT_FUNCTIONS["linear"](theirs, "cpu")
    inv_freq, _ = rope_frequencies(RopeConfig.from_hf(config), 100)
    assert inv_freq.shape == (8,)
    np.testing.assert_allclose(inv_freq, expected.numpy(), rtol=1e-6)


@pytest.mark.parametrize("kind", ["default", *KINDS])
def test_rotation(kind):
    """The whole layer on a sequence that fills the longest context."""
    config, theirs = configs(KINDS.get(kind, {"rope_type": "default"}))
    length = 300
    layer = modeling.LlamaRotaryEmbedding(theirs)
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, length, 3, 32)).astype(np.float32)
    cos, sin = layer(torch.zeros(1), torch.arange(length)[None])
    expected = modeling.apply_rotary_pos_emb(
        *(torch.tensor(x)[None] for x in (q, k)), cos, sin, unsqueeze_dim=2
    )
    inv_freq, scaling = rope_frequencies(RopeConfig.from_hf(config), length)
    for x, wanted in zip((q, k), expected, strict=True):
        out = rotate(jnp.asarray(x), rotation_of(jnp.arange(length), inv_freq, scaling))
        np.testing.assert_allclose(out, wanted[0].numpy(), atol=1e-4)
