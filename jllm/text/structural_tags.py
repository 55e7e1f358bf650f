"""Structural tags, vLLM's and XGrammar's description of text with constrained parts.

They are written out as one grammar in llguidance's dialect of Lark.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jllm.errors import InvalidRequestError

ANY_TEXT = r"/(.|\n)*/"

Format = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Rewriting:
    """How the parts of a tag are written in the grammar.

    Attributes:
        special_tokens: Text and id of the tokens that are never part of a text.
        schema: Makes a JSON schema fit for llguidance.
        regex: Makes a regular expression fit to stand between slashes.
    """

    special_tokens: Mapping[str, int]
    schema: Callable[[Any], Any]
    regex: Callable[[str], str]


def structural_tag_grammar(tag: Format, rewriting: Rewriting) -> str:
    """A grammar for llguidance: the JSON text of its list of grammars.

    Args:
        tag: Either `{"structures": [{"begin", "schema", "end"}], "triggers": [...]}`,
            or `{"type": "structural_tag", "format": {...}}`.
        rewriting: How its parts are written.

    Raises:
        InvalidRequestError: A part is missing, of a wrong type or not supported.
    """
    writer = _Writer(rewriting)
    start = writer.write(_legacy(tag) if "structures" in tag else _need(tag, "format"))
    rules = "\n".join([f"start: {start}", f"TEXT: {ANY_TEXT}", *writer.rules])
    grammars = [{"lark_grammar": "%llguidance {}\n" + rules}, *writer.grammars]
    return json.dumps({"grammars": grammars}, ensure_ascii=False)


class _Writer:
    """Collects rules; each method returns an expression."""

    def __init__(self, rewriting: Rewriting) -> None:
        self.rules: list[str] = []
        self.grammars: list[dict[str, str]] = []
        # Longest first, so that one that begins another does not hide it.
        special = rewriting.special_tokens.items()
        self._special = dict(sorted(special, key=lambda item: -len(item[0])))
        self._rewriting = rewriting
        self._writers: dict[str, Callable[[Format], str]] = {
            "const_string": lambda f: self._literal(_text(f, "value")),
            "json_schema": lambda f: self._schema(_need(f, "json_schema")),
            "regex": lambda f: f"/{rewriting.regex(_text(f, 'pattern'))}/",
            "grammar": lambda f: self._grammar(_text(f, "grammar")),
            "any_text": lambda _: "TEXT",
            "sequence": lambda f: " ".join(map(self.write, _items(f, "elements"))),
            "or": lambda f: self._any_of(map(self.write, _items(f, "elements"))),
            "tag": self._tag,
            "triggered_tags": self._triggered_tags,
            "tags_with_separator": self._tags_with_separator,
        }

    def write(self, part: Any) -> str:
        """The expression of one format."""
        if not isinstance(part, Mapping):
            raise _fail(f"holds {part!r} where a format must stand")
        kind = _text(part, "type")
        write = self._writers.get(kind)
        if write is None:
            known = ", ".join(self._writers)
            raise _fail(f"has the unsupported type {kind!r}; known are {known}")
        return self._rule(write(part))

    def _rule(self, body: str, options: str = "") -> str:
        name = f"r{len(self.rules)}"
        self.rules.append(f"{name}{options}: {body}")
        return name

    def _literal(self, text: str) -> str:
        """Text in quotes, special tokens by their ids."""
        parts: list[str] = []
        plain = ""
        while text:
            special = next((s for s in self._special if text.startswith(s)), None)
            if special is None:
                plain, text = plain + text[0], text[1:]
                continue
            parts += [_quoted(plain), f"<[{self._special[special]}]>"]
            plain, text = "", text[len(special) :]
        return " ".join(part for part in [*parts, _quoted(plain)] if part)

    def _schema(self, schema: Any) -> str:
        if not isinstance(schema, (Mapping, bool)):
            raise _fail("must hold schemas as JSON objects")
        prepared = self._rewriting.schema(schema)
        return "%json " + json.dumps(prepared, ensure_ascii=False)

    def _grammar(self, source: str) -> str:
        name = f"g{len(self.grammars)}"
        self.grammars.append({"name": name, "lark_grammar": source})
        return "@" + name

    @staticmethod
    def _any_of(names: Any) -> str:
        return "(" + " | ".join(names) + ")"

    def _tag(self, part: Format) -> str:
        begin = self._literal(_text(part, "begin"))
        return f"{begin} {self._content_and_end(part)}"

    def _content_and_end(self, part: Format) -> str:
        """What follows the begin of a tag: its content up to one of its ends."""
        content = _need(part, "content")
        ends = _need(part, "end")
        ends = [ends] if isinstance(ends, str) else ends
        if not isinstance(ends, Sequence) or not all(isinstance(e, str) for e in ends):
            raise _fail("must hold a string or a list of strings as end of a tag")
        if isinstance(content, Mapping) and content.get("type") == "any_text":
            return self._any_of(self._text_until(end) for end in ends)
        closes = [self._rule(self._literal(end)) for end in ends]
        return f"{self.write(content)} {self._any_of(closes)}"

    def _text_until(self, end: str) -> str:
        """Free text up to a string, which is taken where it first appears."""
        literal = self._literal(end)
        if not literal:
            return "TEXT"
        if literal.startswith("<["):
            return self._rule(f"TEXT {literal}")
        first, _, rest = literal.partition(" <[")
        head = self._rule(f"TEXT {first}", "[lazy]")
        return self._rule(f"{head} <[{rest}" if rest else head)

    def _triggered_tags(self, part: Format) -> str:
        triggers = _items(part, "triggers")
        names: list[str] = []
        for tag in _items(part, "tags"):
            begin = _text(tag, "begin")
            trigger = next((t for t in triggers if begin.startswith(str(t))), None)
            if not trigger or not isinstance(trigger, str):
                raise _fail(f"has no trigger for the begin {begin!r}")
            head = self._text_until(trigger)
            rest = self._literal(begin[len(trigger) :])
            names.append(self._rule(f"{head} {rest} {self._content_and_end(tag)}"))
        tags = self._any_of(names)
        if part.get("stop_after_first"):
            return tags if part.get("at_least_one") else f"({tags} | TEXT)"
        return f"{tags}{'+' if part.get('at_least_one') else '*'} TEXT"

    def _tags_with_separator(self, part: Format) -> str:
        tags = self._any_of(map(self.write, _items(part, "tags")))
        separator = self._literal(_text(part, "separator"))
        many = tags if part.get("stop_after_first") else f"{tags} ({separator} {tags})*"
        return f"({many})" if part.get("at_least_one") else f"({many})?"


def _legacy(tag: Format) -> Format:
    """The older form as `triggered_tags`."""
    tags = [
        {
            "begin": _text(item, "begin"),
            "content": {"type": "json_schema", "json_schema": _need(item, "schema")},
            "end": _need(item, "end"),
        }
        for item in _items(tag, "structures")
    ]
    triggers = _items(tag, "triggers")
    return {"type": "triggered_tags", "triggers": triggers, "tags": tags}


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text else ""


def _need(part: Any, key: str) -> Any:
    if not isinstance(part, Mapping) or key not in part:
        raise _fail(f"lacks {key!r}")
    return part[key]


def _text(part: Any, key: str) -> str:
    value = _need(part, key)
    if not isinstance(value, str):
        raise _fail(f"must hold a string as {key!r}")
    return value


def _items(part: Any, key: str) -> list[Any]:
    value = _need(part, key)
    if not isinstance(value, list) or not value:
        raise _fail(f"must hold a list as {key!r}, not empty")
    return list(value)


def _fail(reason: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"structured_outputs.structural_tag {reason}", parameter="structured_outputs"
    )
