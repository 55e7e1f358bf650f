"""The command: what it prints, and what it refuses."""

import json
import re

import pytest

from jllm.cli import main
from tests.engines import LLAMA_8B

NO_COMPILER = ("--programs", "none")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama") / "config.json"
    path.write_text(json.dumps(LLAMA_8B))
    return path


def run(capsys, config, *options):
    """Exit code, what was printed, and what went wrong."""
    code = main(["plan", str(config), *options])
    found = capsys.readouterr()
    return code, found.out, found.err


def test_a_plan_as_text(capsys, config):
    code, out, _ = run(
        capsys, config, "--topology", "v6e:4x4", "--tensor", "8", *NO_COMPILER
    )
    assert code == 0
    for words in (
        "tensor=8 x data=2",
        "GiB weights",
        "of 2,048",
        "of 32,768",
        "$2.70 per device and hour",
        "Nothing was compiled",
        "decode   256",
        "docs.cloud.google.com",
    ):
        assert words in out


def test_a_plan_as_json(capsys, config):
    options = ("--gpu", "h200", "--devices", "8", "--tensor", "4", "--json")
    price = ("--price-per-device-hour", "3.5", "--rows", "64")
    code, out, _ = run(capsys, config, *options, *price, *NO_COMPILER)
    assert code == 0
    report = json.loads(out)
    assert report["layout"] == {"tensor": 4, "data": 2, "pipeline": 1}
    assert report["memory_per_device"]["fits"] is True
    assert report["concurrent_requests"]["2048"] == 2 * 64
    assert report["dollars_per_device_hour"] == 3.5
    assert [step["size"] for step in report["steps"] if step["kind"] == "decode"] == [
        64,
        32,
        8,
    ]
    assert all(step["compiled"] is None for step in report["steps"])


def test_without_a_price_there_is_no_cost(capsys, config):
    _, out, _ = run(capsys, config, "--gpu", "h200", "--tensor", "1", *NO_COMPILER)
    assert "give --price-per-device-hour" in out


def test_a_search(capsys, config):
    where = ("--topology", "v5e:4x4", "--search")
    code, out, _ = run(capsys, config, *where, *NO_COMPILER)
    assert code == 0
    assert re.search(r"0 of \d+ layouts that fit were compiled", out)
    assert "refused: tensor=1" in out
    code, out, _ = run(capsys, config, *where, "--json", *NO_COMPILER)
    report = json.loads(out)
    speeds = [
        plan["throughput"]["output_tokens_per_second"] for plan in report["plans"]
    ]
    assert speeds == sorted(speeds, reverse=True)
    assert report["refused"][0]["layout"]["tensor"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--topology", "v6e:3x3", "--tensor", "1"), "there are v5e: 1x1, 2x2"),
        (("--topology", "v6e:2x2", "--tensor", "8"), "takes 8 devices, but v6e:2x2"),
        (("--topology", "v6e:2x2"), "--tensor --search is required"),
        (("--tensor", "1"), "--topology --gpu is required"),
        (("--topology", "v5e:1x1", "--tensor", "1"), "GiB are missing on each device"),
        (("--topology", "v5e:1x1", "--search"), "no layout fits v5e:1x1"),
        (("--topology", "v6e:8x8", "--tensor", "64"), "must divide the 32 query heads"),
        (
            ("--topology", "v6e:2x2", "--tensor", "2", "--pipeline", "4"),
            "takes 8 devices, but v6e:2x2",
        ),
        (("--topology", "v6e:2x2", "--search", "--data", "2"), "leave them out"),
        (("--topology", "v6e:2x2", "--tensor", "1", "--devices", "4"), "is for --gpu"),
        (("--gpu", "b200", "--tensor", "1"), "there are h200"),
        (("--gpu", "h200", "--tensor", "1", "--rows", "0"), "max_num_seqs=0"),
        (("--gpu", "h200", "--tensor", "1", "--input-tokens", "0"), "input_tokens=0"),
        (
            ("--gpu", "h200", "--tensor", "1", "--price-per-device-hour", "0"),
            "price_per_device_hour=0.0 must be above 0",
        ),
        (
            ("--gpu", "h200", "--tensor", "1", "--max-model-len", "200000"),
            "exceeds the 131072 tokens",
        ),
    ],
)
def test_what_is_refused_is_named(capsys, config, options, message):
    code, out, error = run(capsys, config, *options, *NO_COMPILER)
    assert (code, out) == (2, "")
    assert message in error


@pytest.mark.parametrize("where", [("--topology", "v6e:2x2"), ("--gpu", "h200")])
def test_a_missing_compiler_is_named(capsys, config, where, monkeypatch):
    monkeypatch.setattr(
        "jllm.plan.described.COMPILERS", {"tpu": ("no",), "gpu": ("no",)}
    )
    code, _, error = run(capsys, config, *where, "--tensor", "1")
    assert code == 2
    assert "pip install 'jllm[aot]'" in error
