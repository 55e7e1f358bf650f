"""Flags follow the fields of a dataclass."""

import argparse
import dataclasses

import pytest

from jllm.config import EngineConfig
from jllm.flags import add_flags, given_values
from jllm.types import SamplingParams


def parse(owner, *arguments, **options):
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_flags(parser, owner, **options)
    return given_values(parser.parse_args(arguments), owner)


def test_flags_not_given_leave_no_trace():
    assert parse(SamplingParams) == {}
    assert parse(EngineConfig) == {}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--temperature", "0.5", "--top-k", "3"], {"temperature": 0.5, "top_k": 3}),
        (["--max-tokens", "none"], {"max_tokens": None}),
        (["--ignore-eos"], {"ignore_eos": True}),
        (["--no-skip-special-tokens"], {"skip_special_tokens": False}),
        (["--stop", "a", "--stop", "b"], {"stop": ["a", "b"]}),
        (["--bad-words", "a b"], {"bad_words": ["a b"]}),
        (["--stop-token-ids", "1,2"], {"stop_token_ids": [1, 2]}),
        (["--logit-bias", '{"5": -1}'], {"logit_bias": {"5": -1}}),
    ],
)
def test_sampling_flags(arguments, expected):
    found = parse(SamplingParams, *arguments, leave_out=("output_kind",))
    assert found == expected
    SamplingParams(**found)


def test_engine_flags():
    arguments = ["--dtype", "float16", "--memory-utilization", "0.5"]
    arguments += ["--no-overlap", "--engine-seed", "3", "--tokenizer", "t"]
    assert parse(EngineConfig, *arguments, renamed={"seed": "engine-seed"}) == {
        "dtype": "float16",
        "memory_utilization": 0.5,
        "overlap": False,
        "seed": 3,
        "tokenizer": "t",
    }


def test_short_flags():
    assert parse(EngineConfig, "-pp", "2", "-tp", "4", "-dp", "1") == {
        "pipeline_parallel_size": 2,
        "tensor_parallel_size": 4,
        "data_parallel_size": 1,
    }


@pytest.mark.parametrize(
    ("owner", "arguments"),
    [
        (EngineConfig, ["--dtype", "int4"]),
        (EngineConfig, ["--max-model-len", "many"]),
        (SamplingParams, ["--logit-bias", "[1]"]),
        (SamplingParams, ["--stop-token-ids", "1,x"]),
        (SamplingParams, ["--n", "none"]),
    ],
)
def test_wrong_values(owner, arguments):
    with pytest.raises(argparse.ArgumentError, match=arguments[0]):
        parse(owner, *arguments)


@pytest.mark.parametrize("owner", [SamplingParams, EngineConfig])
def test_every_flag_has_help(owner):
    parser = argparse.ArgumentParser(add_help=False)
    add_flags(parser, owner)
    actions = parser._actions
    fields = dataclasses.fields(owner)
    assert len(actions) == sum(f.metadata.get("flag", True) for f in fields)
    assert [action.dest for action in actions if not action.help] == []
    parser.format_help()
