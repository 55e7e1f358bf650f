"""What one request captures and edits of the activations of its tokens."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from jllm.checks import string_list, wrong
from jllm.errors import InvalidRequestError

MAX_ARGUMENT_SIZE = 2**20
"""Numbers in the argument of an edit; each row of the device has a place for one."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Edit:
    """A pure function put in the place of an activation, for the tokens of one request.

    The function takes the activation of some tokens, `[N, …]` as `forward` has it, and
    gives an array of the same shape and type. It is applied to each token by itself,
    so that what it does cannot depend on how a prompt is cut into chunks.

    Programs are compiled for functions, not for arguments: requests that give the same
    function object, and arguments of one shape and type, share a program.

    Attributes:
        function: Called with the activation, and with the argument if there is one.
        argument: An array or a number; numbers with a point take the activation's type.
        positions: Positions of the sequence that are edited, such as `range(5, 6)`;
            None for all, prompt and output.

    Raises:
        InvalidRequestError: A field is wrong; names it.
    """

    function: Callable[..., Any]
    argument: Any = None
    positions: range | None = None

    def __post_init__(self) -> None:
        """Checks the fields, and makes the argument an array."""
        if not callable(self.function):
            raise wrong("edit", self.function, "must be a function")
        try:
            hash(self.function)
        except TypeError as error:
            raise wrong("edit", self.function, "must be hashable") from error
        positions = self.positions
        if positions is not None and (
            not isinstance(positions, range)  # pyright: ignore[reportUnnecessaryIsInstance]
            or positions.step != 1
            or positions.start < 0
        ):
            rule = "must be a range of step 1 from 0 or more on"
            raise wrong("positions", positions, rule)
        if self.argument is not None:
            object.__setattr__(self, "argument", _array(self.argument))

    @property
    def span(self) -> tuple[int, int]:
        """First position that is edited, and the one after the last."""
        if self.positions is None:
            return 0, 2**31 - 1
        return self.positions.start, min(self.positions.stop, 2**31 - 1)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Probes:
    """What one request looks at and changes.

    Attributes:
        capture: Names, or patterns of names, of the activations that it gets.
        edit: What changes which, by name or pattern; several edits of one activation
            follow each other.
    """

    capture: tuple[str, ...] = ()
    edit: Mapping[str, Edit] = dataclasses.field(default_factory=dict[str, Edit])


def make_probes(capture: Any, edit: Any) -> Probes | None:
    """Checks what a request is given; None where it captures and edits nothing.

    Args:
        capture: A name or a sequence of names; None for none.
        edit: A mapping from names to `Edit` or to functions of the activation alone;
            None for none.

    Raises:
        InvalidRequestError: One of them is of another form.
    """
    names = string_list("capture", () if capture is None else capture)
    if edit is not None and not isinstance(edit, Mapping):
        raise wrong("edit", edit, "must map names of activations to functions")
    given = cast(Mapping[Any, Any], edit or {})
    edits: dict[str, Edit] = {}
    for name, value in given.items():
        if not isinstance(name, str):
            raise wrong("edit", name, "must be the name of an activation")
        edits[name] = value if isinstance(value, Edit) else Edit(value)
    return Probes(names, edits) if names or edits else None


def probes_each(capture: Any, edit: Any, count: int) -> list[Probes | None]:
    """Spreads what is captured and edited over all prompts, or takes one for each.

    Args:
        capture: A sequence of names for all, or a list with such a sequence, or None,
            for each prompt.
        edit: A mapping for all, or a list with one, or None, for each prompt.
        count: Number of prompts.

    Raises:
        InvalidRequestError: A list has another length, or an entry another form.
    """
    has_each = not isinstance(capture, str) and isinstance(capture, Sequence)
    if has_each and all(isinstance(item, str) for item in capture):
        has_each = False
    captures = _each("capture", capture, count, has_each=has_each)
    edits = _each("edit", edit, count, has_each=isinstance(edit, (list, tuple)))
    return [make_probes(*pair) for pair in zip(captures, edits, strict=True)]


def _each(name: str, value: Any, count: int, *, has_each: bool) -> list[Any]:
    if not has_each:
        return [value] * count
    if len(value) != count:
        raise InvalidRequestError(
            f"{name} has {len(value)} entries, but there are {count} prompts",
            parameter=name,
        )
    return list(value)


def _array(value: Any) -> Any:
    """The argument as the device takes it: at most 32 bits wide, and a copy."""
    import numpy as np

    try:
        array = np.array(value)
    except ValueError as error:
        raise wrong("argument", value, "must be an array or a number") from error
    narrow = {"float64": np.float32, "int64": np.int32, "uint64": np.uint32}
    array = array.astype(narrow.get(array.dtype.name, array.dtype))
    if array.dtype.kind not in "biufV":
        raise wrong("argument", value, "must be an array or a number")
    if array.size > MAX_ARGUMENT_SIZE:
        size = f"<{array.size} numbers>"
        raise wrong("argument", size, f"must hold at most {MAX_ARGUMENT_SIZE}")
    return array
