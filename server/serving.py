"""The life of a server process: bind, load, serve, drain, end."""

import asyncio
import contextlib
import dataclasses
import logging
import os
import signal
import socket
import ssl
import sys
from collections.abc import Callable, Sequence

from aiohttp import web

import jllm
from jllm import ConfigError, EngineConfig, JllmError
from server.app import make_app
from server.auth import load_keys
from server.config import ServerConfig
from server.event_loop import CONNECTIONS_PER_TURN, Turns, make_event_loop
from server.llm import Llm
from server.routes.profile import end_profile
from server.state import Phase, Server

logger = logging.getLogger("jllm.server")

BACKLOG = 2048
KEEP_ALIVE_SECONDS = 75.0
LINGERING_SECONDS = 1.0
"""How long what is left of a refused body is read, for its client to see the answer."""
POLL_SECONDS = 0.25
ANSWER_SECONDS = 5.0
"""How long a dead engine's clients get to be told."""
CLOSE_SECONDS = 2.0
ENGINE_FAILED = 1
USAGE_ERROR = 2
DEFAULT_NAME = "jllm"
"""Name of the embedded model."""

MakeLlm = Callable[[EngineConfig], Llm]


def serve(
    engine: EngineConfig, config: ServerConfig, make_llm: MakeLlm | None = None
) -> int:
    """Serves until a signal or the end of the engine.

    Args:
        engine: Options of the engine.
        config: Options of the server.
        make_llm: Loads the model; `AsyncLLM.from_engine_config` where none is given.

    Returns:
        The exit code: 0 after a drain, 1 if the engine has failed.

    Raises:
        JllmError: An option is wrong, or the model cannot be loaded.
    """
    keys = load_keys(config)
    tls = make_tls(config)
    level = logging.getLevelNamesMapping()[config.log_level.upper()]
    logging.getLogger("jllm.server").setLevel(level)
    with contextlib.closing(listen(config)) as listener:
        turns = Turns()
        life = _Life(engine, config, make_llm or _make_async_llm, turns)
        with asyncio.Runner(loop_factory=lambda: make_event_loop(turns)) as runner:
            return runner.run(life.run(listener, tls, keys))


def listen(config: ServerConfig) -> socket.socket:
    """Opens the one socket of the server.

    Raises:
        ConfigError: The address is unknown or in use.
    """
    try:
        found = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        # A name such as localhost may have several addresses; one is listened on.
        family, _, _, _, address = min(found, key=lambda item: item[0])
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if config.reuse_port:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            listener.bind(address)
            if not config.reuse_port:
                listener.listen(BACKLOG)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise ConfigError(
            f"host={config.host!r}, port={config.port} cannot be listened on: {error}"
        ) from error
    listener.setblocking(False)
    return listener


def make_tls(config: ServerConfig) -> ssl.SSLContext | None:
    """Loads certificate and key, if there are any.

    Raises:
        ConfigError: A file is missing or wrong.
    """
    if config.ssl_certfile is None:
        return None
    try:
        context = ssl.create_default_context(
            ssl.Purpose.CLIENT_AUTH, cafile=config.ssl_ca_certs
        )
        context.load_cert_chain(config.ssl_certfile, config.ssl_keyfile)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"ssl_certfile={config.ssl_certfile!r}: {error}") from error
    if config.ssl_ca_certs is not None:
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def make_runner(app: web.Application) -> web.AppRunner:
    """Runs the application with settings that fit long streams.

    A handler is cancelled when its client leaves; bodies stay compressed, and so are
    refused; and nothing but the application logs.
    """
    return web.AppRunner(
        app,
        handle_signals=False,
        handler_cancellation=True,
        auto_decompress=False,
        keepalive_timeout=KEEP_ALIVE_SECONDS,
        lingering_time=LINGERING_SECONDS,
        access_log=None,
        shutdown_timeout=CLOSE_SECONDS,
    )


def _make_async_llm(config: EngineConfig) -> Llm:
    return jllm.AsyncLLM.from_engine_config(config)


class _Life:
    """One process: its phases and what moves it from one to the next."""

    def __init__(
        self,
        engine: EngineConfig,
        config: ServerConfig,
        make_llm: MakeLlm,
        turns: Turns,
    ) -> None:
        self._engine = engine
        self._config = config
        self._make_llm = make_llm
        self._server = Server(config, engine.model or DEFAULT_NAME, turns)
        self._num_signals = 0
        self._asked_to_stop = asyncio.Event()

    async def run(
        self,
        listener: socket.socket,
        tls: ssl.SSLContext | None,
        keys: Sequence[str],
    ) -> int:
        """Lives; returns the exit code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        runner = make_runner(make_app(self._server, keys))
        await runner.setup()
        site = web.SockSite(
            runner, listener, backlog=CONNECTIONS_PER_TURN, ssl_context=tls
        )
        url = _url(listener, tls)
        llm: Llm | None = None
        try:
            if not self._config.reuse_port:
                await _start(site, listener)
            logger.info("listening on %s, loading the model", url)
            llm = await self._load()
            if llm is None:
                return 0
            if self._config.reuse_port:
                await _start(site, listener)
            logger.info("ready on %s", url)
            return await self._serve(site)
        finally:
            await self._close(runner, llm)

    async def _load(self) -> Llm | None:
        """Loads the model beside the event loop; None if a signal comes first."""
        loading = asyncio.create_task(asyncio.to_thread(self._make_llm, self._engine))
        stopping = asyncio.create_task(self._asked_to_stop.wait())
        await asyncio.wait({loading, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not loading.done():
            # Loading cannot be interrupted, and nobody waits for it any more.
            _end_now(0)
        llm = loading.result()
        try:
            self._server.set_ready(llm, identity(self._engine))
        except JllmError:
            llm.shutdown()
            raise
        return llm

    async def _serve(self, site: web.SockSite) -> int:
        """Serves until it is told to drain, or the engine has failed."""
        watching = asyncio.create_task(self._watch())
        waits = {
            asyncio.create_task(self._server.fatal.wait()),
            asyncio.create_task(self._asked_to_stop.wait()),
        }
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            if not self._server.fatal.is_set():
                if self._config.reuse_port:
                    # Who connects from now on gets to the one that takes over.
                    await site.stop()
                await self._drain()
        finally:
            watching.cancel()
            for wait in waits:
                wait.cancel()
        if not self._server.fatal.is_set():
            return 0
        logger.error("the engine has failed; the process ends")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ANSWER_SECONDS):
                await self._server.admission.wait_idle()
        return ENGINE_FAILED

    async def _drain(self) -> None:
        """Lets open requests end, for a time; a dead engine ends the wait."""
        self._server.set_draining()
        seconds = self._config.shutdown_timeout
        logger.info(
            "draining %d requests for at most %g s; a second signal stops at once",
            self._server.admission.num_open,
            seconds,
        )
        idle = asyncio.create_task(self._server.admission.wait_idle())
        dead = asyncio.create_task(self._server.fatal.wait())
        await asyncio.wait(
            {idle, dead}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED
        )
        for task in (idle, dead):
            task.cancel()

    async def _watch(self) -> None:
        """Notices what the engine does while nobody asks."""
        while True:
            self._server.note_engine()
            await asyncio.sleep(POLL_SECONDS)

    async def _close(self, runner: web.AppRunner, llm: Llm | None) -> None:
        """Tells open requests, then closes everything."""
        await end_profile(self._server)
        if llm is not None:
            # Open requests get the error that the engine has stopped.
            closing = asyncio.create_task(asyncio.to_thread(llm.shutdown))
            await asyncio.wait({closing}, timeout=ANSWER_SECONDS)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CLOSE_SECONDS):
                    await self._server.admission.wait_idle()
            if not closing.done():
                logger.error("the engine does not end; the process does")
                failed = self._server.phase is Phase.DEAD
                _end_now(ENGINE_FAILED if failed else 0)
        await runner.cleanup()
        self._server.close()

    def _on_signal(self, number: int) -> None:
        self._num_signals += 1
        if self._num_signals > 1:
            _end_now(128 + number)
        self._asked_to_stop.set()


async def _start(site: web.SockSite, listener: socket.socket) -> None:
    """Begins to accept connections."""
    await site.start()
    # To asyncio the backlog is also how many it accepts in one turn.
    listener.listen(BACKLOG)


def _end_now(code: int) -> None:
    """Ends the process without waiting for threads that may never end."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def identity(engine: EngineConfig) -> str:
    """What makes the outputs of an engine reproducible, in words."""
    return f"{jllm.__version__} {dataclasses.asdict(engine)}"


def _url(listener: socket.socket, tls: ssl.SSLContext | None) -> str:
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    return f"{'https' if tls else 'http'}://{shown}:{port}"
