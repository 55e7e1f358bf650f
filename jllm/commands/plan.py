"""`jllm plan`: memory, speed and cost of a model on devices that are not here."""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from jllm.config import EngineConfig
from jllm.errors import ConfigError

DTYPES = ("auto", "float32", "bfloat16", "float16")
PROGRAMS = ("all", "largest", "none")
MOST_COMPILED = 2
"""Layouts that a search compiles, if not told otherwise."""


def add_parser(commands: Any) -> None:
    """Adds `plan` to the commands of `jllm`."""
    parser = commands.add_parser(
        "plan",
        help="memory, speed and cost of a model on TPUs or GPUs that are not here",
        description="Builds the engine's step programs from config.json alone, "
        "compiles them with the real compiler of the devices, which need not be here, "
        "and prints what they need and could reach.",
        allow_abbrev=False,
    )
    parser.set_defaults(run=run, quiet=True)
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="folder, config.json or Hugging Face id; only config.json is read",
    )
    parser.add_argument("--revision", metavar="NAME", help="of a Hugging Face id")
    _add_devices(parser.add_argument_group("devices"))
    _add_engine(parser.add_argument_group("engine"))
    _add_workload(parser.add_argument_group("what is reckoned with"))
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _add_devices(group: Any) -> None:
    devices = group.add_mutually_exclusive_group(required=True)
    devices.add_argument(
        "--topology", metavar="NAME", help="TPU slice, such as v6e:4x4"
    )
    devices.add_argument("--gpu", metavar="NAME", help="GPU, such as h200")
    group.add_argument(
        "--devices", type=int, metavar="N", help="GPUs on one switch; none is 1"
    )
    layout = group.add_mutually_exclusive_group(required=True)
    layout.add_argument(
        "--tensor", type=int, metavar="N", help="devices that share each layer"
    )
    layout.add_argument(
        "--search", action="store_true", help="all layouts that fit, best first"
    )
    group.add_argument(
        "--data",
        type=int,
        metavar="N",
        help="replicas; none is as many as there can be",
    )
    group.add_argument(
        "--pipeline", type=int, default=1, metavar="N", help="stages of the layers"
    )
    group.add_argument(
        "--programs",
        choices=PROGRAMS,
        help="step programs to compile: all sizes, the largest of each kind, or none, "
        "which needs no compiler; none given is all, in a search the largest",
    )
    group.add_argument(
        "--most-compiled",
        type=int,
        default=MOST_COMPILED,
        metavar="N",
        help="layouts that a search compiles, the best by the roofline",
    )


def _add_engine(group: Any) -> None:
    group.add_argument("--max-model-len", type=int, metavar="N", help="longest context")
    group.add_argument(
        "--rows", type=int, metavar="N", help="most requests at once; none is 256"
    )
    group.add_argument(
        "--max-num-batched-tokens",
        type=int,
        metavar="N",
        help="token budget of one step; none is 4096",
    )
    group.add_argument(
        "--memory-utilization",
        type=float,
        metavar="SHARE",
        help="share of a device's memory that the engine takes; none is 0.9",
    )
    group.add_argument("--dtype", default="auto", choices=DTYPES, help="auto: as saved")


def _add_workload(group: Any) -> None:
    group.add_argument("--input-tokens", type=int, default=1024, metavar="N")
    group.add_argument("--output-tokens", type=int, default=256, metavar="N")
    group.add_argument(
        "--price-per-device-hour",
        type=float,
        metavar="DOLLARS",
        help="none takes a list price, if one with a source is known",
    )


def run(options: argparse.Namespace) -> int:
    """Plans one layout, or searches all; prints what was found."""
    config = _config(options)
    import jax

    # Whatever is here: it is not what is planned for.
    jax.config.update("jax_platforms", "cpu")
    task = _task(options, config)
    found, lines = _search(options, task) if options.search else _plan(options, task)
    print(json.dumps(found) if options.json else "\n".join(lines))
    return 0


def _config(options: argparse.Namespace) -> EngineConfig:
    """The engine's options, but for the layout; checked before JAX is imported."""
    for name in ("input_tokens", "output_tokens", "most_compiled", "devices"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"{name}={value} must be at least 1")
    price = options.price_per_device_hour
    if price is not None and not price > 0:
        raise ConfigError(f"price_per_device_hour={price} must be above 0")
    if options.devices is not None and options.gpu is None:
        raise ConfigError(
            f"devices={options.devices} is for --gpu; a topology says how many it has"
        )
    return EngineConfig(
        model=options.model,
        revision=options.revision,
        dtype=options.dtype,
        max_model_len=options.max_model_len,
        max_num_seqs=options.rows,
        max_num_batched_tokens=options.max_num_batched_tokens,
        memory_utilization=options.memory_utilization,
    )


def _task(options: argparse.Namespace, config: EngineConfig) -> Any:
    """What is planned, with what the options leave open."""
    from jllm.plan.hardware import list_price
    from jllm.plan.planner import Task
    from jllm.plan.throughput import Workload
    from jllm.plan.topology import gpu_topology, tpu_topology
    from jllm.weights.hub import resolve_config

    if options.gpu is None:
        topology = tpu_topology(options.topology)
    else:
        topology = gpu_topology(options.gpu, options.devices or 1)
    price = options.price_per_device_hour
    return Task(
        files=resolve_config(options.model, revision=options.revision),
        topology=topology,
        config=config,
        workload=Workload(options.input_tokens, options.output_tokens),
        price=list_price(topology.device) if price is None else price,
        programs=options.programs or ("largest" if options.search else "all"),
    )


def _plan(
    options: argparse.Namespace, task: Any
) -> tuple[dict[str, Any], Sequence[str]]:
    """One layout: for programs and for people."""
    from jllm.plan.planner import compile_plan
    from jllm.plan.report import plan_as_dict, plan_as_text
    from jllm.plan.topology import make_layout

    layout = make_layout(
        task.topology,
        tensor=options.tensor,
        data=options.data,
        pipeline=options.pipeline,
    )
    plan = compile_plan(task, layout, _tell)
    return plan_as_dict(task, plan), plan_as_text(task, plan)


def _search(
    options: argparse.Namespace, task: Any
) -> tuple[dict[str, Any], Sequence[str]]:
    """All layouts: for programs and for people."""
    if options.data is not None or options.pipeline != 1:
        raise ConfigError("search chooses data and pipeline: leave them out")
    from jllm.plan.planner import search
    from jllm.plan.report import search_as_dict, search_as_text

    found = search(task, most_compiled=options.most_compiled, tell=_tell)
    if not found.plans:
        reasons = "; ".join(reason for _, reason in found.refused)
        raise ConfigError(f"no layout fits {task.topology.name}: {reasons}")
    return search_as_dict(task, found), search_as_text(task, found)


def _tell(layout: object, step: Any) -> None:
    """A line per program, for those who wait."""
    print(
        f"{layout}: {step.kind} of {step.size} compiled in "
        f"{step.compile_seconds:.1f} s",
        file=sys.stderr,
        flush=True,
    )
