"""Device inputs of the sampler from row specifications."""

import jax.numpy as jnp
import numpy as np
import pytest

from jllm.sampling.rows import SamplingRows, TokenHistory
from jllm.sampling.rules import RuleLayout, pack_rules

BLOCK_SIZE = 4
NUM_BLOCKS = 512
MAX_BLOCKS = 160


@pytest.fixture(scope="session")
def make_rows():
    """Makes `SamplingRows`; positions are those after the contexts, or as given."""

    def make(specs, *, seed=1, position=None):
        def floats(name):
            return jnp.asarray([getattr(s, name) for s in specs], jnp.float32)

        def ints(values):
            return jnp.asarray(values, jnp.int32)

        lengths = [len(s.prompt) + len(s.output) for s in specs]
        names = ["temperature", "top_p", "min_p", "presence", "frequency", "repetition"]
        words = [seed & 0xFFFFFFFF, seed >> 32]
        return SamplingRows(
            **{name: floats(name) for name in names},
            top_k=ints([s.top_k for s in specs]),
            seed=jnp.asarray([words] * len(specs), jnp.uint32),
            position=ints(lengths if position is None else position),
            prompt_len=ints([len(s.prompt) for s in specs]),
            min_tokens=ints([s.min_tokens for s in specs]),
        )

    return make


@pytest.fixture(scope="session")
def make_history():
    """Makes a `TokenHistory` with scattered blocks and garbage in unused places."""

    def make(specs, *, vocab_size):
        rng = np.random.default_rng(0)
        tokens = rng.integers(0, vocab_size, (NUM_BLOCKS, BLOCK_SIZE))
        tables = rng.integers(0, NUM_BLOCKS, (len(specs), MAX_BLOCKS))
        free = list(rng.permutation(NUM_BLOCKS))
        for row, spec in enumerate(specs):
            context = spec.prompt + spec.output
            for start in range(0, len(context), BLOCK_SIZE):
                part = context[start : start + BLOCK_SIZE]
                block = free.pop()
                tables[row, start // BLOCK_SIZE] = block
                tokens[block, : len(part)] = part
        lengths = [len(s.prompt) + len(s.output) for s in specs]
        return TokenHistory(
            block_tokens=jnp.asarray(tokens, jnp.int32),
            block_tables=jnp.asarray(tables, jnp.int32),
            lengths=jnp.asarray(lengths, jnp.int32),
        )

    return make


@pytest.fixture(scope="session")
def make_rules():
    """Packs the rules of all rows."""

    def make(specs, *, vocab_size):
        layout = RuleLayout(vocab_size)
        return jnp.asarray(np.stack([pack_rules(layout, s.rules) for s in specs]))

    return make
