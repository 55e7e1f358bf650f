"""POST /start_profile and /stop_profile, where the options name a folder for them."""

import contextlib

from aiohttp import web

from server.answer import json_response
from server.errors import ApiError
from server.state import SERVER, Server


async def start_profile(request: web.Request) -> web.Response:
    """Begins to record what host and device do."""
    server = request.app[SERVER]
    folder = server.config.profiler_dir
    assert folder is not None
    if server.is_profiling:
        raise _conflict("a profile is being recorded")
    server.is_profiling = True
    try:
        await server.llm.start_profile(folder)
    except BaseException:
        server.is_profiling = False
        raise
    return json_response({"status": "recording", "folder": folder})


async def stop_profile(request: web.Request) -> web.Response:
    """Ends the recording and writes it."""
    server = request.app[SERVER]
    if not server.is_profiling:
        raise _conflict("no profile is being recorded")
    server.is_profiling = False
    await server.llm.stop_profile()
    return json_response({"status": "written", "folder": server.config.profiler_dir})


async def end_profile(server: Server) -> None:
    """Writes a recording that nobody ended."""
    if server.is_profiling:
        server.is_profiling = False
        with contextlib.suppress(RuntimeError):
            await server.llm.stop_profile()


def _conflict(message: str) -> ApiError:
    return ApiError(409, message, code="profile_state")
