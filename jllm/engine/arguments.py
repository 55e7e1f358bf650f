"""Arguments of the logits processors, for all rows of the device table."""

from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np


class ArgumentTables:
    """One table per argument; all go to the device again when a row's have changed.

    Args:
        defaults: The arguments by name, with what rows have that give none.
        num_rows: Rows `R` of each table.
        upload: Sends an array to the device.
    """

    def __init__(
        self,
        defaults: Mapping[str, np.ndarray],
        num_rows: int,
        upload: Callable[[np.ndarray], jax.Array],
    ) -> None:
        """Begins with defaults in all rows."""
        own = tuple(defaults.values())
        self._upload = upload
        self._owners = [own] * num_rows
        self._tables = [np.array(np.broadcast_to(x, (num_rows, *x.shape))) for x in own]
        self._placed: tuple[jax.Array, ...] | None = None

    def place(
        self, rows: Sequence[int], arguments: Sequence[tuple[np.ndarray, ...]]
    ) -> tuple[jax.Array, ...]:
        """The tables on the device, right for these rows; none without arguments."""
        if not self._tables:
            return ()
        for row, own in zip(rows, arguments, strict=True):
            before = self._owners[row]
            if any(a is not b for a, b in zip(before, own, strict=True)):
                self._owners[row] = own
                self._placed = None
                for table, value in zip(self._tables, own, strict=True):
                    table[row] = value
        if self._placed is None:
            # Copies, since a transfer may alias the buffer that is changed next time.
            self._placed = tuple(self._upload(table.copy()) for table in self._tables)
        return self._placed
