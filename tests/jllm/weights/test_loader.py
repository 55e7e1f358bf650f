import dataclasses
import io
import pathlib
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jllm.errors import CheckpointError
from jllm.models.base import ParamSpec, Part, parameter_bytes, parameter_count
from jllm.weights import loader
from jllm.weights.host_memory import HostMemory
from jllm.weights.hub import CheckpointFiles, resolve_model
from jllm.weights.loader import load_weights
from jllm.weights.tensors import StoredTensor, find_tensors
from shardings.mesh import make_mesh, replica_meshes
from shardings.place import tree_shardings

H, K, D, E, F, V = 8, 4, 6, 12, 16, 13
TENSORS = {
    "embed": (V, E),
    "q": (H * D, E),
    "k": (K * D, E),
    "v": (K * D, E),
    "k_bias": (K * D,),
    "out": (E, H * D),
    "gate": (F, E),
    "up": (F, E),
    "norm.0": (E,),
    "norm.1": (E,),
}


def make_arrays(dtype=np.float32):
    rng = np.random.default_rng(0)
    return {
        name: rng.standard_normal(shape).astype(dtype)
        for name, shape in TENSORS.items()
    }


def make_specs(tensor=1):
    """Parameters of every form, for a mesh of so many devices."""
    heads = max(K, tensor)
    copies = heads // K
    qkv = (
        Part("q", shape=(H * D, E)),
        Part("k", repeat=copies, shape=(K * D, E)),
        Part("v", repeat=copies),
    )
    rows = (H // heads + 2) * D
    return {
        "embed": ParamSpec((16, E), ("vocab", None), (Part("embed"),), pad_axis=0),
        "norms": ParamSpec(
            (2, E), (None, None), (Part("norm.0"), Part("norm.1")), init="ones"
        ),
        "layers": [
            {
                "qkv": ParamSpec(
                    (heads, rows, E), ("kv_heads", None, None), qkv, concat_axis=1
                ),
                "k_bias": ParamSpec(
                    (heads, D), ("kv_heads", None), (Part("k_bias", repeat=copies),)
                ),
                "out": ParamSpec(
                    (E, H * D), (None, "heads"), (Part("out", shape=(E, H * D)),)
                ),
                "gate_up": ParamSpec(
                    (2, F, E), (None, "mlp", None), (Part("gate"), Part("up"))
                ),
            }
        ],
    }


def expected_weights(arrays, tensor=1):
    """The same parameters, put together in plain NumPy."""
    heads = max(K, tensor)
    copies = heads // K
    embed = np.zeros((16, E), arrays["embed"].dtype)
    embed[:V] = arrays["embed"]
    keys, values = (
        np.repeat(arrays[name].reshape(K, D, E), copies, axis=0) for name in "kv"
    )
    queries = arrays["q"].reshape(heads, -1, E)
    return {
        "embed": embed,
        "norms": np.stack([arrays["norm.0"], arrays["norm.1"]]),
        "layers": [
            {
                "qkv": np.concatenate([queries, keys, values], axis=1),
                "k_bias": np.repeat(arrays["k_bias"].reshape(K, D), copies, axis=0),
                "out": arrays["out"],
                "gate_up": np.stack([arrays["gate"], arrays["up"]]),
            }
        ],
    }


def save(folder, arrays):
    save_file(arrays, folder / "model.safetensors")
    return CheckpointFiles(folder, {}, {})


def load(files, tensor=1, dtype="float32", specs=None, **options):
    specs = specs or make_specs(tensor)
    places = tree_shardings(specs, make_mesh(tensor=tensor))
    return load_weights(files, specs, places, dtype, **options)


@pytest.mark.parametrize("tensor", [1, 2, 4, 8])
@pytest.mark.parametrize("stored", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_device_gets_its_slice(tmp_path, tensor, stored, dtype):
    arrays = make_arrays(stored)
    weights = load(save(tmp_path, arrays), tensor, dtype)
    expected = expected_weights(arrays, tensor)
    assert jax.tree.structure(weights) == jax.tree.structure(expected)
    places = tree_shardings(make_specs(tensor), make_mesh(tensor=tensor))
    for array, want, place in zip(
        *map(jax.tree.leaves, (weights, expected, places)), strict=True
    ):
        assert array.dtype == np.dtype(dtype)
        assert array.sharding == place
        for shard in array.addressable_shards:
            piece = want[shard.index].astype(dtype)
            assert np.array_equal(np.asarray(shard.data), piece)


def test_replicas_load_onto_their_own_devices(tmp_path):
    files = save(tmp_path, make_arrays())
    meshes = replica_meshes(make_mesh(tensor=2, data=2))
    specs = make_specs(2)
    for mesh in meshes:
        weights = load_weights(files, specs, tree_shardings(specs, mesh), "float32")
        devices = set().union(*(leaf.devices() for leaf in jax.tree.leaves(weights)))
        assert devices == set(mesh.devices.flat)


@pytest.mark.parametrize("tensor", [1, 4, 8])
def test_each_byte_is_read_once_and_one_parameter_at_a_time(
    tmp_path, monkeypatch, tensor
):
    """Replicated parameters are read once for all devices, divided ones by slice."""
    files = save(tmp_path, make_arrays())
    specs = make_specs(tensor)
    sizes = []
    original = loader.read_slice

    def count(*args):
        result = original(*args)
        sizes.append(result.nbytes)
        return result

    monkeypatch.setattr(loader, "read_slice", count)
    load(files, tensor)
    assert sum(sizes) == parameter_bytes(specs, "float32")
    largest = max(spec.size * 4 for spec in jax.tree.leaves(specs))
    assert max(sizes) <= largest
    assert len(sizes) == 5 * tensor + 1  # five divided leaves, and the norms


def test_only_the_slice_of_a_tensor_is_touched(tmp_path, monkeypatch):
    """A device's share is read from views, never from a copy of the whole tensor."""
    touched = []

    class Watched(np.ndarray):
        def __getitem__(self, key):
            part = super().__getitem__(key)
            touched.append(part.size)
            return part

    original = StoredTensor.map
    monkeypatch.setattr(StoredTensor, "map", lambda self: original(self).view(Watched))
    files = save(tmp_path, make_arrays())
    spec = make_specs()["layers"][0]["out"]
    sections = loader.lay_out("out", spec, find_tensors(files.path))
    bounds, dtype = ((0, E), (6, 12)), np.dtype("float32")
    piece = loader.read_slice(spec, sections, bounds, dtype, HostMemory(0))
    assert np.array_equal(piece, make_arrays()["out"][:, 6:12])
    assert touched == [piece.size]


def test_counts():
    specs = make_specs()
    count = sum(np.prod(shape) for shape in TENSORS.values()) + (16 - V) * E
    assert parameter_count(specs) == count
    assert parameter_bytes(specs, "bfloat16") == 2 * count


@pytest.mark.parametrize("name", TENSORS)
def test_missing_tensor(tmp_path, name):
    arrays = make_arrays()
    del arrays[name]
    with pytest.raises(CheckpointError, match=f"tensor '{name}' is missing"):
        load(save(tmp_path, arrays))


def test_extra_tensor(tmp_path):
    extra = {"adapter": np.zeros((2, 3), np.float32)}
    files = save(tmp_path, make_arrays() | extra)
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors: tensor 'adapter' of shape \(2, 3\)"
    ):
        load(files)
    load(files, ignore=("adapter",))


def test_tensors_that_follow_from_the_config_are_ignored(tmp_path):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    load(save(tmp_path, make_arrays() | {name: np.zeros(4, np.float64)}))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("out", (H * D, E)),  # transposed
        ("out", (E * H * D,)),
        ("out", (E, H * D + 1)),
        ("gate", (E, F)),
        ("gate", (F + 1, E)),
        ("gate", (2 * F, E)),
        ("embed", (17, E)),
        ("embed", (E, V)),
        ("norm.0", (E + 1,)),
        ("norm.0", (0,)),
        ("norm.0", ()),
        ("q", (K * D, E)),
        ("k", (K, D * E)),
        ("k", ((K + 1) * D, E)),
        ("k_bias", (K * D + 1,)),
    ],
)
def test_misshapen_tensor_names_file_tensor_and_both_shapes(tmp_path, name, shape):
    arrays = make_arrays() | {name: np.zeros(shape, np.float32)}
    with pytest.raises(CheckpointError) as error:
        load(save(tmp_path, arrays))
    message = str(error.value)
    assert str(tmp_path / "model.safetensors") in message
    assert f"tensor '{name}' has shape {shape}" in message
    assert "of shape (" in message


def test_declared_shape_is_exact(tmp_path):
    files = save(tmp_path, {"embed": np.zeros((V - 1, E), np.float32)})
    part = Part("embed", shape=(V, E))
    specs = {"embed": ParamSpec((16, E), (None, None), (part,), pad_axis=0)}
    with pytest.raises(
        CheckpointError, match=rf"\({V - 1}, {E}\) instead of \({V}, {E}\)"
    ):
        load(files, specs=specs)


def test_integer_weights_are_refused(tmp_path):
    arrays = make_arrays() | {"out": np.zeros((E, H * D), np.int8)}
    with pytest.raises(CheckpointError, match="'out' has type I8"):
        load(save(tmp_path, arrays))


def test_values_that_the_type_cannot_hold(tmp_path):
    arrays = make_arrays()
    arrays["out"][3, 5] = 1e6
    files = save(tmp_path, arrays)
    with pytest.raises(CheckpointError, match="'out' has values that float16 cannot"):
        load(files, dtype="float16")
    load(files, dtype="bfloat16")


def test_nothing_is_read_before_all_is_checked(tmp_path, monkeypatch):
    def fail(*_args):
        raise AssertionError("read")

    monkeypatch.setattr(loader, "read_slice", fail)
    arrays = make_arrays() | {"adapter": np.zeros(2, np.float32)}
    with pytest.raises(CheckpointError):
        load(save(tmp_path, arrays))


@pytest.mark.parametrize("progress", [True, False])
def test_progress_by_bytes_on_a_terminal(tmp_path, monkeypatch, progress):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    load(save(tmp_path, make_arrays()), progress=progress)
    shown = terminal.getvalue()
    assert ("Loading weights: 100%" in shown) == progress
    assert ("B/s" in shown) == progress


@pytest.mark.parametrize(
    "spec",
    [
        {"shape": (2, 3), "axes": (None,)},
        {"shape": (), "axes": ()},
        {"shape": (2, 3), "axes": (None, None), "pad_axis": 1},
        {"shape": (2, 3), "axes": (None, None), "init": "uniform"},
        {"shape": (2, 3), "axes": (None, None), "parts": ()},
    ],
)
def test_declarations_that_contradict_themselves(spec):
    with pytest.raises(ValueError, match="="):
        ParamSpec(**{"parts": (Part("a"),), **spec})


def test_real_checkpoint(shared_data):
    files = resolve_model(str(shared_data / "data" / "stories260K"))
    width, mlp = files.config["hidden_size"], files.config["intermediate_size"]
    specs = {
        "embed": ParamSpec(
            (files.config["vocab_size"], width),
            ("vocab", None),
            (Part("model.embed_tokens.weight"),),
        ),
        "gate_up": ParamSpec(
            (2, mlp, width),
            (None, "mlp", None),
            tuple(
                Part(f"model.layers.4.mlp.{kind}_proj.weight")
                for kind in ("gate", "up")
            ),
        ),
    }
    weights = load(files, 4, specs=specs, ignore=("weight",))
    from safetensors.numpy import load_file

    arrays = load_file(files.path / "model.safetensors")
    assert np.array_equal(weights["embed"], arrays["model.embed_tokens.weight"])
    assert np.array_equal(
        weights["gate_up"][1], arrays["model.layers.4.mlp.up_proj.weight"]
    )


GROUP = (H // K + 2) * D


def fused_arrays(arrays):
    """The projections as other families' checkpoints have them."""
    stacked = np.concatenate([arrays[name] for name in "qkv"])
    by_group = [arrays[name].reshape(K, -1, E) for name in "qkv"]
    return {
        "stacked": stacked,
        "inputs_first": np.ascontiguousarray(stacked.T),
        "grouped": np.concatenate(by_group, axis=1).reshape(K * GROUP, E),
    }


def fused_parts(name, copies):
    """Its queries, keys and values."""
    groups = K if name == "grouped" else 1
    sizes = [size // groups for size in (H * D, K * D, K * D)]
    ends = np.cumsum([0, *sizes]).tolist()
    shape = (E, K * GROUP) if name == "inputs_first" else (K * GROUP, E)
    return tuple(
        Part(
            name,
            repeat=repeat,
            shape=shape,
            transposed=name == "inputs_first",
            groups=groups,
            rows=(ends[i], ends[i + 1]),
        )
        for i, repeat in enumerate((1, copies, copies))
    )


def fused_spec(name, tensor):
    heads = max(K, tensor)
    shape = (heads, (H // heads + 2) * D, E)
    axes = ("kv_heads", None, None)
    return ParamSpec(shape, axes, fused_parts(name, heads // K), concat_axis=1)


@pytest.mark.parametrize("tensor", [1, 2, 4, 8])
@pytest.mark.parametrize("name", ["stacked", "inputs_first", "grouped"])
def test_a_tensor_that_holds_queries_keys_and_values(tmp_path, name, tensor):
    arrays = make_arrays()
    files = save(tmp_path, {name: fused_arrays(arrays)[name]})
    loaded = load(files, tensor, specs={"qkv": fused_spec(name, tensor)})
    expected = expected_weights(arrays, tensor)["layers"][0]["qkv"]
    np.testing.assert_array_equal(loaded["qkv"], expected)
    shares = [shard.data.shape[0] for shard in loaded["qkv"].addressable_shards]
    assert shares == [max(K, tensor) // tensor] * tensor


@pytest.mark.parametrize("name", ["stacked", "inputs_first", "grouped"])
def test_shares_of_a_tensor_are_views(name):
    """So that only what a device needs of them is read from the file."""
    stored = fused_arrays(make_arrays())[name]
    for tensor in (1, 8):
        file = pathlib.Path("unread")
        tensors = {
            name: StoredTensor(name, file, "F32", stored.shape, 0, stored.nbytes)
        }
        for section in loader.lay_out("qkv", fused_spec(name, tensor), tensors):
            assert np.shares_memory(section.view(stored), stored)


@pytest.mark.parametrize("change", [{"rows": (0, 99)}, {"groups": 5}, {"groups": 3}])
def test_shares_beyond_the_tensor_are_refused(tmp_path, change):
    arrays = fused_arrays(make_arrays())
    files = save(tmp_path, {"grouped": arrays["grouped"]})
    spec = fused_spec("grouped", 1)
    parts = (dataclasses.replace(spec.parts[0], **change), *spec.parts[1:])
    specs = {"qkv": dataclasses.replace(spec, parts=parts)}
    with pytest.raises(CheckpointError, match="'grouped' has shape"):
        load(files, specs=specs)


@pytest.mark.parametrize("prefix", ["transformer.", "model.", "gpt_neox."])
def test_a_checkpoint_without_the_prefix_of_the_body(tmp_path, prefix):
    arrays = {"h.0.weight": np.ones((3, 4), np.float32)}
    part = Part(f"{prefix}h.0.weight", shape=(3, 4))
    specs = {"weight": ParamSpec((3, 4), (None, None), (part,))}
    files = save(tmp_path, arrays)
    np.testing.assert_array_equal(load(files, specs=specs)["weight"], 1)
    other = dataclasses.replace(part, name="body.h.0.weight")
    specs = {"weight": ParamSpec((3, 4), (None, None), (other,))}
    with pytest.raises(CheckpointError, match=r"'body\.h\.0\.weight' is missing"):
        load(files, specs=specs)


@pytest.mark.parametrize("name", ["h.0.attn.bias", "layers.0.attention.masked_bias"])
def test_causal_masks_in_old_checkpoints_are_left(tmp_path, name):
    arrays = make_arrays() | {name: np.ones((1, 1, 4, 4), np.float32)}
    load(save(tmp_path, arrays))
