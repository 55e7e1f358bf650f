"""Rotation and frequencies against float64 NumPy and closed forms."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jllm.errors import UnsupportedModelError
from jllm.layers.rope import RopeConfig, rope_frequencies, rotation_of
from pallas_kernels.kv_write.heads import rotate

BASE = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "rope_theta": 10000.0,
}
PLAIN = 10000.0 ** -(np.arange(0, 16, 2) / 16)


def frequencies(scaling, max_model_len=128, **more):
    config = {**BASE, **more, "rope_scaling": scaling}
    return rope_frequencies(RopeConfig.from_hf(config), max_model_len)


def rotate_complex(x, positions, inv_freq, scaling):
    """The rotation as a product of complex numbers, in float64."""
    half = len(inv_freq)
    pairs = x[..., :half] + 1j * x[..., half : 2 * half]
    angles = positions[:, None] * np.asarray(inv_freq, np.float64)
    pairs = pairs * (scaling * np.exp(1j * angles))[:, None, :]
    return np.concatenate([pairs.real, pairs.imag, x[..., 2 * half :]], axis=-1)


@pytest.mark.parametrize("half", [8, 4, 2])
@pytest.mark.parametrize("scaling", [1.0, 1.3])
def test_rotates_pairs_and_leaves_the_rest(rng, half, scaling):
    x = rng.standard_normal((5, 3, 16)).astype(np.float32)
    positions = np.array([0, 1, 7, 100, 5], np.int32)
    inv_freq = PLAIN[:half].astype(np.float32)
    out = rotate(jnp.asarray(x), rotation_of(jnp.asarray(positions), inv_freq, scaling))
    expected = rotate_complex(x.astype(np.float64), positions, inv_freq, scaling)
    np.testing.assert_allclose(out, expected, atol=2e-5)
    assert np.array_equal(out[..., 2 * half :], x[..., 2 * half :])


def test_keeps_the_type_and_computes_in_float32(rng):
    x = jnp.asarray(rng.standard_normal((4, 2, 16)), jnp.bfloat16)
    positions = jnp.asarray([3, 99, 1000, 4000])
    inv_freq = PLAIN.astype(np.float32)
    out = rotate(x, rotation_of(positions, inv_freq, 1.0))
    wide = rotate_complex(
        np.asarray(x, np.float64), np.asarray(positions), inv_freq, 1.0
    )
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float64), wide, rtol=2**-8, atol=2e-3)


def test_scores_depend_on_distance_only(rng):
    q, k = rng.standard_normal((2, 1, 1, 16)).astype(np.float32)
    inv_freq = PLAIN.astype(np.float32)

    def score(query_position, key_position):
        turned = [
            rotate(jnp.asarray(x), rotation_of(jnp.asarray([at]), inv_freq, 1.0))
            for x, at in ((q, query_position), (k, key_position))
        ]
        return float(jnp.vdot(*turned))

    assert score(30, 10) == pytest.approx(score(120, 100), abs=1e-4)
    assert score(30, 10) != pytest.approx(score(30, 11), abs=1e-4)


def test_default():
    for scaling in (None, {}, {"type": "default"}, {"rope_type": "default"}):
        inv_freq, factor = frequencies(scaling)
        assert inv_freq.dtype == np.float32
        assert factor == 1.0
        np.testing.assert_allclose(inv_freq, PLAIN, rtol=1e-7)


def test_linear():
    inv_freq, _ = frequencies({"type": "linear", "factor": 4.0})
    np.testing.assert_allclose(inv_freq, PLAIN / 4, rtol=1e-7)


@pytest.mark.parametrize("max_model_len", [16, 128, 256, 1024])
def test_dynamic_is_fixed_by_the_longest_context(max_model_len):
    inv_freq, _ = frequencies({"type": "dynamic", "factor": 2.0}, max_model_len)
    ratio = max(max_model_len, 128) / 128
    theta = 10000.0 * (2 * ratio - 1) ** (16 / 14)
    np.testing.assert_allclose(
        inv_freq, theta ** -(np.arange(0, 16, 2) / 16), rtol=1e-6
    )


def test_llama3_ramp():
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    inv_freq, _ = frequencies(scaling)
    turns = 64 * PLAIN / (2 * math.pi)
    assert any(turns > 4)
    assert any(turns < 1)
    assert any((turns > 1) & (turns < 4))
    ramp = (turns - 1) / 3
    expected = np.select(
        [turns > 4, turns < 1],
        [PLAIN, PLAIN / 8],
        (1 - ramp) * PLAIN / 8 + ramp * PLAIN,
    )
    np.testing.assert_allclose(inv_freq, expected, rtol=1e-6)
    step, _ = frequencies({**scaling, "high_freq_factor": 1.0})
    np.testing.assert_allclose(step, np.where(turns > 1, PLAIN, PLAIN / 8), rtol=1e-6)


def test_yarn_keeps_fast_pairs_and_stretches_slow_ones():
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    inv_freq, factor = frequencies(scaling)
    assert factor == pytest.approx(0.1 * math.log(4) + 1)
    assert inv_freq[0] == pytest.approx(PLAIN[0])
    assert inv_freq[-1] == pytest.approx(PLAIN[-1] / 4)
    assert np.all(inv_freq <= PLAIN * (1 + 1e-6))
    assert np.all(inv_freq >= PLAIN / 4 * (1 - 1e-6))
    assert frequencies({**scaling, "attention_factor": 1.5})[1] == 1.5
    same = {"mscale": 0.7, "mscale_all_dim": 0.7}
    assert frequencies({**scaling, **same})[1] == 1.0


@pytest.mark.parametrize(("max_model_len", "divisor"), [(64, 1.5), (65, 6.0)])
def test_longrope_chooses_by_the_longest_context(max_model_len, divisor):
    scaling = {"type": "longrope", "short_factor": [1.5] * 8, "long_factor": [6.0] * 8}
    inv_freq, factor = frequencies(
        scaling, max_model_len, original_max_position_embeddings=64
    )
    np.testing.assert_allclose(inv_freq, PLAIN / divisor, rtol=1e-6)
    assert factor == pytest.approx(math.sqrt(1 + math.log(2) / math.log(64)))


def test_new_format_equals_the_old_one():
    new = {key: value for key, value in BASE.items() if key != "rope_theta"}
    new["rope_parameters"] = {
        "rope_type": "linear",
        "factor": 2.0,
        "rope_theta": 500000.0,
        "partial_rotary_factor": 0.5,
    }
    old = {
        **BASE,
        "rope_theta": 500000.0,
        "partial_rotary_factor": 0.5,
        "rope_scaling": {"type": "linear", "factor": 2},
    }
    assert RopeConfig.from_hf(new) == RopeConfig.from_hf(old)
    assert RopeConfig.from_hf(new).rotary_dim == 8


def test_head_width_follows_from_the_model_width():
    config = {key: value for key, value in BASE.items() if key != "head_dim"}
    assert RopeConfig.from_hf(config).rotary_dim == 16
    assert RopeConfig.from_hf({**config, "rope_theta": None}).theta == 10000.0


@pytest.mark.parametrize(
    ("scaling", "named"),
    [
        ({"type": "ntk"}, "rope_type='ntk'"),
        ({"type": ["linear"]}, "rope_type"),
        ({"type": "linear"}, "factor is missing"),
        ({"type": "linear", "factor": 0}, "factor=0"),
        ({"type": "linear", "factor": math.nan}, "factor=nan"),
        ({"type": "linear", "factor": math.inf}, "factor=inf"),
        ({"type": "linear", "factor": True}, "factor=True"),
        ({"type": "linear", "factor": "2"}, "factor='2'"),
        ({"type": "dynamic"}, "factor is missing"),
        ({"type": "yarn"}, "factor is missing"),
        ({"type": "yarn", "factor": 2.0, "truncate": 1}, "truncate=1"),
        ({"type": "yarn", "factor": 2.0, "beta_fast": -1}, "beta_fast=-1"),
        ({"type": "llama3", "factor": 2.0, "low_freq_factor": 1.0}, "high_freq_factor"),
        (
            {
                "type": "llama3",
                "factor": 2,
                "low_freq_factor": 4,
                "high_freq_factor": 1,
            },
            "high_freq_factor=1.0 must not be below",
        ),
        ({"type": "longrope", "short_factor": [1.0] * 8}, "long_factor"),
        (
            {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0] * 7},
            "long_factor must be a list of 8 numbers, not list of 7",
        ),
        (
            {"type": "longrope", "short_factor": [0] * 8, "long_factor": [1] * 8},
            r"short_factor\[0\]=0",
        ),
        ({"full_attention": {"rope_type": "default"}}, "full_attention"),
        ("linear", "rope_scaling='linear'"),
        ({"rope_theta": 1.0}, "rope_theta=1.0"),
        ({"partial_rotary_factor": 0.1}, "1 rotated features"),
        ({"partial_rotary_factor": 2.0}, "32 rotated features"),
        (
            {"type": "yarn", "factor": 2, "original_max_position_embeddings": 1.5},
            "original_max_position_embeddings=1.5",
        ),
    ],
)
def test_bad_values_are_refused_by_name(scaling, named):
    with pytest.raises(UnsupportedModelError, match=named):
        RopeConfig.from_hf({**BASE, "rope_scaling": scaling})


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_a_position_below_zero_is_rotated_backwards():
    """The CPU's two branches are the same function."""
    inv_freq = np.array([1.0, 0.1], np.float32)
    positions = jnp.array([-3, 5], jnp.int32)
    cos, sin = jax.jit(lambda p: rotation_of(p, inv_freq, 2.0))(positions)
    angles = np.array([-3.0, 5.0])[:, None] * inv_freq
    np.testing.assert_allclose(cos, 2 * np.cos(angles), atol=1e-5)
    np.testing.assert_allclose(sin, 2 * np.sin(angles), atol=1e-5)


def test_a_cpu_computes_sines_once_for_all_that_use_them():
    if jax.default_backend() != "cpu":
        pytest.skip("about XLA's CPU backend")

    def multiply(positions, heads):
        cos, _ = rotation_of(positions, np.ones(8, np.float32), 1.0)
        for _ in range(3):
            product = heads @ jnp.ones((8, 8))
            heads = product * jnp.broadcast_to(cos, heads.shape)
        return heads

    arguments = (jnp.zeros(4, jnp.int32), jnp.ones((4, 8)))
    text = jax.jit(multiply).lower(*arguments).compile().as_text()
    assert text.count(" cosine(") <= 2  # one in each branch
