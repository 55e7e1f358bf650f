"""Plans published models on slices that are not here, compiled by the real compiler.

    python -m benchmarks.plans --configs FOLDER [--only NAME ...] [--record]

FOLDER has the `<owner>--<model>_config.json` of the models, as published. Each plan is
`jllm plan` with the largest program of each kind, in a process of its own; its time is
that of lowering and compiling on this machine. Needs the extra `aot`.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import time
from typing import Any, NamedTuple

from benchmarks import record


class Case(NamedTuple):
    """A model, a slice and the devices that share each layer."""

    model: str
    topology: str
    tensor: int


CASES = (
    Case("meta-llama--Meta-Llama-3.1-8B", "v5e:2x2", 4),
    Case("meta-llama--Meta-Llama-3.1-8B", "v6e:2x2", 1),
    Case("meta-llama--Meta-Llama-3.1-8B", "h200", 1),
    Case("Qwen--Qwen3-32B", "v6e:2x4", 8),
    Case("Qwen--Qwen3-32B", "h200", 2),
    Case("meta-llama--Meta-Llama-3.1-70B", "v6e:4x4", 8),
    Case("meta-llama--Meta-Llama-3.1-70B", "tpu7x:2x2x1", 4),
    Case("meta-llama--Meta-Llama-3.1-70B", "v6e:16x16", 8),
    Case("meta-llama--Meta-Llama-3.1-70B", "h200", 4),
    Case("meta-llama--Meta-Llama-3.1-405B", "v6e:8x8", 64),
    Case("meta-llama--Meta-Llama-3.1-405B", "v6e:16x16", 128),
)


def run(case: Case, configs: pathlib.Path, max_model_len: int) -> dict[str, Any]:
    """The plan of a case, or why there is none."""
    where = ["--topology", case.topology]
    if ":" not in case.topology:
        where = ["--gpu", case.topology, "--devices", str(case.tensor)]
    command = [
        *(sys.executable, "-m", "jllm", "plan"),
        str(configs / f"{case.model}_config.json"),
        *where,
        *("--tensor", str(case.tensor), "--max-model-len", str(max_model_len)),
        *("--programs", "largest", "--json"),
    ]
    began = time.perf_counter()
    found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    row = {**case._asdict(), "max_model_len": max_model_len}
    row["seconds"] = round(time.perf_counter() - began, 1)
    if found.returncode:
        raise SystemExit(f"{case}: jllm plan failed with {found.returncode}")
    plan = json.loads(found.stdout)
    plan["model"] = case.model.partition("--")[2]
    return row | plan


def main() -> None:
    """Plans the cases one after the other, and records each when it is there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--configs", type=pathlib.Path, required=True)
    parser.add_argument("--only", nargs="+", default=[""], help="parts of case names")
    parser.add_argument("--max-model-len", type=int, default=32768)
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    for case in CASES:
        if not any(part in f"{case.model} {case.topology}" for part in options.only):
            continue
        row = run(case, options.configs, options.max_model_len)
        print(json.dumps(row), flush=True)
        if options.record:
            record.append("plans", [row])


if __name__ == "__main__":
    main()
