"""Compiles the engine's programs for an accelerator that is not there.

    python -m tests.aot.compile_steps gpu|tpu [--devices N] [--programs decode,...]
        [--record] [--dump FOLDER]

One line of JSON per program: what XLA made of it. Needs the compilers of the extra
`aot`, no device. `--record` also appends the lines to benchmarks/results.
"""

import argparse
import datetime as dt
import importlib.metadata
import json
import os
import pathlib
import subprocess
import time

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from jllm.engine.programs import (
    ProgramBuilder,
    ProgramOptions,
    ProgramSizes,
    describe_state,
)
from jllm.models.base import ModelOptions
from jllm.models.registry import build_model
from jllm.sampling.rules import RuleLayout
from shardings.mesh import make_mesh
from shardings.place import tree_shardings
from tests.aot import hlo

ROOT = pathlib.Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "aot_steps.jsonl"
H200 = pathlib.Path(__file__).parent / "nvidia_h200.txtpb"

# Qwen3-0.6B with fewer layers.
MODEL = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
}
DEVICE_NAMES = {"gpu": "NVIDIA H200", "tpu": "TPU v6e"}
BLOCK_SIZES = {"gpu": 16, "tpu": 128}
POOL_TOKENS = 262144
MAX_MODEL_LEN = 8192
# Multiples of five, which no dimension of the model is: an activation never has as many
# elements as a weight.
NUM_ROWS = 40
NUM_TOKENS = 1280
PROGRAMS = ("decode", "prefill", "sampler", "prompt_logprobs")


def target_devices(platform):
    """Descriptions of four devices of the kind."""
    if platform == "tpu":
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")
        return topologies.get_topology_desc("v6e:2x2", platform="tpu").devices
    # Autotuning would need the device.
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_autotune_level=0"
    return topologies.get_topology_desc(
        "h200", platform="cuda", topology="1x1x4", target_config=H200.read_text()
    ).devices


def program_options(platform, model):
    """Sizes as an engine would choose them."""
    block_size = BLOCK_SIZES[platform]
    max_blocks = MAX_MODEL_LEN // block_size
    return ProgramOptions(
        sizes=ProgramSizes(rows=(NUM_ROWS,), tokens=(NUM_TOKENS,)),
        num_blocks=POOL_TOKENS // block_size,
        block_size=block_size,
        max_blocks=max_blocks,
        max_appends=max_blocks + NUM_TOKENS // block_size + NUM_ROWS,
        max_copies=5,
        num_logprobs=20,
        rule_size=RuleLayout(model.padded_vocab_size).size,
        draw_method="gumbel",
    )


def describe_weights(model, mesh):
    """The weights as shapes; nothing is allocated."""
    specs = model.specs()
    return jax.tree.map(
        lambda spec, place: jax.ShapeDtypeStruct(
            spec.shape, jnp.dtype(model.options.dtype), sharding=place
        ),
        specs,
        tree_shardings(specs, mesh),
        is_leaf=lambda node: hasattr(node, "axes"),
    )


class Target:
    """The programs of one model on some devices.

    Args:
        platform: gpu or tpu.
        num_devices: How many share each layer.
    """

    def __init__(self, platform, num_devices):
        devices = target_devices(platform)
        mesh = make_mesh(tensor=num_devices, devices=devices)
        options = ModelOptions(
            dtype="bfloat16",
            max_model_len=MAX_MODEL_LEN,
            mesh=mesh if num_devices > 1 else None,
        )
        model = build_model(MODEL, options)
        place = NamedSharding(mesh, PartitionSpec())
        self.options = program_options(platform, model)
        self.state = jax.tree.leaves(describe_state(model, self.options, place))
        self.weights = describe_weights(model, mesh)
        self._builder = ProgramBuilder(model, self.options, self.weights, place)
        self._facts = {"platform": platform, "device": DEVICE_NAMES[platform]}
        self._facts |= {"num_devices": num_devices}

    def compile(self, program):
        """A compiled program."""
        builder = self._builder
        if program == "sampler":
            return builder.sampler(NUM_ROWS)
        if program == "prompt_logprobs":
            return builder.prompt_logprobs()
        return builder.step(program, NUM_ROWS if program == "decode" else NUM_TOKENS)

    def report(self, program, dump=None):
        """What XLA made of a program; bytes are per device."""
        start = time.perf_counter()
        compiled = self.compile(program)
        seconds = time.perf_counter() - start
        memory, text = compiled.memory_analysis(), compiled.as_text()
        if dump is not None:
            (dump / f"{program}.hlo").write_text(text)
        pool = local_size(self.state[0])
        matrices = [leaf for leaf in jax.tree.leaves(self.weights) if is_matrix(leaf)]
        sizes = {pool, *(local_size(leaf) for leaf in matrices)}
        return self._facts | {
            "program": program,
            "argument_bytes": memory.argument_size_in_bytes,
            "output_bytes": memory.output_size_in_bytes,
            "temporary_bytes": memory.temp_size_in_bytes,
            "aliased_bytes": memory.alias_size_in_bytes,
            "pool_bytes": sum(local_bytes(leaf) for leaf in self.state[:-3]),
            "state_bytes": sum(local_bytes(leaf) for leaf in self.state),
            "state_leaves": len(self.state),
            "aliased_leaves": len(hlo.aliased_parameters(text)),
            "copies": hlo.count_copies(text),
            "large_moves": hlo.large_moves(text, sizes, pool),
            "custom_calls": hlo.custom_calls(text),
            "collectives": hlo.collectives(text),
            "compile_seconds": round(seconds, 1),
        }


def is_matrix(leaf):
    """Whether a weight is a matrix, not the stack of all norms."""
    return leaf.size >= 2**19


def local_size(leaf):
    """Elements of an array on one device."""
    size = 1
    for dim in leaf.sharding.shard_shape(leaf.shape):
        size *= dim
    return size


def local_bytes(leaf):
    """Bytes of an array on one device."""
    return local_size(leaf) * leaf.dtype.itemsize


def provenance():
    """With what the programs were compiled, and from which state of the code."""

    def git(*arguments):
        command = ("git", *arguments)
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        return result.stdout.strip()

    changed = git("status", "--porcelain", "--", "jllm", "pallas_kernels", "shardings")
    packages = ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin")
    versions = {
        name.replace("-", "_"): importlib.metadata.version(name) for name in packages
    }
    return {
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "commit": git("rev-parse", "HEAD") + ("+changes" if changed else ""),
        **versions,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("platform", choices=DEVICE_NAMES)
    parser.add_argument("--devices", type=int, nargs="+", default=[1])
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, default=PROGRAMS)
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--dump", type=pathlib.Path)
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    for num_devices in arguments.devices:
        target = Target(arguments.platform, num_devices)
        for program in arguments.programs:
            report = target.report(program, arguments.dump)
            print(json.dumps(report), flush=True)
            if arguments.record:
                with RESULTS.open("a") as file:
                    file.write(json.dumps({**report, **provenance()}) + "\n")


if __name__ == "__main__":
    main()
