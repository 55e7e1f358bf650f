"""Responses kept in memory for retrieval, the oldest given up for new ones."""

import collections
import json
from typing import Any


class ResponseStore:
    """Holds finished and running responses, bounded by their number and bytes."""

    def __init__(self, max_responses: int, max_bytes: int) -> None:
        """Starts empty."""
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._entries: collections.OrderedDict[str, tuple[dict[str, Any], int]] = (
            collections.OrderedDict()
        )
        self._num_bytes = 0

    @property
    def is_enabled(self) -> bool:
        """Whether anything is kept."""
        return self._max_responses > 0

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, response_id: str, entry: dict[str, Any]) -> None:
        """Keeps a JSON object, or replaces it; one beyond the bound is not kept."""
        self.delete(response_id)
        size = len(json.dumps(entry))
        if size > self._max_bytes or not self.is_enabled:
            return
        self._entries[response_id] = (entry, size)
        self._num_bytes += size
        while (
            len(self._entries) > self._max_responses
            or self._num_bytes > self._max_bytes
        ):
            self.delete(next(iter(self._entries)))

    def get(self, response_id: str) -> dict[str, Any] | None:
        """Finds an entry, which then is the last to be given up."""
        found = self._entries.get(response_id)
        if found is None:
            return None
        self._entries.move_to_end(response_id)
        return found[0]

    def delete(self, response_id: str) -> bool:
        """Forgets an entry; tells whether there was one."""
        found = self._entries.pop(response_id, None)
        if found is None:
            return False
        self._num_bytes -= found[1]
        return True
