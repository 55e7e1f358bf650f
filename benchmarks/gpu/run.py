"""Everything that an NVIDIA GPU is asked, in one go of at most 45 minutes.

    python -m benchmarks.gpu.run [--dry-run] [--parts NAME ...] [--out FOLDER]

Each part is a process of its own with its own limit of time, so that one that fails or
hangs loses nothing but itself; what it prints lies in a log of its own, and its
figures are in benchmarks/results when it ends. The order is that of importance: with
less time, later parts are lost. `--dry-run` runs every part on the CPU with tiny shapes
and records nothing: a trial of the script. `summary.jsonl` has a line per part.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from benchmarks.gpu import models

ROOT = pathlib.Path(__file__).parents[2]
NO_COMMAND_BUFFERS = "--xla_gpu_enable_command_buffer="
BIG, SMALL = "llama-3.1-8b", "qwen3-0.6b"


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """One process.

    Attributes:
        name: Its name, also of its log.
        arguments: Module and arguments for `python -m`.
        seconds: It is stopped after so long.
        xla_flags: Added to XLA_FLAGS.
    """

    name: str
    arguments: tuple[str, ...]
    seconds: int
    xla_flags: str = ""


def steps(model: str, rows: str, contexts: str, *more: str) -> tuple[str, ...]:
    """Arguments of `benchmarks.gpu.steps`."""
    numbers = ("--rows", *rows.split(), "--contexts", *contexts.split())
    return ("benchmarks.gpu.steps", model, *numbers, *more)


def offline(
    folder: pathlib.Path, model: str, count: int, *flags: str
) -> tuple[str, ...]:
    """Arguments of a run of `jllm bench throughput` with fixed or random lengths."""
    weights = str(models.config_folder(model, folder / "configs"))
    load = ["--num-prompts", str(count), "--random-weights", weights, *flags]
    result = folder / f"throughput-{model}-{'-'.join(flags[1::2])}.json"
    return ("jllm", "bench", "throughput", *load, "--json", str(result))


def lengths(prompt: int, output: int, spread: float = 0.0) -> tuple[str, ...]:
    """Flags of a random workload."""
    given = {"input-len": prompt, "output-len": output, "range-ratio": spread}
    return tuple(
        word for name, n in given.items() for word in (f"--random-{name}", str(n))
    )


def full_plan(folder: pathlib.Path) -> list[Part]:
    """The parts on a GPU, the most important first."""
    startup = ["jllm", "bench", "startup", "--random-weights"]
    startup += [str(models.config_folder(SMALL, folder / "configs"))]
    startup += ["--num-iters-cold", "1", "--num-iters-warm", "2"]
    nano = lengths(562, 562, 0.82)  # 100 to 1024 tokens, as nano-vllm's workload
    plain = ("--label", "default")
    without = ("--label", "no command buffers")
    return [
        Part("basics", ("benchmarks.gpu.basics", *plain), 120),
        Part("steps-small", steps(SMALL, "1 8 64 256", "512 2048", *plain), 240),
        Part("steps-big", steps(BIG, "1 8 32 64", "512 2048 8192", *plain), 360),
        Part("torch-small", ("benchmarks.gpu.torch_loops", SMALL), 180),
        Part("torch-big", ("benchmarks.gpu.torch_loops", BIG), 240),
        Part(
            "steps-no-command-buffers",
            steps(SMALL, "1 8", "512", "--prefill", *without),
            150,
            NO_COMMAND_BUFFERS,
        ),
        Part(
            "basics-no-command-buffers",
            ("benchmarks.gpu.basics", *without),
            90,
            NO_COMMAND_BUFFERS,
        ),
        Part("offline-big", offline(folder, BIG, 512, *lengths(1000, 1000)), 300),
        Part("offline-prompts", offline(folder, BIG, 512, *lengths(2048, 128)), 200),
        Part("offline-small", offline(folder, SMALL, 256, *nano), 150),
        Part(
            "continuous-batching-small",
            ("benchmarks.gpu.torch_batching", SMALL, "--requests", "256"),
            200,
        ),
        Part(
            "continuous-batching-big",
            ("benchmarks.gpu.torch_batching", BIG, "--requests", "128"),
            240,
        ),
        Part("kernels", ("benchmarks.kernels.run", "--record"), 480),
        Part("startup", tuple(startup), 240),
    ]


def trial_plan(folder: pathlib.Path) -> list[Part]:
    """The same parts with tiny shapes, recording nothing."""
    startup = ["jllm", "bench", "startup", "--random-weights"]
    startup += [str(models.config_folder("tiny", folder / "configs"))]
    startup += ["--num-iters-cold", "1", "--num-iters-warm", "1", "--num-iters-warmup"]
    startup += ["0", "--max-num-seqs", "4", "--max-num-batched-tokens", "64"]
    small = ("--max-num-seqs", "4", "--max-num-batched-tokens", "64")
    fixed = ("--num-blocks", "256")
    tiny = steps("tiny", "1 2", "64", "--prefill", "64", "--steps", "8", "--trial")
    return [
        Part("basics", ("benchmarks.gpu.basics", "--trial"), 120),
        Part("steps", (*tiny, *fixed), 240),
        Part(
            "torch",
            (
                "benchmarks.gpu.torch_loops",
                *("tiny", "--contexts", "64", "--steps", "8", "--trial"),
            ),
            180,
        ),
        Part(
            "steps-no-command-buffers",
            (*tiny, *fixed, "--label", "no command buffers"),
            240,
            NO_COMMAND_BUFFERS,
        ),
        Part(
            "continuous-batching",
            (
                "benchmarks.gpu.torch_batching",
                *("tiny", "--requests", "4", "--mean", "16", "--trial"),
            ),
            180,
        ),
        Part(
            "offline",
            (*offline(folder, "tiny", 4, *lengths(32, 8)), *small, *fixed),
            180,
        ),
        Part(
            "kernels",
            ("benchmarks.kernels.run", "--small", "--operations", "rms_norm"),
            180,
        ),
        Part("startup", (*startup, *fixed), 240),
    ]


def run_part(part: Part, folder: pathlib.Path, platforms: str) -> dict[str, object]:
    """Runs a part to its end or its limit, with everything that it started."""
    log = folder / f"{part.name}.log"
    flags = f"{os.environ.get('XLA_FLAGS', '')} {part.xla_flags}".strip()
    environment = {**os.environ, "JAX_PLATFORMS": platforms, "XLA_FLAGS": flags}
    began = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", *part.arguments],
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status: int | str = process.wait(part.seconds)
        except subprocess.TimeoutExpired:
            status = "stopped at its limit"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    seconds = round(time.monotonic() - began, 1)
    return {"part": part.name, "status": status, "seconds": seconds, "log": str(log)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the parts one after the other; the exit code says whether all went well."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--parts", nargs="+", metavar="NAME")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / ".cache" / "gpu")
    options = parser.parse_args(arguments)
    folder = options.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    plan = (trial_plan if options.dry_run else full_plan)(folder)
    names = [part.name for part in plan]
    unknown = set(options.parts or ()) - set(names)
    if unknown:
        parser.error(f"no part {sorted(unknown)}; there are {names}")
    platforms = "cpu" if options.dry_run else "cuda,cpu"
    failed = 0
    for part in plan:
        if options.parts and part.name not in options.parts:
            continue
        outcome = run_part(part, folder, platforms)
        failed += outcome["status"] != 0
        print(json.dumps(outcome), flush=True)
        with (folder / "summary.jsonl").open("a") as file:
            file.write(json.dumps(outcome) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
