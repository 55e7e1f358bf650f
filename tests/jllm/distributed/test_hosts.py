"""Several processes as hosts: the tokens of one, and the end of all with one.

Four hosts, and more ways to fail, are in `benchmarks/hosts.py`.
"""

import json
import signal
import time

import pytest

from jllm.cli import main
from tests.engines import LLAMA, SMALL, model_folder, random_tensors, shared_engine
from tests.jllm.distributed.processes import Job
from tests.jllm.distributed.workload import assert_same, outputs_of

CONFIG = {**LLAMA, "num_key_value_heads": 2}


def engine_fields(**other):
    folder = str(model_folder(json.dumps(CONFIG)))
    return {"model": folder, "tensor_parallel_size": 4, **SMALL, **other}


@pytest.mark.slow
def test_two_hosts_give_the_tokens_of_one_and_end_together(tmp_path):
    """A host that pauses is waited for; one that is killed ends the other."""
    with Job(tmp_path, engine_fields(), 2, work="endless", timeout=60.0) as job:
        expected = outputs_of(shared_engine(CONFIG))
        job.wait_for("started")
        job.processes[1].send_signal(signal.SIGSTOP)
        time.sleep(0.5)
        job.processes[1].send_signal(signal.SIGCONT)
        job.wait_for("computed")
        assert_same(job.outputs(), expected)
        job.processes[1].kill()
        codes, _ = job.wait([0], seconds=30)
        assert codes == [70]
        (line,) = [line for line in job.log(0).splitlines() if "host 1 died" in line]
        assert line.endswith("; all hosts end")


@pytest.mark.slow
def test_each_host_reads_its_own_slices_only(tmp_path):
    """A quarter each of what is divided, and the norms; from orbax the same values."""
    config = LLAMA | {"num_key_value_heads": 8, "vocab_size": 512}
    folder = model_folder(json.dumps(config))
    orbax = tmp_path / "orbax"
    command = ["convert", str(folder), str(orbax), "--format", "orbax", "--quiet"]
    assert main([*command, "--tensor-parallel-size", "2"]) == 0
    tensors = random_tensors(config)
    norms = sum(tensor.nbytes for tensor in tensors.values() if tensor.ndim == 1)
    divided = sum(tensor.nbytes for tensor in tensors.values()) - norms
    engine = {"model": str(folder), "tensor_parallel_size": 8}
    with Job(tmp_path, engine, 4, work="weights", others=[str(orbax)]) as job:
        assert job.wait()[0] == [0] * 4, job.logs()
        read = [
            int(line.split()[1])
            for host in range(4)
            for line in job.log(host).splitlines()
            if line.startswith("read ")
        ]
        assert read == [divided // 4 + norms] * 4
        assert all("same" in job.log(host) for host in range(4))
