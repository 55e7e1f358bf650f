"""Pieces of text add up to the whole; stop strings against the obvious search."""

import functools
import pathlib

import hypothesis.strategies as st
import pytest
import transformers
from hypothesis import given, settings

from jllm.text.detokenizer import Detokenizer, StopStrings
from jllm.text.tokenizer import Tokenizer, load_tokenizer
from tests.fakes import byte_tokenizer

SHARED = pathlib.Path(__file__).parents[3] / ".." / "shared" / "data"
NAMES = ["bytes", "stories260K", "phi-3-mini", "qwen2.5", "gpt2"]


@functools.cache
def tokenizer(name):
    if name == "bytes":
        return byte_tokenizer()
    if not SHARED.is_dir():
        pytest.skip("no test data beside the checkout")
    if name == "stories260K":
        return load_tokenizer(SHARED / name)
    folder = SHARED / "tokenizers" / name
    if name == "gpt2":
        files = {"vocab": str(folder / "vocab.json")}
        files["merges"] = str(folder / "merges.txt")
        return Tokenizer(transformers.GPT2Tokenizer(**files))
    return load_tokenizer(folder)


def pieces_of(detokenizer, ids):
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.flush()]


def is_byte(tok, token_id):
    token = tok.token(token_id) or ""
    return len(token) == 6 and token.startswith("<0x")


TEXTS = st.text(max_size=40) | st.lists(
    st.sampled_from(["😀", "👩‍👩‍👧", "né", "漢字", " ", "\n", "a b", "\ufffd", "</s>"]),
    max_size=12,
).map("".join)


@pytest.mark.parametrize("name", NAMES)
@given(text=TEXTS)
@settings(max_examples=60)
def test_pieces_of_a_text_are_the_text(name, text):
    tok = tokenizer(name)
    ids = tok.encode(text)
    pieces = pieces_of(Detokenizer(tok, skip_special_tokens=False), ids)
    assert "".join(pieces) == tok.decode(ids, skip_special=False)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("skip", [True, False])
@given(data=st.data())
@settings(max_examples=80)
def test_pieces_of_random_tokens_are_the_whole(name, skip, data):
    tok = tokenizer(name)
    ids = data.draw(st.lists(st.integers(0, tok.vocab_size - 1), max_size=24))
    # A decoder takes back characters when a run of byte tokens turns out broken.
    ids = [token_id for token_id in ids if not is_byte(tok, token_id)]
    pieces = pieces_of(Detokenizer(tok, skip_special_tokens=skip), ids)
    assert "".join(pieces) == tok.decode(ids, skip_special=skip)


@given(raw=st.binary(max_size=30))
def test_broken_bytes_are_replaced_as_python_does(raw):
    tok = tokenizer("bytes")
    text = "".join(pieces_of(Detokenizer(tok), list(raw)))
    assert text == raw.decode("utf-8", errors="replace")


@pytest.mark.parametrize("name", ["stories260K", "phi-3-mini"])
def test_byte_tokens_never_fail_and_keep_what_was_given(name):
    tok = tokenizer(name)
    ids = tok.encode("é\n", add_special_tokens=False)
    broken = [tok.hf.convert_tokens_to_ids("<0xFF>")] * 9
    text = "".join(pieces_of(Detokenizer(tok), [*ids, *broken, *ids]))
    assert text.startswith(("é\n", " é\n"))
    assert text.count("\ufffd") >= 9


@pytest.mark.parametrize("name", NAMES)
@given(before=TEXTS, after=TEXTS)
@settings(max_examples=40)
def test_output_continues_its_prompt(name, before, after):
    """In particular the space at the start of the first word is kept."""
    tok = tokenizer(name)
    prompt, ids = tok.encode(before), tok.encode(after, add_special_tokens=False)
    text = "".join(pieces_of(Detokenizer(tok, prompt, skip_special_tokens=False), ids))
    whole = tok.decode([*prompt, *ids], skip_special=False)
    start = tok.decode(prompt, skip_special=False)
    if "\ufffd" not in before:
        assert start + text == whole


def test_character_begun_in_the_prompt_is_completed():
    raw = "né 漢字".encode()
    text = "".join(pieces_of(Detokenizer(tokenizer("bytes"), raw[:5]), raw[5:]))
    assert text == "漢字"


def test_tokens_outside_the_vocabulary_add_nothing():
    assert pieces_of(Detokenizer(tokenizer("bytes")), [65, 9999, 66])[:3] == [
        "A",
        "",
        "B",
    ]


def test_work_per_token_does_not_grow():
    """Where the tokenizer has to be asked: it is asked about few tokens at a time."""
    tok = spaced_tokenizer()
    lengths = []

    class Spy:
        special_ids, joins_bytes = tok.special_ids, tok.joins_bytes
        token, added_token = tok.token, tok.added_token
        token_bytes = tok.token_bytes

        def decode(self, ids, *, skip_special):
            lengths.append(len(ids))
            return tok.decode(ids, skip_special=skip_special)

    detokenizer = Detokenizer(tok, [0] * 1000)
    detokenizer._tokenizer = Spy()
    for token_id in [0, 1, 2, 3, 1] * 200:
        detokenizer.push(token_id)
    assert 0 < max(lengths) <= 30


def test_a_tokenizer_that_joins_bytes_is_not_asked(monkeypatch):
    tok = byte_tokenizer()
    detokenizer = Detokenizer(tok, [65, 66])
    monkeypatch.setattr(tok, "decode", None)
    assert pieces_of(detokenizer, [65, 0xC3, 0xA4]) == ["A", "", "ä", ""]


def spaced_tokenizer():
    """A decoder that joins tokens by spaces, as WordPiece does."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models

    backend = Backend(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    backend.add_special_tokens(["<x>", "<y>"])
    return Tokenizer(transformers.PreTrainedTokenizerFast(tokenizer_object=backend))


def test_spaces_between_special_tokens():
    tok = spaced_tokenizer()
    ids = [0, 2, 3, 1]
    options = {"skip_special_tokens": False}
    assert "".join(pieces_of(Detokenizer(tok, **options), ids)) == "a <x> <y> b"
    options["spaces_between_special_tokens"] = False
    assert "".join(pieces_of(Detokenizer(tok, **options), ids)) == "a <x><y> b"


# --- stop strings ---------------------------------------------------------------


def first_stop(text, stops, *, include):
    """The text up to the stop string that is complete first, longest first."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


def may_become_a_stop(text, stops):
    return max(
        (
            size
            for stop in stops
            for size in range(len(stop))
            if text.endswith(stop[:size])
        ),
        default=0,
    )


LETTERS = st.text("ab", min_size=1, max_size=5)


@given(
    pieces=st.lists(st.text("abc", max_size=4), max_size=12),
    stops=st.lists(LETTERS, max_size=4),
    include=st.booleans(),
)
@settings(max_examples=500)
def test_stop_strings_against_the_obvious_search(pieces, stops, include):
    matcher = StopStrings(stops, include_in_output=include)
    given_text, seen, stop = "", "", None
    for piece in pieces:
        seen += piece
        text, stop = matcher.push(piece)
        given_text += text
        if stop is not None:
            break
        # Held back is exactly what may still become a stop string.
        assert len(seen) - len(given_text) == may_become_a_stop(seen, stops)
    else:
        given_text += matcher.flush()
    assert (given_text, stop) == first_stop("".join(pieces), stops, include=include)


def test_earlier_end_wins_over_earlier_start():
    matcher = StopStrings(["abcd", "bc"], include_in_output=False)
    assert matcher.push("xabcd") == ("xa", "bc")
