"""Replicas in a local Ray cluster; skipped where Ray is not installed."""

import asyncio
import os
import pathlib
import time

import pytest

from jllm import EngineConfig
from jllm.batch import Progress, Store, Worker, open_job
from server.batch.options import BatchOptions
from server.batch.ray import run_replicas
from tests.jllm.batch.jobs import answer_line, results, write_input

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.slow

SECONDS_PER_LINE = 0.02


def work_or_die(engine, options):
    """Works without a model; the process of one worker ends in the middle."""
    died = pathlib.Path(options.output).parent / "died"
    store = Store(options.output)
    job = open_job(store, options.inputs, options.settings(engine), options.range_lines)
    count = 0

    async def answer(line):
        nonlocal count
        await asyncio.sleep(SECONDS_PER_LINE)
        count += 1
        if count == 10 and not died.exists():
            died.write_text(options.worker_id)
            os._exit(1)
        return await answer_line(line)

    progress = Progress(job.num_requests, is_shown=False)
    with Worker(store, job, options.job_config(engine), progress) as worker:
        asyncio.run(worker.run(answer, asyncio.Event()))
    (died.parent / f"ended-{options.worker_id}").write_text(str(progress.num_lines))
    return 0


def test_lines_of_a_dead_replica_are_done_by_others(tmp_path):
    options = BatchOptions(
        inputs=[write_input(tmp_path, num_lines=200)],
        output=str(tmp_path / "out"),
        ray=True,
        num_replicas=2,
        range_lines=8,
        max_in_flight=4,
        flush_seconds=0.05,
        # Longer than the test: the driver tells that the worker is dead, no lease does.
        lease_seconds=600.0,
    )
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        began = time.monotonic()
        assert run_replicas(EngineConfig(), options, work_or_die) == 0
        assert time.monotonic() - began < 300
    finally:
        ray.shutdown()
    output, errors = results(tmp_path / "out")
    assert output.count(b"\n") == 198
    assert errors.count(b"\n") == 2
    dead = (tmp_path / "died").read_text()
    ended = {path.name: int(path.read_text()) for path in tmp_path.glob("ended-*")}
    assert len(ended) == 2
    assert f"ended-{dead}" not in ended
    assert f"ended-ray_{dead.split(chr(95))[1]}_2" in ended
    # Of the dead one's answers, those that it had written are not made again.
    assert 190 <= sum(ended.values()) <= 200
