"""Dense attention and its gradients against float64 numpy, in interpret mode."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common.scores import ScoreOptions
from pallas_kernels.common.target import Target
from pallas_kernels.flash_attention import (
    blocked,
    flash_attention,
    gpu_mosaic,
    gpu_triton,
    tpu,
)
from pallas_kernels.flash_attention.cases import (
    CASES,
    DenseCase,
    kernel_cases,
    make_dense_problem,
    solve_dense,
    solve_gradients,
)
from pallas_kernels.flash_attention.gradient import attend
from pallas_kernels.flash_attention.rules import Arrays, make_rules
from tests.pallas_kernels import mosaic_simulator
from tests.pallas_kernels.targets import gpu_target

NAMES = ("q", "k", "v", "sinks", "slopes")
TOLERANCE = {"float32": 4e-6, "bfloat16": 2e-2, "float16": 2e-3}
TARGETS = {
    "reference": Target("cpu"),
    "blocked": Target("cpu"),
    "gpu_triton": gpu_target(),
    "tpu": Target("tpu", "v6e", "v6e", 1, interpret=pltpu.InterpretParams()),
}
SMALL = DenseCase(
    "small",
    21,
    45,
    num_heads=2,
    num_kv_heads=1,
    head_dim=20,
    window=30,
    soft_cap=4.0,
    has_sinks=True,
    has_alibi=True,
    segments=2,
)
"""Each option at once, sizes that are multiples of nothing."""
ENCODER = dataclasses.replace(
    SMALL, causal=False, window=None, soft_cap=None, has_sinks=False, batch=2
)
WINDOW = DenseCase("window", 70, num_heads=2, num_kv_heads=1, head_dim=16, window=40)
"""Tiles that are full between others that are not."""
MORE_QUERIES = DenseCase(
    "more_queries", 50, 21, num_heads=2, num_kv_heads=1, head_dim=16
)


def set_tiles(monkeypatch, tile_q=16, tile_k=16):
    """Tiles so small that tiny problems have several."""
    monkeypatch.setattr(blocked, "TILE_Q", tile_q)
    monkeypatch.setattr(blocked, "TILE_K", tile_k)

    def small(folder, target, key, default):
        is_tpu = target.platform == "tpu"
        sizes = (128, 128) if is_tpu else (tile_q, tile_k)
        return {**default, "tile_q": sizes[0], "tile_k": sizes[1]}

    monkeypatch.setattr(gpu_triton, "tuned_sizes", small)
    monkeypatch.setattr(tpu, "tuned_sizes", small)


def problem_and_function(case, implementation, seed=0, target=None):
    problem = make_dense_problem(case, seed)
    ids = [
        None if x is None else jnp.asarray(x)
        for x in (problem.q_segment_ids, problem.kv_segment_ids)
    ]

    def attend(q, k, v, sinks, slopes):
        return flash_attention(
            q,
            k,
            v,
            dataclasses.replace(problem.options, sinks=sinks, alibi_slopes=slopes),
            causal=problem.causal,
            q_segment_ids=ids[0],
            kv_segment_ids=ids[1],
            implementation=implementation,
            target=target or TARGETS[implementation],
        )

    arrays = [jnp.asarray(x) for x in (problem.q, problem.k, problem.v)]
    options = problem.options
    return problem, attend, (*arrays, options.sinks, options.alibi_slopes)


def assert_close(found, expected, dtype):
    tolerance = TOLERANCE[dtype]
    scale = max(1.0, np.abs(expected).max())
    np.testing.assert_allclose(
        np.asarray(found, np.float64), expected, atol=tolerance * scale, rtol=tolerance
    )


def check_forward(case, implementation, target=None):
    problem, attend, arrays = problem_and_function(case, implementation, 0, target)
    assert_close(jax.jit(attend)(*arrays), solve_dense(problem), case.dtype)


def check_gradients(case, implementation, seed=0):
    problem, attend, arrays = problem_and_function(case, implementation, seed)
    d_out = np.random.default_rng(seed + 1).normal(size=problem.q.shape)
    d_out = d_out.astype(problem.q.dtype)

    @jax.jit
    def run(arrays, d_out):
        out, pullback = jax.vjp(attend, *arrays)
        return out, pullback(d_out)

    out, found = run(arrays, jnp.asarray(d_out))
    assert_close(out, solve_dense(problem), case.dtype)
    expected = solve_gradients(problem, d_out)
    for name, array in zip(NAMES, found, strict=True):
        if array is not None:
            assert_close(array, expected[name], case.dtype)


@pytest.mark.parametrize("implementation", ["reference", "blocked", "gpu_triton"])
@pytest.mark.parametrize(
    "case",
    [SMALL, ENCODER, WINDOW, MORE_QUERIES],
    ids=["small", "encoder", "window", "more_queries"],
)
def test_equals_float64(case, implementation, monkeypatch):
    set_tiles(monkeypatch)
    check_gradients(case, implementation)


@pytest.fixture
def simulator(monkeypatch):
    """A Hopper whose warpgroups are threads here; races are an error."""
    monkeypatch.setattr(
        gpu_mosaic,
        "tuned_sizes",
        lambda folder, target, key, default: {**default, "tile_k": 64},
    )
    with mosaic_simulator.simulator(monkeypatch):
        yield mosaic_simulator.simulated(132)


def test_mosaic_forward_equals_float64(simulator):
    # Of the live tiles of 64 keys, full ones stand between others.
    case = DenseCase(
        "window", 100, 400, num_heads=1, num_kv_heads=1, window=250, dtype="bfloat16"
    )
    check_forward(case, "gpu_mosaic", simulator)


@pytest.mark.kernels
def test_mosaic_forward_with_every_option(simulator):
    sizes = {"num_queries": 70, "num_keys": 150, "num_heads": 1, "head_dim": 64}
    case = dataclasses.replace(SMALL, **sizes, dtype="bfloat16", window=90)
    check_forward(case, "gpu_mosaic", simulator)


@pytest.mark.kernels
def test_mosaic_forward_feeds_the_backward_pass(simulator):
    sizes = {"num_queries": 70, "num_keys": 150, "num_heads": 1, "head_dim": 64}
    case = dataclasses.replace(SMALL, **sizes, dtype="bfloat16", window=90)
    problem = make_dense_problem(case)
    ids = (jnp.asarray(problem.q_segment_ids), jnp.asarray(problem.kv_segment_ids))
    options = problem.options
    qkv = [jnp.asarray(x) for x in (problem.q, problem.k, problem.v)]
    arrays = Arrays(*qkv, options.sinks, options.alibi_slopes, *ids)
    d_out = np.random.default_rng(1).normal(size=problem.q.shape)
    d_out = d_out.astype(problem.q.dtype)

    # The two run in different interpreters, hence with different targets.
    def forward(arrays, rules):
        return gpu_mosaic._forward(arrays, rules, target=simulator)

    def backward(arrays, rules, saved):
        target = TARGETS["gpu_triton"]
        return gpu_triton.backward(arrays, rules, saved, target=target)

    rules = make_rules(arrays, options, causal=True)
    out, pullback = jax.vjp(lambda x: attend(forward, backward, x, rules), arrays)
    assert_close(out, solve_dense(problem), case.dtype)
    expected = solve_gradients(problem, d_out)
    (found,) = pullback(jnp.asarray(d_out))
    for name in NAMES:
        assert_close(getattr(found, name), expected[name], case.dtype)


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["causal", "encoder", "more_queries", "packed"])
def test_mosaic_forward_of_cases(name, dtype, simulator):
    case = {case.name: case for case in CASES}[name]
    case = dataclasses.replace(case, head_dim=128, dtype=dtype)
    check_forward(case, "gpu_mosaic", simulator)


def test_tpu_equals_float64(monkeypatch):
    set_tiles(monkeypatch)
    case = dataclasses.replace(SMALL, num_queries=130, num_keys=140, window=100)
    check_gradients(case, "tpu")


@pytest.mark.kernels
@pytest.mark.parametrize("implementation", list(TARGETS))
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case_equals_float64(case, implementation):
    if implementation == "tpu" and case.dtype == "float16":
        pytest.skip("no float16 on TPU")
    check_gradients(case, implementation)


@pytest.mark.kernels
@pytest.mark.parametrize("implementation", ["blocked", "gpu_triton"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", [SMALL, ENCODER], ids=["causal", "encoder"])
def test_narrow_types_equal_float64(case, dtype, implementation, monkeypatch):
    set_tiles(monkeypatch, 16, 32)
    case = dataclasses.replace(case, dtype=dtype)
    check_gradients(case, implementation)


@st.composite
def dense_cases(draw):
    maybe = st.sampled_from([False, True])
    return DenseCase(
        "random",
        draw(st.sampled_from([1, 7, 16, 17, 40])),
        draw(st.sampled_from([1, 15, 16, 33])),
        batch=draw(st.sampled_from([1, 2])),
        num_heads=2,
        num_kv_heads=draw(st.sampled_from([1, 2])),
        head_dim=8,
        causal=draw(maybe),
        window=draw(st.sampled_from([None, 1, 9])),
        soft_cap=draw(st.sampled_from([None, 2.0])),
        has_sinks=draw(maybe),
        has_alibi=draw(maybe),
        segments=draw(st.sampled_from([0, 2, 5])),
        sorted_segments=draw(maybe),
    )


@pytest.mark.kernels
@pytest.mark.parametrize("implementation", ["reference", "blocked", "gpu_triton"])
def test_any_case_equals_float64(implementation):
    @settings(max_examples=25)
    @given(case=dense_cases(), seed=st.integers(0, 1000))
    def check(case, seed):
        with pytest.MonkeyPatch.context() as monkeypatch:
            set_tiles(monkeypatch)
            check_gradients(case, implementation, seed)

    check()


def test_oracle_of_gradients_is_the_slope_of_the_oracle():
    problem = make_dense_problem(dataclasses.replace(SMALL, head_dim=4))
    d_out = np.random.default_rng(1).normal(size=problem.q.shape)
    exact = solve_gradients(problem, d_out)
    for name in ("q", "k", "v"):
        direction = np.random.default_rng(2).normal(size=exact[name].shape)
        values = getattr(problem, name).astype(np.float64)

        def loss(step, name=name, values=values, direction=direction):
            moved = {name: values + step * direction}
            return (solve_dense(dataclasses.replace(problem, **moved)) * d_out).sum()

        slope = (loss(1e-4) - loss(-1e-4)) / 2e-4
        np.testing.assert_allclose((exact[name] * direction).sum(), slope, rtol=1e-6)
    # The options are float32: a larger step.
    for name, field in (("sinks", "sinks"), ("slopes", "alibi_slopes")):

        def moved(step, field=field):
            array = getattr(problem.options, field) + jnp.float32(step)
            options = dataclasses.replace(problem.options, **{field: array})
            return (
                solve_dense(dataclasses.replace(problem, options=options)) * d_out
            ).sum()

        slope = (moved(2**-9) - moved(-(2**-9))) * 2**8
        np.testing.assert_allclose(exact[name].sum(), slope, rtol=1e-2, atol=1e-3)


def test_blocked_keeps_no_square_matrix():
    length = 4096
    spec = jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32)

    def loss(q, k, v):
        out = flash_attention(
            q, k, v, ScoreOptions(1.0), implementation="blocked", target=Target("cpu")
        )
        return out.sum()

    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(spec, spec, spec).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < length * length * 4 / 16


def test_auto_on_a_cpu_is_blocked():
    problem, attend, arrays = problem_and_function(SMALL, "auto", 0, Target("cpu"))
    assert_close(jax.jit(attend)(*arrays), solve_dense(problem), "float32")


@pytest.mark.parametrize(
    ("implementation", "target", "dtype", "width", "reason"),
    [
        ("gpu_triton", TARGETS["gpu_triton"], "float32", 320, "head width 320"),
        ("gpu_triton", TARGETS["gpu_triton"], "float8_e4m3fn", 64, "float8"),
        ("gpu_mosaic", Target("gpu", "sm_80"), "bfloat16", 64, "sm_80"),
        ("gpu_mosaic", Target("gpu", "sm_90"), "float32", 64, "float32"),
        ("gpu_mosaic", Target("gpu", "sm_90"), "bfloat16", 96, "head width 96"),
        ("tpu", TARGETS["tpu"], "float16", 64, "float16"),
        ("tpu", TARGETS["tpu"], "float32", 320, "head width 320"),
    ],
)
def test_a_forced_implementation_says_what_it_cannot_do(
    implementation, target, dtype, width, reason
):
    x = jnp.zeros((1, 2, 1, width), dtype)
    with pytest.raises(NotImplementedError, match=reason):
        flash_attention(
            x, x, x, ScoreOptions(1.0), implementation=implementation, target=target
        )


ZEROS = jnp.zeros((1, 3, 2, 4))
IDS = jnp.zeros((1, 3), jnp.int32)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"q": jnp.zeros((3, 2, 4))}, "q has shape"),
        ({"k": jnp.zeros((1, 3, 2, 5))}, "k has shape"),
        ({"v": jnp.zeros((1, 2, 2, 4))}, "v has shape"),
        ({"k": ZEROS.astype(jnp.bfloat16)}, "k is bfloat16"),
        ({"q": jnp.zeros((1, 0, 2, 4))}, "must not be empty"),
        ({"q": jnp.zeros((1, 3, 3, 4))}, "3 heads, no multiple of the 2"),
        ({"q_segment_ids": IDS}, "given together"),
        ({"q_segment_ids": IDS[:, :1], "kv_segment_ids": IDS}, "q_segment_ids has"),
        ({"options": ScoreOptions(1.0, window=0)}, "window=0"),
        ({"options": ScoreOptions(1.0, sinks=jnp.zeros(3))}, "sinks has shape"),
        ({"implementation": "tpu"}, "implementation='tpu'.* needs a TPU"),
    ],
)
def test_bad_arguments(changes, words):
    arguments = {"q": ZEROS, "k": ZEROS, "v": ZEROS, "options": ScoreOptions(1.0)}
    with pytest.raises(ValueError, match=words):
        inspect.unwrap(flash_attention)(
            **arguments | {"target": Target("cpu")} | changes
        )


def test_kernel_cases_are_consistent():
    cases = kernel_cases()
    assert len({case.name for case in cases}) == len(cases)
    smallest = min(cases, key=lambda case: case.num_bytes)
    arrays = smallest.make_arguments(np.random.default_rng(0))
    assert [(x.shape, x.dtype) for x in arrays] == [
        (spec.shape, spec.dtype) for spec in smallest.arguments
    ]
