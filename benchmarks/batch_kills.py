"""Kills a batch job at random moments until it is done; compares with a whole run.

    python -m benchmarks.batch_kills [--kills 50] [--seconds 150] [--folder FOLDER]

The embedded model completes prompts greedily, through the command line. After every
`kill -9`, at a moment drawn at random from loading to merging, the same command is
started again; when the kills are spent it runs to its end. The output must be equal,
line by line, to that of a job that nothing has happened to. A run that is out of time
leaves its state in the folder, and goes on from there.
"""

import argparse
import json
import pathlib
import random
import subprocess
import sys
import time

from benchmarks import record

BAD_EVERY = 100


def write_input(path: pathlib.Path, num_lines: int) -> None:
    """Requests of which 1 % are bad, and some bodies and ids are equal."""
    rng = random.Random(0)
    lines: list[str] = []
    for i in range(num_lines):
        prompt = (
            f"One day {rng.choice(['Tom', 'Lily', 'a cat'])} saw {rng.randint(1, 40)}"
        )
        body = {"prompt": prompt, "max_tokens": rng.randint(8, 48), "temperature": 0}
        request = {
            "custom_id": f"id-{rng.randint(0, num_lines)}",
            "method": "POST",
            "url": "/v1/completions",
            "body": body,
        }
        lines.append("{torn" if i % BAD_EVERY == 50 else json.dumps(request))
    path.write_text("\n".join(lines) + "\n")


def start(source: pathlib.Path, output: pathlib.Path) -> subprocess.Popen[bytes]:
    """Starts the job's command in a process of its own."""
    options = f"BatchOptions(inputs=[{str(source)!r}], output={str(output)!r}, "
    options += "range_lines=64, flush_seconds=0.2)"
    code = (
        "import sys\n"
        "from jllm import EngineConfig\n"
        "from server.batch.options import BatchOptions\n"
        "from server.batch.process import run_batch\n"
        f"sys.exit(run_batch(EngineConfig(dtype='float32'), {options}))\n"
    )
    return subprocess.Popen([sys.executable, "-c", code])


def run_whole(source: pathlib.Path, output: pathlib.Path) -> float:
    """Runs the job to its end; returns the seconds it took."""
    began = time.monotonic()
    assert start(source, output).wait() == 0
    return time.monotonic() - began


def read(path: pathlib.Path) -> list[tuple[str, object, object]]:
    """Lines without what differs from one time to the next."""
    found: list[tuple[str, object, object]] = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        answer = row["response"] and row["response"]["body"]["choices"]
        found.append((row["id"], row["custom_id"], answer or row["error"]))
    return found


def main() -> None:
    """Kills, compares, and records."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--lines", type=int, default=3000)
    parser.add_argument("--seconds", type=float, default=150)
    parser.add_argument("--folder", type=pathlib.Path, default="/tmp/jllm-batch-kills")
    options = parser.parse_args()
    folder: pathlib.Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    source, state = folder / "in.jsonl", folder / "state.json"
    began = time.monotonic()
    if not state.exists():
        write_input(source, options.lines)
        whole = run_whole(source, folder / "whole")
        state.write_text(json.dumps({"kills": 0, "done": 0, "whole": whole}))
    counts = json.loads(state.read_text())
    rng = random.Random(counts["kills"])
    while counts["kills"] < options.kills:
        if time.monotonic() - began > options.seconds:
            print(f"{counts['kills']} kills; out of time, call again")
            return
        job = folder / f"killed-{counts['done']}"
        process = start(source, job)
        try:
            process.wait(rng.uniform(0.1, counts["whole"]))
            # It was done before its end came: the next kills are for another job.
            counts["done"] += 1
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            counts["kills"] += 1
        state.write_text(json.dumps(counts))
    run_whole(source, folder / f"killed-{counts['done']}")
    for i in range(counts["done"] + 1):
        for name in ("output.jsonl", "errors.jsonl"):
            expected, found = (
                read(folder / job / name) for job in ("whole", f"killed-{i}")
            )
            assert found == expected, (i, name)
    row = {
        "kills": counts["kills"],
        "jobs": counts["done"] + 1,
        "lines": options.lines,
        "bad_lines": len(read(folder / "whole" / "errors.jsonl")),
        "outcome": "outputs equal those of a run without kills",
    }
    print(row)
    record.append("batch_kills", [row])


if __name__ == "__main__":
    main()
