"""`jllm bench`: the verbs and what they have in common."""

import argparse
from typing import Any

from jllm.bench import latency, plot, report, serve, startup, sweep, throughput

VERBS = {
    "throughput": (throughput, "requests all at once, tokens per second"),
    "latency": (latency, "one batch at a time, every token timed"),
    "serve": (serve, "an OpenAI-compatible server under load"),
    "startup": (startup, "from the start of a process to the first token"),
    "sweep": (sweep, "a server at several loads, as a table"),
}


def add_parser(commands: Any) -> None:
    """Adds `bench` and its verbs to the commands of `jllm`."""
    parser = commands.add_parser("bench", help="measure speed", allow_abbrev=False)
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")
    for name, (module, text) in VERBS.items():
        verb = verbs.add_parser(name, help=text, allow_abbrev=False)
        module.add_arguments(verb)
        output = verb.add_argument_group("output")
        output.add_argument(
            "--json",
            metavar="FILE",
            help="write the result; a file that ends with .jsonl gets one more line",
        )
        output.add_argument("--plot", metavar="FILE", help="draw a PNG (extra plot)")
        output.add_argument(
            "--quiet", action="store_true", help="no messages but warnings and errors"
        )
        verb.set_defaults(run=run, measure=module.run)


def run(options: argparse.Namespace) -> int:
    """Runs a verb; the exit code is 1 if a request failed."""
    report.check_output(options.json, "json")
    report.check_output(options.plot, "plot")
    plot.check_plot(options.plot)
    result = options.measure(options)
    if options.json:
        report.write_json(options.json, result)
    return 1 if result.get("failed") else 0
