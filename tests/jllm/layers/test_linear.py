import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jllm.layers import linear as layers
from jllm.layers.linear import linear, linear_float32


def draw(shape, dtype, seed):
    values = np.random.default_rng(seed).normal(size=shape)
    return jnp.asarray(values, dtype)


def exact(x, weight):
    wide = [np.asarray(a, np.float64) for a in (x, weight)]
    return np.tensordot(wide[0], wide[1], (-1, -1))


@pytest.mark.parametrize("num_outputs", [1, 7, 64, 100, 129])
@pytest.mark.parametrize("tile", [64, 250, 1 << 20])
def test_one_bfloat16_row(monkeypatch, num_outputs, tile):
    """In tiles that divide the outputs or do not, or as two rows where it is small."""
    monkeypatch.setattr(layers, "TILE_ELEMENTS", tile)
    x, weight = draw((1, 24), "bfloat16", 0), draw((num_outputs, 24), "bfloat16", 1)
    out = jax.jit(linear_float32)(x, weight)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, exact(x, weight), rtol=1e-5, atol=1e-5)


def test_tiles_are_widened_in_a_loop(monkeypatch):
    """Neither the weight nor its bits are copied as a whole."""
    monkeypatch.setattr(layers, "TILE_ELEMENTS", 1024)
    x, weight = draw((1, 32), "bfloat16", 0), draw((512, 32), "bfloat16", 1)
    program = jax.jit(linear_float32).lower(x, weight).compile()
    assert program.memory_analysis().temp_size_in_bytes < weight.nbytes
    assert "while(" in program.as_text()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_weights_of_more_dimensions_and_bias(dtype, rows):
    x, weight = draw((rows, 16), dtype, 0), draw((3, 4, 16), dtype, 1)
    bias = draw((3, 4), dtype, 2)
    out = linear(x, weight, bias)
    assert out.shape == (rows, 3, 4)
    assert out.dtype == x.dtype
    expected = exact(x, weight) + np.asarray(bias, np.float64)
    tolerance = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 2e-3}[dtype]
    np.testing.assert_allclose(
        np.asarray(out, np.float64), expected, rtol=tolerance, atol=tolerance
    )
