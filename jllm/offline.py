"""Runs prepared requests to their end in the caller's thread."""

import contextlib
import logging
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

from jllm.engine.engine import Engine
from jllm.engine.garbage import QuietGarbage
from jllm.engine.interrupts import delayed_interrupts
from jllm.engine.replicas import Replicas
from jllm.errors import EngineStoppedError
from jllm.text.embedding import Stream, make_stream
from jllm.text.progress import Progress
from jllm.text.prompts import PreparedRequest
from jllm.text.tokenizer import Tokenizer
from jllm.types import RequestOutputKind

logger = logging.getLogger("jllm")


class RequestRunner:
    """Steps an engine for requests, and puts their tokens into text.

    Not thread-safe, like the engine. Several streams may be read in turns.
    """

    def __init__(self, engine: Engine | Replicas, tokenizer: Tokenizer | None) -> None:
        """Takes an engine that nobody else steps."""
        self._engine, self._tokenizer = engine, tokenizer
        self._open: dict[str, Stream] = {}

    def run(
        self,
        prepared: Sequence[PreparedRequest],
        *,
        use_tqdm: bool,
        followers: Mapping[str, Sequence[PreparedRequest]] | None = None,
    ) -> list[Any]:
        """Runs requests to their end, and others once those they follow have ended."""
        followers = followers or {}
        total = len(prepared) + sum(map(len, followers.values()))
        progress = Progress(total, is_shown=use_tqdm)
        kind = RequestOutputKind.FINAL_ONLY
        with (
            QuietGarbage(freeze=False) as garbage,
            self._serve(prepared, kind) as streams,
            progress,
        ):
            for stream in streams:
                while not stream.finished:
                    ended = self._step()
                    progress.update(ended)
                    garbage.note_step()
                    for item in ended:
                        for follower in followers.get(item.request_id, ()):
                            self._queue(follower, kind, streams)
        outputs = [stream.take() for stream in streams]
        return [output for output in outputs if output is not None]

    def stream(self, prepared: PreparedRequest) -> Iterator[Any]:
        """Gives an output whenever there is more of a request; see `LLM.stream`."""
        with self._serve([prepared], None) as (stream,):
            finished = False
            while not finished:
                # Another stream's step may have brought something for this one.
                output = stream.take()
                if output is None:
                    self._step()
                else:
                    finished = output.finished
                    yield output

    def close(self) -> None:
        """Forgets the open requests, which the engine ends."""
        self._open.clear()

    @contextlib.contextmanager
    def _serve(
        self, prepared: Sequence[PreparedRequest], kind: RequestOutputKind | None
    ) -> Generator[list[Stream]]:
        """Queues requests; whatever is left of them in the end is aborted."""
        streams: list[Stream] = []
        probed = [item.request for item in prepared if item.request.probes is not None]
        try:
            if probed:
                self._engine.prepare(probed)
            for item in prepared:
                self._queue(item, kind, streams)
            yield streams
        finally:
            for stream in streams:
                if self._open.pop(stream.request_id, None) is not None:
                    self._engine.abort(stream.request_id)
            for request in probed:
                self._engine.release(request.request_id)

    def _queue(
        self,
        prepared: PreparedRequest,
        kind: RequestOutputKind | None,
        streams: list[Stream],
    ) -> None:
        stream = make_stream(prepared, self._tokenizer, kind)
        self._engine.add(prepared.request)
        self._open[stream.request_id] = stream
        streams.append(stream)

    def _step(self) -> list[Stream]:
        """Runs a step for all open streams; returns those that ended."""
        if not self._engine.has_unfinished:
            raise EngineStoppedError("the LLM was closed, or the engine has failed")
        with delayed_interrupts():
            outputs = self._engine.step()
        ended: list[Stream] = []
        for (request_id, index), token_id in zip(
            outputs.keys, outputs.token_ids, strict=True
        ):
            stream = self._open.get(request_id)
            if stream is not None and stream.push_token(index, token_id):
                self._end_sequence(stream, index)
                self._note_end(stream, ended)
        for output in outputs.others:
            stream = self._open.get(output.request_id)
            if stream is None:
                continue
            if stream.push(output):
                self._end_sequence(stream, output.index)
            self._note_end(stream, ended)
        return ended

    def _end_sequence(self, stream: Stream, index: int) -> None:
        """Has the engine end a sequence whose text has met a stop string."""
        if stream.finished:
            self._engine.abort(stream.request_id)
        else:
            self._engine.abort_sequence(stream.request_id, index)

    def _note_end(self, stream: Stream, ended: list[Stream]) -> None:
        if stream.finished:
            ended.append(self._open.pop(stream.request_id))
            if stream.error is not None:
                logger.warning("prompt %s: %s", stream.request_id, stream.error)
