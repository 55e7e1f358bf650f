"""Which query sees which key, with which score, and in which tiles any does."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from pallas_kernels.common.scores import ScoreOptions

LOG2_E = math.log2(math.e)
MASKED = -1e30
"""Score of a key that a query may not see; finite, so that no NaN can arise."""
LOWEST = -5e29
"""First running maximum: a masked score less this one has the weight zero."""
NOTHING_SEEN = 1e30
"""Log-sum-exp of a query that sees nothing: every weight against it is zero."""


def tanh_by_exp2(x: Array) -> Array:
    """For GPUs, whose own one is either slow or only good to three digits.

    Absolute errors are those of float32, also where the power overflows.
    """
    return 1.0 - 2.0 / (jnp.exp2(x * (2 * LOG2_E)) + 1.0)


class Arrays(NamedTuple):
    """All arrays of the operation."""

    q: Float[Array, "N T H D"]
    k: Float[Array, "N S K D"]
    v: Float[Array, "N S K D"]
    sinks: Float[Array, " H"] | None
    slopes: Float[Array, " H"] | None
    q_segments: Int[Array, "N T"] | None
    kv_segments: Int[Array, "N S"] | None


class Inputs(NamedTuple):
    """The same as a kernel has them: padded, as specifications or as references.

    None for those that there are not.
    """

    q: Any
    k: Any
    v: Any
    sinks: Any
    slopes: Any
    q_segments: Any
    kv_segments: Any

    @classmethod
    def of(
        cls,
        arrays: Arrays,
        planes: tuple[Array, Array, Array],
        q_ids: Callable[[Array], Array],
        kv_ids: Callable[[Array], Array],
    ) -> "Inputs":
        """Those of an operation.

        Args:
            arrays: As the caller gave them.
            planes: Queries, keys and values, prepared.
            q_ids: Prepares segment ids of queries.
            kv_ids: Prepares those of keys.
        """
        q_segments, kv_segments = arrays.q_segments, arrays.kv_segments
        sinks, slopes = arrays.sinks, arrays.slopes
        return cls(
            *planes,
            None if sinks is None else sinks.astype(jnp.float32),
            None if slopes is None else slopes.astype(jnp.float32),
            None if q_segments is None else q_ids(q_segments),
            None if kv_segments is None else kv_ids(kv_segments),
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Rules:
    """What is known of scores and visibility before any array is.

    Attributes:
        num_queries: Rows `T` of the queries.
        num_keys: Rows `S` of the keys.
        causal: Whether queries see no later keys.
        scale: See `ScoreOptions`, as for the following.
        window: See there.
        soft_cap: See there.
    """

    num_queries: int
    num_keys: int
    causal: bool
    scale: float
    window: int | None
    soft_cap: float | None

    @property
    def offset(self) -> int:
        """Position of the first query."""
        return self.num_keys - self.num_queries if self.causal else 0

    def visible(
        self,
        rows: Array,
        columns: Array,
        q_segments: Array | None,
        kv_segments: Array | None,
    ) -> Array:
        """Says for rows and columns, which broadcast, who sees whom."""
        distance = rows + self.offset - columns
        seen = columns < self.num_keys
        if self.causal:
            seen = seen & (distance >= 0)
        if self.window is not None:
            seen = seen & (distance < self.window)
            if not self.causal:
                seen = seen & (distance > -self.window)
        if q_segments is not None:
            seen = seen & (q_segments == kv_segments)
        return seen

    def bias(self, rows: Array, columns: Array) -> Array:
        """What a slope is multiplied by, in float32."""
        distance = rows + self.offset - columns
        return jnp.minimum(distance, 0 - distance).astype(jnp.float32)

    def scores(
        self,
        products: Array,
        bias: Array | None,
        slope: Array | None,
        tanh: Callable[[Array], Array] = jnp.tanh,
    ) -> tuple[Array, Array | None]:
        """Scores times log2(e), and the derivative of the soft cap if there is one."""
        derivative = None
        if self.soft_cap is None:
            scores = products * (self.scale * LOG2_E)
        else:
            bounded = tanh(products * (self.scale / self.soft_cap))
            derivative = 1 - bounded * bounded
            scores = bounded * (self.soft_cap * LOG2_E)
        if bias is not None and slope is not None:
            scores = scores + (slope * LOG2_E) * bias
        return scores, derivative


class Tiles(NamedTuple):
    """Tiles of queries against tiles of keys.

    Attributes:
        live: Whether any query of the tile may see any key of it; `[B, I, J]` with
            one B for all of the batch where there are no segment ids.
        full: Whether all queries see all keys.
        possible: `live` before segment ids are looked at, `[I, J]`.
    """

    live: Any
    full: Any
    possible: np.ndarray

    def transposed(self) -> "Tiles":
        """Tiles of keys against tiles of queries."""
        return Tiles(
            self.live.swapaxes(1, 2), self.full.swapaxes(1, 2), self.possible.T
        )


def make_rules(arrays: Arrays, options: ScoreOptions, *, causal: bool) -> Rules:
    """Collects what is static of a call."""
    return Rules(
        num_queries=arrays.q.shape[1],
        num_keys=arrays.k.shape[1],
        causal=causal,
        scale=options.scale,
        window=options.window,
        soft_cap=options.soft_cap,
    )


def make_tiles(rules: Rules, arrays: Arrays, tile_q: int, tile_k: int) -> Tiles:
    """Finds the tiles that need work; with numpy alone where there are no ids."""
    count, keys = rules.num_queries, rules.num_keys
    rows = np.arange(0, count, tile_q)[:, None] + rules.offset
    columns = np.arange(0, keys, tile_k)[None, :]
    last_row = np.minimum(rows + tile_q, count + rules.offset) - 1
    last_column = np.minimum(columns + tile_k, keys) - 1
    least, most = rows - last_column, last_row - columns  # distances in a tile
    live = np.ones(least.shape, bool)
    full = live & (columns + tile_k <= keys)
    if rules.causal:
        live, full = live & (most >= 0), full & (least >= 0)
    if rules.window is not None:
        live, full = live & (least < rules.window), full & (most < rules.window)
        if not rules.causal:
            live, full = live & (most > -rules.window), full & (least > -rules.window)
    if arrays.q_segments is None or arrays.kv_segments is None:
        return Tiles(live[None], full[None], live)
    q_least, q_most = _extremes(arrays.q_segments, tile_q)
    kv_least, kv_most = _extremes(arrays.kv_segments, tile_k)
    q_least, q_most = q_least[:, :, None], q_most[:, :, None]
    kv_least, kv_most = kv_least[:, None, :], kv_most[:, None, :]
    meet = (q_most >= kv_least) & (kv_most >= q_least)
    same = (q_least == q_most) & (kv_least == kv_most) & (q_least == kv_least)
    return Tiles(meet & live[None], same & full[None], live)


def _extremes(ids: Int[Array, "N T"], tile: int) -> tuple[Array, Array]:
    """Least and greatest id of each tile."""
    padded = jnp.pad(ids, ((0, 0), (0, -ids.shape[1] % tile)), mode="edge")
    tiled = padded.reshape(ids.shape[0], -1, tile)
    return tiled.min(axis=-1), tiled.max(axis=-1)


def live_ranges(tiles: Tiles) -> Int[Array, "B I 4"]:
    """For each tile of rows: first, first full, end of full, end.

    The live tiles of columns lie in `first ... end`; those from the second number to
    the third are full. Full ones outside that run count as partly masked.
    """
    live, full = tiles.live, tiles.full & tiles.live
    xp: Any = np if isinstance(live, np.ndarray) else jnp
    some = live.any(-1)
    first = xp.where(some, live.argmax(-1), 0)
    end = xp.where(some, live.shape[-1] - live[..., ::-1].argmax(-1), 0)
    full_first = xp.where(full.any(-1), full.argmax(-1), end)
    gaps = (~full).cumsum(-1)
    at_first = xp.take_along_axis(
        gaps, xp.minimum(full_first, live.shape[-1] - 1)[..., None], -1
    )
    run = (full & (gaps == at_first)).sum(-1)
    numbers = [first, full_first, full_first + run, end]
    return jnp.asarray(xp.stack(numbers, -1).astype(np.int32))


FIRST, LAST, FULL, PARTIAL = 1, 2, 4, 8
COLUMN_SHIFT, ROW_SHIFT = 4, 18
MAX_ROWS, MAX_COLUMNS = 1 << 13, 1 << 14


def live_pairs(tiles: Tiles) -> Int[Array, "B L"]:
    """Lists the live pairs of tiles, row by row, as numbers with flags.

    Every row has one pair at least, so that every row is written. A list that segment
    ids shorten repeats its last pair, without flags.
    """
    possible = tiles.possible.copy()
    num_rows, num_columns = possible.shape
    if num_rows > MAX_ROWS or num_columns > MAX_COLUMNS:
        raise NotImplementedError(f"{num_rows} x {num_columns} tiles are too many")
    spare = np.zeros_like(possible)
    spare[np.arange(num_rows), possible.argmax(-1)] = True
    rows, columns = (x.astype(np.int32) for x in np.nonzero(possible | spare))
    xp: Any = np if isinstance(tiles.live, np.ndarray) else jnp
    live = (tiles.live | spare[None])[:, rows, columns]
    full = (tiles.full & tiles.live)[:, rows, columns]
    order = xp.argsort(~live, axis=-1, stable=True)
    count = live.sum(-1)[:, None]
    place = np.arange(len(rows), dtype=np.int32)[None, :]
    order = xp.take_along_axis(order, xp.minimum(place, count - 1), -1)
    row, column = xp.asarray(rows)[order], xp.asarray(columns)[order]
    full = xp.take_along_axis(full, order, -1)
    edge = xp.ones_like(row[:, :1], dtype=bool)
    changes = row[:, 1:] != row[:, :-1]
    first = xp.concatenate([edge, changes], -1)
    last = xp.concatenate([changes, edge], -1) | (place == count - 1)
    flags = xp.where(full, FULL, PARTIAL) | xp.where(first, FIRST, 0)
    flags = flags | xp.where(last, LAST, 0)
    flags = xp.where(place < count, flags, 0)
    numbers = (row << ROW_SHIFT) | (column << COLUMN_SHIFT) | flags
    return jnp.asarray(numbers.astype(np.int32))
