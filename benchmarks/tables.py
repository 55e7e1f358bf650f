"""Writes the tables of README.md and benchmarks/README.md from the result files.

    python -m benchmarks.tables [--check]

A table stands between `<!-- table: name -->` and `<!-- end -->`. With --check nothing
is written, and the exit code is 1 if a table is not what the results say.
"""

import argparse
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import record

ROOT = pathlib.Path(__file__).parents[1]
FILES = (ROOT / "README.md", ROOT / "benchmarks" / "README.md")
TPUS = ("v5e", "v6e", "tpu7x")
TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def markdown(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


def latest(rows: Sequence[dict[str, Any]], *keys: str) -> list[dict[str, Any]]:
    """The newest row of each case."""
    return list({tuple(str(row[key]) for key in keys): row for row in rows}.values())


def kv_waste() -> str:
    """KV slots reserved but unused."""
    rows = latest(record.read("kv_waste"), "workload", "config")
    return markdown(
        ["lengths", "rows", "blocks of 16", "unused, of those in use", "goal"],
        [
            [
                row["workload"],
                row["config"]["max_num_seqs"],
                row["config"]["num_blocks"],
                f"{row['waste_percent']:.2f} %",
                f"< {row['goal_percent']:.0f} %",
            ]
            for row in rows
        ],
    )


def peers() -> str:
    """jllm and other engines on the same checkpoint, in turns."""
    keys = ("model", "dtype", "workload", "requests", "engine")
    rows = latest(record.read("peers"), *keys)
    return markdown(
        [
            "model",
            "type",
            "requests",
            "engine",
            "output tokens/s",
            "jllm is faster by",
            "spread",
            "foreign cores",
            "rounds",
        ],
        [
            [
                row["model"],
                row["dtype"],
                f"{row['requests']} x {row['workload']}",
                f"{row['engine']} {row['version'].partition(',')[0]}",
                f"{row['output_tokens_per_second']:,.1f}",
                "" if row["engine"] == "jllm" else _ratio(row),
                f"{row['spread']:.0%}",
                row["foreign_cores"],
                row["rounds"],
            ]
            for row in rows
        ],
    )


def peer_ratios() -> str:
    """How much faster jllm is than each engine, one workload per line."""
    keys = ("model", "dtype", "workload", "requests", "engine")
    workloads: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in latest(record.read("peers"), *keys):
        workload = tuple(row[key] for key in keys[:-1])
        workloads.setdefault(workload, {})[row["engine"]] = row
    engines = sorted({name for rows in workloads.values() for name in rows} - {"jllm"})
    return markdown(
        ["model", "type", "requests", "jllm, tokens/s", *engines],
        [
            [
                model,
                dtype,
                f"{requests} x {workload}",
                f"{rows['jllm']['output_tokens_per_second']:,.1f}",
                *(_ratio(rows[engine]) if engine in rows else "" for engine in engines),
            ]
            for (model, dtype, workload, requests), rows in workloads.items()
        ],
    )


def _ratio(row: dict[str, Any]) -> str:
    ratio = row.get("jllm_is_faster_by")
    return "" if ratio is None else f"{ratio:.2f} x"


def startup() -> str:
    """Seconds from the start of a process to its stages, by kind of start."""
    rows = latest(record.read("startup"), "model", "dtype", "kind")
    return markdown(
        ["model", "type", "start", "imported", "first token", "spread", "all programs"],
        [
            [
                row["model"],
                row["dtype"],
                row["kind"],
                f"{row['imported']:.1f}",
                f"{row['first_token']:.1f}",
                f"{row['spread']:.0%}",
                f"{row['compiled']:.1f}",
            ]
            for row in rows
        ],
    )


def cpu_products() -> str:
    """The engine's steps beside the bare products of the network."""
    rows = latest(record.read("cpu_products"), "model", "dtype", "kind", "rows")
    return markdown(
        [
            "model",
            "type",
            "step",
            "products, ms",
            "engine, ms",
            "tokens/s",
            "share of the products' speed",
        ],
        [
            [
                row["model"],
                row["dtype"],
                f"{row['kind']}, {row['rows']}",
                row["products_ms"],
                row["engine_ms"],
                f"{row['engine_tokens_per_second']:,.0f}",
                f"{row['share_percent']:.0f} %",
            ]
            for row in rows
        ],
    )


def routing() -> str:
    """Hits in the prefix cache by the way requests are routed to replicas."""
    keys = ("trace", "routing", "replicas", "ticks_per_second")
    return markdown(
        [
            "trace",
            "replicas",
            "steps a second",
            "routing",
            "prompt tokens found",
            "steps to the first token, p50",
            "p99",
            "busiest of mean",
        ],
        [
            [
                row["trace"],
                row["replicas"],
                row["ticks_per_second"],
                row["routing"],
                f"{row['hit_percent']:.1f} %",
                row["ttft_ticks_p50"],
                row["ttft_ticks_p99"],
                f"{row['busiest_of_mean']:.2f} x",
            ]
            for row in latest(record.read("routing"), *keys)
        ],
    )


def prefix_cache() -> str:
    """Throughput with the prefix cache on, of that with it off."""
    rows = latest(record.read("prefix_cache"), "model", "shared_percent")
    return markdown(
        ["model", "prompt shared", "on, tokens/s", "off, tokens/s", "on / off"],
        [
            [
                row["model"],
                f"{row['shared_percent']} %",
                f"{row['on_tokens_per_second']:,.0f}",
                f"{row['off_tokens_per_second']:,.0f}",
                f"{row['ratio']:.2f} x",
            ]
            for row in rows
        ],
    )


HOST_PHASES = ("schedule", "pack", "dispatch", "collect", "commit", "deliver")


def host_loop() -> str:
    """The host's part of a decode step, by phase."""
    rows = latest(record.read("host_loop"), "rows", "case")
    reader = ("detokenise", "stream")
    return markdown(
        ["rows", "case", *HOST_PHASES, "step, us", "goal (stretch)", *reader],
        [
            [
                row["rows"],
                row["case"],
                *(f"{row[f'{phase}_us']:.0f}" for phase in HOST_PHASES),
                f"{row['step_us']:.0f}",
                f"{row['goal_us']} ({row['stretch_goal_us']})",
                *(f"{row[f'{phase}_us']:.0f}" for phase in reader),
            ]
            for row in rows
        ],
    )


def device_waits() -> str:
    """How much of its time a device waits for the host."""
    rows = latest(record.read("device_waits"), "rows", "step_ms")
    return markdown(
        ["rows", "step, ms", "steps that waited", "device waits", "goal"],
        [
            [
                row["rows"],
                row["step_ms"],
                f"{row['waited_percent']:.0f} %",
                f"{row['wait_percent']:.1f} %",
                f"{row['goal_percent']} %",
            ]
            for row in rows
        ],
    )


def server() -> str:
    """The server beside the engine alone, and under more than it can do."""
    rows = latest(record.read("server_load"), "kind")
    rows += latest(record.read("server_overhead"), "case")
    rows += latest(record.read("server_faults"), "kind")
    return markdown(
        ["what", "found", "goal"],
        [
            line
            for row in rows
            for line in SERVER_LINES[row.get("kind", row["case"])](row)
        ],
    )


def _streams(row: dict[str, Any]) -> list[list[object]]:
    speed = f"{row['tokens_per_second']:,.0f} tokens/s"
    return [[row["case"], f"{row['errors']} errors, {speed}", "0 errors"]]


def _overload(row: dict[str, Any]) -> list[list[object]]:
    found = []
    for key in [key for key in row if key.startswith(("at_once", "within"))]:
        part, what = row[key], f"{row['case']}, {key.replace('_', ' ')}"
        done = f"{part['accepted_complete']} of {part['accepted']} accepted"
        wait = part["refusal_ms"]
        found += [
            [f"{what}: finished", f"{done}; {part['other']} other answers", "all; 0"],
            [f"{what}: 429 after, p50 / p99", _pair(wait), "100 ms"],
            [
                f"{what}: throughput, of that without refusals",
                f"{part['throughput_of_unshed']:.1%}",
                "97 %",
            ],
        ]
    return found


def _pair(milliseconds: dict[str, Any]) -> str:
    return f"{milliseconds['p50']:,.1f} / {milliseconds['p99']:,.1f} ms"


def _served(row: dict[str, Any]) -> list[list[object]]:
    what = f"{row['case']}, of the speed of `LLM.generate`"
    return [
        [f"{what}: whole answers", f"{row['served_of_offline']:.1%}", "95 %"],
        [f"{what}: streamed", f"{row['streamed_of_offline']:.1%}", "95 %"],
    ]


def _plain(row: dict[str, Any]) -> list[list[object]]:
    what = f"{row['streams']} streams, engine without work: streamed tokens"
    speed = f"{row['events_per_core_second']:,.0f}/s and core"
    return [[what, speed, "5,000/s and core"]]


def _delay(row: dict[str, Any]) -> list[list[object]]:
    what = f"{row['streams']} streams: added per token, p50 / p99"
    times = {"p50": row["added_ms_p50"], "p99": row["added_ms_p99"]}
    return [[what, _pair(times), "p99 5 ms"]]


def _aborts(row: dict[str, Any]) -> list[list[object]]:
    found = f"all gone after {row['clean_after_s_max']:.2f} s"
    whole = f"{row['complete']} of {row['stayed']} others whole"
    return [[row["case"], f"{found}; {whole}", "1 s; all"]]


def _readers(row: dict[str, Any]) -> list[list[object]]:
    ratio = f"{row['itl_p99_of_none_slow']:.2f} x"
    return [[f"{row['case']}: p99 between tokens", ratio, "1.1 x"]]


def _megabytes(row: dict[str, Any]) -> list[list[object]]:
    return [
        [
            f"`/health` beside a megabyte ({key})",
            f"{part['health_max_ms']:.0f} ms at most",
            "100 ms",
        ]
        for key, part in row.items()
        if isinstance(part, dict) and "health_max_ms" in part
    ]


SERVER_LINES: dict[str, Callable[[dict[str, Any]], list[list[object]]]] = {
    "streams": _streams,
    "overload": _overload,
    "offline": _served,
    "plain": _plain,
    "delay": _delay,
    "aborts": _aborts,
    "readers": _readers,
    "prompts": _megabytes,
}


def server_soak() -> str:
    """What the server held before and after hours of mixed requests."""
    rows = latest(record.read("server_soak"), "minutes")
    return markdown(
        ["minutes", "requests", "memory, MiB", "files", "threads", "tasks", "faults"],
        [
            [
                f"{row['minutes']:.0f}",
                f"{row['requests']:,}",
                *(
                    " to ".join(map(str, row[key]))
                    for key in ("rss_mib", "files", "threads", "tasks")
                ),
                "; ".join(row["faults"]) or "none",
            ]
            for row in rows
        ],
    )


def sampling_draw() -> str:
    """Time of a draw by the two methods."""
    rows = latest(record.read("sampling_draw"), "rows", "vocab_size", "method")
    return markdown(
        ["rows", "vocabulary", "method", "median ms"],
        [
            [row["rows"], row["vocab_size"], row["method"], row["median_ms"]]
            for row in rows
        ],
    )


def sampling_thresholds() -> str:
    """Time of top-k and top-p by bisection and as the sampler does it on a CPU."""
    rows = latest(record.read("sampling_thresholds"), "rules", "rows", "vocab_size")
    return markdown(
        ["rules", "rows", "bisection ms", "blocked ms", "faster by"],
        [
            [
                row["rules"],
                row["rows"],
                row["bisection_ms"],
                row["blocked_ms"],
                f"{row['blocked_is_faster_by']:.1f} x",
            ]
            for row in rows
        ],
    )


def aot_steps() -> str:
    """What the compilers of devices that are not here make of the steps."""
    rows = latest(
        record.read("aot_steps"), "device", "num_devices", "head_dim", "program"
    )
    return markdown(
        [
            "device",
            "devices",
            "head width",
            "program",
            "MB of pool",
            "MB of temporaries",
        ],
        [
            [
                row["device"],
                row["num_devices"],
                row["head_dim"],
                row["program"],
                f"{row['pool_bytes'] / 1e6:,.0f}",
                f"{row['temporary_bytes'] / 1e6:,.1f}",
            ]
            for row in rows
        ],
    )


def aot_kernels() -> str:
    """What the compilers of devices that are not here make of the kernels."""
    keys = ("operation", "implementation", "device")
    newest = latest(record.read("aot_kernels"), *keys, "case")
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in newest:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return markdown(
        [
            "operation",
            "kernel",
            "device",
            "compiled",
            "registers",
            "spilled bytes",
            "shared KiB",
            "VMEM MiB",
            "SMEM KiB",
        ],
        [
            [
                *group,
                f"{sum('custom_calls' in row for row in rows)} of {len(rows)}",
                _largest(rows, "registers"),
                _largest(rows, "spilled_bytes"),
                _in_units(_largest(rows, "shared_bytes"), 1 << 10),
                _in_units(_largest_of_rows(rows, "vmem_bytes"), 1 << 20),
                _in_units(_largest_of_rows(rows, "smem_bytes"), 1 << 10),
            ]
            for group, rows in sorted(groups.items())
        ],
    )


def aot_estimates() -> str:
    """What the TPU compiler estimates of the first case of each operation."""
    newest = latest(
        record.read("aot_kernels"), "operation", "implementation", "device", "case"
    )
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for row in newest:
        if row["implementation"] == "tpu" and "vmem_bytes" in row:
            cases = groups.setdefault(row["operation"], {})
            if row["case"] in cases or not cases:
                cases.setdefault(row["case"], {})[row["device"]] = row
    return markdown(
        ["operation", "case", "MB at least", "estimated MB", *_estimated_on()],
        [
            [
                operation,
                case,
                f"{next(iter(rows.values()))['num_bytes'] / 1e6:,.1f}",
                f"{next(iter(rows.values()))['estimated_bytes'] / 1e6:,.1f}",
                *(_microseconds(rows.get(name)) for name in TPUS),
            ]
            for operation, cases in sorted(groups.items())
            for case, rows in cases.items()
        ],
    )


def plans() -> str:
    """What published models need and could reach on devices that are not here."""
    rows = latest(record.read("plans"), "model", "topology", "tensor")
    return markdown(
        [
            "model",
            "devices",
            "tensor x data",
            "GiB weights",
            "GiB KV",
            "GiB temporaries",
            "requests of 2k / 8k / 32k",
            "decode, ms",
            "output tokens/s",
            "$ per million",
            "compiled in, s",
        ],
        [_plan(row) for row in rows],
    )


def _plan(row: dict[str, Any]) -> list[object]:
    memory, layout, speed = (
        row[key] for key in ("memory_per_device", "layout", "throughput")
    )
    requests = row["concurrent_requests"].values()
    dollars = speed["dollars_per_million"]
    seconds = sum(step["compiled"]["compile_seconds"] for step in row["steps"])
    return [
        row["model"],
        f"{row['topology']} ({row['num_devices']})",
        f"{layout['tensor']} x {layout['data']}",
        *(f"{memory[key] / 2**30:.2f}" for key in ("weights", "pool", "temporaries")),
        " / ".join("-" if count is None else f"{count:,}" for count in requests),
        f"{speed['decode_seconds'] * 1e3:.1f}",
        f"{speed['output_tokens_per_second']:,.0f}",
        "-" if dollars is None else f"{dollars:.2f}",
        f"{seconds:.0f}",
    ]


def _estimated_on() -> list[str]:
    return [f"estimated µs, {name}" for name in TPUS]


def _microseconds(row: dict[str, Any] | None) -> str:
    if row is None or row["estimated_seconds"] is None:
        return ""
    return f"{row['estimated_seconds'] * 1e6:,.1f}"


def _in_units(size: Any, unit: int) -> str:
    return "" if size == "" else f"{size / unit:,.1f}"


def _largest_of_rows(rows: Sequence[dict[str, Any]], field: str) -> object:
    """The largest figure of some rows, empty where none is known."""
    return max((row[field] for row in rows if field in row), default="")


def _largest(rows: Sequence[dict[str, Any]], field: str) -> object:
    """The largest figure of any kernel of some rows, empty where none is known."""
    kernels = [kernel for row in rows for kernel in row.get("kernels", [])]
    known = (kernel[field] for kernel in kernels if field in kernel)
    return max(known, default="")


TABLES: dict[str, Callable[[], str]] = {
    table.__name__: table
    for table in (
        aot_estimates,
        aot_kernels,
        aot_steps,
        cpu_products,
        device_waits,
        host_loop,
        kv_waste,
        peer_ratios,
        peers,
        plans,
        prefix_cache,
        routing,
        sampling_draw,
        sampling_thresholds,
        server,
        server_soak,
        startup,
    )
}


def render(text: str) -> str:
    """The text with every table made anew."""
    return TABLE.sub(lambda m: m[1] + TABLES[m[2]]() + m[3], text)


def main() -> int:
    """Writes or checks the tables; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    stale = [path for path in FILES if render(path.read_text()) != path.read_text()]
    for path in stale:
        if check:
            print(f"{path.name}: a table is not what the results say")
        else:
            path.write_text(render(path.read_text()))
    return 1 if check and stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
