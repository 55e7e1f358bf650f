"""Named shapes of dense attention, for tests and benchmarks; their float64 oracle."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.common.cases import KernelCase, numpy_dtype
from pallas_kernels.common.scores import ScoreOptions
from pallas_kernels.flash_attention.api import flash_attention


@dataclasses.dataclass(frozen=True, slots=True)
class DenseCase:
    """A named shape of dense attention.

    Attributes:
        name: Short name.
        num_queries: Rows `T` of the queries.
        num_keys: Rows `S` of the keys; zero for as many as queries.
        batch: Sequences `N`.
        num_heads: Query heads `H`.
        num_kv_heads: KV heads `K`.
        head_dim: Head width `D`.
        dtype: Type of all float arrays but those of the options.
        causal: Whether queries see no later keys.
        window: See `ScoreOptions`, as for the following.
        soft_cap: See there.
        has_sinks: Whether there are sinks.
        has_alibi: Whether there are slopes.
        segments: How many segment ids there are; zero for no ids.
        sorted_segments: Whether equal ids stand together.
    """

    name: str
    num_queries: int
    num_keys: int = 0
    batch: int = 1
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    dtype: str = "float32"
    causal: bool = True
    window: int | None = None
    soft_cap: float | None = None
    has_sinks: bool = False
    has_alibi: bool = False
    segments: int = 0
    sorted_segments: bool = True


@dataclasses.dataclass(frozen=True, slots=True)
class DenseProblem:
    """Arrays of a case, all exact in their types.

    Attributes:
        q: `[N, T, H, D]`.
        k: `[N, S, K, D]`.
        v: As `k`.
        options: How scores become weights; its arrays are float32.
        causal: As in the case.
        q_segment_ids: `[N, T]` or None.
        kv_segment_ids: `[N, S]` or None.
    """

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    options: ScoreOptions
    causal: bool
    q_segment_ids: np.ndarray | None
    kv_segment_ids: np.ndarray | None


CASES = (
    DenseCase("causal", 37),
    DenseCase("one_token", 1),
    DenseCase("encoder", 40, causal=False, batch=2),
    DenseCase("chunk_after_prefix", 20, 75),
    DenseCase("more_queries", 50, 21),
    DenseCase("cross", 9, 33, causal=False),
    DenseCase("no_groups", 33, num_heads=2),
    DenseCase("one_kv_head", 33, num_heads=6, num_kv_heads=1),
    DenseCase("wide", 40, num_heads=2, num_kv_heads=1, head_dim=256),
    DenseCase("width_80", 40, head_dim=80),
    DenseCase("width_96", 40, head_dim=96),
    DenseCase("width_128", 70, head_dim=128),
    DenseCase("bfloat16", 60, dtype="bfloat16"),
    DenseCase("float16", 60, dtype="float16"),
    DenseCase("window", 150, window=19),
    DenseCase("window_both_sides", 150, window=19, causal=False),
    DenseCase("soft_cap", 33, soft_cap=3.0),
    DenseCase("sinks", 50, 21, has_sinks=True),
    DenseCase("alibi", 33, 50, has_alibi=True),
    DenseCase("alibi_both_sides", 33, has_alibi=True, causal=False),
    DenseCase("packed", 150, batch=2, segments=4),
    DenseCase("packed_encoder", 150, batch=2, segments=4, causal=False),
    DenseCase(
        "mixed_segments",
        60,
        77,
        batch=2,
        segments=3,
        causal=False,
        sorted_segments=False,
    ),
    DenseCase(
        "everything",
        70,
        90,
        batch=2,
        window=30,
        soft_cap=4.0,
        has_sinks=True,
        has_alibi=True,
        segments=2,
    ),
)


def make_dense_problem(case: DenseCase, seed: int = 0) -> DenseProblem:
    """Draws a problem of the case's shape."""
    rng = np.random.default_rng(seed)
    num_keys = case.num_keys or case.num_queries
    dtype = numpy_dtype(case.dtype)
    kv_shape = (case.batch, num_keys, case.num_kv_heads, case.head_dim)
    q_shape = (case.batch, case.num_queries, case.num_heads, case.head_dim)
    q, k, v = (rng.normal(size=s).astype(dtype) for s in (q_shape, kv_shape, kv_shape))
    sinks = rng.normal(size=case.num_heads).astype(np.float32)
    slopes = 2.0 ** -np.linspace(1, 8, case.num_heads, dtype=np.float32)
    q_ids, kv_ids = None, None
    if case.segments:
        kv_ids = rng.integers(0, case.segments, size=(case.batch, num_keys))
        q_ids = rng.integers(0, case.segments, size=(case.batch, case.num_queries))
        if case.sorted_segments:
            q_ids, kv_ids = np.sort(q_ids), np.sort(kv_ids)
        if case.sorted_segments and num_keys == case.num_queries:
            q_ids = kv_ids
        q_ids, kv_ids = q_ids.astype(np.int32), kv_ids.astype(np.int32)
    options = ScoreOptions(
        scale=case.head_dim**-0.5,
        window=case.window,
        soft_cap=case.soft_cap,
        sinks=jnp.asarray(sinks) if case.has_sinks else None,
        alibi_slopes=jnp.asarray(slopes) if case.has_alibi else None,
    )
    return DenseProblem(q, k, v, options, case.causal, q_ids, kv_ids)


def _head_weights(
    problem: DenseProblem, n: int, h: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Weights, the sink's weights, the cap's derivative and ALiBi's distances."""
    options = problem.options
    num_queries, num_keys = problem.q.shape[1], problem.k.shape[1]
    kv_head = h * problem.k.shape[2] // problem.q.shape[2]
    q = problem.q[n, :, h].astype(np.float64)
    k = problem.k[n, :, kv_head].astype(np.float64)
    first = num_keys - num_queries if problem.causal else 0
    distance = first + np.arange(num_queries)[:, None] - np.arange(num_keys)[None]
    scores = q @ k.T * options.scale
    derivative = np.ones_like(scores)
    if options.soft_cap is not None:
        bounded = np.tanh(scores / options.soft_cap)
        scores, derivative = options.soft_cap * bounded, 1 - bounded**2
    if options.alibi_slopes is not None:
        scores -= float(options.alibi_slopes[h]) * abs(distance)
    visible = np.ones_like(scores, bool)
    if problem.causal:
        visible &= distance >= 0
    if options.window is not None:
        visible &= abs(distance) < options.window
    if problem.q_segment_ids is not None and problem.kv_segment_ids is not None:
        q_ids, kv_ids = problem.q_segment_ids[n], problem.kv_segment_ids[n]
        visible &= q_ids[:, None] == kv_ids[None]
    weights = np.where(visible, np.exp(np.where(visible, scores, 0)), 0)
    sink = np.float64(0)
    if options.sinks is not None:
        sink = np.exp(np.float64(options.sinks[h]))
    total = weights.sum(-1, keepdims=True) + sink
    total = np.where(total > 0, total, 1)
    return weights / total, (sink / total)[:, 0], derivative, -abs(distance)


def solve_dense(problem: DenseProblem) -> np.ndarray:
    """Attention in float64, one head after the other."""
    out = np.zeros_like(problem.q, np.float64)
    group = problem.q.shape[2] // problem.k.shape[2]
    for n, h in np.ndindex(len(out), problem.q.shape[2]):
        values = problem.v[n, :, h // group].astype(np.float64)
        out[n, :, h] = _head_weights(problem, n, h)[0] @ values
    return out


def solve_gradients(problem: DenseProblem, d_out: np.ndarray) -> dict[str, np.ndarray]:
    """Cotangents of q, k, v, sinks and slopes in float64, by the chain rule."""
    group = problem.q.shape[2] // problem.k.shape[2]
    like = {"q": problem.q, "k": problem.k, "v": problem.v}
    found = {name: np.zeros(x.shape) for name, x in like.items()}
    found |= {name: np.zeros(d_out.shape[2]) for name in ("sinks", "slopes")}
    scale = problem.options.scale
    for n, h in np.ndindex(len(d_out), d_out.shape[2]):
        weights, sink, derivative, bias = _head_weights(problem, n, h)
        q = problem.q[n, :, h].astype(np.float64)
        k = problem.k[n, :, h // group].astype(np.float64)
        v = problem.v[n, :, h // group].astype(np.float64)
        cotangent = d_out[n, :, h].astype(np.float64)
        d_weights = cotangent @ v.T
        mean = (weights * d_weights).sum(-1, keepdims=True)
        d_scores = weights * (d_weights - mean)
        found["slopes"][h] += (d_scores * bias).sum()
        found["sinks"][h] -= (sink * mean[:, 0]).sum()
        d_products = d_scores * derivative * scale
        found["q"][n, :, h] = d_products @ k
        found["k"][n, :, h // group] += d_products.T @ q
        found["v"][n, :, h // group] += weights.T @ cotangent
    return found


def _count_pairs(case: DenseCase) -> int:
    """Pairs of queries and keys that see each other, without regard to segments."""
    num_keys = case.num_keys or case.num_queries
    offset = num_keys - case.num_queries if case.causal else 0
    rows = np.arange(case.num_queries, dtype=np.int64) + offset
    last = (
        np.minimum(rows, num_keys - 1)
        if case.causal
        else np.full_like(rows, num_keys - 1)
    )
    first = np.zeros_like(rows)
    if case.window is not None:
        first = np.maximum(rows - case.window + 1, 0)
        last = np.minimum(last, rows + case.window - 1)
    return int(np.maximum(last - first + 1, 0).sum())


def _function(case: DenseCase, *, backward: bool) -> Callable[..., Any]:
    """The operation on flat arrays; with `backward` its gradients as well."""

    def run(*arrays: jax.Array, implementation: Any, target: Any) -> Any:
        q, k, v, sinks, slopes, *ids = arrays

        def forward(
            q: jax.Array, k: jax.Array, v: jax.Array, sinks: Any, slopes: Any
        ) -> jax.Array:
            options = ScoreOptions(
                case.head_dim**-0.5,
                case.window,
                case.soft_cap,
                sinks if case.has_sinks else None,
                slopes if case.has_alibi else None,
            )
            return flash_attention(
                q,
                k,
                v,
                options,
                causal=case.causal,
                q_segment_ids=ids[0] if ids else None,
                kv_segment_ids=ids[1] if ids else None,
                implementation=implementation,
                target=target,
            )

        if not backward:
            return forward(q, k, v, sinks, slopes)
        out, pullback = jax.vjp(forward, q, k, v, sinks, slopes)
        # q stands for the cotangent: it has the shape and the type.
        return out, pullback(q)

    return run


def _kernel_case(case: DenseCase, *, backward: bool) -> KernelCase:
    num_keys = case.num_keys or case.num_queries
    q_shape = (case.batch, case.num_queries, case.num_heads, case.head_dim)
    kv_shape = (case.batch, num_keys, case.num_kv_heads, case.head_dim)
    dtype = numpy_dtype(case.dtype)
    shapes = [(s, dtype) for s in (q_shape, kv_shape, kv_shape)]
    shapes += [((case.num_heads,), np.dtype(np.float32))] * 2
    if case.segments:
        ids = ((case.batch, case.num_queries), (case.batch, num_keys))
        shapes += [(shape, np.dtype(np.int32)) for shape in ids]

    def draw(rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        floats = [rng.normal(size=s).astype(d) for s, d in shapes[:5]]
        ids = [
            np.sort(rng.integers(0, case.segments, s)).astype(d) for s, d in shapes[5:]
        ]
        if case.segments and num_keys == case.num_queries:
            ids[1] = ids[0]
        return (*floats[:4], np.abs(floats[4]), *ids)

    bf16_on_hopper = case.dtype != "float32" and case.head_dim % 64 == 0
    tpu = () if case.dtype == "float16" else ("tpu",)
    mosaic = ("gpu_mosaic",) if bf16_on_hopper else ()
    pairs = _count_pairs(case) * case.batch * case.num_heads * case.head_dim
    sizes = [int(np.prod(s)) * d.itemsize for s, d in shapes]
    return KernelCase(
        operation="flash_attention",
        name=f"{case.name}_backward" if backward else case.name,
        function=_function(case, backward=backward),
        arguments=tuple(jax.ShapeDtypeStruct(s, d) for s, d in shapes),
        make_arguments=draw,
        # The backward pass reads what the forward pass does, the output and its
        # cotangent, and writes three gradients; it has five products, not two.
        num_bytes=(sum(sizes) + sizes[0]) * (3 if backward else 1),
        num_flops=(14 if backward else 4) * pairs,
        implementations=(*mosaic, "gpu_triton", *tpu),
    )


def _llama(name: str, length: int, **changes: Any) -> DenseCase:
    shape: dict[str, Any] = {
        "num_heads": 32,
        "num_kv_heads": 8,
        "head_dim": 128,
        "dtype": "bfloat16",
    }
    return DenseCase(name, length, **(shape | changes))


LARGE_CASES = (
    _llama("llama_2k", 2048),
    _llama("llama_8k", 8192),
    _llama("llama_ragged", 2000, batch=2),
    _llama("llama_chunk", 512, num_keys=8192),
    _llama("llama_packed", 4096, segments=6, batch=2),
    _llama("llama_float16", 2048, dtype="float16"),
    _llama("llama_float32", 1024, dtype="float32"),
    _llama(
        "bert_large",
        512,
        batch=16,
        num_heads=16,
        num_kv_heads=16,
        head_dim=64,
        causal=False,
        segments=2,
    ),
    _llama(
        "modern_bert",
        2048,
        batch=2,
        num_heads=12,
        num_kv_heads=12,
        head_dim=64,
        causal=False,
        window=65,
    ),
    _llama(
        "vit_80", 577, batch=4, num_heads=16, num_kv_heads=16, head_dim=80, causal=False
    ),
    _llama("phi3_96", 2048, num_heads=32, num_kv_heads=32, head_dim=96),
    _llama(
        "gemma2_256",
        2048,
        num_heads=8,
        num_kv_heads=4,
        head_dim=256,
        window=1024,
        soft_cap=50.0,
    ),
    _llama(
        "gemma_256_float32",
        512,
        num_heads=8,
        num_kv_heads=4,
        head_dim=256,
        dtype="float32",
    ),
    _llama("gpt_oss", 2048, num_heads=64, head_dim=64, window=128, has_sinks=True),
    _llama("bloom_alibi", 2048, num_heads=32, num_kv_heads=32, has_alibi=True),
)


def kernel_cases() -> list[KernelCase]:
    """Calls at the size of real models, forward and with the gradients."""
    return [
        _kernel_case(case, backward=backward)
        for case in LARGE_CASES
        for backward in (False, True)
    ]
