"""From token outputs to request outputs: text, stops, logprobs, kinds."""

import pytest

from jllm.text.output import RequestStream
from jllm.text.prompts import PromptProcessor
from jllm.types import RequestOutputKind, SamplingParams, TokenLogprobs, TokenOutput
from tests.fakes import EOS, byte_tokenizer

CUMULATIVE, DELTA, FINAL = RequestOutputKind


def stream(*, tokenizer=True, prompt="P", interval=1, **params):
    params = SamplingParams(**params)
    tok = byte_tokenizer() if tokenizer else None
    processor = PromptProcessor(tok, vocab_size=260, max_model_len=99)
    prompt = prompt if tokenizer else [1]
    prepared = processor.prepare("r", prompt, params)
    return RequestStream(prepared, tok, interval=interval)


def tokens(text, index=0, **fields):
    ids = tuple(text.encode()) if isinstance(text, str) else tuple(text)
    return TokenOutput("r", index, ids, **fields)


def feed(request, text, **last):
    """One token at a time; the outputs taken after each."""
    taken = []
    for i, byte in enumerate(text.encode()):
        fields = last if i == len(text.encode()) - 1 else {}
        request.push(tokens([byte], **fields))
        if (output := request.take()) is not None:
            taken.append(output)
    return taken


def test_cumulative_outputs_grow():
    taken = feed(stream(), "héy", finish_reason="length")
    assert [output.outputs[0].text for output in taken] == ["h", "h", "hé", "héy"]
    assert [output.finished for output in taken] == [False, False, False, True]
    assert taken[-1].outputs[0].token_ids == list("héy".encode())
    assert taken[-1].outputs[0].finish_reason == "length"
    assert taken[0].prompt == "P"


def test_deltas_add_up():
    taken = feed(stream(output_kind=DELTA), "héy", finish_reason="length")
    assert [output.outputs[0].text for output in taken] == ["h", "", "é", "y"]
    assert [len(output.outputs[0].token_ids) for output in taken] == [1] * 4


def test_outputs_wait_for_tokens_but_not_at_either_end():
    request = stream(output_kind=DELTA, interval=3)
    taken = feed(request, "abcdefghi", finish_reason="length")
    assert [output.outputs[0].text for output in taken] == ["a", "bcd", "efg", "hi"]
    # A sequence that ends does not wait for the other.
    request = stream(output_kind=DELTA, interval=3, n=2, temperature=1)
    request.push(tokens("a", 0))
    assert request.take() is not None
    request.push(tokens("b", 1))
    assert request.take() is None
    request.push(tokens("c", 0, finish_reason="stop"))
    assert len(request.take().outputs) == 2


def test_final_only_is_one():
    taken = feed(stream(output_kind=FINAL), "hey", finish_reason="length")
    assert [output.outputs[0].text for output in taken] == ["hey"]


def test_nothing_new_is_no_output():
    request = stream()
    assert request.take() is None
    request.push(tokens("a"))
    assert request.take() is not None
    assert request.take() is None


def test_a_slow_reader_gets_all_at_once():
    request = stream(output_kind=DELTA)
    for letter in "abc":
        request.push(tokens(letter))
    request.push(tokens("d", finish_reason="length"))
    output = request.take()
    assert (output.outputs[0].text, output.finished) == ("abcd", True)


@pytest.mark.parametrize(("include", "text"), [(False, "one"), (True, "one\n\n")])
def test_stop_string_ends_the_text(include, text):
    request = stream(stop=["\n\n", "zz"], include_stop_str_in_output=include)
    assert not any(request.push(tokens(letter)) for letter in "one\n")
    assert request.take().outputs[0].text == "one"
    assert request.push(tokens("\n"))
    completion = request.take().outputs[0]
    assert (completion.text, completion.finish_reason) == (text, "stop")
    assert completion.stop_reason == "\n\n"
    assert completion.token_ids == list(b"one\n\n")
    # The engine may have been one step ahead.
    assert not request.push(tokens("more"))
    assert request.take() is None


def test_tokens_behind_the_stop_string_are_dropped():
    logprobs = tuple(TokenLogprobs(i, -1.0, 1) for i in range(5))
    request = stream(stop="b", logprobs=0)
    assert request.push(tokens("abcde", logprobs=logprobs))
    completion = request.take().outputs[0]
    assert completion.token_ids == [97, 98]
    assert (len(completion.logprobs), completion.cumulative_logprob) == (2, -2.0)


def test_start_of_a_stop_string_is_given_at_the_end():
    taken = feed(stream(stop="world"), "a wor", finish_reason="length")
    assert [output.outputs[0].text for output in taken][-2:] == ["a ", "a wor"]


def test_half_a_character_is_given_at_the_end():
    request = stream()
    request.push(tokens([0x41, 0xE4], finish_reason="length"))
    assert request.take().outputs[0].text == "A\ufffd"


def test_stop_strings_wait_for_min_tokens():
    request = stream(stop="a", min_tokens=2)
    assert [request.push(tokens("a")) for _ in range(3)] == [False, False, True]
    assert request.take().outputs[0].text == "aa"


@pytest.mark.parametrize(
    ("params", "text"),
    [
        ({}, "ab"),
        ({"include_stop_str_in_output": True}, "abc"),
        ({"skip_special_tokens": False}, "ab"),
    ],
)
def test_stop_token_is_not_shown(params, text):
    request = stream(stop_token_ids=[99], **params)
    request.push(tokens("abc", finish_reason="stop", stop_reason=99))
    completion = request.take().outputs[0]
    assert (completion.text, completion.stop_reason) == (text, 99)
    assert completion.token_ids == list(b"abc")


def test_eos_has_no_stop_reason():
    request = stream(skip_special_tokens=False)
    request.push(tokens([65, EOS], finish_reason="stop"))
    completion = request.take().outputs[0]
    assert (completion.text, completion.stop_reason) == ("A", None)
    assert completion.finish_reason == "stop"


def test_logprobs_hold_the_sampled_token_first():
    entry = TokenLogprobs(99, -3.0, 8, (97, 98), (-0.5, -1.0))
    request = stream(logprobs=2)
    request.push(tokens("c", logprobs=(entry,), finish_reason="length"))
    (found,) = request.take().outputs[0].logprobs
    assert list(found) == [99, 97, 98]
    assert [(p.logprob, p.rank, p.decoded_token) for p in found.values()] == [
        (-3.0, 8, "c"),
        (-0.5, 1, "a"),
        (-1.0, 2, "b"),
    ]


def test_logprobs_of_ids_asked_for_have_no_rank():
    entry = TokenLogprobs(99, -3.0, 8, (97, 99), (-0.5, -3.0))
    request = stream(logprob_token_ids=[97, 99])
    request.push(tokens("c", logprobs=(entry,)))
    (found,) = request.take().outputs[0].logprobs
    assert [(i, p.rank) for i, p in found.items()] == [(99, 8), (97, None)]


def test_no_logprobs_unless_asked_for():
    request = stream()
    request.push(tokens("c"))
    completion = request.take().outputs[0]
    assert completion.logprobs is None
    assert completion.cumulative_logprob is None


def test_first_prompt_position_has_no_logprob():
    entry = TokenLogprobs(80, -2.0, 5, (97,), (-1.0,))
    request = stream(prompt_logprobs=1, output_kind=DELTA)
    request.push(tokens("c", prompt_logprobs=(entry,), num_cached_tokens=4))
    first = request.take()
    assert first.prompt_logprobs[0] is None
    assert list(first.prompt_logprobs[1]) == [80, 97]
    assert first.num_cached_tokens == 4
    request.push(tokens("c"))
    assert request.take().prompt_logprobs is None


def test_sequences_end_one_by_one():
    request = stream(n=2, output_kind=DELTA)
    request.push(tokens("a", 1, finish_reason="length"))
    first = request.take()
    assert [(c.index, c.text) for c in first.outputs] == [(1, "a")]
    assert not first.finished
    request.push(tokens("b", 0, finish_reason="length"))
    last = request.take()
    assert [(c.index, c.text, last.finished) for c in last.outputs] == [(0, "b", True)]


def test_sequences_stay_in_their_order():
    request = stream(n=2)
    request.push(tokens("a", 1))
    assert [c.text for c in request.take().outputs] == ["", "a"]


def test_abort_ends_what_runs():
    request = stream(n=2, stop="xyz")
    request.push(tokens("done", 1, finish_reason="length"))
    request.push(tokens("tax", 0))
    request.abort()
    request.abort()
    outputs = request.take().outputs
    assert [(c.text, c.finish_reason) for c in outputs] == [
        ("tax", "abort"),
        ("done", "length"),
    ]
    assert request.take() is None


def test_error_is_told():
    request = stream()
    request.push(tokens("", finish_reason="error", error="not finite"))
    assert request.take().outputs[0].finish_reason == "error"
    assert request.error == "not finite"


@pytest.mark.parametrize("options", [{"tokenizer": False}, {"detokenize": False}])
def test_without_text(options):
    request = stream(logprobs=0, **options)
    entry = TokenLogprobs(65, -1.0, 1)
    request.push(tokens("A", logprobs=(entry,), finish_reason="length"))
    completion = request.take().outputs[0]
    assert (completion.text, completion.token_ids) == ("", [65])
    text = completion.logprobs[0][65].decoded_token
    assert text == (None if options.get("tokenizer") is False else "A")


def test_times_are_in_order():
    request = stream()
    request.push(tokens("a", finish_reason="length"))
    times = request.take().metrics
    assert times.arrival_time <= times.first_token_time <= times.finished_time
