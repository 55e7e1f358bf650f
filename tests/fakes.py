"""Stand-ins: an engine whose tokens are known, and a tokenizer of single bytes."""

import json
import pathlib
import tempfile
import types

import numpy as np
import transformers
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors

from jllm.engine.admission import Limits, validate
from jllm.engine.engine import ModelInfo
from jllm.errors import InvalidRequestError
from jllm.metrics import EngineStats
from jllm.text.tokenizer import Tokenizer
from jllm.types import StepOutputs, TokenLogprobs, TokenOutput

BOS, EOS = 256, 257
VOCAB_SIZE = 260
WIDTH = 8
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


def byte_backend():
    """Byte-level tokens 0..255 in the order of their bytes, then <s> and </s>."""
    alphabet = {_character(byte): byte for byte in range(256)}
    backend = Backend(models.BPE(vocab=alphabet, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS)]
    )
    return backend


def _character(byte):
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    if byte in printable:
        return chr(byte)
    return chr(256 + [b for b in range(256) if b not in printable].index(byte))


def save_tokenizer(folder, template=TEMPLATE):
    """Writes the files of a checkpoint's tokenizer."""
    byte_backend().save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "chat_template": template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def byte_tokenizer(template=TEMPLATE):
    hf = transformers.PreTrainedTokenizerFast(
        tokenizer_object=byte_backend(), bos_token="<s>", eos_token="</s>"
    )
    hf.chat_template = template
    return Tokenizer(hf)


class FakeEngine:
    """Answers every prompt with the bytes of a text, one token a step.

    Attributes:
        answer: Text, or a function of the request and the index of the sequence.
        added, aborted: What was called, in order.
        fail_at: Step that raises.
    """

    def __init__(self, answer="hello world", *, max_model_len=128, fail_at=None):
        self.answer = answer
        self.limits = Limits(VOCAB_SIZE, max_model_len, 20, (EOS,), WIDTH)
        folder = pathlib.Path(tempfile.mkdtemp(prefix="jllm-fake-"))
        self.info = ModelInfo(save_tokenizer(folder), {"top_k": 7})
        self.added, self.aborted, self.closed = [], [], 0
        self.fail_at, self.num_steps, self.error_for = fail_at, 0, None
        self.on_step = None
        self._open = {}

    @property
    def has_unfinished(self):
        return bool(self._open)

    def add(self, request):
        validate(request, self.limits)
        if any(key[0] == request.request_id for key in self._open):
            raise InvalidRequestError("request_id is in use", parameter="request_id")
        self.added.append(request)
        for index in range(request.params.n):
            self._open[request.request_id, index] = self._start(request, index)

    def _start(self, request, index):
        answer = self.answer
        text = answer(request, index) if callable(answer) else answer
        tokens = list(text.encode()) if isinstance(text, str) else list(text)
        return types.SimpleNamespace(request=request, tokens=[*tokens, EOS], given=0)

    def abort(self, request_id):
        self.aborted.append(request_id)
        for key in [key for key in self._open if key[0] == request_id]:
            del self._open[key]

    def abort_sequence(self, request_id, index):
        self.aborted.append((request_id, index))
        self._open.pop((request_id, index), None)

    def step(self):
        self.num_steps += 1
        if self.on_step is not None:
            self.on_step(self)
        if self.num_steps == self.fail_at:
            raise RuntimeError("the device is gone")
        keys, token_ids, others = [], [], []
        for key, row in list(self._open.items()):
            output = self._output(key, row)
            if row.given > 1 and not (output.finish_reason or output.logprobs):
                keys.append(key)
                token_ids += output.token_ids
                continue
            others.append(output)
            if output.finish_reason:
                del self._open[key]
        return StepOutputs(keys, token_ids, others)

    def _output(self, key, row):
        params = row.request.params
        token = row.tokens[row.given]
        row.given += 1
        reason, stop = None, None
        if key[0] == self.error_for:
            return TokenOutput(*key, (), finish_reason="error", error="not finite")
        if row.request.pooling is not None:
            pooled = 1.0 + np.arange(WIDTH) * len(row.request.prompt_token_ids)
            return TokenOutput(
                *key, (), finish_reason="stop", num_cached_tokens=3, pooled=pooled
            )
        if token in params.stop_token_ids:
            reason, stop = "stop", token
        elif token == EOS and not params.ignore_eos:
            reason = "stop"
        elif row.given in (params.max_tokens, len(row.tokens)):
            reason = "length"
        wants = params.logprobs is not None or params.logprob_token_ids
        return TokenOutput(
            *key,
            (token,),
            logprobs=(self._logprobs(token, params),) if wants else None,
            prompt_logprobs=self._prompt_logprobs(row, key[1]),
            finish_reason=reason,
            stop_reason=stop,
            num_cached_tokens=3,
        )

    def _logprobs(self, token, params):
        if params.logprob_token_ids:
            ids = tuple(params.logprob_token_ids)
        else:
            ids = tuple(range(65, 65 + params.logprobs))
        return TokenLogprobs(token, -0.5, 9, ids, tuple(-1.0 - i for i in ids))

    def _prompt_logprobs(self, row, index):
        wanted = row.request.params.prompt_logprobs
        if wanted is None or index or row.given > 1:
            return None
        return tuple(
            TokenLogprobs(token, -2.0, 5, tuple(range(wanted)), (-1.0,) * wanted)
            for token in row.request.prompt_token_ids[1:]
        )

    def stats(self):
        return EngineStats(num_running=len(self._open))

    def reset_prefix_cache(self):
        return not self._open

    def close(self):
        self.closed += 1


class SetsGrammar:
    """A grammar whose text has one token of each set, in their order.

    A set with None in it may be left out with all that follows; a string in place of a
    set is the error that the matcher has when it gets there.
    """

    num_bytes = 1

    def __init__(self, sets, vocab_size):
        self.sets, self.vocab_size = sets, vocab_size

    def copy(self):
        return SetsState(self)


class SetsState:
    """Behaves as llguidance's matcher does."""

    def __init__(self, grammar):
        self._sets, self._vocab_size = grammar.sets, grammar.vocab_size
        self._place, self._error = 0, ""

    def _next(self):
        here = self._sets[self._place] if self._place < len(self._sets) else set()
        if isinstance(here, str):
            self._error = here
            return set()
        return here

    def consume_token(self, token):
        if token is None or token not in self._next():
            self._error = self._error or "not in the grammar"
            return False
        self._place += 1
        return True

    def compute_bitmask(self):
        bits = np.zeros(-(-self._vocab_size // 32) * 32, np.uint8)
        bits[[token for token in self._next() if token is not None]] = 1
        return np.packbits(bits, bitorder="little").tobytes()

    def is_accepting(self):
        return self._place == len(self._sets) or None in self._next()

    def is_stopped(self):
        return self._place == len(self._sets) or bool(self._error)

    def is_error(self):
        return bool(self._error)

    def get_error(self):
        return self._error
