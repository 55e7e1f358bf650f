"""Cache writes in float64 numpy, and draws of what they are given."""

import dataclasses

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common.cases import numpy_dtype
from pallas_kernels.common.target import Target
from pallas_kernels.kv_write import HeadNorms, Heads, Rotation
from tests.pallas_kernels.targets import gpu_target

TARGETS = {
    "reference": Target("cpu"),
    "gpu_triton": gpu_target(),
    "tpu": Target(
        "tpu",
        "v6e",
        "v6e",
        1,
        interpret=pltpu.InterpretParams(
            detect_races=True, uninitialized_memory="nan", dma_execution_mode="on_wait"
        ),
    ),
}
ULP = {"float32": 1e-6, "bfloat16": 2**-7, "float16": 2**-10}


@dataclasses.dataclass(frozen=True)
class Write:
    """Shapes and types of a write; a TPU's blocks hold whole tiles."""

    num_tokens: int
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 128
    block_size: int = 16
    num_blocks: int = 5
    dtype: str = "float32"
    kv_dtype: str = "float32"
    rotary_dim: int = 128
    norm_offset: int | None = None


def draw(write, seed=0):
    """A pool with NaN in it, heads, slots in and out of it, scales, tables, norms."""
    rng = np.random.default_rng(seed)
    kv_dtype = numpy_dtype(write.kv_dtype)
    k, d = write.num_kv_heads, write.head_dim
    pool = rng.normal(size=(write.num_blocks, 2, k, write.block_size, d))
    pool = pool * (32 if kv_dtype == np.int8 else 1)
    if kv_dtype != np.int8:
        pool[:, :, :, 1] = np.nan
    pool = pool.astype(kv_dtype)
    size = lambda n: (write.num_tokens, n, d)  # noqa: E731
    to = lambda x: jnp.asarray(x, write.dtype)  # noqa: E731
    heads = Heads(*(to(rng.normal(size=size(n))) for n in (write.num_heads, k, k)))
    num_slots = write.num_blocks * write.block_size
    slots = rng.permutation(np.arange(-2, num_slots + 4))
    run = np.arange(write.num_tokens // 2) + 3
    slots = np.concatenate([run, slots[~np.isin(slots, run)]])[: write.num_tokens]
    scales = None
    if kv_dtype.itemsize == 1:
        spread = 0.02 if kv_dtype == np.int8 else 0.005
        scales = rng.uniform(0.5 * spread, 1.5 * spread, (2, k)).astype(np.float32)
    angles = rng.uniform(-9, 9, (write.num_tokens, write.rotary_dim // 2))
    rotation = Rotation(*(jnp.asarray(f(angles), "float32") for f in (np.cos, np.sin)))
    norms = None
    if write.norm_offset is not None:
        weights = [to(rng.normal(size=d)) for _ in range(2)]
        norms = HeadNorms(*weights, 1e-5, write.norm_offset)
    scales = None if scales is None else jnp.asarray(scales)
    slots = jnp.asarray(slots, jnp.int32)
    return pool, heads, slots, scales, rotation, norms


def prepared(x, weight, rotation, norms):
    """Normalised and rotated heads."""
    x = np.asarray(x, np.float64)
    if norms is not None:
        mean = (x**2).mean(axis=2, keepdims=True)
        factor = np.asarray(weight, np.float64) + norms.weight_offset
        x = x / np.sqrt(mean + norms.epsilon) * factor
    half = rotation.cos.shape[1]
    cos, sin = (np.asarray(a, np.float64)[:, None] for a in rotation)
    out = x.copy()
    first, second = x[..., :half], x[..., half : 2 * half]
    out[..., :half] = first * cos - second * sin
    out[..., half : 2 * half] = second * cos + first * sin
    return out


def check_pool(pool, out, new, slots, scales, tolerance):
    """The new rows are as they should be, all others bit for bit as they were."""
    assert out.dtype == pool.dtype
    block_size = pool.shape[3]
    bits = f"u{pool.dtype.itemsize}"
    untouched = np.ones(pool.shape, bool)
    for token, slot in enumerate(np.asarray(slots)):
        block, place = divmod(int(slot), block_size)
        if not 0 <= block < len(pool):
            continue
        untouched[block, :, :, place] = False
        for part in range(2):
            found = out[block, part, :, place].astype(np.float64)
            expected = new[part][token]
            if scales is None:
                error, size = np.abs(found - expected), np.abs(expected)
                rounding = 2.0 ** -(ml_dtypes.finfo(pool.dtype).nmant + 1)
                assert (error <= rounding * size + tolerance * (size + 0.1)).all()
                continue
            exact = expected / np.asarray(scales, np.float64)[part][:, None]
            if pool.dtype == np.int8:
                exact, step = np.clip(exact, -128, 127), 0.5
            else:
                info = ml_dtypes.finfo(pool.dtype)
                exact = np.clip(exact, -float(info.max), float(info.max))
                step = np.abs(exact) * 2.0 ** -(info.nmant + 1) + float(
                    info.smallest_subnormal
                )
            slack = tolerance * (np.abs(exact) + 0.1 / scales[part].min())
            assert (np.abs(found - exact) <= 1.001 * step + slack).all()
    # A NaN stays one; XLA on CPU may change which.
    same = out.view(bits) == pool.view(bits)
    if pool.dtype != np.int8:
        same |= np.isnan(out) & np.isnan(pool)
    assert same[untouched].all()
