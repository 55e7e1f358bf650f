"""What the device can do at most, measured: bytes copied and products per second."""

import jax
import jax.numpy as jnp

from benchmarks.kernels.timing import seconds_per_call


def copy_bandwidth(num_bytes: int) -> float:
    """Bytes read and written per second by the addition of one to a large array."""
    array = jnp.zeros(num_bytes // 4, jnp.float32)
    timing = seconds_per_call(lambda x: x + 1, [array])
    return 2 * array.nbytes / timing.median


def matrix_rate(size: int) -> float:
    """Floating-point operations per second of a square bfloat16 product."""
    a, b = jax.random.normal(jax.random.key(0), (2, size, size), jnp.bfloat16)

    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        return jax.lax.dot_general(
            a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        ).astype(jnp.bfloat16)

    return 2 * size**3 / seconds_per_call(product, [a, b]).median
