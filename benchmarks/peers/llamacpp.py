"""llama.cpp in process, with the continuous batching of its server.

Slots, each with a cache of its own; a batch takes one token of every slot that
generates and fills up with prompts. A new request goes to the free slot whose cache
shares the longest start with it, and keeps that start, as llama-server does.
"""

import dataclasses
import time
from pathlib import Path
from typing import Any

from benchmarks.peers import gguf_file
from benchmarks.peers.protocol import Answer, NotInstalledError, Settings, cut

BATCH = 2048
CONTEXT_MULTIPLE = 256


@dataclasses.dataclass
class Slot:
    """A sequence of the context.

    Attributes:
        index: Its number.
        cached: Tokens whose cache it holds.
        request: The request it works for, None when free.
        todo: Tokens still to be computed; the last one's logits are sampled.
    """

    index: int
    cached: list[int] = dataclasses.field(default_factory=list)
    request: int | None = None
    todo: list[int] = dataclasses.field(default_factory=list)


class Context:
    """A model and a context with one sequence per slot."""

    def __init__(self, settings: Settings) -> None:
        import llama_cpp

        self.version = llama_cpp.__version__
        self._lib = llama_cpp
        is_bfloat16 = settings.dtype == "bfloat16"
        name = f"{Path(settings.folder).name}-{settings.dtype}.gguf"
        path = Path(settings.cache) / name
        if not path.exists():
            gguf_file.write(Path(settings.folder), path, is_bfloat16=is_bfloat16)
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params()
        )
        vocab = llama_cpp.llama_model_get_vocab(self._model)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(vocab)
        self._context = self._make_context(settings)
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._batch = llama_cpp.llama_batch_init(BATCH, 0, 1)
        self._slots = [Slot(index) for index in range(settings.max_num_seqs)]

    def _make_context(self, settings: Settings) -> Any:
        params = self._lib.llama_context_default_params()
        per_slot = -(-settings.max_model_len // CONTEXT_MULTIPLE) * CONTEXT_MULTIPLE
        params.n_ctx = per_slot * settings.max_num_seqs
        params.n_seq_max = settings.max_num_seqs
        params.n_batch = BATCH
        params.n_threads = params.n_threads_batch = settings.threads
        if settings.dtype == "float32":
            params.type_k = params.type_v = self._lib.GGML_TYPE_F32
        return self._lib.llama_init_from_model(self._model, params)

    def run(self, prompts: list[list[int]], lengths: list[int]) -> list[Answer]:
        """See `Peer`."""
        waiting = list(range(len(prompts)))
        answers = [Answer([]) for _ in prompts]
        while waiting or any(slot.request is not None for slot in self._slots):
            while waiting and any(slot.request is None for slot in self._slots):
                request = waiting.pop(0)
                answers[request].cached = self._start(request, prompts[request])
            for slot, token in self._step():
                answer = answers[slot.request]
                answer.tokens.append(token)
                answer.end = time.monotonic()
                answer.first = answer.first or answer.end
                slot.todo = [token]
                if len(answer.tokens) == lengths[slot.request]:
                    slot.request, slot.todo = None, []
        for answer, length in zip(answers, lengths, strict=True):
            answer.tokens = cut(answer.tokens, length)
        return answers

    def _start(self, request: int, prompt: list[int]) -> int:
        """Gives a free slot its prompt; returns how much of it is cached."""
        free = [slot for slot in self._slots if slot.request is None]
        slot = max(free, key=lambda slot: shared(slot.cached, prompt))
        # The last token is computed again, for its logits.
        kept = min(shared(slot.cached, prompt), len(prompt) - 1)
        self._lib.llama_memory_seq_rm(self._memory, slot.index, kept, -1)
        slot.request, slot.cached, slot.todo = request, prompt[:kept], prompt[kept:]
        return kept

    def _step(self) -> list[tuple[Slot, int]]:
        """Computes one batch; returns the slots that sampled, and what."""
        batch, count = self._batch, 0
        sampled: list[tuple[Slot, int]] = []
        for slot in sorted(self._slots, key=lambda slot: len(slot.todo)):
            taken = slot.todo[: BATCH - count]
            for offset, token in enumerate(taken):
                batch.token[count] = token
                batch.pos[count] = len(slot.cached) + offset
                batch.n_seq_id[count] = 1
                batch.seq_id[count][0] = slot.index
                batch.logits[count] = offset == len(slot.todo) - 1
                count += 1
            if taken and len(taken) == len(slot.todo):
                sampled.append((slot, count - 1))
            slot.cached = slot.cached + taken
            slot.todo = slot.todo[len(taken) :]
        batch.n_tokens = count
        if self._lib.llama_decode(self._context, batch):
            raise RuntimeError("llama_decode failed")
        return [(slot, self._greedy(place)) for slot, place in sampled]

    def _greedy(self, place: int) -> int:
        import numpy as np

        logits = self._lib.llama_get_logits_ith(self._context, place)
        return int(np.ctypeslib.as_array(logits, (self._vocab_size,)).argmax())


def shared(left: list[int], right: list[int]) -> int:
    """Tokens that two sequences have in common at their start."""
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return min(len(left), len(right))


def open_peer(settings: Settings) -> Context:
    """Writes the GGUF file if need be, and loads it."""
    try:
        import gguf  # noqa: F401
        import llama_cpp  # noqa: F401
    except ImportError as error:
        raise NotInstalledError(str(error)) from error
    return Context(settings)
