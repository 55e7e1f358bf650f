import json

import hypothesis
import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save, save_file

from jllm.errors import CheckpointError
from jllm.weights.tensors import INDEX_FILE, SINGLE_FILE, find_tensors, read_header

ARRAYS = {
    "a": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b": np.arange(6, dtype=np.float16).reshape(2, 3),
    "c": np.arange(5).astype(ml_dtypes.bfloat16),
    "scalar": np.array(3.0, np.float32),
}
GOOD = save(ARRAYS)
HEADER = 8 + int.from_bytes(GOOD[:8], "little")


def encode(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(start, stop, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


def write_shards(folder, index, **shards):
    for name, arrays in shards.items():
        save_file(arrays, folder / f"{name}.safetensors")
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": index}))


def test_tensors_are_mapped_with_their_values(tmp_path):
    path = tmp_path / SINGLE_FILE
    path.write_bytes(GOOD)
    tensors = find_tensors(tmp_path)
    assert set(tensors) == set(ARRAYS)
    for name, array in ARRAYS.items():
        tensors[name].check_readable()
        mapped = tensors[name].map()
        assert mapped.dtype == array.dtype
        np.testing.assert_array_equal(mapped, array)
        assert not mapped.flags.writeable
        assert not mapped.flags.owndata


def test_header_of_odd_length(tmp_path):
    header = {"a": entry(0, 8)}
    text = json.dumps(header).encode()
    text += b" " * (1 - len(text) % 2)
    data = np.array([1.5, -2.0], np.float32).tobytes()
    path = tmp_path / "x.safetensors"
    path.write_bytes(encode(text, data))
    np.testing.assert_array_equal(read_header(path)["a"].map(), [1.5, -2.0])


@pytest.mark.parametrize(
    "length", [*range(0, HEADER + 1, 7), 7, 8, 9, HEADER, len(GOOD) - 1, len(GOOD) + 1]
)
def test_every_truncation_is_found(tmp_path, length):
    path = tmp_path / SINGLE_FILE
    path.write_bytes((GOOD + b"\0")[:length])
    with pytest.raises(CheckpointError, match="not a sound safetensors file") as error:
        find_tensors(tmp_path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        encode(b"garbage"),
        encode(b"[]"),
        encode(b'{"a": 1}'),
        encode(b"\xff\xff"),
        b"\xff" * 8 + b"{}",
        encode({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)),  # overlap
        encode({"a": entry(0, 8), "b": entry(12, 20)}, bytes(20)),  # gap
        encode({"a": entry(8, 0)}, bytes(8)),
        encode({"a": entry(0, 8, (3,))}, bytes(8)),
        encode({"a": entry(0, 8, (2**62, 2**62))}, bytes(8)),
        encode({"a": entry(0, 8, (-2,))}, bytes(8)),
        encode({"a": entry(0, 8, dtype="F33")}, bytes(8)),
        encode({"a": entry(0, 2**63)}, bytes(8)),
        encode(b'{"a":' + json.dumps(entry(0, 8)).encode() + b"}", bytes(7)),
        encode(
            b'{"a": %b, "a": %b}' % ((json.dumps(entry(0, 8)).encode(),) * 2), bytes(8)
        ),
    ],
)
def test_damaged_headers(tmp_path, content):
    (tmp_path / SINGLE_FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match="not a sound safetensors file"):
        find_tensors(tmp_path)


@hypothesis.given(
    st.lists(
        st.tuples(st.integers(0, HEADER - 1), st.integers(0, 255)),
        min_size=1,
        max_size=4,
    )
)
@hypothesis.settings(
    max_examples=200,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
def test_mutated_headers_are_refused_or_readable(tmp_path, changes):
    content = bytearray(GOOD)
    for place, value in changes:
        content[place] = value
    (tmp_path / SINGLE_FILE).write_bytes(content)
    try:
        tensors = find_tensors(tmp_path)
        for tensor in tensors.values():
            tensor.check_readable()
    except CheckpointError:
        return
    for tensor in tensors.values():
        assert tensor.map().shape == tensor.shape
        assert HEADER <= tensor.start <= tensor.stop <= len(GOOD)


@pytest.mark.parametrize("dtype", [np.int32, np.int8, np.float64, np.bool_])
def test_types_other_than_floats_are_refused(tmp_path, dtype):
    save_file({"w": np.zeros((2, 3), dtype)}, tmp_path / SINGLE_FILE)
    tensor = find_tensors(tmp_path)["w"]
    with pytest.raises(CheckpointError, match=r"'w' has type .*F32, F16, BF16"):
        tensor.check_readable()


def test_file_that_shrinks_after_the_check(tmp_path):
    path = tmp_path / SINGLE_FILE
    path.write_bytes(GOOD)
    tensor = find_tensors(tmp_path)["a"]
    path.write_bytes(GOOD[:HEADER])
    with pytest.raises(CheckpointError, match="'a' cannot be read"):
        tensor.map()


def test_shards(tmp_path):
    one, two = {"a": ARRAYS["a"]}, {"b": ARRAYS["b"]}
    index = {"a": "one.safetensors", "b": "two.safetensors"}
    write_shards(tmp_path, index, one=one, two=two)
    tensors = find_tensors(tmp_path)
    assert {name: tensor.file.name for name, tensor in tensors.items()} == index


def test_missing_shard_is_named(tmp_path):
    write_shards(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"}, one=ARRAYS)
    with pytest.raises(CheckpointError, match=r"two\.safetensors: no such file"):
        find_tensors(tmp_path)


def test_tensor_in_two_shards_is_refused(tmp_path):
    one = {"a": ARRAYS["a"]}
    index = {"a": "one.safetensors", "b": "two.safetensors"}
    write_shards(tmp_path, index, one=one, two={**one, "b": ARRAYS["b"]})
    with pytest.raises(
        CheckpointError, match=r"two\.safetensors: tensor 'a' is also in .*one\.safet"
    ):
        find_tensors(tmp_path)


def test_index_that_names_the_wrong_shard(tmp_path):
    one, two = {"a": ARRAYS["a"]}, {"b": ARRAYS["b"]}
    index = {"a": "two.safetensors", "b": "one.safetensors"}
    write_shards(tmp_path, index, one=one, two=two)
    with pytest.raises(CheckpointError, match="'a' is missing, though"):
        find_tensors(tmp_path)


@pytest.mark.parametrize(
    "file",
    [
        "../one.safetensors",
        "/etc/one.safetensors",
        "sub/one.safetensors",
        "..\\one.safetensors",
        "C:one.safetensors",
        "one.bin",
        "..",
        "",
        "x\0.safetensors",
        3,
        None,
    ],
)
def test_index_cannot_lead_out_of_its_folder(tmp_path, file):
    write_shards(tmp_path, {"a": file}, one=ARRAYS)
    with pytest.raises(CheckpointError, match="of the same folder"):
        find_tensors(tmp_path)


@pytest.mark.parametrize("weight_map", [None, {}, [], "one.safetensors"])
def test_index_without_a_map(tmp_path, weight_map):
    write_shards(tmp_path, weight_map, one=ARRAYS)
    with pytest.raises(CheckpointError, match="weight_map must name"):
        find_tensors(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.pth"])
def test_pickles_are_never_read(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match=f"only as {name}.*safetensors"):
        find_tensors(tmp_path)


def test_no_weights_at_all_and_a_folder_in_place_of_the_file(tmp_path):
    with pytest.raises(CheckpointError, match=f"neither {SINGLE_FILE} nor"):
        find_tensors(tmp_path)
    (tmp_path / SINGLE_FILE).mkdir()
    with pytest.raises(CheckpointError, match="is not a file"):
        find_tensors(tmp_path)
