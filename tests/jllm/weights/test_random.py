import jax
import numpy as np
import pytest

from jllm.models.base import ParamSpec, Part
from jllm.weights.random import random_weights
from shardings.mesh import make_mesh
from shardings.place import tree_shardings


def make_specs(vocab=64):
    parts = (Part("unused"),)
    return {
        "embed": ParamSpec((vocab, 256), ("vocab", None), parts),
        "norms": ParamSpec((3, 256), (None, None), parts, init="ones"),
        "layers": [
            {
                "up": ParamSpec((512, 256), ("mlp", None), parts),
                "bias": ParamSpec((512,), ("mlp",), parts, init="zeros"),
            }
            for _ in range(2)
        ],
    }


def make(tensor=1, seed=0, dtype="float32", specs=None):
    specs = specs or make_specs()
    places = tree_shardings(specs, make_mesh(tensor=tensor))
    return random_weights(specs, places, dtype, seed), places


def test_same_values_on_every_mesh():
    alone, _ = make()
    divided, places = make(tensor=4)
    for one, many, place in zip(
        *map(jax.tree.leaves, (alone, divided, places)), strict=True
    ):
        assert np.array_equal(one, many)
        assert many.sharding == place


def test_values_of_a_prefix_do_not_depend_on_padding():
    """The vocabulary is padded further on more devices."""
    short, _ = make()
    long, _ = make(specs=make_specs(vocab=128))
    assert np.array_equal(short["embed"], long["embed"][:64])


def test_distribution():
    weights, _ = make()
    up = np.asarray(weights["layers"][0]["up"], np.float64) * 256**0.5
    count = up.size
    assert abs(up.mean()) < 4 / count**0.5
    assert abs(up.var() - 1) < 4 * (2 / count) ** 0.5
    assert np.all(np.asarray(weights["norms"]) == 1)
    assert np.all(np.asarray(weights["layers"][1]["bias"]) == 0)


@pytest.mark.parametrize("seed", [1, 2**32, 2**62 + 1])
def test_seed_and_place_change_the_values(seed):
    weights, _ = make()
    other, _ = make(seed=seed)
    first, second = (layer["up"] for layer in weights["layers"])
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, other["layers"][0]["up"])
    again, _ = make(seed=seed)
    assert np.array_equal(again["embed"], other["embed"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_type_rounds_the_same_values(dtype):
    wide, _ = make()
    narrow, _ = make(dtype=dtype)
    assert narrow["embed"].dtype == np.dtype(dtype)
    assert np.array_equal(narrow["embed"], wide["embed"].astype(dtype))
