"""A `jllm serve` of its own process, on a free port, with its resources in view."""

import contextlib
import dataclasses
import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import IO, Any

import psutil

START_SECONDS = 180.0
STOP_SECONDS = 60.0


@dataclasses.dataclass(frozen=True)
class Resources:
    """What a server process holds.

    Attributes:
        rss_mib: Resident memory.
        files: Open file descriptors.
        threads: Threads.
        state: Answer of `/engine/state`.
    """

    rss_mib: float
    files: int
    threads: int
    state: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Server:
    """A running server."""

    port: int
    process: subprocess.Popen[bytes]
    log: IO[bytes]

    @property
    def base_url(self) -> str:
        """What paths are put behind."""
        return f"http://127.0.0.1:{self.port}"

    def get(self, path: str) -> bytes:
        """Body of a GET."""
        with urllib.request.urlopen(f"{self.base_url}{path}", timeout=10) as answer:
            return answer.read()

    @property
    def cpu_seconds(self) -> float:
        """Processor time so far."""
        times = psutil.Process(self.process.pid).cpu_times()
        return times.user + times.system

    def log_entries(self) -> list[dict[str, Any]]:
        """The lines of its log that tell the end of a request."""
        text = Path(f"/proc/self/fd/{self.log.fileno()}").read_bytes()
        starts = (line.find(b'{"event"') for line in text.splitlines())
        pairs = zip(text.splitlines(), starts, strict=True)
        return [json.loads(line[start:]) for line, start in pairs if start >= 0]

    def histogram(self, name: str) -> dict[float, float]:
        """Bounds and counts, added up, of one of its metrics without further labels."""
        found: dict[float, float] = {}
        for line in self.get("/metrics").decode().splitlines():
            if line.startswith(f"{name}_bucket{{"):
                bound = line.partition('le="')[2].partition('"')[0]
                found[float(bound)] = float(line.rpartition(" ")[2])
        return found

    def resources(self) -> Resources:
        """What it holds now."""
        process = psutil.Process(self.process.pid)
        return Resources(
            rss_mib=process.memory_info().rss / 2**20,
            files=process.num_fds(),
            threads=process.num_threads(),
            state=json.loads(self.get("/engine/state")),
        )


@contextlib.contextmanager
def serving(*flags: str) -> Generator[Server]:
    """Serves the embedded model until the block ends; it must stop by itself then."""
    port = free_port()
    command = [sys.executable, "-m", "jllm", "serve", "--port", str(port), *flags]
    with running(command, port) as server:
        yield server


@contextlib.contextmanager
def running(command: Sequence[str], port: int) -> Generator[Server]:
    """Runs a command that serves on a port.

    Raises:
        TimeoutError: It was not ready in time, or has ended; its last words are told.
        subprocess.TimeoutExpired: It did not end when it was told to.
    """
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stderr=log, stdout=subprocess.DEVNULL)
        server = Server(port, process, log)
        try:
            try:
                wait_until_ready(server)
            except TimeoutError as error:
                log.seek(0)
                words = log.read()[-2000:].decode(errors="replace")
                raise TimeoutError(f"{error}\n{words}") from error
            yield server
        finally:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                raise


def free_port() -> int:
    """A port of the loopback interface that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_until_ready(server: Server) -> None:
    """Returns when `/ready` answers 200.

    Raises:
        TimeoutError: It did not in time, or the process has ended.
    """
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and server.process.poll() is None:
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            server.get("/ready")
            return
        time.sleep(0.1)
    raise TimeoutError(f"the server was not ready: {server.process.poll()=}")
