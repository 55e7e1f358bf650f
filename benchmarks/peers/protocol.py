"""What the driver and the workers say to each other: one JSON object per line.

A worker runs in its peer's own environment, where neither jllm nor JAX need be there:
this file and the adapters import the standard library, and the peer when it is opened.
"""

import dataclasses
import json
import os
import sys
from typing import Any, Protocol, TextIO


class NotInstalledError(Exception):
    """The peer is not in this environment."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a peer is opened.

    Attributes:
        folder: The checkpoint, in Hugging Face's layout.
        dtype: "float32" or "bfloat16".
        threads: Of the processor.
        max_num_seqs: Most requests at once.
        max_model_len: Longest context that will be asked for.
        cache: Folder for the checkpoint in the peer's own format.
    """

    folder: str
    dtype: str
    threads: int
    max_num_seqs: int
    max_model_len: int
    cache: str


@dataclasses.dataclass
class Answer:
    """One finished request; seconds on the monotonic clock.

    Attributes:
        tokens: What it generated.
        first: When its first token came; None where the peer does not tell.
        end: When its last one came; None where only the batch's end is known.
        cached: Prompt tokens taken from a prefix cache; None where it does not tell.
    """

    tokens: list[int]
    first: float | None = None
    end: float | None = None
    cached: int | None = None


class Peer(Protocol):
    """An opened engine."""

    version: str

    def run(self, prompts: list[list[int]], lengths: list[int]) -> list[Answer]:
        """Greedy, end tokens ignored: exactly so many tokens for each prompt."""
        ...


def take_standard_output() -> TextIO:
    """Keeps standard output for the protocol; what prints goes to standard error."""
    protocol = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return protocol


def write(stream: TextIO, message: dict[str, Any]) -> None:
    """Sends one message."""
    stream.write(json.dumps(message) + "\n")
    stream.flush()


def cut(answer_tokens: list[int], length: int) -> list[int]:
    """Checks that there are as many tokens as asked for."""
    tokens = [int(token) for token in answer_tokens]
    if len(tokens) != length:
        raise RuntimeError(f"{len(tokens)} tokens instead of {length}")
    return tokens
