"""Exported executables: what is loaded, and what is refused."""

import json

import pytest

from jllm.config import EngineConfig
from jllm.engine.create import create_engine
from jllm.errors import ConfigError
from tests.engines import (
    LLAMA,
    SMALL,
    counted_work,
    drain,
    model_folder,
    request,
    tokens_of,
)


def start(folder, **options):
    model = model_folder(json.dumps(LLAMA))
    options = {**SMALL, "executables": str(folder), **options}
    return create_engine(EngineConfig(model=str(model), **options))


def answers(engine):
    engine.add(request("plain", range(3, 30), temperature=0, max_tokens=6))
    engine.add(request("rules", range(3, 9), seed=1, top_k=5, logprobs=2, max_tokens=6))
    return tokens_of(drain(engine))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder with every executable of a small engine, and that engine's answers."""
    folder = tmp_path_factory.mktemp("executables")
    engine = start(folder)
    engine.programs.wait()
    expected = answers(engine)
    assert engine.programs.num_loaded == 0
    engine.close()
    return folder, expected


def test_a_start_from_executables_traces_and_compiles_nothing(exported):
    folder, expected = exported
    with counted_work() as work:
        engine = start(folder)
        engine.programs.wait()
        assert answers(engine) == expected
    assert work == []
    assert engine.programs.num_compiled == 0
    assert engine.programs.num_loaded == len(engine.programs.all_keys()) + 1
    engine.close()


@pytest.mark.slow
@pytest.mark.parametrize("change", [{"max_num_seqs": 7}, {"dtype": "bfloat16"}])
def test_other_options_have_other_executables(exported, change):
    folder, _ = exported
    engine = start(folder, **change)
    engine.close()
    assert engine.programs.num_loaded == 0


def test_a_damaged_file_is_compiled_again(exported, caplog):
    folder, expected = exported
    path = next(folder.rglob("prompt_logprobs-64")).with_name("prefill-64")
    path.write_bytes(path.read_bytes()[:-100])
    engine = start(folder)
    assert answers(engine) == expected
    engine.close()
    assert engine.programs.num_compiled == 1
    assert "it is damaged" in caplog.text
    caplog.clear()
    engine = start(folder)
    engine.close()
    assert engine.programs.num_compiled == 0
    assert "damaged" not in caplog.text


def test_files_that_others_can_write_are_not_run(exported, caplog):
    folder, expected = exported
    path = next(folder.rglob("prompt_logprobs-64")).with_name("prefill-64")
    path.chmod(0o666)
    engine = start(folder)
    assert answers(engine) == expected
    engine.close()
    assert engine.programs.num_compiled == 1
    assert "others can write to it" in caplog.text
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_folder_that_others_can_write_is_refused(tmp_path):
    tmp_path.chmod(0o777)
    with pytest.raises(ConfigError, match="writable by nobody else"):
        start(tmp_path)


@pytest.mark.slow
def test_a_pool_that_has_executables_is_taken(tmp_path, monkeypatch):
    """What is free on a computer differs from start to start."""
    monkeypatch.setattr("jllm.engine.startup.compilation_cache", lambda: None)

    def pool_with(mebibytes):
        size = int(mebibytes * 2**20)
        monkeypatch.setattr("jllm.engine.create.device_capacity", lambda _: size)
        known = {int(path.name) for path in tmp_path.glob("*/*")}
        engine = start(tmp_path, num_blocks=None, memory_utilization=0.9)
        num_blocks = engine.state.kv[0].shape[0]
        engine.close()
        return num_blocks, known

    first, _ = pool_with(7.5)
    second, known = pool_with(8.0)
    assert second >= 0.75 * first
    assert second in known
    third, known = pool_with(4.0)
    assert third < min(known)
