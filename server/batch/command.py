"""The command `jllm batch`, which the command line finds by its entry point."""

import dataclasses

from jllm import EngineConfig
from server.batch.options import BatchOptions


@dataclasses.dataclass(frozen=True, slots=True)
class BatchCommand:
    """What the command line needs to know of a command outside of `jllm`.

    Attributes:
        summary: One line for the list of commands.
        options: Dataclass whose fields become flags, beside those of the engine.
    """

    summary: str = "answer the lines of files, each once, resumably"
    options: type[BatchOptions] = BatchOptions

    def run(self, engine: EngineConfig, options: BatchOptions) -> int:
        """Works on a job; returns the exit code."""
        if options.ray:
            from server.batch.ray import run_replicas

            return run_replicas(engine, options)
        from server.batch.process import run_batch

        return run_batch(engine, options)


BATCH = BatchCommand()
