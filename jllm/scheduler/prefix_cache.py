"""Which block holds the KV of which tokens: a hash chain over full blocks.

Two contexts may share a block only if all their tokens up to its end are equal, and
their adapter and salt too. A digest finds the candidate; whether it is the right one is
decided by comparing the tokens, so that a collision of digests costs a miss and never a
wrong answer.
"""

import array
import dataclasses
import hashlib

DIGEST_BYTES = 16

Namespace = tuple[str | None, str | None, int]
"""Adapter, salt and revision of the weights; only equal ones share blocks."""


@dataclasses.dataclass(slots=True, eq=False)
class Prefix:
    """The start of a context, a whole number of blocks long; a linked list.

    Never changed; it is not frozen, which would make it three times as slow to make.

    Attributes:
        digest: Hash of everything below, through the chain.
        tokens: Tokens of its last block; empty for the empty prefix.
        parent: The prefix one block shorter, None for the empty one.
        namespace: Adapter, salt and revision of the weights.
    """

    digest: bytes
    tokens: tuple[int, ...]
    parent: "Prefix | None" = dataclasses.field(repr=False)
    namespace: Namespace

    def equals(self, other: "Prefix") -> bool:
        """Whether the contexts are equal, token by token, whatever the digests say."""
        left, right = self, other
        while left is not right:
            if left.tokens != right.tokens or left.namespace != right.namespace:
                return False
            if left.parent is None or right.parent is None:
                return left.parent is right.parent
            left, right = left.parent, right.parent
        return True


def digest(parent: bytes, content: bytes) -> bytes:
    """Hashes one link of the chain with BLAKE2b."""
    return hashlib.blake2b(parent + content, digest_size=DIGEST_BYTES).digest()


def empty_prefix(adapter: str | None, salt: str | None, revision: int = 0) -> Prefix:
    """Makes the start of all chains of one adapter, salt and revision."""
    namespace = (adapter, salt, revision)
    return Prefix(digest(b"", repr(namespace).encode()), (), None, namespace)


def longer_prefix(parent: Prefix, tokens: tuple[int, ...]) -> Prefix:
    """Makes the prefix that is one block of `tokens` longer than `parent`."""
    content = array.array("q", tokens).tobytes()
    return Prefix(digest(parent.digest, content), tokens, parent, parent.namespace)


class PrefixCache:
    """Finds blocks by content. It knows nothing of who uses them."""

    def __init__(self) -> None:
        """Starts empty."""
        self._block_of: dict[bytes, int] = {}
        self._prefix_of: dict[int, Prefix] = {}

    def __len__(self) -> int:
        """Number of blocks that can be found."""
        return len(self._prefix_of)

    def __contains__(self, block: int) -> bool:
        """Whether the block can be found."""
        return block in self._prefix_of

    def find(self, prefix: Prefix) -> tuple[int, Prefix] | None:
        """Finds the block with the KV of a prefix's last block.

        Returns:
            The block, and the cache's own object for the prefix: a chain built on it
            compares in one step. None if there is no such block.
        """
        block = self._block_of.get(prefix.digest)
        if block is None:
            return None
        cached = self._prefix_of[block]
        return (block, cached) if cached.equals(prefix) else None

    def insert(self, block: int, prefix: Prefix) -> None:
        """Makes a block findable; without effect if its content already is."""
        if prefix.digest not in self._block_of and block not in self._prefix_of:
            self._block_of[prefix.digest] = block
            self._prefix_of[block] = prefix

    def remove(self, block: int) -> None:
        """Forgets a block whose content is about to change."""
        del self._block_of[self._prefix_of.pop(block).digest]

    def check_integrity(self) -> None:
        """Raises AssertionError unless the two directions agree."""
        assert len(self._block_of) == len(self._prefix_of)
        for block, prefix in self._prefix_of.items():
            assert self._block_of[prefix.digest] == block
