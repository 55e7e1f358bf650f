"""How many blocks fit: the formula, and what the engine makes of it."""

import logging

import pytest

from jllm.engine.memory import MemoryBudget, fresh_bytes
from jllm.errors import ConfigError
from tests.engines import LLAMA, make_engine

GIB = 2**30


def budget(**changes):
    values = {
        "capacity": 10 * GIB,
        "utilization": 0.9,
        "weights": 2 * GIB,
        "temporaries": GIB,
        "block": 2**20,
        "most_useful_blocks": 10**9,
    }
    return MemoryBudget(**values | changes)


def test_the_pool_takes_what_weights_and_temporaries_leave():
    assert budget().num_blocks == int((9 - 2 - 1) * GIB / 2**20)
    assert budget(utilization=0.5).num_blocks == 2 * 1024
    assert budget(temporaries=3 * GIB).num_blocks == 4 * 1024
    assert budget(most_useful_blocks=7).num_blocks == 7


def test_nothing_fits():
    small = budget(weights=9 * GIB)
    assert small.num_blocks == 0
    with pytest.raises(ConfigError, match=r"10\.00 GiB leaves 0 KV blocks"):
        small.require(1)


def test_the_engine_prints_gib_and_tokens_and_its_pool_is_that_large(caplog):
    with caplog.at_level(logging.INFO, "jllm"):
        engine = make_engine(num_blocks=None)
    blocks = engine._parts.options.num_blocks
    assert blocks == 65536 // 16
    assert engine.state.kv[0].shape[0] == blocks
    assert f"{blocks} blocks of 16 tokens, 65536 tokens" in caplog.text
    assert "GiB" in caplog.text
    engine.close()


@pytest.mark.slow
def test_every_program_stays_within_what_was_reserved():
    engine = make_engine({**LLAMA, "vocab_size": 8000})
    reserved = engine.programs.temporary_bytes()
    for key in engine.programs.all_keys():
        assert fresh_bytes(engine.programs.get(*key)) <= reserved, key
    engine.close()


def test_a_pool_that_does_not_fit_is_made_smaller(monkeypatch):
    monkeypatch.setattr("jllm.engine.create.device_capacity", lambda _: 8 * 2**20)
    engine = make_engine(num_blocks=None, memory_utilization=0.9)
    num_blocks = engine._parts.options.num_blocks
    assert 10 < num_blocks < 65536 // 16
    leaf = engine.state.kv[0]
    assert leaf.nbytes * LLAMA["num_hidden_layers"] < 0.9 * 8 * 2**20
    engine.close()


def test_a_context_longer_than_the_pool_is_refused_or_shortened():
    with pytest.raises(ConfigError, match="max_model_len=200 does not fit"):
        make_engine(num_blocks=4, max_model_len=200)
    engine = make_engine(num_blocks=4)
    assert engine.limits.max_model_len == 64
    engine.close()


def test_options_that_contradict_the_model_are_refused():
    with pytest.raises(ConfigError, match="max_model_len=300 exceeds the 256"):
        make_engine(max_model_len=300)
    with pytest.raises(ConfigError, match="max_num_batched_tokens=4"):
        make_engine(max_num_batched_tokens=4)
