"""Which replica a request goes to: where most of its prompt is cached, unless busy.

A replica's cache is not asked: what was sent to a replica is in its cache as soon as it
is computed, and the next request of a conversation, or of a burst with the same start,
often comes before that. So the router remembers, per replica, the starts of prompts it
has sent there, the least recently used ones leave as they do in a cache.
"""

import array
import collections
import dataclasses
from collections.abc import Sequence

from jllm.scheduler.prefix_cache import digest

PIECE_TOKENS = 128
"""Prompts are compared in pieces of so many tokens, which costs a digest each."""
REQUEST_TOKENS = 256
"""What an open request counts beside its prompt: it will generate."""
MAX_LEAD = 1.5
LEAD_TOKENS = 65_536
"""A replica is not chosen for its cache if its load is more than so many times the
least load, and that many tokens."""


def prompt_pieces(
    tokens: Sequence[int], salt: str | None, size: int = PIECE_TOKENS
) -> list[bytes]:
    """A digest for each start of a prompt that is a whole number of pieces long.

    Args:
        tokens: The prompt.
        salt: Prompts share cached blocks only under the same one.
        size: Tokens of a piece.
    """
    found: list[bytes] = []
    last = digest(b"", repr(salt).encode())
    for i in range(size, len(tokens) + 1, size):
        last = digest(last, array.array("q", tokens[i - size : i]).tobytes())
        found.append(last)
    return found


class SentPrefixes:
    """The starts of the prompts that one replica was sent, as many as it can cache."""

    def __init__(self, capacity: int) -> None:
        """Begins empty; holds at most `capacity` pieces."""
        self._capacity = capacity
        # Least recently used first.
        self._pieces: collections.OrderedDict[bytes, None] = collections.OrderedDict()

    def __len__(self) -> int:
        """Number of pieces."""
        return len(self._pieces)

    def clear(self) -> None:
        """Forgets all."""
        self._pieces.clear()

    def num_known(self, pieces: Sequence[bytes]) -> int:
        """How many pieces of a prompt were sent, from its start."""
        for i, piece in enumerate(pieces):
            if piece not in self._pieces:
                return i
        return len(pieces)

    def add(self, pieces: Sequence[bytes]) -> None:
        """Notes a prompt; of one start the longer pieces leave first."""
        for piece in reversed(pieces):
            self._pieces[piece] = None
            self._pieces.move_to_end(piece)
        while len(self._pieces) > self._capacity:
            self._pieces.popitem(last=False)


@dataclasses.dataclass(frozen=True, slots=True)
class Route:
    """Where a request was sent.

    Attributes:
        replica: Number of the replica.
        load: What it counts there until it ends, in tokens.
    """

    replica: int
    load: int


class Router:
    """Chooses replicas, and knows how many tokens are open at each."""

    def __init__(
        self,
        capacities: Sequence[int],
        *,
        piece_tokens: int = PIECE_TOKENS,
        max_lead: float = MAX_LEAD,
        lead_tokens: int = LEAD_TOKENS,
    ) -> None:
        """Begins with idle replicas.

        Args:
            capacities: Tokens that the cache of each replica holds.
            piece_tokens: Tokens of a piece of `prompt_pieces`.
            max_lead: A replica with more than so many times the least load,
            lead_tokens: and that many tokens, is not chosen for its cache.
        """
        self._piece_tokens = piece_tokens
        self._max_lead = max_lead
        self._lead_tokens = lead_tokens
        self._sent = [SentPrefixes(count // piece_tokens) for count in capacities]
        self._loads = [0] * len(capacities)

    @property
    def loads(self) -> Sequence[int]:
        """Tokens of the open requests of each replica."""
        return tuple(self._loads)

    def send(self, pieces: Sequence[bytes], num_tokens: int) -> Route:
        """Chooses for a prompt: the longest cached start, then the least load.

        Args:
            pieces: Of `prompt_pieces`.
            num_tokens: Tokens of the prompt.
        """
        known = [sent.num_known(pieces) for sent in self._sent]
        least = min(self._loads)
        most = self._max_lead * least + self._lead_tokens
        fit = [i for i, load in enumerate(self._loads) if load <= most]
        replica = max(fit, key=lambda i: (known[i], -self._loads[i]))
        cached = known[replica] * self._piece_tokens
        load = num_tokens - cached + REQUEST_TOKENS
        self._loads[replica] += load
        self._sent[replica].add(pieces)
        return Route(replica, load)

    def end(self, route: Route) -> None:
        """Notes that a request has ended."""
        self._loads[route.replica] -= route.load

    def forget(self) -> None:
        """Notes that the caches were emptied."""
        for sent in self._sent:
            sent.clear()
