"""The OpenAPI description, made from the pydantic types."""

import importlib.metadata
from typing import Any

from aiohttp import web
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from server.answer import json_response
from server.protocol.base import ErrorResponse
from server.protocol.chat import ChatCompletionRequest, ChatCompletionResponse
from server.protocol.completions import CompletionRequest, CompletionResponse
from server.protocol.embeddings import EmbeddingRequest, EmbeddingResponse
from server.protocol.models import (
    EngineState,
    ModelCard,
    ModelList,
    StatusResponse,
    VersionResponse,
)
from server.protocol.responses import DeletedResponse, Response, ResponsesRequest
from server.protocol.tokenize import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeRequest,
    TokenizeResponse,
)

REFERENCE = "#/components/schemas/{model}"
ERRORS = ("400", "401", "403", "404", "408", "413", "415", "429", "500", "503", "504")

Types = tuple[type[BaseModel] | None, type[BaseModel] | None]
OPERATIONS: dict[tuple[str, str], Types] = {
    ("post", "/v1/completions"): (CompletionRequest, CompletionResponse),
    ("post", "/v1/chat/completions"): (ChatCompletionRequest, ChatCompletionResponse),
    ("post", "/v1/embeddings"): (EmbeddingRequest, EmbeddingResponse),
    ("post", "/v1/responses"): (ResponsesRequest, Response),
    ("get", "/v1/responses/{id}"): (None, Response),
    ("delete", "/v1/responses/{id}"): (None, DeletedResponse),
    ("post", "/v1/responses/{id}/cancel"): (None, Response),
    ("get", "/v1/models"): (None, ModelList),
    ("get", "/v1/models/{id}"): (None, ModelCard),
    ("post", "/tokenize"): (TokenizeRequest, TokenizeResponse),
    ("post", "/detokenize"): (DetokenizeRequest, DetokenizeResponse),
    ("get", "/health"): (None, StatusResponse),
    ("get", "/ready"): (None, StatusResponse),
    ("get", "/ping"): (None, StatusResponse),
    ("get", "/version"): (None, VersionResponse),
    ("get", "/engine/state"): (None, EngineState),
}
"""Method and path to the types of request and answer."""

STREAMED = ("/v1/completions", "/v1/chat/completions", "/v1/responses")
EVENT = {
    "type": "object",
    "required": ["data"],
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
}
"""One event of a stream; its data is JSON, or [DONE] at the end."""


def describe() -> dict[str, Any]:
    """Builds the description."""
    found = {kind for pair in OPERATIONS.values() for kind in pair if kind}
    found.add(ErrorResponse)
    modes = [(kind, "validation") for kind in sorted(found, key=lambda k: k.__name__)]
    names, definitions = models_json_schema(modes, ref_template=REFERENCE)  # pyright: ignore[reportArgumentType]
    references = {kind: schema for (kind, _), schema in names.items()}
    paths: dict[str, dict[str, Any]] = {}
    for (method, path), (body, answer) in OPERATIONS.items():
        paths.setdefault(path, {})[method] = _operation(
            method,
            path,
            references[body] if body else None,
            references[answer] if answer else None,
            references,
        )
    return {
        "openapi": "3.1.0",
        "info": {"title": "jllm", "version": importlib.metadata.version("jllm")},
        "paths": paths,
        "components": {
            "schemas": definitions["$defs"],
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}, {}],
    }


async def show_openapi(request: web.Request) -> web.Response:
    """GET /openapi.json."""
    del request
    return json_response(describe())


def _operation(
    method: str, path: str, body: Any, answer: Any, references: dict[Any, Any]
) -> dict[str, Any]:
    responses = {"200": _content("the answer", answer)}
    if path in STREAMED:
        responses["200"]["content"]["text/event-stream"] = {"schema": EVENT}
    for status in ERRORS:
        responses[status] = _content("an error", references[ErrorResponse])
    operation: dict[str, Any] = {
        "operationId": f"{method}{path}".translate(str.maketrans("/{}", "___")),
        "responses": responses,
    }
    if body is not None:
        operation["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": body}},
        }
    if "{id}" in path:
        operation["parameters"] = [
            {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}
        ]
    return operation


def _content(description: str, schema: Any) -> dict[str, Any]:
    return {
        "description": description,
        "content": {"application/json": {"schema": schema}},
    }
