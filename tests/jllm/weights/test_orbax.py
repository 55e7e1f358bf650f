"""Checkpoints written by orbax: any mesh, only its slices, and damaged ones."""

import functools
import json
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore
from safetensors.numpy import load_file, save_file

from jllm.errors import CheckpointError
from jllm.models.base import ModelOptions
from jllm.models.registry import build_model
from jllm.weights import orbax
from jllm.weights.formats import checkpoint_tensors
from jllm.weights.host_memory import HostMemory
from jllm.weights.hub import resolve_model
from jllm.weights.loader import lay_out, load_weights, read_slice
from shardings.mesh import make_mesh
from shardings.place import tree_shardings
from tests.engines import LLAMA, QWEN3, random_tensors

SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_key_value_heads": 2}
CONFIGS = {
    "llama": {**LLAMA, **SMALL},
    "biases": {**LLAMA, **SMALL, "attention_bias": True, "mlp_bias": True},
    "qwen3": {**QWEN3, **SMALL, "tie_word_embeddings": True},
}
SIZES = (1, 2, 4, 8)
"""Two KV heads, so that 4 and 8 devices hold copies of them."""
BYTES_READ = "/tensorstore/kvstore/file/bytes_read"


@functools.cache
def source(kind, root):
    """A folder in Hugging Face's layout."""
    config, folder = CONFIGS[kind], root / kind
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    tensors = random_tensors(config)
    if kind == "biases":
        rng = np.random.default_rng(1)
        for name in list(tensors):
            if "_proj" in name:
                bias = rng.normal(size=tensors[name].shape[0]).astype(np.float32)
                tensors[name.replace("weight", "bias")] = bias
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("orbax")


def network(folder, size):
    files = resolve_model(str(folder))
    mesh = make_mesh(tensor=size, devices=jax.devices()[:size])
    return files, mesh, build_model(files.config, ModelOptions(mesh=mesh)).specs()


def load(folder, size, dtype="float32"):
    files, mesh, specs = network(folder, size)
    return load_weights(files, specs, tree_shardings(specs, mesh), dtype)


@functools.cache
def saved(kind, size, root, dtype="float32"):
    """The same model as `size` devices save it."""
    folder = root / f"{kind}-{size}-{dtype}"
    folder.mkdir()
    shutil.copy(source(kind, root) / "config.json", folder)
    weights = load(source(kind, root), size, dtype)
    orbax.save(folder, weights, CONFIGS[kind])
    return folder


def bytes_read():
    (metric,) = tensorstore.experimental_collect_matching_metrics(BYTES_READ) or [None]
    return 0 if metric is None else metric["values"][0]["value"]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("saved_size", SIZES)
@pytest.mark.parametrize("kind", CONFIGS)
def test_any_mesh_reads_what_another_one_saved(root, kind, saved_size, size):
    expected = load(source(kind, root), size)
    found = load(saved(kind, saved_size, root), size)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.sharding == b.sharding
        for mine, theirs in zip(
            a.addressable_shards, b.addressable_shards, strict=True
        ):
            assert mine.index == theirs.index
            assert np.array_equal(mine.data, theirs.data)


def read_by_device(folder, size, device):
    """Bytes that one device's slices take, and bytes that were read for them."""
    files, mesh, specs = network(folder, size)
    places = tree_shardings(specs, mesh)
    tensors = checkpoint_tensors(files)
    before, used = bytes_read(), 0
    for spec, place in zip(
        jax.tree.leaves(specs), jax.tree.leaves(places), strict=True
    ):
        index = place.devices_indices_map(spec.shape)[mesh.devices.flat[device]]
        bounds = tuple(
            entry.indices(length)[:2]
            for entry, length in zip(index, spec.shape, strict=True)
        )
        sections = lay_out("parameter", spec, tensors)
        part = read_slice(spec, sections, bounds, np.dtype("float32"), HostMemory(0))
        used += part.nbytes
    return used, bytes_read() - before, len(jax.tree.leaves(specs))


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("saved_size", [2])
def test_a_device_reads_only_its_slices(root, saved_size, size):
    """To the byte, beside descriptions: the slices are whole files."""
    folder = saved("llama", saved_size, root)
    for device in range(size):
        used, read, count = read_by_device(folder, size, device)
        described = 400 * count
        assert used <= read <= used + described


def test_a_finer_mesh_reads_the_files_that_hold_its_slices(root):
    """A fourth of the model lies in files that hold a half of it."""
    folder = saved("llama", 2, root)
    whole, _, count = read_by_device(folder, 1, 0)
    for device in range(4):
        _, read, _ = read_by_device(folder, 4, device)
        assert read <= whole / 2 + 400 * count + 5 * 64 * 4


def test_it_is_an_orbax_checkpoint(root):
    """Whoever has orbax reads the tree without jllm."""
    folder = saved("llama", 2, root)
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False)
    with ocp.Checkpointer(handler) as checkpointer:
        template = jax.tree.map(
            lambda array: jax.ShapeDtypeStruct(
                array.shape, array.dtype, sharding=array.sharding
            ),
            expected := load(source("llama", root), 2),
        )
        restore = ocp.checkpoint_utils.construct_restore_args(template)
        tree = checkpointer.restore(
            folder / orbax.FOLDER,
            args=ocp.args.PyTreeRestore(item=template, restore_args=restore),
        )
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True):
        assert np.array_equal(a, b)


def test_tensors_have_their_names_and_values_back(root):
    files = resolve_model(str(saved("biases", 8, root)))
    tensors = checkpoint_tensors(files)
    expected = load_file(source("biases", root) / "model.safetensors")
    assert set(tensors) == set(expected)
    for name, array in expected.items():
        assert tensors[name].shape == array.shape
        np.testing.assert_array_equal(tensors[name].map(), array)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_types_keep_their_bits(root, dtype):
    expected = load(source("llama", root), 2, dtype)
    found = load(saved("llama", 2, root, dtype), 2, dtype)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture
def copy(root, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(saved("llama", 2, root), folder)
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda chunk: chunk.write_bytes(chunk.read_bytes()[:-1]), "has .* bytes"),
        (lambda chunk: chunk.write_bytes(b""), "has 0 bytes"),
        (lambda chunk: chunk.unlink(), "is missing"),
    ],
)
def test_a_damaged_file_is_named(copy, change, message):
    chunk = copy / orbax.FOLDER / "layers.1.down" / "0.1"
    change(chunk)
    with pytest.raises(CheckpointError, match=message) as error:
        load(copy, 4)
    assert str(chunk) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_goes_after_the_check(copy):
    tensors = checkpoint_tensors(resolve_model(str(copy)))
    tensor = tensors["model.layers.1.mlp.down_proj.weight"]
    (copy / orbax.FOLDER / "layers.1.down" / "0.1").write_bytes(b"abc")
    with pytest.raises(CheckpointError, match=r"layers\.1\.down: cannot be read"):
        tensor.map()[:]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"shape": [2, 2, 36, 64]}, r"\.zarray: shape \[2, 2, 36, 64\] is not"),
        ({"shape": None}, "shape None is not"),
        ({"chunks": [1, 2, 5, 64]}, "do not divide"),
        ({"chunks": [1, 2]}, "do not divide"),
        ({"chunks": None}, "do not divide"),
        ({"dtype": "<i4"}, "dtype='<i4' must be one of"),
        ({"compressor": {"id": "zstd"}}, "without compressor"),
    ],
)
def test_a_description_that_contradicts_the_model(copy, values, message):
    file = copy / orbax.FOLDER / "layers.0.gate_up" / ".zarray"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    with pytest.raises(CheckpointError, match=message) as error:
        load(copy, 1)
    assert str(file) in str(error.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"format": "other"}, "format 'other' version 1 is not known"),
        ({"version": 2}, "version 2 is not known"),
        ({"architecture": "Qwen3ForCausalLM"}, "contradicts 'LlamaForCausalLM'"),
        ({"tensor_parallel_size": 0}, "must be an integer"),
        ({"tensor_parallel_size": "2"}, "must be an integer"),
        ({"tensor_parallel_size": 3}, "tensor_parallel_size=3 must divide"),
        ({"tensor_parallel_size": 4}, r"embed|gate_up|qkv"),
    ],
)
def test_a_layout_that_is_not_known(copy, values, message):
    file = copy / orbax.FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    with pytest.raises(CheckpointError, match=message) as error:
        load(copy, 1)
    assert str(copy) in str(error.value)


def test_a_parameter_too_many_and_none_at_all(copy):
    folder = copy / orbax.FOLDER
    shutil.copytree(folder / "norms", folder / "layers.9.qkv")
    with pytest.raises(CheckpointError, match=r"layers\.9\.qkv: belongs to no"):
        load(copy, 1)
    shutil.rmtree(folder)
    with pytest.raises(CheckpointError, match="no such folder"):
        load(copy, 1)
