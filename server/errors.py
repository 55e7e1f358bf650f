"""Errors as OpenAI's clients read them: status, type, parameter, code."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from jllm import ContextTooLongError, EngineStoppedError, InvalidRequestError

INVALID_REQUEST = "invalid_request_error"
MAX_MESSAGE_LENGTH = 1000
RETRY_SECONDS = 5


class ApiError(Exception):
    """An answer that is an error.

    Attributes:
        status: HTTP status.
        message: Sentence for the user.
        type: OpenAI's class of errors.
        param: Field of the request, with its path joined by points.
        code: Word for programs.
        headers: Further headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = INVALID_REQUEST,  # noqa: A002 - the name on the wire
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Cuts a message that repeats too much of the request."""
        if len(message) > MAX_MESSAGE_LENGTH:
            message = f"{message[:MAX_MESSAGE_LENGTH]}…"
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The JSON object of the answer."""
        error = {
            "message": self.message,
            "type": self.type,
            "param": self.param,
            "code": self.code,
        }
        return {"error": error}

    @property
    def payload(self) -> bytes:
        """The body as bytes."""
        return json.dumps(self.body).encode()


@dataclasses.dataclass(frozen=True, slots=True)
class FieldNames:
    """What a request calls the engine's parameters.

    Attributes:
        names: Engine's name to that of the request.
    """

    names: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def of(self, parameter: str | None) -> str | None:
        """The name to report; parameters of the server itself have none."""
        if parameter is None:
            return None
        return self.names.get(parameter, parameter)


def bad_request(
    message: str, param: str | None = None, code: str | None = None
) -> ApiError:
    """A field of the request is wrong."""
    return ApiError(400, message, param=param, code=code)


def unsupported(param: str, message: str | None = None) -> ApiError:
    """A field asks for something that cannot be done here."""
    text = message or f"{param} is not supported"
    return ApiError(400, text, param=param, code="unsupported_parameter")


def model_not_found(name: str) -> ApiError:
    """No model of that name is served."""
    shown = name if len(name) <= 100 else f"{name[:100]}…"
    return ApiError(
        404,
        f"the model {shown!r} does not exist",
        param="model",
        code="model_not_found",
    )


def overloaded(retry_after: int) -> ApiError:
    """The queue is full."""
    return ApiError(
        429,
        "too many requests are waiting; try again later",
        type="rate_limit_error",
        code="queue_full",
        headers={"Retry-After": str(retry_after)},
    )


def unavailable(message: str, code: str, **headers: str) -> ApiError:
    """The server does not serve yet, or no more."""
    return ApiError(
        503,
        message,
        type="service_unavailable_error",
        code=code,
        headers={"Retry-After": str(RETRY_SECONDS), **headers},
    )


def timed_out(message: str) -> ApiError:
    """A deadline has passed."""
    return ApiError(504, message, type="timeout_error", code="timeout")


def engine_dead() -> ApiError:
    """The engine has failed; the process is about to end."""
    return ApiError(
        503,
        "the engine has stopped; the request was not finished",
        type="server_error",
        code="engine_dead",
        headers={"Retry-After": str(RETRY_SECONDS), "Connection": "close"},
    )


def failed_sequence() -> ApiError:
    """The engine could not go on with this request; others are not affected."""
    return ApiError(
        500,
        "the engine cannot go on with this request: its output was not finite, or "
        "broke the form that it must have",
        type="server_error",
        code="numerical_error",
    )


def internal(request_id: str) -> ApiError:
    """A fault of this program; says nothing about it but where to look."""
    return ApiError(
        500, f"Internal error, request id {request_id}", type="server_error"
    )


def from_engine(error: Exception, names: FieldNames) -> ApiError | None:
    """What an error of the engine means to a client; None if it is none of those."""
    if isinstance(error, EngineStoppedError):
        return engine_dead()
    if isinstance(error, ContextTooLongError):
        param = names.of(error.parameter)
        return bad_request(str(error), param, "context_length_exceeded")
    if isinstance(error, InvalidRequestError):
        return bad_request(str(error), names.of(error.parameter), "invalid_value")
    return None
