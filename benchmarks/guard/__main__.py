"""Compares counts with the stored tables; a worse one fails.

    python -m benchmarks.guard [cpu gpu tpu] [--update]

cpu: programs and workloads of a tiny engine; gpu and tpu: one prefill and one decode of
a model of two layers, compiled for an H200 and a v6e without either (extra `aot`; left
out by name where it is missing). `--update` rewrites the tables: a change that makes a
count worse changes its table in the same commit, where a reviewer sees it.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from importlib import metadata

import jax

from benchmarks.guard import tables
from benchmarks.guard.counts import program_counts
from jllm.bench.environment import processor

COMPILERS = {
    "cpu": ("jaxlib",),
    "gpu": ("jax_cuda13_plugin", "jax_cuda12_plugin"),
    "tpu": ("libtpu",),
}
PACKAGES = {"cpu": (), "gpu": ("jax-cuda13-pjrt",), "tpu": ("libtpu",)}
PROGRAMS = ("prefill", "decode")


def accelerator_counts(platform: str) -> dict[str, dict[str, int]]:
    """Counts of the steps compiled for one device that is not there."""
    from tests.aot.compile_steps import CASES, DEVICE_NAMES, Target, target_devices

    jax.config.update("jax_platforms", "cpu")
    case = CASES[platform][0]
    target = Target(platform, target_devices(platform), case)
    return {
        f"{DEVICE_NAMES[platform]} {name}": program_counts(target.compile(name))
        for name in PROGRAMS
    }


def measure(kind: str) -> dict[str, dict[str, int]]:
    """The counts of a kind, in this process: it can compile for one platform only."""
    if kind == "cpu":
        from benchmarks.guard.workloads import cpu_counts

        return cpu_counts()
    return accelerator_counts(kind)


def versions(kind: str) -> dict[str, str | None]:
    """The compilers that counts depend on, and for a CPU the machine."""
    names = ("jax", "jaxlib", *PACKAGES[kind])
    installed = {d.name: d.version for d in metadata.distributions()}
    found = {name: installed.get(name) for name in names}
    if kind == "cpu":
        # XLA compiles for the processor and the number of threads that it finds.
        found["machine"] = f"{processor()}, {os.cpu_count()} cores"
    return found


def check(kind: str, found: tables.Counts, *, update: bool) -> bool:
    """Prints what differs from the table; whether nothing is worse."""
    made_with, now = tables.versions(kind), versions(kind)
    if update:
        changes = tables.compare(tables.read(kind), found)
        tables.write(kind, found, now)
    elif made_with != now:
        print(f"{kind}: the table was made with {made_with}, not {now}: not compared")
        return True
    else:
        changes = tables.compare(tables.read(kind), found)
    for change in changes:
        print(f"{kind}: {change}")
    worse = sum(change.is_worse for change in changes)
    print(f"{kind}: {len(found)} programs and workloads, {worse} counts worse")
    return update or not worse


def main() -> int:
    """Measures each kind in a process of its own, side by side, and compares."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", metavar="KIND", help="cpu, gpu or tpu")
    parser.add_argument("--update", action="store_true")
    parser.add_argument("--measure", choices=COMPILERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.kinds) - set(COMPILERS):
        parser.error(f"no kind {sorted(unknown)}; there are {list(COMPILERS)}")
    if options.measure:
        print(json.dumps(measure(options.measure)))
        return 0
    processes: dict[str, subprocess.Popen[str]] = {}
    for kind in options.kinds or COMPILERS:
        if not any(map(importlib.util.find_spec, COMPILERS[kind])):
            print(f"{kind}: left out, none of {COMPILERS[kind]} is installed")
            continue
        command = [sys.executable, "-m", "benchmarks.guard", "--measure", kind]
        processes[kind] = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    is_well = True
    for kind, process in processes.items():
        out, _ = process.communicate()
        if process.returncode:
            print(f"{kind}: counting failed with exit code {process.returncode}")
            is_well = False
            continue
        found = json.loads(out.splitlines()[-1])
        is_well &= check(kind, found, update=options.update)
    return 0 if is_well else 1


if __name__ == "__main__":
    sys.exit(main())
