"""Responses kept in memory for retrieval, the oldest given up for new ones."""

import collections
import dataclasses
import json
from typing import Any


class ResponseStore:
    """Holds finished and running responses, bounded by their number and bytes.

    A running one is not given up: somebody wants to retrieve or cancel it.
    """

    def __init__(self, max_responses: int, max_bytes: int) -> None:
        """Starts empty."""
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._entries: collections.OrderedDict[str, _Kept] = collections.OrderedDict()
        self._num_bytes = 0
        self._num_running = 0

    @property
    def is_enabled(self) -> bool:
        """Whether anything is kept."""
        return self._max_responses > 0

    def __len__(self) -> int:
        return len(self._entries)

    def put(
        self, response_id: str, entry: dict[str, Any], *, is_running: bool = False
    ) -> bool:
        """Keeps a JSON object, or replaces it.

        Returns:
            Whether it is kept: running ones may leave no room, and one beyond the bound
            of bytes has none.
        """
        self.delete(response_id)
        size = len(json.dumps(entry))
        is_too_many = self._num_running >= self._max_responses
        if size > self._max_bytes or is_too_many:
            return False
        self._entries[response_id] = _Kept(entry, size, is_running)
        self._num_bytes += size
        self._num_running += is_running
        self._give_up(response_id)
        return True

    def get(self, response_id: str) -> dict[str, Any] | None:
        """Finds an entry, which then is the last to be given up."""
        found = self._entries.get(response_id)
        if found is None:
            return None
        self._entries.move_to_end(response_id)
        return found.entry

    def delete(self, response_id: str) -> bool:
        """Forgets an entry; tells whether there was one."""
        found = self._entries.pop(response_id, None)
        if found is None:
            return False
        self._num_bytes -= found.size
        self._num_running -= found.is_running
        return True

    def _give_up(self, newest: str) -> None:
        """Forgets the oldest that do not run, until the rest is within the bounds."""
        for name, kept in list(self._entries.items()):
            is_within = (
                len(self._entries) <= self._max_responses
                and self._num_bytes <= self._max_bytes
            )
            if is_within:
                return
            if not kept.is_running and name != newest:
                self.delete(name)


@dataclasses.dataclass(frozen=True, slots=True)
class _Kept:
    entry: dict[str, Any]
    size: int
    is_running: bool
