"""Bytes and operations of known models, and shares of known limits."""

import pytest

from jllm.bench.limits import MachineLimits, ModelCost, RunCost, measure_limits
from jllm.bench.statistics import RequestTiming

QWEN3_06B = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
}
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
TINY = ModelCost(
    layer_weights=100, head_weights=10, attention_width=4, kv_elements=6, item_bytes=2
)
LIMITS = MachineLimits("test", 1000.0, {"float32": 500.0, "bfloat16": 2000.0})


def timing(prompt, output, cached=0):
    return RequestTiming(prompt, output, 0.0, 0.0, 1.0, 2.0, num_cached_tokens=cached)


def test_published_sizes():
    """Known figures: 1.19 GB and 112 KiB per token, 15.01 GB and 128 KiB."""
    small = ModelCost.from_config(QWEN3_06B, "bfloat16")
    assert small.weight_bytes == pytest.approx(1.19e9, rel=0.01)
    assert small.kv_bytes == 112 * 1024
    large = ModelCost.from_config(LLAMA_8B, "bfloat16")
    assert large.weight_bytes == pytest.approx(15.01e9, rel=0.001)
    assert large.kv_bytes == 128 * 1024
    assert large.prefill_flops(2048) == pytest.approx(29.69e12, rel=0.001)
    assert large.decode_bytes(8, 8192) == pytest.approx(23.6e9, rel=0.001)


def test_float32_is_twice_as_much():
    half = ModelCost.from_config(LLAMA_8B, "bfloat16")
    whole = ModelCost.from_config(LLAMA_8B, "float32")
    assert whole.weight_bytes == 2 * half.weight_bytes
    assert whole.kv_bytes == 2 * half.kv_bytes


def test_shapes_that_are_not_counted():
    experts = {**LLAMA_8B, "architectures": ["MixtralForCausalLM"], "num_experts": 8}
    assert ModelCost.from_config(experts, "float32") is None


def test_another_family_is_counted_by_its_own_weights():
    """GPT-2: 12 layers of 12 E ** 2 and their biases, no gate; 2 E cached numbers."""
    gpt2 = {
        "architectures": ["GPT2LMHeadModel"],
        "n_embd": 768,
        "n_head": 12,
        "n_layer": 12,
        "n_positions": 1024,
        "vocab_size": 50257,
    }
    cost = ModelCost.from_config(gpt2, "float32")
    assert cost.layer_weights == 12 * (12 * 768**2 + 9 * 768)
    assert cost.head_weights == 50257 * 768
    assert cost.kv_bytes == 4 * 12 * 2 * 768


def test_run():
    """A prompt of 3 and 2 outputs: 4 tokens fed, one step reads a context of 4."""
    run = RunCost.of(TINY, [timing(3, 2)])
    assert run.linear_flops == 2 * 4 * 100 + 2 * 2 * 10
    assert run.attention_flops == 2 * 4 * 16
    assert run.cache_bytes == 4 * 12
    assert run.weight_bytes == 220


def test_a_run_equals_its_steps():
    """One row: the prefill and the steps of decode, added up."""
    run = RunCost.of(TINY, [timing(8, 4)])
    steps = [
        TINY.decode_bytes(1, context) - TINY.weight_bytes for context in (8, 9, 10)
    ]
    assert run.cache_bytes == sum(steps)


def test_cached_tokens_cost_nothing():
    run = RunCost.of(TINY, [timing(10, 1, cached=6)])
    assert run.linear_flops == 2 * 4 * 100 + 2 * 10
    assert run.attention_flops == 2 * 4 * (100 - 36)


def test_serial_limit():
    """Weights or products, whichever takes longer, then the cache, then attention."""
    run = RunCost(
        linear_flops=100.0,
        attention_flops=50.0,
        cache_bytes=20.0,
        weight_bytes=220,
        num_output_tokens=5,
    )
    by_bandwidth = 3 * 220 / 1000
    assert run.serial_seconds(LIMITS, "float32", 2) == pytest.approx(
        by_bandwidth + 20 / 1000 + 50 / 500
    )
    by_rate = 100 / 500
    assert run.serial_seconds(LIMITS, "float32", 100) == pytest.approx(
        max(by_rate, 220 / 1000) + 20 / 1000 + 50 / 500
    )
    shares = run.shares(LIMITS, "bfloat16", seconds=2.0, steps=5)
    assert shares["mbu"] == pytest.approx((5 * 220 + 20) / 2 / 1000)
    assert shares["mfu"] == pytest.approx(150 / 2 / 2000)


def test_several_devices():
    assert LIMITS.times(4).bandwidth == 4000
    assert LIMITS.times(4).matrix_rate("float16") == 8000


def test_measuring(monkeypatch):
    """A processor reads more than 0.1 GB/s and computes more than 0.1 GFLOP/s."""
    monkeypatch.setattr("jllm.bench.limits.READ_BYTES", {"cpu": 2**22})
    monkeypatch.setattr("jllm.bench.limits.MATRIX_SIZE", {"cpu": 64})
    measure_limits.cache_clear()
    limits = measure_limits()
    measure_limits.cache_clear()
    assert 1e8 < limits.bandwidth < 1e13
    assert all(1e8 < rate < 1e15 for rate in limits.matrix_rates.values())
    assert set(limits.as_dict()["gflop_s"]) == {"float32", "bfloat16"}
