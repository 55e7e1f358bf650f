"""Every form of a prompt, and what is refused."""

import numpy as np
import pytest

from jllm.config import EngineConfig
from jllm.errors import CheckpointError, InvalidRequestError
from jllm.text.prompts import (
    PromptProcessor,
    make_processor,
    parse_prompt,
    split_prompts,
)
from jllm.types import SamplingParams
from tests.fakes import BOS, EOS, byte_tokenizer, save_tokenizer


def processor(tokenizer=None, **options):
    sizes = {"vocab_size": 260, "max_model_len": 16}
    return PromptProcessor(tokenizer or byte_tokenizer(), **sizes | options)


def prepare(prompt, **params):
    return processor().prepare("r", prompt, SamplingParams(**params))


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ("a", ["a"]),
        ([1, 2], [[1, 2]]),
        (np.array([1, 2]), [np.array([1, 2])]),
        (["a", [1], {"prompt": "b"}], ["a", [1], {"prompt": "b"}]),
        ([[1, 2]], [[1, 2]]),
        ({"prompt": "a"}, [{"prompt": "a"}]),
        ([], []),
        (("a", "b"), ["a", "b"]),
    ],
)
def test_split(prompts, expected):
    assert str(split_prompts(prompts)) == str(expected)


@pytest.mark.parametrize(
    ("prompt", "ids", "text"),
    [
        ("AB", (BOS, 65, 66), "AB"),
        ([65, 66], (65, 66), None),
        (np.array([65, 66], np.int64), (65, 66), None),
        ({"prompt": "A"}, (BOS, 65), "A"),
        ({"prompt_token_ids": [65]}, (65,), None),
        ({"prompt_token_ids": [65], "prompt": "x"}, (65,), "x"),
    ],
)
def test_forms(prompt, ids, text):
    prepared = prepare(prompt)
    assert prepared.request.prompt_token_ids == ids
    assert prepared.prompt == text
    assert all(type(i) is int for i in prepared.request.prompt_token_ids)


@pytest.mark.parametrize(
    "prompt",
    [
        None,
        5,
        b"bytes",
        ["a", 1],
        [1.5],
        [True],
        {},
        {"text": "a"},
        {"prompt": 3},
        {"prompt_token_ids": "12"},
        {"prompt_token_ids": 12},
        {"prompt": "a", "cache_salt": ""},
        {"prompt": "a", "cache_salt": 3},
        {"prompt": "a", "multi_modal_data": {}},
    ],
)
def test_wrong_types(prompt):
    with pytest.raises(InvalidRequestError):
        parse_prompt(prompt)


def test_cache_salt_priority_and_eos_are_handed_on():
    prompt = {"prompt": "A", "cache_salt": "s"}
    request = processor().prepare("r", prompt, SamplingParams(), 7).request
    assert (request.cache_salt, request.priority) == ("s", 7)
    assert request.eos_token_ids == (EOS,)
    small = processor(vocab_size=256).prepare("r", "A", SamplingParams()).request
    assert small.eos_token_ids == ()


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ({"truncate_prompt_tokens": 2}, b"st"),
        ({"truncate_prompt_tokens": 99}, None),
        ({"truncate_prompt_tokens": -1, "max_tokens": 4}, b"he text last"),
        ({"truncate_prompt_tokens": -1, "max_tokens": 40}, b"t"),
        ({"truncate_prompt_tokens": -1, "max_tokens": None}, b"n the text last"),
    ],
)
def test_truncation_keeps_the_end(params, kept):
    ids = prepare("in the text last", **params).request.prompt_token_ids
    expected = (BOS, *b"in the text last") if kept is None else tuple(kept)
    assert ids == expected


def test_bad_words_with_and_without_space(shared_data):
    """Where a space makes another token of the word, both are banned."""
    from jllm.text.tokenizer import load_tokenizer

    tok = load_tokenizer(shared_data / "data" / "tokenizers" / "qwen2.5")
    params = SamplingParams(bad_words=["cat"])
    found = processor(tok, vocab_size=10**6).prepare("r", "x", params).request
    assert [tok.decode(ids) for ids in found.bad_words_token_ids] == ["cat", " cat"]


def test_bad_words_of_bytes_have_one_form():
    request = prepare("x", bad_words=["cat", " dog"]).request
    assert request.bad_words_token_ids == (tuple(b"cat"), tuple(b"dog"))


def test_too_many_bad_words():
    with pytest.raises(InvalidRequestError, match="1025 tokens") as caught:
        prepare("x", bad_words=["a" * 1000, "b" * 25])
    assert caught.value.parameter == "bad_words"


def test_without_a_tokenizer():
    bare = PromptProcessor(None, vocab_size=260, max_model_len=16)
    assert bare.prepare("r", [1], SamplingParams()).request.prompt_token_ids == (1,)
    for prompt, params in [
        ("text", {}),
        ([1], {"stop": "x"}),
        ([1], {"bad_words": ["x"]}),
    ]:
        with pytest.raises(InvalidRequestError, match="skip_tokenizer_init"):
            bare.prepare("r", prompt, SamplingParams(**params))


def test_tokenizer_of_another_folder(tmp_path):
    save_tokenizer(tmp_path)
    sizes = {"vocab_size": 260, "max_model_len": 16}
    config = EngineConfig(tokenizer=str(tmp_path))
    made = make_processor(config, tmp_path / "none", **sizes)
    assert made.tokenizer.eos_token_id == EOS
    config = EngineConfig(skip_tokenizer_init=True)
    assert make_processor(config, tmp_path, **sizes).tokenizer is None
    with pytest.raises(CheckpointError):
        make_processor(EngineConfig(), tmp_path / "none", **sizes)
