"""Flags for several hosts, and what the environment tells of them."""

import argparse
import os
import re
from collections.abc import Mapping
from typing import Any

from jllm import flags
from jllm.config import HostConfig
from jllm.errors import ConfigError

RENAMED = {
    "secret_file": "host-secret-file",
    "timeout": "host-timeout",
    "start_timeout": "host-start-timeout",
}
"""Fields of `HostConfig` whose names say too little among all flags."""

DEFAULT_PORT = 8470
"""Port of the first host where only its name is known; JAX's is the next one."""

PLACE = ("coordinator", "num_hosts", "host_id")
"""What the environment may tell."""


def add_flags(parser: Any) -> None:
    """Adds the flags of `HostConfig` as a group of their own."""
    group = parser.add_argument_group(
        "hosts",
        "one engine on the devices of several hosts: the same command on each of them, "
        "with --host-secret-file; Slurm (srun) and GKE's TPU slices tell the rest",
    )
    flags.add_flags(group, HostConfig, renamed=RENAMED)


def given_hosts(options: argparse.Namespace) -> HostConfig | None:
    """The hosts as flags and environment tell them; None without the flags.

    Raises:
        ConfigError: Something is missing or wrong.
    """
    given = flags.given_values(options, HostConfig)
    return complete_hosts(given, os.environ) if given else None  # noqa: TID251


def complete_hosts(
    given: Mapping[str, Any], environment: Mapping[str, str]
) -> HostConfig:
    """Adds what the environment tells to what was given.

    Args:
        given: Some fields of `HostConfig`.
        environment: Variables of the process.

    Raises:
        ConfigError: A field is known from neither, or wrong.
    """
    found = {**(_from_tpu(environment) or _from_slurm(environment)), **given}
    missing = [name for name in (*PLACE, "secret_file") if name not in found]
    if missing:
        names = ", ".join(f"--{RENAMED.get(n, n).replace('_', '-')}" for n in missing)
        raise ConfigError(
            f"{names} must be given: the environment tells of no Slurm step and of no "
            "TPU slice of several hosts"
            if missing != ["secret_file"]
            else f"{names} must be given: hosts prove to each other that they know it"
        )
    return HostConfig(**found)


def _from_tpu(environment: Mapping[str, str]) -> dict[str, Any]:
    """What GKE tells a pod of a TPU slice, one per host."""
    names = environment.get("TPU_WORKER_HOSTNAMES", "").split(",")
    worker = environment.get("TPU_WORKER_ID", "")
    if len(names) < 2 or not worker.isdecimal():
        return {}
    return {
        "coordinator": f"{names[0].strip()}:{DEFAULT_PORT}",
        "num_hosts": len(names),
        "host_id": int(worker),
    }


def _from_slurm(environment: Mapping[str, str]) -> dict[str, Any]:
    """What `srun` tells each of its tasks, one per host."""
    names = ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID")
    counts = [environment.get(name, "") for name in names]
    nodes = environment.get("SLURM_STEP_NODELIST", "")
    if not nodes or not all(count.isdecimal() for count in counts):
        return {}
    num_tasks, task = map(int, counts)
    if num_tasks < 2:
        return {}
    return {
        "coordinator": f"{first_node(nodes)}:{DEFAULT_PORT}",
        "num_hosts": num_tasks,
        "host_id": task,
    }


def first_node(nodes: str) -> str:
    """The first name of a list of nodes as Slurm writes it.

    `tpu[003-007,9],other` begins with `tpu003`.
    """
    prefix, bracket, rest = nodes.partition("[")
    if not bracket or "," in prefix:
        return nodes.partition(",")[0]
    first, _, tail = rest.partition("]")
    suffix = tail.partition(",")[0]
    return f"{prefix}{re.split('[,-]', first)[0]}{suffix}"
