"""What happens to every request: a name, a line in the log, and errors as JSON."""

import asyncio
import json
import logging
import re
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Protocol

from aiohttp import web

from server.answer import json_response
from server.call import ARRIVAL, CALL, REASON, REQUEST_ID, Call
from server.errors import ApiError, bad_request, internal
from server.state import SERVER, Server, new_id

logger = logging.getLogger("jllm.server")
access_logger = logging.getLogger("jllm.server.access")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Check(Protocol):
    """A middleware."""

    def __call__(
        self, request: web.Request, handler: Handler
    ) -> Coroutine[Any, Any, web.StreamResponse]:
        """Answers, or lets the handler do so."""
        ...


REQUEST_ID_HEADER = "X-Request-Id"
SAFE_ID = re.compile(r"[A-Za-z0-9_.:\-]{1,128}")
CLIENT_CLOSED = 499
"""Status in the log of a request whose client left before the answer."""
QUIET_ROUTES = frozenset({"/health", "/ready", "/ping", "/metrics", "/engine/state"})


@web.middleware
async def observe(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Names, answers, logs and counts one request, whatever happens to it."""
    server = request.app[SERVER]
    given = request.headers.get(REQUEST_ID_HEADER, "")
    is_safe = SAFE_ID.fullmatch(given) is not None
    request[REQUEST_ID] = given if is_safe else new_id("req_")
    request[ARRIVAL] = time.monotonic()
    status = CLIENT_CLOSED
    try:
        response = await _answer(request, handler)
        status = response.status
    except asyncio.CancelledError:
        request.setdefault(REASON, "abort_client")
        raise
    else:
        return response
    finally:
        _finish(server, request, status)


async def _answer(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except ApiError as error:
        request.setdefault(REASON, _reason(error))
        return error_response(error)
    except web.HTTPException as error:
        return error_response(_from_http(error))
    except Exception:
        logger.exception("request %s failed", request[REQUEST_ID])
        request[REASON] = "error"
        if request.get(STARTED):
            # Too late for another answer; the client sees the connection close.
            raise
        return error_response(internal(request[REQUEST_ID]))


STARTED = web.RequestKey("started", bool)
"""Key of a request whose answer has begun."""


def error_response(error: ApiError) -> web.Response:
    """The answer that an error is."""
    response = json_response(error.body, error.status)
    response.headers.update(error.headers)
    if error.headers.get("Connection") == "close":
        response.force_close()
    return response


def _from_http(error: web.HTTPException) -> ApiError:
    """Aiohttp's own errors: no such route, or not with this method."""
    if isinstance(error, web.HTTPMethodNotAllowed):
        return ApiError(
            405,
            "the method is not allowed for this path",
            code="method_not_allowed",
            headers={"Allow": error.headers.get("Allow", "")},
        )
    if error.status == 404:
        return ApiError(404, "there is nothing at this path", code="not_found")
    return bad_request(error.reason)


def _reason(error: ApiError) -> str:
    if error.code == "timeout":
        return "abort_deadline"
    if error.status in (429, 503):
        return "shed"
    return "error" if error.status >= 500 else "invalid"


def route_of(request: web.Request) -> str:
    """The pattern of the route that was found, not what the client wrote."""
    resource = request.match_info.route.resource
    return "none" if resource is None else resource.canonical


def _finish(server: Server, request: web.Request, status: int) -> None:
    seconds = time.monotonic() - request[ARRIVAL]
    route = route_of(request)
    call: Call | None = request.get(CALL)
    entry: dict[str, Any] = {
        "event": "request_end",
        "request_id": request[REQUEST_ID],
        "method": request.method[:20],
        "route": route,
        "status": status,
        "reason": _end_reason(request, call, status),
        "total_ms": round(1000 * seconds, 1),
    }
    if call is not None:
        entry |= call.summary
    level = logging.DEBUG if route in QUIET_ROUTES and status < 400 else logging.INFO
    if access_logger.isEnabledFor(level):
        access_logger.log(level, "%s", json.dumps(entry))
    method = request.method if request.method in KNOWN_METHODS else "other"
    server.metrics.observe_http(route, method, status, seconds)
    if call is not None:
        server.tracer.record(
            f"{request.method} {route}", seconds, _attributes(entry), request.headers
        )


KNOWN_METHODS = frozenset({"GET", "POST", "HEAD", "OPTIONS", "DELETE", "PUT", "PATCH"})


def _end_reason(request: web.Request, call: Call | None, status: int) -> str:
    if REASON in request:
        return request[REASON]
    if call is not None and call.reasons:
        return ",".join(sorted(set(call.reasons)))
    return "ok" if status < 400 else "invalid"


def _attributes(entry: dict[str, Any]) -> dict[str, Any]:
    """Names of OpenTelemetry's conventions for generative models."""
    return {
        "gen_ai.request.id": entry["request_id"],
        "gen_ai.response.finish_reasons": entry["reason"],
        "gen_ai.usage.prompt_tokens": entry["prompt_tokens"],
        "gen_ai.usage.completion_tokens": entry["completion_tokens"],
        "gen_ai.usage.cached_tokens": entry["cached_tokens"],
        "gen_ai.latency.time_in_queue": _seconds(entry["queue_ms"]),
        "gen_ai.latency.time_to_first_token": _seconds(entry["ttft_ms"]),
        "gen_ai.latency.e2e": _seconds(entry["total_ms"]),
        "http.response.status_code": entry["status"],
        "http.route": entry["route"],
    }


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000


async def add_headers(request: web.Request, response: web.StreamResponse) -> None:
    """Signal of an answer that begins: names the request, forbids guessing types."""
    request[STARTED] = True
    # An expectation that cannot be met is answered before any check gets to see it.
    response.headers[REQUEST_ID_HEADER] = request.setdefault(REQUEST_ID, new_id("req_"))
    response.headers.setdefault("X-Content-Type-Options", "nosniff")
