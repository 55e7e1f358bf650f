"""Runs the programs: sole holder of weights and device state.

On many hosts each has an executor of its own. The first host's tells the others of each
call before it makes it, so that all of them run the same programs in the same order.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import NamedSharding

from jllm.engine.inputs import InputLayout
from jllm.engine.programs import Programs
from jllm.engine.state import EngineState
from jllm.engine.steps import SamplerInput, StepResult
from jllm.errors import ConfigError
from jllm.metrics import EngineMetrics
from jllm.models.base import Weights
from jllm.weights.update import placed_like

RULES = "rules"
"""Name of the call that replaces the table of sampling rules."""


@runtime_checkable
class Peers(Protocol):
    """The other hosts, which repeat what this one runs."""

    def send(self, name: str, size: int, arrays: Sequence[np.ndarray | None]) -> None:
        """Has them make the same call."""
        ...

    def note_launched(self, result: Any) -> None:
        """Takes what the call will have computed, to see how far the device is."""
        ...

    def close(self) -> None:
        """Tells them that no more calls follow."""
        ...


class Executor:
    """Calls the programs of a model, each on what the ones before it have left.

    Not thread-safe: one thread calls it.

    Args:
        weights: Arrays of the model.
        programs: Compiled steps.
        place: Where inputs and small results live.
        mask_words: Words of the set of tokens that a row may sample.
        peers: The other hosts, on the first of several.
    """

    def __init__(
        self,
        weights: Weights,
        programs: Programs,
        place: NamedSharding,
        mask_words: int,
        peers: Peers | None = None,
    ) -> None:
        """Makes an empty device state."""
        self.weights = weights
        self.programs = programs
        self.metrics = EngineMetrics()
        self.state: EngineState | None = programs.init_state()
        self._place, self._mask_words, self._peers = place, mask_words, peers
        self._result: StepResult | None = None
        self._rules: jax.Array | None = None
        self._no_masks: dict[int, jax.Array] = {}

    def step(self, layout: InputLayout, program: Any, vector: np.ndarray) -> jax.Array:
        """Dispatches a step; returns its packed results, which are not computed yet."""
        if self._peers is not None:
            self._peers.send(layout.kind, layout.num_tokens, [vector])
        # The buffers of the step before must be free for this one.
        self._result = None
        # Copied by the call itself, which costs a tenth of a `device_put` before it.
        self.state, result = program(self.weights, self.state, vector)
        self._result = result
        self.metrics.host_to_device_copies += 1
        return self._launched(result.packed)

    def pool(self, num_tokens: int, owners: np.ndarray) -> jax.Array:
        """Dispatches the sums of the step's hidden states by row, f32[S, E].

        Args:
            num_tokens: Tokens of the step's program.
            owners: The row of each of them.
        """
        self._send("pool", num_tokens, owners)
        program = self.programs.pool(num_tokens)
        return self._launched(program(self._step_result.hidden, self.upload(owners)))

    def place_rules(self, rules: np.ndarray) -> None:
        """Replaces the table of sampling rules; the array must not change later."""
        self._send(RULES, 0, rules)
        self._rules = self.upload(rules)

    @property
    def place(self) -> NamedSharding:
        """Where inputs and small results live."""
        return self._place

    @property
    def has_rules(self) -> bool:
        """Whether there is a table of sampling rules."""
        return self._rules is not None

    @property
    def captured(self) -> Mapping[str, jax.Array]:
        """Activations that the newest step captured, [T, ...] each, by name."""
        return self._step_result.captured

    def sample(
        self,
        num_rows: int,
        masks: np.ndarray | None,
        arguments: tuple[jax.Array, ...] = (),
    ) -> jax.Array:
        """Dispatches the sampler program on the step's logits.

        Args:
            num_rows: Rows of the step's program.
            masks: What each row may sample, as bit sets; None is anything.
            arguments: Those of the logits processors, uploaded before.

        Returns:
            The packed results that replace the step's own.
        """
        self._send("sampler", num_rows, masks)
        step = self._step_result
        inputs = self._sampler_input(num_rows, masks, arguments)
        program = self.programs.sampler(num_rows)
        self.state, packed = program(self.state, step.logits, step.sampled_rows, inputs)
        return self._launched(packed)

    def sample_prompt(
        self,
        num_rows: int,
        targets: np.ndarray,
        masks: np.ndarray | None,
        arguments: tuple[jax.Array, ...] = (),
    ) -> tuple[jax.Array, jax.Array]:
        """Dispatches the sampler program that scores the prompt's tokens too.

        Args:
            num_rows: Rows of the step's program, the largest prefill.
            targets: The token that follows each of the step's.
            masks: As in `sample`.
            arguments: The same.

        Returns:
            The packed results of the rows, and of the tokens.
        """
        self._send("prompt_logprobs", num_rows, targets, masks)
        step = dataclasses.replace(self._step_result, captured={})
        inputs = self._sampler_input(num_rows, masks, arguments)
        self.state, (packed, of_prompt) = self.programs.prompt_logprobs()(
            self.weights, self.state, step, self.upload(targets), inputs
        )
        return self._launched(packed), of_prompt

    def execute(self, name: str, size: int, arrays: Sequence[Any]) -> Any:
        """Makes the call that another host's executor has made.

        Returns:
            The array that it will have computed; None if it runs no program.
        """
        if name == RULES:
            self.place_rules(*arrays)
            return None
        if name == "pool":
            return self.pool(size, *arrays)
        if name == "sampler":
            return self.sample(size, *arrays)
        if name == "prompt_logprobs":
            return self.sample_prompt(size, *arrays)[0]
        return self.step(*self.programs.named(name, size), *arrays)

    def update_weights(self, weights: Weights) -> None:
        """Takes other weights for the calls from now on.

        Raises:
            ConfigError: The tree differs from `weights`, or there are other hosts.
        """
        if self._peers is not None:
            raise ConfigError("update_weights needs num_hosts=1")
        self.weights = placed_like(weights, self.weights)

    def close(self) -> None:
        """Drops the device state; the other hosts end."""
        self.programs.close()
        self.state = self._result = None
        if self._peers is not None:
            self._peers.close()

    @property
    def _step_result(self) -> StepResult:
        assert self._result is not None, "no step was dispatched"
        return self._result

    def _send(self, name: str, size: int, *arrays: np.ndarray | None) -> None:
        if self._peers is not None:
            self._peers.send(name, size, arrays)

    def _launched(self, result: jax.Array) -> jax.Array:
        self.metrics.dispatches += 1
        if self._peers is not None:
            self._peers.note_launched(result)
        return result

    def _sampler_input(
        self,
        num_rows: int,
        masks: np.ndarray | None,
        arguments: tuple[jax.Array, ...],
    ) -> SamplerInput:
        """Rules and masks; without masks, an array made once."""
        if masks is not None:
            allowed = self.upload(masks)
        else:
            if num_rows not in self._no_masks:
                ones = np.full((num_rows, self._mask_words), -1, np.int32)
                self._no_masks[num_rows] = put(ones, self._place)
            allowed = self._no_masks[num_rows]
        return SamplerInput(self._rules, allowed, arguments)

    def upload(self, array: np.ndarray) -> jax.Array:
        """Copies an array to where inputs live."""
        self.metrics.host_to_device_copies += 1
        return put(array, self._place)


def put(array: np.ndarray, place: NamedSharding) -> jax.Array:
    """Copies an array to all devices, those of other hosts excepted.

    On many hosts each one has the array; `device_put` would have them compare it.
    """
    if place.is_fully_addressable:
        return jax.device_put(array, place)
    return jax.make_array_from_callback(array.shape, place, lambda index: array[index])
