"""Other weights in the place of those that are there."""

from typing import Any

import jax

from jllm.errors import ConfigError
from jllm.models.base import Weights


def placed_like(weights: Weights, present: Weights) -> Weights:
    """Puts a tree of arrays where another one of the same form lies.

    What is there already is not copied.

    Raises:
        ConfigError: A structure, shape or type differs; names the array.
    """
    if jax.tree.structure(weights) != jax.tree.structure(present):
        raise ConfigError(
            "weights must have the structure of the present ones: "
            f"{_difference(weights, present)}"
        )

    def place(path: Any, present_leaf: Any, leaf: Any) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        for field in ("shape", "dtype"):
            own = getattr(leaf, field, None)
            if own != getattr(present_leaf, field):
                wanted = getattr(present_leaf, field)
                raise ConfigError(f"weights {name} has {field} {own}, not {wanted}")
        return jax.device_put(leaf, present_leaf.sharding)

    return jax.tree_util.tree_map_with_path(place, present, weights)


def _difference(weights: Weights, present: Weights) -> str:
    own, wanted = (
        {
            jax.tree_util.keystr(path, simple=True, separator=".")
            for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]
        }
        for tree in (weights, present)
    )
    missing, unknown = sorted(wanted - own), sorted(own - wanted)
    return f"missing {missing[:5]}, unknown {unknown[:5]}"
