"""Rows of which each is computed in the same way, whatever the others are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jllm.engine.builder import DETERMINISTIC
from jllm.engine.options import CPU_ROW_TILES, ROW_TILES, row_tiles
from jllm.layers.linear import linear_float32
from jllm.layers.row_tiles import RowTiles, in_row_tiles

ROWS = (1, 2, 3, 7, 8, 33, 64, 150)


def test_each_platform_has_its_own():
    assert row_tiles("cpu") == CPU_ROW_TILES
    assert row_tiles("gpu") == row_tiles("tpu") == ROW_TILES


@pytest.mark.parametrize("num_rows", [1, 4, 9])
@pytest.mark.parametrize("tiles", [None, RowTiles(4), RowTiles(4, is_least=True)])
def test_each_row_is_given_back(num_rows, tiles):
    x = jnp.arange(num_rows * 3, dtype=jnp.float32).reshape(num_rows, 3)
    seen = []

    def double(rows):
        seen.append(rows.shape)
        return 2 * rows[:, :2]

    out = in_row_tiles(double, x, tiles)
    np.testing.assert_array_equal(out, 2 * x[:, :2])
    if tiles is not None:
        least = num_rows if tiles.is_least else 4
        assert set(seen) == {(max(least, 4), 3)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("inputs", "outputs"), [(96, 96), (136, 331), (768, 512)])
def test_a_product_has_the_same_bits_in_any_number_of_rows(dtype, inputs, outputs):
    rng = np.random.default_rng(0)
    weight = jnp.asarray(rng.normal(size=(outputs, inputs)), dtype)
    x = jnp.asarray(rng.normal(size=(ROWS[-1], inputs)), dtype)

    def product(rows):
        return linear_float32(rows, weight, row_tiles=CPU_ROW_TILES)

    def compiled(count):
        lowered = jax.jit(product).lower(x[:count])
        return np.asarray(lowered.compile(dict(DETERMINISTIC["cpu"]))(x[:count]))

    expected = compiled(ROWS[-1])
    for count in ROWS[:-1]:
        np.testing.assert_array_equal(compiled(count), expected[:count])
