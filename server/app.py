"""The application: which route is served by what, behind which checks."""

from collections.abc import Sequence

from aiohttp import web

from server import middleware
from server.auth import Guard
from server.cors import Cors
from server.openapi import show_openapi
from server.page import page_routes
from server.routes import (
    chat,
    completions,
    embeddings,
    models,
    profile,
    responses,
    status,
    tokens,
)
from server.state import SERVER, Server


def make_app(server: Server, keys: Sequence[str] = ()) -> web.Application:
    """Puts the application together.

    Args:
        server: What the routes share.
        keys: Keys that requests must bear, one of them; none lets everybody in.
    """
    config = server.config
    checks: list[middleware.Check] = [middleware.observe]
    cors = Cors(config.allowed_origins or ())
    if config.allowed_origins:
        checks.append(cors.middleware())
    page = page_routes() if config.enable_page else []
    public_paths = [route.path for route in page]
    checks.append(Guard(config, keys, public_paths).middleware())
    app = web.Application(middlewares=checks)
    app[SERVER] = server
    app.on_response_prepare.append(middleware.add_headers)
    if config.allowed_origins:
        app.on_response_prepare.append(cors.add_headers)
    app.add_routes(
        [
            web.post("/v1/completions", completions.create_completion),
            web.post("/v1/chat/completions", chat.create_chat_completion),
            web.post("/v1/embeddings", embeddings.create_embedding),
            web.post("/v1/responses", responses.create_response),
            web.get("/v1/responses/{id}", responses.show_response),
            web.delete("/v1/responses/{id}", responses.delete_response),
            web.post("/v1/responses/{id}/cancel", responses.cancel_response),
            web.get("/v1/models", models.list_models),
            web.get("/v1/models/{id:.+}", models.show_model),
            web.post("/tokenize", tokens.tokenize),
            web.post("/detokenize", tokens.detokenize),
            web.get("/health", status.health),
            web.get("/ready", status.ready),
            web.get("/ping", status.ping),
            web.get("/version", status.version),
            web.get("/metrics", status.metrics),
            web.get("/engine/state", status.engine_state),
            web.get("/openapi.json", show_openapi),
        ]
    )
    if config.profiler_dir is not None:
        app.router.add_post("/start_profile", profile.start_profile)
        app.router.add_post("/stop_profile", profile.stop_profile)
    app.add_routes(page)
    return app
