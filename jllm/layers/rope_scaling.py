"""The ways in which rotary frequencies are stretched over a longer context.

Sources: position interpolation, arXiv:2306.15595; YaRN, and the dynamic kind before it,
arXiv:2309.00071; LongRoPE, arXiv:2402.13753; The Llama 3 Herd of Models,
arXiv:2407.21783.
"""

import dataclasses
import math

import numpy as np
from jaxtyping import Float


@dataclasses.dataclass(frozen=True, slots=True)
class NoScaling:
    """The frequencies as they are."""

    def apply(
        self, theta: float, rotary_dim: int, max_model_len: int
    ) -> tuple[Float[np.ndarray, " F"], float]:
        """The frequencies of a model, and the factor on sine and cosine.

        Args:
            theta: Base of the wavelengths.
            rotary_dim: Rotated features, two for each frequency.
            max_model_len: Longest context that the engine allows.
        """
        del max_model_len
        return 1.0 / _powers(theta, rotary_dim), 1.0


@dataclasses.dataclass(frozen=True, slots=True)
class LinearScaling:
    """Positions divided by `factor`."""

    factor: float

    def apply(
        self, theta: float, rotary_dim: int, max_model_len: int
    ) -> tuple[Float[np.ndarray, " F"], float]:
        """See `NoScaling`."""
        del max_model_len
        return 1.0 / _powers(theta, rotary_dim) / self.factor, 1.0


@dataclasses.dataclass(frozen=True, slots=True)
class DynamicScaling:
    """A base that grows with the context beyond `trained_len` tokens."""

    factor: float
    trained_len: int

    def apply(
        self, theta: float, rotary_dim: int, max_model_len: int
    ) -> tuple[Float[np.ndarray, " F"], float]:
        """See `NoScaling`."""
        length = max(max_model_len, self.trained_len)
        growth = self.factor * length / self.trained_len - (self.factor - 1)
        exponent = rotary_dim / (rotary_dim - 2)
        return 1.0 / _powers(theta * growth**exponent, rotary_dim), 1.0


@dataclasses.dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Long wavelengths divided by `factor`, short ones kept, a ramp between them.

    Attributes:
        factor: Divides the frequencies of long wavelengths.
        low: Turns within `trained_len` below which a wavelength is long.
        high: Turns above which it is short.
        trained_len: Context that the model was trained on first.
    """

    factor: float
    low: float
    high: float
    trained_len: int

    def apply(
        self, theta: float, rotary_dim: int, max_model_len: int
    ) -> tuple[Float[np.ndarray, " F"], float]:
        """See `NoScaling`."""
        del max_model_len
        inv_freq = 1.0 / _powers(theta, rotary_dim)
        turns = self.trained_len * inv_freq / (2 * math.pi)
        # Equal bounds make a step of the ramp.
        width = max(self.high - self.low, 1e-12)
        keep = np.clip((turns - self.low) / width, 0.0, 1.0)
        return inv_freq * (keep + (1 - keep) / self.factor), 1.0


@dataclasses.dataclass(frozen=True, slots=True)
class YarnScaling:
    """Fast pairs kept, slow ones divided by `factor`, a ramp over the pairs between.

    Attributes:
        factor: Divides the frequencies of slow pairs.
        trained_len: Context that the model was trained on first.
        fast: Turns within `trained_len` above which a pair is fast.
        slow: Turns below which it is slow.
        attention_factor: Factor on sine and cosine.
        truncate: Whether the ramp begins and ends at whole pairs.
    """

    factor: float
    trained_len: int
    fast: float
    slow: float
    attention_factor: float
    truncate: bool

    def apply(
        self, theta: float, rotary_dim: int, max_model_len: int
    ) -> tuple[Float[np.ndarray, " F"], float]:
        """See `NoScaling`."""
        del max_model_len
        first, last = [
            self._pair(theta, rotary_dim, turns) for turns in (self.fast, self.slow)
        ]
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, rotary_dim - 1)
        width = last - first if last != first else 0.001
        pairs = np.arange(rotary_dim // 2, dtype=np.float64)
        keep = 1.0 - np.clip((pairs - first) / width, 0.0, 1.0)
        inv_freq = 1.0 / _powers(theta, rotary_dim)
        return inv_freq * (keep + (1 - keep) / self.factor), self.attention_factor

    def _pair(self, theta: float, rotary_dim: int, turns: float) -> float:
        """Index, between pairs, of the one that turns so often in `trained_len`."""
        wavelength = self.trained_len / (turns * 2 * math.pi)
        return rotary_dim * math.log(wavelength) / (2 * math.log(theta))


@dataclasses.dataclass(frozen=True, slots=True)
class LongRopeScaling:
    """A factor of its own for each pair, one set of them for long contexts.

    Attributes:
        short: Divisors of the frequencies up to `trained_len` tokens.
        long: Divisors for longer contexts.
        trained_len: Context that the model was trained on first.
        attention_factor: Factor on sine and cosine.
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    trained_len: int
    attention_factor: float

    def apply(
        self, theta: float, rotary_dim: int, max_model_len: int
    ) -> tuple[Float[np.ndarray, " F"], float]:
        """See `NoScaling`."""
        factors = self.long if max_model_len > self.trained_len else self.short
        return 1.0 / (
            np.asarray(factors) * _powers(theta, rotary_dim)
        ), self.attention_factor


Scaling = (
    NoScaling
    | LinearScaling
    | DynamicScaling
    | Llama3Scaling
    | YarnScaling
    | LongRopeScaling
)
"""A way to stretch the frequencies of a model over a longer context."""


def _powers(theta: float, rotary_dim: int) -> Float[np.ndarray, " F"]:
    """Positions per radian of each pair of features."""
    return theta ** (np.arange(0, rotary_dim, 2, dtype=np.float64) / rotary_dim)
