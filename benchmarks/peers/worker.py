"""One engine in a process of its own: opens it, then answers one line after the other.

python -m benchmarks.peers.worker NAME '{"folder": ..., "dtype": ...}'
"""

import importlib
import json
import sys
import time

from benchmarks.peers.protocol import (
    NotInstalledError,
    Settings,
    take_standard_output,
    write,
)

ADAPTERS = {
    "jllm": "jllm_engine",
    "transformers": "transformers_generate",
    "transformers-cb": "transformers_batching",
    "llamacpp": "llamacpp",
    "openvino": "openvino",
    "sglang-jax": "sglang_jax",
    "vllm": "vllm",
}


def main() -> int:
    """Serves until its input ends."""
    protocol = take_standard_output()
    name, settings = sys.argv[1], Settings(**json.loads(sys.argv[2]))
    began = time.monotonic()
    try:
        module = importlib.import_module(f"benchmarks.peers.{ADAPTERS[name]}")
        peer = module.open_peer(settings)
    except NotInstalledError as error:
        write(protocol, {"missing": str(error)})
        return 0
    write(protocol, {"ready": peer.version, "seconds": time.monotonic() - began})
    for line in sys.stdin:
        request = json.loads(line)
        began = time.monotonic()
        answers = peer.run(request["prompts"], request["lengths"])
        ended = time.monotonic()
        write(
            protocol,
            {
                "seconds": ended - began,
                "tokens": [answer.tokens for answer in answers],
                "first": [a.first and a.first - began for a in answers],
                "end": [a.end and a.end - began for a in answers],
                "cached": [a.cached for a in answers],
            },
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
