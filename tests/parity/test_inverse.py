"""Parameters back to the tensors that transformers wrote, for every family."""

import functools

import jax
import numpy as np
import pytest

from jllm.models.base import ModelOptions
from jllm.models.registry import build_model
from jllm.weights.hub import resolve_model
from jllm.weights.inverse import part_arrays
from jllm.weights.loader import load_weights, used_tensors
from shardings.mesh import make_mesh
from shardings.place import tree_shardings
from tests.parity.test_families import NAMES, saved_model


def read(array, index):
    return array[index]


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("family", NAMES)
def test_every_tensor_comes_back(family, size):
    files = resolve_model(str(saved_model(family).folder))
    mesh = make_mesh(tensor=size, devices=jax.devices()[:size])
    specs = build_model(files.config, ModelOptions(mesh=mesh)).specs()
    ignore = () if "head" in specs else ("lm_head.weight",)
    places = tree_shardings(specs, mesh)
    weights = load_weights(files, specs, places, "float32", ignore=ignore)
    stored = used_tensors(files, specs, ignore=ignore)
    found = {}
    for spec, array in zip(*map(jax.tree.leaves, (specs, weights)), strict=True):
        found |= part_arrays(spec, functools.partial(read, np.asarray(array)))
    assert found.keys() == stored.keys()
    for name, tensor in stored.items():
        assert found[name].shape == tensor.shape
        np.testing.assert_array_equal(found[name], np.asarray(tensor.map()))
