"""Named activations of a forward pass: looked at, or changed, where they arise."""

import fnmatch
from collections.abc import Callable, Mapping, Sequence

from jax import Array
from jaxtyping import Shaped

EditFunction = Callable[[Array], Array]
"""A pure function from an activation to what takes its place."""

Edits = Mapping[str, EditFunction]
"""Edits by the names, or patterns of names, of the activations that they change."""


def activation_names(
    num_layers: int, *, has_middle: bool, has_mlp_norm: bool
) -> tuple[str, ...]:
    """Names that `capture` and `edit` of a decoder can mean, in order.

    Args:
        num_layers: Layers of the decoder.
        has_middle: Whether the MLP follows the attention, rather than stands beside it.
        has_mlp_norm: Whether the MLP reads something else than the attention.
    """
    own = ["resid_in", "attn.norm", "attn.q", "attn.k", "attn.v", "attn.probs"]
    own += ["attn.out", "resid_mid"] if has_middle else ["attn.out"]
    own += ["mlp.norm", "mlp.out"] if has_mlp_norm else ["mlp.out"]
    own.append("resid")
    layers = (f"layers.{i}.{name}" for i in range(num_layers) for name in own)
    return "embed", *layers, "final"


class Probe:
    """Collects and changes activations while one forward pass is traced.

    A pattern is a name in which `*` stands for anything, as in `layers.*.mlp.out`. An
    activation is edited first, then captured, then used.

    Args:
        names: Activations that the model has.
        capture: Patterns of those to collect.
        edit: What changes which; several edits of one activation follow each other.

    Raises:
        ValueError: A pattern matches no activation.
    """

    def __init__(
        self,
        names: Sequence[str],
        capture: Sequence[str] = (),
        edit: Edits | None = None,
    ) -> None:
        """Finds out which activations the patterns mean."""
        edit = edit or {}
        self.captured: dict[str, Array] = {}
        self._captures = frozenset(
            name for pattern in capture for name in matching(pattern, names, "capture")
        )
        self._edits: dict[str, list[EditFunction]] = {}
        for pattern, function in edit.items():
            for name in matching(pattern, names, "edit"):
                self._edits.setdefault(name, []).append(function)

    @property
    def is_active(self) -> bool:
        """Whether any activation is collected or changed."""
        return bool(self._captures or self._edits)

    def wants(self, name: str) -> bool:
        """Whether the activation is collected or changed."""
        return name in self._captures or name in self._edits

    def __call__(self, name: str, value: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        """The activation as it is used from here on.

        Raises:
            ValueError: An edit changes its shape or type.
        """
        for edit in self._edits.get(name, ()):
            changed = edit(value)
            if (changed.shape, changed.dtype) != (value.shape, value.dtype):
                raise ValueError(
                    f"edit[{name!r}] gives {changed.dtype}{list(changed.shape)}, "
                    f"expected {value.dtype}{list(value.shape)}"
                )
            value = changed
        if name in self._captures:
            self.captured[name] = value
        return value


def matching(pattern: str, names: Sequence[str], field: str) -> list[str]:
    """Finds the activations that a pattern means.

    Args:
        pattern: A name in which `*` stands for anything.
        names: Activations that the model has.
        field: What the pattern was given for, to name it in the error.

    Raises:
        ValueError: It matches none.
    """
    found = fnmatch.filter(names, pattern)
    if not found:
        kinds = sorted({_kind(name) for name in names})
        raise ValueError(
            f"{field}={pattern!r} matches no activation; there are {', '.join(kinds)}"
        )
    return found


def _kind(name: str) -> str:
    """The name without the number of its layer."""
    first, *rest = name.split(".")
    return ".".join([first, "*", *rest[1:]]) if rest else first
