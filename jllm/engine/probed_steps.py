"""Steps that look at, or change, activations of some of their rows.

They compute what `jllm.engine.steps` does, with the same sizes and the same input, and
return the activations that are captured beside the result. What is captured and which
functions edit is compiled in; whose tokens are edited, where, and with which argument
is input.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Int, Shaped

from jllm.engine.inputs import InputLayout, split_vector
from jllm.engine.state import EngineState, Leaf
from jllm.engine.steps import StepResult, decode_step, prefill_step
from jllm.models.base import Batch, KVCache, Model, Weights
from jllm.models.probe import matching
from jllm.sampling.draws import DrawMethod


@dataclasses.dataclass(frozen=True, slots=True)
class EditPoint:
    """One edit, without its argument.

    Attributes:
        pattern: Activations that it changes.
        function: What takes their place.
        shape: Shape of its argument; None where it takes none.
        dtype: Type of the argument.
    """

    pattern: str
    function: Callable[..., Any]
    shape: tuple[int, ...] | None
    dtype: str


EditGroup = tuple[EditPoint, ...]
"""The edits of one request in their order."""


@dataclasses.dataclass(frozen=True, slots=True)
class ProbeSet:
    """What is compiled into a probed program.

    Attributes:
        capture: Names of the activations that it returns.
        groups: The edits that it can apply; a row follows one group, or none.
    """

    capture: tuple[str, ...] = ()
    groups: tuple[EditGroup, ...] = ()

    def covers(self, other: "ProbeSet") -> bool:
        """Whether programs for this set do for the other one."""
        has_names = set(other.capture) <= set(self.capture)
        return has_names and set(other.groups) <= set(self.groups)


class GroupInput(NamedTuple):
    """Which rows of the table follow a group of edits.

    Attributes:
        spans: First edited position and the one after the last, for each point of the
            group; both zero for a row that does not follow it.
        arguments: The argument of each row for each point that takes one.
    """

    spans: Leaf  # i32[R, N, 2]
    arguments: tuple[Leaf, ...]  # [R, ...] each


def probed_step(
    model: Model,
    layout: InputLayout,
    method: DrawMethod,
    probes: ProbeSet,
    weights: Weights,
    state: EngineState,
    vector: Int[Array, " I"],
    groups: Sequence[GroupInput],
) -> tuple[EngineState, StepResult]:
    """Does what `decode_step` or `prefill_step` does, and captures and edits.

    Donates: state.

    Args:
        model: The network.
        layout: Of the input, which says what kind of step it is.
        method: How tokens are drawn.
        probes: What is captured and which functions edit.
        weights: Arrays of the model.
        state: Device state.
        vector: The input.
        groups: Who is edited, for each group of `probes`.
    """
    captured: dict[str, Array] = {}
    rows = split_vector(layout, vector)["rows"]

    def forward(
        weights: Weights, kv: KVCache, batch: Batch
    ) -> tuple[Array, tuple[Array, ...]]:
        edits = _edits(model, probes, _token_rows(batch, rows), groups)
        hidden, kv, seen = model.forward(
            weights, kv, batch, capture=probes.capture, edit=edits
        )
        captured.update(seen)
        return hidden, kv

    step = decode_step if layout.kind == "decode" else prefill_step
    state, result = step(model, layout, method, weights, state, vector, forward)
    return state, dataclasses.replace(result, captured=captured)


class _TokenRows(NamedTuple):
    """Whose the tokens of a step are.

    Attributes:
        rows: Row of the table, clipped to it.
        positions: Position in the sequence.
        used: Whether the token is any row's.
    """

    rows: Int[Array, " T"]
    positions: Int[Array, " T"]
    used: Bool[Array, " T"]


def _token_rows(batch: Batch, row_ids: Int[Array, " S"]) -> _TokenRows:
    tokens = jnp.arange(batch.tokens.shape[0], dtype=jnp.int32)
    ends = batch.row_starts[1:]
    owners = jnp.sum(tokens[:, None] >= ends[None, :], axis=1, dtype=jnp.int32)
    used = owners < ends.shape[0]
    rows = row_ids[jnp.minimum(owners, ends.shape[0] - 1)]
    return _TokenRows(rows, batch.positions, used)


def _edits(
    model: Model, probes: ProbeSet, tokens: _TokenRows, groups: Sequence[GroupInput]
) -> dict[str, Callable[[Array], Array]]:
    """One function for each activation that any group edits."""
    points: dict[str, list[_Point]] = {}
    for group, given in zip(probes.groups, groups, strict=True):
        arguments = iter(given.arguments)
        for index, point in enumerate(group):
            argument = None if point.shape is None else next(arguments)
            own = _Point(point.function, given.spans[:, index], argument)
            for name in matching(point.pattern, model.activations, "edit"):
                points.setdefault(name, []).append(own)
    return {name: _edit(name, tokens, of_name) for name, of_name in points.items()}


class _Point(NamedTuple):
    """An edit of one activation with the spans and arguments of all rows."""

    function: Callable[..., Any]
    spans: Array
    argument: Array | None


def _edit(
    name: str, tokens: _TokenRows, points: Sequence[_Point]
) -> Callable[[Array], Array]:
    def edit(value: Array) -> Array:
        for point in points:
            spans = point.spans.at[tokens.rows].get(mode="fill", fill_value=0)
            follows = spans[:, 0] <= tokens.positions
            follows &= tokens.positions < spans[:, 1]
            mask = (tokens.used & follows).reshape(-1, *[1] * (value.ndim - 1))
            value = jnp.where(mask, _changed(name, point, value, tokens.rows), value)
        return value

    return edit


def _changed(
    name: str, point: _Point, value: Array, rows: Int[Array, " T"]
) -> Shaped[Array, "T ..."]:
    """What the function makes of each token, whoever it belongs to."""
    arguments: tuple[Array, ...] = ()
    if point.argument is not None:
        own = point.argument.at[rows].get(mode="clip")
        if jnp.issubdtype(own.dtype, jnp.floating):
            own = own.astype(value.dtype)
        arguments = (own,)

    def change(token: Array, *argument: Array) -> Array:
        changed = point.function(token[None], *argument)
        if (changed.shape, changed.dtype) != ((1, *token.shape), token.dtype):
            raise ValueError(
                f"edit[{name!r}] makes {changed.dtype}{list(changed.shape)} of "
                f"{token.dtype}{[1, *token.shape]}, whose shape and type it must keep"
            )
        return changed[0]

    return jax.vmap(change)(value, *arguments)
