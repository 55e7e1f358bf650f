"""The life of a batch worker: check, claim, load, work, end with a code that says how.

Exit codes: 0, the job is done; 1, the engine has failed, or others have taken this
worker for lost; 2, the command is wrong, or another worker is at the job; 74, a file
could not be read or written; 75, a signal has stopped it; 130 after Ctrl-C. After 1,
74, 75 and 130 the same command goes on with the job.
"""

import asyncio
import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator
from typing import Any

import jllm
from jllm import EngineConfig, EngineStoppedError
from jllm.batch import (
    Job,
    LeaseLostError,
    Outcome,
    Progress,
    StorageError,
    Store,
    Worker,
    open_job,
    summary,
)
from server.batch.answers import Answers
from server.batch.options import BatchOptions
from server.llm import Llm
from server.serving import DEFAULT_NAME, MakeLlm, identity
from server.state import Server

logger = logging.getLogger("jllm")

ENGINE_FAILED = 1
IO_ERROR = os.EX_IOERR
STOPPED = os.EX_TEMPFAIL
INTERRUPTED = 130
CLOSE_SECONDS = 3.0
END_SECONDS = 18.0
"""After a signal the process ends within so long, whatever hangs."""


def run_batch(
    engine: EngineConfig,
    options: BatchOptions,
    make_llm: MakeLlm | None = None,
    *,
    has_signals: bool = True,
) -> int:
    """Works on a job until it is done, or a signal comes.

    Args:
        engine: Options of the engine.
        options: Options of the job.
        make_llm: Loads the model; `AsyncLLM.from_engine_config` where none is given.
        has_signals: Whether SIGTERM and SIGINT stop it; in the main thread only.

    Returns:
        The exit code.

    Raises:
        JllmError: An option or an input is wrong, the model cannot be loaded, or
            another worker is at the job.
    """
    assert options.output is not None
    try:
        with early_signals() if has_signals else contextlib.nullcontext():
            store = Store(options.output)
            job = open_job(
                store, options.inputs, options.settings(engine), options.range_lines
            )
            code = 0
            # Other hosts wait for this one, done or not.
            waited_for = engine.hosts is not None and engine.hosts.num_hosts > 1
            if summary(store) is None or waited_for:
                code = _work(engine, options, (store, job), make_llm, has_signals)
    except StorageError as error:
        return _give_up(error, IO_ERROR)
    except (EngineStoppedError, LeaseLostError) as error:
        return _give_up(error, ENGINE_FAILED)
    _report(store, code)
    if has_signals and code in (STOPPED, INTERRUPTED):
        # Everything is written; a model that is still being loaded is not waited for.
        _end_now(code)
    return code


def _work(
    engine: EngineConfig,
    options: BatchOptions,
    place: tuple[Store, Job],
    make_llm: MakeLlm | None,
    has_signals: bool,  # noqa: FBT001
) -> int:
    store, job = place
    is_shown = sys.stderr.isatty() and logger.isEnabledFor(logging.INFO)
    progress = Progress(
        job.num_requests, is_shown=is_shown, price_per_hour=options.price_per_hour
    )
    with (
        progress,
        Worker(store, job, options.job_config(engine), progress) as worker,
    ):
        life = _Life(engine, options, make_llm or _make_async_llm)
        code = asyncio.run(life.run(worker, has_signals=has_signals))
    if progress.num_lines:
        logger.info(
            "this worker: %d lines in %.1f s, %s",
            progress.num_lines,
            progress.seconds,
            progress.speed,
        )
    return code


def _give_up(error: Exception, code: int) -> int:
    logger.error("%s; the same command goes on with the job", error)
    return code


def _report(store: Store, code: int) -> None:
    counts = summary(store)
    if counts is not None:
        logger.info(
            "done: %d lines, %d of them errors, %d prompt and %d output tokens in %s",
            counts["lines"],
            counts.get("errors", 0),
            counts.get("prompt_tokens", 0),
            counts.get("output_tokens", 0),
            store.url,
        )
    elif code:
        logger.info("stopped; the same command goes on with the job in %s", store.url)


def _make_async_llm(config: EngineConfig) -> Llm:
    return jllm.AsyncLLM.from_engine_config(config)


@contextlib.contextmanager
def early_signals() -> Generator[None]:
    """Until the event loop takes signals over, SIGTERM ends with the code for it."""

    def end(*_: object) -> None:
        sys.exit(STOPPED)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Life:
    """One process, from loading the model to its end."""

    def __init__(
        self, engine: EngineConfig, options: BatchOptions, make_llm: MakeLlm
    ) -> None:
        self._engine = engine
        self._options = options
        self._make_llm = make_llm
        self._code = 0

    async def run(self, worker: Worker, *, has_signals: bool) -> int:
        """Lives; returns the exit code."""
        stop = asyncio.Event()
        if has_signals:
            loop = asyncio.get_running_loop()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self._on_signal, number, stop)
        server = Server(
            self._options.server_config(), self._engine.model or DEFAULT_NAME
        )
        loading = _in_daemon(lambda: self._make_llm(self._engine))
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait({loading, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not loading.done():
            return self._code
        llm: Llm = loading.result()
        try:
            server.set_ready(llm, identity(self._engine))
            answers = Answers(server, self._options.endpoint, self._options.body or {})
            outcome = await worker.run(answers, stop)
            return 0 if outcome is Outcome.FINISHED else self._code
        finally:
            server.close()
            await asyncio.wait({_in_daemon(llm.shutdown)}, timeout=CLOSE_SECONDS)

    def _on_signal(self, number: int, stop: asyncio.Event) -> None:
        code = STOPPED if number == signal.SIGTERM else INTERRUPTED
        if stop.is_set():
            _end_now(code)
        self._code = code
        stop.set()
        timer = threading.Timer(END_SECONDS, _end_now, (code,))
        timer.daemon = True
        timer.start()


def _in_daemon(function: Callable[[], Any]) -> "asyncio.Future[Any]":
    """Calls a function in a thread that the process does not wait for at its end."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()

    def settle(result: Any, error: BaseException | None) -> None:
        if future.cancelled():
            return
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)

    def run() -> None:
        result: Any = None
        failure: BaseException | None = None
        try:
            result = function()
        # Whatever it is belongs to whoever waits.
        except BaseException as error:  # noqa: BLE001
            failure = error
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(settle, result, failure)

    threading.Thread(target=run, name="jllm-batch-model", daemon=True).start()
    return future


def _end_now(code: int) -> None:
    """Ends the process without waiting for threads that may never end."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
