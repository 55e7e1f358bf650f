"""Random weights, from config.json alone: for tests, benchmarks and training."""

import functools
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Sharding
from jax.typing import DTypeLike

from jllm.models.base import ParamSpec


def random_weights(
    specs: Mapping[str, Any], shardings: Mapping[str, Any], dtype: DTypeLike, seed: int
) -> dict[str, Any]:
    """Makes every parameter on its own devices.

    Values depend on the seed and on the parameter's place in the tree, not on the mesh.

    Args:
        specs: Tree of `ParamSpec`.
        shardings: The same tree of shardings.
        dtype: Type of the arrays.
        seed: Any integer of up to 63 bits.
    """

    # One program for all layers: they differ in nothing but the key.
    @functools.cache
    def program(
        shape: tuple[int, ...], init: str, sharding: Sharding
    ) -> Callable[[Array], Array]:
        draw = functools.partial(_draw, shape=shape, init=init, dtype=dtype)
        return jax.jit(draw, out_shardings=sharding)

    def make(path: Any, spec: ParamSpec, sharding: Sharding) -> Array:
        name = jax.tree_util.keystr(path)
        key = jax.random.fold_in(root, zlib.crc32(name.encode()))
        return program(spec.shape, spec.init, sharding)(key)

    low, high = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    root = jax.random.fold_in(jax.random.key(low), high)
    return jax.tree_util.tree_map_with_path(make, specs, shardings)


def _draw(key: Array, *, shape: tuple[int, ...], init: str, dtype: DTypeLike) -> Array:
    if init == "ones":
        return jnp.ones(shape, dtype)
    if init == "zeros":
        return jnp.zeros(shape, dtype)
    # Weights lie [N, K]: the last dimension is the one that is summed over.
    return (jax.random.normal(key, shape, jnp.float32) * shape[-1] ** -0.5).astype(
        dtype
    )
