"""How a stack of layers is laid out over the stages of a pipeline."""

import dataclasses
import math
from collections.abc import Hashable, Sequence

from jllm.models.base import ParamSpec, Part


@dataclasses.dataclass(frozen=True, slots=True)
class StageLayout:
    """Which layer each stage computes at each of its places.

    All stages run one program, hence have the same kind of layer at the same place. A
    stage that has no layer for a place leaves it out.

    Attributes:
        first_layers: A layer of each place's kind.
        layers: By stage and place the number of the layer, None where there is none.
    """

    first_layers: tuple[int, ...]
    layers: tuple[tuple[int | None, ...], ...]

    @property
    def num_places(self) -> int:
        """Layers that a stage has weights and a KV pool for."""
        return len(self.first_layers)

    @property
    def num_idle(self) -> int:
        """Places of all stages without a layer."""
        return sum(stage.count(None) for stage in self.layers)

    def loaded(self, stage: int) -> tuple[int, ...]:
        """The layers whose weights a stage holds: any of the kind where it has none."""
        pairs = zip(self.layers[stage], self.first_layers, strict=True)
        return tuple(first if layer is None else layer for layer, first in pairs)


def lay_out_stages(kinds: Sequence[Hashable], num_stages: int) -> StageLayout:
    """Lays layers out over stages, with as few places as their kinds allow.

    The places have the kinds of the first layers. With layers that are all alike, or
    that repeat with a period which divides the places, no more are needed than layers
    for each stage; at the worst as many as there are layers.

    Args:
        kinds: What each layer is; layers of one kind can take each other's place.
        num_stages: Number of stages.

    Raises:
        ValueError: More stages than layers.
    """
    if not 1 <= num_stages <= len(kinds):
        raise ValueError(f"num_stages={num_stages} must be 1 to {len(kinds)} layers")
    num_places = -(-len(kinds) // num_stages)
    while True:
        places = kinds[:num_places]
        layers = _placed(kinds, places, num_stages)
        if layers is not None:
            return StageLayout(tuple(range(num_places)), layers)
        num_places += 1


def _placed(
    kinds: Sequence[Hashable], places: Sequence[Hashable], num_stages: int
) -> tuple[tuple[int | None, ...], ...] | None:
    """Every layer at the first place that is right for it; None if some are left."""
    stages: list[tuple[int | None, ...]] = []
    layer = 0
    for _ in range(num_stages):
        stage: list[int | None] = []
        for kind in places:
            fits = layer < len(kinds) and kinds[layer] == kind
            stage.append(layer if fits else None)
            layer += fits
        stages.append(tuple(stage))
    return tuple(stages) if layer == len(kinds) else None


@dataclasses.dataclass(frozen=True, slots=True)
class StackedSpec:
    """The parameters of one place of all stages, stacked along a first dimension.

    Attributes:
        members: That of each stage, all of one shape.
    """

    members: tuple[ParamSpec, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape with the stages first."""
        return (len(self.members), *self.members[0].shape)

    @property
    def axes(self) -> tuple[str | None, ...]:
        """Logical axis of each dimension."""
        return ("stages", *self.members[0].axes)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def init(self) -> str:
        """How random weights are drawn."""
        return self.members[0].init

    @property
    def parts(self) -> tuple[Part, ...]:
        """The checkpoint tensors of all stages."""
        return tuple(part for member in self.members for part in member.parts)
