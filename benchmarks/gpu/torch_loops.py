"""One stream in torch: plain, compiled with a static cache, and as a CUDA graph.

    python -m benchmarks.gpu.torch_loops MODEL [--contexts 512] [--steps 64] [--trial]

The same shapes with random weights, greedy, one token per step. `compiled` is
`torch.compile(mode="reduce-overhead")` over transformers' static cache; `graph` is the
same step captured once in a CUDA graph and replayed, without compiling anything. On a
CPU the compiler's back end is "eager" and there is no graph: a trial of the script.
"""

import argparse
import json
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, StaticCache

from benchmarks import record
from benchmarks.gpu import models

BANDWIDTH = 4.3e12
WARM_UP = 4


class Decoder:
    """A model with a static cache, and buffers whose addresses never change."""

    def __init__(self, folder: pathlib.Path, context: int, steps: int) -> None:
        """Makes random weights on the device and fills the cache with a prompt."""
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        config = AutoConfig.from_pretrained(folder)
        with torch.device(self.device):
            model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        self.model = model.eval()
        self.config, self.length = config, context + steps + 2 * WARM_UP + 1
        self.prompt = torch.randint(3, config.vocab_size, (1, context))
        self.token = torch.zeros((1, 1), dtype=torch.long, device=self.device)
        self.place = torch.zeros(1, dtype=torch.long, device=self.device)
        self.cache: Any = None

    def reset(self) -> None:
        """A new cache with the prompt in it."""
        self.cache = StaticCache(config=self.config, max_cache_len=self.length)
        places = torch.arange(self.prompt.shape[1], device=self.device)
        out = self.model(
            self.prompt.to(self.device),
            past_key_values=self.cache,
            cache_position=places,
            position_ids=places[None],
        )
        self.token.copy_(out.logits[:, -1:].argmax(-1))
        self.place.fill_(self.prompt.shape[1])

    def step(self) -> None:
        """One token: reads and writes the buffers only."""
        out = self.model(
            self.token,
            past_key_values=self.cache,
            cache_position=self.place,
            position_ids=self.place[None],
        )
        self.token.copy_(out.logits[:, -1:].argmax(-1))
        self.place.add_(1)

    def wait(self) -> None:
        """Returns when the device has done all."""
        if self.device == "cuda":
            torch.cuda.synchronize()


def compiled_step(decoder: Decoder) -> Callable[[], None]:
    """The step with a compiled forward pass."""
    if decoder.device == "cuda":
        compiled = torch.compile(decoder.model.forward, mode="reduce-overhead")
    else:
        compiled = torch.compile(decoder.model.forward, backend="eager")

    def step() -> None:
        out = compiled(
            decoder.token,
            past_key_values=decoder.cache,
            cache_position=decoder.place,
            position_ids=decoder.place[None],
        )
        decoder.token.copy_(out.logits[:, -1:].argmax(-1))
        decoder.place.add_(1)

    return step


def graph_step(decoder: Decoder) -> Callable[[], None]:
    """The step as a CUDA graph; warm-up on a side stream, as capture asks for."""
    stream: Any = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            decoder.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph: Any = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decoder.step()
    return graph.replay


def measure(decoder: Decoder, kind: str, steps: int) -> float:
    """Seconds per token."""
    decoder.reset()
    make = {"plain": lambda d: d.step, "compiled": compiled_step, "graph": graph_step}
    step = make[kind](decoder)
    for _ in range(WARM_UP):
        step()
    decoder.wait()
    times: list[float] = []
    for _ in range(4):
        began = time.perf_counter()
        for _ in range(steps // 4):
            step()
        decoder.wait()
        times.append((time.perf_counter() - began) / (steps // 4))
    return statistics.median(times)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints and records the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=models.SHAPES)
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--trial", action="store_true", help="record nothing")
    options = parser.parse_args(arguments)
    kinds = ["plain", "compiled", *(["graph"] if torch.cuda.is_available() else [])]
    if "graph" not in kinds:
        print("graph: left out, there is no CUDA device")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        path = models.config_folder(options.model, pathlib.Path(folder))
        for context in options.contexts:
            decoder = Decoder(path, context, options.steps)
            read = models.weight_bytes(options.model)
            read += context * models.kv_bytes(options.model)
            for kind in kinds:
                seconds = measure(decoder, kind, options.steps)
                rows.append(
                    {
                        "model": options.model,
                        "engine": f"torch {torch.__version__}, {kind}",
                        "step": "decode",
                        "rows": 1,
                        "context": context,
                        "milliseconds": round(1e3 * seconds, 4),
                        "mbu": round(read / seconds / BANDWIDTH, 4),
                    }
                )
                print(json.dumps(rows[-1]), flush=True)
            del decoder
    if not options.trial:
        record.append("gpu_steps", rows)


if __name__ == "__main__":
    main()
