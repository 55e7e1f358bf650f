"""Which host a process is, from flags and from what Slurm and GKE tell."""

import argparse

import pytest

from jllm.commands.hosts import add_flags, complete_hosts, first_node, given_hosts
from jllm.errors import ConfigError

SLURM = {
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_STEP_NODELIST": "gpu[003-006]",
}
TPU = {"TPU_WORKER_ID": "1", "TPU_WORKER_HOSTNAMES": "w-0.svc,w-1.svc"}
SECRET = {"secret_file": "/run/secret"}


def place(config):
    return config.coordinator, config.num_hosts, config.host_id


def parse(*arguments):
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return given_hosts(parser.parse_args(arguments))


def test_all_flags():
    config = parse(
        "--coordinator", "h:9000", "--num-hosts", "2", "--host-id", "1",
        "--host-secret-file", "/s", "--host-timeout", "5", "--host-start-timeout", "9",
    )  # fmt: skip
    assert place(config) == ("h:9000", 2, 1)
    assert (config.secret_file, config.timeout, config.start_timeout) == ("/s", 5, 9)
    assert config.address == ("h", 9000)
    assert config.jax_address == "h:9001"


def test_without_flags_there_is_one_host():
    assert parse() is None


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (SLURM, ("gpu003:8470", 4, 2)),
        (TPU, ("w-0.svc:8470", 2, 1)),
        # A pod of a TPU slice may have been started by Slurm's kind of tools, too.
        (SLURM | TPU, ("w-0.svc:8470", 2, 1)),
    ],
)
def test_the_environment_tells(environment, expected):
    assert place(complete_hosts(SECRET, environment)) == expected


def test_flags_come_before_the_environment():
    config = complete_hosts({**SECRET, "coordinator": "x:1", "host_id": 0}, SLURM)
    assert place(config) == ("x:1", 4, 0)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        # One task, as in an interactive job.
        SLURM | {"SLURM_STEP_NUM_TASKS": "1"},
        TPU | {"TPU_WORKER_HOSTNAMES": "w-0.svc"},
    ],
)
def test_what_nobody_tells_is_asked_for(environment):
    with pytest.raises(ConfigError, match="--coordinator, --num-hosts, --host-id must"):
        complete_hosts(SECRET, environment)


def test_the_secret_is_asked_for():
    with pytest.raises(ConfigError, match="--host-secret-file must be given: hosts"):
        complete_hosts({"host_id": 1}, SLURM)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("node[001-015],other", "node001"),
        ("node[001,007-015],other", "node001"),
        ("a,node[1-2]", "a"),
        ("rack[1-2]-gpu,x", "rack1-gpu"),
    ],
)
def test_the_first_node_of_a_list(nodes, first):
    assert first_node(nodes) == first


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("coordinator", "host", "must be HOST:PORT"),
        ("coordinator", "host:65535", "from 1 to 65534"),
        ("num_hosts", 0, "num_hosts=0 must be at least 1"),
        ("host_id", 2, "host_id=2 must be at least 0 and below num_hosts=2"),
        ("host_id", -1, "host_id=-1 must"),
        ("timeout", 61.0, "above 0 and at most 60"),
        ("start_timeout", 0.0, "start_timeout=0.0 must be above 0"),
    ],
)
def test_wrong_values_are_named(field, value, message):
    given = {**SECRET, "coordinator": "h:1", "num_hosts": 2, "host_id": 0, field: value}
    with pytest.raises(ConfigError, match=message):
        complete_hosts(given, {})
