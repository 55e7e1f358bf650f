"""Text to token ids and back, by the tokenizer files of a checkpoint."""

import json
import logging
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jllm.errors import CheckpointError, InvalidRequestError

JSON_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


class Tokenizer:
    """Wraps a transformers tokenizer that runs on the `tokenizers` library.

    All methods may be called from any thread.
    """

    def __init__(self, hf: Any) -> None:
        """Takes over a transformers tokenizer; it must be a fast one.

        Raises:
            CheckpointError: It has no `tokenizers` backend.
        """
        backend = getattr(hf, "backend_tokenizer", None)
        if backend is None:
            raise CheckpointError(
                f"{type(hf).__name__} has no tokenizer.json, which jllm needs"
            )
        self._hf = hf
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        self._added = {token_id: str(token) for token_id, token in added.items()}
        self._special_ids = frozenset(
            token_id for token_id, token in added.items() if token.special
        )
        self._decoders = _decoder_types(backend.decoder)
        self._texts: dict[int, str] = {}
        self._bytes: dict[int, bytes] = {}
        backend.encode_special_tokens = bool(hf.split_special_tokens)
        # While one thread encodes, another must not change the backend's settings.
        self._lock = threading.Lock()
        self._anchor = self._find_anchor()

    @property
    def hf(self) -> Any:
        """The transformers tokenizer itself."""
        return self._hf

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def eos_token_id(self) -> int | None:
        """Token that ends a text."""
        return self._hf.eos_token_id

    @property
    def bos_token_id(self) -> int | None:
        """Token that begins a text."""
        return self._hf.bos_token_id

    @property
    def added_tokens(self) -> Mapping[int, str]:
        """Id and text of the tokens added beside the vocabulary."""
        return self._added

    @property
    def special_ids(self) -> frozenset[int]:
        """Tokens left out of a text by `skip_special_tokens`."""
        return self._special_ids

    def serialize(self) -> str:
        """The text of its tokenizer.json, with all added tokens."""
        with self._lock:
            return self._backend.to_str()

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Splits text into tokens, with BOS and the like as the model wants them.

        Raises:
            InvalidRequestError: The string holds half a surrogate pair.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InvalidRequestError(
                f"the text is no valid Unicode: {error.reason} at {error.start}",
                parameter="prompt",
            ) from error
        backend = self._backend
        with self._lock:
            # Its file, or whoever shares it, may have asked for either.
            if backend.truncation is not None:
                backend.no_truncation()
            if backend.padding is not None:
                backend.no_padding()
            # The transformers tokenizer does many times the work around this call.
            return backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, token_ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Joins tokens into text; ids outside the vocabulary are left out."""
        return self._backend.decode(list(token_ids), skip_special_tokens=skip_special)

    def token(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it, None outside the vocabulary."""
        return self._backend.id_to_token(token_id)

    def added_token(self, token_id: int) -> str | None:
        """The text of a token added beside the vocabulary, None for all others."""
        return self._added.get(token_id)

    def token_text(self, token_id: int) -> str:
        """What the token adds to a text; U+FFFD for a part of a character.

        Unlike the decoding of one token alone it keeps the space before a word.
        """
        text = self._texts.get(token_id)
        if text is None:
            before = self.decode(self._anchor, skip_special=False)
            text = self.decode([*self._anchor, token_id], skip_special=False)
            text = text.removeprefix(before)
            self._texts[token_id] = text
        return text

    @property
    def joins_bytes(self) -> bool:
        """Whether a text is nothing but the bytes of its tokens, one after another."""
        return self._decoders == frozenset({"ByteLevel"})

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that the token adds to a text, parts of characters included."""
        found = self._bytes.get(token_id)
        if found is None:
            found = self._bytes[token_id] = self._token_bytes(token_id)
        return found

    def _token_bytes(self, token_id: int) -> bytes:
        token = self.token(token_id)
        if token is None:
            return b""
        if token_id not in self._added:
            if "ByteLevel" in self._decoders and all(map(BYTES.__contains__, token)):
                return bytes(BYTES[character] for character in token)
            is_byte = len(token) == 6 and token.startswith("<0x")
            if "ByteFallback" in self._decoders and is_byte:
                return bytes([int(token[3:5], 16)])
        return self.token_text(token_id).encode("utf-8")

    def _find_anchor(self) -> list[int]:
        """A token to decode others behind, as decoders treat the first one apart."""
        ids = self.encode("a", add_special_tokens=False)
        return ids[-1:] if self.decode(ids[-1:]) else []


def load_tokenizer(path: Path) -> Tokenizer:
    """Loads the tokenizer of a folder; runs no code from it and fetches nothing.

    Args:
        path: The folder; or a GGUF file, whose vocabulary is taken unless a
            tokenizer.json lies beside it.

    Raises:
        CheckpointError: A file is missing or broken; names it.
    """
    # At import it advises to install PyTorch, which is not wanted here.
    logging.getLogger("transformers").addFilter(_is_not_about_torch)
    import transformers

    kind: Any = transformers.AutoTokenizer
    options: dict[str, Any] = {"trust_remote_code": False}
    if path.is_file():
        path, file = path.parent, path.name
        if not (path / "tokenizer.json").exists():
            # AutoTokenizer would want PyTorch for it.
            kind, options = transformers.PreTrainedTokenizerFast, {"gguf_file": file}
    try:
        hf = kind.from_pretrained(str(path), local_files_only=True, **options)
    # Every release of the library has its own errors for a broken file.
    except Exception as error:
        raise CheckpointError(
            _what_is_wrong(path, options.get("gguf_file"), error)
        ) from error
    return Tokenizer(hf)


def _is_not_about_torch(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("PyTorch was not found")


def _what_is_wrong(path: Path, gguf_file: object, error: Exception) -> str:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    if gguf_file:
        return f"{path}/{gguf_file}: has no vocabulary that can be read: {reason}"
    for name in JSON_FILES:
        file = path / name
        try:
            if file.exists():
                json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as reason:
            return f"{file}: cannot be read as JSON: {reason}"
    if not (path / "tokenizer.json").exists():
        return f"{path / 'tokenizer.json'}: no such file, and no other tokenizer"
    return f"{path / 'tokenizer.json'}: cannot be read as a tokenizer: {reason}"


def _decoder_types(decoder: Any) -> frozenset[str]:
    """Names of the decoders that a tokenizer chains."""
    if decoder is None:
        return frozenset()
    state: dict[str, Any] = json.loads(decoder.__getstate__())
    parts = state.get("decoders", [state])
    return frozenset(part["type"] for part in parts)


def _byte_characters() -> dict[str, int]:
    """The characters that byte-level vocabularies (GPT-2) write bytes with."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTES = _byte_characters()
"""Byte-level character to the byte it stands for."""
