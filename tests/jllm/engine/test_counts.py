"""What a step costs, counted: dispatches, copies, compilations, programs, addresses."""

import dataclasses
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from jllm.models.base import ModelOptions, ParamSpec
from jllm.models.registry import build_model
from pallas_kernels.paged_attention import api as paged_api
from tests.engines import QWEN3, drain, make_engine, request, shared_engine

EXTRAS = [
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 0.9, "top_p": 0.8, "min_p": 0.01},
    {"repetition_penalty": 1.3, "temperature": 0},
    {"presence_penalty": 0.5, "frequency_penalty": 0.2},
    {"logprobs": 3, "temperature": 0},
    {"logit_bias": {5: 3.0}},
    {"allowed_token_ids": [3, 4, 5, 6, 7]},
    {"min_tokens": 4},
    {"prompt_logprobs": 2, "temperature": 0},
    {"prompt_logprobs": 2, "top_p": 0.9, "logprobs": 2},
    {"logprob_token_ids": [1, 2, 3]},
    {"bad_words_token_ids": ((3, 4), (9,))},
]


@pytest.fixture(scope="module")
def engine():
    engine = shared_engine()
    engine.programs.wait()
    return engine


def deltas(engine, act):
    names = ("steps", "dispatches", "host_to_device_copies", "device_to_host_copies")
    before = [getattr(engine.metrics, name) for name in names]
    act()
    after = [getattr(engine.metrics, name) for name in names]
    return [b - a for a, b in zip(before, after, strict=True)]


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_a_plain_step_is_one_dispatch_and_two_copies(engine, temperature):
    rng = np.random.default_rng(0)
    for i in range(5):
        prompt = rng.integers(3, 331, 20 + 9 * i)
        engine.add(request(i, prompt, temperature=temperature, max_tokens=8 + i))
    steps, dispatches, uploads, downloads = deltas(engine, lambda: drain(engine))
    assert steps > 10
    assert dispatches == uploads == downloads == steps


def test_kernels_that_fall_back_are_counted_and_logged(monkeypatch, caplog):
    assert shared_engine().metrics.kernel_fallbacks == 0
    # Heads of width 24 do not fill the registers of a TPU.
    order = dataclasses.replace(paged_api.OPERATION, cpu=("tpu", "blocked"))
    monkeypatch.setattr(paged_api, "OPERATION", order)
    with caplog.at_level("WARNING"):
        engine = make_engine()
        engine.wait_until_compiled()
        engine.add(request("one", range(3, 9), temperature=0, max_tokens=3))
        assert len(drain(engine)) > 0
    assert engine.metrics.kernel_fallbacks == 1
    (record,) = [r for r in caplog.records if "paged_attention" in r.getMessage()]
    assert "tpu cannot be used here" in record.getMessage()
    engine.close()


@pytest.mark.parametrize("extra", EXTRAS, ids=lambda extra: "-".join(extra))
def test_rules_add_at_most_one_dispatch(engine, extra):
    engine.add(request("plain", range(3, 30), temperature=0, max_tokens=12))
    engine.add(request("extra", range(3, 40), max_tokens=12, **extra))
    steps, dispatches, uploads, downloads = deltas(engine, lambda: drain(engine))
    assert steps < dispatches <= 2 * steps
    # Beside the vectors: the rule table once, the targets of one prompt chunk.
    assert uploads <= steps + 2
    assert downloads <= steps + 1


def test_at_most_twelve_programs(engine):
    assert len(engine.programs.all_keys()) <= 12


def test_nothing_compiles_in_a_thousand_mixed_steps(engine):
    compiled = []

    def record(name, *_, **__):
        if "backend_compile" in name:
            compiled.append(name)

    jax.monitoring.register_event_duration_secs_listener(record)
    rng = np.random.default_rng(1)
    steps, added = 0, 0
    while steps < 1000:
        while (
            len(engine.scheduler.running) < rng.integers(1, 9) and engine.num_open < 9
        ):
            prompt = rng.integers(3, 331, rng.integers(1, 150))
            extra = {} if rng.random() < 0.5 else EXTRAS[rng.integers(len(EXTRAS))]
            options = {"max_tokens": int(rng.integers(4, 30)), **extra}
            if rng.random() < 0.2 and options.get("temperature", 1) != 0:
                options["n"] = 2
            engine.add(request(f"mixed-{added}", prompt, **options))
            added += 1
        engine.step()
        steps += 1
    drain(engine)
    jax.monitoring.unregister_event_duration_listener(record)
    assert added > 50
    assert compiled == []


def test_every_state_leaf_keeps_its_address(engine):
    def addresses():
        return [
            shard.data.unsafe_buffer_pointer()
            for leaf in jax.tree.leaves(engine.state)
            for shard in leaf.addressable_shards
        ]

    before = addresses()
    for i, extra in enumerate(EXTRAS):
        engine.add(request(i, range(3, 60 + i), max_tokens=6, **extra))
    drain(engine, on_step=lambda _: None)
    assert addresses() == before


def test_a_step_is_launched_before_the_last_ones_tokens_are_read(monkeypatch):
    engine = make_engine()
    events = []
    launch, collect = engine._launch, engine._collect
    monkeypatch.setattr(
        engine,
        "_launch",
        lambda plan: events.append(("launch", plan.step)) or launch(plan),
    )
    monkeypatch.setattr(
        engine,
        "_collect",
        lambda flight: events.append(("read", flight.plan.step)) or collect(flight),
    )
    engine.add(request("a", range(3, 20), temperature=0, max_tokens=6, ignore_eos=True))
    drain(engine)
    engine.close()
    for step in range(1, 6):
        assert events.index(("launch", step + 1)) < events.index(("read", step))


def test_few_leaves_per_call(engine):
    leaves = len(jax.tree.leaves(engine.state)) + len(jax.tree.leaves(engine.weights))
    num_layers = 2
    assert leaves <= 5 * num_layers + 10


def test_at_most_400_leaves_per_call_with_32_layers():
    config = {**QWEN3, "num_hidden_layers": 32}
    model = build_model(config, ModelOptions())
    specs = jax.tree.leaves(model.specs(), is_leaf=lambda x: isinstance(x, ParamSpec))
    state = len(jax.tree.leaves(shared_engine().state)) - 2 + 32
    vector = 1
    assert len(specs) + state + vector <= 400


INSTRUCTION = re.compile(r"= \w+\[([\d,]*)\]\S* (copy|transpose|convert)\(")


def large_moves(text, shapes):
    """Copies, transposes and converts of arrays of the given dimensions, in any order.

    Instructions inside a fusion are left out: they make no array of their own.
    """
    found = []
    for computation in re.split(r"\n\n", text):
        if computation.lstrip().startswith("%fused_computation"):
            continue
        for shape, opcode in INSTRUCTION.findall(computation):
            dims = sorted(int(d) for d in shape.split(",") if d)
            if dims in shapes:
                found.append((opcode, shape))
    return found


def shapes_to_watch(engine):
    """Dimensions of every pool leaf and weight matrix, as they are and flattened."""
    watched = [sorted(leaf.shape) for leaf in engine.state.kv]
    for leaf in jax.tree.leaves(engine.weights):
        if leaf.ndim > 1 and leaf.size > 2000:
            flat = [leaf.size // leaf.shape[-1], leaf.shape[-1]]
            watched += [sorted(leaf.shape), sorted(flat)]
    return watched


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_program_copies_the_pool_or_a_weight(dtype):
    engine = make_engine(dtype=dtype, num_blocks=4000)
    engine.programs.wait()
    shapes = shapes_to_watch(engine)
    pool_bytes = sum(leaf.nbytes for leaf in engine.state.kv)
    for kind, size in engine.programs.all_keys():
        program = engine.programs.get(kind, size)
        assert large_moves(program.as_text(), shapes) == [], (kind, size)
        temporaries = program.memory_analysis().temp_size_in_bytes
        assert temporaries < pool_bytes / 8, (kind, size)
    engine.close()


def test_a_script_that_does_not_close_the_engine_ends_at_once():
    """The interpreter waits for compilations that run, not for those in the queue."""
    script = (
        "import atexit\n"
        "from tests.engines import make_engine\n"
        "engine = make_engine(compile_ahead=True, max_num_seqs=31)\n"
        "def report():\n"
        "    futures = engine.programs._futures.values()\n"
        "    print(sum(not f.done() for f in futures))\n"
        "atexit.register(report)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        cwd=pathlib.Path(__file__).parents[3],
        env={**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"},
    )
    assert int(result.stdout) > 0
