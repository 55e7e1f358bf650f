"""The command line: generate, chat, demo, env; flags are made from the dataclasses."""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import logging
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NoReturn, Protocol

from jllm.bench.cli import add_parser as add_bench_parser
from jllm.commands import compile as compile_command
from jllm.commands import convert, hosts, inspect, plan
from jllm.config import EngineConfig
from jllm.errors import EngineStoppedError, InvalidRequestError, JllmError
from jllm.flags import add_flags, given_values
from jllm.outputs import RequestOutput
from jllm.types import RequestOutputKind, SamplingParams

USAGE_ERROR = 2
INTERRUPTED = 130
BROKEN_PIPE = 141
"""The shell's code for a process ended by SIGPIPE."""

COMMANDS_GROUP = "jllm.commands"
"""Entry points of further commands; each loads a `Plugin`."""
SAMPLING_FLAGS_LEFT_OUT = ("output_kind", "detokenize", "extra_args")
ENGINE_FLAGS_LEFT_OUT = ("model",)
ENGINE_FLAGS_RENAMED = {"seed": "engine-seed"}
"""`--seed` is the one of the sampling parameters."""
STORY_PROMPT = "Once upon a time"
DEMO_PROMPTS = (
    "Once upon a time there was a little girl",
    "One day, a boy named Tim",
    "The cat and the dog",
    "Lily wanted to",
    "In the park there was a big tree",
    "Mom said it was time to",
    "A small bird sat",
    "Tom had a red ball",
)


class Plugin(Protocol):
    """A command of another package, which this one must not import."""

    @property
    def summary(self) -> str:
        """One line for the list of commands."""
        ...

    @property
    def options(self) -> type[Any]:
        """Dataclass whose fields become flags, beside those of the engine."""
        ...

    def run(self, engine: EngineConfig, options: Any) -> int:
        """Runs the command; returns the exit code."""
        ...


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code, never raises.

    Codes are 0, 1 for a failed engine, 2 for bad input, 130 after Ctrl-C.
    """
    try:
        code = _run(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Nobody reads any more: keep the interpreter from flushing to nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    return code


def make_parser() -> argparse.ArgumentParser:
    """Builds the parser of all commands."""
    parser = _Parser(
        prog="jllm",
        description="Generates text with large language models, in pure JAX.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    generate = _add_command(commands, "generate", run_generate, "complete prompts")
    generate.add_argument(
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="text to complete; may be repeated; - reads standard input",
    )
    generate.add_argument(
        "--prompt-token-ids",
        action="append",
        default=[],
        type=_token_ids,
        metavar="IDS",
        help='tokens to complete, such as "1,2,3"; may be repeated',
    )
    generate.add_argument(
        "--json", action="store_true", help="print one JSON object per prompt"
    )
    chat = _add_command(commands, "chat", run_chat, "talk to a model")
    chat.add_argument("--system", metavar="TEXT", help="the system message")
    for command in (generate, chat):
        add_flags(
            command.add_argument_group("sampling"),
            SamplingParams,
            leave_out=SAMPLING_FLAGS_LEFT_OUT,
        )
    _add_command(commands, "demo", run_demo, "see what the embedded model writes")
    for point in importlib.metadata.entry_points(group=COMMANDS_GROUP):
        _add_plugin(commands, point.name, point.load())
    inspect.add_parser(commands)
    convert.add_parser(commands)
    plan.add_parser(commands)
    compile_command.add_parser(commands)
    environment = commands.add_parser(
        "env", help="print versions and devices", allow_abbrev=False
    )
    environment.set_defaults(run=run_env, quiet=True)
    add_bench_parser(commands)
    return parser


def run_generate(options: argparse.Namespace) -> int:
    """Completes prompts; streams if there is one, for a reader of text."""
    prompts: list[Any] = [_read_prompt(text) for text in options.prompt]
    prompts += [{"prompt_token_ids": ids} for ids in options.prompt_token_ids]
    if not prompts:
        raise InvalidRequestError("give --prompt or --prompt-token-ids")
    given = _sampling_options(options)
    with _load(options) as llm:
        params = _sampling_params(llm, given)
        if len(prompts) == 1 and params.n == 1 and not options.json:
            outputs = [_print_stream(llm, prompts[0], params)]
        else:
            outputs = llm.generate(prompts, params, use_tqdm=sys.stderr.isatty())
            for i, output in enumerate(outputs):
                _print_output(i, output, as_json=options.json)
    failed = any(c.finish_reason == "error" for o in outputs for c in o.outputs)
    return 1 if failed else 0


def run_chat(options: argparse.Namespace) -> int:
    """Talks until the end of input; Ctrl-C ends an answer."""
    given = _sampling_options(options)
    system: list[dict[str, str]] = []
    if options.system is not None:
        system.append({"role": "system", "content": options.system})
    with _load(options) as llm:
        params = _sampling_params(llm, given)
        messages = list(system)
        print("/reset starts again, /quit or Ctrl-D leaves", file=sys.stderr)
        while (text := _ask("> ")) is not None and text.strip() != "/quit":
            if text.strip() == "/reset":
                messages = list(system)
            elif text.strip():
                messages.append({"role": "user", "content": text})
                answer = _answer(llm, messages, params)
                messages.append({"role": "assistant", "content": answer})
    return 0


def run_demo(options: argparse.Namespace) -> int:
    """Streams a story, then completes eight prompts in one batch; prints the speed."""
    with _load(options) as llm:
        params = SamplingParams(temperature=0.7, seed=1, max_tokens=200)
        print(STORY_PROMPT, end="", flush=True)
        output = _print_stream(llm, STORY_PROMPT, params)
        print(f"\n{_speed(output)}\n")
        seeded = [
            SamplingParams(temperature=0.7, seed=i, max_tokens=60)
            for i in range(len(DEMO_PROMPTS))
        ]
        began = time.perf_counter()
        outputs = llm.generate(list(DEMO_PROMPTS), seeded, use_tqdm=False)
        seconds = time.perf_counter() - began
        for prompt, result in zip(DEMO_PROMPTS, outputs, strict=True):
            print(f"* {prompt}{result.outputs[0].text}".replace("\n", " "))
        count = sum(len(result.outputs[0].token_ids) for result in outputs)
        print(
            f"\n{len(outputs)} prompts in one batch: {count} tokens in {seconds:.2f} s,"
            f" {count / seconds:.0f} tokens/s"
        )
    return 0


def run_env(options: argparse.Namespace) -> int:
    """Prints versions and devices, for a bug report."""
    del options
    import jax

    print(f"jllm {importlib.metadata.version('jllm')}")
    print(f"python {platform.python_version()} on {platform.platform()}")
    for name in ("jax", "jaxlib", "numpy", "flax", "transformers", "tokenizers"):
        print(f"{name} {importlib.metadata.version(name)}")
    for device in jax.devices():
        print(f"device {device.id}: {device.platform}, {device.device_kind}")
    return 0


def _run(arguments: Sequence[str] | None) -> int:
    try:
        options = make_parser().parse_args(arguments)
        _set_up_logging(is_quiet=options.quiet)
        return options.run(options)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else USAGE_ERROR
    except JllmError as error:
        print(f"jllm: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1 if isinstance(error, EngineStoppedError) else USAGE_ERROR


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, in the words of all other errors."""

    def error(self, message: str) -> NoReturn:
        print(f"jllm: error: {message} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(USAGE_ERROR)


class _Version(argparse.Action):
    """Prints the version; looks it up only then."""

    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help="print the version")

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        print(f"jllm {importlib.metadata.version('jllm')}")
        parser.exit()


def _add_command(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace], int],
    text: str,
    *,
    renamed: Mapping[str, str] = ENGINE_FLAGS_RENAMED,
    has_inputs: bool = False,
) -> argparse.ArgumentParser:
    """Adds a command that loads a model; inputs leave it no place without a flag."""
    parser = commands.add_parser(name, help=text, allow_abbrev=False)
    parser.set_defaults(run=partial(_run_on_host, run))
    place: dict[str, Any] = {} if has_inputs else {"nargs": "?"}
    parser.add_argument(
        "--model" if has_inputs else "model",
        metavar="MODEL",
        help="directory or Hugging Face id; none is the embedded model",
        **place,
    )
    parser.add_argument(
        "--quiet", action="store_true", help="no messages but warnings and errors"
    )
    add_flags(
        parser.add_argument_group("engine"),
        EngineConfig,
        leave_out=ENGINE_FLAGS_LEFT_OUT,
        renamed=renamed,
    )
    hosts.add_flags(parser)
    return parser


def _run_on_host(
    run: Callable[[argparse.Namespace], int], options: argparse.Namespace
) -> int:
    """Runs a command; all hosts but the first only do their part of its steps."""
    config = _engine_config(options)
    if not config.is_follower:
        return run(options)
    from jllm.engine.follow import follow

    # Whoever ends a job signals all hosts; the first one ends in order, and then this.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    follow(config)
    return 0


def _add_plugin(commands: Any, name: str, plugin: Plugin) -> None:
    """Adds a command of a package above this one, with flags of its own."""

    def run(options: argparse.Namespace) -> int:
        own = plugin.options(**given_values(options, plugin.options))
        return plugin.run(_engine_config(options), own)

    fields = dataclasses.fields(plugin.options)
    has_inputs = any("positional" in field.metadata for field in fields)
    parser = _add_command(
        commands, name, run, plugin.summary, renamed={}, has_inputs=has_inputs
    )
    add_flags(parser.add_argument_group(name), plugin.options)


def _load(options: argparse.Namespace) -> Any:
    # Checked before JAX is imported, which takes longer than a typing error deserves.
    config = _engine_config(options)
    from jllm.llm import LLM

    return LLM.from_engine_config(config)


def _engine_config(options: argparse.Namespace) -> EngineConfig:
    return EngineConfig(
        model=options.model,
        hosts=hosts.given_hosts(options),
        **given_values(options, EngineConfig),
    )


def _sampling_options(options: argparse.Namespace) -> dict[str, Any]:
    """The sampling flags given, checked before a model is loaded."""
    given = given_values(options, SamplingParams)
    # An answer ends by itself; the Python API's 16 tokens would surprise here.
    given.setdefault("max_tokens", None)
    SamplingParams(**given)
    return given


def _sampling_params(llm: Any, given: dict[str, Any]) -> SamplingParams:
    """The model's defaults with the flags given."""
    return dataclasses.replace(llm.get_default_sampling_params(), **given)


def _print_stream(llm: Any, prompt: Any, params: SamplingParams) -> RequestOutput:
    """Prints text as it comes; returns the last output, with all tokens."""
    params = dataclasses.replace(params, output_kind=RequestOutputKind.CUMULATIVE)
    printed, last = 0, None
    for last in llm.stream(prompt, params):
        text = last.outputs[0].text
        sys.stdout.write(text[printed:])
        sys.stdout.flush()
        printed = len(text)
    print()
    assert last is not None
    return last


def _answer(llm: Any, messages: list[dict[str, str]], params: SamplingParams) -> str:
    """Prints the answer as it comes; returns as much of it as there was."""
    params = dataclasses.replace(params, output_kind=RequestOutputKind.DELTA)
    pieces: list[str] = []
    try:
        outputs = llm.stream(llm.chat_prompt(messages), params)
        with contextlib.closing(outputs):
            for output in outputs:
                pieces.append(output.outputs[0].text)
                sys.stdout.write(pieces[-1])
                sys.stdout.flush()
    except KeyboardInterrupt:
        pass
    print()
    return "".join(pieces)


def _print_output(index: int, output: RequestOutput, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(dataclasses.asdict(output), ensure_ascii=False))
        return
    for completion in output.outputs:
        number = f"{index}.{completion.index}" if len(output.outputs) > 1 else index
        print(f"[{number}] {completion.text}")


def _speed(output: RequestOutput) -> str:
    """First token and speed after it, of a finished output of one sequence."""
    metrics, count = output.metrics, len(output.outputs[0].token_ids)
    if metrics is None or not metrics.first_token_time or not metrics.finished_time:
        return f"{count} tokens"
    first = metrics.first_token_time - metrics.arrival_time
    rest = metrics.finished_time - metrics.first_token_time
    speed = (count - 1) / rest if rest > 0 else 0.0
    return (
        f"{count} tokens; first token after {first * 1000:.0f} ms, "
        f"then {speed:.0f} tokens/s"
    )


def _read_prompt(text: str) -> str:
    return sys.stdin.read().removesuffix("\n") if text == "-" else text


def _ask(sign: str) -> str | None:
    """Reads a line from the user; None at the end of input."""
    try:
        return input(sign)
    except EOFError:
        print()
        return None


def _token_ids(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _set_up_logging(*, is_quiet: bool) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("jllm").setLevel(logging.WARNING if is_quiet else logging.INFO)
