"""GET /v1/models and /v1/models/{id}."""

from typing import Any

from aiohttp import web

from server.answer import json_response
from server.errors import model_not_found
from server.state import SERVER, Phase, Server


async def list_models(request: web.Request) -> web.Response:
    """Lists the names under which the model is served."""
    server = request.app[SERVER]
    data = [_card(server, name) for name in server.model_names]
    return json_response({"object": "list", "data": data})


async def show_model(request: web.Request) -> web.Response:
    """Shows one of them."""
    server, name = request.app[SERVER], request.match_info["id"]
    if name not in server.model_names:
        raise model_not_found(name)
    return json_response(_card(server, name))


def _card(server: Server, name: str) -> dict[str, Any]:
    is_loaded = server.phase is not Phase.LOADING
    return {
        "id": name,
        "object": "model",
        "created": server.created,
        "owned_by": "jllm",
        "root": server.model_names[0],
        "parent": None,
        "max_model_len": server.llm.max_model_len if is_loaded else None,
    }
