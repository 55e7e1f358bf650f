"""`jllm compile`, and the start that finds what it wrote."""

import json
import shutil

import pytest

from jllm import LLM
from jllm.cli import main
from tests.engines import LLAMA, SMALL, counted_work, model_folder

pytestmark = pytest.mark.slow

OPTIONS = {**SMALL, "skip_tokenizer_init": True}
FLAGS = (
    "--max-num-seqs=8",
    "--max-num-batched-tokens=64",
    "--num-blocks=256",
    "--no-compile-ahead",
)
PROMPT = {"prompt_token_ids": list(range(3, 20))}


def copy_of_model(folder):
    """A checkpoint of its own, beside which files can be written."""
    return shutil.copytree(model_folder(json.dumps(LLAMA)), folder / "model")


def answer(llm):
    return llm.generate([PROMPT], use_tqdm=False)[0].outputs[0].token_ids


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A model with its executables beside it, and what a start without them says."""
    model = copy_of_model(tmp_path_factory.mktemp("compiled"))
    assert main(["compile", str(model), *FLAGS, "--quiet"]) == 0
    with LLM(model, executables=None, **OPTIONS) as llm:
        assert llm.engine.programs.num_loaded == 0
        return model, answer(llm)


@pytest.mark.slow
def test_a_start_finds_executables_beside_the_model(compiled):
    model, expected = compiled
    with counted_work() as work, LLM(model, **OPTIONS) as llm:
        llm.wait_until_compiled()
        assert answer(llm) == expected
        assert llm.engine.programs.num_compiled == 0
        assert llm.engine.programs.num_loaded == len(llm.engine.programs.all_keys()) + 1
    assert work == []


@pytest.mark.slow
def test_a_start_writes_nothing_beside_the_model(compiled):
    model, expected = compiled
    before = sorted(model.rglob("*"))
    with LLM(model, **{**OPTIONS, "num_blocks": 255}) as llm:  # another pool
        assert answer(llm) == expected
        assert llm.engine.programs.num_loaded == 0
    with LLM(model, **{**OPTIONS, "max_num_seqs": 7}) as llm:  # another fingerprint
        assert llm.engine.programs.num_loaded == 0
    assert sorted(model.rglob("*")) == before


def test_what_is_there_is_not_compiled_again(compiled, capsys):
    model, _ = compiled
    assert main(["compile", str(model), *FLAGS, "--quiet"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{model}/executables/")
    assert ": 0 programs compiled, " in out


def test_files_that_others_can_write_are_compiled_instead(compiled, caplog):
    model, expected = compiled
    (folder,) = (model / "executables").iterdir()
    folder.chmod(0o777)
    try:
        with LLM(model, **OPTIONS) as llm:
            assert answer(llm) == expected
            assert llm.engine.programs.num_loaded == 0
    finally:
        folder.chmod(0o700)
    assert "writable by nobody else" in caplog.text


def test_another_folder(compiled, tmp_path, capsys):
    """What a folder holds is of the settings, wherever the model lies."""
    model, out = copy_of_model(tmp_path), tmp_path / "out"
    shutil.copytree(compiled[0] / "executables", out)
    flags = (*FLAGS, "--output", str(out), "--quiet")
    assert main(["compile", str(model), *flags]) == 0
    (folder,) = out.iterdir()
    assert capsys.readouterr().out.startswith(f"{folder}: 0 programs compiled")
    assert not (model / "executables").exists()
    with LLM(model, executables=out, **OPTIONS) as llm:
        assert llm.engine.programs.num_compiled == 0
        assert llm.engine.programs.num_loaded > 0


@pytest.mark.parametrize("output", ["", "auto"])
def test_a_folder_without_a_name_is_refused(output, capsys):
    assert main(["compile", "nowhere", "--output", output]) == 2
    assert "must name a folder" in capsys.readouterr().err


def test_a_folder_that_others_can_write_is_refused(tmp_path, capsys):
    tmp_path.chmod(0o777)
    flags = (*FLAGS, "--output", str(tmp_path))
    assert main(["compile", str(model_folder(json.dumps(LLAMA))), *flags]) == 2
    assert "writable by nobody else" in capsys.readouterr().err
