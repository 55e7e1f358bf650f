"""What the routes share: the model, its limits, and the phase of the process."""

import asyncio
import enum
import hashlib
import random
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

from aiohttp import web

from jllm import ConfigError
from server.admission import Admission
from server.config import ServerConfig
from server.errors import ApiError, engine_dead, model_not_found, unavailable
from server.event_loop import Turns
from server.llm import Llm
from server.metrics import Metrics
from server.parsing import Parsing
from server.store import ResponseStore
from server.tracing import Tracer
from server.watchdog import Watchdog

MIN_BODY_BYTES = 8 * 1024 * 1024
BYTES_PER_TOKEN = 16
PARSE_THREADS = 2


class Phase(enum.Enum):
    """Where the process is in its life; it only moves down this list."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    DEAD = "dead"


class Server:
    """The state of one server; everything in it is used in one event loop."""

    def __init__(
        self, config: ServerConfig, model_name: str, turns: Turns | None = None
    ) -> None:
        """Begins without a model: it is loading.

        Args:
            config: Options.
            model_name: Name of the model where the options give none.
            turns: Those of the event loop, if they are counted.
        """
        self.config = config
        names = tuple(config.served_model_name or ()) or (model_name,)
        if any(not name or "\n" in name for name in names):
            raise ConfigError("served_model_name must not be empty")
        self.model_names = names
        self.created = int(time.time())
        self.phase = Phase.LOADING
        self.admission = Admission(
            config.max_num_queued_reqs, config.max_num_queued_tokens
        )
        self.metrics = Metrics(names[0])
        self.turns = turns
        if turns is not None:
            self.metrics.set_turns(turns)
        self.tracer = Tracer(config.otlp_traces_endpoint)
        self.watchdog = Watchdog(config.stall_timeout)
        self.store = ResponseStore(config.max_stored_responses, config.max_stored_bytes)
        self.executor = ThreadPoolExecutor(
            PARSE_THREADS, thread_name_prefix="jllm-http"
        )
        self.fatal = asyncio.Event()
        """Set when the engine has failed, for the process to end."""
        self.fingerprint: str | None = None
        self.parsing = Parsing()
        self.is_profiling = False
        self.background: dict[str, asyncio.Task[None]] = {}
        """Responses that are made in the background, by their names."""
        self._llm: Llm | None = None

    @property
    def llm(self) -> Llm:
        """The model.

        Raises:
            ApiError: It is not loaded yet.
        """
        if self._llm is None:
            raise unavailable("the model is being loaded", "model_loading")
        return self._llm

    @property
    def max_body_bytes(self) -> int:
        """Longest body of a request."""
        if self.config.max_body_bytes is not None:
            return self.config.max_body_bytes
        tokens = 0 if self._llm is None else self._llm.max_model_len
        return max(MIN_BODY_BYTES, BYTES_PER_TOKEN * tokens)

    def set_ready(self, llm: Llm, identity: str) -> None:
        """Takes over the loaded model.

        Args:
            llm: The model.
            identity: What makes its outputs reproducible, in words.

        Raises:
            ConfigError: An option does not fit it.
        """
        self.parsing = Parsing.of(self.config, llm)
        self._llm = llm
        digest = hashlib.sha256(identity.encode()).hexdigest()
        self.fingerprint = f"fp_{digest[:12]}"
        self.metrics.set_llm(llm, self.admission)
        if self.phase is Phase.LOADING:
            self.phase = Phase.READY

    def set_draining(self) -> None:
        """Refuses inference from now on."""
        if self.phase in (Phase.LOADING, Phase.READY):
            self.phase = Phase.DRAINING

    def note_engine(self) -> None:
        """Notices progress, a stall or the death of the engine; called often."""
        if self._llm is None:
            return
        self.watchdog.note(self._llm.num_steps, is_busy=self._llm.is_busy)
        if self._llm.errored and self.phase is not Phase.DEAD:
            self.phase = Phase.DEAD
            self.fatal.set()

    def check_ready(self) -> None:
        """Lets inference through.

        Raises:
            ApiError: The server does not serve yet, or no more.
        """
        self.note_engine()
        if self.phase is Phase.DRAINING:
            raise unavailable(
                "the server is shutting down", "shutting_down", Connection="close"
            )
        if self.phase is Phase.DEAD:
            raise engine_dead()
        _ = self.llm

    def close(self) -> None:
        """Ends tasks and threads, and sends the last traces."""
        for task in self.background.values():
            task.cancel()
        self.executor.shutdown(wait=False, cancel_futures=True)
        self.tracer.close()

    def check_model(self, name: str | None) -> str:
        """Returns the name to answer with.

        Raises:
            ApiError: None is given where one must be, or it is not served.
        """
        if name is None and self.config.default_model:
            return self.model_names[0]
        if name is None:
            raise ApiError(
                400,
                "missing required parameter: model",
                param="model",
                code="missing_required_parameter",
            )
        if name not in self.model_names:
            raise model_not_found(name)
        return name


SERVER = web.AppKey("server", Server)


def new_id(prefix: str) -> str:
    """A fresh name such as "chatcmpl-…"; asks the system for nothing."""
    return f"{prefix}{random.getrandbits(128):032x}"


def new_secret_id(prefix: str) -> str:
    """A fresh name that nobody can guess, for what can be asked for by its name."""
    return f"{prefix}{uuid.uuid4().hex}"
