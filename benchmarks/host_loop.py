"""Times the host's part of a step: everything but the network.

    python -m benchmarks.host_loop [--rounds N] [--curves | --online] [--record]

The real engine, scheduler and text code run over a device that has nothing to compute:
its programs take and return trees with as many leaves as a model of 32 layers, donate
the state as the real ones do, and give every row the same token. Each phase of a decode
step is timed apart; medians over steps, microseconds. The contexts of the rows differ
by one token each, so that a sixteenth of them fills a block in every step.

In the engine's thread: schedule, pack, dispatch (the call of the program with all its
leaves), collect (the tokens to the host, and from there to the outputs), commit,
deliver (into the queue of the output thread). In the output thread: detokenise. In the
thread of the event loop: stream (an output per row). With --curves the step with 64
rows is timed with long contexts, with 10,000 waiting requests and with a full prefix
cache, in turns with the plain one.

With --online all three threads run, and the device takes some milliseconds for a step,
in which it needs no processor: how much of its time does it wait for the host?
"""

import argparse
import asyncio
import contextlib
import dataclasses
import gc
import json
import queue
import statistics
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks import record
from jllm.config import SchedulerConfig
from jllm.engine.admission import Limits
from jllm.engine.builder import empty_state
from jllm.engine.create import DEFAULT_MODEL
from jllm.engine.engine import Engine, EngineParts, ModelInfo
from jllm.engine.executables import Executable
from jllm.engine.garbage import QuietGarbage
from jllm.engine.loop import EngineLoop
from jllm.engine.programs import (
    ProgramOptions,
    Programs,
    ProgramSizes,
    describe,
    describe_state,
)
from jllm.engine.steps import StepResult
from jllm.models.base import group_layers
from jllm.sampling.rules import RuleLayout
from jllm.scheduler.scheduler import Scheduler
from jllm.text.delivery import OpenRequest, OutputStream, OutputThread
from jllm.text.output import RequestStream
from jllm.text.prompts import PreparedRequest
from jllm.text.tokenizer import load_tokenizer
from jllm.types import EngineRequest, RequestOutputKind, SamplingParams
from shardings.mesh import make_mesh

NUM_LAYERS = 32
LEAVES_PER_LAYER = 4
VOCAB_SIZE = 1024
TOKEN = 300
BLOCK_SIZE = 16
GOALS = {8: (300, 100), 64: (500, 200), 256: (1000, 500)}
"""By rows: microseconds of a step that it must not exceed, and a stretch goal."""

STEP_MILLISECONDS = (2, 5, 10)
"""What a step takes on the device: a small model's, a larger one's."""

LATE = 1e-4
"""Seconds that a device may wait before it counts as a wait."""

STEPS = 64
"""Steps of a round; engines take turns by the round."""


def trivial_step(layout, weights, state, vector):
    """A step without a network: the same trees in and out, one token for every row."""
    del weights
    rows = jnp.full(layout.num_rows, TOKEN, jnp.int32) + 0 * vector[0]
    result = StepResult(
        packed=jnp.stack([rows, jnp.ones_like(rows)], axis=1),
        logits=jnp.zeros((1, 1)),
        sampled_rows=rows,
        hidden=jnp.zeros((1, 1)),
    )
    return state, result


class TrivialBuilder:
    """Compiles `trivial_step` where `ProgramBuilder` compiles a model."""

    def __init__(self, options, weights, state):
        self._options, self._weights, self._state = options, weights, state

    def build(self, kind, size):
        if kind == "init_state":
            make = jax.jit(partial(empty_state, self._state)).lower().compile()
            return Executable(make, frozenset())
        layout = self._options.layout(kind, size)
        vector = jax.ShapeDtypeStruct((layout.size,), jnp.int32)
        jitted = jax.jit(
            partial(trivial_step, layout), donate_argnums=1, keep_unused=True
        )
        program = jitted.lower(self._weights, self._state, vector).compile()
        return Executable(program, frozenset())


def make_engine(num_rows, *, num_blocks=None, max_model_len=32768, overlap=True):
    """An engine over the device without a network."""
    place = NamedSharding(make_mesh(devices=jax.devices()[:1]), PartitionSpec())
    model = SimpleNamespace(
        num_layers=NUM_LAYERS,
        cache_groups=group_layers((None,) * NUM_LAYERS),
        kv_dtype="float32",
        kv_shape=lambda blocks, size: (1, 1, 1, 1, 1),
        padded_vocab_size=VOCAB_SIZE,
    )
    num_blocks = num_blocks or num_rows * max_model_len // BLOCK_SIZE
    max_blocks = max_model_len // BLOCK_SIZE
    options = ProgramOptions(
        sizes=ProgramSizes(rows=(num_rows,), tokens=(4096,)),
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        max_blocks=max_blocks,
        max_appends=max_blocks + 256 + num_rows,
        max_copies=8,
        num_logprobs=1,
        rule_size=RuleLayout(VOCAB_SIZE).size,
        draw_method="inverse_cdf",
        tiles=None,
        branches=False,
    )
    weights = {
        f"layer {i}": [
            jax.device_put(np.ones(1, np.float32), place)
            for _ in range(LEAVES_PER_LAYER)
        ]
        for i in range(NUM_LAYERS)
    }
    state = describe_state(model, options, place)
    programs = Programs(TrivialBuilder(options, describe(weights), state), options)
    programs.compile_first()
    scheduler = Scheduler(
        SchedulerConfig(
            max_num_seqs=num_rows,
            token_budget=4096,
            block_size=BLOCK_SIZE,
            num_blocks=num_blocks,
            max_model_len=max_model_len,
            max_block_appends=options.max_appends,
        )
    )
    return Engine(
        EngineParts(
            model=model,
            weights=weights,
            scheduler=scheduler,
            programs=programs,
            options=options,
            limits=Limits(VOCAB_SIZE, max_model_len, 1, (), 1),
            info=ModelInfo(Path(), {}),
            place=place,
            overlap=overlap,
            seed=0,
        )
    )


def request(number, prompt_length=32, max_tokens=None):
    """Prompts that differ from their first block on, and in their length."""
    length = prompt_length + number % BLOCK_SIZE
    prompt = (number % VOCAB_SIZE, number // VOCAB_SIZE, *[3] * (length - 2))
    params = SamplingParams(
        temperature=0, max_tokens=max_tokens, output_kind=RequestOutputKind.DELTA
    )
    return EngineRequest(str(number), prompt, params)


def start(engine, num_rows, prompt_length, num_waiting):
    """Brings all rows to decoding, and queues as many more as are to wait."""
    for number in range(num_rows + num_waiting):
        engine.add(request(number, prompt_length))
    while len(engine.step()) < num_rows:
        pass


def fill_cache(engine, num_requests, prompt_length):
    """Leaves the prompts of requests that have ended in the prefix cache."""
    for number in range(num_requests):
        engine.add(request(100_000 + number, prompt_length, max_tokens=1))
    while engine.has_unfinished:
        engine.step()


def open_requests(num_rows, event_loop):
    """Readers of the first requests, whose outputs go nowhere but to them."""
    tokenizer = load_tokenizer(DEFAULT_MODEL)
    readers = {}
    for number in range(num_rows):
        reader = readers[str(number)] = OpenRequest(event_loop)
        prepared = PreparedRequest(request(number), None)
        reader.open(RequestStream(prepared, tokenizer), print)
    return readers


class Bench:
    """One engine with all rows decoding, and the times of the phases of its steps."""

    def __init__(
        self, num_rows, *, prompt_length=32, num_waiting=0, cached=0, **options
    ):
        self.times = {}
        self.engine = engine = make_engine(num_rows, **options)
        if cached:
            fill_cache(engine, cached, 16_000)
        start(engine, num_rows, prompt_length, num_waiting)
        self.outputs = OutputThread()
        # No event loop runs here: readers are called one by one.
        self.outputs._wake = lambda _: None
        self.readers = open_requests(num_rows, None)
        for name, reader in self.readers.items():
            self.outputs.open(name, reader)
        self.queue = queue.Queue()
        programs = engine.programs
        program = self._timed("call", programs.step(**ALL)[1])
        layout = programs.step(**ALL)[0]
        programs.step = lambda **_: (layout, program)
        for owner, name, phase in (
            (engine._scheduler, "schedule", "schedule"),
            (engine._scheduler, "commit", "commit"),
            (engine, "_launch", "launch"),
            (engine, "_collect", "read"),
        ):
            setattr(owner, name, self._timed(phase, getattr(owner, name)))

    def _timed(self, phase, function):
        times = self.times.setdefault(phase, [])

        def timed(*arguments):
            began = time.perf_counter()
            result = function(*arguments)
            times.append((time.perf_counter() - began) * 1e6)
            return result

        return timed

    def round(self):
        """Runs some steps, then the readers' part of them."""
        step = self._timed("step", self._step)
        detokenize = self._timed("detokenise", self.outputs._deliver)
        stream = self._timed("stream", self._stream)
        # First the one thread, then the others: each has its own core and caches.
        for _ in range(STEPS):
            step()
        while not self.queue.empty():
            detokenize(self.queue.get())
            stream()

    def _step(self):
        outputs = self.engine.step()
        self._timed("deliver", self.queue.put)(outputs)

    def _stream(self):
        for reader in self.readers.values():
            reader.notify()
            with contextlib.suppress(StopIteration):
                reader.read().send(None)

    def medians(self):
        """Medians of all phases, none of which holds another."""
        found = {name: statistics.median(times) for name, times in self.times.items()}
        launch, call, read = found.pop("launch"), found.pop("call"), found.pop("read")
        found["pack"] = launch - call
        found["dispatch"] = call
        found["collect"] = read - found["commit"]
        times = sorted(self.times["step"])
        found["step_p99"] = times[int(0.99 * len(times))]
        return {name: round(found[name], 1) for name in sorted(found)}


ALL = {"is_decode": True, "num_rows": 1, "num_tokens": 1, "has_rules": False}
"""The one decode program of these engines."""

CASES = {
    "plain": {},
    "context of 512 tokens": {"prompt_length": 512},
    "context of 4,096 tokens": {"prompt_length": 4096},
    "context of 16,384 tokens": {"prompt_length": 16384},
    "1,000 waiting": {"num_waiting": 1000},
    "10,000 waiting": {"num_waiting": 10000},
    "10,000 cached blocks": {"cached": 10},
    "100,000 cached blocks": {"cached": 100},
}


def run(benches, num_rounds):
    """Runs the benches in turns with the collector off, as the engine's loop does."""
    with QuietGarbage(freeze=True):
        for number in range(num_rounds + 1):
            for bench in benches:
                if number == 1:  # the first round warms up
                    for times in bench.times.values():
                        times.clear()
                bench.round()
            gc.collect(1)
    return [bench.medians() for bench in benches]


class Device:
    """Gives a step's tokens some time after its launch, and notes when it had to wait.

    It computes one step after the other, as a real one does, without a processor of the
    host.
    """

    def __init__(self, program, milliseconds):
        self.program, self.seconds = program, milliseconds / 1e3
        self.ready_at, self.waited = time.perf_counter(), []

    def __call__(self, weights, state, vector):
        state, result = self.program(weights, state, vector)
        now = time.perf_counter()
        self.waited.append(max(0.0, now - self.ready_at))
        self.ready_at = max(now, self.ready_at) + self.seconds
        packed = LatePacked(result.packed, self.ready_at)
        return state, dataclasses.replace(result, packed=packed)


class LatePacked:
    """The result of a step that is not computed yet."""

    def __init__(self, packed, ready_at):
        self.packed, self.ready_at = packed, ready_at

    def copy_to_host_async(self):
        self.packed.copy_to_host_async()

    def __array__(self, *_, **__):
        time.sleep(max(0.0, self.ready_at - time.perf_counter()))
        return np.asarray(self.packed)


async def wait_share(num_rows, milliseconds, num_steps, make_outlet=OutputThread):
    """Shares of the device's time, and of the steps, in which it waits for the host."""
    engine = make_engine(num_rows)
    programs = engine.programs
    layout, program = programs.step(**ALL)
    device = Device(program, milliseconds)
    outlet = make_outlet()
    loop = EngineLoop(engine, outlet)
    readers = open_requests(num_rows, asyncio.get_running_loop())
    tasks = []
    for number, (name, reader) in enumerate(readers.items()):
        await asyncio.wrap_future(loop.add(request(number), reader))
        stream = OutputStream(reader, name, (), lambda: None)
        tasks.append(asyncio.create_task(read(stream)))
    while loop.num_steps < num_rows + 8:
        await asyncio.sleep(0.05)
    await asyncio.wrap_future(
        loop.call(lambda: setattr(programs, "step", lambda **_: (layout, device)))
    )
    warm = 20
    while len(device.waited) < num_steps + warm:
        await asyncio.sleep(0.05)
    waited = device.waited[warm : num_steps + warm]
    for task in tasks:
        task.cancel()
    await asyncio.to_thread(loop.close)
    outlet.close()
    busy = num_steps * milliseconds / 1e3
    share = sum(waited) / (busy + sum(waited))
    return share, sum(wait > LATE for wait in waited) / num_steps


async def read(stream):
    """Does what a server does with each output."""
    async for output in stream:
        completion = output.outputs[0]
        choice = {"index": completion.index, "text": completion.text}
        json.dumps({"id": output.request_id, "choices": [choice]})


def measure_phases(arguments):
    """Lines of the table of phases."""
    cases = [{"rows": rows, "case": "plain"} for rows in GOALS]
    benches = [Bench(rows) for rows in GOALS]
    if arguments.curves:
        cases = [{"rows": 64, "case": name} for name in CASES]
        # A pool of one size, so that only what is measured differs.
        benches = [Bench(64, **options) for options in CASES.values()]
    for case, figures in zip(cases, run(benches, arguments.rounds), strict=True):
        goal, stretch = GOALS[case["rows"]]
        # The record's own "commit" is the version of the code.
        named = {f"{phase}_us": value for phase, value in figures.items()}
        yield {**case, **named, "goal_us": goal, "stretch_goal_us": stretch}


def measure_waits(arguments):
    """Lines of the table of a device that waits."""
    for rows in GOALS:
        for milliseconds in STEP_MILLISECONDS:
            num_steps = 50 * arguments.rounds
            share, waited = asyncio.run(wait_share(rows, milliseconds, num_steps))
            yield {
                "rows": rows,
                "step_ms": milliseconds,
                "wait_percent": round(100 * share, 2),
                "waited_percent": round(100 * waited, 1),
                "goal_percent": 3,
            }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--curves", action="store_true")
    parser.add_argument("--online", action="store_true")
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    lines = []
    for line in (measure_waits if arguments.online else measure_phases)(arguments):
        print(json.dumps(line), flush=True)
        lines.append(line)
    if arguments.record:
        name = "device_waits" if arguments.online else "host_loop"
        record.append(name, lines)


if __name__ == "__main__":
    main()
