"""The command `jllm serve`, which the command line finds by its entry point."""

import dataclasses

from jllm import EngineConfig
from server.config import ServerConfig


@dataclasses.dataclass(frozen=True, slots=True)
class ServeCommand:
    """What the command line needs to know of a command outside of `jllm`.

    Attributes:
        summary: One line for the list of commands.
        options: Dataclass whose fields become flags, beside those of the engine.
    """

    summary: str = "serve a model over HTTP, as OpenAI's API"
    options: type[ServerConfig] = ServerConfig

    def run(self, engine: EngineConfig, options: ServerConfig) -> int:
        """Serves until a signal or the end of the engine; returns the exit code."""
        from server.serving import serve

        return serve(engine, options)


SERVE = ServeCommand()
