"""Several hosts as processes of this computer: same tokens, and every way to fail.

    python -m benchmarks.hosts [--case NAME …] [--record]

Each host has two CPU devices and joins the others through `jax.distributed`. A case
passes if the tokens are those of one process, or if all hosts that are left end within
the watchdog's time, with exit code 70 (2 before the first collective) and a line that
names the right host.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import jax

from benchmarks import record
from jllm import LLM, SamplingParams
from tests.engines import LLAMA, SMALL, make_engine, model_folder, random_tensors
from tests.jllm.distributed.processes import SECRET, Job, free_port
from tests.jllm.distributed.workload import assert_same, outputs_of

CONFIG = {**LLAMA, "num_key_value_heads": 2}
TIMEOUT = 10.0
"""Seconds of the watchdogs; 45 by default."""

FAULTS = {
    # case: hosts, who is hit, by what, what the others say
    "kill a follower": (4, 2, signal.SIGKILL, "host 2 died"),
    "kill the leader": (4, 0, signal.SIGKILL, "host 0 died"),
    "stop a follower": (4, 2, signal.SIGSTOP, "host 2 has"),
    "stop the leader": (4, 0, signal.SIGSTOP, "host 0 has not been heard"),
    "kill one of two": (2, 1, signal.SIGKILL, "host 1 died"),
    "stop one of two": (2, 1, signal.SIGSTOP, "host 1 has"),
}


def fields(folder, num_hosts, **other):
    return {
        "model": str(folder), "tensor_parallel_size": 2 * num_hosts, **SMALL, **other
    }  # fmt: skip


def same_tokens(num_hosts, *, ahead=False, pause=0.0):
    """Whether the tokens are those of one process; a host may pause meanwhile."""
    folder = model_folder(json.dumps(CONFIG))
    engine = fields(folder, num_hosts, compile_ahead=ahead)
    with (
        tempfile.TemporaryDirectory() as logs,
        Job(logs, engine, num_hosts, timeout=TIMEOUT) as job,
    ):
        job.wait_for("started")
        began = time.monotonic()
        if pause:
            job.processes[1].send_signal(signal.SIGSTOP)
            time.sleep(pause)
            job.processes[1].send_signal(signal.SIGCONT)
        codes, _ = job.wait()
        seconds = time.monotonic() - began
        assert codes == [0] * num_hosts, job.logs()
        found = job.outputs()
    one = make_engine(CONFIG)
    assert_same(found, outputs_of(one))
    one.close()
    tokens = sum(len(entry["tokens"]) for told in found for entry in told.values())
    return {"tokens": tokens, "seconds": round(seconds, 2), "paused": pause}


def ends(num_hosts, victim, what, says):
    """How long the others live on after a host is hit, and what they say."""
    folder = model_folder(json.dumps(CONFIG))
    with tempfile.TemporaryDirectory() as logs:
        engine = fields(folder, num_hosts)
        with Job(logs, engine, num_hosts, work="endless", timeout=TIMEOUT) as job:
            job.wait_for("started")
            time.sleep(1.0)
            job.processes[victim].send_signal(what)
            others = [host for host in range(num_hosts) if host != victim]
            codes, seconds = job.wait(others, seconds=60)
            lines = [
                [line for line in job.log(host).splitlines() if "all hosts end" in line]
                for host in others
            ]
            named = [any(says in line for line in of_host) for of_host in lines]
            assert all(codes), (codes, job.logs())
            assert all(named), (named, codes, job.logs())
            assert codes == [70] * len(others), (codes, job.logs())
    return {"seconds": round(seconds, 2), "codes": codes, "says": lines[0][0]}


def differs(other, says, wrong_weights=False):
    """What is said where one host has something else, before anything is computed."""
    folder = model_folder(json.dumps(CONFIG))
    with tempfile.TemporaryDirectory() as logs:
        if wrong_weights:
            copy = Path(logs) / "model"
            shutil.copytree(folder, copy)
            from safetensors.numpy import save_file

            save_file(random_tensors(CONFIG, seed=1), copy / "model.safetensors")
            other = {"model": str(copy)}
        with Job(logs, fields(folder, 2), 2, per_host={1: other}) as job:
            codes, seconds = job.wait()
            assert all(codes), (codes, job.logs())
            for host in range(2):
                assert says in job.log(host), job.logs()
                assert "KV pool" not in job.log(host)
    return {"seconds": round(seconds, 2), "codes": codes, "says": says}


def serves():
    """`jllm serve` on two hosts: an answer over HTTP, then SIGTERM to both."""
    port, http = free_port(), free_port()
    with tempfile.TemporaryDirectory() as folder:
        secret = Path(folder) / "secret"
        secret.write_text(SECRET)
        command = [
            sys.executable, "-m", "jllm", "serve", "--coordinator", f"127.0.0.1:{port}",
            "--num-hosts", "2", "--host-secret-file", str(secret),
            "--tensor-parallel-size", "2", "--max-num-seqs", "8", "--num-blocks", "256",
            "--host-timeout", str(TIMEOUT), "--port", str(http), "--host-id",
        ]  # fmt: skip
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        logs = [(Path(folder) / f"log{host}").open("w+") for host in range(2)]
        hosts = [
            subprocess.Popen(
                [*command, str(host)], stdout=log, stderr=log, env=environment
            )
            for host, log in enumerate(logs)
        ]
        try:
            answer = ask(http, hosts)
            for process in hosts:
                process.send_signal(signal.SIGTERM)
            codes = [process.wait(60) for process in hosts]
        finally:
            for process in hosts:
                process.kill()
            said = [(Path(folder) / f"log{host}").read_text() for host in range(2)]
    assert codes == [0, 0], (codes, said)
    with LLM(max_num_seqs=8, num_blocks=256) as llm:
        params = SamplingParams(temperature=0, max_tokens=16)
        (output,) = llm.generate("Once upon a time", params, use_tqdm=False)
    assert answer == output.outputs[0].text, (answer, said)
    return {"codes": codes, "answer": answer}


def ask(port, hosts):
    """The text of one completion, once the server is there."""
    body = {"prompt": "Once upon a time", "max_tokens": 16, "temperature": 0}
    for _ in range(600):
        assert all(process.poll() is None for process in hosts)
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models") as reply:
                body["model"] = json.load(reply)["data"][0]["id"]
            break
        except OSError:
            time.sleep(0.2)
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    while True:
        assert all(process.poll() is None for process in hosts)
        try:
            with urllib.request.urlopen(request) as reply:
                return json.load(reply)["choices"][0]["text"]
        except urllib.error.HTTPError as error:
            if error.code != 503:  # still loading
                raise
            time.sleep(0.2)


CASES = {
    "two hosts, tp 4": lambda: same_tokens(2),
    "four hosts, tp 8": lambda: same_tokens(4),
    "two hosts, programs compiled meanwhile": lambda: same_tokens(2, ahead=True),
    "four hosts, one paused": lambda: same_tokens(4, pause=0.6 * TIMEOUT),
    **{
        name: lambda arguments=arguments: ends(*arguments)
        for name, arguments in FAULTS.items()
    },
    "jllm serve on two hosts": serves,
    "another option": lambda: differs(
        {"max_num_seqs": 4}, "host 1 differs from host 0: max_num_seqs is 4, not 8"
    ),
    "other weights": lambda: differs(
        {}, "differs from host 0: checkpoint file model.safetensors", wrong_weights=True
    ),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", action="append", choices=list(CASES))
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    rows = []
    for name in options.case or CASES:
        rows.append({"case": name, "timeout": TIMEOUT, **CASES[name]()})
        print(json.dumps(rows[-1]), flush=True)
    if options.record:
        record.append("hosts", rows)


if __name__ == "__main__":
    main()
