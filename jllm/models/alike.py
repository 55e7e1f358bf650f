"""Layers that are alike are traced once, since tracing takes longer than reading them.

A program of 28 unrolled layers is traced and lowered from Python at each start.
"""

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any

import jax
from jax import Array
from jax.core import Tracer

from jllm.models.base import Weights

Run = Callable[[Any, Array, Array], tuple[Array, Array]]
"""From a layer, the hidden states and the layer's pool to the new ones of both."""


class AlikeLayers:
    """Runs the layers of one forward pass; those of a kind are traced once.

    What was traced is put in wherever it is repeated, so that the program is the one
    that it would be without.

    Args:
        run: Runs a layer: a dataclass with the `weights` of the whole model, the
            layer's `index`, its `batch`, `rotation` and `of_model`.
        num_norms: Norms of the hidden states in each layer.
    """

    def __init__(self, run: Run, num_norms: int) -> None:
        """Traces nothing yet."""
        self._run = run
        self._sizes = {"norms": num_norms, "norm_biases": num_norms, "qk_norms": 2}
        self._traced: dict[Hashable, Callable[..., tuple[Array, Array]]] = {}

    def __call__(
        self, kind: Hashable, layer: Any, hidden: Array, pool: Array
    ) -> tuple[Array, Array]:
        """Runs a layer; those of one kind differ in their arrays only."""
        # Activations that are looked at have a name in each layer; without tracing,
        # nothing is kept that could be used again.
        if layer.of_model.is_active or not isinstance(hidden, Tracer):
            return self._run(layer, hidden, pool)
        if kind not in self._traced:
            self._traced[kind] = self._function(layer)
        own = self._own_weights(layer.weights, layer.index)
        return self._traced[kind](own, layer.batch, layer.rotation, hidden, pool)

    def _function(self, first: Any) -> Callable[..., tuple[Array, Array]]:
        """The first layer of a kind as a function of arrays alone."""

        def layer(
            own: Weights, batch: Any, rotation: Any, hidden: Array, pool: Array
        ) -> tuple[Array, Array]:
            weights = self._as_of_model(own, first.index)
            changed = {"weights": weights, "batch": batch, "rotation": rotation}
            return self._run(dataclasses.replace(first, **changed), hidden, pool)

        return jax.jit(layer, inline=True)

    def _own_weights(self, weights: Weights, index: int) -> Weights:
        """The weights of one layer, its rows of the leaves of all layers among them."""
        own = {"layers": weights["layers"][index]}
        for name, size in self._sizes.items():
            if name in weights:
                own[name] = [weights[name][size * index + i] for i in range(size)]
        return own

    def _as_of_model(self, own: Weights, index: int) -> Weights:
        """The same where they are looked for in the weights of a whole model."""
        weights: dict[str, Any] = {"layers": {index: own["layers"]}}
        for name, size in self._sizes.items():
            if name in own:
                weights[name] = {
                    size * index + i: row for i, row in enumerate(own[name])
                }
        return weights
