import functools
import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jllm import LLM, SamplingParams
from jllm.cli import main
from jllm.engine.create import DEFAULT_MODEL
from jllm.weights.export import save_safetensors
from jllm.weights.tensors import find_tensors
from tests.engines import LLAMA, SMALL, random_tensors

PROMPT = "Once upon a time"


def convert(source, out, form, *arguments):
    command = ["convert", str(source), str(out), "--format", form, "--quiet"]
    return main([*command, *map(str, arguments)])


def described(folder):
    return json.loads((folder / "orbax.json").read_text())


def assert_same_files(folder, other):
    """The same tensors to the bit."""
    mine, theirs = (
        functools.reduce(
            dict.__or__, map(load_file, sorted(place.glob("*.safetensors")))
        )
        for place in (folder, other)
    )
    assert mine.keys() == theirs.keys()
    for name, array in theirs.items():
        assert mine[name].dtype == array.dtype
        assert mine[name].tobytes() == array.tobytes()


@pytest.fixture(scope="module")
def orbax_folder(tmp_path_factory):
    """The embedded model as orbax writes it."""
    out = tmp_path_factory.mktemp("convert") / "orbax"
    assert convert(DEFAULT_MODEL, out, "orbax") == 0
    return out


def test_orbax_folder_is_a_model(orbax_folder):
    """Tokenizer, template and settings are there; tokens are the same."""
    assert described(orbax_folder)["tensor_parallel_size"] == 2  # KV heads
    params = SamplingParams(temperature=0, max_tokens=12)
    texts = []
    for model in (orbax_folder, DEFAULT_MODEL):
        with LLM(model, **SMALL) as llm:
            (output,) = llm.generate(PROMPT, params, use_tqdm=False)
            texts.append(output.outputs[0].text)
            story = [{"role": "user", "content": "Tell me a story."}]
            texts.append(llm.chat_prompt(story))
    assert texts[:2] == texts[2:]
    assert len(texts[0]) > 10


def test_there_and_back_gives_the_same_bits(orbax_folder, tmp_path):
    out = tmp_path / "back"
    assert convert(orbax_folder, out, "safetensors") == 0
    assert_same_files(out, DEFAULT_MODEL)
    names = {path.name for path in out.iterdir()}
    assert {"config.json", "tokenizer.json", "generation_config.json"} <= names
    assert not names & {"orbax", "orbax.json"}


def test_transformers_loads_what_comes_back(orbax_folder, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    out = tmp_path / "back"
    assert convert(orbax_folder, out, "safetensors") == 0
    mine, theirs = (
        transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()
        for folder in (out, DEFAULT_MODEL)
    )
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("size", [1, 4])
def test_slices_as_asked_for(orbax_folder, tmp_path, size):
    """From another mesh's checkpoint; four devices copy KV heads."""
    out, back = tmp_path / "out", tmp_path / "back"
    assert convert(orbax_folder, out, "orbax", "--tensor-parallel-size", size) == 0
    assert described(out)["tensor_parallel_size"] == size
    assert convert(out, back, "safetensors") == 0
    assert_same_files(back, DEFAULT_MODEL)


@pytest.mark.slow
def test_sharded_loading_of_a_converted_model(orbax_folder):
    params = SamplingParams(temperature=0, max_tokens=8)
    tokens = []
    for size in (1, 4):
        with LLM(orbax_folder, tensor_parallel_size=size, **SMALL) as llm:
            (output,) = llm.generate(PROMPT, params, use_tqdm=False)
            tokens.append(output.outputs[0].token_ids)
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("form", ["orbax", "safetensors"])
def test_another_type(tmp_path, form):
    source = tmp_path / "source"
    source.mkdir()
    arrays = random_tensors(LLAMA)
    save_file(arrays, source / "model.safetensors")
    (source / "config.json").write_text(json.dumps(LLAMA))
    out, back = tmp_path / "out", tmp_path / "back"
    assert convert(source, out, form, "--dtype", "bfloat16") == 0
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert convert(out, back, "safetensors") == 0
    found = load_file(back / "model.safetensors")
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        expected = array.astype(jax.numpy.bfloat16)
        assert found[name].tobytes() == expected.tobytes()


def test_values_that_the_type_cannot_hold(tmp_path, capsys):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    arrays = random_tensors(LLAMA)
    arrays["lm_head.weight"][3, 4] = 1e6
    save_file(arrays, source / "model.safetensors")
    (source / "config.json").write_text(json.dumps(LLAMA))
    for form in ("orbax", "safetensors"):
        assert convert(source, out, form, "--dtype", "float16") == 2
        assert "'lm_head.weight' has values that" in capsys.readouterr().err
        assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_several_files_and_an_index(tmp_path):
    arrays = random_tensors(LLAMA)
    save_file(arrays, tmp_path / "model.safetensors")
    out = tmp_path / "out"
    out.mkdir()
    tensors = find_tensors(tmp_path)
    save_safetensors(out, tensors, np.dtype("float32"), shard_bytes=100_000)
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 2
    found = find_tensors(out)
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name].map(), array)


def test_gguf_becomes_a_folder(tmp_path):
    from tests.jllm.weights.test_gguf import model

    path, expected = model("llama", "Q4_0")
    out = tmp_path / "out"
    assert convert(path, out, "safetensors", "--dtype", "float32") == 0
    found = load_file(out / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 320


def test_an_empty_folder_is_filled(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    assert convert(DEFAULT_MODEL, out, "safetensors") == 0
    assert_same_files(out, DEFAULT_MODEL)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_refusals(tmp_path, capsys, orbax_folder):
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").write_text("")
    broken = tmp_path / "broken"
    shutil.copytree(orbax_folder, broken)
    chunk = broken / "orbax" / "layers.3.qkv" / "1.0.0"
    chunk.write_bytes(chunk.read_bytes()[:100])
    out = tmp_path / "out"
    cases = [
        ((DEFAULT_MODEL, full, "orbax"), "is there and is not an empty folder"),
        ((DEFAULT_MODEL, full / "file", "orbax"), "is there and is not an empty"),
        ((DEFAULT_MODEL, full / "file" / "x", "orbax"), "cannot be made"),
        ((DEFAULT_MODEL, out, "pickle"), "invalid choice: 'pickle'"),
        ((tmp_path / "none", out, "orbax"), "neither a folder nor"),
        ((broken, out, "safetensors"), f"{chunk}: has 100 bytes"),
        (
            (DEFAULT_MODEL, out, "orbax", "--tensor-parallel-size", 3),
            "tensor_parallel_size=3 must divide",
        ),
        (
            (DEFAULT_MODEL, out, "orbax", "--tensor-parallel-size", 0),
            "tensor_parallel_size=0 must be at least 1",
        ),
        (
            (DEFAULT_MODEL, out, "safetensors", "--tensor-parallel-size", 2),
            "is for orbax only",
        ),
    ]
    for arguments, message in cases:
        assert convert(*arguments) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"full", "broken"}
