"""One layer of a decoder in one forward pass."""

import dataclasses

from jax import Array

from jllm.layers.rope import Rotation
from jllm.models.base import Batch, Weights
from jllm.models.probe import Probe


@dataclasses.dataclass(frozen=True, slots=True)
class Layer:
    """What the parts of a layer read in one forward pass.

    Attributes:
        index: Its number.
        weights: Those of the whole model.
        batch: The tokens.
        rotation: Angles of each token; None where they are not rotated.
        of_model: Looks at the activations.
    """

    index: int
    weights: Weights
    batch: Batch
    rotation: Rotation | None
    of_model: Probe

    @property
    def own(self) -> Weights:
        """The layer's weights."""
        return self.weights["layers"][self.index]

    def wants(self, name: str) -> bool:
        """Whether the activation is captured or changed."""
        return self.of_model.wants(f"layers.{self.index}.{name}")

    def probe(self, name: str, value: Array) -> Array:
        """The activation, perhaps captured or changed."""
        return self.of_model(f"layers.{self.index}.{name}", value)
