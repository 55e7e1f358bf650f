"""Functions of the user that change the scores of every token, as they are declared."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jllm.errors import ConfigError, InvalidRequestError

NUMBER_TYPES = ("float32", "int32", "bool")


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class LogitsProcessor:
    """A pure JAX function `f(logits, rows, params)`, compiled into the sampler program.

    It takes the model's scores `logits` f32[S, V] of the rows of a step, `V` being the
    vocabulary without padding; `rows`, a `jllm.sampling.processors.ProcessorRows` with
    positions, prompt lengths and tokens so far; and `params`, a mapping from the name
    of each argument to an array `[S, …]` with that of each row. It gives scores of the
    same shape and type, minus infinity for a token that must not be drawn. Every rule
    of the sampling parameters is applied after it.

    Attributes:
        function: The function. It must treat each row by itself.
        defaults: By name the arguments that a request may give in
            `SamplingParams.extra_args`: what is taken where it does not. Shape and type
            (float32, int32 or bool) are those that all requests must keep.

    Raises:
        ConfigError: A field is of another form.
    """

    function: Callable[..., Any]
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        """Checks the fields, and makes the defaults arrays."""
        if not callable(self.function):
            raise ConfigError(
                f"logits_processors: {self.function!r} must be a function"
            )
        defaults: dict[str, Any] = {}
        for name, value in self.defaults.items():
            array = _narrow(value)
            if array.dtype.name not in NUMBER_TYPES:
                raise ConfigError(
                    f"logits_processors: the default of {name!r} is {array.dtype}, "
                    f"must be one of {', '.join(NUMBER_TYPES)}"
                )
            defaults[name] = array
        object.__setattr__(self, "defaults", defaults)


def make_processors(values: Any) -> tuple[LogitsProcessor, ...]:
    """Takes functions and declared processors in their order.

    Raises:
        ConfigError: It is no list, or two arguments have one name.
    """
    if not isinstance(values, Iterable) or isinstance(values, (str, Mapping)):
        raise ConfigError(f"logits_processors={values!r} must be a list of functions")
    processors = tuple(
        value if isinstance(value, LogitsProcessor) else LogitsProcessor(value)
        for value in values
    )
    names = [name for own in processors for name in own.defaults]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(
                f"logits_processors: two of them have an argument {name!r}"
            )
    return processors


def argument_defaults(processors: Iterable[LogitsProcessor]) -> dict[str, Any]:
    """The arguments of all processors by name, in their order."""
    return {name: value for own in processors for name, value in own.defaults.items()}


def check_arguments(
    given: Mapping[str, Any] | None, defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of one request, with defaults for those that it does not give.

    Raises:
        InvalidRequestError: One is unknown, or of another shape or type; names it.
    """
    if not given:
        return dict(defaults)
    import numpy as np

    found = dict(defaults)
    for name, value in given.items():
        if name not in defaults:
            known = ", ".join(defaults) or "none"
            raise _wrong(f"has no argument {name!r}; there are: {known}")
        expected = defaults[name]
        array = _narrow(value)
        # A whole number does where one with a point is wanted.
        if not np.can_cast(array.dtype, expected.dtype, "same_kind"):
            raise _wrong(f"{name!r} is {array.dtype}, must be {expected.dtype}")
        if array.shape != expected.shape:
            shapes = f"{list(array.shape)}, must be {list(expected.shape)}"
            raise _wrong(f"{name!r} has shape {shapes}")
        found[name] = array.astype(expected.dtype)
    return found


def _narrow(value: Any) -> Any:
    """An array of at most 32 bits, and a copy."""
    import numpy as np

    array = np.array(value)
    narrow = {"float64": np.float32, "int64": np.int32}
    return array.astype(narrow.get(array.dtype.name, array.dtype))


def _wrong(message: str) -> InvalidRequestError:
    return InvalidRequestError(f"extra_args: {message}", parameter="extra_args")
