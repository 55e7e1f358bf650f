"""From the bytes of a request to a checked value; what is wrong becomes a 400."""

import asyncio
import json
import logging
import math
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor
from typing import Any, TypeVar

from aiohttp import web
from pydantic import BaseModel, ValidationError

from server.errors import ApiError, bad_request, unsupported
from server.protocol.unsupported import UNSUPPORTED

logger = logging.getLogger("jllm.server")

LARGE_BODY = 32_768
"""Bytes from which a body is parsed beside the event loop."""
MAX_DIGITS = 32
CHECK_CODES = {
    "missing": "missing_required_parameter",
    "too_short": "empty_array",
    "empty_array": "empty_array",
    "too_long": "array_above_max_length",
    "string_too_long": "string_above_max_length",
    "string_too_short": "empty_string",
}

Body = TypeVar("Body", bound=BaseModel)


async def read_body(request: web.Request, *, timeout: float, max_bytes: int) -> bytes:
    """Reads the body, within bounds of time and length.

    Raises:
        ApiError: It is too long, too late, compressed or no JSON by its header.
    """
    encoding = request.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise ApiError(415, f"Content-Encoding {encoding[:40]!r} is not supported")
    kind = request.content_type
    if "Content-Type" in request.headers and not _is_json(kind):
        raise ApiError(415, f"Content-Type {kind[:80]!r} must be application/json")
    if (request.content_length or 0) > max_bytes:
        raise _too_long(max_bytes)
    body = bytearray()
    try:
        async with asyncio.timeout(timeout):
            async for chunk in request.content.iter_any():
                body += chunk
                if len(body) > max_bytes:
                    raise _too_long(max_bytes)
    except TimeoutError as error:
        raise ApiError(
            408,
            "the body did not arrive in time",
            code="timeout",
            headers={"Connection": "close"},
        ) from error
    except (web.RequestPayloadError, ConnectionError) as error:
        raise bad_request("the body is incomplete", code="invalid_body") from error
    return bytes(body)


def _too_long(max_bytes: int) -> ApiError:
    return ApiError(
        413,
        f"the body is longer than {max_bytes} bytes",
        code="request_too_large",
        headers={"Connection": "close"},
    )


def _is_json(kind: str) -> bool:
    return kind == "application/json" or kind.endswith("+json")


async def parse_body(
    body: bytes, kind: type[Body], executor: Executor, *, strict_fields: bool
) -> Body:
    """Parses and checks a body, a large one beside the event loop.

    Raises:
        ApiError: Names the field.
    """
    if len(body) < LARGE_BODY:
        return parse(body, kind, strict_fields=strict_fields)
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(
        executor, lambda: parse(body, kind, strict_fields=strict_fields)
    )


def parse(body: bytes, kind: type[Body], *, strict_fields: bool = False) -> Body:
    """Parses JSON and checks it against a type; of equal keys the last counts.

    Raises:
        ApiError: Names the field.
    """
    odd: list[str] = []
    raw = _load_json(body, odd)
    if not isinstance(raw, dict):
        raise bad_request("the body must be a JSON object", code="invalid_json")
    _refuse_unsupported(raw)
    try:
        value = kind.model_validate(raw)
    except ValidationError as error:
        raise _first_error(error, raw) from error
    if odd:
        raise bad_request(f"{odd[0][:40]} is no JSON number", code="invalid_json")
    unknown = list(unknown_fields(value))
    if unknown and strict_fields:
        raise bad_request(
            f"unknown field {unknown[0][:100]!r}", unknown[0][:100], "unknown_parameter"
        )
    if unknown:
        logger.debug("unknown fields ignored: %s", json.dumps(unknown)[:1000])
    return value


def _load_json(body: bytes, odd: list[str]) -> Any:
    """Reads JSON; numbers that are none become infinite and are noted in `odd`."""

    def constant(text: str) -> float:
        odd.append(text)
        return math.nan if text == "NaN" else math.inf

    def integer(text: str) -> int | float:
        if len(text) <= MAX_DIGITS:
            return int(text)
        return constant(text)

    try:
        return json.loads(
            body.decode("utf-8"), parse_constant=constant, parse_int=integer
        )
    except RecursionError as error:
        raise bad_request(
            "the body is nested too deeply", code="invalid_json"
        ) from error
    except ValueError as error:
        raise bad_request(
            "could not parse the JSON body", code="invalid_json"
        ) from error


def _refuse_unsupported(raw: Mapping[str, Any]) -> None:
    for name, neutral in UNSUPPORTED.items():
        if name in raw and not any(_same(raw[name], value) for value in neutral):
            raise unsupported(name)


def _same(value: Any, other: Any) -> bool:
    """Equal, and not merely as True equals 1."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def unknown_fields(value: BaseModel, path: str = "") -> Iterator[str]:
    """Paths of the fields that the types do not know, those of parts included."""
    for name in value.model_extra or ():
        if path or name not in UNSUPPORTED:
            yield f"{path}{name}"
    given = value.model_fields_set
    for name in type(value).model_fields:
        if name not in given:
            continue
        part = getattr(value, name)
        if isinstance(part, BaseModel):
            yield from unknown_fields(part, f"{path}{name}.")
        elif isinstance(part, list):
            for i, item in enumerate(part):
                if not isinstance(item, BaseModel):
                    break
                yield from unknown_fields(item, f"{path}{name}.{i}.")


def _first_error(error: ValidationError, raw: Any) -> ApiError:
    """The error deepest in the body, where a value matches none of several types."""
    details = error.errors(include_url=False, include_input=False)
    paths = [_path(detail["loc"], raw, detail["type"]) for detail in details]
    first = paths[0].split(".")[0]
    index = max(
        (i for i, path in enumerate(paths) if path.split(".")[0] == first),
        key=lambda i: paths[i].count("."),
    )
    detail: Mapping[str, Any] = details[index]
    path, context = paths[index], detail.get("ctx") or {}
    message = detail["msg"]
    message = message[:1].lower() + message[1:]
    if detail["type"] == "field":
        path = f"{path}.{context['path']}" if context["path"] else path
        return bad_request(f"{path} {context['text']}", path, context["word"])
    if detail["type"] == "missing":
        return bad_request(
            f"missing required parameter: {path}", path, CHECK_CODES["missing"]
        )
    return bad_request(f"{path}: {message}", path, _code(detail["type"], context))


def _code(kind: str, context: Mapping[str, Any]) -> str:
    for bound, word in (
        ("ge", "below_min"),
        ("gt", "below_min"),
        ("le", "above_max"),
        ("lt", "above_max"),
    ):
        if bound in context:
            number = "integer" if isinstance(context[bound], int) else "decimal"
            return f"{number}_{word}_value"
    if kind in CHECK_CODES:
        return CHECK_CODES[kind]
    is_type = kind.endswith(("_type", "_parsing", "_from_float"))
    return "invalid_type" if is_type else "invalid_value"


def _holds(value: Any, part: int | str) -> bool:
    if isinstance(value, list):
        return isinstance(part, int) and part < len(value)
    return isinstance(value, dict) and part in value


def _path(location: tuple[int | str, ...], raw: Any, kind: str) -> str:
    """Leaves out of a location what is no part of the body, such as names of types."""
    found: list[str] = []
    current = raw
    for i, part in enumerate(location):
        if _holds(current, part):
            current = current[part]
        elif not (kind == "missing" and i == len(location) - 1):
            continue
        found.append(str(part)[:100])
    return ".".join(found)
