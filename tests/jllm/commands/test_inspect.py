import json
import shutil

import huggingface_hub
import pytest
from safetensors.numpy import load_file, save_file

from jllm.cli import main
from jllm.engine.create import DEFAULT_MODEL
from tests.engines import LLAMA
from tests.published import IN_THE_DATA

KEYS = [
    "model",
    "architecture",
    "dtype",
    "kv_cache_dtype",
    "tensor_parallel_size",
    "parameters",
    "weight_bytes",
    "weight_bytes_per_device",
    "kv_bytes_per_token",
    "kv_bytes_per_token_per_device",
    "max_model_len",
    "context_bytes",
    "context_bytes_per_device",
    "checkpoint",
    "table",
]


def inspect(capsys, *arguments):
    assert main(["inspect", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def config_of(shared_data, name):
    return shared_data / "data" / "hf_configs" / f"{name}_config.json"


def test_embedded_model(capsys):
    report = inspect(capsys)
    assert list(report) == KEYS
    arrays = load_file(DEFAULT_MODEL / "model.safetensors")
    assert report["parameters"] == sum(array.size for array in arrays.values())
    assert report["weight_bytes"] == 4 * report["parameters"]
    assert report["checkpoint"] == {"tensors": len(arrays), "dtypes": ["F32"]}
    assert report["kv_bytes_per_token"] == 4 * 2 * 2 * 32 * 4  # layers, k|v, heads, D
    assert report["context_bytes"] == 512 * report["kv_bytes_per_token"]
    rows = {row["name"]: row for row in report["table"]}
    assert rows["layers.*.qkv"] == {
        "name": "layers.*.qkv",
        "count": 4,
        "shape": [2, 128, 128],
        "dtype": "float32",
        "axes": ["kv_heads", None, None],
        "mesh_axes": [["tensor"], [], []],
        "shape_per_device": [2, 128, 128],
        "bytes_per_device": 4 * 2 * 128 * 128 * 4,
    }


def test_more_devices_than_kv_heads_hold_copies(capsys):
    """The model's own sizes stay; a device's share has a whole KV head."""
    alone, shared = (
        inspect(capsys, "--tensor-parallel-size", size, "--dtype", "bfloat16")
        for size in (1, 4)
    )
    for key in ("parameters", "weight_bytes", "kv_bytes_per_token", "context_bytes"):
        assert shared[key] == alone[key]
    assert shared["kv_bytes_per_token_per_device"] * 2 == shared["kv_bytes_per_token"]
    rows = {row["name"]: row for row in shared["table"]}
    assert rows["layers.*.qkv"]["shape"] == [4, 96, 128]
    assert rows["layers.*.qkv"]["shape_per_device"] == [1, 96, 128]
    assert rows["layers.*.gate_up"]["shape_per_device"] == [1, 2, 88, 128]
    assert shared["weight_bytes_per_device"] == sum(
        row["bytes_per_device"] for row in shared["table"]
    )


def test_types_and_context(capsys):
    report = inspect(
        capsys, "--dtype", "bfloat16", "--kv-cache-dtype", "float32",
        "--max-model-len", 100,
    )  # fmt: skip
    assert (report["dtype"], report["kv_cache_dtype"]) == ("bfloat16", "float32")
    assert report["weight_bytes"] == 2 * report["parameters"]
    assert report["context_bytes"] == 100 * 2048


@pytest.mark.parametrize("name", [name for name in IN_THE_DATA if "FP8" not in name])
def test_published_parameter_counts(capsys, shared_data, name):
    report = inspect(capsys, config_of(shared_data, name))
    assert report["parameters"] == IN_THE_DATA[name]
    assert report["checkpoint"] is None


def test_a_large_model_on_more_devices_than_there_are(capsys, shared_data):
    path = config_of(shared_data, "meta-llama--Meta-Llama-3.1-70B")
    report = inspect(capsys, path, "--tensor-parallel-size", 16)
    # 80 layers, keys and values, 8 heads of 128, 2 bytes; 16 devices hold each twice.
    assert report["kv_bytes_per_token"] == 80 * 2 * 8 * 128 * 2
    assert report["kv_bytes_per_token_per_device"] == 80 * 2 * 1 * 128 * 2
    assert report["weight_bytes"] == 2 * 70_553_706_496
    assert report["weight_bytes"] / 16 < report["weight_bytes_per_device"]
    assert report["weight_bytes_per_device"] < 1.03 * report["weight_bytes"] / 16


def test_the_table_that_people_read(capsys):
    assert main(["inspect", "--tensor-parallel-size", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "parameters      935,296" in lines
    assert any(line.endswith("on each of 2 devices") for line in lines)
    table = lines[lines.index("") + 1 :]
    titles = "parameter shape dtype axes mesh axes per device bytes"
    assert table[0].split() == titles.split()
    (row,) = [line for line in table if line.startswith("layers.*.qkv x4")]
    assert "2 x 128 x 128" in row
    assert "1 x 128 x 128" in row
    assert row.endswith("256.00 KiB")
    assert len({len(line) for line in table}) == 1


def test_of_a_repository_only_the_config_is_fetched(tmp_path, monkeypatch, capsys):
    shutil.copy(DEFAULT_MODEL / "config.json", tmp_path)
    asked = {}

    def download(name, **options):
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    report = inspect(capsys, "org/model", "--revision", "v2")
    assert report["parameters"] == 935_296
    assert (asked["name"], asked["revision"]) == ("org/model", "v2")
    assert asked["allow_patterns"] == ["config.json"]


def test_headers_that_contradict_the_settings(tmp_path, capsys):
    shutil.copy(DEFAULT_MODEL / "config.json", tmp_path)
    arrays = load_file(DEFAULT_MODEL / "model.safetensors")
    arrays["model.norm.weight"] = arrays["model.norm.weight"][:-1]
    save_file(arrays, tmp_path / "model.safetensors")
    assert main(["inspect", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "tensor 'model.norm.weight' has shape (127,)" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nonexistent"], "'/nonexistent' is neither a folder nor"),
        (["--tensor-parallel-size", "0"], "tensor_parallel_size=0 must be at least 1"),
        (["--tensor-parallel-size", "3"], "tensor_parallel_size=3 must divide"),
        (["--max-model-len", "513"], "max_model_len=513 exceeds the 512 tokens"),
        (["--max-model-len", "-1"], "max_model_len=-1 must be at least 1"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--kv-cache-dtype", "fp8"], "invalid choice: 'fp8'"),
    ],
)
def test_errors_are_one_line(capsys, arguments, message):
    assert main(["inspect", *arguments]) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.err.count("\n") == 1
    assert shown.out == ""


def test_an_architecture_that_is_not_supported(tmp_path, capsys):
    file = tmp_path / "other.json"
    file.write_text('{"architectures": ["NoSuchForCausalLM"]}')
    assert main(["inspect", str(file)]) == 2
    assert "'NoSuchForCausalLM' is not supported" in capsys.readouterr().err


def test_layers_with_a_window_keep_no_more_than_it(capsys, tmp_path):
    config = {
        **LLAMA,
        "architectures": ["MistralForCausalLM"],
        "max_position_embeddings": 4096,
        "sliding_window": 100,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    report = inspect(capsys, tmp_path)
    assert report["context_bytes"] == 100 * report["kv_bytes_per_token"]
