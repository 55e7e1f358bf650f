"""Plans as text for people and as JSON for programs."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from jllm.plan.hardware import list_price
from jllm.plan.memory import CONTEXTS, DeviceMemory
from jllm.plan.planner import Plan, Search, Step, Task

GIB = 2**30
HEAD = (
    "step",
    "size",
    "GB read",
    "TFLOP",
    "roofline ms",
    "compiler ms",
    "temporary MiB",
    "sent by the compiled program",
)
SEARCH_HEAD = (
    "tensor",
    "stages",
    "data",
    "rows",
    "GiB weights",
    "GiB KV",
    "output tokens/s",
    "per device",
    "$ per million",
    "compiled",
)


def plan_as_dict(task: Task, plan: Plan) -> dict[str, Any]:
    """The form of `--json` of one layout."""
    return {
        **_task(task),
        "layout": dataclasses.asdict(plan.layout),
        "memory_per_device": dataclasses.asdict(plan.memory)
        | {"fits": plan.memory.fits},
        "concurrent_requests": _requests(plan),
        "throughput": (
            None if plan.throughput is None else dataclasses.asdict(plan.throughput)
        ),
        "steps": [
            {
                "kind": step.kind,
                "size": step.size,
                "bytes": step.cost.bytes,
                "flops": step.cost.flops,
                "sent_bytes": step.cost.sent_bytes,
                "roofline_seconds": step.seconds,
                "compiled": (
                    None if step.compiled is None else dataclasses.asdict(step.compiled)
                ),
            }
            for step in plan.steps
        ],
    }


def search_as_dict(task: Task, found: Search) -> dict[str, Any]:
    """The form of `--json` of a search."""
    return {
        **_task(task),
        "num_compiled": found.num_compiled,
        "plans": [plan_as_dict(task, plan) for plan in found.plans],
        "refused": [
            {"layout": dataclasses.asdict(layout), "reason": reason}
            for layout, reason in found.refused
        ],
    }


def plan_as_text(task: Task, plan: Plan) -> list[str]:
    """The lines of one layout, for people."""
    memory, device = plan.memory, task.topology.device
    requests = ", ".join(
        f"{'-' if count is None else f'{count:,}'} of {length:,}"
        for length, count in _requests(plan).items()
    )
    facts = [
        ("model", str(task.files.path)),
        ("devices", f"{task.topology.name}: {task.topology.num_devices}"),
        ("layout", str(plan.layout)),
        ("on each device", _memory(memory)),
        ("KV pool", f"{memory.num_blocks:,} blocks of {memory.block_size} tokens"),
        ("requests at once", f"{requests} tokens"),
        *_speed(task, plan),
        ("figures", device.source),
    ]
    width = max(len(name) for name, _ in facts) + 2
    lines = [f"{name:<{width}}{value}" for name, value in facts]
    return [*lines, "", *columns([HEAD, *map(_step, plan.steps)]), *_notes(plan)]


def search_as_text(task: Task, found: Search) -> list[str]:
    """The lines of a search, for people."""
    order = "best first, by output tokens/s at the roofline"
    lines = [
        f"{task.files.path} on {task.topology.name}, {_workload(task)}; {order}",
        f"{found.num_compiled} of {len(found.plans)} layouts that fit were compiled",
        "",
        *columns([SEARCH_HEAD, *(_found(task, plan) for plan in found.plans)]),
    ]
    refused = [f"refused: {layout}: {reason}" for layout, reason in found.refused]
    return [*lines, *([""] if refused else []), *refused]


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table, all but the last column set to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            [
                *(
                    cell.rjust(width)
                    for cell, width in zip(row[:-1], widths, strict=False)
                ),
                row[-1],
            ]
        ).rstrip()
        for row in rows
    ]


def _task(task: Task) -> dict[str, Any]:
    device = task.topology.device
    return {
        "model": str(task.files.path),
        "topology": task.topology.name,
        "num_devices": task.topology.num_devices,
        "workload": dataclasses.asdict(task.workload),
        "dollars_per_device_hour": task.price,
        "device": {
            key: getattr(device, key)
            for key in ("name", "memory", "bandwidth", "flops", "sent", "source")
        },
    }


def _requests(plan: Plan) -> dict[int, int | None]:
    """Requests of all replicas that run at once, by their tokens."""
    found = {length: plan.memory.requests(length) for length in CONTEXTS}
    return {
        length: None if count is None else count * plan.layout.data
        for length, count in found.items()
    }


def _memory(memory: DeviceMemory) -> str:
    return (
        f"{memory.weights / GIB:.2f} GiB weights + {memory.pool / GIB:.2f} GiB KV pool "
        f"+ {memory.temporaries / GIB:.2f} GiB temporaries, of "
        f"{memory.allowed / GIB:.2f} GiB allowed and {memory.capacity / GIB:.2f} GiB"
    )


def _workload(task: Task) -> str:
    prompt, answer = task.workload.input_tokens, task.workload.output_tokens
    return f"prompts of {prompt:,} tokens, answers of {answer:,}"


def _speed(task: Task, plan: Plan) -> list[tuple[str, str]]:
    found = plan.throughput
    if found is None:
        return [("tokens/s", f"none: {_workload(task)} do not fit")]
    each = found.output_tokens_per_second / plan.layout.num_devices
    speed = (
        f"{found.output_tokens_per_second:,.0f} output, {each:,.1f} per device, at the "
        f"roofline: {_workload(task)}, {found.rows} rows per replica"
    )
    return [
        ("tokens/s", speed),
        ("", f"{found.decode_tokens_per_second:,.0f} if there were no prompts"),
        ("cost", _cost(task, found.dollars_per_million)),
    ]


def _cost(task: Task, dollars: float | None) -> str:
    if dollars is None:
        return "- (give --price-per-device-hour)"
    return f"${dollars:.3f} per million output tokens at {_price(task)}"


def _price(task: Task) -> str:
    device = task.topology.device
    said = f"${task.price:.2f} per device and hour"
    if device.price is None or task.price != list_price(device):
        return said
    return f"{said} ({device.price.source}, {device.price.date})"


def _step(step: Step) -> tuple[str, ...]:
    compiled = step.compiled
    return (
        step.kind,
        str(step.size),
        f"{step.cost.bytes / 1e9:,.2f}",
        f"{step.cost.flops / 1e12:,.3f}",
        f"{step.seconds * 1e3:,.2f}",
        "-" if compiled is None else _milliseconds(compiled.estimated_seconds),
        "-" if compiled is None else f"{compiled.temporary_bytes / 2**20:,.1f}",
        "-" if compiled is None else _sent(compiled.collectives),
    )


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:,.2f}"


def _sent(collectives: dict[str, tuple[int, int]]) -> str:
    found = (
        f"{count} {opcode} of {size / 1e6:,.1f} MB"
        for opcode, (count, size) in collectives.items()
    )
    return ", ".join(found) or "nothing"


def _notes(plan: Plan) -> list[str]:
    compiled = [step.compiled for step in plan.steps if step.compiled is not None]
    if not compiled:
        return ["", "Nothing was compiled: temporaries are an estimate."]
    seconds = sum(step.compile_seconds for step in compiled)
    fallbacks = sorted({text for step in compiled for text in step.fallbacks})
    time = (
        f"{len(compiled)} programs compiled in {seconds:.1f} s. The compiler's "
        "estimate leaves attention kernels out; it is - where there is none."
    )
    return [
        "",
        time,
        *(f"fallback: {text}" for text in fallbacks),
    ]


def _found(task: Task, plan: Plan) -> tuple[str, ...]:
    speed = plan.throughput
    rows = "-" if speed is None else str(speed.rows)
    dollars = None if speed is None else speed.dollars_per_million
    is_compiled = any(step.compiled for step in plan.steps)
    return (
        str(plan.layout.tensor),
        str(plan.layout.pipeline),
        str(plan.layout.data),
        rows,
        f"{plan.memory.weights / GIB:.2f}",
        f"{plan.memory.pool / GIB:.2f}",
        f"{plan.speed:,.0f}",
        f"{plan.speed / task.topology.num_devices:,.1f}",
        "-" if dollars is None else f"{dollars:.3f}",
        "yes" if is_compiled else "no",
    )
