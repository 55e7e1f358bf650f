"""Random weights, from config.json alone: for tests, benchmarks and training."""

import functools
import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Sharding
from jax.typing import DTypeLike
from jaxtyping import UInt

from jllm.models.base import ParamSpec, parameter_bytes
from jllm.models.stages import StackedSpec
from jllm.weights.host_memory import HostMemory
from jllm.weights.loader import memory_for

BYTES_STD = (4 * (256**2 - 1) / 12) ** 0.5
"""Standard deviation of the sum of four uniform bytes."""


def random_weights(
    specs: Mapping[str, Any], shardings: Mapping[str, Any], dtype: DTypeLike, seed: int
) -> dict[str, Any]:
    """Makes every parameter on its own devices.

    Values depend on the seed and on the parameter's place in the tree, not on how many
    devices share it. The tree of a pipeline is another one.

    Args:
        specs: Tree of `ParamSpec`.
        shardings: The same tree of shardings.
        dtype: Type of the arrays.
        seed: Any integer of up to 63 bits.
    """
    memory = memory_for(shardings, parameter_bytes(specs, dtype))

    # One program for all layers: they differ in nothing but the key.
    @functools.cache
    def program(
        shape: tuple[int, ...], init: str, sharding: Sharding
    ) -> Callable[[np.ndarray], Array]:
        draw = functools.partial(_draw, shape=shape, init=init, dtype=dtype)
        return jax.jit(draw, out_shardings=sharding)

    def make(path: Any, spec: ParamSpec | StackedSpec, sharding: Sharding) -> Array:
        name = f"{seed} {jax.tree_util.keystr(path)}"
        digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
        key = np.frombuffer(digest, np.uint32)
        array = program(spec.shape, spec.init, sharding)(key)
        return _moved(array, memory) if memory else array

    return jax.tree_util.tree_map_with_path(make, specs, shardings)


def _moved(array: Array, memory: HostMemory) -> Array:
    """The array where a loaded one would lie; left where many devices share it."""
    if len(array.sharding.device_set) > 1:
        return array
    held = memory.empty(array.shape, array.dtype)
    held[...] = array
    # Its old memory must be free before the next parameter is made.
    return jax.block_until_ready(jax.device_put(held, array.sharding))


def _draw(
    key: UInt[Array, " 2"], *, shape: tuple[int, ...], init: str, dtype: DTypeLike
) -> Array:
    if init == "ones":
        return jnp.ones(shape, dtype)
    if init == "zeros":
        return jnp.zeros(shape, dtype)
    # Weights lie [N, K]: the last dimension is the one that is summed over.
    scale = np.float32(shape[-1] ** -0.5 / BYTES_STD)
    return ((_byte_sums(key, shape) - 510.0) * scale).astype(dtype)


def _byte_sums(key: UInt[Array, " 2"], shape: tuple[int, ...]) -> Array:
    """Sums of four random bytes, nearly normal, as float32.

    A hash of each place: twenty times cheaper on a CPU than `jax.random.normal`.
    """
    place, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        index = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        place = place + index * jnp.uint32(stride % 2**32)
        stride *= shape[axis]
    bits = _mix(_mix(place ^ key[0]) + key[1])
    pairs = (bits & 0x00FF00FF) + ((bits >> 8) & 0x00FF00FF)
    return ((pairs & 0xFFFF) + (pairs >> 16)).astype(jnp.float32)


def _mix(bits: Array) -> Array:
    """A bijective hash of 32 bits: lowbias32, found by C. Wellons' hash prospector."""
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x7FEB352D)
    bits = (bits ^ (bits >> 15)) * jnp.uint32(0x846CA68B)
    return bits ^ (bits >> 16)
