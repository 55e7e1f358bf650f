"""Command-line flags made from the fields of a dataclass."""

import argparse
import dataclasses
import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal


def add_flags(
    group: Any,
    owner: type,
    *,
    leave_out: Sequence[str] = (),
    renamed: Mapping[str, str] | None = None,
) -> None:
    """Adds a flag per field; a flag that is not given leaves no trace.

    A field with `flag` false in its metadata has none.

    Strings of a list come by repeating the flag, numbers with commas, a mapping as
    JSON, a boolean as `--flag` or `--no-flag`. `None` is written "none". A field's
    metadata may give a help text, and a short flag; one with `positional` there stands
    without a flag, once or more, under that name.

    Args:
        group: Parser or argument group.
        owner: The dataclass.
        leave_out: Fields without a flag.
        renamed: Field to flag name, where that is not the field's own.
    """
    docs = _attribute_docs(owner)
    for field in dataclasses.fields(owner):
        if field.name in leave_out or not field.metadata.get("flag", True):
            continue
        name = (renamed or {}).get(field.name, field.name).replace("_", "-")
        text = field.metadata.get("help") or docs.get(field.name, "")
        short = field.metadata.get("short")
        text = text.replace("%", "%%")
        if "positional" in field.metadata:
            group.add_argument(
                _destination(owner, field.name),
                nargs="+",
                metavar=field.metadata["positional"],
                help=text,
            )
            continue
        group.add_argument(
            *((short,) if short else ()),
            f"--{name}",
            dest=_destination(owner, field.name),
            default=argparse.SUPPRESS,
            help=text,
            **_argument(field),
        )


def given_values(options: argparse.Namespace, owner: type) -> dict[str, Any]:
    """The fields of the dataclass whose flags were given."""
    return {
        field.name: getattr(options, _destination(owner, field.name))
        for field in dataclasses.fields(owner)
        if hasattr(options, _destination(owner, field.name))
    }


def _destination(owner: type, field: str) -> str:
    """Two dataclasses may have fields of the same name."""
    return f"{owner.__name__}.{field}"


def _argument(field: dataclasses.Field[Any]) -> dict[str, Any]:
    """How argparse reads a value of the field's type."""
    kinds = _kinds(field.type)
    metavar = field.name.split("_")[-1].upper()
    if bool in kinds:
        return {"action": argparse.BooleanOptionalAction}
    for kind in kinds:
        if typing.get_origin(kind) is Literal:
            return {"choices": typing.get_args(kind)}
        if typing.get_origin(kind) is dict:
            return {"type": _reader(_mapping, kinds), "metavar": "JSON"}
        if kind == Sequence[str]:
            return {"action": "append", "metavar": "TEXT"}
        if kind == Sequence[int]:
            return {"type": _reader(_integers, kinds), "metavar": "IDS"}
    kind = next(kind for kind in kinds if kind is not type(None))
    return {"type": _reader(kind, kinds), "metavar": metavar}


def _kinds(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, or the one type."""
    if isinstance(annotation, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def _reader(read: Callable[[str], Any], kinds: Sequence[Any]) -> Callable[[str], Any]:
    """Reads "none" too where the field may be None."""

    def reader(text: str) -> Any:
        if type(None) in kinds and text.lower() == "none":
            return None
        return read(text)

    # argparse names the type in its message.
    reader.__name__ = getattr(read, "__name__", "value").strip("_")
    return reader


def _integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _mapping(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise TypeError
    return value


def _attribute_docs(owner: type) -> dict[str, str]:
    """Reads the section "Attributes" of a docstring: field to its text."""
    section = inspect.cleandoc(owner.__doc__ or "").partition("Attributes:\n")[2]
    entries = re.findall(r"^ {4}(\w+): ((?:.+\n?)(?: {8}.+\n?)*)", section, re.M)
    return {name: " ".join(text.split()) for name, text in entries}
