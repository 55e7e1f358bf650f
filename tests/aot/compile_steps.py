"""Compiles the engine's programs for an accelerator that is not there.

    python -m tests.aot.compile_steps gpu|tpu [--programs decode ...] [--record]
        [--dump FOLDER]

One line of JSON per program: what XLA made of it. Needs the compilers of the extra
`aot`, no device. `--record` also appends the lines to benchmarks/results, `--dump`
keeps the text of the programs.
"""

import argparse
import json
import pathlib
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jllm.engine.builder import ProgramBuilder
from jllm.engine.programs import (
    ProgramOptions,
    ProgramSizes,
    describe_state,
)
from jllm.layers.kernels import Target as KernelTarget
from jllm.models.base import ModelOptions
from jllm.models.registry import build_model
from jllm.plan.described import described_devices
from jllm.plan.hlo import collectives, sums
from jllm.plan.topology import gpu_topology, tpu_topology
from jllm.sampling.rules import RuleLayout
from shardings.mesh import make_mesh
from shardings.place import tree_shardings
from tests.aot import hlo
from tests.aot.provenance import ROOT, provenance

RESULTS = ROOT / "benchmarks" / "results" / "aot_steps.jsonl"

# Qwen3-0.6B with fewer layers.
MODEL = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
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


class Case(NamedTuple):
    """Devices that share each layer, head width, and what is compiled for them."""

    num_devices: int
    head_dim: int
    programs: tuple[str, ...]


ALL = ("decode", "prefill", "sampler", "prompt_logprobs")
CASES = {
    "gpu": (Case(1, 128, ALL), Case(4, 128, ALL)),
    # Heads narrower than a register are padded in the pool.
    "tpu": (Case(1, 128, ALL), Case(4, 128, ALL), Case(1, 64, ("decode",))),
}


def target_devices(platform):
    """Descriptions of four devices of the kind."""
    is_tpu = platform == "tpu"
    return described_devices(
        tpu_topology("v6e:2x2") if is_tpu else gpu_topology("h200", 4)
    )


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
        tiles=model.tile_layout(block_size),
        branches=False,
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
    """The programs of one model on some devices of a platform, gpu or tpu."""

    def __init__(self, platform, devices, case):
        num_devices, head_dim, _ = case
        mesh = make_mesh(tensor=num_devices, devices=devices)
        options = ModelOptions(
            dtype="bfloat16",
            kv_width_multiple=128 if platform == "tpu" else 1,
            max_model_len=MAX_MODEL_LEN,
            target=KernelTarget.of(devices[0]),
            mesh=mesh if num_devices > 1 else None,
        )
        model = build_model({**MODEL, "head_dim": head_dim}, options)
        place = NamedSharding(mesh, PartitionSpec())
        self._vocab_size = model.padded_vocab_size
        self.options = program_options(platform, model)
        self.state = jax.tree.leaves(describe_state(model, self.options, place))
        self.weights = describe_weights(model, mesh)
        self._builder = ProgramBuilder(model, self.options, self.weights, place)
        self._facts = {"platform": platform, "device": DEVICE_NAMES[platform]}
        self._facts |= {"num_devices": num_devices, "head_dim": head_dim}

    def compile(self, program):
        """A compiled program."""
        size = NUM_ROWS if program in ("decode", "sampler") else NUM_TOKENS
        return self._builder.build(program, size).program

    def report(self, program, dump=None):
        """What XLA made of a program; bytes are per device."""
        start = time.perf_counter()
        compiled = self.compile(program)
        seconds = time.perf_counter() - start
        memory, text = compiled.memory_analysis(), compiled.as_text()
        if dump is not None:
            name = "-".join([*map(str, self._facts.values()), program])
            (dump / f"{name}.hlo".replace(" ", "_")).write_text(text)
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
            "logits_bytes": 4 * NUM_ROWS * self._vocab_size,
            "state_bytes": sum(local_bytes(leaf) for leaf in self.state),
            "state_leaves": len(self.state),
            "aliased_leaves": len(hlo.aliased_parameters(text)),
            "copies": hlo.count_copies(text),
            "large_moves": hlo.large_moves(text, sizes, pool),
            "custom_calls": hlo.custom_calls(text),
            "collectives": collectives(text),
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


def record(report):
    """Appends a line to the results, the exchanges between devices summed up."""
    with RESULTS.open("a") as file:
        line = {**report, "collectives": sums(report["collectives"]), **provenance()}
        file.write(json.dumps(line) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("platform", choices=CASES)
    parser.add_argument("--programs", nargs="+", choices=ALL, default=ALL)
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--dump", type=pathlib.Path)
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    devices = target_devices(arguments.platform)
    for case in CASES[arguments.platform]:
        target = Target(arguments.platform, devices, case)
        for program in case.programs:
            if program not in arguments.programs:
                continue
            report = target.report(program, arguments.dump)
            print(json.dumps(report), flush=True)
            if arguments.record:
                record(report)


if __name__ == "__main__":
    main()
