"""Engine options as users write them."""

import pathlib

import pytest

from jllm.config import EngineConfig, make_config
from jllm.errors import ConfigError


def test_options():
    assert make_config(None, {}) == EngineConfig()
    found = make_config(pathlib.Path("m"), {"dtype": "float16", "tokenizer": "t"})
    assert found == EngineConfig(model="m", dtype="float16", tokenizer="t")


def test_names_of_others():
    config = make_config("m", {"gpu_memory_utilization": 0.5})
    assert config.memory_utilization == 0.5
    assert make_config("m", {"trust_remote_code": False}) == EngineConfig(model="m")


@pytest.mark.parametrize(
    ("model", "options", "word"),
    [
        ("m", {"tensor_paralel_size": 2}, "did you mean tensor_parallel_size"),
        ("m", {"zzz": 2}, "zzz is no engine option$"),
        ("m", {"trust_remote_code": True}, "trust_remote_code"),
        (
            "m",
            {"gpu_memory_utilization": 0.5, "memory_utilization": 0.5},
            "give one",
        ),
        (5, {}, "model=5 must be a string"),
        ("m", {"tokenizer": 5}, "tokenizer=5 must be a string"),
        ("m", {"max_model_len": 0}, "max_model_len=0"),
    ],
)
def test_wrong_options(model, options, word):
    with pytest.raises(ConfigError, match=word):
        make_config(model, options)
