"""Compiles the programs of a model from shapes alone; no array is needed."""

import dataclasses
import uuid
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, Sharding

from jllm.engine.executables import Executable
from jllm.engine.pipeline import decode_tick, prefill_tick
from jllm.engine.pooling import pool_step
from jllm.engine.probed_steps import GroupInput, ProbeSet, probed_step
from jllm.engine.programs import ProgramOptions, describe, describe_state
from jllm.engine.state import EngineState
from jllm.engine.steps import (
    SamplerInput,
    StepResult,
    decode_step,
    prefill_step,
    prompt_logprobs_step,
    sampler_step,
)
from jllm.layers.kernels import collect_fallbacks
from jllm.models.base import Model, Weights
from jllm.models.pipeline import PipelinedDecoder
from jllm.processors import argument_defaults
from jllm.sampling.rules import RuleLayout
from jllm.sampling.sampler import SamplerOptions
from jllm.sampling.transforms import ThresholdSearch
from shardings.rules import partition_spec


def local_zeros(description: jax.ShapeDtypeStruct) -> jax.Array:
    """This host's part of an array of zeros that many hosts share.

    No program of all hosts runs, so that it needs no place in their common order.
    """
    shape, place = description.shape, description.sharding
    assert place is not None
    shards = [
        jnp.zeros(place.shard_shape(shape), description.dtype, device=device)
        for device in place.addressable_devices
    ]
    return jax.make_array_from_single_device_arrays(shape, place, shards)


def empty_state(description: EngineState) -> EngineState:
    """A state without requests: zeros, since a NaN in an unused place would spread."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), description)


def step_function(model: Model, kind: str) -> Callable[..., Any]:
    """What a step of a kind computes, of the model, a layout and a draw method on."""
    if isinstance(model, PipelinedDecoder):
        return decode_tick if kind == "decode" else prefill_tick
    return decode_step if kind == "decode" else prefill_step


class ProgramBuilder:
    """Lowers and compiles the programs of one model from shapes alone.

    Args:
        model: The network.
        options: Sizes.
        weights: Tree of arrays or of their descriptions.
        place: Where inputs and small results live.
        use_cache: Whether programs may come from JAX's cache. What comes from there
            cannot be exported on a CPU: it has lost the names of its functions.
    """

    def __init__(
        self,
        model: Model,
        options: ProgramOptions,
        weights: Weights,
        place: NamedSharding,
        *,
        use_cache: bool = True,
    ) -> None:
        """Keeps descriptions only, no arrays."""
        self._use_cache = use_cache
        self._model, self._options, self._place = model, options, place
        self._weights = describe(weights)
        self._state = describe_state(model, options, place)

    def build(self, kind: str, size: int) -> Executable:
        """Any of the programs."""
        if kind == "init_state":
            return self.init_state()
        if kind == "sampler":
            return self.sampler(size)
        if kind == "prompt_logprobs":
            return self.prompt_logprobs()
        if kind == "pool":
            return self.pool(size)
        return self.step(kind, size)

    def trees(self, kind: str) -> tuple[Any, Any]:
        """Arguments and result of the programs of a kind, as trees of anything."""
        if kind == "init_state":
            return (), self._state
        if kind == "pool":
            return (0, 0), 0
        step = StepResult(packed=0, logits=0, sampled_rows=0, hidden=0)
        rules = SamplerInput(rules=0, allowed=0)
        if kind == "sampler":
            return (self._state, 0, 0, rules), (self._state, 0)
        if kind == "prompt_logprobs":
            arguments = (self._weights, self._state, step, 0, rules)
            return arguments, (self._state, (0, 0))
        return (self._weights, self._state, 0), (self._state, step)

    def init_state(self) -> Executable:
        """Makes the empty state where it will live."""
        if self._place.mesh.is_multi_process:
            parts = partial(jax.tree.map, local_zeros, self._state)
            return Executable(parts, frozenset())
        places = jax.tree.map(lambda leaf: leaf.sharding, self._state)
        make = self._named(partial(empty_state, self._state))
        make = jax.jit(make, out_shardings=places)
        return Executable(make.lower().compile(), frozenset())

    def step(self, kind: str, size: int) -> Executable:
        """A decode program of `size` rows, or a prefill program of `size` tokens."""
        layout = self._options.layout(kind, size)
        function = step_function(self._model, kind)
        step = partial(function, self._model, layout, self._options.draw_method)
        vector = self._array((layout.size,), jnp.int32)
        return self._compile(step, (self._weights, self._state, vector), state_at=1)

    def probed(self, kind: str, size: int, probes: ProbeSet) -> Executable:
        """The same with activations that are captured or edited."""
        layout = self._options.layout(kind, size)
        method = self._options.draw_method
        step = partial(probed_step, self._model, layout, method, probes)
        rows = self._options.table_rows
        groups = tuple(
            GroupInput(
                self._array((rows, len(group), 2), jnp.int32),
                tuple(
                    self._array((rows, *point.shape), point.dtype)
                    for point in group
                    if point.shape is not None
                ),
            )
            for group in probes.groups
        )
        vector = self._array((layout.size,), jnp.int32)
        arguments = (self._weights, self._state, vector, groups)
        return self._compile(step, arguments, state_at=1)

    def sampler(self, num_rows: int) -> Executable:
        """The second program of a step of `num_rows` rows with sampling rules."""
        step = partial(sampler_step, self._sampler_options)
        arguments = (
            self._state,
            self.logits(num_rows),
            self._array((num_rows,), jnp.int32),
            self._sampler_input(num_rows),
        )
        return self._compile(step, arguments, state_at=0)

    def prompt_logprobs(self) -> Executable:
        """The second program of a prefill step of the largest size."""
        options = self._options
        step = partial(prompt_logprobs_step, self._model, self._sampler_options)
        size = options.sizes.tokens[-1]
        result = self._step_result(size)
        arguments = (
            self._weights,
            self._state,
            result,
            self._array((size,), jnp.int32),
            self._sampler_input(options.table_rows),
        )
        return self._compile(step, arguments, state_at=1)

    def pool(self, num_tokens: int) -> Executable:
        """The program that sums the hidden states of a step of `num_tokens` tokens."""
        step = self._named(partial(pool_step, self._options.table_rows))
        hidden = self._step_result(num_tokens).hidden
        owners = self._array((num_tokens,), jnp.int32)
        jitted = jax.jit(step, out_shardings=self._place)
        lowered = jitted.lower(hidden, owners)
        return Executable(lowered.compile(self._compiler_options), frozenset())

    @property
    def _sampler_options(self) -> SamplerOptions:
        options, of_model = self._options, self._model.options
        # Kernels do not know of devices that share the vocabulary.
        implementation = "auto" if of_model.mesh is None else "reference"
        search = ThresholdSearch(implementation, of_model.target)
        return SamplerOptions(
            num_logprobs=options.num_logprobs,
            method=options.draw_method,
            search=search,
            processors=options.processors,
            vocab_size=self._model.vocab_size,
        )

    def logits(self, num_rows: int) -> jax.ShapeDtypeStruct:
        """Description of the logits that a step of `num_rows` rows leaves."""
        shape = (num_rows, self._model.padded_vocab_size)
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=self._logits_place)

    def _step_result(self, num_tokens: int) -> StepResult:
        """Description of what a prefill step of `num_tokens` tokens leaves."""
        layout = self._options.layout("prefill", num_tokens)
        function = step_function(self._model, "prefill")
        step = partial(function, self._model, layout, self._options.draw_method)
        vector = self._array((layout.size,), jnp.int32)
        _, result = jax.eval_shape(step, self._weights, self._state, vector)
        placed = jax.tree.map(lambda x: self._array(x.shape, x.dtype), result)
        logits = self.logits(self._options.table_rows)
        return dataclasses.replace(placed, logits=logits)

    def _sampler_input(self, num_rows: int) -> SamplerInput:
        options = self._options
        words = RuleLayout(self._model.padded_vocab_size).sizes["allowed"]
        return SamplerInput(
            rules=self._array((options.table_rows, options.rule_size), jnp.int32),
            allowed=self._array((num_rows, words), jnp.int32),
            arguments=tuple(
                self._array((options.table_rows, *value.shape), value.dtype)
                for value in argument_defaults(options.processors).values()
            ),
        )

    @property
    def _compiler_options(self) -> dict[str, Any] | None:
        """GPUs of several hosts tune each for itself.

        They would share that work by waiting for each other's part of every program,
        but they compile in threads, in no common order.
        """
        (device, *_) = self._place.device_set
        if not self._place.mesh.is_multi_process or device.platform != "gpu":
            return None
        return {"xla_gpu_shard_autotuning": False}

    @property
    def _logits_place(self) -> Sharding:
        """Logits stay where the vocabulary is."""
        return NamedSharding(self._place.mesh, partition_spec((None, "vocab")))

    def _array(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self._place)

    def _named(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """The function, under a name that JAX's cache has never seen, if so wished."""
        if self._use_cache:
            return step

        def fresh(*arguments: Any) -> Any:
            return step(*arguments)

        fresh.__name__ = f"program_{uuid.uuid4().hex}"
        return fresh

    def _compile(
        self, step: Callable[..., Any], arguments: tuple[Any, ...], state_at: int
    ) -> Executable:
        """Compiles with the state donated and every result placed."""
        step = self._named(step)
        # Traced here; lowering finds the trace again.
        with collect_fallbacks() as found:
            result = jax.eval_shape(step, *arguments)
        state = jax.tree.map(lambda leaf: leaf.sharding, self._state)
        rest: Any = jax.tree.map(lambda _: self._place, result[1])
        if isinstance(result[1], StepResult):
            rest = dataclasses.replace(rest, logits=self._logits_place)
        jitted = jax.jit(
            step,
            donate_argnums=state_at,
            out_shardings=(state, rest),
            keep_unused=True,
        )
        return Executable(jitted.lower(*arguments).compile(), frozenset(found))
