"""Rotary position embeddings: their settings in a config.json, and the rotation.

Source: RoFormer, arXiv:2104.09864.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from jllm.errors import UnsupportedModelError
from jllm.layers.rope_scaling import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    NoScaling,
    Scaling,
    YarnScaling,
)
from pallas_kernels.kv_write import Rotation

DEFAULT_THETA = 10000.0
PARTIAL = "partial_rotary_factor"


def rotation_of(
    positions: Int[Array, " T"], inv_freq: Float[np.ndarray, " F"], scaling: float
) -> Rotation:
    """Cosine and sine `[T, F]` by which the heads of each token are rotated.

    Args:
        positions: Position of each token in its sequence.
        inv_freq: Angle per position of each pair of features.
        scaling: Factor on sine and cosine.
    """
    frequencies = jnp.asarray(inv_freq, jnp.float32)
    angles = positions.astype(jnp.float32)[:, None] * frequencies[None, :]
    return jax.lax.platform_dependent(
        angles,
        cpu=partial(_rotation_in_a_branch, scaling),
        default=partial(_rotation, scaling),
    )


def _rotation(scaling: float, angles: Float[Array, "T F"]) -> Rotation:
    return Rotation(jnp.cos(angles) * scaling, jnp.sin(angles) * scaling)


def _rotation_in_a_branch(scaling: float, angles: Float[Array, "T F"]) -> Rotation:
    """The same, once per step.

    XLA's CPU backend joins sine and cosine with what uses them, and so would compute
    them for every head of every layer; what is made in a branch it leaves there.
    """

    def mirrored(angles: Array) -> Rotation:
        cos, sin = _rotation(scaling, -angles)
        return Rotation(cos, -sin)

    is_usual = angles[0, 0] >= 0
    return jax.lax.cond(is_usual, partial(_rotation, scaling), mirrored, angles)


def pairs_apart(x: Float[Array, "T N D"], rotary_dim: int) -> Float[Array, "T N D"]:
    """Puts the pairs of features (2 i, 2 i + 1) where (i, i + F) were, F pairs in all.

    So a model that was trained with neighbours as pairs is rotated like the others:
    queries and keys are exchanged alike, and their products stay what they are.

    Args:
        x: Query or key heads.
        rotary_dim: The first 2 F features, which are rotated.
    """
    pairs = x[:, :, :rotary_dim].reshape(*x.shape[:2], rotary_dim // 2, 2)
    apart = jnp.swapaxes(pairs, 2, 3).reshape(*x.shape[:2], rotary_dim)
    return jnp.concatenate([apart, x[:, :, rotary_dim:]], axis=2)


@dataclasses.dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding of a model.

    Attributes:
        theta: Base of the wavelengths.
        rotary_dim: Features of a head that are rotated, an even number.
        scaling: How the frequencies are stretched.
    """

    theta: float
    rotary_dim: int
    scaling: Scaling = dataclasses.field(default_factory=NoScaling)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "RopeConfig":
        """Reads a config.json, of the old or of the new format.

        The old one has `rope_theta` and `rope_scaling`, that of transformers 5 has all
        in `rope_parameters`.

        Raises:
            UnsupportedModelError: An unknown kind, or a missing or impossible value.
        """
        source = _Source.of(config)
        kind = source.values.get("rope_type", source.values.get("type", "default"))
        if not isinstance(kind, str) or kind not in _READERS:
            known = ", ".join(_READERS)
            raise UnsupportedModelError(
                f"config.json: rope_type={kind!r} is not supported, only {known}"
            )
        return cls(
            theta=source.number("rope_theta", DEFAULT_THETA, above=1.0),
            rotary_dim=source.rotary_dim,
            scaling=_READERS[kind](source),
        )


def rope_frequencies(
    config: RopeConfig, max_model_len: int
) -> tuple[Float[np.ndarray, " F"], float]:
    """Angle per position of each pair of features, and the factor on sine and cosine.

    Kinds that depend on the length of the sequence are fixed by the longest context, so
    that a token's rotation depends neither on later tokens nor on chunking.

    Args:
        config: The model's embedding.
        max_model_len: Longest context that the engine allows.
    """
    inv_freq, scaling = config.scaling.apply(
        config.theta, config.rotary_dim, max_model_len
    )
    return inv_freq.astype(np.float32), scaling


@dataclasses.dataclass(frozen=True, slots=True)
class _Source:
    """Checked reading of the values of one rotary embedding.

    Attributes:
        config: All of config.json.
        values: The embedding's own part, completed from outside it.
    """

    config: Mapping[str, Any]
    values: Mapping[str, Any]

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "_Source":
        """Brings both formats to the new one."""
        own = config.get("rope_scaling") or config.get("rope_parameters") or {}
        if not isinstance(own, Mapping):
            raise UnsupportedModelError(
                f"config.json: rope_scaling={own!r} must be an object"
            )
        if any(isinstance(value, Mapping) for value in own.values()):
            raise UnsupportedModelError(
                "config.json: rope_parameters that differ between layers are not "
                f"supported: {', '.join(map(str, own))}"
            )
        values = {key: config.get(key) for key in ("rope_theta", PARTIAL)} | dict(own)
        return cls(config, {k: v for k, v in values.items() if v is not None})

    @property
    def rotary_dim(self) -> int:
        """Features of a head that are rotated."""
        head_dim = self.config.get("head_dim")
        if head_dim is None:
            width = self.integer("hidden_size", self.config)
            head_dim = width // self.integer("num_attention_heads", self.config)
        else:
            head_dim = self.integer("head_dim", self.config)
        dim = int(head_dim * self.number(PARTIAL, 1.0))
        # Below 4 the exponent of the dynamic kind has no value.
        if dim < 4 or dim % 2 or dim > head_dim:
            raise UnsupportedModelError(
                f"config.json: {dim} rotated features of a head width of {head_dim}; "
                f"there must be an even number of at least 4 within the head"
            )
        return dim

    @property
    def trained_len(self) -> int:
        """Context of the first training; a value outside the embedding's own wins."""
        key = "original_max_position_embeddings"
        for values in (self.config, self.values):
            if values.get(key) is not None:
                return self.integer(key, values)
        return self.max_len

    @property
    def max_len(self) -> int:
        """Context that the model was made for."""
        return self.integer("max_position_embeddings", self.config)

    def integer(self, key: str, values: Mapping[str, Any]) -> int:
        """A positive integer."""
        value = values.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UnsupportedModelError(
                f"config.json: {key}={value!r} must be a positive integer, for rotary "
                f"embeddings"
            )
        return value

    def number(
        self, key: str, default: float | None = None, above: float = 0.0
    ) -> float:
        """A finite number above a bound."""
        return _checked(key, self.values.get(key, default), above)

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        """A list of so many positive numbers."""
        given = self.values.get(key)
        if not isinstance(given, list) or len(given) != count:
            size = f" of {len(given)}" if isinstance(given, list) else ""
            raise UnsupportedModelError(
                f"config.json: {key} must be a list of {count} numbers, not "
                f"{type(given).__name__}{size}"
            )
        return tuple(_checked(f"{key}[{i}]", value) for i, value in enumerate(given))

    def flag(self, key: str, *, default: bool) -> bool:
        """True or false."""
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise UnsupportedModelError(
                f"config.json: {key}={value!r} must be true or false"
            )
        return value


def _checked(key: str, value: Any, above: float = 0.0) -> float:
    if value is None:
        raise UnsupportedModelError(
            f"config.json: {key} is missing, for rotary embeddings"
        )
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value <= above:
        raise UnsupportedModelError(
            f"config.json: {key}={value!r} must be a finite number above {above:g}"
        )
    return float(value)


def _read_llama3(source: _Source) -> Llama3Scaling:
    low, high = source.number("low_freq_factor"), source.number("high_freq_factor")
    if high < low:
        raise UnsupportedModelError(
            f"config.json: high_freq_factor={high} must not be below "
            f"low_freq_factor={low}"
        )
    return Llama3Scaling(source.number("factor"), low, high, source.trained_len)


def _read_yarn(source: _Source) -> YarnScaling:
    """Defaults as in the paper; the attention factor as transformers derives it."""
    factor = source.number("factor")
    if "attention_factor" in source.values:
        attention_factor = source.number("attention_factor")
    elif source.values.get("mscale") and source.values.get("mscale_all_dim"):
        parts = [source.number(key) for key in ("mscale", "mscale_all_dim")]
        attention_factor = _yarn_scale(factor, parts[0]) / _yarn_scale(factor, parts[1])
    else:
        attention_factor = _yarn_scale(factor, 1.0)
    return YarnScaling(
        factor=factor,
        trained_len=source.trained_len,
        fast=source.number("beta_fast", 32.0),
        slow=source.number("beta_slow", 1.0),
        attention_factor=attention_factor,
        truncate=source.flag("truncate", default=True),
    )


def _yarn_scale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _read_longrope(source: _Source) -> LongRopeScaling:
    """The attention factor follows from how far the context was stretched."""
    trained_len, count = source.trained_len, source.rotary_dim // 2
    factor = source.number("factor", source.max_len / trained_len)
    if "attention_factor" in source.values:
        attention_factor = source.number("attention_factor")
    elif factor <= 1:
        attention_factor = 1.0
    elif trained_len == 1:
        raise UnsupportedModelError(
            "config.json: original_max_position_embeddings=1 must be above 1"
        )
    else:
        attention_factor = math.sqrt(1 + math.log(factor) / math.log(trained_len))
    return LongRopeScaling(
        short=source.numbers("short_factor", count),
        long=source.numbers("long_factor", count),
        trained_len=trained_len,
        attention_factor=attention_factor,
    )


_READERS: Mapping[str, Callable[[_Source], Scaling]] = {
    "default": lambda source: NoScaling(),  # noqa: ARG005
    "linear": lambda source: LinearScaling(source.number("factor")),
    "dynamic": lambda source: DynamicScaling(source.number("factor"), source.max_len),
    "llama3": _read_llama3,
    "yarn": _read_yarn,
    "longrope": _read_longrope,
}
"""The kinds of rotary embeddings, by their name in config.json."""
