"""What all answers of one request have in common, and the counts at its end."""

import dataclasses
import json
import time
from typing import Any

from aiohttp import web

from server.call import Call

# Made once: `json.dumps` would make one for every text.
_encoder = json.JSONEncoder(separators=(",", ":"))


def to_json(value: Any) -> str:
    """JSON on one line, in ASCII."""
    return _encoder.encode(value)


@dataclasses.dataclass(frozen=True, slots=True)
class Envelope:
    """The fields that every chunk of an answer repeats.

    Attributes:
        id: Name of the answer.
        object: Name of its type.
        model: Name that the request used.
        fingerprint: Changes when the same seed may give other tokens.
        created: Seconds since 1970.
    """

    id: str
    object: str
    model: str
    fingerprint: str | None
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    def wrap(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """Puts choices in."""
        return {
            "id": self.id,
            "object": self.object,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
            **more,
        }


class ChunkFrame:
    """Puts the choices of one answer into chunks: what all repeat is written once."""

    def __init__(self, envelope: Envelope) -> None:
        """Writes what stands in front of the choices."""
        whole = to_json(envelope.wrap([]))
        self._head = f"data: {whole.removesuffix(']}')}"

    def frame(self, choice: str, usage: str | None = None) -> bytes:
        """One chunk as an event.

        Args:
            choice: JSON of its choice, or nothing.
            usage: JSON of its usage; None leaves the field out.
        """
        if usage is None:
            return f"{self._head}{choice}]}}\n\n".encode()
        return f'{self._head}{choice}],"usage":{usage}}}\n\n'.encode()


def usage(call: Call, num_completion_tokens: int | None = None) -> dict[str, Any]:
    """Counts of tokens; a prompt counts once however many outputs it has."""
    completion = (
        call.num_output_tokens
        if num_completion_tokens is None
        else num_completion_tokens
    )
    return {
        "prompt_tokens": call.num_prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": call.num_prompt_tokens + completion,
        "prompt_tokens_details": {"cached_tokens": call.num_cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": call.num_reasoning_tokens},
    }


def json_response(value: Any, status: int = 200) -> web.Response:
    """A JSON answer."""
    body = to_json(value).encode()
    return web.Response(body=body, status=status, content_type="application/json")
