"""Which replica computes a request: the one that has most of its prompt already."""

from collections import OrderedDict
from collections.abc import Sequence

from jllm.scheduler.prefix_cache import Prefix, empty_prefix, longer_prefix

MOST_AHEAD = 8
"""Open requests that a replica may have beyond the least loaded and still get more."""


class ReplicaRouter:
    """Prefers the replica with the longest cached prefix, then the least loaded one.

    It remembers which prefixes it has sent where, as many blocks of each replica as its
    pool has, and forgets those not asked for the longest, as a pool does. No replica is
    asked, so that a prompt is followed to where one that begins alike still waits, and
    replicas may be anywhere. What a replica evicts earlier costs a miss, nothing else.

    A popular prefix does not fill one replica while others idle: a replica that is more
    than `most_ahead` requests ahead of the least loaded gets no more.

    Args:
        num_replicas: Number of replicas, at least one.
        block_size: Tokens per block.
        num_blocks: Blocks in the pool of each replica; 0 if it caches nothing.
        most_ahead: Open requests that a replica may have beyond the least loaded.
    """

    def __init__(
        self,
        num_replicas: int,
        block_size: int,
        num_blocks: int,
        most_ahead: int = MOST_AHEAD,
    ) -> None:
        """Knows of no prefix yet."""
        self._block_size, self._num_blocks = block_size, num_blocks
        self._most_ahead = most_ahead
        self._sent = [OrderedDict[bytes, None]() for _ in range(num_replicas)]

    def route(
        self, prompt: Sequence[int], loads: Sequence[int], salt: str | None = None
    ) -> int:
        """Chooses a replica for a prompt, and remembers that it went there.

        Args:
            prompt: Its tokens.
            loads: Open requests of each replica.
            salt: Prefixes are shared only among requests of equal salt.

        Returns:
            Index of the replica.
        """
        digests = self._digests(prompt, empty_prefix(None, salt))
        least = min(loads)
        replica = min(
            (i for i, load in enumerate(loads) if load - least <= self._most_ahead),
            key=lambda i: (-self._num_known(i, digests), loads[i]),
        )
        self._remember(replica, digests)
        return replica

    def forget(self) -> None:
        """Forgets all prefixes, as the replicas have."""
        for sent in self._sent:
            sent.clear()

    def _digests(self, prompt: Sequence[int], prefix: Prefix) -> list[bytes]:
        size, digests = self._block_size, list[bytes]()
        for start in range(0, len(prompt) - size + 1, size):
            prefix = longer_prefix(prefix, tuple(prompt[start : start + size]))
            digests.append(prefix.digest)
        return digests

    def _num_known(self, replica: int, digests: Sequence[bytes]) -> int:
        sent = self._sent[replica]
        for count, digest in enumerate(digests):
            if digest not in sent:
                return count
        return len(digests)

    def _remember(self, replica: int, digests: Sequence[bytes]) -> None:
        sent = self._sent[replica]
        # The end of a prompt is forgotten before its start, without which it is no use.
        for digest in reversed(digests):
            sent[digest] = None
            sent.move_to_end(digest)
        while len(sent) > self._num_blocks:
            sent.popitem(last=False)
