"""Captured activations of a sequence, put together from what each step brought."""

from collections.abc import Mapping, Sequence

import numpy as np


def join_activations(
    pieces: Sequence[Mapping[str, np.ndarray]], num_tokens: int
) -> dict[str, np.ndarray]:
    """Joins the pieces in the order of their tokens.

    Args:
        pieces: Activations `[tokens, …]` of consecutive runs of tokens, by name. Those
            of attention weights `[tokens, H, positions]` reach as far as their tokens.
        num_tokens: Tokens that the sequence has; whatever is beyond is left out.

    Returns:
        By name `[N, …]`, and `[N, H, N]` of attention weights, with zeros for the
        positions after a token's own.
    """
    names = pieces[0] if pieces else ()
    joined: dict[str, np.ndarray] = {}
    for name in names:
        values = [piece[name] for piece in pieces]
        if name.endswith("attn.probs"):
            length = sum(len(value) for value in values)
            values = [_widened(value, length) for value in values]
            joined[name] = np.concatenate(values)[:num_tokens, :, :num_tokens]
        else:
            joined[name] = np.concatenate(values)[:num_tokens]
    return joined


def _widened(values: np.ndarray, length: int) -> np.ndarray:
    return np.pad(values, ((0, 0), (0, 0), (0, length - values.shape[2])))
