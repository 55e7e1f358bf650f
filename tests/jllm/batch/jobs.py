"""Jobs without a model, and a process that works on one.

`python -m tests.jllm.batch.jobs JSON` with the fields of `run` works on a job in a
process of its own, to be killed.
"""

import asyncio
import json
import sys

from jllm.batch import Answer, JobConfig, Progress, Store, Worker, open_job
from jllm.batch.records import ERRORS, OUTPUT

SETTINGS = {"model": "none"}


def config(**options):
    defaults = {
        "worker": "w",
        "is_shared": False,
        "range_lines": 8,
        "max_in_flight": 16,
        "lease_seconds": 1.0,
        "flush_seconds": 0.01,
        "grace_seconds": 0.0,
    }
    return JobConfig(**defaults | options)


def request(i, text=None):
    body = {"prompt": text or f"prompt {i}"}
    return {
        "custom_id": f"id-{i}",
        "method": "POST",
        "url": "/v1/completions",
        "body": body,
    }


def write_input(folder, num_lines=60, bad=(7, 40), name="in.jsonl"):
    """Requests of which some lines are bad, two bodies and two ids are equal."""
    lines = [json.dumps(request(i)) for i in range(num_lines)]
    for i in bad:
        lines[i] = "{torn"
    lines[11] = json.dumps(request(11, "prompt 10"))
    lines[13] = json.dumps(request(12))
    path = folder / name
    path.write_text("\n".join(lines) + "\n")
    return str(path)


async def answer_line(line):
    """What a model of known answers says."""
    await asyncio.sleep(0)
    is_error = line.problem is not None
    text = line.problem if is_error else f"answer to {line.body['prompt']}"
    result = {"custom_id": line.custom_id, "line": line.number, "text": text}
    return Answer(result, is_error, 2, 3)


def work(inputs, output, answer=answer_line, stop_after=None, **options):
    """Works on a job; returns how the worker ended."""
    store = Store(str(output))
    chosen = config(**options)
    job = open_job(store, inputs, SETTINGS, chosen.range_lines)
    count = 0

    async def run():
        stop = asyncio.Event()

        async def counted(line):
            nonlocal count
            found = await answer(line)
            count += 1
            if count == stop_after:
                stop.set()
            return found

        return await worker.run(counted, stop)

    progress = Progress(job.num_requests, is_shown=False)
    with progress, Worker(store, job, chosen, progress) as worker:
        return asyncio.run(run())


def results(output):
    """Output and errors of a job that is done, as bytes."""
    store = Store(str(output))
    return store.read(OUTPUT), store.read(ERRORS)


def main():
    fields = json.loads(sys.argv[1])
    seconds = fields.pop("seconds", 0.001)

    async def answer(line):
        await asyncio.sleep(seconds)
        print(line.number, flush=True)
        return await answer_line(line)

    work(answer=answer, **fields)


if __name__ == "__main__":
    main()
