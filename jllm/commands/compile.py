"""`jllm compile`: writes compiled programs, so that starts compile nothing."""

import argparse
import dataclasses
from typing import Any

from jllm.config import EngineConfig
from jllm.errors import ConfigError
from jllm.flags import add_flags, given_values

LEFT_OUT = ("model", "executables")


def add_parser(commands: Any) -> None:
    """Adds `compile` to the commands of `jllm`."""
    parser = commands.add_parser(
        "compile",
        help="write a model's compiled programs, for starts that compile nothing",
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="folder, GGUF file or Hugging Face id; none is the embedded model; its "
        "weights are not read",
    )
    parser.add_argument(
        "--output",
        metavar="DIR",
        help="folder that a start names as executables; none is the folder "
        '"executables" beside the model, where every start looks',
    )
    parser.add_argument(
        "--quiet", action="store_true", help="no messages but warnings and errors"
    )
    # The programs depend on the options: those of the start must be given.
    add_flags(parser.add_argument_group("engine"), EngineConfig, leave_out=LEFT_OUT)


def run(options: argparse.Namespace) -> int:
    """Compiles and writes; prints what there is."""
    config = EngineConfig(model=options.model, **given_values(options, EngineConfig))
    if options.output is not None:
        if options.output in ("", "auto"):
            raise ConfigError(f"output={options.output!r} must name a folder")
        config = dataclasses.replace(config, executables=options.output)
    from jllm.engine.export import export_executables

    for exported in export_executables(config):
        print(
            f"{exported.folder}: {exported.num_compiled} programs compiled, "
            f"{exported.num_loaded} were there, pool of {exported.num_blocks} blocks, "
            f"{exported.num_bytes / 2**20:.1f} MiB"
        )
    return 0
