"""Loading, encoding, and errors that name the file."""

import contextlib

import pytest

from jllm.errors import CheckpointError, InvalidRequestError
from jllm.text.tokenizer import Tokenizer, load_tokenizer
from tests.fakes import BOS, EOS, byte_tokenizer, save_tokenizer


def test_special_tokens_and_sizes(tmp_path):
    tok = load_tokenizer(save_tokenizer(tmp_path))
    assert (tok.bos_token_id, tok.eos_token_id, tok.vocab_size) == (BOS, EOS, 258)
    assert tok.special_ids == {BOS, EOS}
    assert tok.encode("Aé") == [BOS, 65, 0xC3, 0xA9]
    assert tok.encode("A", add_special_tokens=False) == [65]
    assert tok.decode([BOS, 65, EOS]) == "A"
    assert tok.decode([BOS, 65, EOS], skip_special=False) == "<s>A</s>"


def test_bytes_and_texts_of_tokens():
    tok = byte_tokenizer()
    assert [tok.token_bytes(i) for i in (0, 32, 0xE9, BOS, 9999)] == [
        b"\0",
        b" ",
        b"\xe9",
        b"<s>",
        b"",
    ]
    assert [tok.token_text(i) for i in (32, 65, 0xE9, EOS)] == [
        " ",
        "A",
        "\ufffd",
        "</s>",
    ]


def test_sentencepiece_tokens_keep_their_space(shared_data):
    tok = load_tokenizer(shared_data / "data" / "stories260K")
    ids = tok.encode("Once upon a time", add_special_tokens=False)
    assert [tok.token_text(i) for i in ids[:2]] == [" Once", " upon"]
    assert tok.token_bytes(tok.hf.convert_tokens_to_ids("<0x0A>")) == b"\n"
    assert b"".join(map(tok.token_bytes, ids)) == b" Once upon a time"


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_broken_file_is_named(tmp_path, file):
    save_tokenizer(tmp_path)
    (tmp_path / file).write_text('{"a": ')
    with pytest.raises(CheckpointError, match=file):
        load_tokenizer(tmp_path)


def test_wrong_content_is_named(tmp_path):
    save_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "Unheard"}}')
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: no such file"):
        load_tokenizer(tmp_path)


def test_code_of_a_checkpoint_is_not_run(tmp_path):
    save_tokenizer(tmp_path)
    ran = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass Evil: pass\n")
    auto_map = '{"AutoTokenizer": [null, "evil.Evil"]}'
    (tmp_path / "tokenizer_config.json").write_text(
        f'{{"tokenizer_class": "Evil", "auto_map": {auto_map}}}'
    )
    with contextlib.suppress(CheckpointError):
        load_tokenizer(tmp_path)
    assert not ran.exists()


def test_tokenizer_without_a_backend_is_refused():
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer(object())


def test_half_a_surrogate_pair_is_refused():
    with pytest.raises(InvalidRequestError, match="Unicode"):
        byte_tokenizer().encode("a\ud800")
