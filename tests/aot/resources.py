"""What a compiled kernel takes of its device: registers, spills, kinds of memory."""

import math
import os
import pathlib
import re
import shutil
import subprocess

import jax
from jax.experimental.pallas import tpu as pltpu

MAX_REGISTERS = 255
MAX_SPILLED_BYTES = 512
MAX_SHARED_BYTES = 227 << 10  # of one program on an H200
TPU_CHIPS = {
    "v5e": pltpu.ChipVersion.TPU_V5E,
    "v6e": pltpu.ChipVersion.TPU_V6E,
    "tpu7x": pltpu.ChipVersion.TPU_7X,
}
LANES = 128

PTXAS = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?"
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?:[^\n]*?(?P<shared>\d+) bytes smem)?",
    re.DOTALL,
)
LAUNCH = re.compile(r"(\w+) grid: .*shared_memory: (\d+) bytes")
MOSAIC_LAUNCH = re.compile(r"dynamic_shared_memory_size %c(\d+)_i32")
# The compiler's own count for a kernel: scratch, windows and what it spills itself.
VMEM = re.compile(
    r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"\d+","size":"(\d+)"'
)


def triton_kernels(folder: pathlib.Path) -> list[dict[str, object]]:
    """Kernels of XLA and Triton whose code XLA left in a folder."""
    launches = "".join(p.read_text() for p in folder.glob("*.thunk_sequence.txt"))
    shared = {name: int(size) for name, size in LAUNCH.findall(launches)}
    return _kernels(folder, shared)


def mosaic_kernels() -> list[dict[str, object]]:
    """Those of Mosaic GPU, which XLA does not see; empties the folder of its dumps."""
    name = os.environ.get("MOSAIC_GPU_DUMP_TO")
    if name is None:
        return []
    folder, shared = pathlib.Path(name), {}
    for path in folder.glob("*.mlir-passes.log"):
        with path.open(errors="replace") as file:
            sizes = filter(None, map(MOSAIC_LAUNCH.search, file))
            if size := next(sizes, None):
                shared[path.name.removesuffix(".mlir-passes.log")] = int(size[1])
    found = _kernels(folder, shared)
    for path in folder.iterdir():
        path.unlink()
    return found


def _kernels(folder: pathlib.Path, dynamic: dict[str, int]) -> list[dict[str, object]]:
    """Figures of the kernels in a folder.

    Args:
        folder: Where the files of PTX are.
        dynamic: Shared memory given at the launch, by the name of a kernel or of its
            file; ptxas knows only of what the code itself declares.
    """
    if shutil.which("ptxas") is None:
        return []
    found: list[dict[str, object]] = []
    for path in sorted(folder.glob("*.ptx")):
        if ".entry" not in path.read_text():
            continue
        command = ["ptxas", "-v", "-arch=sm_90a", "-o", "/dev/null", str(path)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        text = result.stdout + result.stderr
        if result.returncode:
            raise RuntimeError(f"ptxas: {text[-500:]}")
        for entry in re.split(r"(?=ptxas info\s+: Compiling entry)", text):
            if match := PTXAS.search(entry):
                name = match["name"]
                given = dynamic.get(name, dynamic.get(path.stem, 0))
                kernel = {
                    "kernel": name,
                    "registers": int(match["registers"]),
                    "spilled_bytes": int(match["stores"]) + int(match["loads"]),
                    "shared_bytes": given + int(match["shared"] or 0),
                }
                found.append(kernel)
    return found


def vector_memory(text: str) -> int:
    """Bytes of a TPU's vector memory that the largest kernel of a program takes."""
    return max(map(int, VMEM.findall(text)), default=0)


def scalar_memory(jaxpr) -> int:
    """Bytes of a TPU's scalar memory that the largest kernel of a traced program takes.

    Computed, as the compiler does not tell: operands that are there before the kernel
    starts, windows, of which there are two, and scratch.
    """
    return max(map(_scalar_memory, _pallas_calls(jaxpr.jaxpr)), default=0)


def _scalar_memory(equation) -> int:
    mapping = equation.params["grid_mapping"]
    prefetched = equation.invars[: mapping.num_index_operands]
    windows = [m.block_aval for m in mapping.block_mappings]
    return (
        sum(_scalar_bytes(v.aval) for v in prefetched)
        + 2 * sum(map(_scalar_bytes, filter(_is_scalar, windows)))
        + sum(map(_scalar_bytes, filter(_is_scalar, mapping.scratch_avals)))
    )


def _is_scalar(aval) -> bool:
    return aval.memory_space is pltpu.SMEM


def _scalar_bytes(aval) -> int:
    """Words of 32 bits, in whole rows of lanes."""
    *outer, last = aval.shape or (1,)
    return 4 * math.prod(outer) * -(-last // LANES) * LANES


def _pallas_calls(jaxpr):
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield equation
        for inner in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from _pallas_calls(inner)


def over_bounds(line: dict) -> list[str]:
    """What of a line of `compile_kernels` is above the bounds of its device."""
    found = []
    for kernel in line.get("kernels", []):
        bounds = {
            "registers": MAX_REGISTERS,
            "spilled_bytes": MAX_SPILLED_BYTES,
            "shared_bytes": MAX_SHARED_BYTES,
        }
        found += [
            f"{kernel['kernel']}: {name} {kernel[name]} above {bound}"
            for name, bound in bounds.items()
            if kernel[name] > bound
        ]
    if line["device"] in TPU_CHIPS and "vmem_bytes" in line:
        chip = pltpu.get_tpu_info_for_chip(TPU_CHIPS[line["device"]], 1)
        bounds = {
            "vmem_bytes": chip.vmem_capacity_bytes,
            "smem_bytes": chip.smem_capacity_bytes,
        }
        found += [
            f"{name} {line[name]} above {bound}"
            for name, bound in bounds.items()
            if line[name] > bound
        ]
    return found
