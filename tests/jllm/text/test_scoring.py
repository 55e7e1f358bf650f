"""How prompts and continuations are joined."""

import pytest

from jllm.errors import InvalidRequestError
from jllm.text.prompts import PromptProcessor
from jllm.text.scoring import split_continuations
from tests.fakes import BOS, VOCAB_SIZE, byte_tokenizer


class Merging:
    """A tokenizer of single bytes that makes one token of "ab"."""

    eos_token_id = None

    def __init__(self):
        self._bytes = byte_tokenizer()

    def encode(self, text, *, add_special_tokens=True):
        tokens = self._bytes.encode(text, add_special_tokens=add_special_tokens)
        pair = "".join(map(chr, tokens)).replace("ab", chr(999))
        return [ord(token) for token in pair]


def join(prompt, continuation, tokenizer=None):
    processor = PromptProcessor(
        tokenizer or byte_tokenizer(), vocab_size=VOCAB_SIZE, max_model_len=64
    )
    request = processor.prepare_scored("a", prompt, continuation).request
    start = request.prompt_logprobs_start
    return request.prompt_token_ids[:start], request.prompt_token_ids[start:]


@pytest.mark.parametrize(
    ("prompt", "continuation", "expected"),
    [
        ("ab", "cd", ((BOS, *b"ab"), tuple(b"cd"))),
        ("", "cd", ((BOS,), tuple(b"cd"))),
        ([1, 2], [3], ((1, 2), (3,))),
        ([1, 2], "c", ((1, 2), (99,))),
        ("a", [3, 4], ((BOS, 97), (3, 4))),
        ({"prompt": "a"}, {"prompt": "b"}, ((BOS, 97), (98,))),
    ],
)
def test_text_and_tokens(prompt, continuation, expected):
    assert join(prompt, continuation) == expected


def test_a_token_that_spans_the_border_is_the_continuations():
    tokenizer = Merging()
    assert join("xa", "bc", tokenizer) == ((BOS, 120), (999, 99))
    assert join("xa", "c", tokenizer) == ((BOS, 120, 97), (99,))


@pytest.mark.parametrize(
    ("prompt", "continuation", "message"),
    [
        ("a", "", "the continuation has no tokens"),
        ([1], [], "the continuation has no tokens"),
        ([], [1], "the prompt has no tokens"),
        ([1], 5, "must be a string"),
        (None, "a", "must be a string"),
    ],
)
def test_what_is_refused(prompt, continuation, message):
    with pytest.raises(InvalidRequestError, match=message):
        join(prompt, continuation)


@pytest.mark.parametrize(
    ("prompts", "continuations", "groups"),
    [
        ("a", "b", [["b"]]),
        ("a", ["b", "c"], [["b", "c"]]),
        ("a", [1, 2], [[[1, 2]]]),
        ([1, 2], [[3], "c"], [[[3], "c"]]),
        (["a", "b"], ["c", ["d", "e"]], [["c"], ["d", "e"]]),
        ([[1], [2]], [[3, 4], [[5], [6]]], [[[3, 4]], [[5], [6]]]),
        (["a"], [["b", "c"]], [["b", "c"]]),
        ([], [], []),
    ],
)
def test_which_belong_to_which(prompts, continuations, groups):
    found = split_continuations(prompts, continuations)
    assert [group for _, group in found] == groups


@pytest.mark.parametrize(
    ("prompts", "continuations"), [(["a"], "b"), (["a"], ["b", "c"]), (["a"], [[]])]
)
def test_lists_that_do_not_match(prompts, continuations):
    with pytest.raises(InvalidRequestError) as error:
        split_continuations(prompts, continuations)
    assert error.value.parameter == "continuations"
