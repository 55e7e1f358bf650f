"""Batch jobs over the fake engine, in this process or, `python -m …`, in another.

Arguments of the process: a JSON object with the fields of `BatchOptions`, and with
`step_seconds`, how long a step of the engine takes.
"""

import json
import logging
import sys
import time
import unittest.mock

from jllm import AsyncLLM, EngineConfig
from server.batch.options import BatchOptions
from server.batch.process import run_batch
from tests.fakes import FakeEngine

MODEL = "fake"


def run(engine, has_signals=False, **options):
    """Runs a job with an engine; returns the exit code."""

    def make_llm(config):
        name = "jllm.async_llm.create_engine"
        with unittest.mock.patch(name, return_value=engine):
            return AsyncLLM.from_engine_config(config)

    return run_batch(
        EngineConfig(model=MODEL),
        BatchOptions(**{"lease_seconds": 1.0, "flush_seconds": 0.05} | options),
        make_llm,
        has_signals=has_signals,
    )


def echo(request, index):
    """Answers with the prompt, turned around."""
    tokens = [token for token in request.prompt_token_ids if token < 256]
    return bytes(reversed(tokens)).decode(errors="replace")


def main():
    options = json.loads(sys.argv[1])
    engine, seconds = FakeEngine(echo), options.pop("step_seconds")

    def on_step(engine):
        print("step", flush=True)
        time.sleep(seconds)

    engine.on_step = on_step
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return run(engine, has_signals=True, **options)


if __name__ == "__main__":
    sys.exit(main())
