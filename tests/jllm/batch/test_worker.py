"""Jobs: each line once, whatever happens to those who work on it."""

import asyncio
import errno
import json
import os
import signal
import subprocess
import sys
import threading

import pytest

from jllm.batch import JobBusyError, Outcome, StorageError, Store, worker
from jllm.batch.job import open_job
from jllm.batch.leases import CLAIMS, WORKERS
from jllm.batch.records import DONE, PARTS
from jllm.errors import ConfigError
from tests.jllm.batch.jobs import answer_line, results, work, write_input


@pytest.fixture
def inputs(tmp_path):
    return [write_input(tmp_path)]


@pytest.fixture
def expected(inputs, tmp_path):
    """What a run that nothing happens to writes."""
    assert work(inputs, tmp_path / "whole") is Outcome.FINISHED
    return results(tmp_path / "whole")


@pytest.fixture
def start(inputs):
    """Starts workers in processes of their own."""
    started = []

    def start(output, **options):
        fields = {"inputs": inputs, "output": str(output)} | options
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.jllm.batch.jobs", json.dumps(fields)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        with process:
            process.kill()


def test_output_is_in_order_and_bad_lines_are_apart(expected):
    output, errors = (
        [json.loads(line) for line in data.splitlines()] for data in expected
    )
    assert [row["line"] for row in errors] == [8, 41]
    bad = {8, 41}
    assert [row["line"] for row in output] == [i for i in range(1, 61) if i not in bad]
    by_line = {row["line"]: row for row in output}
    assert by_line[11]["text"] == by_line[12]["text"] == "answer to prompt 10"
    assert by_line[13]["custom_id"] == by_line[14]["custom_id"] == "id-12"


def test_a_job_that_is_done_leaves_its_output_alone(inputs, tmp_path, expected):
    store = Store(str(tmp_path / "whole"))
    assert worker.summary(store) == {
        "lines": 60,
        "errors": 2,
        "prompt_tokens": 120,
        "output_tokens": 180,
    }
    for folder in (PARTS, CLAIMS, WORKERS):
        assert store.names(folder) == []

    async def never(line):
        pytest.fail("nothing is left to do")

    assert work(inputs, tmp_path / "whole", never) is Outcome.FINISHED
    assert results(tmp_path / "whole") == expected


@pytest.mark.parametrize("where", ["disk", "memory"])
def test_a_stopped_job_goes_on(inputs, tmp_path, expected, where):
    output = tmp_path / "out" if where == "disk" else f"memory://{tmp_path}/out"
    answered = []

    async def answer(line):
        answered.append(line.number)
        return await answer_line(line)

    for _ in range(2):
        ended = work(inputs, output, answer, stop_after=10, max_in_flight=4)
        assert ended is Outcome.STOPPED
    assert Store(str(output)).read(DONE) is None
    assert work(inputs, output, answer) is Outcome.FINISHED
    assert results(output) == expected
    # What was in flight at a stop is begun again, and nothing else.
    assert len(answered) <= 60 + 2 * 4


def test_lines_in_flight_may_end_within_the_grace(inputs, tmp_path):
    begun = []

    async def slow(line):
        begun.append(line.number)
        await asyncio.sleep(0.02)
        return await answer_line(line)

    assert (
        work(inputs, tmp_path / "o", slow, stop_after=1, grace_seconds=5)
        is Outcome.STOPPED
    )
    files = (tmp_path / "o" / PARTS).glob("*/*.jsonl")
    rows = [row for file in files for row in file.read_text().splitlines()]
    written = [json.loads(row)["line"] for row in rows]
    assert sorted(written) == sorted(begun)
    assert len(begun) < 60


def test_killed_at_any_moment_nothing_is_lost_or_doubled(
    start, inputs, tmp_path, expected
):
    output = tmp_path / "out"
    for num_lines in (1, 9, 25):
        process = start(output)
        for _ in range(num_lines):
            assert process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (output / DONE).exists()
    assert work(inputs, output) is Outcome.FINISHED
    assert results(output) == expected


@pytest.mark.parametrize("tail", [b'{"line":3,"key":"x"', b'{"line":3}\n', b"\0\0\n"])
def test_torn_lines_are_done_again(inputs, tmp_path, expected, tail):
    output = tmp_path / "out"
    assert work(inputs, output, stop_after=20, max_in_flight=2) is Outcome.STOPPED
    journals = sorted((output / PARTS).glob("*/*.jsonl"))
    for journal in journals:
        whole = journal.read_bytes()
        last = whole.rstrip(b"\n").rfind(b"\n") + 1
        journal.write_bytes(whole[:last] + tail)
    assert journals
    assert work(inputs, output) is Outcome.FINISHED
    assert results(output) == expected


def test_a_full_disk_is_a_clean_error(inputs, tmp_path, expected, monkeypatch):
    output = tmp_path / "out"
    room, write = 1500, os.write

    def bounded(descriptor, data):
        nonlocal room
        if not room:
            raise OSError(errno.ENOSPC, "full")
        count = write(descriptor, bytes(data)[:room])
        room -= count
        return count

    with monkeypatch.context() as patch:
        patch.setattr("jllm.batch.store.os.write", bounded)
        with pytest.raises(StorageError, match="No space left on device"):
            work(inputs, output)
    # What fitted in part was taken back, and what was written before is kept.
    journals = list((output / PARTS).glob("*/*.jsonl"))
    assert all(path.read_bytes()[-1:] in (b"", b"\n") for path in journals)
    assert work(inputs, output) is Outcome.FINISHED
    assert results(output) == expected


def test_a_failure_to_answer_loses_no_answer(inputs, tmp_path, expected):
    count = 0

    async def fails(line):
        nonlocal count
        count += 1
        if count == 30:
            raise RuntimeError("the device is gone")
        return await answer_line(line)

    with pytest.raises(RuntimeError, match="device"):
        work(inputs, tmp_path / "out", fails)
    answered = []

    async def answer(line):
        answered.append(line.number)
        return await answer_line(line)

    assert work(inputs, tmp_path / "out", answer) is Outcome.FINISHED
    assert results(tmp_path / "out") == expected
    assert len(answered) < 60


def test_a_second_worker_by_mistake_is_refused(start, inputs, tmp_path, expected):
    output = tmp_path / "out"
    first = start(output, seconds=0.05, max_in_flight=2)
    assert first.stdout.readline()
    for is_shared in (False, True):
        with pytest.raises(JobBusyError, match=f"process {first.pid} on .*--shared"):
            work(inputs, output, is_shared=is_shared)
    _, errors = first.communicate(timeout=30)
    assert first.returncode == 0, errors
    assert results(output) == expected


def test_a_worker_that_shares_refuses_one_that_does_not(start, inputs, tmp_path):
    first = start(tmp_path / "out", seconds=0.05, max_in_flight=2, is_shared=True)
    assert first.stdout.readline()
    with pytest.raises(JobBusyError, match=f"process {first.pid}"):
        work(inputs, tmp_path / "out")


def test_workers_share_a_job(start, inputs, tmp_path, expected):
    answered, ended = [], []

    async def answer(line):
        answered.append(line.number)
        await asyncio.sleep(0.002)
        return await answer_line(line)

    def one(name):
        options = {"is_shared": True, "worker": name, "max_in_flight": 4}
        ended.append(work(inputs, tmp_path / "out", answer, **options))

    threads = [threading.Thread(target=one, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert ended == [Outcome.FINISHED] * 3
    assert results(tmp_path / "out") == expected
    assert sorted(answered) == list(range(1, 61))


def test_lines_of_a_killed_worker_are_done_by_another(
    start, inputs, tmp_path, expected
):
    output = tmp_path / "out"
    first = start(output, is_shared=True, seconds=0.02, max_in_flight=4)
    for _ in range(10):
        assert first.stdout.readline()
    first.kill()
    first.wait()
    assert work(inputs, output, is_shared=True) is Outcome.FINISHED
    assert results(output) == expected


def test_a_worker_that_was_stopped_too_long_leaves_the_job(
    start, inputs, tmp_path, expected
):
    output = tmp_path / "out"
    first = start(output, is_shared=True, seconds=0.05, max_in_flight=2)
    assert first.stdout.readline()
    first.send_signal(signal.SIGSTOP)
    # Its process lives and holds its lock; its signs of life have ended.
    assert work(inputs, output, is_shared=True) is Outcome.FINISHED
    assert results(output) == expected
    first.send_signal(signal.SIGCONT)
    _, errors = first.communicate(timeout=30)
    assert first.returncode == 0, errors
    assert results(output) == expected


def test_a_folder_of_something_else_is_left_alone(inputs, tmp_path):
    output = tmp_path / "out"
    (output / "parts").mkdir(parents=True)
    (output / "parts" / "mine").write_text("precious")
    with pytest.raises(ConfigError, match="holds parts of something else"):
        work(inputs, output)
    assert (output / "parts" / "mine").read_text() == "precious"


def test_other_inputs_or_settings_are_refused(inputs, tmp_path):
    output = tmp_path / "out"
    work(inputs, output, stop_after=5)
    other = write_input(tmp_path, name="other.jsonl")
    with pytest.raises(ConfigError, match=r"begun with the inputs .*in\.jsonl"):
        work([other], output)
    store = Store(str(output))
    with pytest.raises(ConfigError, match="begun with"):
        open_job(store, [str(path) for path in inputs], {"model": "other"}, 8)
    text = (tmp_path / "in.jsonl").read_text()
    (tmp_path / "in.jsonl").write_text(text.replace("prompt 59", "prompt 95"))
    with pytest.raises(ConfigError, match="has changed since the job began"):
        work(inputs, output)
