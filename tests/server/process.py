"""A server process over the fake engine, with faults: `python -m tests.server.process`.

Arguments: a JSON object with the fields of `ServerConfig`, and with `step_seconds`,
`raise_at` and `hang_at` (numbers of steps) for the faults.
"""

import json
import logging
import sys
import time
import unittest.mock

from jllm import AsyncLLM, EngineConfig
from server.config import ServerConfig
from server.serving import serve
from tests.fakes import FakeEngine


def main():
    options = json.loads(sys.argv[1])
    engine = FakeEngine("x" * 100)
    step_seconds = options.pop("step_seconds", 0.01)
    hang_at = options.pop("hang_at", None)
    engine.fail_at = options.pop("raise_at", None)

    def on_step(engine):
        time.sleep(1e6 if engine.num_steps == hang_at else step_seconds)

    engine.on_step = on_step
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    def make_llm(config):
        name = "jllm.async_llm.create_engine"
        with unittest.mock.patch(name, return_value=engine):
            return AsyncLLM.from_engine_config(config)

    code = serve(EngineConfig(model="fake"), ServerConfig(**options), make_llm)
    print("exit", code, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
