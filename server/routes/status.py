"""How the process is: /health, /ready, /ping, /version, /metrics, /engine/state."""

import asyncio
import importlib.metadata
import time

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from jllm import BlockState
from server.answer import json_response
from server.errors import ApiError, engine_dead, unavailable
from server.state import SERVER, Phase

MAP_CELLS = 1024
"""Most characters of the block map; one stands for several blocks of a larger pool."""
MAP_LETTERS = {
    BlockState.FREE: "f",
    BlockState.CACHED: "c",
    BlockState.USED: "u",
    BlockState.SHARED: "s",
}


async def health(request: web.Request) -> web.Response:
    """Whether the engine lives and makes progress; asks nothing of it."""
    server = request.app[SERVER]
    server.note_engine()
    if server.phase is Phase.DEAD:
        raise engine_dead()
    if server.watchdog.is_stalled:
        raise ApiError(
            503,
            f"no step has ended for {server.watchdog.seconds_still:.0f} s",
            type="server_error",
            code="engine_stalled",
        )
    return json_response({"status": server.phase.value})


async def ready(request: web.Request) -> web.Response:
    """Whether requests for inference are served."""
    server = request.app[SERVER]
    server.check_ready()
    if server.watchdog.is_stalled:
        raise unavailable("the engine makes no progress", "engine_stalled")
    return json_response({"status": server.phase.value})


async def ping(request: web.Request) -> web.Response:
    """Whether the process answers."""
    del request
    return json_response({"status": "ok"})


async def version(request: web.Request) -> web.Response:
    """Which release runs."""
    del request
    return json_response({"version": importlib.metadata.version("jllm")})


async def metrics(request: web.Request) -> web.Response:
    """Metrics for Prometheus."""
    text = request.app[SERVER].metrics.render()
    return web.Response(body=text, headers={"Content-Type": CONTENT_TYPE_LATEST})


async def engine_state(request: web.Request) -> web.Response:
    """What the engine is doing, for a live view."""
    server = request.app[SERVER]
    stats = server.llm.stats()
    states = stats.block_states
    counts = {state: states.count(state) for state in BlockState}
    prompt, generated = server.metrics.num_tokens
    return json_response(
        {
            "status": server.phase.value,
            "model": server.model_names[0],
            "running": stats.num_running,
            "waiting": max(stats.num_waiting, server.admission.num_queued),
            "open": server.admission.num_open,
            "tasks": len(asyncio.all_tasks()),
            "blocks": {state.name.lower(): counts[state] for state in BlockState},
            "block_size": stats.block_size,
            "block_map": block_map(states),
            "prompt_tokens_total": prompt,
            "generation_tokens_total": generated,
            "tokens_per_second": round(server.metrics.tokens_per_second(), 1),
            "prefix_cache_queries": stats.num_prefix_queries,
            "prefix_cache_hits": stats.num_prefix_hits,
            "preemptions": stats.num_preemptions,
            "seconds_since_step": round(server.watchdog.seconds_still, 3),
            "longest_turn_ms": server.turns and round(1e3 * server.turns.longest, 1),
            "time": time.time(),
        }
    )


def block_map(states: bytes) -> str:
    """The pool as a line: a letter per block, or per group of blocks in large pools.

    A group is as busy as its busiest block.
    """
    size = -(-len(states) // MAP_CELLS) or 1
    groups = (max(states[i : i + size]) for i in range(0, len(states), size))
    return "".join(MAP_LETTERS[BlockState(state)] for state in groups)
