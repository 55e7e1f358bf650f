import json
import sys

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

from jllm.errors import CheckpointError, ModelNotFoundError
from jllm.weights.hub import read_json, resolve_model


def write_model(folder, **config):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"hidden_size": 8, **config}))
    return folder


def test_local_folder_is_read(tmp_path):
    folder = write_model(tmp_path / "m")
    files = resolve_model(str(folder))
    assert files.path == folder
    assert files.config == {"hidden_size": 8}
    assert files.generation_config == {}
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
    assert resolve_model(str(folder)).generation_config == {"eos_token_id": 2}


def test_code_of_a_checkpoint_is_never_run(tmp_path):
    canary = tmp_path / "canary"
    folder = write_model(tmp_path / "m", auto_map={"AutoModel": "modeling_x.Model"})
    for name in ("modeling_x.py", "__init__.py", "configuration_x.py"):
        (folder / name).write_text(f"open({str(canary)!r}, 'w').close()")
    before = list(sys.path)
    resolve_model(str(folder))
    assert not canary.exists()
    assert sys.path == before
    assert "modeling_x" not in sys.modules


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read as JSON"),
        (b"{", "cannot be read as JSON"),
        (b"\xff\xfe{}", "cannot be read as JSON"),
        (b"[" * 100_000, "cannot be read as JSON"),
        (b"[]", "holds a list"),
        (b"null", "holds a NoneType"),
        (b'"text"', "holds a str"),
    ],
)
def test_bad_config_json(tmp_path, content, message):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as error:
        resolve_model(str(tmp_path))
    assert str(path) in str(error.value)


def test_missing_config_json_and_a_folder_of_that_name(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        resolve_model(str(tmp_path))
    (tmp_path / "config.json").mkdir()
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize(
    "name", ["", "/no/such/folder", "./nowhere", "a/b/c", "../up", "a b", "x\0y"]
)
def test_names_of_nothing_do_not_reach_the_network(name, monkeypatch):
    def fail(*_args, **_kwargs):
        raise AssertionError("fetched")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ModelNotFoundError, match="neither a folder nor"):
        resolve_model(name)


def test_a_file_is_refused(tmp_path):
    folder = write_model(tmp_path / "m")
    with pytest.raises(ModelNotFoundError, match="is a file"):
        resolve_model(str(folder / "config.json"))


@pytest.mark.parametrize("with_weights", [True, False])
def test_repository_is_fetched_without_pickles_and_code(
    tmp_path, monkeypatch, with_weights
):
    folder = write_model(tmp_path / "m")
    asked = {}

    def download(name, **options):
        asked.update(options, name=name)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    files = resolve_model("org/model", revision="v2", with_weights=with_weights)
    assert files.path == folder
    assert (asked["name"], asked["revision"]) == ("org/model", "v2")
    names = [
        "config.json",
        "tokenizer.model",
        "chat_template.jinja",
        "model-00001-of-00002.safetensors",
        "pytorch_model.bin",
        "model.pt",
        "modeling_x.py",
        "original/consolidated.00.safetensors",
        "consolidated.safetensors",
    ]
    kept = set(
        huggingface_hub.utils.filter_repo_objects(
            names,
            allow_patterns=asked["allow_patterns"],
            ignore_patterns=asked["ignore_patterns"],
        )
    )
    assert kept == set(names[: 4 if with_weights else 3])


@pytest.mark.parametrize("kind", [LocalEntryNotFoundError, OSError, ValueError])
def test_repository_that_cannot_be_had(monkeypatch, kind):
    def download(*_args, **_kwargs):
        raise kind("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(
        ModelNotFoundError, match=r"'org/model' at revision 'x'.*offline"
    ):
        resolve_model("org/model", revision="x")
    assert issubclass(RepositoryNotFoundError, OSError)
