"""Compiles every kernel for accelerators that are not there.

    python -m tests.aot.compile_kernels gpu|tpu [--operations paged_attention ...]
        [--cases SUBSTRING] [--generations v6e ...] [--rotate] [--sample N]
        [--record] [--table]

One line of JSON per case, implementation and device: what the compiler made of it, or
why it could not. Registers and spills come from ptxas, which must be on the PATH;
those of Mosaic GPU's kernels if MOSAIC_GPU_DUMP_TO names an empty folder.
"""

import argparse
import json
import os
import pathlib
import sys
import tempfile
import time
from functools import partial

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from benchmarks.kernels.run import cases_of, operations
from pallas_kernels.common.target import Target
from tests.aot import hlo, resources
from tests.aot.provenance import H200, ROOT, provenance

RESULTS = ROOT / "benchmarks" / "results" / "aot_kernels.jsonl"
TOPOLOGIES = {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}


def devices_of(platform, generations):
    """One described device per generation."""
    if platform == "gpu":
        flags = os.environ.get("XLA_FLAGS", "")
        # Autotuning would need the device.
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_autotune_level=0"
        topology = topologies.get_topology_desc(
            "h200", platform="cuda", topology="1x1x1", target_config=H200.read_text()
        )
        return [topology.devices[0]]
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")
    names = [TOPOLOGIES[name] for name in generations]
    return [topologies.get_topology_desc(n, platform="tpu").devices[0] for n in names]


def compile_case(case, implementation, device):
    """What the compiler made of one case."""
    target, place = Target.of(device), SingleDeviceSharding(device)
    function = partial(case.function, implementation=implementation, target=target)
    arguments = [
        jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place) for a in case.arguments
    ]
    jitted = jax.jit(function, donate_argnums=case.donated)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as dump:
        options = {"xla_dump_to": dump} if target.platform == "gpu" else {}
        traced = jitted.trace(*arguments)
        compiled = traced.lower().compile(compiler_options=options)
        facts = facts_of(target, traced, compiled, pathlib.Path(dump))
    memory, text = compiled.memory_analysis(), compiled.as_text()
    donated = {case.arguments[i].size for i in case.donated}
    return {
        "aliased_bytes": memory.alias_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "num_donated": len(case.donated),
        "aliased_parameters": len(hlo.aliased_parameters(text)),
        "large_moves": hlo.large_moves(text, donated, sys.maxsize) if donated else [],
        "custom_calls": hlo.custom_calls(text),
        **facts,
        "num_bytes": case.num_bytes,
        "num_flops": case.num_flops,
        "compile_seconds": round(time.perf_counter() - start, 1),
    }


def facts_of(target, traced, compiled, dump):
    """What kernels take of the device; on a TPU also what the compiler estimates."""
    if target.platform == "gpu":
        return {"kernels": resources.triton_kernels(dump) + resources.mosaic_kernels()}
    cost = compiled.cost_analysis()
    # An instruction that the compiler cannot time counts as a second less than nothing.
    seconds = cost["optimal_seconds"]
    return {
        "vmem_bytes": resources.vector_memory(compiled.as_text()),
        "smem_bytes": resources.scalar_memory(traced.jaxpr),
        "estimated_bytes": int(cost["bytes accessed"]),
        "estimated_seconds": seconds if seconds >= 0 else None,
    }


def report(case, implementation, device):
    """The line of one compilation; a failure is a line too."""
    facts = {
        "operation": case.operation,
        "case": case.name,
        "implementation": implementation,
        "device": Target.of(device).name,
    }
    try:
        facts |= compile_case(case, implementation, device)
        return facts | {"over_bounds": resources.over_bounds(facts)}
    except NotImplementedError as reason:
        return facts | {"unsupported": str(reason)}
    except Exception as error:  # noqa: BLE001  whatever a compiler may raise
        words = f"{type(error).__name__}: {error}"
        return facts | {"error": words[:2000]}


def table_row(line):
    """A line for people."""
    kernels = line.get("kernels", [])
    worst = max(
        kernels,
        key=lambda kernel: (kernel["spilled_bytes"], kernel["registers"]),
        default={},
    )
    shared = max((kernel["shared_bytes"] for kernel in kernels), default="")
    trouble = line.get("error", line.get("unsupported", ""))
    return (
        f"{line['operation']:18} {line['case']:34} {line['implementation']:11} "
        f"{line['device']:6} {worst.get('registers', ''):>4} "
        f"{worst.get('spilled_bytes', ''):>6} {shared:>7} "
        f"{line.get('vmem_bytes', ''):>9} {line.get('smem_bytes', ''):>7} "
        f"{line.get('compile_seconds', ''):>6} "
        f"{(trouble or '; '.join(line.get('over_bounds', [])))[:120]}"
    )


def chosen(arguments):
    """Cases and implementations that the arguments ask for."""
    found = []
    for operation in arguments.operations:
        own = [
            (case, implementation)
            for case in cases_of(operation)
            if arguments.cases in case.name
            for implementation in case.implementations
            if implementation.startswith(arguments.platform)
        ]
        # Odd, so that all of two implementations have their turn.
        step = (len(own) // (arguments.sample or len(own) or 1)) | 1
        found += own[::step]
    return found


def main():
    """Compiles what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("platform", choices=("gpu", "tpu"))
    parser.add_argument("--operations", nargs="+", default=operations())
    parser.add_argument("--cases", default="", help="part of the names of the cases")
    parser.add_argument("--generations", nargs="+", default=list(TOPOLOGIES))
    parser.add_argument("--rotate", action="store_true", help="one generation a case")
    parser.add_argument("--sample", type=int, help="about so many of each operation")
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--table", action="store_true", help="a table, not JSON")
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    devices = devices_of(arguments.platform, arguments.generations)
    for number, (case, implementation) in enumerate(chosen(arguments)):
        turn = [devices[number % len(devices)]] if arguments.rotate else devices
        for device in turn:
            line = report(case, implementation, device)
            text = table_row(line) if arguments.table else json.dumps(line)
            print(text, flush=True)
            if arguments.record:
                with RESULTS.open("a") as file:
                    file.write(json.dumps(line | provenance()) + "\n")


if __name__ == "__main__":
    main()
