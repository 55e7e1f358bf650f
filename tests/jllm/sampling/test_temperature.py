"""Weights at a temperature."""

import jax.numpy as jnp
import numpy as np
import pytest

from jllm.sampling.temperature import log_weights, weights

SCORES = np.array([[1.0, -np.inf, 4.0, 2.5]] * 3, np.float32)
TEMPERATURE = jnp.asarray([0.01, 0.0, 2.0], jnp.float32)


@pytest.mark.parametrize("shape", [(3, 4), (3, 2, 2)])
def test_weights(shape):
    scores = jnp.asarray(SCORES.reshape(shape))
    out = np.asarray(weights(scores, jnp.full(3, 4.0), TEMPERATURE)).reshape(3, 4)
    exact = np.exp((SCORES - 4.0) / np.array([[0.01], [1.0], [2.0]]))
    np.testing.assert_allclose(out, exact, rtol=1e-5, atol=1e-37)


def test_large_scores_do_not_overflow():
    scores = jnp.asarray([[3e38, 1.0, -3e38]] * 3)
    out = np.asarray(log_weights(scores, jnp.full(3, 3e38), TEMPERATURE))
    assert (out[:, 0] == 0).all()
    assert (out[:, 1:] < -1e30).all()
