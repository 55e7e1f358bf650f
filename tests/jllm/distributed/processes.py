"""Starts the hosts of a job as processes of this computer."""

import contextlib
import json
import os
import pathlib
import socket
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parents[3]
SECRET = "0123456789abcdef"


def free_port():
    """A port that is free, and the next one too, which JAX takes."""
    while True:
        with socket.socket() as first:
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
            with socket.socket() as second, contextlib.suppress(OSError):
                second.bind(("127.0.0.1", port + 1))
                return port


class Job:
    """The processes of one job, ended with it.

    Args:
        folder: For the secret and the logs.
        engine: Fields of `EngineConfig`.
        num_hosts: Processes.
        devices: Devices of each.
        work: What the first one does.
        timeout: Of the watchdogs.
        per_host: Fields of `EngineConfig` of single hosts, by id.
        others: Folders of the same weights.
    """

    def __init__(
        self,
        folder,
        engine,
        num_hosts,
        devices=2,
        work="tokens",
        timeout=20.0,
        per_host=None,
        others=(),
    ):
        self.folder, self.num_hosts = pathlib.Path(folder), num_hosts
        self.port = free_port()
        secret = self.folder / "secret"
        secret.write_text(SECRET)
        self.processes = []
        for host in range(num_hosts):
            hosts = {
                "coordinator": f"127.0.0.1:{self.port}",
                "num_hosts": num_hosts,
                "host_id": host,
                "secret_file": str(secret),
                "timeout": timeout,
                "start_timeout": 280.0,
            }
            argument = {
                "hosts": hosts,
                "engine": engine | (per_host or {}).get(host, {}),
                "work": work,
                "devices": devices,
                "others": list(others),
            }
            log = (self.folder / f"host{host}.log").open("w")
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "tests.jllm.distributed.worker",
                     json.dumps(argument)],
                    cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, text=True,
                    env=os.environ | {"JAX_PLATFORMS": "cpu"},
                )
            )  # fmt: skip
            log.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.wait()

    def log(self, host):
        return (self.folder / f"host{host}.log").read_text()

    def wait_for(self, text, host=0, seconds=280):
        """Waits until a host has said something."""
        deadline = time.monotonic() + seconds
        while text not in self.log(host):
            assert time.monotonic() < deadline, self.logs()
            assert self.processes[host].poll() is None, self.logs()
            time.sleep(0.02)

    def wait(self, hosts=None, seconds=280):
        """Waits for hosts to end; their exit codes and how long it took."""
        began = time.monotonic()
        hosts = range(self.num_hosts) if hosts is None else hosts
        try:
            codes = [
                self.processes[h].wait(max(1, began + seconds - time.monotonic()))
                for h in hosts
            ]
        except subprocess.TimeoutExpired:
            raise AssertionError(self.logs()) from None
        return codes, time.monotonic() - began

    def outputs(self):
        """What the first host has computed."""
        lines = self.log(0).splitlines()
        return json.loads(next(line for line in lines if line.startswith("[{")))

    def logs(self):
        """What all hosts have said."""
        return "\n".join(f"--- host {h}\n{self.log(h)}" for h in range(self.num_hosts))
