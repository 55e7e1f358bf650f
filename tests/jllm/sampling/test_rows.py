"""The token history follows the block tables."""

import jax.numpy as jnp
import numpy as np

from tests.jllm.sampling.oracle import Spec


def test_tokens_at_reads_each_row_through_its_table(make_history):
    specs = [Spec(prompt=(5, 6, 7, 8, 9), output=(1, 2)), Spec(prompt=(3,))]
    history = make_history(specs, vocab_size=10)
    positions = jnp.asarray([[0, 3, 4, 6], [0, 0, 0, 0]], jnp.int32)
    tokens = np.asarray(history.tokens_at(positions))
    np.testing.assert_array_equal(tokens, [[5, 8, 9, 2], [3, 3, 3, 3]])


def test_tokens_at_survives_positions_out_of_range(make_history):
    history = make_history([Spec()], vocab_size=10)
    positions = jnp.asarray([[-1, -700, 100_000]], jnp.int32)
    tokens = np.asarray(history.tokens_at(positions))
    assert ((tokens >= 0) & (tokens < 10)).all()
