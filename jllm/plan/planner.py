"""Plans one layout, or searches all of them: the facts, before they are printed."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from jllm.config import EngineConfig
from jllm.engine.create import plan_start
from jllm.engine.startup import StartPlan
from jllm.errors import ConfigError
from jllm.plan.compiled import (
    Choice,
    CompiledStep,
    compile_steps,
    step_keys,
    temporaries,
)
from jllm.plan.cost import ReplicaCost, StepCost, farthest, replica_cost
from jllm.plan.described import described_devices, replica_mesh
from jllm.plan.memory import DeviceMemory, device_memory
from jllm.plan.throughput import Throughput, Workload, throughput
from jllm.plan.topology import Layout, Topology, all_layouts
from jllm.weights.hub import CheckpointFiles
from shardings.mesh import abstract_mesh


@dataclasses.dataclass(frozen=True, slots=True)
class Task:
    """What is planned.

    Attributes:
        files: The model's settings.
        topology: The devices.
        config: Options of the engine, but for the layout.
        workload: What the requests are like.
        price: Dollars of a device and hour; None if not known.
        programs: Which step programs are compiled.
    """

    files: CheckpointFiles
    topology: Topology
    config: EngineConfig
    workload: Workload
    price: float | None
    programs: Choice


@dataclasses.dataclass(frozen=True, slots=True)
class Replica:
    """What is known of each of a replica's devices, however many replicas there are.

    Attributes:
        cost: What steps ask of it.
        memory: What lies on it.
        token_budget: Most tokens of a step.
        keys: Kind and size of the step programs.
    """

    cost: ReplicaCost
    memory: DeviceMemory
    token_budget: int
    keys: tuple[tuple[str, int], ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """A step program at the roofline, and compiled.

    Attributes:
        kind: "decode" or "prefill".
        size: Rows or tokens.
        cost: What it asks of each device: rows in the middle of the workload's
            answers, or the workload's prompts.
        seconds: Its least time.
        compiled: What the compiler made of it, if it was asked.
    """

    kind: str
    size: int
    cost: StepCost
    seconds: float
    compiled: CompiledStep | None


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """All that is known of a layout.

    Attributes:
        layout: How the devices are used.
        memory: What is on each of them.
        throughput: Its speed; None if no request of the workload fits.
        steps: The step programs.
    """

    layout: Layout
    memory: DeviceMemory
    throughput: Throughput | None
    steps: tuple[Step, ...]

    @property
    def speed(self) -> float:
        """Output tokens per second, 0 where it does not fit."""
        found = self.throughput
        return 0.0 if found is None else found.output_tokens_per_second


@dataclasses.dataclass(frozen=True, slots=True)
class Search:
    """All layouts of a topology.

    Attributes:
        plans: Those that fit, best first; only the first ones are compiled.
        refused: The others, with the reason.
        num_compiled: How many were compiled.
    """

    plans: tuple[Plan, ...]
    refused: tuple[tuple[Layout, str], ...]
    num_compiled: int


def describe(task: Task, layout: Layout) -> Replica:
    """A replica without its devices; no compiler is needed.

    Raises:
        ConfigError: The model cannot be divided like that.
        UnsupportedModelError: There is no such model.
    """
    mesh = abstract_mesh(tensor=layout.tensor, pipe=layout.pipeline)
    start = _start(task, layout, mesh)
    return _replica(start, device_memory(start, start.expected_temporaries()))


def estimate(task: Task, layout: Layout) -> Plan:
    """Plans a layout by the roofline alone.

    Raises:
        ConfigError, UnsupportedModelError: As for `describe`.
    """
    return _plan(task, layout, describe(task, layout), ())


def compile_plan(
    task: Task, layout: Layout, tell: Callable[[Layout, CompiledStep], None]
) -> Plan:
    """Plans a layout with the programs that the real compiler makes of it.

    As the engine does, the pool is sized by what programs are expected to need, and
    again where they need more.

    Args:
        task: What is planned.
        layout: How the devices are used.
        tell: Called after each program.

    Raises:
        ConfigError: The compiler is missing, or the model does not fit.
        UnsupportedModelError: There is no such model.
    """
    guess = estimate(task, layout)
    require(guess)
    if task.programs == "none":
        return guess
    mesh = replica_mesh(layout, described_devices(task.topology))
    start, num_blocks = _start(task, layout, mesh), guess.memory.num_blocks
    keys = step_keys(start, task.programs)
    steps: list[CompiledStep] = []
    try:
        for step in compile_steps(start, num_blocks, keys):
            steps.append(step)
            tell(layout, step)
    except jax.errors.JaxRuntimeError as error:
        raise ConfigError(f"{layout}: the compiler refuses: {error}") from error
    memory = device_memory(start, temporaries(start, steps), num_blocks)
    plan = _plan(task, layout, _replica(start, memory), tuple(steps))
    require(plan)
    return plan


def search(
    task: Task,
    *,
    most_compiled: int,
    tell: Callable[[Layout, CompiledStep], None],
    described: Callable[[Task, Layout], Replica] = describe,
) -> Search:
    """Plans every layout that takes all devices, best first.

    All are estimated by the roofline; the best few are compiled then, and ordered
    again.

    Args:
        task: What is planned.
        most_compiled: How many are compiled.
        tell: Called after each program.
        described: Gives the replica of a layout, for a caller that knows it already.
    """
    plans: list[Plan] = []
    refused: list[tuple[Layout, str]] = []
    for layout in all_layouts(task.topology):
        try:
            plan = _plan(task, layout, described(task, layout), ())
            require(plan)
        except ConfigError as error:
            refused.append((layout, str(error)))
        else:
            plans.append(plan)
    plans.sort(key=lambda plan: -plan.speed)
    count = 0 if task.programs == "none" else most_compiled
    best: list[Plan] = []
    for plan in plans[:count]:
        try:
            best.append(compile_plan(task, plan.layout, tell))
        except ConfigError as error:
            refused.append((plan.layout, str(error)))
    best.sort(key=lambda plan: -plan.speed)
    return Search((*best, *plans[count:]), tuple(refused), len(best))


def require(plan: Plan) -> None:
    """Refuses a layout that does not fit.

    Raises:
        ConfigError: Says how much is missing.
    """
    memory, gib = plan.memory, 2**30
    if not memory.fits:
        raise ConfigError(
            f"{plan.layout} does not fit: {memory.missing / gib:.2f} GiB are missing "
            f"on each device, of which {memory.allowed / gib:.2f} GiB may be used; "
            f"weights take {memory.weights / gib:.2f} GiB and temporaries "
            f"{memory.temporaries / gib:.2f} GiB"
        )


def _start(task: Task, layout: Layout, mesh: Any) -> StartPlan:
    config = dataclasses.replace(
        task.config,
        tensor_parallel_size=layout.tensor,
        pipeline_parallel_size=layout.pipeline,
        data_parallel_size=layout.data,
    )
    device = task.topology.device
    return plan_start(config, task.files, mesh, device.target, device.memory)


def _replica(start: StartPlan, memory: DeviceMemory) -> Replica:
    return Replica(
        cost=replica_cost(start),
        memory=memory,
        token_budget=start.resolved.token_budget,
        keys=step_keys(start, "all"),
    )


def _plan(
    task: Task, layout: Layout, replica: Replica, compiled: tuple[CompiledStep, ...]
) -> Plan:
    cost, memory = replica.cost, replica.memory
    speed = throughput(
        cost,
        memory,
        task.topology,
        layout,
        workload=task.workload,
        token_budget=replica.token_budget,
        price=task.price,
    )
    found = {(step.kind, step.size): step for step in compiled}
    hops = farthest(task.topology, layout.tensor)
    steps: list[Step] = []
    for kind, size in tuple(found) or replica.keys:
        at = _step_cost(cost, kind, size, task.workload)
        seconds = at.seconds(task.topology.device, hops)
        steps.append(Step(kind, size, at, seconds, found.get((kind, size))))
    return Plan(layout, memory, speed, tuple(steps))


def _step_cost(cost: ReplicaCost, kind: str, size: int, workload: Workload) -> StepCost:
    if kind == "decode":
        context = workload.input_tokens + workload.output_tokens / 2
        return cost.decode(size, context)
    return cost.prefill(size, min(size, workload.input_tokens))
