"""What a machine can do at most, measured, and what a model asks of it at least.

A step of decode reads every weight once and the cache of every row; a prefill takes
every token times every weight. MBU is the share of the measured bandwidth at which the
bytes that must be read were read, MFU the share of the measured matrix rate. Formulas
as in "How to Scale Your Model" (Austin et al., 2025), chapter on inference.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jllm.bench.statistics import RequestTiming
from jllm.errors import UnsupportedModelError

READ_BYTES = {"cpu": 2**28, "gpu": 2**32, "tpu": 2**31}
MATRIX_SIZE = {"cpu": 1536, "gpu": 8192, "tpu": 8192}
MEASUREMENTS = 5
MEASURED_DTYPES = ("float32", "bfloat16")
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclasses.dataclass(frozen=True, slots=True)
class MachineLimits:
    """Measured limits of one device, or of all cores of a processor.

    Attributes:
        device: Its name.
        bandwidth: Bytes per second, the best of reading and copying.
        matrix_rates: Floating-point operations per second of a large product, by type.
        num_devices: Devices that share the work; the limits are those of all.
    """

    device: str
    bandwidth: float
    matrix_rates: Mapping[str, float]
    num_devices: int = 1

    def times(self, num_devices: int) -> "MachineLimits":
        """The limits of several such devices together."""
        return MachineLimits(
            self.device,
            self.bandwidth * num_devices,
            {name: rate * num_devices for name, rate in self.matrix_rates.items()},
            num_devices,
        )

    def matrix_rate(self, dtype: str) -> float:
        """Rate of a type; float16 counts as bfloat16."""
        return self.matrix_rates["bfloat16" if dtype == "float16" else dtype]

    def as_dict(self) -> dict[str, Any]:
        """For a record: GB/s and GFLOP/s."""
        return {
            "device": self.device,
            "num_devices": self.num_devices,
            "bandwidth_gb_s": round(self.bandwidth / 1e9, 2),
            "gflop_s": {k: round(v / 1e9, 1) for k, v in self.matrix_rates.items()},
        }


@functools.cache
def measure_limits() -> MachineLimits:
    """Measures the default device once per process; a second or two."""
    import jax

    device = jax.devices()[0]
    platform = device.platform
    return MachineLimits(
        device=device.device_kind,
        bandwidth=_bandwidth(READ_BYTES[platform]),
        matrix_rates={
            dtype: _matrix_rate(MATRIX_SIZE[platform], dtype)
            for dtype in MEASURED_DTYPES
        },
    )


def _bandwidth(num_bytes: int) -> float:
    """Bytes per second: one row times a matrix reads, an addition copies."""
    import jax
    import jax.numpy as jnp

    width = 4096
    matrix = jnp.ones((num_bytes // 4 // width, width), jnp.float32)
    row = jnp.ones((1, width), jnp.float32)
    product = jax.jit(lambda x, w: jax.lax.dot_general(x, w, (((1,), (1,)), ((), ()))))
    add = jax.jit(lambda w: w + 1)
    read = matrix.nbytes / _seconds(lambda: product(row, matrix))
    return max(read, 2 * matrix.nbytes / _seconds(lambda: add(matrix)))


def _matrix_rate(size: int, dtype: str) -> float:
    """Operations per second of a square product with float32 results."""
    import jax
    import jax.numpy as jnp

    matrix = jnp.ones((size, size), dtype)
    dot = functools.partial(
        jax.lax.dot_general,
        dimension_numbers=(((1,), (1,)), ((), ())),
        preferred_element_type=jnp.float32,
    )
    product = jax.jit(dot)
    return 2 * size**3 / _seconds(lambda: product(matrix, matrix))


def _seconds(call: Callable[[], Any]) -> float:
    """Shortest of some calls, after one that compiles."""
    call().block_until_ready()
    times: list[float] = []
    for _ in range(MEASUREMENTS):
        began = time.perf_counter()
        call().block_until_ready()
        times.append(time.perf_counter() - began)
    return min(times)


@dataclasses.dataclass(frozen=True, slots=True)
class ModelCost:
    """Bytes and operations that a decoder cannot do without.

    Attributes:
        layer_weights: Weights of all layers, embeddings not counted.
        head_weights: Weights of the output head.
        attention_width: Layers times query heads times head width.
        kv_elements: Cached numbers per token.
        item_bytes: Bytes of a weight and of a cached number.
    """

    layer_weights: int
    head_weights: int
    attention_width: int
    kv_elements: int
    item_bytes: int

    @classmethod
    def from_config(cls, config: Mapping[str, Any], dtype: str) -> "ModelCost | None":
        """Reads a config.json; None for a model that jllm does not have."""
        from jllm.models.base import ModelOptions, parameter_count
        from jllm.models.registry import build_model

        try:
            model = build_model(config, ModelOptions(dtype=dtype))
        except UnsupportedModelError:
            return None
        layers = model.specs()["layers"]
        return cls(
            layer_weights=parameter_count(layers),
            head_weights=model.vocab_size * model.width,
            attention_width=sum(layer["out"].shape[1] for layer in layers),
            kv_elements=math.prod(model.kv_shape(1, 1)) * model.num_layers,
            item_bytes=ITEM_BYTES[dtype],
        )

    @property
    def weight_bytes(self) -> int:
        """Read once per step."""
        return self.item_bytes * (self.layer_weights + self.head_weights)

    @property
    def kv_bytes(self) -> int:
        """Cache of one token."""
        return self.item_bytes * self.kv_elements

    def decode_bytes(self, num_rows: int, context: float) -> float:
        """Bytes of one step of decode."""
        return self.weight_bytes + num_rows * (context + 1) * self.kv_bytes

    def decode_flops(self, num_rows: int, context: float) -> float:
        """Operations of one step of decode."""
        linear = 2 * num_rows * (self.layer_weights + self.head_weights)
        return linear + 4 * num_rows * context * self.attention_width

    def prefill_flops(self, num_tokens: int, num_cached: int = 0) -> float:
        """Operations of a prompt, causal, with the logits of its last token only."""
        new = num_tokens - num_cached
        attention = 2 * self.attention_width * (num_tokens**2 - num_cached**2)
        return 2 * new * self.layer_weights + 2 * self.head_weights + attention


@dataclasses.dataclass(frozen=True, slots=True)
class RunCost:
    """What a set of requests asks for in all.

    Attributes:
        linear_flops: Operations of the products with weights.
        attention_flops: Operations of attention.
        cache_bytes: Cache read by decode.
        weight_bytes: Weights read by one step.
        num_output_tokens: Tokens generated.
    """

    linear_flops: float
    attention_flops: float
    cache_bytes: float
    weight_bytes: int
    num_output_tokens: int

    @classmethod
    def of(cls, cost: ModelCost, timings: Sequence[RequestTiming]) -> "RunCost":
        """Adds up requests; cached prompt tokens cost nothing."""
        linear = attention = cache = 0.0
        num_outputs = 0
        for timing in timings:
            prompt, output = timing.num_prompt_tokens, timing.num_output_tokens
            cached = min(timing.num_cached_tokens or 0, max(prompt - 1, 0))
            end = prompt + max(output - 1, 0)  # the last token is not fed back
            linear += 2 * (end - cached) * cost.layer_weights
            linear += 2 * output * cost.head_weights
            attention += 2 * cost.attention_width * (end**2 - cached**2)
            cache += (end * (end + 1) - prompt * (prompt + 1)) / 2 * cost.kv_bytes
            num_outputs += output
        return cls(linear, attention, cache, cost.weight_bytes, num_outputs)

    def serial_seconds(self, limits: MachineLimits, dtype: str, max_rows: int) -> float:
        """Time of one kernel after the other, each at its limit.

        The products take the longer of reading the weights in every step and computing;
        then attention reads the cache, and computes. No fewer steps are possible than
        output tokens of all rows at once.
        """
        rate = limits.matrix_rate(dtype)
        steps = math.ceil(self.num_output_tokens / max_rows)
        products = max(
            steps * self.weight_bytes / limits.bandwidth, self.linear_flops / rate
        )
        return (
            products + self.cache_bytes / limits.bandwidth + self.attention_flops / rate
        )

    def shares(
        self, limits: MachineLimits, dtype: str, *, seconds: float, steps: int
    ) -> dict[str, float]:
        """MBU and MFU of a run of so many seconds and steps."""
        num_bytes = steps * self.weight_bytes + self.cache_bytes
        flops = self.linear_flops + self.attention_flops
        return {
            "mbu": num_bytes / seconds / limits.bandwidth,
            "mfu": flops / seconds / limits.matrix_rate(dtype),
        }
